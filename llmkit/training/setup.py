"""What the stages that train a network share: its tokenizer, shape and first weights, the sizes of a step, its cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkit.config import UserError
from llmkit.data.config import DataConfig
from llmkit.data.loader import RowLoader, RowMaker
from llmkit.data.texts import obtain_tokenizer
from llmkit.model.adapters import base_named, refuse_other_base
from llmkit.model.config import GPTConfig
from llmkit.model.context import Context
from llmkit.model.first import make
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.hf import read_config
from llmkit.model.lora import adapter_size, adapters_of, apply_lora, describe, heads_of, without_adapters
from llmkit.model.weights import LoadReport, load_model, load_weights
from llmkit.plan import Cost, cost_of, require_memory
from llmkit.stages.recipes import ModelRecipe
from llmkit.storage import checkpoints_of, resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import Ranks, pick_device
from llmkit.training.engine import PRECISIONS, seed_of
from llmkit.training.freeze import frozen_names
from llmkit.training.optim import hidden_matrices
from llmkit.training.parallel import is_spread

# Fields of `model` that may differ from the old model's with `init_from`: no weight changes its meaning with them.
_FREE = {
    "vocab_size",
    "max_seq_len",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "n_full_layers",
    "causal",
    "dropout",
}


# --- tokenizer and shape ---------------------------------------------------------------------------------------------


def tokenizer_of(recipe: ModelRecipe, should_stop: Callable[[], bool] | None = None) -> Tokenizer:
    """The recipe's tokenizer, loaded or trained.

    Raises:
        Interrupted: should_stop() said so while it was trained.
        UserError: with `init_from`, if the tokenizer gives other meanings to the old model's ids.
    """
    config = recipe.text_tokenizer
    if recipe.tokenizer_from is not None and config.path == recipe.tokenizer_from:
        config = config.model_copy(update={"path": str(resolve_model(recipe.tokenizer_from))})
    tokenizer = obtain_tokenizer(config, recipe.data, Path(recipe.out) / "tokenizer", should_stop)
    if recipe.init_from is None:
        return tokenizer
    folder = resolve_model(recipe.init_from)
    if (folder / "tokenizer.json").is_file():
        _check_same_ids(Tokenizer.load(folder), tokenizer, recipe.init_from)
    return tokenizer


def _check_same_ids(old: Tokenizer, new: Tokenizer, name: str) -> None:
    """A model's embedding means nothing to another tokenizer; one with more tokens at the end is no other."""
    for i in range(old.vocab_size):
        ours, theirs = old.token_bytes(i), new.token_bytes(i) if i < new.vocab_size else b""
        if ours != theirs:
            raise UserError(
                f"tokenizer: id {i} is {theirs!r}, but {ours!r} to the model of init_from ({name}): leave `tokenizer` "
                "out to keep its own, or extend that with `tokenizer: {path: ..., add: [...]}`"
            )


def model_config(recipe: ModelRecipe, vocab_size: int) -> GPTConfig:
    """The network's shape, with its vocabulary filled in: the tokenizer's size, rounded up to a multiple of 64.

    With `init_from` it is the old model's, but for what `model` says of the few things that may change.
    """
    rounded = -(-vocab_size // 64) * 64
    if recipe.init_from is None:
        assert recipe.model is not None
        given = recipe.model
    else:
        given = _changed(read_config(resolve_model(recipe.init_from)), recipe)
        if given.vocab_size is not None and given.vocab_size < vocab_size:
            given = given.model_copy(update={"vocab_size": rounded})
    if given.vocab_size is None:
        return given.model_copy(update={"vocab_size": rounded})
    if given.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size ({given.vocab_size}) is below the tokenizer's {vocab_size}: set {rounded}")
    return given


def _changed(old: GPTConfig, recipe: ModelRecipe) -> GPTConfig:
    if recipe.model is None:
        return old
    said = {name: getattr(recipe.model, name) for name in recipe.model.model_fields_set}
    for name, value in said.items():
        if name not in _FREE and value != getattr(old, name):
            raise UserError(
                f"model.{name} ({value}): the model of init_from ({recipe.init_from}) has {getattr(old, name)}: leave "
                f"it out; only {', '.join(sorted(_FREE))} may change"
            )
    if said.get("vocab_size") is None:
        said.pop("vocab_size", None)
    try:
        return GPTConfig.model_validate({**dict(old), **said})
    except ValueError as e:
        raise UserError(f"model: with the shape of init_from ({recipe.init_from}): {_reason(e)}") from None


def _reason(error: ValueError) -> str:
    """What a validator said, without pydantic's frame."""
    errors = getattr(error, "errors", None)
    return str(errors()[0]["msg"]).removeprefix("Value error, ") if errors else str(error)


def refuse_changes(recipe: ModelRecipe, facts: dict[str, str], state: dict[str, Any]) -> None:
    """Raises UserError if a run is resumed with other data or another tokenizer, unless the recipe allows it."""
    for key, value in facts.items():
        if state[key] != value and not recipe.allow_changes:
            raise UserError(
                f"{recipe.out}: the {key} is not what the run was started with (hash {value[:12]}, then "
                f"{state[key][:12]}): put it back, choose another `out`, or allow it with allow_changes=true"
            )


# --- sizes -----------------------------------------------------------------------------------------------------------


def row_len(recipe: ModelRecipe, config: GPTConfig) -> int:
    """Tokens of a row. Raises UserError if the model can't take so many."""
    if recipe.batch.max_len is not None and recipe.batch.max_len > config.max_seq_len:
        raise UserError(
            f"batch.max_len ({recipe.batch.max_len}) is above the model's max_seq_len ({config.max_seq_len})"
        )
    return recipe.batch.max_len or config.max_seq_len


def rows_per_step(recipe: ModelRecipe, row_len: int) -> int:
    """Rows of one optimizer step. Raises UserError unless they make up tokens_per_step exactly."""
    if recipe.batch.examples_per_step is not None:
        return recipe.batch.examples_per_step
    tokens = recipe.batch.tokens_per_step
    if tokens % row_len:
        below, above = tokens // row_len * row_len, (tokens // row_len + 1) * row_len
        raise UserError(
            f"batch.tokens_per_step ({tokens}) is no multiple of the row length {row_len}: set "
            + (f"{below} or {above}" if below else str(above))
        )
    return tokens // row_len


def micro_rows(recipe: ModelRecipe, rows: int, row_len: int) -> int:
    """Rows of one forward pass: as many as divide the rank's share and hold at most micro_tokens."""
    limit = most_rows(recipe, row_len)
    pairs = ((n, rows // n) for n in range(1, math.isqrt(rows) + 1) if rows % n == 0)
    return max(n for pair in pairs for n in pair if n <= limit)


def most_rows(recipe: ModelRecipe, row_len: int) -> int:
    """Rows that micro_tokens hold."""
    return max(1, (recipe.batch.micro_tokens or 8192) // row_len)


def text_loader(recipe: ModelRecipe, rows: RowMaker, ranks: Ranks, held_out: bool = False) -> RowLoader:
    """Loads rows of text: those of a run in its order, or those of a held-out split one after the other."""
    length, world = rows.row_len, ranks.world // ranks.context
    n_rows = most_rows(recipe, length) * world if held_out else rows_per_step(recipe, length)
    return RowLoader(
        rows,
        rows_per_step=n_rows,
        seed=seed_of(recipe.seed, "order"),
        weights=None if held_out else mixture_weights(recipe.data, rows.n_rows),
        rank=ranks.rank // ranks.context,
        world=world,
        micro_rows=micro_rows(recipe, n_rows // world, length),
        prefetch=0 if held_out else 2,
        context=context_of(ranks),
    )


def context_of(ranks: Ranks) -> Context | None:
    """Which positions of its rows this process computes; None: all."""
    return Context(ranks.context, ranks.rank % ranks.context, ranks.context_group) if ranks.context > 1 else None


# --- networks --------------------------------------------------------------------------------------------------------


def where_built(recipe: ModelRecipe, ranks: Ranks) -> AbstractContextManager[Any]:
    """Where a network is built that is to be trained: on the CPU, or, if it will be spread over processes, without memory.

    A base in 4 bits is packed when it has its weights; `Split` refuses it.
    """
    packed = recipe.lora is not None and recipe.lora.quantize is not None
    return torch.device("meta") if is_spread(recipe.parallel, ranks) and not packed else nullcontext()


def language_model(
    recipe: ModelRecipe, config: GPTConfig, n_tokens: int, ranks: Ranks, say: Callable[[str], None]
) -> GPT:
    """The network to be trained, with its first weights: drawn, or those of init_from; with `lora` beside adapters."""
    with where_built(recipe, ranks):
        model = GPT(config, recipe.activation_checkpointing)
    if recipe.init_from is None:
        init_weights(model, recipe.seed)
    else:
        report = load_weights(model, resolve_model(recipe.init_from), n_tokens=n_tokens)
        say(f"init_from  {report}")
        adapt(model, recipe, recipe.init_from, report, say)
    return model


def adapt(
    model: nn.Module, recipe: ModelRecipe, name: str, report: LoadReport, say: Callable[[str], None], part: str = ""
) -> None:
    """Gives a network adapters if the recipe asks for them.

    Args:
        model: with its weights loaded.
        recipe: its `lora`, seed and folder count.
        name: the base that the weights are of, as the recipe names it.
        report: what became of them.
        say: is told what is trained.
        part: where in a checkpoint the network lies: "critic/", or nothing.

    Raises:
        UserError: the base has no embeddings for some tokens, or is not the one that the run was started with.
    """
    if recipe.lora is None:
        return
    if report.resized:
        old = next(iter(report.resized.values()))[0]
        raise UserError(
            f"lora: the tokenizer has more tokens than the {old} of {name}: their embeddings would stay untrained: extend "
            "the model in a run without lora first"
        )
    base = base_named(name)
    for checkpoint in checkpoints_of(Path(recipe.out))[:1]:
        refuse_other_base(checkpoint / part, base)
    apply_lora(model, recipe.lora, seed_of(recipe.seed, "lora", part), base)
    say(f"lora       {describe(model)}")


Reference = Callable[[GPT], AbstractContextManager[GPT]]
"""Given the policy that may be asked just now: the model it is held near to."""


def reference_of(recipe: ModelRecipe, actor: GPT, path: str | None, tokenizer: Tokenizer, ranks: Ranks) -> Reference:
    """The model that a policy is held near to, as a context in which it may be asked.

    It is a model of its own, frozen, or, where the policy's weights are frozen beside adapters, the policy without them:
    that needs no second copy.

    Args:
        recipe: says the precision.
        actor: the policy, with its first weights.
        path: another model than the policy as it starts.
        tokenizer: the policy's, which a model of another must share.
        ranks: where the model goes.

    Raises:
        UserError: for a model with other tokens.
    """
    if path is None and adapters_of(actor):

        @contextmanager
        def adapters_off(policy: GPT) -> Iterator[GPT]:
            with without_adapters(policy):
                yield policy

        return adapters_off
    dtype = PRECISIONS[recipe.precision]
    if path is None:
        model = copy.deepcopy(actor)
        make(model, ranks.device, dtype)
        model.eval().requires_grad_(False)
    else:
        refuse_other_tokenizer(resolve_model(path), tokenizer, f"reference ({path})")
        model = frozen_model(path, ranks.device, recipe.precision)
    return lambda _: nullcontext(model)


def frozen_model(path: str, device: torch.device, precision: str) -> GPT:
    """A model that is only asked: a reference or a teacher, in evaluation mode, without gradients."""
    return load_model(resolve_model(path), PRECISIONS[precision], device)


def refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    """Raises UserError if the ids of a model's tokenizer mean something else than those of the policy's."""
    other = Tokenizer.load(folder)
    if other.hash != tokenizer.hash:
        raise UserError(
            f"{name}: its tokenizer has other ids than the policy's (hash {other.hash[:12]}, {tokenizer.hash[:12]}): take a "
            "model that was trained with the same tokenizer"
        )


# --- cost ------------------------------------------------------------------------------------------------------------

Network = Callable[[GPTConfig], nn.Module]  # builds a stage's network of a shape


def cost(recipe: ModelRecipe, config: GPTConfig, network: Network = GPT) -> Cost:
    """What training a network of this shape costs; `network` builds it, to know what `freeze` means."""
    length = row_len(recipe, config)
    rows = rows_per_step(recipe, length)
    return cost_of(
        config,
        seq_len=length,
        micro_tokens=micro_rows(recipe, rows, length) * length,
        precision=recipe.precision,
        optimizer=recipe.optim.name,
        loss_chunk=recipe.loss_chunk,
        activation_checkpointing=recipe.activation_checkpointing,
        ema=recipe.optim.ema_decay is not None,
        momentum=bool(recipe.optim.momentum),
        **trained_share(recipe, config, network),
    )


def trained_share(recipe: ModelRecipe, config: GPTConfig, network: Network = GPT) -> dict[str, int]:
    """How many parameters are not trained, and how many adapters add, counted on a network without memory; what
    `plan.cost_of` takes."""
    if not recipe.freeze and recipe.lora is None:
        return {}
    with torch.device("meta"):
        module = network(config)
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    adapters: dict[str, int] = {}
    if recipe.lora is None:
        frozen = frozen_names(list(sizes), recipe.freeze)
    else:
        frozen = sizes.keys() - heads_of(module).keys()
        matrices, lengths, packed = adapter_size(module, recipe.lora)
        adapters = {"n_adapter": matrices + lengths, "n_adapter_hidden": matrices, "n_packed": packed}
    hidden = frozen & hidden_matrices(module)
    return {
        "n_frozen": sum(sizes[n] for n in frozen),
        "n_frozen_hidden": sum(sizes[n] for n in hidden),
        **adapters,
    }


def mixture_weights(data: DataConfig, n_rows: Sequence[int]) -> list[float]:
    """The share of each training source in the samples.

    `weight` is the share itself; `epochs` asks to read a source so often, so its share grows with its rows.
    """
    return [n * s.epochs if s.epochs is not None else s.weight for s, n in zip(data.sources, n_rows, strict=True)]


def describe_step(
    recipe: ModelRecipe, costs: Cost, config: GPTConfig, tokenizer: Tokenizer, loader: RowLoader, data: Sequence[str]
) -> str:
    """The derived numbers of a run, as they are printed at its start; `data`: the lines that tell of its data."""
    accumulation = loader.rows_per_step // (loader.micro_rows * loader.world)
    return "\n".join(
        [
            f"model      {config.family}, {costs.n_params / 1e6:.2f} M parameters ({costs.n_embedding_params / 1e6:.2f} M "
            f"embeddings), vocabulary {config.vocab_size} for a tokenizer of {tokenizer.vocab_size}",
            *data,
            f"step       {rows_per_step(recipe, loader.row_len) * loader.row_len:,} tokens = {loader.ranks} rank(s) x "
            f"{accumulation} micro-batch(es) x {loader.micro_rows} rows x {loader.row_len}; {recipe.steps} steps",
            f"memory     {costs.state_bytes / 1e6:.0f} MB weights, gradients and optimizer + about "
            f"{costs.activation_bytes / 1e6:.0f} MB activations; checkpoint {costs.checkpoint_bytes / 1e6:.0f} MB",
        ]
    )


def planned_config(recipe: ModelRecipe) -> GPTConfig:
    """The network's shape as far as it can be told without reading any data: a tokenizer that is still to be trained
    gets the size that the recipe asks for."""
    section = recipe.text_tokenizer
    if section.path is not None:
        path = resolve_model(section.path) if section.path == recipe.tokenizer_from else section.path
        vocab = Tokenizer.from_config(section.model_copy(update={"path": str(path)})).vocab_size
    else:
        vocab = 261 if section.kind == "byte" else section.vocab_size
    return model_config(recipe, vocab)


def plan(recipe: ModelRecipe, network: Network = GPT, config: GPTConfig | None = None) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line, without reading its data.

    Args:
        recipe: of any stage with rows of a fixed length.
        network: builds the stage's network of a shape.
        config: the shape, where the recipe says it in its own way.

    Raises:
        UserError: when all is said, if weights, gradients and optimizer alone can't fit here, and the recipe doesn't
            spread them over several ranks.
    """
    config = config or planned_config(recipe)
    costs = cost(recipe, config, network)
    length = row_len(recipe, config)
    step_tokens = rows_per_step(recipe, length) * length
    tokens = recipe.steps * step_tokens
    active = f", {costs.n_active_params:,} at work for a token" if config.experts is not None else ""
    yield f"parameters   {costs.n_params:,} ({costs.n_embedding_params:,} in embeddings{active}), {config.family}"
    if (n := costs.n_trained_params) < costs.n_params:
        yield f"trained      {n:,} ({n / costs.n_params:.2%})"
    yield f"tokens       {tokens:,} in {recipe.steps:,} steps of {step_tokens:,}"
    yield f"work         {costs.flops_per_token * tokens:.3g} FLOP ({costs.flops_per_token:.3g} a token)"
    yield (
        f"memory       {costs.memory_bytes / 1e9:.3f} GB: {costs.state_bytes / 1e9:.3f} weights, gradients and "
        f"optimizer, about {costs.activation_bytes / 1e9:.3f} activations; {costs.checkpoint_bytes / 1e9:.3f} GB more of "
        "main memory to save from"
    )
    yield f"checkpoint   {costs.checkpoint_bytes / 1e9:.3f} GB each, {recipe.save.keep + recipe.save.keep_best} kept"
    if recipe.parallel.shard == "none" and recipe.parallel.tensor == recipe.parallel.experts == 1:
        require_memory(costs, pick_device(recipe.device))
