"""Checks of learning from a policy's own answers: ratio, KL, rewards, advantages."""

from __future__ import annotations

import math
from typing import Any

import torch

from llmkit.advantages import shaped_rewards
from llmkit.config import TrainingStopped, UserError
from llmkit.inference.config import SamplingConfig
from llmkit.rollout.collect import Sampled
from llmkit.rollout.prompts import PromptOrder
from llmkit.rollout.rewards.base import Rewards
from llmkit.tools.doctor.check import Check
from llmkit.tools.doctor.patient import NotHere, Patient, Trainer
from llmkit.training.engine import seed_of

_NEAR = 1e-7


def _policy(patient: Patient) -> None:
    if not patient.is_policy:
        raise NotHere("no answers are sampled")


def _first_step(small: Trainer) -> dict[str, float]:
    found: dict[str, float] = small.task.step(small.engine, small.ctx)
    return found


def _sampler(patient: Patient) -> str | None:
    """What the sampler says of a token is what the trainer says of it."""
    _policy(patient)
    if patient.recipe.rollout.correction != "none":
        raise NotHere("rollout.correction: the sampler draws from another distribution")
    with patient.trainer() as small:
        task, ctx = small.task, small.ctx
        rollouts, _, _ = task._sampled(small.engine, ctx, 0)
        with small.engine.evaluating():
            found = task.over_answers(rollouts, {"own": lambda b: task.logprobs(task.actor_of(small.engine.module), b)},
                                      small.engine, ctx)  # fmt: skip
    gap = (found["own"] - rollouts.sampler_NT).where(rollouts.actions_NT, 0.0).abs().max().item()
    return None if gap <= 1e-6 else f"the two differ by up to {gap:.2g} nats"


def _ratio(patient: Patient) -> str | None:
    _policy(patient)
    with patient.trainer() as small:
        try:
            metrics = _first_step(small)
        except TrainingStopped as e:
            return str(e)
    off = metrics["ratio_deviation"]
    return None if off <= _NEAR else f"before the first update a ratio is off by {off:.2g} from 1"


def _kl_zero(patient: Patient) -> str | None:
    _policy(patient)
    with patient.trainer() as small:
        metrics = _first_step(small)
    found = max(abs(metrics[f"rollout/{name}"]) for name in ("kl_sum", "k3_mean"))
    return (
        None
        if found <= _NEAR
        else f"policy and reference are one model, but their KL is {metrics['rollout/kl_sum']:.3g}"
    )


def _kl_sign(patient: Patient) -> str | None:
    """The KL is above 0 for a policy that moved, and is a cost."""
    _policy(patient)
    with patient.trainer() as small:
        task = small.task
        _first_step(small)
        rollouts = task.rollouts
        assert rollouts is not None
        own = rollouts.sampler_NT if rollouts.old_NT is None else rollouts.old_NT
        moved = rollouts.knowing({"ref_NT": (own - 0.25).where(rollouts.actions_NT, 0.0)})
        told = task._kl(moved)["kl_mean"]
    if not math.isclose(told, 0.25, rel_tol=1e-6):
        return f"answers that are 0.25 nats a token likelier than under the reference have a KL of {told:.3g} a token"
    actions = torch.ones(1, 4, dtype=torch.bool)
    kl, score = torch.full((1, 4), 0.25, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    total = float(shaped_rewards(score, actions, kl, 0.1).sum())
    return (
        None if abs(total - 0.9) < 1e-9 else f"a KL of 1 at a weight of 0.1 makes a reward of 1 to {total:.3g}, not 0.9"
    )


def _advantages(patient: Patient) -> str | None:
    """Better answers get larger advantages."""
    _policy(patient)
    with patient.trainer() as small:
        small.task.step(small.engine, small.ctx)
        rollouts = small.task.rollouts
        assert rollouts is not None
        scores = torch.linspace(-1, 1, len(rollouts), dtype=rollouts.scores_N.dtype)
        if patient.recipe.stage == "grpo":  # compared with the others to its prompt
            scores = torch.arange(len(rollouts), dtype=scores.dtype) % patient.small.rollout.samples_per_prompt
        changes: dict[str, Any] = {"scores_N": scores}
        if rollouts.values_NT is not None:
            changes["values_NT"] = torch.zeros_like(rollouts.values_NT)
        if rollouts.ref_NT is not None:
            changes["ref_NT"] = rollouts.sampler_NT if rollouts.old_NT is None else rollouts.old_NT
        given = rollouts.knowing(changes)
        with small.engine.evaluating():
            if patient.recipe.stage == "ppo":
                critic: Any = small.engine.module.critic
                critic.score.weight.data.zero_()
            credited, _ = small.task.credit(given, small.engine, small.ctx)
    mean_N = credited.advantages_NT.sum(1) / credited.actions_NT.sum(1).clamp(min=1)
    worst, best = mean_N[scores == scores.min()].mean(), mean_N[scores == scores.max()].mean()
    return None if best > worst else f"the best answers have an advantage of {best:.3f}, the worst {worst:.3f}"


def _rewards(patient: Patient) -> str | None:
    """The recipe's own rewards say the same of the same answer, whatever stands beside it."""
    _policy(patient)
    task, recipe = patient.task, patient.recipe
    order = PromptOrder(task.prompts, seed_of(recipe.seed, "order"))
    rows = order.draw(0, 6)
    try:
        rewards = Rewards(recipe.rewards, patient.tokenizer)
    except UserError as e:
        raise NotHere(str(e)) from None
    try:
        answers = []
        for i, row in enumerate(rows):
            text = str(row.fields.get("answer") or row.fields.get("expected") or f"answer {i}")
            ids = patient.tokenizer.encode(text)
            whole = [*row.ids, *ids, patient.tokenizer.end_of_turn_id]
            actions = [False] * len(row.ids) + [True] * (len(ids) + 1)
            prompt = [] if isinstance(row.prompt, str) else list(row.prompt)
            made = Sampled(row, i, whole, actions, [0.0] * len(whole), prompt, text, finished=True)
            answers.append(made.answer())
        first = rewards.score(answers).total
        again = rewards.score(answers).total
        turned = rewards.score(answers[::-1]).total[::-1]
    finally:
        rewards.close()
    for i, (a, b, c) in enumerate(zip(first, again, turned, strict=True)):
        if not (_same(a, b) and _same(a, c)):
            return f"the answer to prompt {i} got {a:.6g}, then {b:.6g}, and in another order {c:.6g}"
    return None


def _same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)


def _stops(patient: Patient) -> str | None:
    """A model that ends its turn is seen to have ended it."""
    _policy(patient)
    from llmkit.inference.generate import generate

    with patient.trainer() as small:
        actor, tokenizer = small.task.actor_of(small.engine.module), small.task.tokenizer
        end = tokenizer.end_of_turn_id if patient.recipe.data.chat else tokenizer.eos_id
        name = tokenizer.decode([end], skip_special=False)
        order = PromptOrder(small.task.prompts, 0)
        sampling = SamplingConfig(max_new_tokens=6, temperature=0.0, logit_bias={name: 100.0})
        made = generate(actor, [order.draw(0, 1)[0].ids], sampling, tokenizer=tokenizer)[0]
    if made.finish_reason == "stop" and made.ids[-1] == end:
        return None
    return f"it writes {name} at once, and generation goes on to {len(made.ids)} tokens ({made.finish_reason})"


CHECKS = (
    Check("rewards", "the same answer gets the same reward", "a grader that draws at random, or keeps a state",
          "make the function pure; seed what it draws by the answer", _rewards),
    Check("stops", "an answer that ends its turn is over", "the end of turn is none of the stop tokens",
          "see `llmkit inspect`; choose a template with a control token at the end of turns", _stops, ("cache",)),
    Check("sampler", "sampler and trainer say the same of a token", "another temperature, dropout, or a cache that is off",
          "leave top_k, top_p and min_p alone, or set rollout.correction", _sampler, ("cache", "ragged-prompts", "stops")),
    Check("ratio", "before the first update every ratio is 1", "old log-probabilities of other weights, temperature or "
          "shape", "compute them as the update does; no dropout", _ratio, ("sampler",)),
    Check("kl-zero", "policy and reference begin as one model", "a reference that is another model or was not frozen",
          "leave `reference` out, or name the policy's own init_from", _kl_zero, ("ratio",)),
    Check("kl-sign", "a policy that moved has a KL above 0, which costs reward", "log-ratio taken the wrong way round",
          "KL is the mean of log policy - log reference over the policy's own tokens", _kl_sign, ("ratio",)),
    Check("advantages", "better answers get larger advantages", "a sign, or groups that are mixed up",
          "an advantage is the reward minus what was expected", _advantages, ("ratio",)),
)  # fmt: skip
