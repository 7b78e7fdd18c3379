"""State dicts are checkpoints: GPT-2's names and layouts on disk, Llama's in the module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.layouts import from_disk, to_disk
from llmkit.model.weights import checkpoint_shapes
from llmkit.training.config import EvalConfig, OptimConfig, RunConfig
from llmkit.training.engine import Engine
from llmkit.training.optim import decayed_names, hidden_matrices

GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip


def build(seed: int = 0, **options) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 48, "max_seq_len": 16, "vocab_size": 50}
    model = GPT(GPTConfig(**{**sizes, **GPT2, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    return model


def test_gpt2_on_disk():
    model = build(n_layers=12)
    state = model.state_dict()
    attention = model.model.layers[11].self_attn
    weight, bias = (state[f"transformer.h.11.attn.c_attn.{kind}"] for kind in ("weight", "bias"))
    for i, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        assert torch.equal(weight[:, 32 * i : 32 * (i + 1)], projection.weight.T)  # [in, out], q then k then v
        assert torch.equal(bias[32 * i : 32 * (i + 1)], projection.bias)
    assert torch.equal(state["transformer.h.2.mlp.c_fc.weight"], model.model.layers[2].mlp.up_proj.weight.T)
    assert torch.equal(state["transformer.wpe.weight"], model.model.embed_positions.weight)
    assert all(t.is_contiguous() for t in state.values())
    assert len(state) == 12 * 12 + 4 and sum(t.numel() for t in state.values()) == sum(
        p.numel() for p in model.parameters()
    )
    assert checkpoint_shapes(model) == {name: tuple(t.shape) for name, t in state.items()}


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}])
def test_load_takes_what_save_gave(options):
    model, other = build(**options), build(seed=1, **options)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # the hooks go along
        assert twin.state_dict().keys() == model.state_dict().keys()
    box = torch.nn.ModuleDict({"policy": build(seed=2, **options)})  # under a prefix, as in a container of two models
    box.load_state_dict({f"policy.{name}": t for name, t in model.state_dict().items()}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), box.parameters(), strict=True))
    assert {name.removeprefix("policy.") for name in box.state_dict()} == model.state_dict().keys()


def test_strict_stays_strict():
    model = build()
    state = model.state_dict()
    gone = {n: t for n, t in state.items() if n != "transformer.h.1.attn.c_attn.weight"}
    with pytest.raises(RuntimeError, match=r"Missing.*model\.layers\.1\.self_attn\.q_proj\.weight"):
        model.load_state_dict(gone)
    with pytest.raises(RuntimeError, match=r"Unexpected.*transformer\.h\.2\.ln_1\.weight"):
        model.load_state_dict({**state, "transformer.h.2.ln_1.weight": torch.ones(32)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "transformer.h.0.mlp.c_fc.weight": torch.ones(48, 32)})


def test_single_tensors_translate_as_all_do():
    model = build()
    state, own = model.state_dict(), dict(model.named_parameters())
    for name, tensor in state.items():
        for ours, piece in from_disk(model.config, {name: tensor}).items():
            assert torch.equal(piece, own[ours])
    assert "transformer.h.0.attn.c_attn.weight" not in to_disk(
        model.config, {n: p for n, p in own.items() if "k_proj" not in n}
    )


def test_llama_needs_no_translation():
    """Its state dict is views of its parameters, as ever: nothing is copied on a save."""
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=8, vocab_size=8))
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == model.get_parameter(name).data_ptr()


def test_parameters_keep_llamas_names():
    """B14, B15: what decays and what Muon updates is told by the same rules in every family."""
    model = build(tie_embeddings=False)
    matrices = {
        f"model.layers.{i}.{part}.weight"
        for i in range(2)
        for part in (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.up_proj", "mlp.down_proj")
    }
    assert hidden_matrices(model) == matrices
    assert decayed_names(model) == matrices | {"lm_head.weight"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_saves_and_loads_a_gpt2(precision):
    def engine(seed: int) -> Engine:
        model = build(seed=seed)
        init_weights(model, seed)
        optim = OptimConfig(ema_decay=0.9, schedule="constant", warmup_steps=0, lr=0.01)
        return Engine(model, RunConfig(out="unused", precision=precision, steps=9, optim=optim, eval=EvalConfig()))

    def go_on(engine: Engine) -> list[float]:
        from llmkit.data.loader import Batch
        from llmkit.training.supervised import token_loss

        ids = torch.arange(32).view(2, 16) % 50
        batch = Batch(
            ids, ids.roll(-1, 1), torch.arange(16).expand(2, 16), torch.zeros(2, 16, dtype=torch.int32), 32.0, 32.0
        )
        return [engine.update([batch], token_loss(0.0, 16))["loss"] for _ in range(3)]

    a, b = engine(0), engine(1)
    go_on(a)
    saved = {file: {n: t.clone() for n, t in tensors.items()} for file, tensors in a.tensors().items()}
    assert set(saved["model.safetensors"]) == set(checkpoint_shapes(a.module))
    assert "model.layers.0.self_attn.q_proj.weight" in saved["trainer_state/ema.safetensors"]
    b.load(saved, a.state())
    losses = go_on(a)
    assert losses == go_on(b) and losses[-1] < losses[0]
