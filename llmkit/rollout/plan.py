"""`llmkit plan` of stages that train on a policy's own answers: every model that is held, and the rollout's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmkit.config import UserError
from llmkit.model.config import GPTConfig, count_params
from llmkit.model.hf import read_config
from llmkit.plan import Cost, cost_of, require_memory
from llmkit.rollout.rewards.config import ModelReward
from llmkit.stages.recipes.policy import PolicyRecipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device
from llmkit.training.setup import model_config, row_len, trained_share

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def _cost(recipe: PolicyRecipe, config: GPTConfig) -> Cost:
    length = row_len(recipe, config)
    return cost_of(
        config,
        seq_len=length,
        micro_tokens=max(length, recipe.batch.micro_tokens or 8192),
        precision=recipe.precision,
        optimizer=recipe.optim.name,
        loss_chunk=recipe.loss_chunk,
        activation_checkpointing=recipe.activation_checkpointing,
        ema=recipe.optim.ema_decay is not None,
        momentum=bool(recipe.optim.momentum),
        **trained_share(recipe, config),
    )


def plan_policy(recipe: PolicyRecipe, critic: str | None) -> Iterator[str]:
    """What a run would hold and do, line by line.

    Args:
        critic: the model that a critic starts as; empty for the policy's own shape; None: there is no critic.

    Raises:
        UserError: when all is said, if what must be held can't fit here.
    """
    section = recipe.text_tokenizer
    if section.path is None:
        raise UserError("plan: the tokenizer is that of init_from, or a folder: this recipe names neither")
    path = resolve_model(section.path) if section.path == recipe.init_from else section.path
    vocab = Tokenizer.from_config(section.model_copy(update={"path": str(path)})).vocab_size
    policy = model_config(recipe, vocab)
    width = BYTES[recipe.precision]
    costs = _cost(recipe, policy)
    held, steps = costs.state_bytes, recipe.update.steps
    n = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    yield f"policy       {costs.n_params:,} parameters, {policy.family}: {costs.state_bytes / 1e9:.3f} GB to train"
    checkpoint = costs.checkpoint_bytes
    if critic is not None:
        shape = read_config(resolve_model(critic)) if critic else policy
        value = _cost(recipe, shape)
        held, checkpoint = held + value.state_bytes, checkpoint + value.checkpoint_bytes
        yield f"critic       {value.n_params:,} parameters: {value.state_bytes / 1e9:.3f} GB to train"
    if recipe.kl.where != "none":
        n_bytes = 0 if recipe.lora is not None and recipe.reference is None else costs.n_params * width
        held += n_bytes
        told = f"{n_bytes / 1e9:.3f} GB" if n_bytes else "the policy without its adapters: nothing"
        yield f"reference    {told}"
    for reward in recipe.rewards:
        if isinstance(reward, ModelReward):
            n_bytes = count_params(read_config(resolve_model(reward.path))).total * width
            held += n_bytes
            yield f"reward model {reward.path}: {n_bytes / 1e9:.3f} GB"
    rows = min(n, recipe.rollout.batch_size)
    cache = 2 * policy.n_layers * policy.kv_heads * policy.width_of_head * row_len(recipe, policy) * rows * width
    yield f"rollout      {n:,} answers of at most {recipe.rollout.max_new_tokens:,} tokens; cache {cache / 1e9:.3f} GB"
    yield f"updates      {recipe.steps:,} in {-(-recipe.steps // steps):,} rollouts of {steps}"
    peak = held + max(cache, costs.activation_bytes)
    yield f"memory       {peak / 1e9:.3f} GB: {held / 1e9:.3f} held, and the larger of cache and activations"
    yield f"checkpoint   {checkpoint / 1e9:.3f} GB each, {recipe.save.keep + recipe.save.keep_best} kept"
    require_memory(replace(costs, state_bytes=held), pick_device(recipe.device))
