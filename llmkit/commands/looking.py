"""Commands by which people look: inspect, doctor, replay."""

from __future__ import annotations

from typing import Any

from llmkit.commands.options import tool

_OVERRIDES = "changes values of the recipe: optim.lr=3e-4"


def add(commands: Any) -> None:
    """Adds the parsers."""
    inspect = commands.add_parser("inspect", help="what a recipe trains on, token by token; or a model's parameters")
    inspect.add_argument("what", help="a recipe (.yaml); or a run, a checkpoint or a Hugging Face folder")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    inspect.add_argument("--step", type=int, default=1, metavar="N", help="of the run, from 1; ppo, grpo: the rollout")
    inspect.add_argument("--texts", type=int, default=4, metavar="N", help="that are shown; default: 4")
    inspect.add_argument("--tokens", action="store_true", help="a token a line: id, role, document, position, weight")
    inspect.add_argument("--html", metavar="FILE", help="writes a page with the whole step instead")
    inspect.set_defaults(run=tool("llmkit.tools.inspect.command"))

    doctor = commands.add_parser("doctor", help="is the machine well, and does a recipe's arithmetic hold?")
    doctor.add_argument("recipe", nargs="?", help="a YAML file; default: only the machine is looked at")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    doctor.add_argument("--only", action="append", default=[], metavar="CHECK", help="this check, and what it needs")
    doctor.add_argument("--list", action="store_true", help="prints the checks, with their causes and remedies")
    doctor.set_defaults(run=tool("llmkit.tools.doctor.command"))

    replay = commands.add_parser("replay", help="the exact samples of a step, and the step made again")
    replay.add_argument("folder", metavar="run", help="the folder of a run")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="counted from 1")
    replay.add_argument("--precision", choices=("fp32", "fp64"), help="makes the step in this precision too")
    replay.add_argument(
        "--texts", type=int, default=4, metavar="N", help="that are shown, the costliest first; default: 4"
    )
    replay.add_argument("--tokens", action="store_true", help="a token a line, with its loss or advantage")
    replay.add_argument("--html", metavar="FILE", help="writes a page with the whole step instead")
    replay.set_defaults(run=tool("llmkit.tools.replay"))
