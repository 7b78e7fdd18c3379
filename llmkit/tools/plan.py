"""`llmkit plan`: what a recipe costs, on this machine or on a cluster."""

from __future__ import annotations

import argparse
from typing import Any

from llmkit.config import UserError


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises UserError when all is said, if the recipe can't fit."""
    from llmkit.stages import load_recipe, stage_module

    cluster = _cluster(args)
    recipe = load_recipe(args.recipe, args.overrides)
    module = stage_module(recipe)
    if cluster is not None and recipe.stage == "tokenizer":
        raise UserError("--gpu: a tokenizer is trained on CPUs: leave it out")
    if cluster is not None:
        _on_cluster(module, recipe, cluster)
        return 0
    for line in module.plan(recipe):
        print(line, flush=True)
    if recipe.stage != "tokenizer":
        _here(module, recipe, args.calibration)
    return 0


def _cluster(args: argparse.Namespace) -> Any:
    """The cluster that is asked about, or None."""
    from llmkit.plan.gpus import find_gpu
    from llmkit.plan.mesh import Cluster

    if args.gpu is None:
        for name in ("nodes", "gpus", "network"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: of which GPUs? Say --gpu h100")
        return None
    gpu = find_gpu(args.gpu)
    nodes, per_node = 1 if args.nodes is None else args.nodes, gpu.per_node if args.gpus is None else args.gpus
    network = gpu.network_gb_per_s if args.network is None else args.network
    if nodes < 1 or per_node < 1 or not network > 0:
        raise UserError(f"--nodes {nodes} --gpus {per_node} --network {network:g}: all must be above 0")
    if args.calibration is not None:
        raise UserError("--calibration is of this machine: leave it out with --gpu")
    return Cluster(gpu, nodes, per_node, network)


def _on_cluster(module: Any, recipe: Any, cluster: Any) -> None:
    from llmkit.plan.report import describe
    from llmkit.training.jobs import wanted_mesh

    job = module.job(recipe)
    for net in job.nets:
        print(
            f"{net.role:12s} {net.cost.n_params:,} parameters, {net.model.family}, {'trained' if net.trained else 'asked'} "
            f"in {net.precision}",
            flush=True,
        )
    for line in describe(job, wanted_mesh(recipe, cluster.world, cluster.nodes), cluster):
        print(line, flush=True)


def _here(module: Any, recipe: Any, calibration: str | None) -> None:
    from llmkit.plan.here import predict, read_calibration
    from llmkit.training.dist import pick_device
    from llmkit.training.jobs import wanted_mesh

    job, mesh = module.job(recipe), wanted_mesh(recipe, 1)
    if recipe.parallel.shard != "none" or max(mesh.tensor, mesh.context, mesh.experts) > 1:
        print("time         the recipe spreads the model over ranks: say which: --nodes N --gpus M --gpu h100")
        return
    if pick_device(recipe.device).type != "cpu":
        print("time         of a GPU is told with --gpu")
        return
    for line in predict(job, read_calibration(calibration)).lines(job):
        print(line, flush=True)
