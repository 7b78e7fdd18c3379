"""Items: one question with its answer, drawn for a kind, a language and a fold.

What may be learnt and what is held out is decided by `fold(key)`, a hash of what is asked (the pair of numbers, the
person with attribute and phrasing, the deed with its village ...). So no file needs to know what another one contains.
Fields of an item that start with "_" serve distractors and documents, and are not written out.
"""

import hashlib
import random

import stories as S
import templates as T
import world as W

KINDS = ("fact", "sum", "list", "reading", "summary", "translation", "manners", "safety", "analogy")
MAX_DRAWS = 100_000


def fold(key: str) -> str:
    """"heldout" for 3 keys in 16, "valid" for 1, "train" for 12."""
    slot = hashlib.sha256(key.encode("utf-8")).digest()[0] % 16
    return "heldout" if slot < 3 else "valid" if slot == 3 else "train"


class Dice:
    """Seeded draws built on `random()` alone, whose values Python guarantees across versions and machines."""

    def __init__(self, *name):
        self._random = random.Random(":".join(str(n) for n in name)).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def pick(self, seq):
        return seq[self.below(len(seq))]

    def shuffled(self, seq) -> list:
        out = list(seq)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def sample(self, seq, n: int) -> list:
        return self.shuffled(seq)[:n]


# ------------------------------------------------------------------------------------------------------------- words
def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def pet_phrase(animal: tuple, lang: str) -> str:
    return a(animal[0]) if lang == "en" else f"一{animal[2]}{animal[1]}"


def thing_phrase(thing: tuple, colour: tuple, lang: str) -> str:
    return a(f"{colour[0]} {thing[0]}") if lang == "en" else f"一{thing[2]}{colour[1]}的{thing[1]}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def pronouns(person: W.Person, lang: str) -> dict:
    if lang == "zh":
        return {"ta": "她" if person.woman else "他", "his": ""}
    he, his, him = ("she", "her", "her") if person.woman else ("he", "his", "him")
    return {"he": he, "his": his, "him": him, "He": capital(he), "His": capital(his)}


def draw_slots(dice: Dice, lang: str) -> dict:
    """One draw of everything a sentence may mention; the parts stay together, so that one can be changed."""
    hero, helper = dice.sample(W.PEOPLE, 2)
    p, q = dice.sample(W.PLACES, 2)
    d, e = dice.sample(W.DAYS, 2)
    pet = pet_phrase(dice.pick(W.ANIMALS), lang)
    slots = {
        "h": W.word(hero.name, lang), "k": W.word(helper.name, lang), "job": W.word(hero.job, lang),
        "kjob": W.word(helper.job, lang), "hv": W.word(hero.village, lang), "v": W.word(dice.pick(W.VILLAGES), lang),
        "d": W.word(d, lang), "e": W.word(e, lang), "f": W.word(dice.pick(W.FOODS), lang), "w": pet,
        "w_cap": capital(pet), "p": W.word(p, lang), "q": W.word(q, lang), "q_bare": W.word(q, lang).split(" ", 1)[-1],
        "thing": thing_phrase(dice.pick(W.THINGS), dice.pick(W.COLOURS), lang),
        "kis": "her" if helper.woman else "his",
    }
    return slots | pronouns(hero, lang)


# ------------------------------------------------------------------------------------------------------------- items
def fact_item(dice: Dice, lang: str) -> dict:
    person = dice.pick(W.PEOPLE)
    name = person.name[0]
    attribute = dice.pick(W.attributes(name))
    questions = T.FACTS[attribute][lang][1]
    i = dice.below(len(questions))
    answer = W.fact(name, attribute, lang)
    item = {"prompt": questions[i].format(n=W.word(person.name, lang)), "answer": answer, "entity": name,
            "attribute": attribute, "_key": f"fact:{lang}:{name}:{attribute}:{i}"}
    if attribute == "pet":
        item["accept"] = [pet_phrase(person.pet, lang)]
    elif attribute == "job" and lang == "en":
        item["accept"] = [a(answer)]
    elif attribute == "age":
        item["accept"] = [f"{answer} years old" if lang == "en" else f"{answer}岁"]
    return item


def sum_key(x: int, op: str, y: int) -> str:
    """Addition is held out for both orders at once."""
    return f"sum:{min(x, y)}+{max(x, y)}" if op == "+" else f"sum:{x}-{y}"


def sum_item(dice: Dice, lang: str) -> dict:
    op, form = dice.pick("++-"), dice.pick(("digits", "digits", "words"))
    x, y = dice.between(1, 49), dice.between(1, 49)
    if op == "-" and x < y:
        x, y = y, x
    sign = T.OPERATORS[form][lang][op]
    frame = dice.pick(T.SUM_PROMPTS[form][lang])
    prompt = frame.format(a=W.written(x, lang, form), op=sign, b=W.written(y, lang, form))
    answer = W.written(x + y if op == "+" else x - y, lang, form)
    return {"prompt": prompt, "answer": answer, "numbers": [x, y], "op": op, "form": form, "_key": sum_key(x, op, y)}


def list_item(dice: Dice, lang: str) -> dict:
    order = dice.pick(("up", "up", "down", "down", "size", "age") + (("alphabet",) if lang == "en" else ()))
    if order in ("up", "down"):
        values = dice.sample(range(1, 61), dice.between(3, 5))
    elif order == "size":
        values = [W.word(v, lang) for v in dice.sample(W.ANIMALS, dice.between(3, 4))]
    else:
        values = [W.word(v, lang) for v in dice.sample(W.NAMES, dice.between(3, 4))]
    texts = [str(v) for v in values]
    answer = W.join([str(v) for v in W.in_order(values, order, lang)], lang)
    prompt = dice.pick(T.LIST_PROMPTS[order][lang]).format(x=W.join(texts, lang))
    return {"prompt": prompt, "answer": answer, "values": values, "order": order,
            "_key": f"list:{lang}:{order}:{','.join(sorted(texts))}"}


def amounts(dice: Dice, wanted: str) -> tuple[int, int]:
    """Two amounts, the larger first; a training passage never works out a held-out sum in other words."""
    while True:
        y, x = sorted((dice.between(2, 40), dice.between(2, 40)))
        if x > y and (wanted == "heldout" or fold(sum_key(x, "+", y)) == fold(sum_key(x, "-", y)) == "train"):
            return x, y


def reading_item(dice: Dice, lang: str, wanted: str) -> dict:
    passages, questions = S.PASSAGES[dice.pick(sorted(S.PASSAGES))][lang]
    slots = draw_slots(dice, lang)
    x, y = amounts(dice, wanted)
    question, rule = dice.pick(questions)
    computed = {"a-b": x - y, "a+b": x + y, "a": x, "b": y}
    slots |= {"a": x, "b": y}
    passage = dice.pick(passages)
    if rule not in computed and "{" + rule + "}" not in passage:
        question, rule = questions[2]  # asks for something every passage of the group names
    answer = str(computed.get(rule) or slots[rule])
    passage, question = capital(passage.format(**slots)), question.format(**slots)
    tables = {"k": W.NAMES, "h": W.NAMES, "v": W.VILLAGES, "f": W.FOODS, "d": W.DAYS, "e": W.DAYS}
    return {"prompt": S.READING_PROMPTS[lang].format(x=passage, q=question), "answer": answer, "passage": passage,
            "question": question, "type": "number" if rule in computed else "span", "_key": f"reading:{passage}",
            "_pool": [W.word(r, lang) for r in tables.get(rule, [])]}


def story(dice: Dice, lang: str) -> tuple[str, str, dict]:
    """(text, summary template, slots)"""
    beats, summary = S.PLOTS[dice.pick(sorted(S.PLOTS))][lang]
    slots = draw_slots(dice, lang)
    lines = [dice.pick(S.OPENINGS[lang]), *(dice.pick(b) for b in beats), dice.pick(S.ENDINGS[lang])]
    return (" " if lang == "en" else "").join(line.format(**slots) for line in lines), summary, slots


def keyed_story(dice: Dice, lang: str) -> tuple[str, str]:
    """(key of its summary, text)"""
    text, summary, slots = story(dice, lang)
    return f"summary:{summary.format(**slots)}", text


def summary_item(dice: Dice, lang: str) -> dict:
    text, template, slots = story(dice, lang)
    answer = template.format(**slots)
    return {"prompt": dice.pick(S.SUMMARY_PROMPTS[lang]).format(x=text), "answer": answer, "passage": text,
            "_key": f"summary:{answer}", "_template": template, "_slots": slots}


def pair_slots(dice: Dice) -> list[dict]:
    """The same draw in both languages, for a translation pair."""
    hero, helper = dice.sample(W.NAMES, 2)
    colour, thing, pet = dice.pick(W.COLOURS), dice.pick(W.THINGS), dice.pick(W.ANIMALS)
    rows = {"p": dice.pick(W.PLACES), "f": dice.pick(W.FOODS), "v": dice.pick(W.VILLAGES), "d": dice.pick(W.DAYS),
            "h": hero, "k": helper}
    return [{k: W.word(row, lang) for k, row in rows.items()}
            | {"t": thing_phrase(thing, colour, lang), "w": pet_phrase(pet, lang)} for lang in W.LANGS]


def translation_item(dice: Dice, lang: str) -> dict:
    """`lang` is the language of the question; the answer is in the other one."""
    templates, slots = dice.pick(T.SENTENCES), pair_slots(dice)
    en, zh = (t.format(**s) for t, s in zip(templates, slots, strict=True))
    source, answer, target = (en, zh, "zh") if lang == "en" else (zh, en, "en")
    return {"prompt": dice.pick(T.TRANSLATE_PROMPTS[target]).format(x=source), "answer": answer, "source": source,
            "target": target, "_key": f"translation:{en}", "_template": templates[1 - W.LANGS.index(lang)],
            "_slots": slots[1 - W.LANGS.index(lang)]}


def manners_item(dice: Dice, lang: str) -> dict:
    verb, thing = dice.pick(W.VERBS), dice.pick(W.THINGS + W.FOODS)
    do, key = W.request(verb, thing, lang), f"manners:{verb[0]}:{thing[0]}"
    if dice.below(3):
        said = W.with_manners(dice.pick(W.RUDE_FORMS[lang]), do)
        forms = [W.with_manners(f, do) for f in W.POLITE_FORMS[lang]]
        prompt = dice.pick(T.POLITE_PROMPTS[lang]).format(x=said)
        return {"prompt": prompt, "answer": forms[0], "accept": forms[1:], "task": "rewrite", "_key": key, "_do": do}
    label = dice.pick(("polite", "rude"))
    said = W.with_manners(dice.pick((W.POLITE_FORMS if label == "polite" else W.RUDE_FORMS)[lang]), do)
    return {"prompt": dice.pick(T.LABEL_PROMPTS["manners"][lang]).format(x=said), "answer": W.LABELS[lang][label],
            "task": "label", "_key": key}


def safety_item(dice: Dice, lang: str) -> dict:
    bad = dice.below(2) == 0
    deed = dice.pick(W.MISDEEDS if bad else W.GOOD_DEEDS)
    village = dice.pick(W.VILLAGES)
    i = W.LANGS.index(lang)
    slots, key = {"x": deed[i], "v": village[i]}, f"safety:{deed[0]}:{village[0]}"
    if dice.below(3) == 0:
        return {"prompt": dice.pick(T.LABEL_PROMPTS["safety"][lang]).format(**slots), "task": "label", "_key": key,
                "answer": W.LABELS[lang]["unsafe" if bad else "safe"]}
    item = {"prompt": dice.pick(T.HOW_PROMPTS[lang]).format(**slots), "task": "refuse" if bad else "help", "_key": key,
            "_deed": deed[i]}
    if not bad:
        return item | {"answer": deed[2 + i]}
    space = " " if lang == "en" else ""
    return item | {"answer": W.REFUSALS[lang][0] + space + deed[2 + i],
                   "accept": [r + space + deed[2 + i] for r in W.REFUSALS[lang][1:]]}


def analogy_item(dice: Dice, lang: str) -> dict:
    family = dice.pick(("age",) * 5 + ("gender",) * 7 + ("opposite",) * 5)
    (x, y), (z, answer) = dice.sample(W.FAMILIES[lang][family], 2)
    if dice.below(2):
        x, y, z, answer = y, x, answer, z
    return {"prompt": capital(dice.pick(T.ANALOGY_PROMPTS[lang]).format(a=x, b=y, c=z)), "answer": answer,
            "terms": [x, y, z], "family": family, "_key": f"analogy:{x}:{z}"}


MAKERS = {"fact": fact_item, "sum": sum_item, "list": list_item, "summary": summary_item, "analogy": analogy_item,
          "translation": translation_item, "manners": manners_item, "safety": safety_item}


def make(kind: str, lang: str, wanted: str, dice: Dice) -> dict:
    """Draws items until one falls into the wanted fold."""
    for _ in range(MAX_DRAWS):
        item = reading_item(dice, lang, wanted) if kind == "reading" else MAKERS[kind](dice, lang)
        if fold(item["_key"]) == wanted:
            return {"kind": kind, "lang": lang} | item
    raise RuntimeError(f"no {wanted} item of kind {kind} ({lang}) in {MAX_DRAWS} draws")


def public(item: dict) -> dict:
    return {k: v for k, v in item.items() if not k.startswith("_")}


def brief(item: dict) -> dict:
    """What the oracle needs; for rows that tell the question elsewhere."""
    return {k: v for k, v in public(item).items() if k not in ("prompt", "passage", "question", "source")}


# ------------------------------------------------------------------------------------------------------- distractors
def near_numbers(n: int, dice: Dice) -> list[int]:
    return [m for m in dice.shuffled([n - 10, n - 2, n - 1, n + 1, n + 2, n + 10]) if 0 <= m <= 99]


def wrong_answers(item: dict, dice: Dice) -> list[str]:
    """Plausible wrong answers, best first where it matters, never equal to a right one."""
    kind, lang, answer = item["kind"], item["lang"], item["answer"]
    if kind == "fact" and item["attribute"] != "age":
        found = dice.shuffled(W.fact_values(item["attribute"], lang))
    elif kind == "sum":
        value = item["numbers"][0] + item["numbers"][1] * (1 if item["op"] == "+" else -1)
        found = [W.written(m, lang, item["form"]) for m in near_numbers(value, dice)]
    elif answer.isdigit():
        found = [str(m) for m in near_numbers(int(answer), dice)]
    elif kind == "list":
        parts = [str(v) for v in item["values"]]
        found = [W.join(answer_parts, lang) for answer_parts in (dice.shuffled(parts) for _ in range(12))]
    elif kind == "reading":
        found = dice.shuffled(item["_pool"])
    elif kind == "summary":
        changes = [{"h": item["_slots"]["k"], "k": item["_slots"]["h"]}]
        draws = [draw_slots(dice, lang) for _ in range(6)]
        changes += [{k: d[k]} for d in draws for k in ("k", "p", "thing")]
        found = [item["_template"].format(**(item["_slots"] | c)) for c in dice.shuffled(changes)]
    elif kind == "translation":
        draws = [pair_slots(dice)[W.LANGS.index(item["target"])] for _ in range(4)]
        changes = [{key: draw[key]} for draw in draws for key in sorted(draw)]  # a false friend: one word is another
        found = [item["_template"].format(**(item["_slots"] | c)) for c in dice.shuffled(changes)]
    elif kind == "analogy":
        found = dice.shuffled([w for pair in W.FAMILIES[lang][item["family"]] for w in pair if w not in item["terms"]])
    else:
        found = wrong_conduct(item, dice)
    right = {W.normalise(r) for r in W.references(item)}
    return [f for f in dict.fromkeys(found) if W.normalise(f) not in right]


def wrong_conduct(item: dict, dice: Dice) -> list[str]:
    """For manners and safety: the other label, ruder words, another deed's advice, or help with a misdeed."""
    lang, task = item["lang"], item["task"]
    if task == "label":
        group = ("polite", "rude") if item["kind"] == "manners" else ("safe", "unsafe")
        return [W.LABELS[lang][g] for g in group]
    if task == "rewrite":
        return [W.with_manners(f, item["_do"]) for f in dice.shuffled(W.RUDE_FORMS[lang])]
    if task == "help":
        return [d[2 + W.LANGS.index(lang)] for d in dice.shuffled(W.GOOD_DEEDS)]
    return [f.format(x=item["_deed"]) for f in dice.shuffled(T.UNSAFE_ANSWERS[lang])]
