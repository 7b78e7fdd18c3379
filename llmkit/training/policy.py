"""The step shape of stages that train on a policy's own answers: collect -> updates -> collect.

A unit of progress is one update; the first on a rollout also collects it. A rollout is a function of the weights before
it and the run's seed, so one that is cut short is simply made again; between its updates it is part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import Interrupted, TrainingStopped, UserError
from llmkit.losses import LossSum
from llmkit.losses.logprobs import token_logprobs
from llmkit.losses.policy import Aggregation
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.plan import flops_per_token
from llmkit.rollout.answers import AnswerEval
from llmkit.rollout.batch import AnswerBatch, PolicyBatch, Rollouts, hidden_states
from llmkit.rollout.collector import Collector, described
from llmkit.rollout.environment import Environment, environment_of
from llmkit.rollout.loss import Surrogate, policy_loss
from llmkit.rollout.minibatch import micro_batches, minibatch, passes, tokens_hash
from llmkit.rollout.prompts import PromptData, PromptOrder, read_prompts
from llmkit.rollout.record import record
from llmkit.rollout.rewards.base import Rewards
from llmkit.rollout.vllm import Vllm, require_vllm
from llmkit.stages.recipes.policy import PolicyRecipe
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Engine, Metrics, seed_of
from llmkit.training.loop import Context, Outcome, Stop, Task, train
from llmkit.training.setup import (
    language_model,
    model_config,
    reference_of,
    refuse_changes,
    row_len,
    tokenizer_of,
)

# How far the first ratios of a rollout may be from 1: rounding alone makes them differ (B72).
_RATIO_LIMITS = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.1, "fp16": 0.1}
Ask = Callable[[AnswerBatch], Tensor]  # a number for each position [B, T]


class PolicyTask(Task):
    """What PPO and GRPO share. A stage adds what its answers are credited with, and its loss."""

    aggregation: Aggregation
    """How tokens are weighed in the loss."""
    needs_reference: bool
    needs_old: bool
    """Whether the log-probabilities of the policy that sampled must be known apart from those in the update."""

    def __init__(self, recipe: PolicyRecipe):
        self.recipe = recipe
        self.tokenizer: Tokenizer
        self.model_config: GPTConfig
        self.prompts: PromptData
        self.rewards: Rewards | None = None
        self.flops_per_token = 0.0
        self.drawn = 0  # prompts so far
        self.n_rollouts = 0
        self.cursor = 0  # updates made on the present rollout
        self.kl_coef = recipe.kl.coef
        self.rollouts: Rollouts | None = None
        self.answers: AnswerEval | None = None
        self.environment: Environment | None = None
        self.vllm: Vllm | None = None
        self._largest: dict[str, float] = {}
        """Numbers of an action, over this rank's micro-batches in the present update."""

    # --- what a stage adds -----------------------------------------------------------------------------------------

    def network(self, actor: GPT, ctx: Context) -> nn.Module:
        """The module that is trained: the policy, or the policy and a critic."""
        return actor

    def actor_of(self, module: nn.Module) -> GPT:
        """The policy in it."""
        assert isinstance(module, GPT)
        return module

    def credit(self, rollouts: Rollouts, engine: Engine, ctx: Context) -> tuple[Rollouts, Metrics]:
        """The rollout with its advantages, and what the log should say of that."""
        raise NotImplementedError

    def loss(self, module: nn.Module, batch: PolicyBatch) -> LossSum:
        """Sum over a micro-batch; its `stats` are sums over actions, `actions` among them."""
        raise NotImplementedError

    def resting(self, engine: Engine) -> Sequence[str]:
        """Parts that the next update leaves as they are."""
        return ()

    def wanted(self, rollouts: Rollouts) -> Tensor | None:
        """Which answers are worth an update, bool [N]: those of other groups are replaced by new ones. None: all."""
        return None

    # --- before the first step ---------------------------------------------------------------------------------------

    def read(self, ctx: Context) -> None:
        """Tokenizer and prompts."""
        recipe = self.recipe
        self.tokenizer = tokenizer_of(recipe, ctx.should_stop)
        shape = model_config(recipe, self.tokenizer.vocab_size)
        self.model_config = shape.model_copy(update={"dropout": 0.0})
        self.row_len = row_len(recipe, self.model_config)
        self.flops_per_token = flops_per_token(self.model_config, self.row_len)
        if recipe.data.chat and not self.tokenizer.ends_turns:
            raise UserError(
                "the chat template writes no control token after the assistant's turn, so no answer would ever end: "
                "choose another (tokenizer.chat_template)"
            )
        longest = self.row_len - recipe.rollout.max_new_tokens
        asked = recipe.rollout.max_prompt_len or longest
        if not 0 < asked <= longest:
            raise UserError(
                f"rollout.max_new_tokens ({recipe.rollout.max_new_tokens}) and prompts of {asked} tokens don't fit rows of "
                f"{self.row_len}: lower them, or raise batch.max_len up to model.max_seq_len"
            )
        self.prompts = read_prompts(
            recipe.data,
            self.tokenizer,
            asked,
            check=(lambda fields: None) if self.rewards is None else self.rewards.check,
            should_stop=ctx.should_stop,
            say=ctx.log.say,
        )

    def prepare(self, ctx: Context) -> None:
        """Tokenizer, rewards, and prompts that these can grade."""
        if self.recipe.rollout.engine == "vllm":
            require_vllm(ctx.ranks.device)
        if self.rewards is None:
            tokenizer = tokenizer_of(self.recipe, ctx.should_stop)
            self.rewards = Rewards(self.recipe.rewards, tokenizer, ctx.ranks.device)
        self.read(ctx)

    def build(self, ctx: Context) -> nn.Module:
        recipe = self.recipe
        assert self.rewards is not None
        self.environment = environment_of(recipe.environment, self.tokenizer)
        actor = language_model(recipe, self.model_config, self.tokenizer.vocab_size, ctx.ranks, ctx.log.say)
        module = self.network(actor, ctx)
        self.reference = (
            reference_of(recipe, actor, recipe.reference, self.tokenizer, ctx.ranks) if self.needs_reference else None
        )
        self.order = PromptOrder(self.prompts, seed_of(recipe.seed, "order"))
        if recipe.rollout.engine == "vllm":
            self.vllm = Vllm(recipe.rollout, self.tokenizer, ctx.ranks, Path(recipe.out))
        self.collector = Collector(
            recipe.rollout,
            self.tokenizer,
            self.rewards,
            ctx.ranks,
            recipe.seed,
            self.environment,
            self.vllm,
        )
        if recipe.eval.answers is not None:
            self.answers = AnswerEval(
                recipe.eval.answers,
                self.tokenizer,
                chat=recipe.data.chat,
                system=recipe.data.system,
                max_seq_len=self.model_config.max_seq_len,
                device=ctx.ranks.device,
            )
        self._all_prompts = self.prompts.all
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(ctx))
        return module

    @property
    def most_tokens(self) -> int:
        """Of a forward pass, padding included."""
        return self.recipe.batch.micro_tokens or 8192

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers to a prompt go through the policy behind one copy of it: not where a layer looks back over
        a window of columns, since the prompt may be out of its sight."""
        return self.model_config.sliding_window is None

    def close(self) -> None:
        """Ends the processes of graders and tools, and vLLM."""
        for held in (self.rewards, self.answers, self.environment, self.vllm):
            if held is not None:
                held.close()

    def _describe(self, ctx: Context) -> str:
        recipe, n = self.recipe, self.recipe.rollout.prompts_per_step * self.recipe.rollout.samples_per_prompt
        n_train, n_valid = (sum(map(len, s)) for s in (self.prompts.train, self.prompts.valid))
        steps = recipe.update.steps
        lines = [
            f"prompts    {n_train:,} to train on, {n_valid:,} held out"
            + (f"; {self.prompts.n_cut:,} were cut at their beginning" if self.prompts.n_cut else ""),
            f"rollout    {recipe.rollout.prompts_per_step} prompts x {recipe.rollout.samples_per_prompt} answers of at most "
            f"{recipe.rollout.max_new_tokens} tokens at temperature {recipe.rollout.temperature:g}, on {ctx.ranks.world} "
            f"rank(s){', by vLLM' if self.vllm is not None else ''}",
            f"updates    {recipe.update.minibatches} minibatch(es) of {n // recipe.update.minibatches} answers x "
            f"{recipe.update.epochs} epoch(s): {recipe.steps} steps are {-(-recipe.steps // steps)} rollouts",
        ]
        lines += [f"rewards    {line}" for line in self.rewards.describe()] if self.rewards is not None else []
        lines += [f"tools      {self.environment.describe()}"] if self.environment is not None else []
        return "\n".join(lines)

    # --- one update --------------------------------------------------------------------------------------------------

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        told: Metrics = {}
        answers = self._next_answers()
        while answers is None:
            told = self._collect(engine, ctx)
            answers = self._next_answers()
        ranks = ctx.ranks
        batches = micro_batches(
            answers,
            self.aggregation,
            self.recipe.rollout.max_new_tokens,
            self.most_tokens,
            ranks.rank,
            ranks.world,
            self.shares_prompts,
        )
        self._largest = {}
        metrics = engine.update(batches, self.loss, self._accept(engine, ctx), self.resting(engine))
        metrics |= self._means(engine) | told
        metrics["tokens"], metrics["data_hash"] = float(answers.lengths_N.sum()), tokens_hash(answers)
        metrics |= {name: ranks.max_number(self._largest.get(name, 0.0)) for name in self._largest_of}
        self.cursor += 1
        if self.cursor >= self.recipe.update.steps or metrics.get("stopped_early"):
            self.rollouts, self.cursor = None, 0
        return metrics

    def _next_answers(self) -> Rollouts | None:
        """The answers of the next update on this rollout, over those from which nothing is to be learnt; None: there is
        no other update on it."""
        said = self.recipe.update
        while self.rollouts is not None:
            if self.cursor >= said.steps:
                self.rollouts, self.cursor = None, 0
                break
            rows = minibatch(len(self.rollouts), said.minibatches, self.cursor, self.n_rollouts, self.recipe.seed)
            if self.rollouts.actions_NT[rows].any():
                return self.rollouts.rows(rows)
            self.cursor += 1
        return None

    def _accept(self, engine: Engine, ctx: Context) -> Callable[[Metrics], bool]:
        """Looks at an update before it is applied."""

        def accept(metrics: Metrics) -> bool:
            if self.cursor == 0 and self.needs_old:
                limit = _RATIO_LIMITS[self.recipe.precision]
                worst = self._largest.get("ratio_deviation", 0.0)
                if ctx.ranks.any(not worst <= limit):
                    raise TrainingStopped(
                        f"step {engine.step + 1}: before the first update on a rollout every ratio of the policy to itself "
                        f"is 1, but one is off by {worst:.2g} (limit {limit:g}): what is trained is not what is sampled"
                    )
            target = self.recipe.update.target_kl
            if target is None or self.cursor == 0:
                return True
            moved = self._means(engine)["approx_kl"]
            metrics["stopped_early"] = float(moved > target)
            return moved <= target

        return accept

    def policy_loss(self, actor: GPT, batch: PolicyBatch, surrogate: Surrogate, entropy: float) -> LossSum:
        """A surrogate with all that the recipe adds to it: see `rollout.loss`."""
        out, largest = policy_loss(
            actor,
            batch,
            surrogate,
            rollout=self.recipe.rollout,
            kl=self.recipe.kl,
            kl_coef=self.kl_coef,
            reference=self.reference,
            entropy=entropy,
            vocab_size=self.tokenizer.vocab_size,
        )
        for name, value in largest.items():
            self._largest[name] = max(self._largest.get(name, 0.0), value.item())
        return out

    @property
    def _largest_of(self) -> Sequence[str]:
        """What `policy_loss` tells the largest of, on every rank alike."""
        return (
            ("ratio_deviation",) if self.recipe.rollout.correction == "none" else ("ratio_deviation", "correction_max")
        )

    def _means(self, engine: Engine) -> Metrics:
        """The loss's statistics per action."""
        stats = {name: value.item() for name, value in engine.stats.items()}
        n = stats.pop("actions", 0.0)
        return {name: value / n for name, value in stats.items()} if n else {}

    # --- one rollout ---------------------------------------------------------------------------------------------------

    def _collect(self, engine: Engine, ctx: Context) -> Metrics:
        """Samples, grades and credits the answers of the next rollout.

        Raises Interrupted with nothing changed.
        """
        with engine.replica(averaged=False):
            return self._collected(engine, ctx)

    def _collected(self, engine: Engine, ctx: Context) -> Metrics:
        """The same with a policy and critic that every rank may ask by itself."""
        recipe, drawn = self.recipe, self.drawn
        self.collector.seconds = dict.fromkeys(self.collector.seconds, 0.0)
        rollouts, drawn, extra = self._sampled(engine, ctx, drawn)
        told = {**described(rollouts), **extra}
        rollouts = rollouts.without_ungraded()
        if not rollouts.n_actions:
            raise UserError("rewards: no answer of a rollout could be graded: see the graders' errors")
        asked: dict[str, Ask] = {}
        if self.needs_old:
            asked["old_NT"] = lambda batch: self.logprobs(self.actor_of(engine.asked), batch)
        if self.reference is not None:
            asked["ref_NT"] = self._ask_reference(engine)
        rollouts = rollouts.knowing(self.over_answers(rollouts, asked, engine, ctx))
        rollouts, credited = self.credit(rollouts, engine, ctx)
        self.rollouts, self.drawn, self.cursor = rollouts, drawn, 0
        self.n_rollouts += 1
        if not rollouts.n_actions:
            raise UserError(
                "nothing of a rollout is to be learnt: every answer was cut off: raise rollout.max_new_tokens"
            )
        told |= {**credited, **self._kl(rollouts)}
        if rollouts.old_NT is not None:
            gap_NT = (rollouts.old_NT - rollouts.sampler_NT).where(rollouts.actions_NT, 0.0)
            told["sampler_gap_max"] = gap_NT.abs().max().item()
        for part, n in self.collector.errors.items():
            if n:
                told[f"errors/{part}"] = n
        every = recipe.rollout.record_every
        if every is not None and (self.n_rollouts - 1) % every == 0 and ctx.ranks.is_main:
            record(ctx.out, self.n_rollouts, rollouts, self._all_prompts, self.tokenizer)
        ctx.log.timing({"step": engine.step + 1, **{k: round(v, 4) for k, v in self.collector.seconds.items()}})
        return {f"rollout/{name}": value for name, value in told.items()}

    def _sampled(self, engine: Engine, ctx: Context, drawn: int) -> tuple[Rollouts, int, Metrics]:
        """A rollout's graded answers, how many prompts are then drawn, and what the log should say."""
        with self.collector.writing(self.actor_of(engine.asked)):
            return self._drawn(engine, ctx, drawn)

    def _drawn(self, engine: Engine, ctx: Context, drawn: int) -> tuple[Rollouts, int, Metrics]:
        """The same, with the engine that writes at hand."""
        n_prompts, actor = self.recipe.rollout.prompts_per_step, self.actor_of(engine.asked)
        dtype = engine.flat_grad.dtype
        rollouts = self.collector.draw(actor, self.order, drawn, n_prompts, ctx.should_stop, dtype)
        drawn += n_prompts
        wanted_N = self.wanted(rollouts)
        if wanted_N is None:
            return rollouts, drawn, {}
        kept = rollouts.rows(wanted_N.nonzero()[:, 0])
        n_answers, n_tried = len(rollouts), n_prompts
        for _ in range(self.recipe.rollout.max_refills):
            if len(kept) >= n_answers:
                break
            more = self.collector.draw(actor, self.order, drawn, n_prompts, ctx.should_stop, dtype)
            drawn, n_tried = drawn + n_prompts, n_tried + n_prompts
            fresh = self.wanted(more)
            assert fresh is not None
            kept = kept.joined([more.rows(fresh.nonzero()[:, 0])])
        if (
            len(kept) < n_answers
        ):  # the rest is filled up with groups that teach nothing, so that sizes stay what they are
            spare = (~wanted_N).nonzero()[:, 0][: n_answers - len(kept)]
            kept = kept.joined([rollouts.rows(spare)]) if len(kept) else rollouts.rows(spare)
        told = {"prompts_tried": float(n_tried)}
        return kept.rows(torch.arange(n_answers)), drawn, told

    def logprobs(self, model: GPT, batch: AnswerBatch) -> Tensor:
        """Log-probabilities [B, T] of the labels under a model at the rollout's temperature; 0 where there is none."""
        return token_logprobs(
            hidden_states(model, batch),
            model.head_weight,
            batch.labels_BT,
            temperature=self.recipe.rollout.temperature,
            vocab_size=self.tokenizer.vocab_size,
        )[0]

    def _ask_reference(self, engine: Engine) -> Ask:
        reference = self.reference
        assert reference is not None

        def ask(batch: AnswerBatch) -> Tensor:
            with reference(self.actor_of(engine.asked)) as model:
                return self.logprobs(model, batch)

        return ask

    def over_answers(
        self, rollouts: Rollouts, asked: dict[str, Ask], engine: Engine, ctx: Context
    ) -> dict[str, Tensor]:
        """Functions of answers over all of them, in the forward passes' sizes of an update; each rank computes a
        share, all get the whole [N, T]."""
        labels_NT, ranks = rollouts.labels_NT, ctx.ranks
        found = {name: torch.zeros(rollouts.ids_NT.shape, dtype=engine.flat_grad.dtype) for name in asked}
        for rows, shared in passes(rollouts, self.most_tokens, ranks.rank, ranks.world, self.shares_prompts):
            width = int(rollouts.lengths_N[rows].max())
            ids_BT, labels_BT = (t[rows][:, :width] for t in (rollouts.ids_NT, labels_NT))
            batch = AnswerBatch(ids_BT, labels_BT, rollouts.prompt_lengths_N[rows], shared).to(ranks.device)
            padding_BT = torch.arange(width) >= rollouts.lengths_N[rows, None]
            with torch.no_grad():
                for name, ask in asked.items():
                    told_BT = ask(batch).to("cpu", found[name].dtype)
                    found[name][rows, :width] = told_BT.masked_fill(padding_BT, 0.0)
        return {name: ranks.sum_(t.to(ranks.device)).cpu() for name, t in found.items()}

    def _kl(self, rollouts: Rollouts) -> Metrics:
        """How far the policy that sampled is from the reference, and with a target the weight that follows from it."""
        kl = self.recipe.kl
        if rollouts.ref_NT is None:
            return {}
        policy_NT = rollouts.sampler_NT if rollouts.old_NT is None else rollouts.old_NT
        log_ratio_NT = (policy_NT - rollouts.ref_NT).where(rollouts.actions_NT, 0.0)
        answers = rollouts.actions_NT.any(1)
        per_answer = (log_ratio_NT.sum() / answers.sum()).item()
        k3 = torch.expm1(-log_ratio_NT) + log_ratio_NT
        told = {
            "kl_sum": per_answer,
            "kl_mean": (log_ratio_NT.sum() / rollouts.n_actions).item(),
            "k3_mean": (k3.sum() / rollouts.n_actions).item(),
            "kl_coef": self.kl_coef,
        }
        if kl.target is not None:
            error = min(max(per_answer / kl.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * len(rollouts) / kl.horizon
        return told

    # --- evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """Answers to held-out prompts, sampled and graded as in training; and `eval.answers`."""
        metrics: Metrics = {}
        rows = [row for source in (self.prompts.valid if split == "valid" else self.prompts.test) for row in source]
        rows = rows[: self.recipe.eval.max_prompts]
        try:
            if rows:
                with engine.replica() as module:
                    actor = self.actor_of(module)
                    groups, dtype = [row.number for row in rows], engine.flat_grad.dtype
                    with self.collector.writing(actor):
                        answers = self.collector.answers(actor, rows, groups, "evaluation", ctx.should_stop, dtype)
                    if self.reference is not None:
                        asked: dict[str, Ask] = {"ref_NT": self._ask_reference(engine)}
                        if self.recipe.rollout.correction != "none":  # what sampled is not the policy
                            asked["old_NT"] = lambda batch: self.logprobs(self.actor_of(engine.asked), batch)
                        found = self.over_answers(answers, asked, engine, ctx)
                        own_NT = found.get("old_NT", answers.sampler_NT)
                        gap_NT = (own_NT - found["ref_NT"]).where(answers.actions_NT, 0.0)
                        metrics[f"{split}/kl_sum"] = (gap_NT.sum() / len(answers)).item()
                metrics |= {f"{split}/{name}": value for name, value in described(answers).items()}
            if self.answers is not None and split == "valid":
                with engine.replica() as module:
                    found_answers = self.answers.evaluate(self.actor_of(module), ctx, engine.step)
                if found_answers is None:
                    return None
                metrics |= found_answers
        except Interrupted:
            return None
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    # --- state -----------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.prompts.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.facts(),
            "drawn": self.drawn,
            "n_rollouts": self.n_rollouts,
            "cursor": self.cursor,
            "kl_coef": self.kl_coef,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The rollout, as long as there are updates to be made on it."""
        return {} if self.rollouts is None else self.rollouts.tensors()

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        refuse_changes(self.recipe, self.facts(), state)
        self.drawn, self.n_rollouts = state["drawn"], state["n_rollouts"]
        self.cursor, self.kl_coef = state["cursor"], state["kl_coef"]
        self.rollouts = Rollouts.of(tensors) if tensors else None


# --- commands --------------------------------------------------------------------------------------------------------


def run_policy(recipe: PolicyRecipe, task: PolicyTask) -> Outcome:
    """`llmkit train`."""
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare_policy(recipe: PolicyRecipe) -> bool | None:
    """`llmkit prepare`: reads the prompts as a run would; None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            tokenizer = tokenizer_of(recipe, lambda: bool(stop))
            length = row_len(recipe, model_config(recipe, tokenizer.vocab_size))
            longest = length - recipe.rollout.max_new_tokens
            data = read_prompts(recipe.data, tokenizer, max(1, longest), should_stop=lambda: bool(stop), say=print)
        except Interrupted:
            return None
    for split in ("train", "valid", "test"):
        for rows in getattr(data, split):
            print(f"{split:5s} {len(rows):,} prompts, the longest has {max(len(row.ids) for row in rows)} tokens")
    return True
