"""The packed network: the same scores as the model's own, in every shape, and where it is used."""

from __future__ import annotations

import pytest
import torch
from tiny import TOKENIZER, V, build, prompts_of, run

from llmkit.inference import packed as packed_module
from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Request
from llmkit.inference.packed import WORTH_TOKENS, Packed, network_of
from llmkit.model.config import LoraConfig
from llmkit.model.gpt import GPT, KVCache
from llmkit.model.lora import Base, apply_lora
from llmkit.products import PackedMatrix, can_pack

GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    "n_kv_heads": 4,
}  # fmt: skip
YARN = {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 24}}
EXPERTS = {"experts": {"n": 4, "n_active": 2, "d_ff": 16, "dense_layers": [0]}, "qk_norm": True}
SHAPES = [
    {}, {"n_kv_heads": 4}, {"n_kv_heads": 1, "tie_embeddings": False}, {"qk_norm": True}, {"qkv_bias": True}, YARN, GPT2,
    {"sliding_window": 5}, {"sliding_window": 5, "n_full_layers": 1, "qkv_bias": True}, EXPERTS,
]  # fmt: skip


def scores(network, model: GPT, ids_BT: torch.Tensor, chunks: tuple[int, ...], starts: list[int]) -> torch.Tensor:
    """Log-probabilities after every token from column 8 on, read in chunks; row b begins in column starts[b]."""
    B, T = ids_BT.shape
    dtype = model.head_weight.dtype
    cache, found, at = KVCache(model.config, B, T, dtype), [], 0
    begin_B1 = torch.tensor(starts)[:, None]
    columns_T = torch.arange(T)
    with torch.inference_mode():
        for n in chunks:
            seen = (columns_T[: at + n] >= begin_B1)[:, None]
            own_n1 = columns_T[at : at + n, None]
            mask = ((seen & (columns_T[: at + n] <= own_n1)) | (columns_T[: at + n] == own_n1))[:, None]
            positions = (columns_T[at : at + n] - begin_B1).clamp(min=0)
            part = ids_BT[:, at : at + n]
            hidden = network.forward(part, positions, mask if any(starts) else None, cache)
            found.append(network.logits(hidden))
            at += n
    return torch.cat(found, 1)[:, 8:, :V].float().log_softmax(-1)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 3, 7]])
def test_scores_are_the_models(options, starts):
    """Longer than a piece of the cache; chunks of one and of several tokens, also behind a filled cache."""
    model = build(std=0.15, max_seq_len=96, **options)
    ids_BT = torch.tensor(prompts_of(80, 80, 80))
    chunks = (8, *[1] * 20, 5, 3, *[1] * 44)
    ours, expected = (scores(n, model, ids_BT, chunks, starts) for n in (Packed(model), model))
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "n_kv_heads": 4}, GPT2, {"sliding_window": 5}])
def test_bf16_is_as_near_to_fp64_as_the_model(options):
    """Attention then looks at the cache's empty columns too, which must not count."""
    model = build(std=0.15, max_seq_len=96, **options).bfloat16()
    truth = build(std=0.15, max_seq_len=96, **options).bfloat16().double()
    ids_BT, chunks = torch.tensor(prompts_of(80, 80, 80)), (8, *[1] * 72)
    exact = scores(truth, truth, ids_BT, chunks, [0, 3, 7])
    ours, theirs = (scores(n, model, ids_BT, chunks, [0, 3, 7]) - exact for n in (Packed(model), model))
    assert ours.square().mean() < 1.3 * theirs.square().mean()


def test_a_matrix_with_an_adapter_is_computed_by_its_module():
    model = build(std=0.15)
    apply_lora(model, LoraConfig(r=4, targets=("q_proj", "down_proj")), 0, Base("base", "hash"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    ids_BT, chunks = torch.tensor(prompts_of(30, 30)), (10, *[1] * 20)
    network = network_of(model, WORTH_TOKENS, 2)
    ours, expected = (scores(n, model, ids_BT, chunks, [0, 0]) for n in (network, model))
    assert isinstance(network, Packed) and (ours - expected).abs().max() < 1e-5


def test_it_is_used_where_it_pays_and_fits(monkeypatch):
    model = build()
    assert isinstance(network_of(model, WORTH_TOKENS, 2), Packed) and network_of(model, WORTH_TOKENS - 1, 2) is model
    assert network_of(model.double(), 1000, 2) is model
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network_of(model, 1000, 2) is model
    with monkeypatch.context() as patched:
        patched.setattr(packed_module, "_memory", lambda: 8 * sum(p.nbytes for p in model.parameters()) - 1)
        assert network_of(model, 1000, 2) is model


def test_generation_uses_it_and_writes_the_same(monkeypatch):
    model, prompts = build(), prompts_of(5, 20, 9)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=30)
    uses = []
    monkeypatch.setattr(Packed, "forward", lambda self, *a, f=Packed.forward: (uses.append(1), f(self, *a))[1])
    fast = run(model, prompts, sampling)
    assert len(uses) == 30
    plain = run(model, prompts, sampling, network=model)
    assert len(uses) == 30 and [g.ids for g in fast] == [g.ids for g in plain]
    for a, b in zip(fast, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)
    beams = sampling.model_copy(update={"beams": 3})
    assert [g.ids for g in run(model, prompts, beams)] == [g.ids for g in run(model, prompts, beams, network=model)]


def test_the_engine_sees_other_weights_once_it_is_told():
    model, (prompt,) = build(), prompts_of(9)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)

    def written(engine: Engine) -> list[int | None]:
        engine.submit(Request(prompt, sampling, 0))
        events = []
        while engine.busy:
            events += engine.step()
        return [event.token for event in events]

    engine = Engine(model, TOKENIZER, EngineConfig(max_rows=2))
    before = written(engine)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    engine.forget_prefixes()
    after = written(engine)
    assert after != before and after == run(model, [prompt], sampling)[0].ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_is_the_matrix(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, bias, x, more = (
        torch.randn(size, generator=generator).to(dtype) for size in ((48, 40), (48,), (7, 40), (7, 48))
    )
    assert can_pack(weight) and not can_pack(weight.double()) and not can_pack(weight.to("meta"))
    exact = x.double() @ weight.double().t() + bias.double()
    matrix, near = PackedMatrix(weight, bias), {"rtol": 1e-5 if dtype == torch.float32 else 8e-3, "atol": 1e-5}
    torch.testing.assert_close(matrix(x).double(), exact, **near)
    torch.testing.assert_close(matrix.plus(x, more).double(), exact + more.double(), **near)
    torch.testing.assert_close(PackedMatrix(weight, n_rows=1)(x).double(), exact - bias.double(), **near)
    torch.testing.assert_close(PackedMatrix(weight)(x[:1]).double(), (exact - bias.double())[:1], **near)
