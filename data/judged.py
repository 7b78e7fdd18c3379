"""Answers of known worth: preference pairs and rankings, whose order is proved by the oracle and not told by length."""

import kinds as K
import templates as T
import world as W
from kinds import Dice

REASONS = ("correct", "polite", "safe", "concise")
# Concise answers are always the shorter ones; the other reasons lean the other way, so that length tells nothing.
LONGER_CHOSEN_FRAC = {"correct": 0.6, "polite": 0.6, "safe": 0.6, "concise": 0.0}
ASKABLE = ("fact", "sum", "list", "reading", "analogy")


def bare(text: str) -> str:
    return text.rstrip(" .!?。！？")


def styled(dice: Dice, lang: str, manner: str, answer: str) -> str:
    return K.capital(dice.pick(T.STYLES[manner][lang]).format(x=bare(answer)))


def rambling(dice: Dice, lang: str, answer: str) -> str:
    lines = dice.sample(T.FILLERS[lang], 5)
    lines.insert(dice.between(2, 4), answer)
    return (" " if lang == "en" else "").join(lines)


def unsafe(dice: Dice, lang: str, item: dict, manner: str) -> str:
    """Help with a misdeed, in any manner."""
    return dice.pick(T.GREETINGS[manner][lang]) + dice.pick(T.UNSAFE_ANSWERS[lang]).format(x=item["_deed"])


def refusal(dice: Dice, lang: str, item: dict, manner: str) -> str:
    """A right refusal; a long one adds an offer."""
    text = dice.pick(T.GREETINGS[manner][lang]) + dice.pick(W.references(item))
    return text + dice.pick(T.OFFERS[lang]) if dice.below(2) else text


def pair(dice: Dice, lang: str, reason: str) -> tuple[dict, str, str]:
    """(item, chosen, rejected): they differ in the reason named, and otherwise only by chance of wording."""
    if reason == "safe":
        item = refuse_item(dice, lang)
        manner = dice.pick(("plain", "polite"))
        return item, refusal(dice, lang, item, manner), unsafe(dice, lang, item, manner)
    item = K.make(dice.pick(ASKABLE), lang, "train", dice)
    right = item["answer"]
    if reason == "polite":
        return item, styled(dice, lang, "polite", right), styled(dice, lang, "rude", right)
    manner = dice.pick(("plain", "polite"))
    if reason == "concise":
        good = styled(dice, lang, manner, right)
        return item, good, rambling(dice, lang, good)
    wrong = dice.pick(K.wrong_answers(item, dice))
    return item, styled(dice, lang, manner, right), styled(dice, lang, manner, wrong)


def refuse_item(dice: Dice, lang: str, fold: str = "train") -> dict:
    while True:
        item = K.make("safety", lang, fold, dice)
        if item["task"] == "refuse":
            return item


def preferences(seed: int, n_per_reason: int) -> list[dict]:
    """Pairs per reason and language, with the wanted share of longer chosen answers."""
    rows, seen = [], set()
    for reason in REASONS:
        for lang in W.LANGS:
            dice = Dice(seed, "preferences", reason, lang)
            n_longer = round(n_per_reason * LONGER_CHOSEN_FRAC[reason])
            room = {True: n_longer, False: n_per_reason - n_longer}
            while any(room.values()):
                item, chosen, rejected = pair(dice, lang, reason)
                longer = len(chosen) > len(rejected)
                unclear = len(chosen) == len(rejected) or not better(item, chosen, rejected)
                if unclear or not room[longer] or (item["prompt"], chosen) in seen:
                    continue
                seen.add((item["prompt"], chosen))
                room[longer] -= 1
                rows.append({"prompt": item["prompt"], "chosen": chosen, "rejected": rejected, "reason": reason,
                             "kind": item["kind"], "lang": lang, "item": K.brief(item)})
    return Dice(seed, "preferences order").shuffled(rows)


def better(item: dict, first: str, second: str) -> bool:
    return W.quality(item, first)["total"] > W.quality(item, second)["total"]


def four_answers(dice: Dice, lang: str) -> tuple[dict, list[str]]:
    """An item and four answers of different worth."""
    if dice.below(3) == 0:
        item = refuse_item(dice, lang)
        return item, [refusal(dice, lang, item, "polite"), refusal(dice, lang, item, "rude"),
                      unsafe(dice, lang, item, "polite"), unsafe(dice, lang, item, "rude")]
    item = K.make(dice.pick(ASKABLE), lang, "train", dice)
    wrong = dice.pick(K.wrong_answers(item, dice))
    second, third = dice.pick(("rude", "plain")), dice.pick(("polite", "plain"))
    return item, [styled(dice, lang, "polite", item["answer"]), styled(dice, lang, second, item["answer"]),
                  styled(dice, lang, third, wrong), styled(dice, lang, "rude", wrong)]


def rankings(seed: int, n_per_lang: int) -> list[dict]:
    """Four answers each, best to worst by the oracle's total; ties and pairs ordered by length alone don't happen."""
    rows = []
    for lang in W.LANGS:
        dice = Dice(seed, "rankings", lang)
        longer = pairs = made = 0
        while made < n_per_lang:
            item, answers = four_answers(dice, lang)
            answers = dice.shuffled(answers)
            totals = [W.quality(item, x)["total"] for x in answers]
            order = sorted(range(4), key=lambda i: -totals[i])
            wins = sum(len(answers[i]) > len(answers[j]) for n, i in enumerate(order) for j in order[n + 1:])
            # Keeps the running share of "the longer one is better" at one half.
            if len(set(totals)) < 4 or (wins - 3) * (2 * longer - pairs) > 0:
                continue
            longer, pairs, made = longer + wins, pairs + 6, made + 1
            rows.append({"prompt": item["prompt"], "responses": answers, "ranking": order, "kind": item["kind"],
                         "lang": lang, "item": K.brief(item)})
    return Dice(seed, "rankings order").shuffled(rows)


def labelled(seed: int, fold: str, n_per_manner: int) -> list[dict]:
    """Question and answer as one text, with the answer's manner as a label and the oracle's total as a number."""
    rows, seen = [], set()
    for lang in W.LANGS:
        for manner in ("polite", "plain", "rude"):
            dice, made = Dice(seed, "labelled", fold, lang, manner), 0
            while made < n_per_manner:
                if dice.below(3) == 0:
                    item = refuse_item(dice, lang, fold)
                    answer = (refusal if dice.below(2) else unsafe)(dice, lang, item, manner)
                else:
                    item = K.make(dice.pick(ASKABLE), lang, fold, dice)
                    right = item["answer"] if dice.below(2) else dice.pick(K.wrong_answers(item, dice))
                    answer = styled(dice, lang, manner, right)
                text = f"{item['prompt']}\n{answer}"
                if text not in seen:
                    seen.add(text)
                    made += 1
                    rows.append({"text": text, "label": manner, "score": round(W.quality(item, answer)["total"], 4),
                                 "kind": item["kind"], "lang": lang})
    return Dice(seed, "labelled order", fold).shuffled(rows)
