"""Vectors of texts and words: transformers' hidden states, naive references, and analogies that a model has learnt."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ROWS, TOKENIZER, V, build, prompts_of

from llmkit.config import UserError
from llmkit.inference.embed import (
    Words,
    batches_of,
    context_vectors,
    encode_rows,
    hidden_states,
    layer_of,
    nearest,
    text_vectors,
    token_vectors,
)
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.hf import config_to_hf
from llmkit.tokenizer import Tokenizer, TokenizerConfig

DEMO = Path(__file__).parents[2] / "data" / "demo"


@pytest.fixture(scope="module")
def model() -> GPT:
    return build()


# --- texts ----------------------------------------------------------------------------------------------------------


def test_every_layer_is_transformers_hidden_state(model: GPT) -> None:
    transformers = pytest.importorskip("transformers")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config_to_hf(model.config, torch.float32, ids, {}))
    )
    other.load_state_dict(model.state_dict(), strict=False)
    rows = prompts_of(9, 9)
    with torch.no_grad():
        theirs = other.eval()(torch.tensor(rows), output_hidden_states=True).hidden_states
        for layer, expected in enumerate(theirs):
            states, ids_BT, real_BT = hidden_states(model, rows, layer)
            torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
            assert ids_BT.tolist() == rows and bool(real_BT.all())
    assert len(theirs) == model.config.n_layers + 1
    assert [layer_of(model, i) for i in (None, -1, -3, 0, 2)] == [2, 2, 0, 0, 2]
    for wrong in (3, -4):
        with pytest.raises(UserError, match=r"0 \(embeddings\) to 2"):
            layer_of(model, wrong)
    assert not model.model.layers[1]._forward_pre_hooks


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layer", [None, 1])
def test_a_text_does_not_depend_on_the_others(pooling, causal, layer) -> None:
    """B54: ragged batches of any size equal single texts, also where tokens see what comes after them."""
    model = build(causal=causal, **({} if causal else {"n_kv_heads": 4}))
    rows = prompts_of(1, 30, 7, 44, 60, 2)
    rows[0] = [rows[0][0], 9]
    options = {"pooling": pooling, "layer": layer, "n_skip": 1}
    together = text_vectors(model, rows, **options)
    small = text_vectors(model, rows, batch_tokens=64, **options)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    for row, a, b in zip(rows, together, small, strict=True):
        alone = text_vectors(model, [row], **options)[0]
        torch.testing.assert_close(a, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(b, alone, rtol=0, atol=1e-5)
        with torch.no_grad():
            states = hidden_states(model, [row], layer_of(model, layer))[0][0]
        pooled = states[1:].mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(alone, F.normalize(pooled, dim=0), rtol=0, atol=1e-5)
    if not causal:
        changed = text_vectors(model, [[*rows[1][:-1], 8]], layer=None, pooling="mean")
        assert not torch.allclose(changed, text_vectors(model, [rows[1]], layer=None, pooling="mean"))


def test_batches_hold_every_row_once_within_the_budget() -> None:
    rng = random.Random(0)
    rows = [[0] * rng.randint(1, 90) for _ in range(200)]
    batches = list(batches_of(rows, 256))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(b) == 1 or len(b) * max(len(rows[i]) for i in b) <= 256 for b in batches)
    padding = sum(len(b) * max(len(rows[i]) for i in b) for b in batches) / sum(map(len, rows))
    assert padding < 1.15 and list(batches_of([], 256)) == []


def test_rows_are_framed_and_cut() -> None:
    rows, n_cut = encode_rows(TOKENIZER, ["abc", "x" * 50], 10)
    assert rows[0] == [TOKENIZER.bos_id, *TOKENIZER.encode("abc")] and len(rows[1]) == 10 and n_cut == 1
    with pytest.raises(UserError, match="text 2 is empty"):
        encode_rows(TOKENIZER, ["a", ""], 10)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_nearest_equals_brute_force(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(50, 8, generator=generator), dim=-1)
    queries = rows[[3, 40]]
    products, places = nearest(queries, iter(rows.split(9)), k)
    every = (queries @ rows.T).sort(descending=True, stable=True)
    assert places.tolist() == every.indices[:, :k].tolist() and places[:, 0].tolist() == [3, 40]
    torch.testing.assert_close(products, every.values[:, :k])
    assert nearest(queries, iter(()), 3)[1].shape == (2, 0)


# --- words ----------------------------------------------------------------------------------------------------------


def small_tokenizer() -> Tokenizer:
    text = "the king and the queen, a man and a woman. King Queen国王,王后,unhappy happy " * 40
    return Tokenizer.train([text], TokenizerConfig(vocab_size=340))


def test_analogies_by_their_definitions() -> None:
    """3CosAdd and 3CosMul over every token that is text, best token a word, query words left out: by numpy."""
    tokenizer = small_tokenizer()
    vectors = torch.randn(tokenizer.vocab_size, 6, generator=torch.Generator().manual_seed(1))
    words = Words(vectors, tokenizer)
    unit = F.normalize(vectors, dim=-1).double().numpy()
    of = {w: unit[tokenizer.encode(" " + w)[0]] for w in ("king", "queen", "man", "woman")}
    scores: dict[str, tuple[float, float]] = {}
    for i in range(tokenizer.vocab_size):
        try:
            name = tokenizer.token_bytes(i).decode().strip().casefold()
        except UnicodeDecodeError:
            continue
        if i in tokenizer.special_ids or not name or name in ("man", "woman", "king"):
            continue
        x, y, z = (float(unit[i] @ of[w]) for w in ("man", "woman", "king"))
        add, mul = y - x + z, (y + 1) / 2 * (z + 1) / 2 / ((x + 1) / 2 + 0.001)
        old = scores.get(name, (-math.inf, -math.inf))
        scores[name] = (max(add, old[0]), max(mul, old[1]))
    for which, method in enumerate(("add", "mul")):
        ranked = sorted(scores, key=lambda w: -scores[w][which])
        found = words.analogy("man", "woman", "king", 10, method)
        assert [f.word for f in found] == ranked[:10]
        assert [f.score for f in found] == pytest.approx([scores[w][which] for w in ranked[:10]], abs=1e-5)
        assert words.rank("man", "woman", "king", "Queen", method) == ranked.index("queen") + 1
    assert words.rank("man", "woman", "king", "woman") is None, "a query word is no answer"
    assert words.rank("man", "woman", "king", "nowhere") is None
    assert len(words.analogy("man", "woman", "king", 10**6)) == len(scores)
    assert set(words.names) == {*scores, "man", "woman", "king"}
    near = words.similar("king", 3)
    assert near == sorted(near, key=lambda f: -f.score) and "king" not in [f.word for f in near]
    centred = Words(vectors + 100.0, tokenizer, centre=True).analogy("man", "woman", "king", 10)
    again = Words(vectors, tokenizer, centre=True).analogy("man", "woman", "king", 10)
    assert [f.word for f in centred] == [f.word for f in again]


def test_a_word_is_looked_up_with_and_without_a_blank() -> None:
    tokenizer = small_tokenizer()
    vectors = torch.randn(tokenizer.vocab_size, 6, generator=torch.Generator().manual_seed(1))
    words = Words(vectors, tokenizer, extra=["unkingly", "king"])
    assert words.pieces("king") == tokenizer.encode(" king") and len(words.pieces("king")) == 1
    assert words.pieces("国王") == tokenizer.encode("国王")
    pieces = words.pieces("unkingly")
    assert len(pieces) > 1 and pieces in (tokenizer.encode("unkingly"), tokenizer.encode(" unkingly"))
    mean = F.normalize(vectors[pieces], dim=-1).mean(0)
    torch.testing.assert_close(words.vector("unkingly"), F.normalize(mean, dim=0))
    assert "unkingly" in words.names and words.rank("man", "woman", "king", "unkingly") is not None
    assert len(words.units_CD) == words.n_tokens + 1
    for word in (" ", ""):
        with pytest.raises(UserError, match="has no vector"):
            words.vector(word)
    seen = vectors.clone()
    seen[[*tokenizer.encode(" queen"), tokenizer.encode("queen")[0]]] = 0.0  # as of tokens that never occur
    with pytest.raises(UserError, match="has no vector"):
        Words(seen, tokenizer).vector("queen")


def test_vectors_of_tokens(model: GPT) -> None:
    untied = build(tie_embeddings=False)
    torch.testing.assert_close(token_vectors(untied, "input", V), untied.model.embed_tokens.weight[:V])
    torch.testing.assert_close(token_vectors(untied, "output", V), untied.lm_head.weight[:V])
    torch.testing.assert_close(token_vectors(model, "output", V), token_vectors(model, "input", V))
    with pytest.raises(UserError, match="do not belong together"):
        token_vectors(model, "input", ROWS + 1)
    rows = prompts_of(20, 3, 11)
    mean, counts = context_vectors(model, rows, V, layer=1, batch_tokens=24)
    assert counts.sum() == 34 and not mean[counts == 0].any()
    token = rows[0][4]
    with torch.no_grad():
        alone = [hidden_states(model, [row], 1)[0][0] for row in rows]
    places = [alone[r][t] for r, row in enumerate(rows) for t, i in enumerate(row) if i == token]
    torch.testing.assert_close(mean[token], torch.stack(places).mean(0), rtol=0, atol=1e-5)
    for window in (2, 5, 99):
        mean, _ = context_vectors(model, rows, V, layer=1, window=window)
        ahead = [
            alone[r][t : t + window].mean(0) for r, row in enumerate(rows) for t, i in enumerate(row) if i == token
        ]
        torch.testing.assert_close(mean[token], torch.stack(ahead).mean(0), rtol=0, atol=1e-5)


def test_planted_analogies_are_learnt() -> None:
    """A small model reads the English analogy documents of the demo world for some seconds: woman - man + king = queen.

    Over all tokens, the answer comes first for nearly every row; by chance one in 375 would. The rows of `opposite` are
    the hardest, since two of their families share clauses.
    """
    torch.manual_seed(0)
    docs = [json.loads(line) for line in (DEMO / "corpus.jsonl").read_text("utf-8").splitlines()]
    texts = [d["text"] for d in docs if d["kind"] == "analogy" and d["lang"] == "en"]
    asked = [json.loads(line) for line in (DEMO / "analogies.jsonl").read_text("utf-8").splitlines()]
    asked = [row for row in asked if row["lang"] == "en"]
    tokenizer = Tokenizer.train(texts, TokenizerConfig(vocab_size=600))
    rows, _ = encode_rows(tokenizer, texts, 96)
    shape = {"n_layers": 1, "n_heads": 4, "d_model": 64, "qk_norm": True, "max_seq_len": 96}
    model = GPT(GPTConfig(vocab_size=-(-tokenizer.vocab_size // 64) * 64, **shape))
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    n_steps = 160
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 20, (n_steps - s) / (0.4 * n_steps))
    )
    rng = np.random.default_rng(0)
    for _ in range(n_steps):
        batch = [rows[i] for i in rng.integers(len(rows), size=16)]
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
        labels = torch.tensor([[*row[1:], *[-100] * (width - len(row) + 1)] for row in batch])
        loss = F.cross_entropy(model.logits(model(ids)).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    words = Words(token_vectors(model, "input", tokenizer.vocab_size), tokenizer)
    assert len(words.names) > 350
    for method in ("add", "mul"):
        first = [r["axis"] for r in asked if words.rank(r["a"], r["b"], r["c"], r["d"], method) == 1]
        assert first.count("gender") >= 19 and first.count("age") >= 11 and len(first) >= 36, first
    assert words.analogy("man", "woman", "king", 1)[0].word == "queen"
