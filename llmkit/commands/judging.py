"""Commands by which answers are judged: rank, sample, score."""

from __future__ import annotations

from typing import Any

from llmkit.commands.options import device_option, drawing_options, tool


def _answer_commands(commands: Any) -> None:
    rank = commands.add_parser(
        "rank", help="several answers to each prompt, ranked by a person: data for reward models"
    )
    rank.add_argument(
        "model", nargs="?", help="a run, a checkpoint or a Hugging Face folder, which answers the prompts"
    )
    rank.add_argument("--answers", metavar="FILE", help="instead of MODEL and --prompts: rows that hold `responses`")
    rank.add_argument("-k", type=int, default=4, help="different answers to a prompt; default: 4")
    rank.add_argument(
        "--annotator",
        metavar="WHO",
        default="person",
        help="person: you, at this terminal (default); simulated: a function with a stated noise; none: nobody yet; with "
        "--serve your name",
    )
    rank.add_argument("--serve", action="store_true", help="a page in the browser, for one person or several")
    rank.add_argument("--host", default="127.0.0.1", help="the page: other machines' addresses need --api-key")
    rank.add_argument("--port", type=int, default=8000, help="the page: 0 takes a free one; default: 8000")
    rank.add_argument("--api-key", metavar="KEY", help="the page opens at /#key=KEY only; or LLMKIT_API_KEY")
    rank.add_argument(
        "--utility", action="append", default=[], metavar="REWARD", help="simulated: how good an answer is; see sample"
    )
    rank.add_argument(
        "--noise", type=float, metavar="T", help="simulated: P(a over b) = sigmoid((u_a - u_b) / T), Bradley-Terry"
    )
    rank.add_argument("--flip", type=float, metavar="P", help="simulated: a pair is put the wrong way round with P")
    drawing_options(rank)
    rank.set_defaults(run=tool("llmkit.tools.rank"))

    sample = commands.add_parser("sample", help="best of n answers to each prompt, by rewards: data for stage sft")
    sample.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    sample.add_argument("--n", type=int, default=8, help="answers to a prompt; default: 8")
    sample.add_argument(
        "--rewards",
        action="append",
        required=True,
        metavar="REWARD",
        help="a recipe with rewards, a kind (exact), a mapping ({kind: model, path: DIR}) or package.module:function",
    )
    sample.add_argument("--keep", choices=("best", "top_k", "threshold"), default="best", help="default: best")
    sample.add_argument("--keep-n", type=int, metavar="K", help="top_k: so many")
    sample.add_argument("--threshold", type=float, help="the least score of an answer that is kept, or that passes")
    drawing_options(sample)
    sample.set_defaults(run=tool("llmkit.tools.sample"))


def _score_command(commands: Any) -> None:
    score = commands.add_parser("score", help="a reward model's scores for given answers")
    score.add_argument("model", help="a run, a checkpoint or a Hugging Face folder of a reward model")
    score.add_argument("file", help="rows with answers, in any layout of sft, reward or dpo, or with `responses`")
    score.add_argument("--out", metavar="FILE", help="the .jsonl to write: the rows with their scores; default: stdout")
    score.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as completion=answer")
    score.add_argument("--limit", type=int, help="only the first so many rows")
    score.add_argument("--raw", action="store_true", help="no chat template: prompts and answers are plain text")
    score.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of a forward pass; default: 8192")
    device_option(score)
    score.set_defaults(run=tool("llmkit.tools.score"))


def add(commands: Any) -> None:
    """Adds the parsers."""
    _answer_commands(commands)
    _score_command(commands)
