"""One text in the tokens of two tokenizers: where both stand at the same place, and what the teacher is told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, trainers

from llmkit.config import UserError
from llmkit.data.chats import ChatRows, Chats
from llmkit.data.loader import PADDING, RowLoader, TextRows
from llmkit.data.packing import IGNORE
from llmkit.data.shards import ShardWriter, TokenShards, write_index
from llmkit.distill.alignment import Aligned, AlignedRows, Aligner, check_tokenizers, paired
from llmkit.distill.config import SoftConfig, UldConfig
from llmkit.distill.transcripts import Transcripts, whole_characters
from llmkit.losses.distillation import uld_loss
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, document_mask, init_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tokenizer.chat import CHATML, ChatTemplate

WORDS = "the miller's bridge is older than the mill , and the river was never deeper than 40 hands"
CHINESE = [
    "米拉住在哪里",
    "她住在橡渡",
    "一只老鼠陷在泥里",
    "晚饭时整个村子都知道了这件事",
    "三十七加四十五",
    "，",
    "。",
]
ODD = ["\U0001f600", "é", "\t", "\n\n", "  ", "<|im_end|>", "0123456789", "\u200d", "ﬁ"]


def text(rng: random.Random, n: int = 12) -> str:
    words = rng.choices([*WORDS.split(), *CHINESE], k=n - 2) + rng.choices(ODD, k=2)
    rng.shuffle(words)
    return "".join(w + rng.choice(["", " "]) for w in words)


CORPUS = [text(random.Random(i), 30) for i in range(150)]


def trained(kind: str, size: int = 420, **more: Any) -> Tokenizer:
    return Tokenizer.train(CORPUS, TokenizerConfig(kind=kind, vocab_size=size, **more))  # type: ignore[arg-type]


def prefixed() -> Tokenizer:
    """As Llama 2: a sign for the space, and one before every text, also behind control tokens."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *(f"<0x{b:02X}>" for b in range(256))]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    corpus = [t.replace("<|im_end|>", "") for t in CORPUS]  # else it would become one piece
    made.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < 6]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return Tokenizer(spec, names, ChatTemplate(CHATML, "chatml"))


BYTES, SMALL = trained("byte"), trained("bpe", 340)
KINDS = {
    "bpe": trained("bpe", 500),
    "unigram": trained("unigram", 450),
    "wordpiece": trained("wordpiece", 650),
    "sentencepiece": trained("sentencepiece", 700),
    "prefixed": prefixed(),
    "byte": BYTES,
}

LLAMA = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '<|head|>' + m['role'] + '<|body|>\\n\\n' + m['content'] | trim + "
    "'<|eot|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|head|>assistant<|body|>\\n\\n' -}}{%- endif -%}"
)
THINKING = LLAMA.replace("m['content'] | trim", "('<think></think>' if m.role == 'assistant' else '') + m['content']")
FORGETFUL = LLAMA.replace(
    "m['content'] | trim", "('(thought)' if m.role == 'assistant' and loop.last else '') + m['content']"
)


def templated(source: str, size: int = 460) -> Tokenizer:
    made = trained("bpe", size, special=("<|head|>", "<|body|>", "<|eot|>"))
    return Tokenizer(made._spec, made.names, ChatTemplate(source, "own"))


def renamed(tokenizer: Tokenizer) -> Tokenizer:
    """With other names for its control tokens, and no template."""
    spec = json.loads(json.dumps(tokenizer._spec).replace("<|", "<|x_"))
    return Tokenizer(spec, {k: v and v.replace("<|", "<|x_") for k, v in tokenizer.names.items()}, None)


def document(tokenizer: Tokenizer, said: str) -> tuple[np.ndarray, np.ndarray]:
    """A document's ids as they are prepared, and which are learnt."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = np.array([*bos, *tokenizer.encode(said), tokenizer.eos_id], np.int64)
    return ids, np.arange(len(ids)) > 0


def shown(tokenizer: Tokenizer, ids: Any) -> bytes:
    """The bytes of a text's tokens, its control tokens left out."""
    kept = [int(i) for i in ids if int(i) not in tokenizer.special_ids]
    return b"".join(tokenizer.token_bytes(i, at_start=n == 0) for n, i in enumerate(kept))


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_only_equal_hashes_are_the_same_tokens() -> None:
    """B91: sizes say nothing, and more tokens at the end are another vocabulary of the softmax."""
    terms = [SoftConfig(kind="soft")]
    assert check_tokenizers(SMALL, Tokenizer(SMALL._spec, SMALL.names, ChatTemplate(LLAMA, "x")), terms)
    other = Tokenizer.train(CORPUS[:40], TokenizerConfig(kind="bpe", vocab_size=340))
    longer = trained("bpe", 340, special=("<|more|>",))
    assert other.vocab_size == SMALL.vocab_size
    for teacher in (other, longer, KINDS["bpe"]):
        with pytest.raises(UserError, match=r"losses: soft/forward compares .* tokenizer.path .*kind: uld"):
            check_tokenizers(SMALL, teacher, [UldConfig(kind="uld"), *terms])
        assert not check_tokenizers(SMALL, teacher, [UldConfig(kind="uld")])
        assert not check_tokenizers(SMALL, teacher, [])
    with pytest.raises(UserError, match=r"id \d+ is b'"):
        check_tokenizers(SMALL, other, terms)


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_aligns_every_position(kind: str) -> None:
    """And gives the teacher the student's own ids."""
    aligner, rng = Aligner(KINDS[kind], KINDS[kind], chat=False), random.Random(1)
    for _ in range(40):
        ids, is_trained = document(KINDS[kind], text(rng))
        made = aligner(ids, is_trained)
        assert made.ids.tolist() == ids.tolist()
        assert made.student_at.tolist() == made.teacher_at.tolist() == list(range(len(ids) - 1))


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_aligned_prefixes_are_equal_bytes_and_none_is_missed(student: str, teacher: str) -> None:
    """B91: in both scripts, with tokens that are parts of characters, an aligned pair has seen the same bytes; and
    wherever both tokenisations end at the same byte, there is a pair."""
    ours, theirs, rng = KINDS[student], KINDS[teacher], random.Random(2)
    aligner = Aligner(ours, theirs, chat=False)
    for _ in range(12):
        said = ours.normalize(text(rng))
        assert ours.decode(ours.encode(said)) == theirs.decode(theirs.encode(said)) == said
        ids, is_trained = document(ours, said)
        made = aligner(ids, is_trained)
        seen = [shown(ours, ids[: i + 1]) for i in range(len(ids) - 1)]
        their_ids = document(theirs, said)[0]
        told = [shown(theirs, their_ids[: i + 1]) for i in range(len(their_ids) - 1)]
        for i, j in zip(made.student_at.tolist(), made.teacher_at.tolist(), strict=True):
            assert seen[i] == shown(theirs, made.ids[: j + 1])
        both = {*map(len, seen)} & {*map(len, told)}
        assert {len(seen[i]) for i in made.student_at} == both, (student, teacher, said)
        assert made.ids.tolist() == their_ids.tolist()
        assert len(both) > 3


def test_boundaries_are_counted_in_bytes() -> None:
    """A teacher whose tokens are characters meets a student of bytes after every third byte, and at the end."""
    characters = trained("sentencepiece", 800, coverage=1.0, model="bpe")
    said = "米拉住在"
    pieces = [len(characters.token_bytes(i)) for i in characters.encode(said)]
    assert 1 not in pieces[1:] and max(pieces) >= 3
    ids, is_trained = document(BYTES, said)
    made = Aligner(BYTES, characters, chat=False)(ids, is_trained)
    ends = np.cumsum([characters.n_bytes([i]) for i in characters.encode(said)])
    at = [len(shown(BYTES, ids[: i + 1])) for i in made.student_at]
    assert at == sorted({0, *(int(e) - int(ends[-1]) + 12 for e in ends if e >= ends[-1] - 12)})
    assert 12 in at and set(at) <= {0, 3, 6, 9, 12}


def test_a_text_without_the_students_bos_gets_the_teachers() -> None:
    """And the other way round: position 0 stands for the empty text where both have one, and only there."""
    t5 = prefixed()
    bare = Tokenizer(t5._spec, {k: v for k, v in t5.names.items() if k != "bos_token"}, None)
    assert bare.bos_id is None
    ids, is_trained = document(bare, "the mill 米拉")
    made = Aligner(bare, BYTES, chat=False)(ids, is_trained)
    assert made.ids[0] == BYTES.bos_id and made.ids[1:-1].tolist() == BYTES.encode("the mill 米拉")
    assert made.ids[-1] == BYTES.eos_id and 0 not in made.teacher_at
    ids, is_trained = document(BYTES, "the mill 米拉")
    made = Aligner(BYTES, bare, chat=False)(ids, is_trained)
    assert made.ids.tolist() == [*bare.encode("the mill 米拉"), bare.eos_id]
    assert made.student_at[0] > 0 and shown(BYTES, ids[: made.student_at[0] + 1]) == shown(bare, made.ids[:1])


def test_a_token_that_begins_and_ends_texts() -> None:
    """As GPT-2's: at the beginning it is the teacher's bos, at the end its eos."""
    names = {**SMALL.names, "bos_token": "<|eos|>"}
    both = Tokenizer(SMALL._spec, names, None)
    ids, is_trained = document(both, "the river")
    made = Aligner(both, BYTES, chat=False)(ids, is_trained)
    assert made.ids.tolist() == document(BYTES, "the river")[0].tolist()
    last = len(ids) - 2
    assert made.student_at[-1] == last and made.teacher_at[-1] == len(made.ids) - 2


def test_a_tokenizer_that_changes_text_is_aligned_around_the_change() -> None:
    """What NFKC makes of a ligature is told, and no position within it is aligned."""
    teacher = trained("byte", normalize="nfkc")
    plain = trained("byte", normalize="none")
    ids, is_trained = document(plain, "a ﬁ b")
    made = Aligner(plain, teacher, chat=False)(ids, is_trained)
    assert shown(teacher, made.ids) == b"a fi b"
    pairs = list(zip(made.student_at.tolist(), made.teacher_at.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 1), (2, 2), (5, 4), (6, 5), (7, 6)]


def test_halves_of_characters_at_the_edges_of_a_row() -> None:
    """A row may begin and end within a character: the teacher is told the whole ones, and places still count bytes."""
    whole = "米拉住在".encode()
    assert whole_characters(whole[1:-1]) == ("拉住", 2, 6)
    assert whole_characters(whole[:-2]) == ("米拉住", 0, 9)
    assert whole_characters(whole[2:3]) == ("", 1, 0)
    assert whole_characters(b"a\xf0\x9f\x98") == ("a", 0, 1)
    assert whole_characters("é\U0001f600".encode()) == ("é\U0001f600", 0, 6)
    teacher = KINDS["sentencepiece"]
    ids = np.array([BYTES.encode("米")[i % 3] if i < 3 else BYTES.encode("拉住在")[i - 3] for i in range(1, 11)])
    made = Aligner(BYTES, teacher, chat=False)(ids, np.arange(10) > 0)
    assert shown(teacher, made.ids) == "拉住".encode()
    assert made.student_at.tolist()[-1] == 7  # the two bytes of the first, then two characters
    for i, j in zip(made.student_at.tolist(), made.teacher_at.tolist(), strict=True):
        assert shown(teacher, made.ids[: j + 1]) == bytes("米拉住在".encode()[3 : i + 2])


def test_a_row_that_begins_within_a_text_is_one_stretch() -> None:
    """Its first token is never learnt, but nothing is cut behind it."""
    teacher = KINDS["bpe"]
    ids = np.array(BYTES.encode("the river was never"))
    made = Aligner(BYTES, teacher, chat=False)(ids, np.arange(len(ids)) > 0)
    assert made.ids.tolist() == teacher.encode("the river was never")


def test_positions_at_one_place_are_paired_from_the_last() -> None:
    """A token without text, such as a lone sign for a space that is no space, makes two positions of one place."""
    ours, theirs = paired(np.array([0, 0, 2, 3, 5]), np.array([0, 2, 2, 4, -1, 5]))
    assert list(zip(ours.tolist(), theirs.tolist(), strict=True)) == [(1, 0), (2, 2), (4, 5)]


# --- conversations ---------------------------------------------------------------------------------------------------


def talk(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    made = [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(turns)]
    return made if system is None else [{"role": "system", "content": system}, *made]


TALKS = [
    talk("米拉住在哪里", "她住在橡渡。"),
    talk("the mill", "older than the river", "never ?", "40 hands , 三十七"),
    talk("the bridge  ", "a\n\nb", system="你好 miller"),
]


def answers(tokenizer: Tokenizer, made: Aligned | list[int], turns: list[tuple[int, int]]) -> list[bytes]:
    ids = made.ids if isinstance(made, Aligned) else made
    return [shown(tokenizer, [0, *ids[a:b]]) for a, b in turns]


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("source", [LLAMA, THINKING])
def test_a_conversation_is_told_in_the_teachers_template(messages: list[dict[str, Any]], source: str) -> None:
    """The teacher sees what its own template makes of the messages; in every answer the texts so far are the same."""
    teacher = templated(source)
    given, told = SMALL.encode_chat(messages), teacher.encode_chat(messages)
    made = Aligner(SMALL, teacher, chat=True)(np.array(given.ids), np.array(given.loss_mask) > 0)
    assert made.ids.tolist() == told.ids
    extra = "<think></think>" if source == THINKING else ""
    n_found = 0
    for (a, b), (c, d) in zip(given.turns, told.turns, strict=True):
        here = [(i, j) for i, j in zip(made.student_at, made.teacher_at, strict=True) if a - 1 <= i < b]
        for i, j in here:
            assert c - 1 <= j < d
            ours, theirs = SMALL.decode(given.ids[a : i + 1]), teacher.decode(told.ids[c : j + 1])
            assert theirs == extra + ours
        content = SMALL.decode(given.ids[a:b])
        assert content.strip() == content, "so that the template changes nothing of it"
        assert here[0][0] == a - 1 and here[-1] == (b - 2, d - 2), "the first token and the end of turn are aligned"
        n_found += len(here)
    assert n_found == len(made.student_at)


def test_only_what_is_learnt_is_aligned() -> None:
    teacher, messages = templated(LLAMA), TALKS[1]
    given = SMALL.encode_chat(messages, train_on="last")
    for other in (teacher, KINDS["bpe"]):
        made = Aligner(SMALL, other, chat=True)(np.array(given.ids), np.array(given.loss_mask) > 0)
        assert made.student_at.min() == given.turns[-1][0] - 1
        assert all(given.loss_mask[i + 1] for i in made.student_at)


def test_turns_that_a_template_changes_later_on() -> None:
    """Only the last turn is as it was written then, on either side."""
    student, teacher = templated(FORGETFUL), SMALL
    messages = TALKS[1]
    given = student.encode_chat(messages, train_on="last")
    made = Aligner(student, teacher, chat=True)(np.array(given.ids), np.array(given.loss_mask) > 0)
    told = teacher.encode_chat(messages)
    assert made.ids.tolist() == told.ids
    (c, d), (a, b) = told.turns[-1], given.turns[-1]
    assert len(made.student_at) > 2 and made.teacher_at.min() >= c - 1 and made.student_at.min() >= a - 1
    assert (made.student_at[-1], made.teacher_at[-1]) == (b - 2, d - 2)
    for i, j in zip(made.student_at, made.teacher_at, strict=True):
        assert student.decode(given.ids[a : i + 1]) == "(thought)" + teacher.decode(told.ids[c : j + 1])


@pytest.mark.parametrize("template", [None, LLAMA, THINKING])
def test_conversations_are_read_back(template: str | None) -> None:
    """Exactly, from whole ones and from such as were cut off, in an answer or within a character of one."""
    tokenizer = BYTES if template is None else templated(template)
    transcripts, rng = Transcripts(tokenizer), random.Random(3)
    for n in range(30):
        turns = [text(rng, 4).replace("<|im_end|>", "x").strip() or "x" for _ in range(rng.choice([2, 4]))]
        messages = talk(*map(tokenizer.normalize, turns), system="米 x" if n % 2 else None)
        made = tokenizer.encode_chat(messages)
        end = made.turns[-1][1]
        read = transcripts.read(made.ids[:end])
        assert read is not None and read.messages == messages and read.turns == made.turns
        cut = made.ids[: end - rng.randrange(1, end - made.turns[-1][0] + 1)]
        short = transcripts.read(cut)
        assert short is not None and short.messages[:-1] == messages[:-1]
        assert messages[-1]["content"].startswith(short.messages[-1]["content"])
        assert short.turns == [*made.turns[:-1], (made.turns[-1][0], len(cut))]


@pytest.mark.parametrize("student", [BYTES, KINDS["bpe"]])
def test_a_conversation_that_is_cut_off_is_aligned_as_far_as_it_goes(student: Tokenizer) -> None:
    """Wherever that is: the rest of a word alone would be cut into other tokens, but its bytes are the same."""
    teacher = templated(LLAMA)
    messages = talk("米拉住在哪里", "她住在橡渡 by the river, 晚饭时整个村子都知道了这件事")
    given = student.encode_chat(messages)
    ((a, b),) = given.turns
    ((c, _),) = teacher.encode_chat(messages).turns
    aligner = Aligner(student, teacher, chat=True)
    for end in range(a + 1, b):
        made = aligner(np.array(given.ids[:end]), np.array(given.loss_mask[:end]) > 0)
        assert made.student_at[0] == a - 1 and made.student_at[-1] < end - 1
        assert made.ids[:c].tolist() == teacher.encode_chat(messages).ids[:c]
        for i, j in zip(made.student_at, made.teacher_at, strict=True):
            assert shown(student, [0, *given.ids[a : i + 1]]) == shown(teacher, [0, *made.ids[c : j + 1]])


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_with_one_template_the_teacher_is_told_its_own_ids(student: str, teacher: str) -> None:
    """The control tokens are its own, and no space of the student's tokenizer is left behind one."""
    for messages in TALKS:
        given = KINDS[student].encode_chat(messages)
        made = Aligner(KINDS[student], KINDS[teacher], chat=True)(np.array(given.ids), np.array(given.loss_mask) > 0)
        told = KINDS[teacher].encode_chat(messages)
        assert made.ids.tolist() == told.ids
        for (a, b), (c, d) in zip(given.turns, told.turns, strict=True):
            pairs = {*zip(made.student_at.tolist(), made.teacher_at.tolist(), strict=True)}
            assert {(a - 1, c - 1), (b - 2, d - 2)} <= pairs


def test_what_cannot_be_read_back_is_told_as_it_stands() -> None:
    """Two questions in a row are no part of what is read: the control tokens become the teacher's, or plain text."""
    teacher = templated(LLAMA)
    given = SMALL.encode_chat([TALKS[1][0], *TALKS[1]])
    assert Transcripts(SMALL).read(given.ids) is None
    made = Aligner(SMALL, teacher, chat=True)(np.array(given.ids), np.array(given.loss_mask) > 0)
    assert made.ids[0] == teacher.bos_id
    assert teacher.decode(made.ids, skip_special=False) == given.text
    starts, ends = teacher.special["<|im_start|>"], teacher.special["<|im_end|>"]
    assert np.count_nonzero(made.ids == starts) == 5 and np.count_nonzero(made.ids == ends) == 5
    pairs = zip(made.student_at, made.teacher_at, strict=True)
    assert all(shown(SMALL, given.ids[: i + 1]) == shown(teacher, made.ids[: j + 1]) for i, j in pairs)
    assert {a - 1 for a, _ in given.turns} <= {*made.student_at.tolist()}
    foreign = renamed(SMALL)  # has none of these control tokens, and no template
    made = Aligner(SMALL, foreign, chat=True)(np.array(given.ids), np.array(given.loss_mask) > 0)
    assert "<|im_start|>assistant\n" in foreign.decode(made.ids) and foreign.eos_id in made.ids
    assert {a - 1 for a, _ in given.turns} <= {*made.student_at.tolist()}


# --- rows ------------------------------------------------------------------------------------------------------------


def chats(tokenizer: Tokenizer, n: int = 20) -> Chats:
    rng, ids, is_trained, starts = random.Random(4), [], [], [0]
    for _ in range(n):
        made = tokenizer.encode_chat(talk(*(tokenizer.normalize(text(rng, 4)).strip() or "x" for _ in range(2))))
        end = made.turns[-1][1]
        ids += made.ids[:end]
        is_trained += made.loss_mask[:end]
        starts.append(len(ids))
    return Chats("chats", np.array(ids, np.int32), np.array(is_trained) > 0, np.array(starts), 0, 0, 0)


def shards(folder: Path, tokenizer: Tokenizer, n: int = 12) -> TokenShards:
    rng = random.Random(5)
    writer = ShardWriter(folder / "0.tokens", tokenizer.vocab_size, tokenizer.hash)
    for _ in range(n):
        ids, _ = document(tokenizer, text(rng, 20))
        writer.add(ids, [len(ids)], len(ids))
    writer.close()
    write_index(folder, ["0.tokens"])
    return TokenShards(folder)


def model(tokenizer: Tokenizer) -> GPT:
    size = -(-tokenizer.vocab_size // 64) * 64
    made = GPT(GPTConfig(n_layers=2, n_heads=2, d_model=16, max_seq_len=256, vocab_size=size)).double()
    init_weights(made, 0)
    return made.eval()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("what", ["chat", "text"])
@torch.no_grad()
def test_batches_hold_the_documents_apart(tmp_path: Path, what: str, packing: bool) -> None:
    """B32: with one tokenizer and one model on both sides, the states at both ends of every pair are the same: so the
    teacher's rows, positions, documents and flat indices are right, also of packed rows; and no trained one is missing."""
    kind, network = KINDS["bpe"], model(KINDS["bpe"])
    shape: dict[str, Any] = {"row_len": 96, "pad_id": kind.pad_id, "packing": packing}
    plain: Any = ChatRows([chats(kind)], **shape) if what == "chat" else TextRows([shards(tmp_path, kind)], **shape)
    rows = AlignedRows(plain, kind, kind, max_len=256, chat=what == "chat")
    row = np.append(np.arange(min(plain.n_rows[0], 6)), 0)
    source = np.zeros(len(row), np.int64)
    source[-1] = PADDING
    batch, tokens = rows.batch(row, source, row)
    assert [t.tolist() for t in tokens] == [t.tolist() for t in plain.batch(row, source, row)[1]]
    ours = network(batch.ids_BT, batch.positions_BT, document_mask(batch.docs_BT)).flatten(0, 1)
    mask = document_mask(batch.teacher_docs_UT)
    theirs = network(batch.teacher_ids_UT, batch.teacher_positions_UT, mask).flatten(0, 1)
    trained_at = (batch.labels_BT.flatten() != IGNORE).nonzero().flatten()
    assert set(batch.student_at_M.tolist()) <= set(trained_at.tolist())
    # A row of a stream may begin within a word, which is cut in another way when it stands alone.
    whole = what == "chat" or not packing
    n = len(batch.student_at_M)
    assert n == len(trained_at) if whole else n > 0.9 * len(trained_at)
    same_ids = batch.ids_BT.flatten()[batch.student_at_M] == batch.teacher_ids_UT.flatten()[batch.teacher_at_M]
    assert same_ids.all() if whole else same_ids.float().mean() > 0.9
    if whole:
        mine, taught = ours[batch.student_at_M], theirs[batch.teacher_at_M]
        torch.testing.assert_close(mine, taught)
        head, sizes = network.head_weight, dict.fromkeys(("vocab_size", "teacher_vocab_size"), kind.vocab_size)
        assert uld_loss(mine, head, taught, head, **sizes).total < 1e-9 * n
        assert (batch.teacher_docs_UT >= 0).sum() == (batch.docs_BT >= 0).sum()
    assert (batch.teacher_docs_UT[-1] == -1).all() and (batch.teacher_ids_UT[-1] == kind.pad_id).all()
    assert torch.equal(batch.student_at_M, batch.student_at_M.sort().values)


def test_a_documents_beginning_is_aligned_where_the_teacher_takes_no_more() -> None:
    source = chats(SMALL, 8)
    plain = ChatRows([source], row_len=256, pad_id=SMALL.pad_id)
    row = np.arange(plain.n_rows[0])
    whole, _ = AlignedRows(plain, SMALL, KINDS["bpe"], max_len=1000, chat=True).batch(row, row * 0, row)
    short, _ = AlignedRows(plain, SMALL, KINDS["bpe"], max_len=24, chat=True).batch(row, row * 0, row)
    assert short.teacher_positions_UT.max() <= 23 and len(short.student_at_M) < len(whole.student_at_M)
    assert short.denominator == whole.denominator
    positions = whole.teacher_positions_UT.flatten()[whole.teacher_at_M]
    assert short.student_at_M.tolist() == whole.student_at_M[positions < 24].tolist()


def test_a_loader_gives_them_as_it_gives_others(tmp_path: Path) -> None:
    """The same batches from any start and in any epoch, on a device as a whole; the hash of the student's tokens."""
    plain = ChatRows([chats(SMALL)], row_len=128, pad_id=SMALL.pad_id)
    rows = AlignedRows(plain, SMALL, templated(LLAMA), max_len=256, chat=True)
    fresh = AlignedRows(plain, SMALL, templated(LLAMA), max_len=256, chat=True)
    with RowLoader(rows, rows_per_step=4, seed=1) as loader, RowLoader(fresh, rows_per_step=4, seed=1) as later:
        for k in range(8):
            (a,) = loader.step(k)
        (b,) = later.step(7)
        assert loader.tokens_hash(7) == RowLoader(plain, rows_per_step=4, seed=1, prefetch=0).tokens_hash(7)
    moved = a.to("cpu")
    assert type(moved) is type(a)
    for name, value in vars(b).items():
        for other in (vars(a)[name], vars(moved)[name]):
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert len(list(RowLoader(rows, rows_per_step=4, prefetch=0).eval_batches())) == -(-plain.n_rows[0] // 4)


def test_a_teacher_with_nothing_in_common_is_refused() -> None:
    """Loud in seconds: how much is aligned is known before the first step."""
    source = chats(SMALL, 6)
    plain = ChatRows([source], row_len=128, pad_id=SMALL.pad_id)
    frac = AlignedRows(plain, SMALL, KINDS["bpe"], max_len=256, chat=True).aligned_frac()
    assert 0.3 < frac < 1
    assert AlignedRows(plain, SMALL, SMALL, max_len=256, chat=True).aligned_frac() == 1
    with pytest.raises(UserError, match="no place at which"):
        AlignedRows(plain, SMALL, KINDS["bpe"], max_len=2, chat=True).aligned_frac()
