"""The network: initial weights, RoPE, attention, document masks, KV cache, activation checkpointing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from llmkit.config import UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig, Llama3Scaling
from llmkit.model.gpt import GPT, KVCache, attend, document_mask, init_weights
from llmkit.model.rope import rope_tables, rotate
from llmkit.tokenizer import Tokenizer, TokenizerConfig


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    "n_kv_heads": 4,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
SOME_WINDOWS = {"sliding_window": 5, "n_full_layers": 1, "qkv_bias": True}


def build(seed: int = 0, std: float | None = None, activation_checkpointing: bool = False, **shape) -> GPT:
    """A tiny model in evaluation mode; `std` replaces every weight by wider noise: attention is then far from flat."""
    sizes = {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": 32,
        "d_ff": 48,
        "max_seq_len": 64,
        "vocab_size": 50,
    }
    model = GPT(GPTConfig(**{**sizes, **shape}), activation_checkpointing)
    init_weights(model, seed)
    if std is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.empty_like(p).normal_(0.0, std, generator=generator)
                p.copy_(1.0 + 0.1 * noise if name.endswith("norm.weight") else noise)
    return model.eval()


def random_ids(*shape: int, seed: int = 0, high: int = 50) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# --- initial weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "qk_norm": True}, {"qkv_bias": True}, GPT2])
def test_init_follows_its_table(options):
    """B19: every parameter is hit, none left as it was."""
    n_layers = 3
    model = build(seed=1, n_layers=n_layers, d_model=128, d_ff=256, vocab_size=512, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))  # what init leaves out stays visible
    init_weights(model, 1)
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith(".bias"):
            assert (p == 0).all(), name
        else:
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(2 * n_layers) if writes_residual else 0.02
            # A sample's std has a relative error of 1 / sqrt(2n): 5 sigma.
            assert p.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


def test_init_is_the_same_in_every_precision_and_differs_by_seed_and_tensor():
    full, half, other = build(seed=3), GPT(build().config).to(torch.bfloat16), build(seed=4)
    init_weights(half, 3)
    state = torch.random.get_rng_state()
    init_weights(other, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, a), b, c in zip(full.named_parameters(), half.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name
        assert name.endswith("norm.weight") or not torch.equal(a, c), name
    layers = full.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)


# --- RoPE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(factor=8.0, original_max_seq_len=4096)])
def test_rope_is_exact_far_out_after_a_cast_to_bf16(scaling):
    model = build(rope_theta=500000.0, rope_scaling=scaling, max_seq_len=32768).to(torch.bfloat16)
    E = model.config.width_of_head
    positions = torch.tensor([[0, 1, 4095, 32767]])
    cos, sin = rope_tables(model.config, positions)
    assert cos.dtype == sin.dtype == torch.float32
    # The frequencies are those of Hugging Face, rounded to fp32; the angle must carry no further error than its own
    # rounding, which at 32767 radians is 32767 * 2^-24 = 2e-3 at worst for the first pair, whose frequency is 1: exact.
    for i in range(E // 2):
        freq = 500000.0 ** (-2 * i / E)
        if scaling is not None:
            turns = 4096 * freq / (2 * math.pi)
            smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
            freq = (1 - smooth) * freq / 8.0 + smooth * freq
        for t, position in enumerate(positions[0].tolist()):
            tolerance = 1e-5 + 4e-7 * position * freq * (i > 0)
            assert cos[0, 0, t, i].item() == pytest.approx(math.cos(position * freq), abs=tolerance)
            assert sin[0, 0, t, i + E // 2].item() == pytest.approx(math.sin(position * freq), abs=tolerance)


def test_rope_depends_on_distance_only_and_keeps_length():
    config = build().config
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        at = [tuple(t.double() for t in rope_tables(config, torch.tensor([[p]]))) for p in (i, j)]
        assert rotate(q, *at[0]).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum().item()

    assert score(3, 1) == pytest.approx(score(43, 41), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-3)


def test_two_thetas_live_in_one_process():
    """B61."""
    ids = random_ids(1, 40)
    a, b = build(std=0.3, rope_theta=10000.0), build(std=0.3, rope_theta=1e6)
    alone = [m(ids) for m in (a, b)]
    again = [m(ids) for m in (a, b, a, b)]
    assert all(torch.equal(alone[i % 2], out) for i, out in enumerate(again))
    assert (alone[0] - alone[1]).abs().max() > 1e-2


# --- attention ------------------------------------------------------------------------------------------------------


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Loops over heads and queries in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = allowed[b, t].nonzero()[:, 0]
                weights = torch.softmax(k[b, h, seen] @ q[b, h, t] / math.sqrt(q.shape[-1]), -1)
                out[b, h, t] = weights @ v[b, h, seen]
    return out


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_attention_against_loops(kind, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    B, H, T, E = 2, 3, 9, 8
    q, k, v = (torch.randn(B, H, T, E, generator=generator).to(dtype) for _ in range(3))
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    random_mask = (torch.rand(B, 1, T, T, generator=generator) < 0.5) | torch.eye(T, dtype=torch.bool)
    mask = random_mask & lower if kind == "mask" else None
    allowed = {"causal": lower.expand(B, T, T), "all": torch.ones(B, T, T, dtype=torch.bool)}.get(kind)
    expected = explicit_attention(q, k, v, mask[:, 0] if mask is not None else allowed)
    out = attend(q, k, v, mask, causal=kind != "all", dropout=0.0)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < tolerance


def test_grouped_heads_share_keys_in_order():
    grouped, full = build(std=0.3), build(std=0.3, n_kv_heads=4)
    E = grouped.config.width_of_head
    for a, b in zip(grouped.model.layers, full.model.layers, strict=True):
        with torch.no_grad():
            for name in ("k_proj", "v_proj"):
                narrow = getattr(a.self_attn, name).weight.view(2, E, -1)
                getattr(b.self_attn, name).weight.copy_(narrow.repeat_interleave(2, dim=0).reshape(4 * E, -1))
            b.load_state_dict(
                {n: p for n, p in a.state_dict().items() if "k_proj" not in n and "v_proj" not in n}, strict=False
            )
    full.model.embed_tokens.load_state_dict(grouped.model.embed_tokens.state_dict())
    full.model.norm.load_state_dict(grouped.model.norm.state_dict())
    ids = random_ids(2, 12)
    torch.testing.assert_close(grouped(ids), full(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, WINDOW, SOME_WINDOWS, GPT2])
def test_later_tokens_do_not_change_earlier_states(options):
    model, ids = build(std=0.3, **options), random_ids(1, 30)
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 50
    assert torch.equal(model(ids)[:, :20], model(changed)[:, :20])


def test_without_causality_all_tokens_see_all():
    model, ids = build(std=0.3, causal=False), random_ids(1, 30)
    before = model(ids)
    for place in (0, 15, 29):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 50
        assert ((model(changed) - before).abs().amax(-1) > 1e-5).all()
    with pytest.raises(UserError, match=r"causal: false .* cannot generate"):
        model(ids, cache=KVCache(model.config, 1, 30, torch.float32))


@pytest.mark.parametrize("window,layers,reach", [(5, 1, 4), (5, 2, 8), (1, 3, 0), (29, 1, 28)])
def test_a_window_ends_where_it_should(window, layers, reach):
    """B56: a token sees itself and window - 1 before it, so after n blocks n (window - 1) before it reach it."""
    model, ids = build(std=0.3, n_layers=layers, sliding_window=window), random_ids(1, 40)
    before, at = model(ids), 10
    ids[0, at] = (ids[0, at] + 1) % 50
    moved = ((model(ids) - before)[0].abs().amax(-1) > 0).nonzero()[:, 0]
    assert moved.tolist() == list(range(at, min(at + reach, 39) + 1))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 24}, {"sliding_window": 100}, {"causal": False}, GPT2])
def test_no_mask_is_built_where_none_is_needed(options, monkeypatch):
    model, ids = build(std=0.3, **options), random_ids(2, 24)
    seen: list[tuple[bool, bool]] = []

    def watched(q, k, v, mask, causal, dropout):
        seen.append((mask is None, causal))
        return attend(q, k, v, mask, causal, dropout)

    monkeypatch.setattr("llmkit.model.gpt.attend", watched)
    model(ids)
    assert set(seen) == {(True, model.config.causal)}


def test_a_step_with_the_cache_reads_the_window_alone(monkeypatch):
    model, ids, widths = build(std=0.3, **SOME_WINDOWS), random_ids(2, 20), []

    def watched(q, k, v, mask, causal, dropout):
        widths.append((k.shape[2], mask))
        return attend(q, k, v, mask, causal, dropout)

    cache = KVCache(model.config, 2, 20, torch.float32)
    model(ids[:, :19], cache=cache)
    monkeypatch.setattr("llmkit.model.gpt.attend", watched)
    model(ids[:, 19:], cache=cache)
    assert widths == [(20, None), (5, None)]


def test_learned_positions_end():
    model, ids = build(std=0.3, **GPT2, max_seq_len=16), random_ids(1, 17)
    assert torch.isfinite(model(ids[:, :16])).all()
    for call in (
        lambda: model(ids),
        lambda: model(ids[:, :1], positions_BT=torch.tensor([[16]])),
        lambda: model(ids, cache=KVCache(model.config, 1, 20, torch.float32)),
    ):
        with pytest.raises(UserError, match=r"position 16 has no embedding: .* max_seq_len 16"):
            call()


# --- documents in one row -------------------------------------------------------------------------------------------


def packed(lengths: list[int], T: int) -> tuple[Tensor, Tensor]:
    docs = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((T - sum(lengths),), -1)])
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.arange(T - sum(lengths))])
    return docs[None].int(), positions[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "T", [48, 640]
)  # 640 is beyond the plain product: PyTorch's fused attention in both precisions
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("options", [{}, WINDOW, {"causal": False}, GPT2])
def test_a_document_leaves_the_others_bitwise_alone(dtype, T, changed, options):
    """B31, B32."""
    model = build(std=0.3, max_seq_len=1024, **options).to(dtype)
    split = T // 3
    docs, positions = packed([split, T - split - 5], T)
    ids = random_ids(1, T)
    other = torch.where(docs == changed, (ids + 7) % 50, ids)
    mask = document_mask(docs, model.config.causal)
    a, b = (model.logits(model(x, positions, mask)) for x in (ids, other))
    same = docs[0] != changed
    assert torch.equal(a[0, same], b[0, same])
    assert not torch.equal(a[0, ~same], b[0, ~same])
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("options", [{}, WINDOW, SOME_WINDOWS, {"causal": False}, GPT2])
def test_a_packed_row_equals_its_documents_alone(options):
    model, lengths, T = build(std=0.3, **options), [7, 20, 1, 30], 64
    docs, positions = packed(lengths, T)
    ids = random_ids(1, T)
    together = model(ids, positions, document_mask(docs, model.config.causal))
    start = 0
    for n in lengths:
        alone = model(ids[:, start : start + n])
        torch.testing.assert_close(together[:, start : start + n], alone, rtol=0, atol=1e-5)
        start += n


# --- KV cache -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    options=st.sampled_from([{}, WINDOW, {"sliding_window": 1}, {"sliding_window": 20}, SOME_WINDOWS, GPT2]),
)
def test_cached_equals_uncached_over_any_chunks_up_to_exactly_full(chunks, batch, options):
    """B56."""
    model, T = build(std=0.3, **options), sum(chunks)
    ids = random_ids(batch, T, seed=T)
    whole = model(ids)
    cache = KVCache(model.config, batch, T, torch.float32)
    parts, start = [], 0
    for n in chunks:
        parts.append(model(ids[:, start : start + n], cache=cache))
        start += n
        assert cache.length == start
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"holds {T} positions, {T} are filled: 1 more"):
        model(ids[:, :1], cache=cache)


def test_cache_refuses_a_chunk_that_overruns_it_and_stays_usable():
    model, ids = build(std=0.3), random_ids(1, 8)
    cache = KVCache(model.config, 1, 8, torch.float32)
    model(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="4 more do not fit"):
        model(ids[:, :4], cache=cache)
    torch.testing.assert_close(model(ids[:, 5:], cache=cache), model(ids)[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [[3, 1], [0, 3], [0, 1], [1, 0], [2, 3, 1], [2]])
def test_cache_select_keeps_rows_in_order(kept):
    model, ids = build(std=0.3), random_ids(4, 10)
    cache = KVCache(model.config, 4, 10, torch.float32)
    model(ids[:, :9], cache=cache)
    rows = torch.tensor(kept)
    cache.select(rows)
    torch.testing.assert_close(model(ids[rows, 9:], cache=cache), model(ids)[rows, 9:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [WINDOW, SOME_WINDOWS, GPT2, {"sliding_window": 1}])
def test_a_ragged_batch_generates_what_its_prompts_do_alone(options):
    """B54, B56: left padding, windows and learned positions together; alone without a cache, as in training."""
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    model = build(std=0.3, **options, vocab_size=320, max_seq_len=48)
    prompts = [random_ids(n, seed=n, high=250).add(5).tolist() for n in (1, 9, 30, 17)]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
    rows = generate(model, prompts, sampling, tokenizer=tokenizer)
    assert all(len(row.ids) == 12 or row.finish_reason == "stop" for row in rows)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt + row.ids])
        logits = model.logits(model(ids))[0, len(prompt) - 1 : -1, : tokenizer.vocab_size]
        assert logits.argmax(-1).tolist() == row.ids
        expected = logits.log_softmax(-1).max(-1).values
        assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


# --- training mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SOME_WINDOWS, GPT2])
def test_activation_checkpointing_gives_the_same_gradients_under_dropout(options):
    ids = random_ids(2, 16)
    grads = []
    for on in (False, True):
        model = build(std=0.3, dropout=0.1, activation_checkpointing=on, **options).train()
        torch.manual_seed(5)
        model.logits(model(ids)).logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_acts_in_training_only(dtype):
    model, ids = build(std=0.3, dropout=0.5).to(dtype), random_ids(1, 16)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_tied_head_is_one_tensor_with_both_gradients():
    model = build(std=0.3)
    assert model.head_weight is model.model.embed_tokens.weight
    assert not any("lm_head" in n for n in model.state_dict())
    untied = build(std=0.3, tie_embeddings=False)
    assert untied.head_weight is untied.lm_head.weight
    model.logits(model(random_ids(1, 4, high=10))).logsumexp(-1).sum().backward()
    assert (model.head_weight.grad[10:].abs().sum(-1) > 0).all()  # rows that were never read, only scored
