"""Faults that are planted, in code or data, are each found by the check that is named for them, and by no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from posttraining import tiny_stage, tiny_world

from llmkit.data.loader import RowLoader
from llmkit.data.packing import Rows
from llmkit.data.shared import SharedRows
from llmkit.inference import batch as batching
from llmkit.losses import LossSum
from llmkit.model import gpt
from llmkit.stages import load_recipe
from llmkit.tokenizer import Tokenizer
from llmkit.tools.doctor.check import examine
from llmkit.tools.doctor.command import CHECKS, failures
from llmkit.tools.doctor.patient import Patient
from llmkit.training import freeze as freezing
from llmkit.training.engine import Engine
from llmkit.training.optim import Optimizer

# Runs, other processes, and seconds of imports: in the normal suite only their own faults look at them.
SLOW = ("save-load", "resume", "transformers", "ranks")
ALL = [check.name for check in CHECKS]
Plant = Callable[[pytest.MonkeyPatch], None]
# Modules as they are patched: by the names that they import, which are none of their own.
chats, dialogues, supervised, policy = (
    import_module(f"llmkit.{name}") for name in ("data.chats", "data.dialogues", "training.supervised", "training.policy")
)  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("doctor"))


def examined(folder: Path, out: Path, stage: str, only: list[str], **changes: Any) -> list[str]:
    recipe = load_recipe(tiny_stage(folder, stage, "examined", **changes))
    patient = Patient(recipe, out)
    try:
        found = list(examine(CHECKS, patient, only))
        print(*(f"{f.check.name}: {f.state} {f.told}" for f in found if f.state not in ("ok", "none")), sep="\n")
        return failures(found)
    finally:
        patient.close()


# --- what is planted -------------------------------------------------------------------------------------------------


def wrapped(patch: pytest.MonkeyPatch, where: str, change: Callable[[Any], Any]) -> None:
    """The function of that name gives something else."""
    module, _, name = where.rpartition(".")
    holder: Any = import_module(module) if module.islower() else None
    if holder is None:
        module, _, owner = module.rpartition(".")
        holder = getattr(import_module(module), owner)
    real = getattr(holder, name)
    patch.setattr(holder, name, lambda *args, **kwargs: change(real(*args, **kwargs)))


def mean_loss(patch: pytest.MonkeyPatch) -> None:
    """A micro-batch's loss is divided by its own count."""
    real = supervised.linear_cross_entropy

    def loss(hidden: Any, weight: Any, labels: Any, *args: Any) -> LossSum:
        out = real(hidden, weight, labels, *args)
        return LossSum(out.total / (labels != -100).sum().clamp(min=1), out.parts)

    patch.setattr(supervised, "linear_cross_entropy", loss)


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    real = supervised.linear_cross_entropy

    def loss(hidden: Any, *args: Any) -> LossSum:
        out = real(hidden, *args)
        return LossSum(out.total + 1e-3 * hidden.square().sum(), out.parts)

    patch.setattr(supervised, "linear_cross_entropy", loss)


def documents_see_each_other(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.training.supervised.document_mask", lambda mask: torch.ones_like(mask).tril())


def nothing_is_masked(patch: pytest.MonkeyPatch) -> None:
    real = gpt.attend
    patch.setattr(gpt, "attend", lambda q, k, v, mask, causal, dropout: real(q, k, v, mask, False, dropout))


def cache_forgets(patch: pytest.MonkeyPatch) -> None:
    real = gpt.KVCache.append

    def append(self: Any, layer: int, k: Any, v: Any) -> Any:
        keys, values = real(self, layer, k, v)
        return keys, values.roll(1, 2) if self.length else values

    patch.setattr(gpt.KVCache, "append", append)


def left_padding_is_seen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batching.LeftPadded, "_see", lambda self: setattr(self, "seen_B11S", None))


def rows_with(patch: pytest.MonkeyPatch, change: Callable[[Rows], Rows]) -> None:
    real = chats.text_batch
    patch.setattr(chats, "text_batch", lambda rows, pin: real(change(rows), pin))


def labels_shifted(patch: pytest.MonkeyPatch) -> None:
    rows_with(patch, lambda rows: replace(rows, labels_BT=np.roll(rows.labels_BT, -1, 1)))


def labels_lost(patch: pytest.MonkeyPatch) -> None:
    def change(rows: Rows) -> Rows:
        lost = (rows.labels_BT % 3 == 0) & (rows.labels_BT >= 5) & (rows.labels_BT < 256)  # letters, no control tokens
        return replace(rows, labels_BT=np.where(lost, -100, rows.labels_BT))

    rows_with(patch, change)


def positions_of_rows(patch: pytest.MonkeyPatch) -> None:
    def change(rows: Rows) -> Rows:
        columns = np.broadcast_to(np.arange(rows.ids_BT.shape[1]), rows.ids_BT.shape)
        return replace(rows, positions_BT=np.where(rows.docs_BT < 0, 0, columns))

    rows_with(patch, change)


def end_of_turn_masked(patch: pytest.MonkeyPatch) -> None:
    real = dialogues.encode_dialogue

    def encode(tokenizer: Any, *args: Any) -> Any:
        special = tokenizer.special_ids
        return [
            replace(t, is_trained=[m * (i not in special) for i, m in zip(t.ids, t.is_trained, strict=True)])
            for t in real(tokenizer, *args)
        ]

    patch.setattr(dialogues, "encode_dialogue", encode)


def everything_is_learnt(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.tokenizer.tokenizer.Tokenizer.encode_chat",
            lambda chat: replace(chat, loss_mask=[1] * len(chat.ids)))  # fmt: skip


def bos_twice(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.tokenizer.tokenizer.Tokenizer.encode_chat",
            lambda chat: replace(chat, ids=[chat.ids[0], *chat.ids], loss_mask=[0, *chat.loss_mask],
                                 turns=[(a + 1, b + 1) for a, b in chat.turns]))  # fmt: skip


def asked_otherwise(patch: pytest.MonkeyPatch) -> None:
    real = Tokenizer.encode_chat

    def encode(self: Any, messages: Any, add_generation_prompt: bool = False, **kwargs: Any) -> Any:
        chat = real(self, messages, add_generation_prompt, **kwargs)
        return replace(chat, ids=[*chat.ids[:-1], self.eos_id]) if add_generation_prompt else chat

    patch.setattr(Tokenizer, "encode_chat", encode)


def letters_lost(patch: pytest.MonkeyPatch) -> None:
    real = Tokenizer.encode
    patch.setattr(Tokenizer, "encode", lambda self, text: real(self, text.replace("a", "b")))


def drawn_with_replacement(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.data.order.Permutation.many", lambda rows: rows // 2 * 2)


def ranks_read_the_same(patch: pytest.MonkeyPatch) -> None:
    real = RowLoader.samples

    def samples(self: Any, k: int) -> Any:
        rank, self._rank = self._rank, 0
        try:
            return real(self, k)
        finally:
            self._rank = rank

    patch.setattr(RowLoader, "samples", samples)


def copies_are_held_out(patch: pytest.MonkeyPatch) -> None:
    """The data's fault: both files hold the same rows."""


def gate_detached(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)).detach() * self.up_proj(x))

    patch.setattr(gpt.MLP, "forward", forward)


def nothing_is_frozen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(freezing, "frozen_names", lambda names, patterns: set())


def loss_doubled(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.training.supervised.linear_cross_entropy",
            lambda out: LossSum(2 * out.total, {n: 2 * v for n, v in out.parts.items()}))  # fmt: skip


def reference_is_another(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.stages.dpo.cached_logprobs", lambda logps: logps + np.arange(len(logps)) % 3)


def uphill(patch: pytest.MonkeyPatch) -> None:
    real = Optimizer.step
    patch.setattr(Optimizer, "step", lambda self, grads, lr, *rest: real(self, grads, -lr, *rest))


def answers_see_each_other(patch: pytest.MonkeyPatch) -> None:
    def mask(self: Any) -> Any:
        groups = self.groups_RT
        same = groups[:, :, None] == groups[:, None, :]
        return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]

    patch.setattr(SharedRows, "mask", mask)


def reward_at_random(patch: pytest.MonkeyPatch) -> None:
    import random

    import killers

    patch.setattr(killers, "reward", lambda *args, **kwargs: random.random())


def turns_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tokenizer, "stop_ids", property(lambda self: frozenset()))


def other_temperature(where: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        module = import_module(where)
        real = module.token_logprobs
        patch.setattr(
            module, "token_logprobs", lambda *args, temperature, **kwargs: real(*args, temperature=2.0, **kwargs)
        )

    return plant


def reference_moved(patch: pytest.MonkeyPatch) -> None:
    real = policy.reference_of

    def reference_of(recipe: Any, actor: Any, *args: Any) -> Any:
        other = copy.deepcopy(actor)
        with torch.no_grad():
            other.model.norm.weight.mul_(1.5)
        return real(recipe, other, *args)

    patch.setattr(policy, "reference_of", reference_of)


def kl_turned_round(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.training.policy.PolicyTask._kl", lambda told: {**told, "kl_mean": -told["kl_mean"]})


def credit_turned_round(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.stages.ppo.gae", lambda found: (-found[0], found[1]))


def groups_turned_round(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.stages.grpo.group_relative", lambda advantages: -advantages)


def weights_scaled_on_disk(patch: pytest.MonkeyPatch) -> None:
    wrapped(patch, "llmkit.training.engine.saved_tensors",
            lambda files: {f: {n: 1.1 * t for n, t in tensors.items()} for f, tensors in files.items()})  # fmt: skip


def optimizer_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = Engine.load

    def load(self: Any, tensors: Any, state: Any) -> None:
        real(self, tensors, state)
        for tensor in self.optimizer.state_dict().values():
            tensor.zero_()

    patch.setattr(Engine, "load", load)


# What is planted, in which stage, and the check that finds it.
FAULTS: list[tuple[Plant, str, str]] = [
    (letters_lost, "sft", "round-trip"),
    (bos_twice, "sft", "double-bos"),
    (labels_shifted, "sft", "labels"),
    (positions_of_rows, "sft", "positions"),
    (everything_is_learnt, "sft", "mask-coverage"),
    (labels_lost, "sft", "loader-mask"),
    (end_of_turn_masked, "sft", "end-of-turn"),
    (asked_otherwise, "sft", "generation-prompt"),
    (drawn_with_replacement, "sft", "order"),
    (ranks_read_the_same, "sft", "rank-shares"),
    (copies_are_held_out, "sft", "held-out"),
    (nothing_is_masked, "sft", "causality"),
    (padding_counts, "sft", "padding"),
    (mean_loss, "sft", "accumulation"),
    (documents_see_each_other, "sft", "packing"),
    (cache_forgets, "sft", "cache"),
    (left_padding_is_seen, "sft", "ragged-prompts"),
    (loss_doubled, "sft", "first-loss"),
    (reference_is_another, "dpo", "first-loss"),
    (answers_see_each_other, "dpo", "prompt-sharing"),
    (answers_see_each_other, "reward", "prompt-sharing"),
    (gate_detached, "reward", "gradients"),
    (nothing_is_frozen, "sft", "frozen"),
    (uphill, "sft", "learns"),
    (reward_at_random, "ppo", "rewards"),
    (turns_never_end, "grpo", "stops"),
    (other_temperature("llmkit.training.policy"), "ppo", "sampler"),
    (other_temperature("llmkit.rollout.loss"), "ppo", "ratio"),
    (reference_moved, "grpo", "kl-zero"),
    (kl_turned_round, "ppo", "kl-sign"),
    (credit_turned_round, "ppo", "advantages"),
    (groups_turned_round, "grpo", "advantages"),
    (weights_scaled_on_disk, "sft", "save-load"),
    (optimizer_forgotten, "sft", "resume"),
]


def changes_for(plant: Plant, world: Path, tmp_path: Path) -> dict[str, Any]:
    if plant is nothing_is_frozen:
        return {"freeze": ["layers.0.mlp"]}
    if plant is copies_are_held_out:
        rows = (world / "sft.jsonl").read_text("utf-8")
        (tmp_path / "valid.jsonl").write_text(rows, "utf-8")
        return {"data": {"path": str(world / "sft.jsonl"), "valid": [{"path": str(tmp_path / "valid.jsonl")}]}}
    return {}


@pytest.mark.parametrize(("plant", "stage", "named"), FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_fault_is_found_by_its_check(
    plant: Plant, stage: str, named: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    only = [name for name in ALL if name not in SLOW or name == named]
    assert examined(world, tmp_path / "made", stage, only, **changes_for(plant, world, tmp_path)) == [named]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_nothing_is_found_where_nothing_is_wrong(stage: str, world: Path, tmp_path: Path) -> None:
    assert examined(world, tmp_path, stage, [name for name in ALL if name not in SLOW]) == []


@pytest.mark.campaign
@pytest.mark.parametrize(("plant", "stage", "named"), FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_no_other_check_finds_it(
    plant: Plant, stage: str, named: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs and transformers look too; only the other processes don't, for they have no patch."""
    plant(monkeypatch)
    only = [name for name in ALL if name != "ranks"]
    assert examined(world, tmp_path / "made", stage, only, **changes_for(plant, world, tmp_path)) == [named]


@pytest.mark.campaign
def test_ranks_that_average_are_found(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is in the other processes alone: their sums over ranks are means."""
    (tmp_path / "sitecustomize.py").write_text(
        "from llmkit.training.dist import Ranks\n"
        "real = Ranks.sum_\n"
        "Ranks.sum_ = lambda self, t: real(self, t).div_(self.world) if t.is_floating_point() and t.numel() > 99 "
        "else real(self, t)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert examined(world, tmp_path / "made", "sft", ALL) == ["ranks"]
