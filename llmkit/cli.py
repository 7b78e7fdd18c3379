"""`llmkit <command>`: parses and dispatches. Imports nothing heavy before it must, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

USER_MISTAKE, STOPPED_ITSELF, PREEMPTED = 2, 3, 75
EXIT_CODES = """exit codes:
  0   done
  1   a fault of llmkit or of the machine
  2   your mistake: the message says which, and how to mend it
  3   training stopped itself: a loss or gradient was not finite
  75  stopped by a signal after saving: start again to go on"""


def _train(args: argparse.Namespace) -> int:
    from llmkit.stages import load_recipe, stage_module

    recipe = load_recipe(args.recipe, args.overrides)
    outcome = stage_module(recipe).run(recipe)
    return PREEMPTED if getattr(outcome, "value", None) == "preempted" else 0


def _prepare(args: argparse.Namespace) -> int:
    from llmkit.stages import load_recipe, stage_module

    recipe = load_recipe(args.recipe, args.overrides)
    return PREEMPTED if stage_module(recipe).prepare(recipe) is None else 0


def _plan(args: argparse.Namespace) -> int:
    from llmkit.stages import load_recipe, stage_module

    recipe = load_recipe(args.recipe, args.overrides)
    print(stage_module(recipe).plan(recipe))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from llmkit.inference.command import run

    return run(args)


def _verify(args: argparse.Namespace) -> int:
    from llmkit.tools.verify import run

    return run(args)


def _schema(args: argparse.Namespace) -> int:
    import json

    from llmkit.stages.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
    return 0


def _recipe_command(commands: Any, name: str, run: Any, text: str) -> None:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("recipe", help="a YAML file; those under configs/ are found from any folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes values of the recipe: optim.lr=3e-4")
    parser.set_defaults(run=run)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="llmkit",
        description="Trains language models from YAML recipes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="command", dest="command")
    _recipe_command(commands, "train", _train, "run the stage a recipe describes; run again to resume")
    _recipe_command(commands, "prepare", _prepare, "turn text into token shards (train does it when they are missing)")
    _recipe_command(commands, "plan", _plan, "parameters, memory, disk and tokens of a recipe, before anything runs")

    generate = commands.add_parser("generate", help="stream text from a model")
    generate.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    generate.add_argument("--prompt", required=True, help="the text to continue, or what the user says to a chat model")
    generate.add_argument("--raw", action="store_true", help="no chat template, also for a chat model")
    generate.add_argument("--system", help="the system message, for a chat model")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--min-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    generate.add_argument("--candidates", type=int, metavar="K", help="show the K likeliest next tokens instead")
    generate.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")
    generate.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    generate.set_defaults(run=_generate)

    verify = commands.add_parser("verify", help="check a checkpoint: manifest, hashes, shapes, finite values")
    verify.add_argument("folder", help="a run (all its checkpoints), a checkpoint or a Hugging Face folder")
    verify.set_defaults(run=_verify)

    schema = commands.add_parser("schema", help="JSON schema of all recipes, for completion in editors")
    schema.set_defaults(run=_schema)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(version("llmkit"))
        return 0
    if args.command is None:
        parser.print_help()
        return USER_MISTAKE
    from llmkit.config import MachineError, TrainingStopped, UserError

    try:
        return args.run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER_MISTAKE
    except MachineError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        return 0
    except TrainingStopped as e:
        print(f"error: {e}", file=sys.stderr)
        return STOPPED_ITSELF


if __name__ == "__main__":
    sys.exit(main())
