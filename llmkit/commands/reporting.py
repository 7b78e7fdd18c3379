"""Commands about several runs: report, sweep."""

from __future__ import annotations

from typing import Any

from llmkit.commands.options import tool


def _report_command(commands: Any) -> None:
    report = commands.add_parser("report", help="one HTML page about runs: curves, answers, rollouts, results, lineage")
    report.add_argument(
        "folders", nargs="+", metavar="folder", help="runs, a pipeline's folder, or a folder that holds such"
    )
    report.add_argument("--out", metavar="FILE", help="the .html to write; default: report.html in the folder")
    report.add_argument("--title", help="of the page; default: the folder's name")
    report.set_defaults(run=tool("llmkit.tools.report.command"))


def _sweep_command(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="trains a recipe with other values again and again: which are best")
    sweep.add_argument("recipe", help="a YAML file; those under configs/ are found from any folder")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="for all trials: steps=500")
    sweep.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="optim.lr=log:1e-4:1e-2, uniform:0:0.2, int:1:8, logint:1:64, choice:adamw,muon; may be repeated",
    )
    sweep.add_argument("--trials", type=int, default=20, help="in all; more may be asked for later; default: 20")
    sweep.add_argument("--metric", help="of the evaluations; default: the recipe's eval.metric")
    sweep.add_argument("--better", choices=("lower", "higher"), help="default: the recipe's eval.better")
    sweep.add_argument(
        "--prune-after", type=int, metavar="N", help="so many trials are done before one is ended early; default: 4"
    )
    sweep.add_argument("--no-pruning", action="store_true", help="every trial is trained to its end")
    sweep.add_argument("--keep-all", action="store_true", help="keep every trial's checkpoints, not only the best's")
    sweep.add_argument("--out", metavar="DIR", help="default: the recipe's out, and -sweep")
    sweep.add_argument("--seed", type=int, default=0, help="of what is tried; default: 0")
    sweep.set_defaults(run=tool("llmkit.tools.sweep"))


def add(commands: Any) -> None:
    """Adds the parsers."""
    _report_command(commands)
    _sweep_command(commands)
