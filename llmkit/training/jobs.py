"""Recipes in the planner's words: which networks they hold, and how many tokens of each step go through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.plan.cost import cost_of
from llmkit.plan.job import Job, Net, Pass
from llmkit.plan.mesh import Mesh
from llmkit.stages.recipes import ModelRecipe
from llmkit.training.config import RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.setup import Network, cost, micro_rows, most_rows, planned_config, row_len, rows_per_step


def frozen_net(role: str, config: GPTConfig, precision: str) -> Net:
    """A network that is only asked."""
    costs = cost_of(
        config, seq_len=config.max_seq_len, micro_tokens=0, precision=precision, optimizer="sgd", loss_chunk=1,
        activation_checkpointing=False, ema=False,
    )  # fmt: skip
    return Net(role, config, precision, costs, trained=False)


def supervised_job(
    stage: str,
    recipe: ModelRecipe,
    network: Network = GPT,
    config: GPTConfig | None = None,
    *,
    rows_of_example: int = 1,
    with_head: bool = True,
    asked: Sequence[tuple[Net, bool]] = (),
    written: float = 0.0,
    notes: Sequence[str] = (),
) -> Job:
    """A stage that learns from rows of data.

    Args:
        stage: its name.
        recipe: its recipe.
        network: builds its network of a shape.
        config: the shape, where the recipe says it in its own way.
        rows_of_example: 2 for pairs.
        with_head: whether every token is compared with the vocabulary.
        asked: frozen networks that read the same rows, and whether their heads are needed.
        written: new tokens that the network itself writes in a step, on average.
        notes: what the figures assume of the data.
    """
    config = config or planned_config(recipe)
    length = row_len(recipe, config)
    examples = rows_per_step(recipe, length)
    n_rows, tokens = examples * rows_of_example, float(examples * rows_of_example * length)
    net = Net("model", config, recipe.precision, cost(recipe, config, network))

    def micro(n_data: int) -> int:
        share = max(1, n_rows // n_data)
        return min(share, most_rows(recipe, length)) if rows_of_example > 1 else micro_rows(recipe, share, length)

    passes = [Pass(net, "train", tokens, length, with_head=with_head)]
    passes += [Pass(other, "ask", tokens, length, with_head=head) for other, head in asked]
    if written:
        passes.append(
            Pass(net, "write", written, length, side_by_side=most_rows(recipe, length), new_tokens=length // 2)
        )
    return job_of(stage, recipe, (net, *(other for other, _ in asked)), passes, examples, length, micro, notes)


def job_of(
    stage: str, recipe: ModelRecipe, nets: Sequence[Net], passes: Sequence[Pass], rows: int, length: int,
    micro: Callable[[int], int], notes: Sequence[str] = (),
) -> Job:  # fmt: skip
    """A job with what every recipe says; the rest as in `Job`."""
    return Job(
        stage=stage,
        steps=recipe.steps,
        nets=tuple(nets),
        passes=tuple(passes),
        rows=rows,
        row_len=length,
        micro_rows=micro,
        precision=recipe.precision,
        optimizer=recipe.optim.name,
        loss_chunk=recipe.loss_chunk,
        recompute=recipe.activation_checkpointing,
        compiled=recipe.compile,
        packed=recipe.lora is not None and recipe.lora.quantize is not None,
        kept_checkpoints=recipe.save.keep + recipe.save.keep_best,
        save_every=recipe.save_every,
        notes=tuple(notes),
    )


def wanted_mesh(recipe: RunConfig, world: int, n_nodes: int = 1) -> Mesh:
    """What the recipe's `parallel` means on so many ranks."""
    said = recipe.parallel
    mesh = Mesh(world, said.shard, said.tensor, context=said.context, experts=said.experts, offload=said.offload)
    return replace(mesh, replicas=said.replicas or n_nodes) if said.shard == "hybrid" else mesh


def parts_of(recipe: RunConfig, ranks: Ranks) -> int:
    """Into how many parts at most the ranks of this run cut weights, gradients and optimizer."""
    return wanted_mesh(recipe, ranks.processes, max(1, ranks.processes // ranks.per_node)).members
