"""The tokenizer against the traps that others fell into; B-numbers name them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llmkit.config import UserError, validate
from llmkit.stages.tokenizer import format_report, report
from llmkit.tokenizer import SPECIAL, ChatEncoding, StreamDecoder, Tokenizer, TokenizerConfig
from llmkit.tokenizer.chat import CHATML, ChatTemplate, Shield
from llmkit.tokenizer.encoder import GPT4_REGEX, TiktokenEngine

ENGLISH = [
    f"The {a} {b} {c} over the lazy dog, and it's {n} o'clock.\n"
    for n, (a, b, c) in enumerate(
        (a, b, c) for a in ("quick", "old", "new") for b in ("fox", "cat", "user") for c in ("jumps", "looks", "starts")
    )
]
CHINESE = ["今天天气很好，我们去公园散步。", "你好！请问，图书馆在哪里？", "我们今天去图书馆，天气很好。"] * 4
EXTRA = ("<|tool|>", "<think>")


@pytest.fixture(scope="module", params=["bpe", "byte", "wordpiece", "unigram", "sentencepiece"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(ENGLISH + CHINESE, TokenizerConfig(kind=request.param, vocab_size=600, special=EXTRA))


@pytest.fixture(scope="module", params=["bpe", "byte"])
def fast_tok(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(ENGLISH + CHINESE, TokenizerConfig(kind=request.param, vocab_size=600, special=EXTRA))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(ENGLISH + CHINESE, TokenizerConfig(vocab_size=600, special=EXTRA))


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Unicode of all planes, weighted towards what breaks tokenizers."""
    rng = random.Random(seed)
    pools = [
        [chr(c) for c in range(32, 127)],
        list(" \t\n\r\x0b\x0c\x85\xa0\u2003\u3000"),
        [chr(c) for c in range(0x300, 0x340)],
        [chr(c) for c in range(0x4E00, 0x4F00)] + list("，。！「」（）１２"),
        [chr(c) for c in range(0xAC00, 0xAC40)] + [chr(c) for c in range(0x1100, 0x1180)],
        list("👩\u200d🇨🇳👍🏽\ufe0f\ufeff\x00\x7f\u0338\u0344\u212b\ufb01"),
        [*SPECIAL, *EXTRA, "<|", "|>", "im_end", "'s", "'S", "can't", "123456", "  \n"],
    ]
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return [
        "".join(
            chr(rng.choice(anything)) if rng.random() < 0.15 else rng.choice(rng.choice(pools))
            for _ in range(rng.randrange(30))
        )
        for _ in range(n)
    ]


# --- encode and decode -----------------------------------------------------------------------------------------------


def test_round_trip_and_parity_of_the_engines(fast_tok: Tokenizer) -> None:
    """B48, B49, B50: any text survives, bytes are counted exactly, no text becomes a control token."""
    tok = fast_tok
    assert tok._fast is not None
    for text in random_texts(10_000):
        ids = tok.encode(text)
        normal = tok.normalize(text)
        assert tok.decode(ids) == normal
        assert tok.n_bytes(ids) == len(normal.encode()) == sum(len(tok.token_bytes(i)) for i in ids)
        assert not tok.special_ids & set(ids)
        assert ids == tok._slow(text)
        assert normal == tok._backend.normalizer.normalize_str(text)


def test_special_strings_are_plain_text(tok: Tokenizer) -> None:
    """B50."""
    assert tok.lossless and tok.lost is None
    for text in tok.special:
        assert not tok.special_ids & set(tok.encode(f"a{text}b{text}"))
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("bad", [None, 3, float("nan"), b"x", ["x"], "a\ud800b"])
def test_what_is_not_text_is_refused(bpe: Tokenizer, bad: Any) -> None:
    """B51."""
    for call in (bpe.encode, bpe.normalize, lambda t: bpe.encode_batch([t])):
        with pytest.raises(UserError, match="text"):
            call(bad)
    with pytest.raises(UserError, match=r"text 1\b"):
        Tokenizer.train(["fine", bad], TokenizerConfig(vocab_size=300))


def test_ids_and_layout(tok: Tokenizer) -> None:
    assert (tok.pad_id, tok.bos_id, tok.eos_id) == (0, 1, 2)
    assert [tok.special[t] for t in (*SPECIAL, *EXTRA)] == list(range(7))
    assert tok.end_of_turn_id == tok.special["<|im_end|>"]
    assert tok.stop_ids == {tok.eos_id, tok.end_of_turn_id}
    assert tok.encode("") == [] and tok.decode([]) == "" and tok.n_bytes([]) == 0
    assert tok.decode([1, *tok.encode("hi"), 2]) == "hi"
    assert tok.decode([1, *tok.encode("hi"), 2], skip_special=False) == "<|bos|>hi<|eos|>"
    assert tok.n_bytes([1, *tok.encode("hi"), 2]) == 2
    assert tok.mask_id is None
    for outside in (-1, tok.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tok.decode([outside])


def test_normalisation() -> None:
    texts = ["e\u0301，！１"]
    made = {n: Tokenizer.train(texts, TokenizerConfig(kind="byte", normalize=n)) for n in ("nfc", "nfkc", "none")}  # type: ignore[arg-type]
    assert made["nfc"].decode(made["nfc"].encode(texts[0])) == "\u00e9，！１"  # Chinese punctuation stays
    assert made["nfkc"].decode(made["nfkc"].encode(texts[0])) == "\u00e9,!1"
    assert made["none"].decode(made["none"].encode(texts[0])) == texts[0]


def test_streaming_never_splits_a_character(tok: Tokenizer) -> None:
    """B68: what is pushed out adds up to decode, for texts and for ids that no text has."""
    rng = random.Random(1)
    cases = [tok.encode(t) for t in random_texts(1500, seed=2)]
    cases += [[rng.randrange(tok.vocab_size) for _ in range(rng.randrange(25))] for _ in range(1500)]
    for n, ids in enumerate(cases):
        for skip in (True, False):
            stream = tok.stream(skip_special=skip)
            out = [stream.push(i) for i in ids]
            last = stream.finish()
            assert "".join(out) + last == tok.decode(ids, skip_special=skip)
            if n < 1500:
                assert last == "" and (not ids or "\ufffd" not in "".join(out))
    assert isinstance(tok.stream(), StreamDecoder)


def test_streaming_holds_back_half_a_character() -> None:
    tok = Tokenizer.train((), TokenizerConfig(kind="byte"))
    stream = tok.stream()
    assert [stream.push(i) for i in tok.encode("漢x")] == ["", "", "漢", "x"]
    assert [stream.push(i) for i in tok.encode("漢")[:2]] == ["", ""] and stream.finish() == "\ufffd"


@pytest.mark.parametrize("threads", [1, 2])
def test_batches(tok: Tokenizer, threads: int) -> None:
    """B35: the dtype fits the vocabulary."""
    texts = random_texts(300, seed=3)
    arrays = tok.encode_batch(texts, threads)
    assert [a.tolist() for a in arrays] == [tok.encode(t) for t in texts]
    assert all(a.dtype == np.uint16 for a in arrays)
    with pytest.raises(UserError, match="text"):
        tok.encode_batch(["a", None], threads)  # type: ignore[list-item]
    assert tok.encode_batch([], threads) == []


def test_a_large_vocabulary_gets_four_bytes(bpe: Tokenizer) -> None:
    """B35: ids above 65,535 don't wrap round."""
    spec = json.loads(bpe.files()["tokenizer.json"])
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    far = Tokenizer(spec, bpe.names, None)
    assert far.vocab_size == 70_001 and far.encode_batch(["x"])[0].dtype == np.uint32


@pytest.mark.parametrize(
    "text",
    ["a" * 2**20, " " * 2**20 + "x", " \n" * 2**19, "\u3000" * 600_000, "".join(map(chr, range(0x4E00, 0x9FFF))) * 16],
    ids=["letters", "spaces", "lines", "wide spaces", "cjk"],
)
def test_long_runs_take_linear_time(bpe: Tokenizer, text: str) -> None:
    bpe.encode("warm")
    start = time.process_time()
    ids = bpe.encode(text)
    assert time.process_time() - start < 6  # 2 s alone on one core; others may be at work here
    assert bpe.decode(ids) == text


def test_the_slow_way_is_taken_aloud(bpe: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """An engine that disagrees is not used."""
    spec = json.loads(bpe.files()["tokenizer.json"])
    assert isinstance(bpe._fast, TiktokenEngine)
    spec["model"]["merges"].append(spec["model"]["merges"][5])
    slow = Tokenizer(spec, bpe.names, None)
    with caplog.at_level(logging.WARNING):
        for text in random_texts(50):
            assert slow.encode(text) == bpe.encode(text)
    assert slow._fast is None and sum("slow way" in r.message for r in caplog.records) == 1


# --- training --------------------------------------------------------------------------------------------------------


def test_training_is_deterministic() -> None:
    cfg = TokenizerConfig(vocab_size=500)
    first, second = (Tokenizer.train(iter(ENGLISH + CHINESE), cfg) for _ in range(2))
    assert first.files() == second.files() and first.hash == second.hash
    other = Tokenizer.train(ENGLISH, cfg)
    assert other.hash != first.hash and other.template_hash == first.template_hash


def test_a_smaller_vocabulary_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tok = Tokenizer.train(["the the the"], TokenizerConfig(vocab_size=1000))
    assert 261 < tok.vocab_size < 1000
    assert f"{tok.vocab_size} reached, 1000 asked" in caplog.text
    assert f"{tok.vocab_size} of 1000 asked for" in format_report(report(tok, {"en": ["the"]}))


def test_report(bpe: Tokenizer) -> None:
    data = report(bpe, {"en": ENGLISH, "zh": CHINESE})
    assert data["vocab_size"] == bpe.vocab_size
    for language in ("en", "zh"):
        row = data["languages"][language]
        assert row["round_trip_failures"] == 0 and row["bytes_per_token"] > 1.5 and 0 <= row["single_byte_frac"] < 1
        assert len(row["longest"]) == 5 and len(row["longest"][0]) == max(map(len, row["longest"]))
    assert data["languages"]["zh"]["chars_per_token"] < data["languages"]["zh"]["bytes_per_token"]
    assert data["lossless"] and data["lost"] is None
    table = format_report(data)
    assert "zh" in table and "ok" in table and len({len(line) for line in table.splitlines()[1:4]}) == 1
    assert "longest tokens, zh: '我们今天去图书馆'" in table


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vocab_size": 200}, "need 261"),
        ({"special": ["<|bos|>"]}, "there already"),
        ({"special": ["PAD"]}, "written like"),
        ({"special": ["<a b>"]}, "written like"),
        ({"path": "x", "vocab_size": 5000}, "drop vocab_size"),
        ({"kind": "bpee"}, "kind"),
        ({"vocab": 3}, "did you mean"),
    ],
)
def test_wrong_recipes(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(TokenizerConfig, data)


def test_a_folder_is_short_for_its_path() -> None:
    assert TokenizerConfig.model_validate("runs/x").path == "runs/x"
    cfg = TokenizerConfig(path="x")
    assert TokenizerConfig.model_validate_json(cfg.model_dump_json()) == cfg


def test_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="no text"):
        Tokenizer.train([], TokenizerConfig())


# --- folders ---------------------------------------------------------------------------------------------------------


def test_save_and_load(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    assert again.files() == tok.files() and again.hash == tok.hash and again.template_hash == tok.template_hash
    assert pickle.loads(pickle.dumps(tok)).files() == tok.files()
    for text in random_texts(100):
        assert again.encode(text) == tok.encode(text)
    run = tmp_path / "run"
    tok.save(run / "checkpoints" / "step-00000002")
    assert Tokenizer.from_config(TokenizerConfig(path=str(run))).hash == tok.hash
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "damage", ["{", "[]", "{}", '{"model": {"type": "Unigram"}}', '{"model": {"vocab": {}, "merges": 3}}']
)
def test_damaged_folders(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_text(damage)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(UserError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def foreign(bpe: Tokenizer, folder: Path, template: str | None = CHATML, **config: Any) -> Path:
    """A folder as others write it: other names, no pad token, text cut at 4 tokens."""
    text = bpe.files()["tokenizer.json"].decode().replace("<|bos|>", "<|begin|>").replace("<|pad|>", "<|reserved_0|>")
    spec = json.loads(text)
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    return folder


def test_a_foreign_folder(bpe: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    tok = Tokenizer.load(
        foreign(bpe, tmp_path / "m", auto_map={"AutoTokenizer": ["evil.X", None]}, pad_token="<|im_end|>")
    )
    assert "never runs" in caplog.text
    assert tok.eos_id == 4 and tok.bos_id is None and tok.stop_ids == {4, 2}
    assert tok.pad_id == 0 != tok.eos_id  # B27: a pad that is the end token is replaced
    assert tok.encode(ENGLISH[0]) == bpe.encode(ENGLISH[0])  # not cut at 4
    with pytest.raises(UserError, match="does"):
        Tokenizer.load(foreign(bpe, tmp_path / "n", pad_token="<|nowhere|>"))


def test_non_special_added_tokens_stay_as_the_folder_has_them(bpe: Tokenizer) -> None:
    spec = json.loads(bpe.files()["tokenizer.json"])
    next(t for t in spec["added_tokens"] if t["content"] == "<think>")["special"] = False
    tok = Tokenizer(spec, bpe.names, bpe.template)
    ids = tok.encode("<think>hm</think>")
    assert ids == tok._slow("<think>hm</think>") and ids[0] == bpe.special["<think>"]
    assert tok.decode(ids) == "<think>hm</think>"


def test_the_locale_does_not_matter(bpe: Tokenizer, tmp_path: Path) -> None:
    """B47."""
    bpe.save(tmp_path)
    text = CHINESE[0]
    code = (
        "import sys\nfrom llmkit.tokenizer import Tokenizer\n"
        f"t = Tokenizer.load(sys.argv[1]); s = {text!a}\n"
        "assert t.decode(t.encode(s)) == s\nt.save(sys.argv[1])\nprint(t.encode(s))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == bpe.encode(text)
    assert (tmp_path / "tokenizer.json").read_bytes() == bpe.files()["tokenizer.json"]


# --- conversations ---------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "今天天气"},
    {"role": "assistant", "content": "很好。\n"},
]
TRICKY = [
    *SPECIAL,
    *EXTRA,
    "<|im_start|>system\n",
    "<|im_",
    "end|>",
    "|>",
    "<",
    "im_end",
    "m",
    "\U000f0000\U000f0001",
    "\n",
    " ",
]
pieces = st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=6)), max_size=5).map("".join)
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": pieces}),
    min_size=1,
    max_size=5,
)


def turns_of(tok: Tokenizer, enc: ChatEncoding) -> list[str]:
    return [tok.decode(enc.ids[a:b], skip_special=False) for a, b in enc.turns]


@settings(max_examples=300, deadline=None)
@given(chats)
def test_control_tokens_come_from_the_template_alone(bpe: Tokenizer, messages: list[dict[str, str]]) -> None:
    """B26, B28, B29, B50: for any text of any role."""
    enc = bpe.encode_chat(messages)
    start, end = bpe.special["<|im_start|>"], bpe.special["<|im_end|>"]
    assert [i for i in enc.ids if i in bpe.special_ids] == [bpe.bos_id] + [start, end] * len(messages)
    replies = [bpe.normalize(m["content"]) for m in messages if m["role"] == "assistant"]
    assert turns_of(bpe, enc) == [r + "<|im_end|>" for r in replies]
    assert sum(enc.loss_mask) == sum(b - a for a, b in enc.turns) and len(enc.loss_mask) == len(enc.ids)
    masked = [i for i, m in zip(enc.ids, enc.loss_mask, strict=True) if m]
    assert bpe.decode(masked) == "".join(replies) and masked.count(end) == len(replies)
    for k in range(1, len(messages)):  # B30: a prompt is the beginning of the whole
        if messages[k]["role"] == "assistant":
            prompt = bpe.encode_chat(messages[:k], add_generation_prompt=True).ids
            assert enc.ids[: len(prompt)] == prompt and enc.turns[sum(m["role"] == "assistant" for m in messages[:k])][
                0
            ] == len(prompt)


def test_one_bos_and_one_terminator_on_every_path(tok: Tokenizer) -> None:
    """B26, B27, B28: also when the last message is a user's, and for a prompt."""
    for messages, prompt in ((CHAT, False), (CHAT[:4], True), (CHAT[:2], False)):
        enc = tok.encode_chat(messages, add_generation_prompt=prompt)
        assert enc.ids.count(tok.bos_id) == 1 and enc.ids[0] == tok.bos_id
        assert enc.ids.count(tok.end_of_turn_id) == len(messages)
    enc = tok.encode_chat(CHAT)
    assert all(enc.ids[b - 1] == tok.end_of_turn_id and enc.loss_mask[b - 1] for _, b in enc.turns)
    assert set(tok.encode_chat(CHAT, train_on="all").loss_mask) == {1}
    assert set(tok.encode_chat(CHAT[:2]).loss_mask) == {0}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hi", "list"),
        ([{"role": "user", "content": "a"}, "x"], "message 1"),
        ([{"role": "human", "content": "a"}], "message 0: role must be one of"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
            r"message 1 \(assistant\): content",
        ),
        ([{"role": "user"}], "got nothing"),
        ([{"role": "user", "content": "\udc00"}], "surrogate"),
        ([{"role": "user", "content": "a", "x": object()}], "object"),
    ],
)
def test_wrong_messages(bpe: Tokenizer, messages: Any, message: str) -> None:
    """B51."""
    with pytest.raises(UserError, match=message):
        bpe.encode_chat(messages)


NO_TAGS = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
THINKING = NO_TAGS.replace(
    "{{- m['content'] -}}", "{{- (m['content'] if loop.last else m['content'].split('@')[-1]) -}}", 1
)
OUTSIDE = CHATML.replace("{{- '<|im_end|>' -}}{%- endgeneration -%}", "{%- endgeneration -%}{{- '<|im_end|>' -}}")


def with_template(tok: Tokenizer, source: str) -> Tokenizer:
    return Tokenizer(json.loads(tok.files()["tokenizer.json"]), tok.names, ChatTemplate(source, "theirs.jinja"))


def test_templates_without_tags(bpe: Tokenizer) -> None:
    """B29, B30: spans are derived where a prompt is the beginning of the conversation, and refused elsewhere."""
    assert bpe.encode_chat(CHAT) == with_template(bpe, NO_TAGS).encode_chat(CHAT)
    thinking = with_template(bpe, THINKING)
    chat = [{**m, "content": "hm@" + m["content"]} for m in CHAT]
    with pytest.raises(UserError, match="generation tags"):
        thinking.encode_chat(chat)
    assert sum(thinking.encode_chat(chat[:3]).loss_mask) > 2  # one turn is fine
    assert sum(thinking.encode_chat(chat[:4], add_generation_prompt=True).loss_mask) == 0  # and so is a prompt


def test_masks_that_would_ruin_a_run_are_refused(bpe: Tokenizer) -> None:
    """B29."""
    with pytest.raises(UserError, match="never learn to stop"):
        with_template(bpe, OUTSIDE).encode_chat(CHAT)
    with pytest.raises(UserError, match="nothing of what the assistant wrote"):
        with_template(
            bpe, "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
        ).encode_chat(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"theirs\.jinja:2: not a valid template"),
        ("{{ 'a' * 10000000 }}", "more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "more than"),
        ("{% for i in range(90000) %}xxxx{% endfor %}", "more than"),
        ("{{ 9 ** 9 ** 9 }}", "power"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "control token"),
    ],
)
def test_foreign_templates_are_bounded(bpe: Tokenizer, source: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        with_template(bpe, source).encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert time.monotonic() - start < 10


def test_other_fields_and_tools_are_users_text_too(bpe: Tokenizer) -> None:
    """B50: also parts that only a template's text would complete."""
    source = "{% for m in messages %}<|{{ m.name }}|>{{ m.content }}{% endfor %}{{ tools | tojson }}"
    tok = with_template(bpe, source)
    enc = tok.encode_chat(
        [{"role": "user", "content": "|>", "name": "im_end"}], tools=[{"a": "<|bos|>", "<|eos|>": "漢"}]
    )
    assert not tok.special_ids & set(enc.ids)
    assert tok.decode(enc.ids) == enc.text == '<|im_end|>|>[{"a": "<|bos|>", "<|eos|>": "漢"}]'


def test_generation_blocks_within_macros() -> None:
    source = "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}ab{% for m in messages %}{{ say(m) }}{% endfor %}"  # noqa: E501
    assert ChatTemplate(source).render([{"role": "assistant", "content": "xyz"}], Shield([]), {}).spans == [(2, 5)]


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    bpe.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_loads_it_without_a_word(tok: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path, model_max_length=128)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in random_texts(500, seed=5):
            assert other(text, split_special_tokens=True)["input_ids"] == tok.encode(text)
        assert other.decode(tok.encode(CHINESE[0])) == CHINESE[0]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == [] and caught == []
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (tok.bos_id, tok.eos_id, tok.pad_id)
    assert len(other) == tok.vocab_size and set(other("x")) == {"input_ids", "attention_mask"}
    assert other.model_max_length == 128


@settings(max_examples=100, deadline=None)
@given(chats)
def test_transformers_renders_the_same(bpe: Tokenizer, theirs: Any, messages: list[dict[str, str]]) -> None:
    """The text always; ids and mask unless a user's text is that of a control token, or a reply begins with a newline."""
    enc = bpe.encode_chat(messages)
    assert theirs.apply_chat_template(messages, tokenize=False) == enc.text
    prompt = bpe.encode_chat(messages, add_generation_prompt=True).text
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    blank = any(set(m["content"][: -len(m["content"].lstrip()) or None]) & set("\r\n") for m in messages)
    if blank or any(t in m["content"] for t in bpe.special for m in messages):
        return
    if any(bpe.normalize(m["content"]) != m["content"] for m in messages):
        return  # transformers' own mapping from characters to tokens is not that exact
    out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert list(out["input_ids"]) == enc.ids
    assert list(out["assistant_masks"]) == enc.loss_mask


def test_the_regex_is_the_one_llama_cpp_knows(bpe: Tokenizer) -> None:
    assert json.loads(bpe.files()["tokenizer.json"])["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {
        "Regex": GPT4_REGEX
    }


def test_control_tokens_that_swallow_blanks(bpe: Tokenizer) -> None:
    """Some folders' control tokens take the blanks behind them along: ids are then what `tokenizers` gives."""
    spec = json.loads(bpe.files()["tokenizer.json"])
    for token in spec["added_tokens"]:
        token["rstrip"] = True
    tok = Tokenizer(spec, bpe.names, bpe.template)
    enc = tok.encode_chat(CHAT)
    tok._backend.encode_special_tokens = False
    assert enc.ids == tok._backend.encode(enc.text, add_special_tokens=False).ids
    assert turns_of(tok, enc) == ["Hi!<|im_end|>", "很好。\n<|im_end|>"]
