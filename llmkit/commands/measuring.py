"""Commands that measure models: compare, eval, bench."""

from __future__ import annotations

import argparse
from typing import Any

from llmkit.commands.options import device_option, precision_option, tool


def _eval(args: argparse.Namespace) -> int:
    if args.harness == "lm-eval":
        from llmkit.tools.lm_harness import run
    else:
        from llmkit.tools.evaluate import run
    return run(args)


def _compare_command(commands: Any) -> None:
    compare = commands.add_parser("compare", help="models side by side: size, held-out loss, graded answers, speed")
    compare.add_argument("models", nargs="+", metavar="model", help="runs, checkpoints or Hugging Face folders")
    compare.add_argument("--out", required=True, help="the folder for compare.md, compare.json, compare.png, answers")
    compare.add_argument("--names", metavar="A,B", help="what the models are called; default: by their folders")
    compare.add_argument(
        "--questions", metavar="FILE", help="prompts with right answers, in the layouts of eval.answers"
    )
    compare.add_argument(
        "--reward", action="append", default=[], help="what answers are graded by; default: exact; see sample"
    )
    compare.add_argument(
        "--by", metavar="COLUMN", help="also tells each of its values; default: kind, where rows have it"
    )
    compare.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    compare.add_argument("--max-new-tokens", type=int, help="of an answer; default: 128")
    compare.add_argument("--text", metavar="FILE", help="held-out documents: loss, perplexity and bits per byte")
    compare.add_argument("--field", help="where a document stands in its row; default: text")
    compare.add_argument("--chats", metavar="FILE", help="held-out conversations: the same of the assistant's turns")
    compare.add_argument("--context", type=int, help="tokens of a held-out row; default: the smallest context, or 2048")
    compare.add_argument("--limit", type=int, help="only the first so many rows of each file")
    compare.add_argument("--raw", action="store_true", help="no chat template: questions and answers are plain text")
    compare.add_argument("--system", help="the system message, for chat models")
    compare.add_argument("--prompt-tokens", type=int, help="speed: of the prompt; default: 128")
    compare.add_argument("--new-tokens", type=int, help="speed: that are written; default: 64")
    compare.add_argument("--repeats", type=int, default=3, help="speed: runs of each model; default: 3; 0: none")
    precision_option(compare)
    device_option(compare)
    compare.set_defaults(run=tool("llmkit.tools.compare"))


def _eval_command(commands: Any) -> None:
    parser = commands.add_parser("eval", help="benchmarks, perplexity and bits per byte, with intervals")
    parser.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--tasks", metavar="A,B", help="mmlu, mmlu_pro, gpqa, drop, humaneval, gsm8k, ceval, cmmlu")
    parser.add_argument("--data", metavar="DIR", help="reads DIR/<task>.jsonl or DIR/<task>/ instead of the hub")
    parser.add_argument("--limit", type=int, help="only so many questions of a task, at equal distances")
    parser.add_argument("--shots", type=int, help="examples before a question; default: the task's, if any")
    parser.add_argument("--out", metavar="DIR", help="writes eval.json, eval.md, eval.html and every answer")
    parser.add_argument("--raw", action="store_true", help="no chat template, also for a chat model")
    parser.add_argument("--max-new-tokens", type=int, help="of a written answer; default: the task's")
    parser.add_argument("--run-code", action="store_true", help="allows programs that the model writes, in a sandbox")
    parser.add_argument("--against", metavar="FILE", help="texts it has learnt from: which questions stand in them?")
    parser.add_argument("--text", metavar="FILE", help="held-out documents: perplexity and bits per byte")
    parser.add_argument("--field", help="where a document stands in its row; default: text")
    parser.add_argument("--context", type=int, help="tokens of a row of --text; default: the model's, at most 2048")
    parser.add_argument("--harness", choices=("own", "lm-eval"), default="own", help="who asks; default: own")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of a forward pass; default: 8192")
    precision_option(parser)
    device_option(parser)
    parser.set_defaults(run=_eval)


def _bench_command(commands: Any) -> None:
    bench = commands.add_parser("bench", help="size, quality and speed of a model in fp32, bf16 and quantised")
    bench.add_argument("model", help="a run, a checkpoint or a Hugging Face folder: the original")
    bench.add_argument("others", nargs="*", metavar="quantised", help="folders made from it by `llmkit quantize`")
    bench.add_argument("--out", help="the folder for bench.md, bench.json and bench.png; default: the table is printed")
    bench.add_argument(
        "--precisions", metavar="A,B", default="fp32,bf16", help="of the original; the first is what others are held to"
    )
    bench.add_argument("--text", metavar="FILE", help="held-out documents: perplexity, divergence from the original")
    bench.add_argument("--field", help="where a document stands in its row; default: text")
    bench.add_argument("--chats", metavar="FILE", help="held-out conversations: the same of the assistant's turns")
    bench.add_argument("--context", type=int, help="tokens of a held-out row; default: the model's context, or 2048")
    bench.add_argument("--limit", type=int, help="only the first so many rows of the file")
    bench.add_argument("--raw", action="store_true", help="--chats: no chat template, plain text")
    bench.add_argument("--system", help="--chats: the system message of those that have none")
    bench.add_argument("--prompt-tokens", type=int, help="PP: of the prompt; default: 512, or what fits")
    bench.add_argument("--new-tokens", type=int, help="TG: that are written; default: 128, or what fits")
    bench.add_argument("--repeats", type=int, default=5, help="speed: runs of each; default: 5; 0: none")
    device_option(bench)
    bench.set_defaults(run=tool("llmkit.tools.bench"))


def add(commands: Any) -> None:
    """Adds the parsers."""
    _compare_command(commands)
    _eval_command(commands)
    _bench_command(commands)
