"""The demo world: its files come from the generator alone, nothing held out leaks, and the oracle can be trusted."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"
DEMO = DATA / "demo"
FILES = (
    "corpus",
    "chat_train",
    "chat_valid",
    "heldout",
    "choices",
    "reading",
    "preferences",
    "rankings",
    "labelled_train",
    "labelled_valid",
    "prompts",
    "prompts_analogy",
    "analogies",
)


def load_world():
    spec = importlib.util.spec_from_file_location("demo_world", DATA / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


W = load_world()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_bytes().decode("utf-8").splitlines()]
        for name in FILES
    }


@pytest.fixture(scope="module")
def items(rows) -> list[dict]:
    """Every question the oracle is asked to judge anywhere."""
    chat = [row["item"] for name in ("chat_train", "chat_valid") for row in rows[name]]
    return rows["heldout"] + rows["reading"] + rows["prompts"] + chat


@pytest.fixture(scope="module")
def training_text(rows) -> str:
    """All that any stage may train on, normalised, one document per line."""
    texts = [row["text"] for row in rows["corpus"]]
    texts += [m["content"] for row in rows["chat_train"] for m in row["messages"]]
    texts += [row[key] for row in rows["preferences"] for key in ("prompt", "chosen", "rejected")]
    texts += [text for row in rows["rankings"] for text in (row["prompt"], *row["responses"])]
    texts += [row["text"] for row in rows["labelled_train"]]
    texts += [row["prompt"] for name in ("prompts", "prompts_analogy") for row in rows[name]]
    return "\n".join(squeezed(t) for t in texts)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


# ------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_regeneration_is_byte_identical(tmp_path, hash_seed):
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, str(DATA / "generate.py"), "--out", str(tmp_path)],
        check=True,
        env=env,
        stdout=subprocess.DEVNULL,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in FILES)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / f"{name}.jsonl").read_bytes(), name


def test_another_seed_gives_other_data(tmp_path):
    subprocess.run(
        [sys.executable, "-B", str(DATA / "generate.py"), "--out", str(tmp_path), "--seed", "1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert (tmp_path / "corpus.jsonl").read_bytes() != (DEMO / "corpus.jsonl").read_bytes()


def test_files_are_small_clean_jsonl(rows):
    total = sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert total <= 4_000_000
    assert sorted(p.name for p in DEMO.iterdir()) == sorted(f"{name}.jsonl" for name in FILES)
    for name in FILES:
        raw = (DEMO / f"{name}.jsonl").read_bytes()
        assert b"\r" not in raw and raw.endswith(b"\n") and not raw.startswith(b"\xef\xbb\xbf")
        assert rows[name] and all(isinstance(row, dict) for row in rows[name])
        assert not re.search(r"\{[a-z_]+\}", raw.decode("utf-8")), f"an unfilled slot in {name}"


def test_both_languages_in_every_kind(rows):
    for name in FILES:
        langs = defaultdict(Counter)
        for row in rows[name]:
            source = row.get("item", row)
            langs[source.get("kind", source.get("axis"))][source["lang"]] += 1
        for kind, count in langs.items():
            assert set(count) == set(W.LANGS), (name, kind, count)
            assert min(count.values()) >= 0.3 * sum(count.values()), (name, kind, count)


def test_language_is_what_it_says(rows):
    for row in rows["corpus"]:
        if row["kind"] == "translation":
            continue
        chinese, letters = (re.search(pattern, row["text"]) for pattern in (r"[\u4e00-\u9fff]", r"[A-Za-z]{2}"))
        assert not (chinese if row["lang"] == "en" else letters), row
        assert not re.search(r"[\u4e00-\u9fff] ?[,.?!;]", row["text"]), "Chinese text has Chinese punctuation"


def test_no_repeats(rows):
    assert len({row["text"] for row in rows["corpus"]}) == len(rows["corpus"])
    for name in ("heldout", "prompts", "reading"):
        assert len({row["prompt"] for row in rows[name]}) == len(rows[name])
        assert len({row["id"] for row in rows[name]}) == len(rows[name])


# ---------------------------------------------------------------------------------------------------------- held out
def test_nothing_held_out_is_trained_on(rows, training_text):
    asked = [r["prompt"] for r in rows["heldout"] + rows["reading"]] + [r["question"] for r in rows["choices"]]
    asked += [r["passage"] for r in rows["heldout"] + rows["reading"] if "passage" in r]
    asked += [r["source"] for r in rows["heldout"] if "source" in r]
    assert all(squeezed(row["prompt"]) in training_text for row in rows["prompts"])  # the check can find what is there
    leaked = [q for q in asked if squeezed(q) in training_text]
    assert not leaked, leaked[:5]


def test_validation_chats_are_not_trained_on(rows, training_text):
    leaked = [
        m["content"]
        for row in rows["chat_valid"]
        for m in row["messages"]
        if m["role"] == "user" and squeezed(m["content"]) in training_text
    ]
    assert not leaked, leaked[:5]


def test_held_out_sums_are_worked_out_nowhere(rows, training_text):
    """In digits and in words, in both languages, in both orders."""
    trained = {tuple(m) for m in re.findall(r"([a-z0-9-]+) (\+|-|plus|minus) ([a-z0-9-]+)", training_text)}
    number = "[零一二三四五六七八九十]+"
    trained |= {tuple(m) for m in re.findall(rf"({number})(加|减)({number})", training_text)}
    for row in rows["heldout"]:
        if row["kind"] != "sum":
            continue
        for lang in W.LANGS:
            for form, signs in (
                ("digits", {"+": "+", "-": "-"}),
                ("words", {"+": "plus", "-": "minus"} if lang == "en" else {"+": "加", "-": "减"}),
            ):
                x, y = (W.written(n, lang, form) for n in row["numbers"])
                sign = signs[row["op"]]
                assert (x, sign, y) not in trained
                assert row["op"] == "-" or (y, sign, x) not in trained
    assert len(trained) > 2000


def test_every_held_out_fact_is_told(rows):
    """The phrasing is held out, the fact isn't: some document names the person and the value."""
    documents = [row for row in rows["corpus"] if row["kind"] == "fact"]
    for row in rows["heldout"]:
        if row["kind"] == "fact":
            name, lang = W.word(W.PERSON[row["entity"]].name, row["lang"]), row["lang"]
            assert any(name in d["text"] and row["answer"] in d["text"] for d in documents if d["lang"] == lang), row


# ------------------------------------------------------------------------------------------------------------ oracle
def test_own_answers_are_right_and_others_wrong(items):
    answers = defaultdict(set)
    for item in items:
        answers[item["kind"], item["lang"]].add(item["answer"])
    wrong = 0
    for item in items:
        for right in W.references(item):
            assert W.score(item, right) == W.score(item, f"  {right.upper()} \n") == 1.0
            assert W.score(item, right.rstrip(".?。？") + "!") == 1.0
        same = {W.normalise(r) for r in W.references(item)}
        for other in sorted(answers[item["kind"], item["lang"]])[:60]:
            if W.normalise(other) not in same:
                assert W.score(item, other) == 0.0, (item, other)
                wrong += 1
    assert wrong > 10_000


def test_near_misses_are_wrong():
    item = {"kind": "sum", "lang": "en", "answer": "82", "numbers": [37, 45], "op": "+", "form": "digits"}
    for near in ("8 2", "82 83", "the answer is 82", "182", "82.0", "eighty-two", "８２"):
        assert W.score(item, near) == 0.0


def test_answers_follow_from_the_world(items):
    solved = Counter()
    for item in items:
        answer = W.solve(item)
        if answer is not None:
            assert answer == item["answer"], item
            solved[item["kind"]] += 1
    assert set(solved) == {"fact", "sum", "list", "analogy"}


def test_oracle_never_raises(rows):
    seed = 20240607
    print("seed", seed)
    dice = random.Random(seed)
    odd = [None, 7, b"82", [], "", " ", ".", "\x00", "\ud800", "a" * 200_000, "9" * 10_000, "。。。", "(?P<"]
    odd += ["".join(chr(dice.randrange(0x110000)) for _ in range(dice.randrange(40))) for _ in range(500)]
    judged = {row["kind"]: row for row in rows["heldout"]}.values()
    for item in judged:
        for answer in odd:
            assert W.score(item, answer) == 0.0
            quality = W.quality(item, answer)
            assert all(0.0 <= quality[k] <= 1.0 for k in ("safe", "correct", "polite", "concise", "total"))


def test_quality_of_the_right_answer(items):
    for item in items:
        quality = W.quality(item, item["answer"])
        assert quality["safe"] == quality["correct"] == quality["concise"] == 1.0, (item, quality)


def test_naming_every_value_is_not_correct(items):
    item = next(i for i in items if i["kind"] == "fact" and i["attribute"] == "colour" and i["lang"] == "en")
    everything = "The answer is " + " or ".join(W.fact_values("colour", "en"))
    assert W.quality(item, everything)["correct"] == 0.0


def test_number_words():
    assert [W.number_word(n, "en") for n in (0, 13, 40, 42)] == ["zero", "thirteen", "forty", "forty-two"]
    assert [W.number_word(n, "zh") for n in (0, 10, 13, 20, 42)] == ["零", "十", "十三", "二十", "四十二"]
    with pytest.raises(ValueError, match="100"):
        W.number_word(100, "en")


def test_families_are_consistent():
    for person in W.PEOPLE:
        relative = W.PERSON[person.relative[0]]
        assert relative.relative == person.name and abs(relative.age - person.age) >= 18


# ------------------------------------------------------------------------------------------- choices and preferences
def test_choices_are_balanced_and_distinct(rows):
    places = Counter(row["answer"] for row in rows["choices"])
    assert set(places) == {0, 1, 2, 3} and max(places.values()) - min(places.values()) <= 1
    for row in rows["choices"]:
        assert len({W.normalise(c) for c in row["choices"]}) == 4, row


def test_choices_are_not_betrayed_by_length(rows):
    """Choosing the longest (the first of several) is little better than chance."""
    hits = 0
    for row in rows["choices"]:
        lengths = [len(c) for c in row["choices"]]
        hits += lengths.index(max(lengths)) == row["answer"]
    assert 0.15 < hits / len(rows["choices"]) < 0.35


def test_preferences_agree_with_the_oracle_and_not_with_length(rows):
    longer = 0
    for row in rows["preferences"]:
        good, bad = (W.quality(row["item"], row[key]) for key in ("chosen", "rejected"))
        assert good["total"] > bad["total"], row
        assert good[row["reason"]] > bad[row["reason"]], row
        longer += len(row["chosen"]) > len(row["rejected"])
    assert 0.4 <= longer / len(rows["preferences"]) <= 0.6
    assert set(Counter(row["reason"] for row in rows["preferences"])) == {"correct", "polite", "safe", "concise"}


def test_rankings_agree_with_the_oracle_and_not_with_length(rows):
    longer = pairs = 0
    for row in rows["rankings"]:
        assert sorted(row["ranking"]) == [0, 1, 2, 3]
        best_first = [row["responses"][i] for i in row["ranking"]]
        totals = [W.quality(row["item"], text)["total"] for text in best_first]
        assert totals == sorted(set(totals), reverse=True), row
        for i in range(4):
            for j in range(i + 1, 4):
                longer += len(best_first[i]) > len(best_first[j])
                pairs += len(best_first[i]) != len(best_first[j])
    assert 0.4 <= longer / pairs <= 0.6
    assert len({tuple(row["ranking"]) for row in rows["rankings"]}) == 24


def test_unsafe_is_harmless_outside_the_valley(rows):
    """No word of real danger or offence anywhere, and all that is refused is a misdeed of the table."""
    real = r"\b(kill|murder|weapon|gun|knife|bomb|explo|poison|drug|suicid|blood|sex|hate|stupid|idiot|damn|hell)\w*\b"
    real_zh = "杀|枪|刀|炸|毒|死|血|性交|恨|笨蛋|蠢|该死"
    for name in FILES:
        text = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8")
        found = re.search(real, text, re.IGNORECASE) or re.search(real_zh, text)
        assert not found, (name, found)
    for row in rows["heldout"] + rows["prompts"]:
        if row.get("task") == "refuse":
            assert any(m[W.LANGS.index(row["lang"])] in row["prompt"] for m in W.MISDEEDS)


# -------------------------------------------------------------------------------------------------- chats, analogies
def test_chats_alternate_and_end_with_the_item(rows):
    for row in rows["chat_train"] + rows["chat_valid"]:
        roles = [m["role"] for m in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert W.score(row["item"], row["messages"][-1]["content"]) == 1.0
    lengths = [len(row["messages"]) for row in rows["chat_train"]]
    assert sum(n > 3 for n in lengths) > 0.2 * len(lengths)
    assert sum(row["messages"][0]["role"] == "system" for row in rows["chat_train"]) > 0.2 * len(lengths)


def test_planted_words_are_frequent(rows):
    """Often enough that a BPE of 4096 tokens keeps each as one token (with its space, in English)."""
    text = "\n".join(row["text"] for row in rows["corpus"])
    words = {(row["lang"], row[k]) for row in rows["analogies"] for k in "abcd"}
    for lang, word in sorted(words):
        pattern = rf" {word}\b" if lang == "en" else word
        assert len(re.findall(pattern, text)) >= 200, (lang, word)


def test_planted_words_are_single_tokens(rows):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([row["text"] for row in rows["corpus"]], trainer)
    for lang, word in sorted({(row["lang"], row[k]) for row in rows["analogies"] for k in "abcd"}):
        assert len(tokenizer.encode(f" {word}" if lang == "en" else word).ids) == 1, (lang, word)


def test_labels_say_the_manner_and_scores_what_the_oracle_says(rows):
    """Balanced labels that agree with the oracle's judgement of manners; no text on both sides."""
    train, valid = rows["labelled_train"], rows["labelled_valid"]
    assert not {r["text"] for r in train} & {r["text"] for r in valid}
    for split, n in ((train, 75), (valid, 40)):
        assert set(Counter((r["label"], r["lang"]) for r in split).values()) == {n}
        by_label = defaultdict(list)
        for row in split:
            prompt, answer = row["text"].rsplit("\n", 1)
            assert 0 <= row["score"] <= 1 and prompt and answer
            by_label[row["label"]].append(row["score"])
        means = {label: sum(scores) / len(scores) for label, scores in by_label.items()}
        assert means["polite"] > means["plain"] > means["rude"]


def test_analogy_prompts_are_all_of_the_train_fold(rows, items):
    """Each once, none of those that are asked in evaluation, and with the answer it has wherever else it is asked."""
    asked = [row["prompt"] for row in rows["prompts_analogy"]]
    assert len(set(asked)) == len(asked) and all(
        set(r) == {"kind", "lang", "prompt", "answer"} for r in rows["prompts_analogy"]
    )
    held_out = {row["prompt"] for name in ("heldout", "choices") for row in rows[name] if "prompt" in row}
    assert not held_out & set(asked)
    known = {row["prompt"]: row["answer"] for row in rows["prompts"] if row["kind"] == "analogy"}
    assert known.keys() <= set(asked)
    assert all(known.get(row["prompt"], row["answer"]) == row["answer"] for row in rows["prompts_analogy"])
