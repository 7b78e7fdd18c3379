"""Folders that others wrote, of every kind, against `tokenizers` itself; tokens added to them; damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_kinds import CHINESE, CORPUS, ENGLISH, KINDS, random_texts, train
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmkit.config import UserError
from llmkit.tokenizer import Tokenizer, TokenizerConfig

TEXTS = [*random_texts(1500, seed=7), *ENGLISH[:100], *CHINESE[:100], " a", "  a", "a", "", " ", "a ."]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def metaspace_bpe(normalizer: Any, pre_tokenizer: Any, strip: bool) -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: BPE on characters, a sign for the space, bytes for what is unknown."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *BYTES]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < 3]
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return made


def llama() -> tokenizers.Tokenizer:
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return metaspace_bpe(normalizers.Sequence(steps), None, True)


def mistral() -> tokenizers.Tokenizer:
    return metaspace_bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True)


def gemma() -> tokenizers.Tokenizer:
    return metaspace_bpe(normalizers.Replace(" ", "\u2581"), None, False)


def bert() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=BERT, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made


def t5() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = trainers.UnigramTrainer(vocab_size=1200, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def gpt2() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


MAKERS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], dict[str, Any]]] = {
    "llama": (llama, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}),
    "mistral": (mistral, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}),
    "gemma": (gemma, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}),
    "bert": (
        bert,
        {
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
        },
    ),
    "t5": (t5, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
    "gpt2": (gpt2, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
}


@pytest.fixture(scope="module", params=MAKERS)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    make, config = MAKERS[request.param]
    folder, made = tmp_path_factory.mktemp(request.param), make()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return request.param, folder, made


def test_ids_and_texts_are_those_of_the_folder(given: tuple[str, Path, Any]) -> None:
    """Ids of `tokenizers`, its decoding too, and streams that add up to it (B68); never a control token (B50)."""
    name, folder, made = given
    tok = Tokenizer.load(folder)
    made.encode_special_tokens = True
    expected = [e.ids for e in made.encode_batch_fast(TEXTS, add_special_tokens=False)]
    encoded = [a.tolist() for a in tok.encode_batch(TEXTS, threads=2)]
    control = tok.special_ids - {tok.special.get(tok.names.get("unk_token") or "")}
    for text, ids, theirs in zip(TEXTS, encoded, expected, strict=True):
        # T5's own Unigram finds </s> and others in a user's text: what it should never do (B50).
        assert ids == theirs or (name == "t5" and any(t in text for t in tok.special)), text
        assert not control & set(ids) and tok.encode(text) == ids
        stream = tok.stream()
        whole = tok.decode(ids)
        assert "".join([*map(stream.push, ids), stream.finish()]) == whole
        assert made.decode(ids, skip_special_tokens=True) == whole
    assert tok.lossless == (name == "gpt2")
    if name == "gpt2":
        assert all(tok.decode(i) == t for i, t in zip(encoded, TEXTS, strict=True))
    else:
        assert tok.lost is not None and tok.decode(tok.encode(tok.lost)) != tok.normalize(tok.lost)
    again_folder = folder / "again"
    tok.save(again_folder)
    again = Tokenizer.load(again_folder)
    assert again.hash == tok.hash and again.names == tok.names
    assert [a.tolist() for a in again.encode_batch(TEXTS)] == encoded


def test_transformers_reads_what_we_save(given: tuple[str, Path, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name, folder, _ = given
    tok = Tokenizer.load(folder)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = TEXTS if name != "t5" else [t for t in TEXTS if not any(s in t for s in tok.special)]
    assert theirs(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"] == [
        tok.encode(t) for t in texts
    ]
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (tok.eos_id, tok.pad_id, tok.mask_id)


def test_the_names_of_berts_tokens(tmp_path: Path) -> None:
    """Its separator ends a text; its mask token is found without being named, too."""
    bert().save(str(tmp_path / "tokenizer.json"))
    config = dict(MAKERS["bert"][1])
    for drop in (None, "mask_token"):
        config.pop(drop, None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tok = Tokenizer.load(tmp_path)
        assert (tok.pad_id, tok.bos_id, tok.eos_id, tok.mask_id) == (0, 2, 3, 4)
    assert tok.decode(tok.encode("The Fox, is it?")) == "the fox, is it?"


def test_a_reply_gets_no_space_of_its_own(tmp_path: Path) -> None:
    """Where a tokenizer puts a space before every text, it puts none within a conversation that is cut for the mask."""
    template = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}" \
        "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"  # fmt: skip
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    for make in (llama, mistral):
        made = make()
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
        tok = Tokenizer.load(tmp_path)
        enc = tok.encode_chat(chat)
        (turn,) = enc.turns
        assert tok.decode(enc.ids[slice(*turn)], start=False) == "It is."
        # Behind a control token the two differ, each as its own library has it.
        whole = made.encode(enc.text, add_special_tokens=False).ids
        assert tok.decode(enc.ids, skip_special=False) == made.decode(whole, skip_special_tokens=False)
        prompt = tok.encode_chat(chat[:1], add_generation_prompt=True).ids
        assert prompt == whole[: len(prompt)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_ours_is_read_as_a_foreign_folder(kind: str, tmp_path: Path) -> None:
    """Without our names in its configuration, and saved by `tokenizers` itself."""
    tok = train(CORPUS[:60], vocab_size=700, **KINDS[kind])
    tokenizers.Tokenizer.from_str(tok.files()["tokenizer.json"].decode()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    again = Tokenizer.load(tmp_path)
    assert again.lossless and again.special == tok.special and again.template is not None
    assert [again.encode(t) for t in TEXTS[:300]] == [tok.encode(t) for t in TEXTS[:300]]


# --- added tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    old = train(CORPUS[:60], vocab_size=700, **KINDS[kind])
    old.save(tmp_path)
    add = ("<|tool|>", "Quizzaciously", "漢字々", "<|mask|>")
    tok = Tokenizer.from_config(TokenizerConfig(path=str(tmp_path), add=add))
    new = range(old.vocab_size, old.vocab_size + 4)
    assert tok.vocab_size == old.vocab_size + 4 and tok.hash != old.hash
    assert [tok.special.get(t) for t in add] == [new[0], None, None, new[3]] and tok.mask_id == new[3]
    text = "a Quizzaciously <|tool|>漢字々。e\u0301Quizzaciously "
    ids = tok.encode(text)
    assert [i for i in ids if i in new] == [new[1], new[2], new[1]]  # B50: no control token
    assert tok.decode(ids) == tok.normalize(text) and tok.n_bytes(ids) == len(tok.normalize(text).encode())
    assert tok.lossless
    plain = [t for t in TEXTS[:300] if "Quizz" not in t]
    assert [tok.encode(t) for t in plain] == [old.encode(t) for t in plain]
    tok.save(tmp_path / "new")
    assert Tokenizer.load(tmp_path / "new").encode(text) == ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"] == ids
    assert len(theirs) == tok.vocab_size and theirs.mask_token_id == new[3]
    chat = tok.encode_chat([{"role": "user", "content": text}])
    assert [i for i in chat.ids if i in new] == [new[1], new[2], new[1]]


def test_tokens_that_cannot_be_added(tmp_path: Path) -> None:
    train(ENGLISH[:60], vocab_size=700).save(tmp_path)
    for token in ("<|eos|>", "The"):
        with pytest.raises(UserError, match="already"):
            Tokenizer.load(tmp_path, add=(token,))
    folder = tmp_path / "llama"
    folder.mkdir()
    llama().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(MAKERS["llama"][1]))
    tok = Tokenizer.load(folder, chat_template="chatml", add=("<|im_start|>", "<|im_end|>"))
    assert tok.end_of_turn_id == tok.special["<|im_end|>"]
    with pytest.raises(UserError, match="a space before every text"):  # also before what follows the added token
        Tokenizer.load(folder, add=("Quizz",))
    mistral().save(str(folder / "tokenizer.json"))
    tok = Tokenizer.load(folder, add=("Quizz",))
    assert tok.decode(tok.encode("a Quizz b")) == "a Quizz b"


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(spec: dict[str, Any], rng: random.Random) -> str:
    """The definition with one thing wrong: a value of another type, something gone, or bytes lost."""
    if rng.random() < 0.2:
        text = json.dumps(spec)
        at = rng.randrange(len(text))
        return text[:at] + text[at + rng.randrange(1, 200) :]
    spec = json.loads(json.dumps(spec))
    node, parents = spec, []
    while isinstance(node, (dict, list)) and node and (len(parents) < 1 or rng.random() < 0.75):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        parents.append((node, key))
        node = node[key]
    parent, key = parents[-1]
    wrong = [None, -1, 10**12, "x", [], {}, True, 1.5, [[1]], {"type": "Nope"}, "\ud800", 0]
    if rng.random() < 0.3:
        del parent[key]
    else:
        parent[key] = rng.choice(wrong)
    return json.dumps(spec)


@pytest.mark.parametrize("kind", [*KINDS, "llama", "bert", "t5"])
def test_damage_is_one_line(kind: str, tmp_path: Path) -> None:
    """Read, or refused in one line that names the folder: nothing else."""
    rng = random.Random(kind)
    if kind in KINDS:
        train(CORPUS[:10], vocab_size=600, **KINDS[kind]).save(tmp_path)
    else:
        make, config = MAKERS[kind]
        make().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    refused = 0
    for _ in range(60):
        (tmp_path / "tokenizer.json").write_text(damaged(spec, rng))
        try:
            tok = Tokenizer.load(tmp_path)
        except UserError as e:
            refused += 1
            assert str(e).startswith(str(tmp_path)) and "\n" not in str(e)
        else:
            assert tok.vocab_size > 0
    assert refused > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "only BPE, WordPiece and Unigram"),
        ({"decoder": {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True}}, "CTC"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}}, "Strip at the end"),
    ],
)
def test_what_is_not_known(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    bert().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[SEP]"}))
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)
