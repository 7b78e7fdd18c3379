"""Plans of clusters: bytes and seconds of meshes, what is refused, and speeds that others have published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.model.config import GPTConfig, count_params
from llmkit.plan.clock import Clock
from llmkit.plan.cost import block_bytes, cost_of
from llmkit.plan.gpus import GPUS, recognised
from llmkit.plan.job import Job, Net, Pass
from llmkit.plan.mesh import (
    Cluster,
    Mesh,
    easier,
    fits,
    host_bytes,
    memory_of,
    meshes,
    objection,
    offloaded_bytes,
    peak_of,
    share_of,
    state_of,
)
from llmkit.plan.report import describe, suggestions

CONFIGS = Path(__file__).parents[1] / "configs"
T = 8192
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"n_layers": 32, "n_heads": 32, "d_model": 4096, "d_ff": 14336},
    "70b": {"n_layers": 80, "n_heads": 64, "d_model": 8192, "d_ff": 28672},
}


def llama(name: str) -> GPTConfig:
    return GPTConfig(n_kv_heads=8, max_seq_len=T, vocab_size=128256, tie_embeddings=False, **SHAPES[name])


def mixture(n: int = 64) -> GPTConfig:
    """Half the depth and the experts of Qwen3-30B-A3B."""
    return GPTConfig(
        n_layers=24, n_heads=32, n_kv_heads=4, d_model=2048, d_ff=6144, max_seq_len=T, vocab_size=151936, qk_norm=True,
        tie_embeddings=False, experts={"n": n, "n_active": min(n, 8), "d_ff": 768},
    )  # fmt: skip


def job(model: GPTConfig, rows: int, micro: int = 1, **options: Any) -> Job:
    """Pretraining on rows of 8192 tokens in bf16 with AdamW."""
    recompute = options.get("recompute", True)
    cost = cost_of(
        model, seq_len=T, micro_tokens=micro * T, precision="bf16", optimizer="adamw", loss_chunk=256,
        activation_checkpointing=recompute, ema=False,
    )  # fmt: skip
    net = Net("model", model, "bf16", cost)
    said: dict[str, Any] = {
        "stage": "pretrain", "steps": 1000, "nets": (net,), "passes": (Pass(net, "train", float(rows * T), T),),
        "rows": rows, "row_len": T, "micro_rows": lambda n: min(micro, max(1, rows // n)), "precision": "bf16",
        "optimizer": "adamw", "loss_chunk": 256, "recompute": True, "compiled": False, "packed": False,
        "kept_checkpoints": 3, "save_every": 100,
    }  # fmt: skip
    return Job(**{**said, **options})


def cluster(gpu: str, nodes: int) -> Cluster:
    sheet = GPUS[gpu]
    return Cluster(sheet, nodes, sheet.per_node, sheet.network_gb_per_s)


# Tokens a second and GPU of torchtitan, FSDP2 in bf16, rows of 8192: docs/performance.md and benchmarks/ of
# pytorch/torchtitan. Its 8B runs recompute some operations, so they lie between ours with and without recomputation; its
# H100s had a lower power limit (500 W) and slower memory than those of the data sheet.
PUBLISHED = [("8b", "a100", 64, 1, False, 2973), ("8b", "h100", 8, 2, True, 6667), ("8b", "h100", 8, 2, False, 5762)]


@pytest.mark.parametrize(("name", "gpu", "world", "micro", "compiled", "speed"), PUBLISHED)
def test_published_speeds_lie_where_they_must(
    name: str, gpu: str, world: int, micro: int, compiled: bool, speed: int
) -> None:
    told = {}
    for recompute in (True, False):
        planned = job(llama(name), micro * world, micro, recompute=recompute, compiled=compiled)
        step = Clock(planned, Mesh(world, "full"), cluster(gpu, world // 8)).step()
        told[recompute] = planned.tokens_per_step / step.total / world
    slower = 0.8 if gpu == "h100" else 1.0
    assert 0.95 * slower * told[True] <= speed <= 1.05 * told[False]


def test_the_published_speed_of_70b() -> None:
    """Everything recomputed, 64 A100: 331 tokens a second and GPU."""
    planned = job(llama("70b"), 64)
    step = Clock(planned, Mesh(64, "full"), cluster("a100", 8)).step()
    assert planned.tokens_per_step / step.total / 64 == pytest.approx(331, rel=0.1)


def test_shares_add_up_to_the_whole() -> None:
    """However it is cut, all ranks together hold every master and moment once a copy; a rank alone holds its share."""
    net = job(llama("8b"), 64).nets[0]
    whole = sum(state_of(net, Mesh(1)).values())
    assert whole == net.cost.state_bytes
    for mesh in (Mesh(64, "full"), Mesh(64, "hybrid", replicas=8)):
        fp32 = sum(state_of(net, mesh).values()) * mesh.shards
        assert fp32 == pytest.approx(whole - net.cost.weight_bytes)  # shares are fp32, and masters themselves
    blocks = net.cost.n_params - net.cost.n_embedding_params
    split = sum(state_of(net, Mesh(8, tensor=8)).values())
    assert split == pytest.approx(18 * (blocks / 8 + net.cost.n_embedding_params), rel=1e-6)


def test_more_ranks_never_need_more_memory() -> None:
    planned = job(llama("8b"), 1024)
    peaks = [peak_of(memory_of(planned, Mesh(n, "full")))[1] for n in (8, 16, 64, 512)]
    assert peaks == sorted(peaks, reverse=True)
    assert peak_of(memory_of(planned, Mesh(8, "full", tensor=2)))[1] < 1.2 * peaks[0]


def test_only_whole_networks_fill_main_memory() -> None:
    """4 bytes a parameter where nothing is spread; else twice the largest tensor, here the embedding."""
    planned = job(llama("70b"), 64)
    assert host_bytes(planned, Mesh(8)) == 4 * planned.nets[0].cost.n_params
    for mesh in (Mesh(8, "full"), Mesh(8, tensor=8)):
        assert host_bytes(planned, mesh) == 2 * 4 * 128256 * 8192


def test_shares_in_main_memory() -> None:
    """A GPU holds what is put together and activations, a node the rest; copies and the optimizer take longer."""
    planned, where = job(llama("70b"), 64), cluster("h100", 1)
    on, off = Mesh(8, "full"), Mesh(8, "full", offload=True)
    state = sum(state_of(planned.nets[0], on).values())
    assert peak_of(memory_of(planned, on))[1] - peak_of(memory_of(planned, off))[1] == pytest.approx(state)
    assert offloaded_bytes(planned, off) == pytest.approx(state) and offloaded_bytes(planned, on) == 0.0
    a, b = (Clock(planned, mesh, where).step() for mesh in (on, off))
    n_micro = 64 / 8 / planned.micro_rows(8)
    assert b.messages["copies from and to main memory"] == pytest.approx(
        n_micro * 12 * planned.nets[0].cost.n_params / 8
    )
    assert b.seconds["messages"] > a.seconds["messages"] and b.seconds["optimizer"] > 10 * a.seconds["optimizer"]
    assert str(off) == "parallel.shard=full parallel.offload=true"
    assert any("for shares throughout" in line for line in describe(planned, off, cluster("b200", 1)))


def test_ranks_that_share_rows() -> None:
    """As much work, an N-th of a row's activations on each, and keys and values as messages."""
    planned = job(llama("8b"), 64)
    alone, shared = (Mesh(64, "full"), Mesh(64, "full", context=4))
    one, four = (memory_of(planned, mesh)["update"]["activations"] for mesh in (alone, shared))
    assert one / 4 < four < 0.6 * one  # the gradient of the head is whole
    assert state_of(planned.nets[0], alone) == state_of(planned.nets[0], shared)
    apart, together = (Clock(planned, mesh, cluster("h100", 8)).step() for mesh in (alone, shared))
    assert together.messages["keys and values"] > 0 and "keys and values" not in apart.messages
    assert together.total == pytest.approx(apart.total, rel=0.3)
    assert objection(planned, Mesh(256, "full", context=4)) is None  # four times as many GPUs as rows


def test_ranks_that_hold_experts_together() -> None:
    """Replicated, a rank's state falls to what is no expert and a share of the rest; in shares it stays, but a block is put
    together of fewer weights. Visits are messages: there and back, forward and backward."""
    planned = job(mixture(), 64, recompute=False)
    net = planned.nets[0]
    experts = count_params(net.model).experts
    assert experts / net.cost.n_params > 0.8
    for n in (2, 4, 8):
        share = share_of(net, Mesh(64, experts=n))
        assert share == pytest.approx(1 - (1 - 1 / n) * experts / net.cost.n_params)
        assert sum(state_of(net, Mesh(64, experts=n)).values()) == pytest.approx(share * net.cost.state_bytes)
        assert share_of(net, Mesh(64, "full", experts=n)) == pytest.approx(1 / 64)
        assert share_of(net, Mesh(64, "hybrid", replicas=8, experts=n)) == pytest.approx(1 / 8)
    where = cluster("h100", 8)
    alone, together = Mesh(64, "full"), Mesh(64, "full", experts=8)
    peaks = [peak_of(memory_of(planned, mesh))[1] for mesh in (alone, together)]
    assert peaks[1] < peaks[0] - 2 * 2 * 0.8 * experts / 24  # two blocks in bf16
    apart, shared = (Clock(planned, mesh, where).step() for mesh in (alone, together))
    visits = planned.tokens_per_step / 64 * 8 * 2048 * 2 * 24 * 4 * 7 / 8
    assert shared.messages["visits of experts"] == pytest.approx(visits) and "visits of experts" not in apart.messages
    weights = "sharded weights and gradients"
    assert shared.messages[weights] < 0.4 * apart.messages[weights]
    replicated = (Clock(planned, Mesh(64, experts=n), where).step().messages for n in (1, 8))
    one, eight = (sent["gradients of copies"] for sent in replicated)
    assert eight == pytest.approx(2 * 4 * ((net.cost.n_params - experts) * 63 / 64 + experts / 8 * 7 / 8))
    assert one == pytest.approx(2 * 4 * net.cost.n_params * 63 / 64)
    # Beyond a node they travel over its network.
    far = Clock(planned, Mesh(64, "full", experts=8), replace(where, per_node=1, nodes=64)).step()
    assert far.seconds["messages"] > 3 * shared.seconds["messages"]


def test_meshes_of_experts_are_suggested() -> None:
    found = suggestions(job(mixture(), 64, recompute=False), cluster("h100", 8))
    assert any(f.mesh.experts > 1 for f in found)
    assert all(m.experts == 1 for m in meshes(job(llama("8b"), 64), cluster("h100", 8)))


@pytest.mark.parametrize(
    ("model", "mesh", "said"),
    [
        (llama("8b"), Mesh(8, experts=2), "parallel.experts (2): the model has no experts"),
        (mixture(), Mesh(8, experts=3), "parallel.experts (3) does not divide the 8 ranks"),
        (mixture(6), Mesh(8, experts=4), "parallel.experts (4) does not divide the model's 6 experts"),
        (mixture(), Mesh(64, "hybrid", replicas=32, experts=4), "(4) does not divide the 2 ranks that share a model"),
        (mixture(), Mesh(8, tensor=2), "experts are not split by width"),
    ],
)
def test_experts_that_can_t_be_shared_out(model: GPTConfig, mesh: Mesh, said: str) -> None:
    told = objection(job(model, 64), mesh)
    assert told is not None and said in told


def test_ranks_that_compute_rows_together() -> None:
    """Of activations each has a share, but for what leaves the network; messages as tests/training/test_sequence.py counts."""
    planned = job(llama("8b"), 64)
    model = planned.nets[0].model
    assert block_bytes(model, 8192, "bf16", "cuda", 4) == block_bytes(model, 8192, "bf16", "cuda") / 4
    together = Mesh(64, "full", tensor=4)
    one, four = (memory_of(planned, mesh)["update"]["activations"] for mesh in (Mesh(64, "full"), together))
    assert one / 4 < four < 0.6 * one
    kept, again = (
        Clock(replace(planned, recompute=recompute), together, cluster("h100", 8)).step().messages["tensor"]
        for recompute in (False, True)
    )
    assert again == pytest.approx(kept * 11 / 10)


def test_messages_between_nodes_are_slower() -> None:
    """The same job and mesh on one node and on eight of one GPU."""
    planned = job(llama("8b"), 64)
    inside = Clock(planned, Mesh(8, tensor=8), cluster("h100", 1)).step()
    across = Clock(planned, Mesh(8, tensor=8), replace(cluster("h100", 8), per_node=1)).step()
    assert across.seconds["messages"] > 5 * inside.seconds["messages"] and across.messages == inside.messages


@pytest.mark.parametrize(
    ("mesh", "options", "said"),
    [
        (Mesh(128), {}, "128 ranks with different data, but a step has 64 rows"),
        (Mesh(48), {}, "64 rows of a step can't be shared out evenly over 48 ranks"),
        (Mesh(64, tensor=16), {}, "does not divide the model's sizes (32 heads, 8 for keys and values, MLP 14336)"),
        (Mesh(8, tensor=3), {}, "parallel.tensor (3) does not divide the 8 GPUs"),
        (Mesh(1, "full", offload=True), {}, "parallel.offload=true on one GPU"),
        (Mesh(8, "hybrid", replicas=3), {}, "parallel.replicas (3) does not divide the 8 ranks"),
        (Mesh(8, context=3), {}, "parallel.context (3) does not divide the 8 ranks"),
        (Mesh(8, context=2), {"compiled": True}, "parallel.context (2) can't be compiled"),
        (Mesh(8, "full"), {"packed": True}, "a base in 4 bits is not cut up"),
    ],
)
def test_what_is_impossible_is_said_with_the_numbers(mesh: Mesh, options: dict[str, Any], said: str) -> None:
    told = objection(job(llama("8b"), 64, **options), mesh)
    assert told is not None and said in told


def test_suggestions_fit_and_the_fastest_is_first() -> None:
    planned, where = job(llama("70b"), 1024), cluster("h100", 16)
    found = suggestions(planned, where)
    assert found and all(objection(f.job, f.mesh) is None and fits(f.job, f.mesh, where) for f in found)
    assert [f.step.total for f in found] == sorted(f.step.total for f in found)
    assert all(0 < f.step.mfu < where.gpu.product_frac for f in found)


def test_where_nothing_fits_more_nodes_are_named() -> None:
    with pytest.raises(UserError, match=r"nothing fits on 8 of them: take \d+ nodes with parallel\.shard=full"):
        list(describe(job(llama("70b"), 1024), Mesh(8), cluster("h100", 1)))


def test_easier_settings_say_what_they_change() -> None:
    """Their keys are those of a recipe, and each needs less than the one before."""
    planned = job(llama("8b"), 64, 8, recompute=False)
    peaks, keys = zip(*((peak_of(memory_of(j, Mesh(8, "full")))[1], k) for j, k in easier(planned)), strict=True)
    assert list(peaks) == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert keys[0] == "" and keys[-1] == "activation_checkpointing=true batch.micro_tokens=8192"


def test_every_mesh_uses_every_gpu() -> None:
    planned, where = job(llama("8b"), 512), cluster("h100", 8)
    assert {m.world for m in meshes(planned, where)} == {64}
    assert all(m.copies * m.shards * m.tensor == 64 for m in meshes(planned, where))


def test_a_driver_s_name_is_recognised() -> None:
    assert recognised("NVIDIA H100 80GB HBM3") is GPUS["h100"] and recognised("Tesla T4") is None


# --- the command -----------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    return (code, *capsys.readouterr())


@pytest.mark.parametrize(("recipe", "nodes"), [("1b", 1), ("1b", 8), ("8b", 1), ("8b", 64), ("70b", 16), ("70b", 128)])
def test_the_recipes_fit_where_they_say(recipe: str, nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, f"configs/pretrain/{recipe}.yaml", "--gpu", "h100", "--nodes", str(nodes))
    assert code == 0 and "MFU" in out and "GPU hours" in out and not err


def test_what_does_not_fit_is_exit_2_and_names_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("configs/pretrain/8b.yaml", "parallel={shard: none}", "--gpu", "h100")
    code, out, err = said(capsys, *words)
    assert code == 2 and "'update': runtime" in out
    assert "parallel.shard=none: " in err and "of 80 GB" in err and "what would do: parallel.shard=full" in err
    code, _, err = said(capsys, "configs/pretrain/70b.yaml", "parallel.tensor=4", "--gpu", "h100", "--nodes", "512")
    assert code == 0
    code, _, err = said(capsys, "configs/pretrain/70b.yaml", "--gpu", "h100", "--nodes", "512")
    assert code == 2 and "4,096 ranks with different data, but a step has 1,024 rows" in err and "what would do" in err


@pytest.mark.parametrize(
    ("words", "said_of_it"),
    [
        (["--nodes", "2"], "--nodes: of which GPUs?"),
        (["--gpu", "tpu"], "choose one of b200"),
        (["--gpu", "h100", "--gpus", "0"], "all must be above 0"),
        (["--gpu", "h100", "precision=fp64"], "set precision: bf16"),
        (["--calibration", "nowhere.json"], "scripts/bench/plan.py"),
    ],
)
def test_mistakes_are_told(words: list[str], said_of_it: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [w for w in words if "=" in w]
    options = [w for w in words if "=" not in w]
    code, _, err = said(capsys, "configs/pretrain/tiny.yaml", *overrides, *options)
    assert code == 2 and said_of_it in err


def test_ppo_counts_every_network_and_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Policy and critic are trained, reference and reward model asked; answers need a cache, the update activations."""
    from hub import stand_in

    old = stand_in("Qwen/Qwen2.5-7B", tmp_path / "model")
    told = yaml.safe_load((CONFIGS / "ppo/7b_lora.yaml").read_text("utf-8"))
    told |= {"init_from": str(old), "rewards": [{"kind": "model", "path": str(old)}], "parallel": {"shard": "full"}}
    del told["lora"]
    file = tmp_path / "ppo.yaml"
    file.write_text(yaml.safe_dump(told))
    code, out, err = said(capsys, str(file), "--gpu", "h100", "--nodes", "2")
    # Whole copies of both networks beside the frozen ones are too much for 80 GB.
    assert code == 2 and "in the phase 'answers'" in err
    code, out, _ = said(capsys, str(file), "--gpu", "h200", "--nodes", "2")
    assert code == 0, out
    for part in ("policy", "critic", "reference: weights 15.2", f"reward model {old}: weights", "cache", "answers "):
        assert part in out
    assert out.count("trained in bf16") == 2 and out.count("asked in bf16") == 2


def test_here_a_time_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """On this machine's CPU, from a block that is tried; a model spread over ranks has none here."""
    code, out, _ = said(capsys, "configs/pretrain/tiny.yaml", "device=cpu")
    assert code == 0 and " a step on" in out and "GB at most, beyond the imports'" in out
    code, out, _ = said(capsys, "configs/pretrain/8b.yaml", "device=cpu")
    assert code == 0 and "--nodes N --gpus M --gpu h100" in out
