"""Commands on many runs: run (a pipeline), lineage, diff."""

from __future__ import annotations

from typing import Any

from llmkit.commands.options import tool


def add(commands: Any) -> None:
    """Adds the parsers. A pipeline's nodes are other commands, so it is told of all of them."""
    run = commands.add_parser("run", help="a pipeline: many stages and commands in one YAML; run again to resume")
    run.add_argument("pipeline", help="a YAML file; those under configs/ are found from any folder")
    run.add_argument(
        "overrides",
        nargs="*",
        metavar="NODE.key=value",
        help="changes a node's recipe or options, or the pipeline's keys",
    )
    run.add_argument("--dry-run", action="store_true", help="only says what would be done, why, and what it would take")
    run.add_argument("--from", dest="from_node", metavar="NODE", help="does this node and all behind it again")
    run.add_argument("--until", metavar="NODE", help="only this node and what it needs")
    run.add_argument("--gpu", metavar="NAME", help="--dry-run: times as on GPUs of this kind, such as H100")
    run.set_defaults(run=tool("llmkit.pipeline.command"), parsers=commands.choices)

    lineage = commands.add_parser("lineage", help="what a model comes from: parents, data, code, seeds, as a tree")
    lineage.add_argument("folder", help="a run, a checkpoint or a model made by merge, average or quantize")
    lineage.add_argument("--json", action="store_true", help="all that is known, for programs")
    lineage.set_defaults(run=tool("llmkit.tools.lineage"))

    diff = commands.add_parser("diff", help="what differs between two runs or checkpoints, weights by layer too")
    diff.add_argument("a", help="a run (its newest checkpoint), a checkpoint or a Hugging Face folder")
    diff.add_argument("b", help="the other")
    diff.add_argument("--no-weights", dest="weights", action="store_false", help="leaves the weights unread")
    diff.add_argument("--json", action="store_true", help="all of it, for programs")
    diff.set_defaults(run=tool("llmkit.tools.diff"))
