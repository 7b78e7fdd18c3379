"""Every kind of tokenizer that is trained here: lossless for any text, and read by transformers with the same ids."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmkit.config import Interrupted, UserError, validate
from llmkit.tokenizer import SPECIAL, Tokenizer, TokenizerConfig

DEMO = Path(__file__).parents[2] / "data" / "demo" / "corpus.jsonl"
DOCUMENTS = [json.loads(line) for line in DEMO.read_text("utf-8").splitlines()]
ENGLISH = [d["text"] for d in DOCUMENTS if d["lang"] == "en"]
CHINESE = [d["text"] for d in DOCUMENTS if d["lang"] == "zh"]
CORPUS = ENGLISH[:300] + CHINESE[:300]
EXTRA = ("<|tool|>", "[NOTE]")
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"kind": "bpe"},
    "wordpiece": {"kind": "wordpiece"},
    "unigram": {"kind": "unigram"},
    "sentencepiece unigram": {"kind": "sentencepiece"},
    "sentencepiece bpe": {"kind": "sentencepiece", "model": "bpe"},
    "byte": {"kind": "byte"},
}


def train(texts: list[str] | Iterator[str], **config: Any) -> Tokenizer:
    return Tokenizer.train(texts, TokenizerConfig(**config))


@pytest.fixture(scope="module", params=KINDS)
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return train(CORPUS, vocab_size=1200, special=EXTRA, **KINDS[request.param])


@pytest.fixture(scope="module")
def theirs(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    tok.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Unicode of all planes, mixed with what tokenizers write between the lines."""
    rng = random.Random(seed)
    pools = [
        [chr(c) for c in range(32, 127)],
        [*" \t\n\r\x0b\x0c\x85\xa0\u2003\u3000", "  ", "\r\n", "\n\n"],
        [chr(c) for c in range(0x300, 0x340)] + [chr(c) for c in range(0x1100, 0x1180)],
        [chr(c) for c in range(0x4E00, 0x4F00)] + list("，。！「」（）１２"),
        list("👩\u200d🇨🇳👍🏽\ufe0f\ufeff\x00\x01\x02\x7f\u0338\u212b\ufb01"),
        [*SPECIAL, *EXTRA, "<unk>", "[UNK]", "<s>", "</s>", "[MASK]", "<|", "|>", "im_end"],
        [
            "\u2581",
            "\u2581\u2581",
            " \u2581",
            "\u2581 ",
            "\u2581the",
            "##",
            "###",
            "##ing",
            "#",
            "<0x41>",
            "<0xE2>",
            "<0x",
        ],
    ]
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return [
        "".join(
            chr(rng.choice(anything)) if rng.random() < 0.15 else rng.choice(rng.choice(pools))
            for _ in range(rng.randrange(30))
        )
        for _ in range(n)
    ]


def chinese_lines(n: int, seed: int = 0) -> list[str]:
    """Lines made up from clauses of the demo's Chinese text."""
    rng = random.Random(seed)
    clauses = sorted({c for text in CHINESE for line in text.split("\n") for c in line.split("。") if c})
    return ["。".join(rng.choices(clauses, k=rng.randrange(1, 4))) + rng.choice(["。", "", "！\n"]) for _ in range(n)]


# --- any text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_texts, chinese_lines])
def test_any_text_survives_and_transformers_agrees(tok: Tokenizer, theirs: Any, make: Any) -> None:
    """B48, B49, B50: 10,000 random texts of all planes and 10,000 Chinese lines; no unknown and no control token."""
    texts = make(10_000)
    encoded = [ids.tolist() for ids in tok.encode_batch(texts, threads=2)]
    normal = [tok.normalize(text) for text in texts]
    assert [tok.decode(ids) for ids in encoded] == normal
    assert [tok.n_bytes(ids) for ids in encoded] == [len(text.encode()) for text in normal]
    assert not tok.special_ids & {i for ids in encoded for i in ids}
    assert theirs(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"] == encoded
    assert [tok.encode(text) for text in texts[:300]] == encoded[:300]
    if make is random_texts:
        assert [theirs.decode(ids) for ids in encoded[:2000]] == normal[:2000]


def test_streams_and_bytes(tok: Tokenizer) -> None:
    """B49, B68: for texts, and for ids that no text has."""
    rng = random.Random(1)
    cases = [tok.encode(t) for t in random_texts(400, seed=2)]
    cases += [[rng.randrange(tok.vocab_size) for _ in range(rng.randrange(25))] for _ in range(400)]
    for ids in cases:
        for skip in (True, False):
            stream = tok.stream(skip_special=skip)
            assert "".join([*map(stream.push, ids), stream.finish()]) == tok.decode(ids, skip_special=skip)
        assert tok.decode(ids, start=False) == tok.decode(ids)  # no space of its own before a text


def test_saved_and_loaded(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.files() == tok.files() and again.hash == tok.hash and again.special == tok.special
    assert [a.tolist() for a in again.encode_batch(CORPUS)] == [a.tolist() for a in tok.encode_batch(CORPUS)]


def test_conversations(tok: Tokenizer) -> None:
    """B26, B29, B50: control tokens come from the template alone."""
    rude = "<|im_end|>\u2581 ##x<0x41> "
    enc = tok.encode_chat([{"role": "user", "content": rude}, {"role": "assistant", "content": rude}])
    start, end = tok.special["<|im_start|>"], tok.special["<|im_end|>"]
    assert [i for i in enc.ids if i in tok.special_ids] == [tok.bos_id, start, end, start, end]
    assert tok.decode(enc.ids, skip_special=False) == enc.text
    (turn,) = enc.turns
    assert tok.decode(enc.ids[slice(*turn)]) == rude


@pytest.mark.parametrize("kind", list(KINDS)[1:-1])
@pytest.mark.parametrize("text", [" " * 2**17 + "x", "\u2581" * 2**15, "#" * 2**16, "a" * 2**16, "漢" * 2**15])
def test_long_runs_take_linear_time(kind: str, text: str) -> None:
    tok = train(CORPUS[:40], vocab_size=700, **KINDS[kind])
    start = time.process_time()
    ids = tok.encode(text)
    assert time.process_time() - start < 4  # 1 s alone on one core
    assert tok.decode(ids) == text


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "sentencepiece bpe"])
def test_training_is_deterministic(kind: str) -> None:
    """Not so for unigram: `tokenizers` adds up probabilities in the order of a hash table."""
    first, second = (train(iter(CORPUS), vocab_size=1000, **KINDS[kind]) for _ in range(2))
    assert first.files() == second.files()


@pytest.mark.parametrize("kind", list(KINDS)[:-1])
def test_known_parts_of_an_unknown_word(kind: str) -> None:
    """`unhappiness`, which the text doesn't hold, is cut into parts that it holds: un, happi, ness.

    The text is made of words of three parts, all pairs of them equally frequent. Unigram finds parts only if they are
    words of their own too (sentencepiece's own trainer as well), so half of its text is those.
    """
    rng = random.Random(0)

    def parts(n: int, length: int) -> list[str]:
        return ["".join(rng.choices("abcdefghilmoprstuwy", k=length)) for _ in range(n)]

    starts, stems, ends = ["un", *parts(9, 2)], ["happi", *parts(30, 5)], ["ness", *parts(9, 4)]
    words = [a + b + c for a in starts for b in stems for c in ends if b != "happi" or (a != "un" and c != "ness")]
    if "unigram" in kind:
        words += 60 * [*starts, *stems, *ends]
    tok = train(words, vocab_size=800 if kind == "wordpiece" else 450, min_frequency=60, **KINDS[kind])
    ids = tok.encode("unhappiness")
    assert [tok.token_bytes(i) for i in ids] == [b"un", b"happi", b"ness"]
    if kind == "wordpiece":
        assert [tok._backend.id_to_token(i) for i in ids] == ["un", "##happi", "##ness"]


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece unigram"])
def test_unigram_finds_words_that_are_no_part_of_others(kind: str) -> None:
    """The library's trainer alone would not: it lists each word once, and looks for what occurs twice."""
    tok = train(["the windmill of Oakford"] * 50, vocab_size=400, **KINDS[kind])
    assert [tok.token_bytes(i) for i in tok.encode(" windmill Oakford")] == [b" windmill", b" Oakford"]


@pytest.mark.parametrize("kind", list(KINDS)[:-1])
def test_a_smaller_vocabulary_is_said_aloud(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tok = train(["the the the"], vocab_size=2000, **KINDS[kind])
    assert tok.vocab_size < 2000 and f"{tok.vocab_size} reached, 2000 asked" in caplog.text
    assert tok.decode(tok.encode("thé \u2581")) == "thé \u2581"


@pytest.mark.parametrize("kind", list(KINDS)[:-1])
def test_the_vocabulary_is_never_larger_than_asked(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the text has more characters than there is room for: the rare ones become bytes, aloud."""
    every = ["".join(map(chr, range(0x4E00, 0x5600))), *CORPUS[:50]]
    tok = train(every, vocab_size=600, **KINDS[kind])
    assert tok.vocab_size <= 600
    assert tok.decode(tok.encode(every[0])) == every[0]
    assert ("most frequent characters" in caplog.text) == kind.startswith("sentencepiece")


def test_coverage() -> None:
    """sentencepiece: what is beyond the coverage has no token of its own."""
    texts = ["aaaa bbbb" * 100, "漢"]
    made = {c: train(texts, vocab_size=400, coverage=c, **KINDS["sentencepiece unigram"]) for c in (0.99, 1.0)}
    assert len(made[0.99].encode("漢")) == 3 and len(made[1.0].encode("漢")) == 1


def test_normalisation_of_each_kind() -> None:
    text = "e\u0301 ，１\u2581"
    for kind in KINDS:
        for name, normal in (("nfc", "é ，１\u2581"), ("nfkc", "é ,1\u2581"), ("none", text)):
            tok = train([text] * 4, vocab_size=600, normalize=name, **KINDS[kind])
            assert tok.decode(tok.encode(text)) == tok.normalize(text) == normal


@pytest.mark.parametrize("kind", list(KINDS)[:-1])
@pytest.mark.parametrize("texts", [[], [""], ["a"], ["\x00\x01\x02", "\x01"], [" ", "\u2581"]])
def test_next_to_no_text(kind: str, texts: list[str]) -> None:
    if not texts:
        with pytest.raises(UserError, match="no text"):
            train(texts, **KINDS[kind])
        return
    tok = train(texts, vocab_size=600, **KINDS[kind])
    assert all(tok.decode(tok.encode(t)) == t for t in [*texts, "abc \u2581"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "wordpiece", "vocab_size": 500}, "need 517"),
        ({"kind": "sentencepiece", "vocab_size": 263}, "need 264"),
        ({"kind": "bpe", "model": "bpe", "path": "x"}, "drop model"),
        ({"kind": "unigram", "coverage": 0.9}, "belong to kind: sentencepiece"),
        ({"special": ["<unk>"]}, "choose another"),
        ({"special": ["<0x41>"]}, "choose another"),
        ({"add": ["x"]}, "add needs path"),
        ({"path": "x", "add": ["a b"]}, "without blanks"),
        ({"path": "x", "add": ["a", "a"]}, "twice"),
    ],
)
def test_wrong_recipes(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(TokenizerConfig, data)


@pytest.mark.parametrize("token", ["<|mask|>", "[MASK]"])
def test_mask_token(token: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tok = train((), kind="byte", special=("<|x|>", token))
    assert tok.mask_id == tok.special[token] == 6
    tok.save(tmp_path)
    assert Tokenizer.load(tmp_path).mask_id == 6
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["mask_token"] == token
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).mask_token_id == 6


# --- stopping --------------------------------------------------------------------------------------------------------


def test_training_stops_when_asked_to() -> None:
    """At once, though the library's training itself can't be stopped; its thread then reads no more text."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield ENGLISH[read % len(ENGLISH)]

    start = time.monotonic()
    with pytest.raises(Interrupted):
        Tokenizer.train(endless(), TokenizerConfig(), should_stop=lambda: time.monotonic() - start > 0.3)
    assert time.monotonic() - start < 5
    time.sleep(0.3)
    before = read
    time.sleep(0.3)
    assert read == before and threading.active_count() < 10


def test_errors_of_the_texts_reach_the_caller() -> None:
    def failing() -> Iterator[str]:
        yield "a"
        raise UserError("data.jsonl:3: damaged")

    for kind in KINDS:
        if kind != "byte":
            with pytest.raises(UserError, match="damaged"):
                Tokenizer.train(failing(), TokenizerConfig(**KINDS[kind]))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_training() -> None:
    """Within the library's own work too, where Python runs no signal handler."""
    code = (
        # What a shell starts in the background ignores the signal, and so do its children, unless told otherwise.
        "import random, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from llmkit.tokenizer import Tokenizer, TokenizerConfig\n"
        "r = random.Random(0)\ntexts = [''.join(r.choices('abcdefghij', k=20000)) for _ in range(300)]\n"
        "print('go', flush=True)\nTokenizer.train(texts, TokenizerConfig(vocab_size=100000))\nprint('done')"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "go\n"
    time.sleep(1.5)  # reading takes less
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert time.monotonic() - start < 10
    assert "KeyboardInterrupt" in err and "done" not in out
