"""Writes the demo world: `python data/generate.py [--out data/demo] [--seed 0]`.

The same seed gives the same bytes on every machine. See README.md in this folder for what the files are.
"""

import argparse
import json
from pathlib import Path

import documents
import judged
import kinds as K
import templates as T
import world as W
from kinds import Dice

CHAT_TRAIN, CHAT_VALID = 115, 17  # rows per kind and language
HELDOUT, PROMPTS, READING, CHOICES = 22, 34, 110, 24  # the same; reading is one kind
PREFERENCES, RANKINGS = 140, 180  # pairs per reason and language; rankings per language
LABELLED_TRAIN, LABELLED_VALID = 75, 40  # per manner and language
ANALOGIES = 300  # prompts per language, or as many as the train fold has
FOLLOW_UPS = {"en": ["Thank you. {q}", "And another one. {q}", "{q}"], "zh": ["谢谢。{q}", "再来一个。{q}", "{q}"]}


def draw_items(seed: int, name: str, fold: str, n: int, kinds=K.KINDS, seen: set | None = None) -> list[dict]:
    """`n` items per kind and language whose prompts aren't in `seen`; fewer where the world is too small for more."""
    items, seen = [], set() if seen is None else seen
    for kind in kinds:
        for lang in W.LANGS:
            dice, made = Dice(seed, name, kind, lang), 0
            for _ in range(n * 40):
                if made == n:
                    break
                item = K.make(kind, lang, fold, dice)
                if item["prompt"] not in seen:
                    seen.add(item["prompt"])
                    items.append(item)
                    made += 1
    return items


def numbered(prefix: str, rows: list[dict]) -> list[dict]:
    return [{"id": f"{prefix}-{i:04d}"} | row for i, row in enumerate(rows)]


def chat(seed: int, name: str, items: list[dict]) -> list[dict]:
    """One conversation per item, its last question; a quarter have a system message, a third have more turns."""
    dice = Dice(seed, name, "turns")
    by_lang = {lang: [i for i in items if i["lang"] == lang] for lang in W.LANGS}
    rows = []
    for item in items:
        lang = item["lang"]
        earlier = dice.sample(by_lang[lang], dice.between(1, 2)) if dice.below(3) == 0 else []
        earlier = [e for e in earlier if e["_key"] != item["_key"]]
        system = [{"role": "system", "content": dice.pick(T.SYSTEMS[lang])}] if dice.below(4) == 0 else []
        turns = []
        for n, asked in enumerate([*earlier, item]):
            question = dice.pick(FOLLOW_UPS[lang]).format(q=asked["prompt"]) if n else asked["prompt"]
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": asked["answer"]}]
        rows.append({"messages": system + turns, "item": K.brief(item)})
    return dice.shuffled(rows)


def choices(seed: int) -> list[dict]:
    """Four-way questions; the right answer takes the four places in turn before the rows are shuffled."""
    dice, rows = Dice(seed, "choices", "order"), []
    for item in draw_items(seed, "choices", "heldout", CHOICES):
        wrong = K.wrong_answers(item, dice)
        if len(wrong) < 3:  # labels have two values only
            continue
        place = len(rows) % 4
        options = wrong[:place] + [item["answer"]] + wrong[place:3]
        rows.append({"question": item["prompt"], "choices": options, "answer": place, "kind": item["kind"],
                     "lang": item["lang"]})
    return dice.shuffled(rows)


def analogies() -> list[dict]:
    """Every pair against every other pair of its family."""
    return [{"a": a, "b": b, "c": c, "d": d, "lang": lang, "axis": family}
            for lang in W.LANGS for family, pairs in W.FAMILIES[lang].items()
            for a, b in pairs for c, d in pairs if (a, b) != (c, d)]


def build(seed: int) -> dict[str, list[dict]]:
    """File name -> rows."""
    seen: set[str] = set()
    train = draw_items(seed, "chat_train", "train", CHAT_TRAIN, seen=seen)
    prompts = draw_items(seed, "prompts", "train", PROMPTS, seen=seen)
    analogy_prompts = draw_items(seed, "prompts_analogy", "train", ANALOGIES, kinds=("analogy",))
    mix = Dice(seed, "mix")
    heldout = mix.shuffled(K.public(i) for i in draw_items(seed, "heldout", "heldout", HELDOUT))
    reading = mix.shuffled(K.public(i) for i in draw_items(seed, "reading", "heldout", READING, kinds=("reading",)))
    return {
        "corpus": documents.corpus(seed),
        "chat_train": chat(seed, "chat_train", train),
        "chat_valid": chat(seed, "chat_valid", draw_items(seed, "chat_valid", "valid", CHAT_VALID)),
        "heldout": numbered("heldout", heldout),
        "choices": numbered("choice", choices(seed)),
        "reading": numbered("reading", reading),
        "preferences": judged.preferences(seed, PREFERENCES),
        "rankings": judged.rankings(seed, RANKINGS),
        "labelled_train": judged.labelled(seed, "train", LABELLED_TRAIN),
        "labelled_valid": judged.labelled(seed, "valid", LABELLED_VALID),
        "prompts": numbered("prompt", mix.shuffled(K.public(i) for i in prompts)),
        "prompts_analogy": [{key: i[key] for key in ("kind", "lang", "prompt", "answer")} for i in analogy_prompts],
        "analogies": analogies(),
    }


def write(rows: list[dict], path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in build(args.seed).items():
        path = args.out / f"{name}.jsonl"
        write(rows, path)
        print(f"{path.name:20} {len(rows):6} rows {path.stat().st_size:9} bytes")


if __name__ == "__main__":
    main()
