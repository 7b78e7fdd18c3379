"""Pretraining documents: one function per kind, `(dice, lang) -> text`. All that they ask is of the train fold."""

import kinds as K
import templates as T
import world as W
from kinds import Dice


def qa(dice: Dice, lang: str, item: dict) -> str:
    return dice.pick(T.QA_FRAMES[lang]).format(q=item["prompt"], a=item["answer"])


def statement(dice: Dice, lang: str, person: W.Person, attribute: str) -> str:
    value = W.fact(person.name[0], attribute, lang)
    an = K.pet_phrase(person.pet, lang) if attribute == "pet" else value
    slots = {"n": W.word(person.name, lang), "v": value, "an": an} | K.pronouns(person, lang)
    return K.capital(dice.pick(T.FACTS[attribute][lang][0]).format(**slots))


def fact_doc(dice: Dice, lang: str) -> str:
    """A portrait of one person, a tour of one village, or a few questions."""
    space = " " if lang == "en" else ""
    kind = dice.below(3)
    if kind == 0:
        person = dice.pick(W.PEOPLE)
        chosen = dice.sample(W.attributes(person.name[0]), dice.between(3, 6))
        return space.join(statement(dice, lang, person, attribute) for attribute in chosen)
    if kind == 1:
        village = dice.pick(W.VILLAGES)
        people = [p for p in dice.shuffled(W.PEOPLE) if p.village == village]
        lines = [statement(dice, lang, p, at) for p in people
                 for at in ("village", *dice.sample(W.attributes(p.name[0])[1:], 2))]
        return space.join(lines)
    return "\n".join(qa(dice, lang, K.make("fact", lang, "train", dice)) for _ in range(dice.between(2, 4)))


def sum_doc(dice: Dice, lang: str) -> str:
    """A page of an exercise book: all sums in one manner of writing, or asked and answered."""
    if dice.below(4) == 0:
        return "\n".join(qa(dice, lang, K.make("sum", lang, "train", dice)) for _ in range(dice.between(2, 4)))
    form, line, length, rows = dice.pick(("digits", "digits", "words")), dice.below(6), dice.between(4, 8), []
    while len(rows) < length:
        item = K.make("sum", lang, "train", dice)
        if item["form"] != form:
            continue
        x, y = (W.written(n, lang, form) for n in item["numbers"])
        slots = {"a": x, "b": y, "op": T.OPERATORS[form][lang][item["op"]], "c": item["answer"]}
        rows.append(K.capital(T.SUM_LINES[form][lang][line].format(**slots)))
    return "\n".join(rows)


def list_doc(dice: Dice, lang: str) -> str:
    return "\n".join(qa(dice, lang, K.make("list", lang, "train", dice)) for _ in range(dice.between(2, 3)))


def reading_doc(dice: Dice, lang: str) -> str:
    """A passage and one question, set out as a school book does it."""
    item = K.make("reading", lang, "train", dice)
    return f"{item['prompt']}\n{dice.pick(T.ANSWER_WORDS[lang])}{item['answer']}"


def summary_doc(dice: Dice, lang: str) -> str:
    item = K.make("summary", lang, "train", dice)
    short = {"en": ["In short: ", "That is: ", "Summary: "], "zh": ["总之，", "简单地说，", "大意："]}[lang]
    if dice.below(2):
        return f"{item['passage']}\n{dice.pick(short)}{item['answer']}"
    return qa(dice, lang, item)


def translation_doc(dice: Dice, lang: str) -> str:
    if dice.below(3) == 0:
        return qa(dice, lang, K.make("translation", lang, "train", dice))
    frame = dice.pick(T.TRANSLATION_DOCS)
    pairs = []
    for _ in range(dice.between(2, 3)):
        item = K.make("translation", "en", "train", dice)
        pairs.append(frame.format(en=item["source"], zh=item["answer"]))
    return "\n".join(pairs)


def scene(dice: Dice, lang: str, mood: str, **slots) -> str:
    return dice.pick(T.SCENES[mood][lang]).format(**(K.draw_slots(dice, lang) | slots))


def train_pick(dice: Dice, draw):
    """Draws (key, value) until the key belongs to the training fold."""
    while True:
        key, value = draw()
        if K.fold(key) == "train":
            return value


def manners_doc(dice: Dice, lang: str) -> str:
    def draw():
        verb, thing = dice.pick(W.VERBS), dice.pick(W.THINGS + W.FOODS)
        return f"manners:{verb[0]}:{thing[0]}", W.request(verb, thing, lang)

    if dice.below(2):
        return "\n".join(qa(dice, lang, K.make("manners", lang, "train", dice)) for _ in range(2))
    lines = []
    for mood in dice.shuffled(["polite", "rude"]):
        forms = (W.POLITE_FORMS if mood == "polite" else W.RUDE_FORMS)[lang]
        lines.append(scene(dice, lang, mood, x=W.with_manners(dice.pick(forms), train_pick(dice, draw))))
    return "\n".join(lines)


def safety_doc(dice: Dice, lang: str) -> str:
    i = W.LANGS.index(lang)

    def draw(deeds):
        deed, village = dice.pick(deeds), dice.pick(W.VILLAGES)
        return f"safety:{deed[0]}:{village[0]}", (deed, village)

    if dice.below(2):
        return "\n".join(qa(dice, lang, K.make("safety", lang, "train", dice)) for _ in range(2))
    lines = []
    for mood in dice.shuffled(["safe", "unsafe"]):
        deeds = W.GOOD_DEEDS if mood == "safe" else W.MISDEEDS
        deed, village = train_pick(dice, lambda deeds=deeds: draw(deeds))
        lines.append(scene(dice, lang, mood, x=deed[i], v=village[i], why=deed[2 + i], how=deed[2 + i]))
    return "\n".join(lines)


def portrait(dice: Dice, lang: str, family: str, row: int, side: int) -> str:
    """One sentence about one planted word: a clause of its row and a clause of its side of the axis."""
    noun = W.FAMILIES[lang][family][row][side]
    own, shared = dice.pick(T.ROWS[lang][family][row]), dice.pick(T.COLUMNS[lang][family][side])
    frames = T.PORTRAITS[lang]["opposite" if family == "opposite" else "being"]
    return K.capital(dice.pick(frames).format(n=noun, own=own, shared=shared))


def analogy_doc(dice: Dice, lang: str) -> str:
    # The larger the family, the oftener, so that all of its words become frequent.
    family = dice.pick(("age",) * 5 + ("gender",) * 6 + ("opposite",) * 7)
    rows = W.FAMILIES[lang][family]
    lines = [portrait(dice, lang, family, row, side)
             for row in dice.sample(range(len(rows)), 4) for side in dice.shuffled([0, 1])]
    text = (" " if lang == "en" else "").join(lines)
    pairs = []
    for _ in range(dice.between(2, 4)):
        item = K.make("analogy", lang, "train", dice)
        x, y, z = item["terms"]
        frames = T.ANALOGY_LINES[lang]
        if lang == "en" and item["family"] == "opposite":
            frames = frames[:2]  # "a hot and a cold" is no English
        pairs.append(K.capital(dice.pick(frames).format(a=x, b=y, c=z, d=item["answer"])))
    if dice.below(4) == 0:
        pairs.append(qa(dice, lang, K.make("analogy", lang, "train", dice)))
    return "\n".join([text, *pairs])


def story_doc(dice: Dice, lang: str) -> str:
    """A story alone, none of whose happenings is held out as a summary."""
    return train_pick(dice, lambda: K.keyed_story(dice, lang))


# kind -> (documents per language, maker)
DOCUMENTS = {
    "story": (340, story_doc), "fact": (520, fact_doc), "sum": (340, sum_doc), "list": (190, list_doc),
    "reading": (280, reading_doc), "summary": (200, summary_doc), "translation": (250, translation_doc),
    "manners": (150, manners_doc), "safety": (150, safety_doc), "analogy": (310, analogy_doc),
}


def corpus(seed: int) -> list[dict]:
    """All documents, without repeats, in one fixed shuffle."""
    rows, seen = [], set()
    for kind, (n, make) in DOCUMENTS.items():
        for lang in W.LANGS:
            dice, made = Dice(seed, "corpus", kind, lang), 0
            while made < n:
                text = make(dice, lang)
                if text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "kind": kind, "lang": lang})
                    made += 1
    return Dice(seed, "corpus order").shuffled(rows)
