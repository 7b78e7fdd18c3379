"""Options that several commands share, and how a command finds its work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

MODEL = "a run, a checkpoint or a Hugging Face folder"


def tool(module: str) -> Callable[[argparse.Namespace], int]:
    """The function `run` of a module that is imported only then."""

    def run(args: argparse.Namespace) -> int:
        code: int = import_module(module).run(args)
        return code

    return run


def device_option(parser: Any) -> None:
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")


def precision_option(parser: Any) -> None:
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")


def sampling_options(parser: Any) -> None:
    """How the next token is chosen."""
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--min-new-tokens", type=int, help="no stop token before so many")
    parser.add_argument("--temperature", type=float, help="0 is greedy, also the default with beams; else 0.8")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float, help="above 1: less of what prompt and text hold already")
    parser.add_argument("--presence-penalty", type=float, help="taken off the scores of what the text holds already")
    parser.add_argument("--frequency-penalty", type=float, help="the same, times how often it does")
    parser.add_argument(
        "--logit-bias", action="append", default=[], metavar="TEXT=BIAS", help="a token, by text or id; -100 bans it"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")


def drawing_options(parser: Any) -> None:
    """What `rank` and `sample` are told of the prompts and of how they are answered."""
    parser.add_argument("--prompts", help="a file, a folder, a glob or a hub data set")
    parser.add_argument("--out", required=True, help="the .jsonl to write; run again to go on where it stopped")
    parser.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    parser.add_argument("--limit", type=int, help="only so many prompts, for now")
    parser.add_argument("--shuffle", action="store_true", help="the prompts in an order drawn from the seed")
    parser.add_argument("--batch", type=int, default=16, help="prompts answered side by side; default: 16")
    parser.add_argument("--raw", action="store_true", help="no chat template: prompts are plain text")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--temperature", type=float, help="default: 1")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end here; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    device_option(parser)
