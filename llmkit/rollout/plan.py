"""`llmkit plan` of stages that train on a policy's own answers: every model that is held, and the rollout's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmkit.config import UserError
from llmkit.model.config import GPTConfig
from llmkit.model.hf import read_config
from llmkit.plan import BYTES, Cost, cost_of, require_memory
from llmkit.plan.job import Job, Net, Pass
from llmkit.rollout.rewards.config import ModelReward
from llmkit.stages.recipes.policy import PolicyRecipe
from llmkit.storage import resolve_model
from llmkit.training.dist import pick_device
from llmkit.training.jobs import frozen_net, job_of
from llmkit.training.setup import most_rows, planned_config, row_len, trained_share


def _shape(recipe: PolicyRecipe) -> GPTConfig:
    """The policy's."""
    section = recipe.text_tokenizer
    if section.path is None:
        raise UserError("plan: the tokenizer is that of init_from, or a folder: this recipe names neither")
    return planned_config(recipe)


def _length(recipe: PolicyRecipe, config: GPTConfig) -> int:
    """Prompt and answer together, at most."""
    new, longest = recipe.rollout.max_new_tokens, row_len(recipe, config)
    return longest if recipe.rollout.max_prompt_len is None else min(longest, recipe.rollout.max_prompt_len + new)


def _cost(recipe: PolicyRecipe, config: GPTConfig) -> Cost:
    length = _length(recipe, config)
    n_answers = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt // recipe.update.minibatches
    return cost_of(
        config,
        seq_len=length,
        micro_tokens=min(most_rows(recipe, length), n_answers) * length,
        precision=recipe.precision,
        optimizer=recipe.optim.name,
        loss_chunk=recipe.loss_chunk,
        activation_checkpointing=recipe.activation_checkpointing,
        ema=recipe.optim.ema_decay is not None,
        momentum=bool(recipe.optim.momentum),
        **trained_share(recipe, config),
    )


def policy_nets(recipe: PolicyRecipe, critic: str | None) -> list[Net]:
    """All that a run holds, the policy first; see `plan_policy`."""
    shape, precision = _shape(recipe), recipe.precision
    nets = [Net("policy", shape, precision, _cost(recipe, shape))]
    if critic is not None:
        other = read_config(resolve_model(critic)) if critic else shape
        nets.append(Net("critic", other, precision, _cost(recipe, other)))
    if recipe.kl.where != "none":
        if recipe.reference is not None:
            nets.append(frozen_net("reference", read_config(resolve_model(recipe.reference)), precision))
        elif recipe.lora is None:
            nets.append(frozen_net("reference", shape, precision))
    for reward in recipe.rewards:
        if isinstance(reward, ModelReward):
            nets.append(frozen_net(f"reward model {reward.path}", read_config(resolve_model(reward.path)), precision))
    return nets


def policy_job(stage: str, recipe: PolicyRecipe, critic: str | None, asks_old: bool) -> Job:
    """What a run does, spread over the optimizer steps that one rollout serves.

    Args:
        stage: its name.
        recipe: its recipe.
        critic: as in `plan_policy`.
        asks_old: whether the policy is asked for its answers' log-probabilities before the updates.
    """
    nets, rollout, steps = policy_nets(recipe, critic), recipe.rollout, recipe.update.steps
    policy, length = nets[0], _length(recipe, nets[0].model)
    n, new = rollout.prompts_per_step * rollout.samples_per_prompt, rollout.max_new_tokens
    in_update, tokens = n // recipe.update.minibatches, float(n * length) / steps
    passes = [Pass(policy, "write", n * new / steps, length, min(n, rollout.batch_size), new)]
    if asks_old:
        passes.append(Pass(policy, "ask", tokens, length))
    if recipe.kl.where != "none" and not any(net.role == "reference" for net in nets):
        passes.append(Pass(policy, "ask", tokens, length))  # without its adapters
    for net in nets[1:]:
        passes.append(Pass(net, "ask", tokens, length, with_head=net.role == "reference"))
    for net in nets:
        if net.trained:
            passes.append(Pass(net, "train", float(in_update * length), length, with_head=net is policy))

    def micro(n_data: int) -> int:
        return max(1, min(most_rows(recipe, length), in_update // n_data))

    note = f"prompts of {length - new:,} tokens and answers of {new:,}: the longest there may be"
    return job_of(stage, recipe, nets, passes, in_update, length, micro, [note])


def plan_policy(recipe: PolicyRecipe, critic: str | None) -> Iterator[str]:
    """What a run would hold and do, line by line.

    Args:
        critic: the model that a critic starts as; empty for the policy's own shape; None: there is no critic.

    Raises:
        UserError: when all is said, if what must be held can't fit here.
    """
    nets = policy_nets(recipe, critic)
    policy, costs, width = nets[0].model, nets[0].cost, BYTES[recipe.precision]
    held, checkpoint = sum(net.state_bytes for net in nets), sum(n.cost.checkpoint_bytes for n in nets if n.trained)
    n, steps = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt, recipe.update.steps
    yield f"policy       {costs.n_params:,} parameters, {policy.family}: {costs.state_bytes / 1e9:.3f} GB to train"
    for net in nets[1:]:
        if net.trained:
            yield f"critic       {net.cost.n_params:,} parameters: {net.cost.state_bytes / 1e9:.3f} GB to train"
    if recipe.kl.where != "none":
        reference = [net.state_bytes for net in nets if net.role == "reference"]
        told = f"{reference[0] / 1e9:.3f} GB" if reference else "the policy without its adapters: nothing"
        yield f"reference    {told}"
    for net in nets:
        if net.role.startswith("reward model"):
            yield f"{net.role}: {net.state_bytes / 1e9:.3f} GB"
    rows = min(n, recipe.rollout.batch_size)
    cache = 2 * policy.n_layers * policy.kv_heads * policy.width_of_head * _length(recipe, policy) * rows * width
    where = f"cache {cache / 1e9:.3f} GB"
    if recipe.rollout.engine == "vllm":
        share, cache = recipe.rollout.vllm.memory_frac, 0
        where = f"vLLM takes {share:.0%} of each device's memory beside what is counted here"
        where += ", while it writes" if recipe.rollout.vllm.sleep else ""
    activations = max(net.cost.activation_bytes for net in nets if net.trained)
    yield f"rollout      {n:,} answers of at most {recipe.rollout.max_new_tokens:,} tokens; {where}"
    yield f"updates      {recipe.steps:,} in {-(-recipe.steps // steps):,} rollouts of {steps}"
    peak = held + max(cache, activations)
    yield (
        f"memory       {peak / 1e9:.3f} GB: {held / 1e9:.3f} held, and the larger of cache and activations; "
        f"{checkpoint / 1e9:.3f} GB more of main memory to save from"
    )
    yield f"checkpoint   {checkpoint / 1e9:.3f} GB each, {recipe.save.keep + recipe.save.keep_best} kept"
    if recipe.parallel.shard == "none" and recipe.parallel.tensor == recipe.parallel.experts == 1:
        require_memory(replace(costs, state_bytes=held), pick_device(recipe.device))
