"""Parts of a module with rates and clips of their own; what a task keeps; what several ranks put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import on_ranks
from torch import Tensor, nn
from toys import recipe

from llmkit.config import MachineError, UserError
from llmkit.losses import LossSum
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import ActorCritic, SequenceClassifier, init_head
from llmkit.model.saving import load_saved, saved_tensors
from llmkit.training.checkpoint import Checkpointer, load
from llmkit.training.dist import Ranks
from llmkit.training.engine import Engine
from llmkit.training.optim import Part

PARTS = (Part("one.", 1.0, 0.5), Part("two.", 10.0, 0.01))


class Pair(nn.Module):
    """Two linear maps that share nothing."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one, self.two = nn.Linear(3, 1), nn.Linear(3, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)


class Points:
    denominator, n_tokens = 4.0, 4.0

    def __init__(self) -> None:
        self.x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def to(self, device: Any) -> Points:
        return self


def loss(module: nn.Module, batch: Points) -> LossSum:
    total = (module.one(batch.x) - 3).square().sum() + 100 * (module.two(batch.x) + 1).square().sum()
    return LossSum(total, {"loss": total.detach()})


def engine_of(parts: tuple[Part, ...] | None = PARTS, **optim: Any) -> Engine:
    optim = {"lr": 1e-2, "clip": 0.5, "weight_decay": 0.1, **optim}
    return Engine(Pair(), recipe(**optim), parts=parts)


def alone(name: str, lr: float, clip: float, steps: int) -> dict[str, Tensor]:
    """One of the two maps trained by torch alone."""
    module = getattr(Pair().double(), name)
    factor, target = (1.0, 3.0) if name == "one" else (100.0, -1.0)
    groups = [{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    for _ in range(steps):
        optimizer.zero_grad()
        (factor * (module(Points().x) - target).square().sum() / 4).backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return {f"{name}.{n}": p.detach() for n, p in module.named_parameters()}


def test_each_part_has_its_own_rate_and_clip() -> None:
    """Two optimizers of torch's, each with its own norm: neither map shrinks the other's gradient."""
    engine = engine_of()
    for _ in range(5):
        metrics = engine.update([Points()], loss)
    assert metrics["grad_norm"] ** 2 == pytest.approx(metrics["one/grad_norm"] ** 2 + metrics["two/grad_norm"] ** 2)
    for name, expected in (alone("one", 1e-2, 0.5, 5) | alone("two", 1e-1, 0.01, 5)).items():
        torch.testing.assert_close(engine.masters[name], expected, rtol=0, atol=1e-6)


def test_a_resting_part_keeps_its_bits() -> None:
    """Neither momentum nor decay nor the step count moves; afterwards it goes on as if nothing had been."""
    engine, other = engine_of(), engine_of()
    engine.update([Points()], loss)
    other.update([Points()], loss)
    kept = {n: t.clone() for n, t in engine.masters.items()}
    state = {n: t.clone() for n, t in engine.optimizer.state_dict().items()}
    for _ in range(3):
        metrics = engine.update([Points()], loss, resting=("one.",))
        assert metrics["one/grad_norm"] == 0.0
    for n, t in kept.items():
        assert torch.equal(engine.masters[n], t) == n.startswith("one."), n
    for n, t in engine.optimizer.state_dict().items():
        assert torch.equal(t, state[n]) == (".one." in n), n
    engine.update([Points()], loss)
    other.update([Points()], loss)
    assert all(torch.equal(engine.masters[n], other.masters[n]) for n in kept if n.startswith("one."))


def tiny(seed: int = 0) -> ActorCritic:
    config = GPTConfig(n_layers=1, n_heads=2, d_model=16, max_seq_len=16, vocab_size=64)
    actor, critic = GPT(config), SequenceClassifier(config, 1)
    init_weights(actor, seed)
    init_weights(critic, seed + 1)
    init_head(critic, seed)
    return ActorCritic(actor, critic)


def test_an_actor_and_its_critic_are_two_folders(tmp_path: Path) -> None:
    """B87: both come back; a task's tensors may change their shape from save to save, and be gone in the end."""
    module, other = tiny(), tiny(5)
    files = saved_tensors(module)
    assert set(files) == {"model.safetensors", "critic/model.safetensors"}
    assert "score.weight" in files["critic/model.safetensors"] and "score.weight" not in files["model.safetensors"]
    saver = Checkpointer(tmp_path, keep=9, asynchronous=True)
    for step, n in ((1, 3), (2, 7), (3, 0)):
        own = {"trainer_state/task.safetensors": {"a": torch.arange(n).float()}} if n else {}
        saver.save(step, {**files, **own}, {"trainer_state/state.json": b"{}"}, {})
        saver.wait()
        got, _ = load(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert set(got) == {*files, *own}
        if n:
            assert torch.equal(got["trainer_state/task.safetensors"]["a"], torch.arange(n).float())
    load_saved(other, got)
    for name, p in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], p), name


def test_large_models_of_both_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.training import checkpoint

    monkeypatch.setattr(checkpoint.shard, "__defaults__", (4096,))
    files = saved_tensors(tiny())
    saver = Checkpointer(tmp_path, keep=9, asynchronous=False)
    saver.save(1, files, {"trainer_state/state.json": b"{}"}, {})
    folder = tmp_path / "checkpoints" / "step-00000001"
    index = json.loads((folder / "critic" / "model.safetensors.index.json").read_text())
    assert all((folder / "critic" / name).is_file() for name in index["weight_map"].values())
    got, _ = load(folder)
    for file, tensors in files.items():
        assert got[file].keys() == tensors.keys() and all(torch.equal(got[file][n], t) for n, t in tensors.items())


# --- several ranks ---------------------------------------------------------------------------------------------------


def _together(ranks: Ranks) -> tuple[list[float], list[int], str]:
    mine = torch.arange(ranks.rank * 2, dtype=torch.float64) + 10 * ranks.rank
    said = "nothing"
    try:
        ranks.together(lambda: 1 / (1 - ranks.rank) if ranks.rank < 2 else 0)
    except MachineError as e:
        said = str(e)
    except ZeroDivisionError:
        said = "its own"
    return ranks.concat(mine).tolist(), ranks.concat(torch.tensor([ranks.rank, 7])).tolist(), said


def test_ragged_tensors_and_failures_of_three_ranks() -> None:
    """One rank's share may be empty; what fails on one fails on all, instead of leaving them waiting."""
    results = on_ranks(3, _together)
    assert [r[0] for r in results] == [[10.0, 11.0, 20.0, 21.0, 22.0, 23.0]] * 3
    assert [r[1] for r in results] == [[0, 7, 1, 7, 2, 7]] * 3
    assert results[1][2] == "its own" and all("another rank failed" in results[i][2] for i in (0, 2))
    with pytest.raises(UserError):
        Ranks().together(lambda: (_ for _ in ()).throw(UserError("alone")))
