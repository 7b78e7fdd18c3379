"""Mixture of experts: the same function as transformers, a balance term that no cut of a step can change."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from ports import free_port
from safetensors.torch import load_file, save_file
from test_hf import IDS, silence
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmkit.config import UserError, validate
from llmkit.losses import IGNORE, LossSum, linear_cross_entropy
from llmkit.model.config import ExpertsConfig, GPTConfig, count_params
from llmkit.model.gpt import GPT, MLP, KVCache, document_mask, init_weights
from llmkit.model.hf import config_from_hf, config_to_hf, read_config
from llmkit.model.moe import MoE, top_k
from llmkit.model.weights import load_model
from llmkit.plan import flops_per_token
from llmkit.training.config import OptimConfig, RunConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine
from llmkit.training.optim import hidden_matrices

VOCAB, D = 64, 32
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"qk_norm": True},
    "qwen2_moe": {"qkv_bias": True, "experts": {"shared_d_ff": 20}},
}
# Twelve experts and eleven layers: sorted as text, 10 comes before 2 (B64).
VARIANTS: dict[str, dict[str, Any]] = {
    "top_2_of_12": {},
    "top_1_of_11_layers": {"n_layers": 11, "experts": {"n_active": 1}},
    "all_of_12": {"experts": {"n_active": 12, "n": 12}},
    "raw_weights": {"experts": {"n_active": 3, "normalize": False, "balance": 0.05}},
    "dense_layers": {"n_layers": 4, "experts": {"dense_layers": (0, 2)}},
    "every_second": {"n_layers": 5, "experts": {"every": 2, "dense_layers": (3,)}},
    "window": {"sliding_window": 20},
    "untied": {"tie_embeddings": False, "n_kv_heads": 2, "d_ff": None},
}

PAIRS = [(f, v) for f in FAMILIES for v in VARIANTS if (f, v) != ("qwen2_moe", "window")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


def shape(family: str = "qwen3_moe", experts: dict[str, Any] | None = None, **options: Any) -> GPTConfig:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": D, "d_ff": 48, "max_seq_len": 128, "vocab_size": VOCAB}
    mixture = {"n": 12, "n_active": 2, "d_ff": 24, **FAMILIES[family].get("experts", {}), **(experts or {})}
    return GPTConfig(**{**sizes, **FAMILIES[family], **options, "experts": ExpertsConfig(**mixture)})


def noisy(module: nn.Module, std: float = 0.5, seed: int = 0) -> nn.Module:
    """Every tensor random, norms and biases too, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))
    return module.eval()


def build(config: GPTConfig | None = None, std: float = 0.3, activation_checkpointing: bool = False) -> GPT:
    model = GPT(config or shape(), activation_checkpointing)
    noisy(model, std)
    return model


def mixture(std: float = 0.3, seed: int = 0, **options: Any) -> MoE:
    config = shape("qwen2_moe" if "shared_d_ff" in options else "qwen3_moe", options)
    moe = MoE(config.experts, D, lambda width: MLP(config, width))
    noisy(moe, std, seed)
    return moe


def states(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_ids(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, sizes, generator=torch.Generator().manual_seed(seed))


# --- the layer ------------------------------------------------------------------------------------------------------


def by_hand(moe: MoE, x_BTD: Tensor) -> Tensor:
    """Token by token and expert by expert, in the dtype of the states."""
    rows = []
    for x_D in x_BTD.flatten(0, 1):
        p_E = torch.softmax(moe.gate(x_D), -1)
        best = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())[: moe.config.n_active]
        total = sum(p_E[e] for e in best) if moe.config.normalize else 1.0
        out_D = sum(p_E[e] / total * moe.experts[e](x_D) for e in best)
        if moe.config.shared_d_ff is not None:
            out_D = out_D + torch.sigmoid(moe.shared_expert_gate(x_D)) * moe.shared_expert(x_D)
        rows.append(out_D)
    return torch.stack(rows).view_as(x_BTD)


@pytest.mark.parametrize(
    "options", [{}, {"n_active": 1}, {"n_active": 5, "shared_d_ff": 20}, {"normalize": False}], ids=str
)
def test_against_loops(options):
    """Output and every gradient, in fp64."""
    moe, x = mixture(**options).double().train(), states(2, 13).requires_grad_()
    g = states(2, 13, seed=1)
    grads = []
    for out in (moe(x)[0], by_hand(moe, x)):
        grads.append((out, *torch.autograd.grad((out * g).sum(), [x, *moe.parameters()], allow_unused=True)))
    names = ["out", "x", *(n for n, _ in moe.named_parameters())]
    for name, a, b in zip(names, *grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_experts_that_no_token_visits_have_no_gradient():
    moe, x = mixture(n_active=1).train(), states(1, 3, dtype=torch.float32)
    out, routing = moe(x)
    out.sum().backward()
    visited = set(routing.chosen_BTK.flatten().tolist())
    assert 0 < len(visited) < 12
    for e, expert in enumerate(moe.experts):
        assert all((p.grad is not None and p.grad.abs().sum() > 0) == (e in visited) for p in expert.parameters())


def test_ties_go_to_the_lowest_expert():
    """torch.topk takes any of them."""
    p = torch.full((5, 16), 1 / 16)
    p[1, 7], p[2, 15] = 0.5, 0.0
    assert top_k(p, 3).tolist() == [[0, 1, 2], [7, 0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    moe = mixture(n_active=3).to(torch.bfloat16).train()
    with torch.no_grad():
        moe.gate.weight.zero_()
    assert (moe(states(2, 9, dtype=torch.bfloat16))[1].chosen_BTK == torch.arange(3)).all()


def test_bf16_adds_up_in_fp32():
    """The error of the mixture is that of its experts' bf16, not of a sum of twelve in bf16."""
    moe = mixture(n_active=12, normalize=False)
    x = states(4, 64, dtype=torch.bfloat16)
    moe = moe.to(torch.bfloat16).eval()
    with torch.no_grad():
        got = moe(x)[0].double()
        p = torch.softmax(moe.gate(x).float(), -1).double()
        outputs = torch.stack([expert(x).double() for expert in moe.experts], -1)
        exact = (outputs * p[..., None, :]).sum(-1)
    assert torch.equal(got, exact.bfloat16().double()) or ((got - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()


def test_threads_do_not_change_a_bit():
    """PyTorch's own indexing adds up gradients of repeated rows in the order its threads come."""
    torch.set_num_threads(2)
    results = []
    for _ in range(3):
        moe, x = mixture(n_active=4).train(), states(4, 128, dtype=torch.float32).requires_grad_()
        out = moe(x)[0]
        out.square().sum().backward()
        results.append((out, x.grad, moe.gate.weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- one expert is the plain MLP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_one_expert_is_the_dense_model(normalize):
    """Loss and gradients bitwise."""
    dense = build(GPTConfig(**{**shape().model_dump(exclude={"experts"}), "d_ff": 24}), std=0.2).double().train()
    one = GPT(shape(experts={"n": 1, "n_active": 1, "normalize": normalize})).double().train()
    state = dense.state_dict()
    renamed = {n.replace("mlp.", "mlp.experts.0."): t for n, t in state.items()}
    routers = {n: t for n, t in one.state_dict().items() if n.endswith("mlp.gate.weight")}
    one.load_state_dict({**renamed, **routers})
    ids = random_ids(2, 20)
    losses = []
    for model in (dense, one):
        loss = F.cross_entropy(model.logits(model(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if model is one:
            loss = loss + one.routing.loss(ids >= 0)[0] * 0.01 - 0.01 * ids.numel()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)
    theirs = dict(one.named_parameters())
    for name, p in dense.named_parameters():
        other = theirs[name.replace("mlp.", "mlp.experts.0.")]
        torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=1e-14, msg=name)
    assert all((p.grad == 0).all() for n, p in theirs.items() if n.endswith("mlp.gate.weight"))


# --- the same function as transformers ------------------------------------------------------------------------------


def write_folder(folder: Path, model: GPT) -> Path:
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, torch.float32, IDS, {"note": "ours"})))
    (folder / "generation_config.json").write_text(json.dumps(IDS))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_same_logits(ours: GPT, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    ids = random_ids(2, 100)
    with torch.no_grad():
        a, b = ours.logits(ours(ids)), theirs(ids).logits
    assert b.std() > 1.0  # the check would be empty on near-uniform logits
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("family,variant", PAIRS)
def test_both_ways_with_transformers(tmp_path, family, variant):
    """B64. Our folder in transformers, saved by it again, and read back: an empty log, the same logits and tensors."""
    transformers = pytest.importorskip("transformers")
    ours = build(shape(family, **VARIANTS[variant]), std=0.5)
    write_folder(tmp_path, ours)
    with silence():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}[family]
    assert_same_logits(ours, theirs.eval())
    n_params = sum(p.numel() for p in ours.parameters())
    assert count_params(ours.config).total == n_params == theirs.num_parameters()
    noisy(theirs, 0.5, seed=1)
    again = tmp_path / "again"
    with silence():
        theirs.save_pretrained(again)
        back = load_model(again)
    assert_same_logits(back, theirs)
    sizes = {"n_kv_heads": ours.config.kv_heads, "head_dim": 8, "d_ff": ours.config.width_of_mlp}
    expected = ours.config.model_copy(update=sizes)
    assert read_config(tmp_path) == expected and back.config == expected
    assert load_file(again / "model.safetensors").keys() == back.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_agrees_with_transformers(tmp_path, family):
    """As close to it as bf16 itself is to fp32; ties, which each breaks in its own way, are rare at this width."""
    transformers = pytest.importorskip("transformers")
    ours = build(shape(family), std=0.3)
    write_folder(tmp_path, ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = random_ids(2, 100)
    with torch.no_grad():
        exact = ours.logits(ours(ids))
        ours.to(torch.bfloat16)
        a, b = ours.logits(ours(ids)), theirs(ids).logits.float()
    errors = [(x - exact).abs().mean().item() for x in (a, b)]
    assert errors[0] <= 1.2 * errors[1] + 1e-4
    assert errors[0] <= 0.1 * exact.std()


def test_balance_term_is_that_of_transformers(tmp_path):
    """With the load of the batch itself as f; theirs counts visits per token, so it is n_active times as large. Its
    coefficient in config.json undoes that. Value and the router's gradient, where theirs has one layer: several it mixes.
    """
    transformers = pytest.importorskip("transformers")
    ours = build(shape(n_layers=1, experts={"n_active": 3, "balance": 0.03}))
    write_folder(tmp_path, ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(2, 40)
    out = theirs(ids, labels=ids, output_router_logits=True)
    plain = theirs(ids, labels=ids)
    ours.train()
    ours(ids)
    _, counts = ours.routing.loss(ids >= 0)
    ours.set_expert_load(counts)
    ours(ids)
    balance = ours.routing.loss(ids >= 0)[0] / ids.numel()
    assert 3 * balance.item() == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert (0.03 * balance).item() == pytest.approx((out.loss - plain.loss).item(), rel=1e-3)
    balance.backward()
    (out.aux_loss / 3).backward()
    a, b = ours.model.layers[0].mlp.gate.weight.grad, theirs.model.layers[0].mlp.gate.weight.grad
    assert a.abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- in the whole model ---------------------------------------------------------------------------------------------


def test_routing_of_a_pass():
    """Counts are visits of the masked tokens; an even load makes the term 1; none in evaluation or in a dense model."""
    model, ids = build(shape(n_layers=4, experts={"n_active": 3, "dense_layers": (1,)})).train(), random_ids(2, 20)
    model(ids)
    routing = model.routing
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    total, counts = routing.loss(mask)
    assert counts.shape == (3, 12) and counts.dtype == torch.int64
    assert counts.sum(1).tolist() == [3 * int(mask.sum())] * 3
    for layer, row in enumerate(counts.tolist()):
        assert row == [int((routing.chosen_LBTK[layer][mask] == e).sum()) for e in range(12)]
    torch.testing.assert_close(total, mask.sum().float())
    nothing, none = routing.loss(torch.zeros_like(mask))
    assert nothing.item() == 0 and none.sum() == 0 and nothing.requires_grad
    model.set_expert_load(counts)
    model(ids)
    assert not torch.allclose(model.routing.balance_BT, torch.ones(2, 20), atol=1e-3)
    for wrong in (counts[:2], counts[:, :5], counts[0]):
        with pytest.raises(ValueError, match=r"the model \(3, 12\)"):
            model.set_expert_load(wrong)
    model.eval()(ids)
    assert model.routing is None
    dense = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=8, vocab_size=VOCAB)).train()
    init_weights(dense, 0)
    dense(ids)
    assert dense.routing is None


def test_routing_says_where_tokens_went():
    """Balance by its formula, a layer at a time."""
    moe, x = mixture().double().train(), states(2, 11)
    counts = torch.arange(1, 13)
    moe.set_load(counts)
    _, routing = moe(x)
    p = torch.softmax(x @ moe.gate.weight.T, -1)
    expected = 12 * (p * counts.double() / counts.sum()).sum(-1)
    torch.testing.assert_close(routing.balance_BT, expected, rtol=1e-13, atol=0)
    assert torch.equal(routing.chosen_BTK, p.topk(2).indices)


def test_load_survives_casts_and_meta():
    """A buffer would be rounded by a cast to bf16, and random after to_empty."""
    with torch.device("meta"):
        model = GPT(shape())
    model = noisy(model.to_empty(device="cpu")).train()
    ids = random_ids(1, 8)
    model(ids)
    torch.testing.assert_close(model.routing.balance_BT, torch.ones(1, 8))
    counts = torch.arange(24).view(2, 12) + 1
    model.set_expert_load(counts)
    model.to(torch.bfloat16)(ids)
    assert model.routing.balance_BT.dtype == torch.float32
    assert torch.equal(model.model.layers[0].mlp.load_E, (counts[0].double() / counts[0].sum()).float())
    assert model.state_dict().keys() == GPT(shape()).state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family):
    """B21: gradients bitwise, the balance term's too, under dropout."""
    ids, results = random_ids(2, 16), []
    for on in (False, True):
        model = build(shape(family, dropout=0.1), activation_checkpointing=on).train()
        model.set_expert_load(torch.arange(24).view(2, 12))
        torch.manual_seed(5)
        total = model.logits(model(ids)).logsumexp(-1).sum()
        balance, counts = model.routing.loss(ids > 5)
        (total + 10 * balance).backward()
        results.append((counts, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        other = results[1][1][name]
        assert (grad is None and other is None) or torch.equal(grad, other), name


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family):
    model, T = build(shape(family)), 24
    ids = random_ids(3, T)
    whole = model(ids)
    cache = KVCache(model.config, 3, T, torch.float32)
    parts = [model(piece, cache=cache) for piece in ids.split([7, 1, 1, 5, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_a_packed_row_equals_its_documents_alone():
    """B31. Not bitwise as in a dense model: how many rows an expert's product has depends on the other documents."""
    model, lengths = build().double(), [7, 20, 1, 30]
    docs = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = random_ids(1, sum(lengths))
    together = model(ids, positions, document_mask(docs))
    for part, row in zip(together.split(lengths, dim=1), ids.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, model(row), rtol=0, atol=1e-12)


# --- training -------------------------------------------------------------------------------------------------------

T, ROWS, STEPS = 12, 16, 4


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, of which only some are trained on."""

    ids_BT: Tensor
    labels_BT: Tensor

    @property
    def denominator(self) -> float:
        return float((self.labels_BT != IGNORE).sum())

    def to(self, device: torch.device) -> Rows:
        return Rows(self.ids_BT.to(device), self.labels_BT.to(device))


def rows_of(step: int) -> Rows:
    """Skewed tokens, so that experts are, too; rows hold 0 to 12 labels."""
    g = torch.Generator().manual_seed(100 + step)
    ids = (VOCAB * torch.rand(ROWS, T + 1, generator=g) ** 3).long()
    keep = torch.arange(T) < torch.randint(0, T + 1, (ROWS, 1), generator=g)
    return Rows(ids[:, :-1], torch.where(keep, ids[:, 1:], IGNORE))


def next_token_loss(module: nn.Module, batch: Any) -> LossSum:
    assert isinstance(module, GPT)
    hidden = module(batch.ids_BT)
    out = linear_cross_entropy(hidden, module.head_weight, batch.labels_BT, chunk=24)
    if module.routing is None or module.config.experts is None:
        return out
    balance, counts = module.routing.loss(batch.labels_BT != IGNORE)
    total = out.total + module.config.experts.balance * balance
    return LossSum(total, {**out.parts, "balance": balance.detach()}, {"expert_load": counts})


def recipe(precision: str = "fp64", **optim: Any) -> RunConfig:
    options = {"schedule": "constant", "warmup_steps": 0, "lr": 1e-2, **optim}
    return RunConfig(out="unused", steps=100, precision=precision, optim=OptimConfig(**options))


def train(ranks: Ranks, micro_rows: int, balance: float = 0.5, carry_load: bool = True) -> dict[str, Any]:
    model = build(shape(experts={"n_active": 3, "balance": balance}))
    engine = Engine(model, recipe(clip=0.5), ranks)
    loads, metrics = [], []
    for step in range(STEPS):
        batch = rows_of(step)
        mine = [t[ranks.rank :: ranks.world].split(micro_rows) for t in (batch.ids_BT, batch.labels_BT)]
        metrics.append(engine.update([Rows(*pair) for pair in zip(*mine, strict=True)], next_token_loss))
        loads.append(engine.stats["expert_load"])
        if carry_load:
            model.set_expert_load(loads[-1])
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "loads": torch.stack(loads), "metrics": metrics}


def assert_same_run(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert torch.equal(a["loads"], b["loads"])
    assert max((a["weights"][n] - b["weights"][n]).abs().max().item() for n in a["weights"]) <= 1e-12
    for one, other in zip(a["metrics"], b["metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_no_cut_of_a_step_changes_it():
    """B1, B4: 1 x 16, 2 x 8 and 16 x 1 rows with uneven labels, balance term included, over several steps."""
    whole = train(Ranks(), 16)
    n_labels = [rows_of(step).denominator for step in range(STEPS)]
    assert whole["loads"].sum(-1).tolist() == [[3 * n] * 2 for n in n_labels]
    for micro_rows in (8, 1):
        assert_same_run(whole, train(Ranks(), micro_rows))
    # And the term acts: without it, or without the load of the step before, the weights are others.
    for other in (train(Ranks(), 16, balance=0.0), train(Ranks(), 16, carry_load=False)):
        assert max((whole["weights"][n] - other["weights"][n]).abs().max().item() for n in whole["weights"]) > 1e-3
    assert whole["metrics"][0]["balance"] == pytest.approx(1.0)
    assert whole["metrics"][1]["balance"] > 1.02


def _child(rank: int, world: int, port: int, out: str) -> None:
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    ranks = connect("cpu", timeout_s=30)
    torch.save(train(ranks, 2), f"{out}/{rank}")
    ranks.close()


def test_two_ranks_are_one():
    """B3: the same load, metrics and weights."""
    port = free_port()
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(_child, (2, port, out), nprocs=2)
        results = [torch.load(f"{out}/{rank}", weights_only=False) for rank in range(2)]
    alone = train(Ranks(), 4)
    for result in results:
        assert_same_run(alone, result)


def test_unvisited_experts_stay_where_they_are():
    """Their gradient is zero, on every micro-batch or on some."""
    model = build(shape(n_layers=1, experts={"n_active": 1}))
    engine = Engine(model, recipe(weight_decay=0.0))
    ids = torch.tensor([[5, 5, 5, 7]])
    engine.update([Rows(ids, ids), Rows(ids[:, :3], ids[:, :3])], next_token_loss)
    visited = {e for e, n in enumerate(engine.stats["expert_load"][0].tolist()) if n}
    assert len(visited) < 12
    for e in range(12):
        grads = [g for n, g in engine.grads.items() if f"experts.{e}." in n]
        assert len(grads) == 3 and all(bool((g != 0).any()) == (e in visited) for g in grads)


def skewed(balance: float) -> tuple[float, float, float]:
    """(largest share of any expert of any layer's load: at the first step, over the last ten; last loss) of a model
    whose routers start out favouring two experts."""
    model = GPT(shape(experts={"n": 8, "n_active": 2, "balance": balance}))
    init_weights(model, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.01
        for layer in model.model.layers:
            layer.mlp.gate.weight *= 10  # tokens differ by more than a step of the optimizer moves them all
            layer.mlp.gate.weight[:2] += 0.2
    engine = Engine(model, recipe("fp32", lr=3e-3))
    shares, metrics = [], {}
    for step in range(60):
        ids = random_ids(ROWS, T, seed=step)
        metrics = engine.update([Rows(ids, (3 * ids + 1) % VOCAB)], next_token_loss)
        load = engine.stats["expert_load"]
        shares.append((load.max(1).values / load.sum(1)).max().item())
        model.set_expert_load(load)
    return shares[0], sum(shares[-10:]) / 10, metrics["loss"]


def test_balance_is_learnt():
    """Without harm to the loss, which starts at 4.2."""
    first, last, loss = skewed(0.05)
    _, without, loss_without = skewed(0.0)
    assert first > 0.4  # of at most 0.5, with 2 experts a token; even is 0.125
    assert last < 0.18 and last < without - 0.05
    assert loss < loss_without + 0.05 < 1.0


# --- configuration and cost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,match",
    [
        ({"qk_norm": False}, r"the nearest is Qwen3-MoE .*, which has qk_norm true \(here false\)"),
        ({"mlp_bias": True}, "the nearest is Qwen3-MoE .* mlp_bias false"),
        ({"norm": "layernorm"}, "the nearest is Qwen3-MoE .* norm rmsnorm"),
        ({"causal": False}, "the nearest is Qwen3-MoE .* causal true"),
        ({"experts": {"shared_d_ff": 8}}, "the nearest is Qwen2-MoE .* qkv_bias true"),
        ({"experts": {"n_active": 13}}, r"n_active \(13\) must not be above n \(12\)"),
        ({"experts": {"dense_layers": (0, 2)}}, "dense_layers names layer 2: there are 0 to 1"),
        ({"experts": {"dense_layers": (1, 0)}}, "leave none of the 2 layers"),
        ({"experts": {"every": 3}}, "leave none of the 2 layers"),
    ],
)
def test_shapes_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        shape(**options)


def test_experts_in_json():
    data = shape().model_dump() | {"experts": {"n": 4, "n_active": 2, "d_ff": 8, "dense_layers": [1]}}
    assert validate(GPTConfig, data, {(): "x"}).experts.dense_layers == (1,)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_leaves_keys_out(family):
    """They have the defaults of the class in transformers."""
    transformers = pytest.importorskip("transformers")
    hf = config_to_hf(shape(family), torch.float32, IDS, {})
    keys = [k for k in hf if "expert" in k or "moe_" in k or k in ("norm_topk_prob", "router_aux_loss_coef")]
    short = {k: v for k, v in hf.items() if k not in [*keys, "decoder_sparse_step", "mlp_only_layers"]}
    theirs = transformers.AutoConfig.for_model(**short)
    ours = config_from_hf(short).experts
    assert (ours.n, ours.n_active) == (theirs.num_experts, theirs.num_experts_per_tok)
    assert (ours.d_ff, ours.normalize) == (theirs.moe_intermediate_size, theirs.norm_topk_prob)
    assert ours.shared_d_ff == (theirs.shared_expert_intermediate_size if family == "qwen2_moe" else None)
    assert ours.balance == theirs.router_aux_loss_coef * theirs.num_experts_per_tok


def test_configs_that_are_refused():
    hf = config_to_hf(shape("qwen2_moe"), torch.float32, IDS, {})
    for changes, match in [
        ({"use_sliding_window": True}, "every second layer"),
        ({"num_experts_per_tok": 99}, "n_active"),
        ({"num_experts": "many"}, r"experts\.n"),
        ({"mlp_only_layers": [7]}, "layer 7"),
        ({"qkv_bias": False}, "qkv_bias true"),
    ]:
        with pytest.raises(UserError, match=match):
            config_from_hf({**hf, **changes})


def test_either_generation_of_keys():
    """transformers 4 writes num_experts for both families, 5 num_local_experts for Qwen3-MoE."""
    config = shape(experts={"n_active": 3, "balance": 0.001})
    hf = config_to_hf(config, torch.float32, IDS, {})
    for key in ("num_experts", "num_local_experts"):
        assert config_from_hf({k: v for k, v in hf.items() if k != key}).experts == config.experts


@pytest.mark.parametrize("family,variant", PAIRS)
def test_cost(family, variant):
    """All parameters and active ones; B25: operations of a pass; B15: Muon gets the experts' matrices, not the routers."""
    length = 64
    config = shape(family, **{**VARIANTS[variant], "sliding_window": None})
    model = build(config)
    experts, unused = config.experts, 0
    for name, p in model.named_parameters():
        if ".experts." in name:
            unused += p.numel() * (experts.n - experts.n_active) / experts.n
    assert count_params(config).active == sum(p.numel() for p in model.parameters()) - round(unused)
    muon = hidden_matrices(model)
    assert sum(p.numel() for n, p in model.named_parameters() if n in muon) == count_params(config).hidden
    assert any(".experts.11." in n or ".experts.10." in n for n in muon)
    assert not any(n.endswith(("mlp.gate.weight", "shared_expert_gate.weight")) for n in muon)
    ids = random_ids(2, length)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.logits(model(ids))
    full_attention = 4 * config.n_layers * config.n_heads * config.width_of_head * length
    counted = 3 * (counter.get_total_flops() / ids.numel() - full_attention / 2)
    assert flops_per_token(config, length) == pytest.approx(counted, rel=0.03)


def test_init_is_complete():
    model = GPT(shape("qwen2_moe", n_layers=3))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    init_weights(model, 0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 6**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=5 / (2 * p.numel()) ** 0.5), name
    a, b = (model.model.layers[0].mlp.experts[e].up_proj.weight for e in (0, 1))
    assert not torch.equal(a, b)
