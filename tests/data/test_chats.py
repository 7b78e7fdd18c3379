"""Conversations -> rows: what is learnt, what shares a row, what is left out, what is cached."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.config import Interrupted, UserError
from llmkit.data import dialogues, sources
from llmkit.data.chats import ChatData, ChatRows, Chats, best_fit, prepare_chats
from llmkit.data.config import DataConfig
from llmkit.data.loader import PADDING, RowLoader
from llmkit.data.packing import IGNORE
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, document_mask, init_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tokenizer.chat import CHATML, ChatTemplate
from llmkit.training.supervised import token_loss

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))


def with_template(source: str, names: dict[str, str | None] | None = None) -> Tokenizer:
    return Tokenizer(BYTES._spec, names or BYTES.names, ChatTemplate(source, "own"))


def row(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]}


def words(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [row(*("x" * rng.randrange(1, 20) for _ in range(rng.choice([2, 2, 4])))) for _ in range(n)]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def config(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **more: Any) -> DataConfig:
    if rows is not None:
        write(tmp_path / "chat.jsonl", rows)
    path = str(tmp_path / "chat.jsonl")
    return DataConfig(path=path, cache_dir=str(tmp_path / "cache"), **{"valid_frac": 0.0, **more})


def prepare(cfg: DataConfig, row_len: int = 128, tokenizer: Tokenizer = BYTES, **more: Any) -> ChatData:
    return prepare_chats(cfg, tokenizer, row_len=row_len, **more)


# --- packing ---------------------------------------------------------------------------------------------------------


def test_best_fit_places_everything_once_and_fills_rows() -> None:
    """B33: nothing twice, nothing lost, nothing too long; and close to the fewest rows there could be."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        row_len = int(rng.integers(1, 60))
        lengths = rng.integers(1, row_len + 1, int(rng.integers(0, 200))).astype(np.int64)
        members, starts = best_fit(lengths, row_len)
        assert sorted(members.tolist()) == list(range(len(lengths)))
        sizes = [int(lengths[members[a:b]].sum()) for a, b in itertools.pairwise(starts)]
        assert all(0 < s <= row_len for s in sizes)
        assert (
            len(sizes) <= 11 / 9 * -(-int(lengths.sum()) // row_len) + 4 or len(sizes) <= 2 * sum(sizes) / row_len + 1
        )
    members, starts = best_fit(np.array([3, 7, 5, 2, 3]), 10)
    assert [sorted(members[a:b].tolist()) for a, b in itertools.pairwise(starts)] == [[0, 1], [2, 3, 4]]


def all_rows(rows: ChatRows) -> tuple[Any, list[Any]]:
    source = np.concatenate([np.full(n, s) for s, n in enumerate(rows.n_rows)])
    row = np.concatenate([np.arange(n) for n in rows.n_rows])
    return rows.rows(source, row)


def test_rows_hold_every_label_once_at_positions_of_their_own(tmp_path: Path) -> None:
    """B7, B32, B33: over all packs every conversation is there once, from position 0, and predicts only itself."""
    (chats,) = prepare(config(tmp_path, words(40))).train
    made, tokens = all_rows(ChatRows([chats], row_len=128, pad_id=BYTES.pad_id))
    found = []
    for b in range(len(made.ids_BT)):
        for d in range(int(made.docs_BT[b].max()) + 1):
            here = made.docs_BT[b] == d
            assert made.positions_BT[b][here].tolist() == list(range(int(here.sum())))
            found.append((made.ids_BT[b][here].tolist(), made.labels_BT[b][here].tolist()))
    expected = []
    for i in range(len(chats)):
        here = slice(chats.starts[i], chats.starts[i + 1])
        ids, trained = chats.tokens[here], chats.trained[here]
        expected.append((ids[:-1].tolist(), np.where(trained[1:], ids[1:], IGNORE).tolist()))
    assert sorted(found) == sorted(expected)
    padding = made.docs_BT < 0
    assert (made.labels_BT[padding] == IGNORE).all() and (made.ids_BT[padding] == BYTES.pad_id).all()
    assert sum(map(len, tokens)) == len(chats.tokens)


def network(**changes: Any) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "max_seq_len": 128, "vocab_size": 320}
    shape = GPTConfig(**{**sizes, **changes})
    model = GPT(shape).double()
    init_weights(model, 0)
    return model.eval()


GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "gelu_tanh",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "n_kv_heads": None,
    "d_ff": 128,
    "tie_embeddings": True,
}


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}, GPT2], ids=["rope", "window", "gpt2"])
def test_packed_is_unpacked(tmp_path: Path, changes: dict[str, Any]) -> None:
    """B31, B32: the loss of packs is that of each conversation alone, to rounding in fp64, and so are its gradients."""
    (chats,) = prepare(config(tmp_path, words(12))).train
    model, sums, grads = network(**changes), [], []
    for packing in (True, False):
        rows = ChatRows([chats], row_len=128, pad_id=BYTES.pad_id, packing=packing)
        n = rows.n_rows[0]
        assert n == len(chats) if not packing else n < len(chats)
        model.zero_grad()
        total = 0.0
        for first in range(0, n, 2):
            numbers = np.arange(first, min(first + 2, n))
            batch, _ = rows.batch(numbers, np.zeros_like(numbers), numbers)
            out = token_loss(0.0, 256)(model, batch)
            out.total.backward()
            total += out.total.item()
        sums.append(total)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert abs(sums[0] - sums[1]) < 1e-10 * abs(sums[0])
    assert torch.allclose(grads[0], grads[1], rtol=0, atol=1e-10)


def test_a_conversation_does_not_see_its_neighbour(tmp_path: Path) -> None:
    """B31: other words in the first conversation of a pack leave the hidden states of the second as they are, bitwise."""
    (chats,) = prepare(config(tmp_path, [row("aaaa", "bbbbb"), row("c", "d")])).train
    rows, model, seen = ChatRows([chats], row_len=128, pad_id=0), network(), []
    for token in (70, 71):
        changed = chats.tokens.copy()
        changed[3:6] = token
        rows._sources = [Chats(**{**vars(chats), "tokens": changed})]
        batch, _ = rows.batch(np.array([0]), np.array([0]), np.array([0]))
        assert not batch.one_document
        hidden = model(batch.ids_BT, batch.positions_BT, document_mask(batch.docs_BT))
        seen.append(hidden[batch.docs_BT == 1])
        first = hidden[batch.docs_BT == 0]
    assert torch.equal(*seen) and len(seen[0]) and len(first)


def test_padding_rows_are_nothing(tmp_path: Path) -> None:
    """Evaluation pads the last batch: the padding has no label, no token and no share of the denominator."""
    (chats,) = prepare(config(tmp_path, words(3))).train
    rows = ChatRows([chats], row_len=128, pad_id=0, packing=False)
    batch, tokens = rows.batch(np.arange(4), np.array([0, 0, 0, PADDING]), np.array([0, 1, 2, 0]))
    assert (batch.labels_BT[3] == IGNORE).all() and (batch.docs_BT[3] == -1).all() and not len(tokens[3])
    assert batch.denominator == chats.trained.sum() and batch.one_document


def test_the_order_is_the_loaders(tmp_path: Path) -> None:
    """Packs are a function of the data alone: with another number of ranks the same rows come in the same order."""
    (chats,) = prepare(config(tmp_path, words(60)), row_len=64).train
    whole = [
        RowLoader(ChatRows([chats], row_len=64, pad_id=0), rows_per_step=4, seed=1, prefetch=0).step(k)
        for k in range(3)
    ]
    parts = [
        [
            RowLoader(
                ChatRows([chats], row_len=64, pad_id=0), rows_per_step=4, seed=1, rank=r, world=2, prefetch=0
            ).step(k)[0]
            for r in range(2)
        ]
        for k in range(3)
    ]
    for one, two in zip(whole, parts, strict=True):
        width = max(p.ids_BT.shape[1] for p in two)
        ids = torch.cat([torch.nn.functional.pad(p.ids_BT, (0, width - p.ids_BT.shape[1])) for p in two])
        assert torch.equal(one[0].ids_BT, ids)


# --- what is learnt, cut and left out --------------------------------------------------------------------------------


def test_labels_are_the_answers_and_their_ends(tmp_path: Path) -> None:
    """B27, B29: the end of turn is a label; what follows the last one is not even an input."""
    (chats,) = prepare(config(tmp_path, [row("ab", "cd", "ef", "gh")])).train
    assert BYTES.decode(chats.tokens[chats.trained], skip_special=False) == "cd<|im_end|>gh<|im_end|>"
    assert chats.tokens[-1] == BYTES.end_of_turn_id
    (chats,) = prepare(config(tmp_path), train_on="last").train
    assert BYTES.decode(chats.tokens[chats.trained], skip_special=False) == "gh<|im_end|>"
    (chats,) = prepare(config(tmp_path), train_on="all").train
    assert chats.trained[1:].all() and not chats.trained[0]


def test_control_tokens_in_the_data_stay_text(tmp_path: Path) -> None:
    """B50."""
    (chats,) = prepare(config(tmp_path, [row("<|im_end|>", "<|im_end|>x")])).train
    assert (chats.tokens == BYTES.end_of_turn_id).sum() == 2 and chats.trained.sum() == len("<|im_end|>x") + 1


def test_long_ones_are_cut_from_the_right_and_counted(tmp_path: Path) -> None:
    """B34: what is left of a cut answer is learnt; where nothing is left, the row is left out, never trained on."""
    rows = [row("ab", "y" * 200), row("q" * 200, "z"), *[row("a", "b")] * 198]
    (chats,) = prepare(config(tmp_path, rows), row_len=64).train
    assert chats.n_cut == 2 and chats.n_dropped == 1 and len(chats) == 199
    assert chats.lengths.max() == 65 and (np.add.reduceat(chats.trained.astype(int), chats.starts[:-1]) > 0).all()


def test_too_many_that_are_useless_stop_the_run_with_an_example(tmp_path: Path) -> None:
    """B34, B8: above data.max_dropped_frac."""
    rows = [*[row("a", "b")] * 48, row("q" * 200, "z"), row("a", " ")]
    with pytest.raises(UserError) as error:
        prepare(config(tmp_path, rows), row_len=64)
    assert "from 2 of 50 conversations (4.0 %) nothing can be learnt" in str(error.value)
    assert "chat.jsonl:49: none of the answer's tokens is among the first 65 of 2" in str(error.value)
    (chats,) = prepare(config(tmp_path, max_dropped_frac=0.04), row_len=64).train
    assert chats.n_dropped == 2 and len(chats) == 48
    with pytest.raises(UserError, match=r"chat\.jsonl:1: no turn of the assistant"):
        prepare(config(tmp_path, [row("a")]))


FORGETS = """{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}
{%- if m['role'] == 'assistant' and not loop.last -%}{{- m['content'].split('</think>')[-1] -}}
{%- else -%}{{- m['content'] -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_turns_of_a_forgetful_template_are_rows_of_their_own(tmp_path: Path) -> None:
    """B30; both rows of a conversation fall on the same side of a split (B44)."""
    rows = [row(f"a{i}", "<think>x</think>b", "c", "d") for i in range(20)]
    data = prepare(config(tmp_path, rows, valid_frac=0.3), tokenizer=with_template(FORGETS))
    (train,), (valid,) = data.train, data.valid
    assert train.n_split == 20 and len(train) + len(valid) == 40 and len(train) % 2 == 0 and len(valid)
    keys = {BYTES.decode(c.tokens[c.starts[i] : c.starts[i + 1]])[:8] for c in (train,) for i in range(len(c))}
    assert not keys & {BYTES.decode(valid.tokens[a : a + 12])[:8] for a in valid.starts[:-1]}


def test_plain_text_without_a_template(tmp_path: Path) -> None:
    rows = [{"prompt": "Q: a\nA:", "completion": " b"}]
    (chats,) = prepare(config(tmp_path, rows, chat=False)).train
    assert chats.tokens.tolist() == [BYTES.bos_id, *BYTES.encode("Q: a\nA: b"), BYTES.eos_id]  # B26: one bos
    assert BYTES.decode(chats.tokens[chats.trained], skip_special=False) == " b<|eos|>"


# --- wrong use -------------------------------------------------------------------------------------------------------


def test_a_template_without_an_end_of_turn_is_refused(tmp_path: Path) -> None:
    """Users 10: a model that never learns to stop."""
    plain = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}assistant: {% endif -%}"  # noqa: E501
    with pytest.raises(UserError, match="own: it writes no end of turn"):
        prepare(config(tmp_path, [row("a", "b")]), tokenizer=with_template(plain))


def test_a_template_that_marks_nothing_is_refused(tmp_path: Path) -> None:
    """B29: an assistant mask that is all zeros."""
    tags = CHATML.replace("{%- endgeneration -%}", "").replace(
        "{%- generation -%}", "{%- generation -%}{%- endgeneration -%}"
    )
    with pytest.raises(UserError, match=r"chat\.jsonl:1: own: nothing of what the assistant wrote"):
        prepare(config(tmp_path, [row("a", "b")]), tokenizer=with_template(tags))


def test_pad_that_is_the_end_is_refused_and_can_be_mended(tmp_path: Path) -> None:
    """B27; the sentence names what mends it, and that does."""
    names = {**BYTES.names, "pad_token": "<|eos|>", "bos_token": None}
    same = with_template(CHATML.replace("{{- bos_token -}}", "").replace("<|im_end|>", "<|eos|>"), names)
    with pytest.raises(UserError, match="the padding token is also the token that ends an answer"):
        prepare(config(tmp_path, [row("a", "b")]), tokenizer=same)
    with pytest.raises(UserError, match="the padding token is also the token that ends an answer"):
        prepare(config(tmp_path, [{"prompt": "a", "completion": "b"}], chat=False), tokenizer=same)
    spec = {**BYTES._spec, "added_tokens": [t for t in BYTES._spec["added_tokens"] if "pad" not in t["content"]]}
    bare = Tokenizer(spec, names, None)
    bare.save(tmp_path / "bare")
    assert Tokenizer.load(tmp_path / "bare").pad_id == BYTES.eos_id
    mended = Tokenizer.load(tmp_path / "bare", "chatml", add=["<|padding|>"])
    assert mended.pad_id != mended.eos_id and mended.token_bytes(mended.pad_id) == b"<|padding|>"
    prepare(config(tmp_path, chat=False), tokenizer=mended)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_what_the_ids_depend_on_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B43: anything that changes the ids makes new ones; nothing else does."""
    made: list[int] = []
    run = dialogues.DialogueJob.run
    monkeypatch.setattr(dialogues.DialogueJob, "run", lambda job, *a: (made.append(job.number), run(job, *a)))
    cfg = config(tmp_path, words(5))
    first = prepare(cfg).fingerprint
    assert prepare(cfg).fingerprint == first and len(made) == 1
    prepare(cfg.model_copy(update={"packing": False, "workers": 1}))
    assert len(made) == 1
    prepare(cfg, row_len=64)
    prepare(cfg, train_on="all")
    prepare(cfg.model_copy(update={"system": "Be brief."}))
    prepare(cfg, tokenizer=with_template(CHATML + "{#- other -#}"))
    prepare(config(tmp_path, words(5, seed=1)))
    assert len(made) == 6


def test_processes_give_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are encoded by several processes; a stop leaves what is done, and an error there is told with its row."""
    monkeypatch.setattr(dialogues, "_IN_PROCESS", 0)
    monkeypatch.setattr(sources, "UNIT_MIN", 4000)
    cfg = config(tmp_path, words(120))
    (tmp_path / "one").mkdir()
    one = prepare(cfg.model_copy(update={"workers": 1, "cache_dir": str(tmp_path / "one")}))
    assert prepare(cfg.model_copy(update={"workers": 3})).fingerprint == one.fingerprint
    assert len(list((tmp_path / "cache").glob("*.dialogues/*.dialogues"))) > 1
    broken = config(tmp_path, [*words(120), {"messages": [{"role": "user", "content": 3}]}], workers=3)
    with pytest.raises(UserError, match=r"chat\.jsonl:121: messages: message 0 \(user\): content must be text"):
        prepare(broken)


def test_a_stop_is_heard_while_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "_BATCH", 10)
    asked: list[None] = []
    cfg = config(tmp_path, words(60))
    with pytest.raises(Interrupted):
        prepare(cfg, should_stop=lambda: asked.append(None) or len(asked) > 3)
    assert len(prepare(cfg).train[0]) == 60


def test_several_sources_are_kept_apart(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", words(6)), write(tmp_path / "b.jsonl", [{"instruction": "x", "output": "y"}])
    said: list[str] = []
    cfg = DataConfig.model_validate(
        {"train": ({"path": a}, {"path": b}), "valid": ({"path": b},), "cache_dir": str(tmp_path / "cache")}
    )
    data = prepare(cfg, say=said.append)
    assert [s.name for s in data.train] == [a, b] and len(data.valid[0]) == 1
    assert any("layout alpaca" in s for s in said)
    with pytest.raises(UserError, match="no conversation in it"):
        prepare(config(tmp_path, []))
