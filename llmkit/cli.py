"""`llmkit <command>`: parses and dispatches. Imports nothing heavy before it must, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

USER_MISTAKE, STOPPED_ITSELF, PREEMPTED, INTERRUPTED = 2, 3, 75, 130
EXIT_CODES = """exit codes:
  0   done
  1   a fault of llmkit or of the machine
  2   your mistake: the message says which, and how to mend it
  3   training stopped itself: a loss or gradient was not finite, or the guard's limits were reached
  75  stopped by a signal after saving: start again to go on
  130 interrupted by Ctrl-C"""
# What the system says of a path that can't be used as it is named. Anything else about files is the machine's fault.
_BAD_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _train(args: argparse.Namespace) -> int:
    from llmkit.stages import load_recipe, stage_module

    recipe = load_recipe(args.recipe, args.overrides)
    outcome = stage_module(recipe).run(recipe)
    return PREEMPTED if getattr(outcome, "value", None) == "preempted" else 0


def _prepare(args: argparse.Namespace) -> int:
    from llmkit.config import UserError
    from llmkit.stages import load_recipe, stage_module

    overrides, part = _take_part(args.overrides)
    recipe = load_recipe(args.recipe, overrides)
    module = stage_module(recipe)
    if part is None:
        return PREEMPTED if module.prepare(recipe) is None else 0
    if recipe.stage not in ("pretrain", "distill"):
        raise UserError(f"part: of stage {recipe.stage} there is nothing to prepare in parts: leave it out")
    return PREEMPTED if module.prepare(recipe, part) is None else 0


def _take_part(overrides: Sequence[str]) -> tuple[list[str], tuple[int, int] | None]:
    """Takes `part=I/N` out of the overrides: it says which job this is, not what is made."""
    from llmkit.config import UserError

    rest = [text for text in overrides if not text.startswith("part=")]
    parts = [text.removeprefix("part=") for text in overrides if text.startswith("part=")]
    if not parts:
        return rest, None
    number, slash, of = parts[-1].partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UserError(f"part={parts[-1]}: expected part=I/N, job I of N, counted from 1: part=3/16")
    return rest, (int(number), int(of))


def _plan(args: argparse.Namespace) -> int:
    from llmkit.stages import load_recipe, stage_module

    recipe = load_recipe(args.recipe, args.overrides)
    for line in stage_module(recipe).plan(recipe):
        print(line, flush=True)
    return 0


def _generate(args: argparse.Namespace) -> int:
    if args.prompts is not None:
        from llmkit.tools.write import run as write

        return write(args)
    from llmkit.inference.command import run

    return run(args)


def _chat(args: argparse.Namespace) -> int:
    from llmkit.tools.chat import run

    return run(args)


def _verify(args: argparse.Namespace) -> int:
    from llmkit.tools.verify import run

    return run(args)


def _quantize(args: argparse.Namespace) -> int:
    from llmkit.export.quantize import run

    return run(args)


def _export(args: argparse.Namespace) -> int:
    from llmkit.export.command import run

    return run(args)


def _average(args: argparse.Namespace) -> int:
    from llmkit.tools.average import run

    return run(args)


def _merge(args: argparse.Namespace) -> int:
    from llmkit.tools.merge import run

    return run(args)


def _embed(args: argparse.Namespace) -> int:
    from llmkit.tools.embed import run

    return run(args)


def _rank(args: argparse.Namespace) -> int:
    from llmkit.tools.rank import run

    return run(args)


def _sample(args: argparse.Namespace) -> int:
    from llmkit.tools.sample import run

    return run(args)


def _score(args: argparse.Namespace) -> int:
    from llmkit.tools.score import run

    return run(args)


def _compare(args: argparse.Namespace) -> int:
    from llmkit.tools.compare import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from llmkit.tools.bench import run

    return run(args)


def _serve(args: argparse.Namespace) -> int:
    from llmkit.serving.command import run

    return run(args)


def _eval(args: argparse.Namespace) -> int:
    if args.harness == "lm-eval":
        from llmkit.tools.lm_harness import run
    else:
        from llmkit.tools.evaluate import run
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


def _generate_command(commands: Any) -> None:
    generate = commands.add_parser("generate", help="stream text from a model")
    generate.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the text to continue, or what the user says to a chat model")
    asked.add_argument("--prompts", metavar="FILE", help="many: a file, a folder, a glob or a hub data set")
    generate.add_argument("--out", help="--prompts: the .jsonl to write; run again to go on where it stopped")
    generate.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as prompt=request")
    generate.add_argument("--limit", type=int, help="--prompts: only the first so many, for now")
    generate.add_argument("--batch", type=int, help="--prompts: answered side by side; default: 16")
    generate.add_argument("--raw", action="store_true", help="no chat template, also for a chat model")
    generate.add_argument("--system", help="the system message, for a chat model")
    _sampling_options(generate)
    generate.add_argument("--n", type=int, help="so many samples; with --beams, the n best")
    generate.add_argument("--beams", type=int, help="beam search with so many")
    generate.add_argument("--length-penalty", type=float, help="beams: above 0 favours long texts; default: 1")
    generate.add_argument("--early-stopping", action="store_true", default=None, help="beams: end with the first ended")
    generate.add_argument("--candidates", type=int, metavar="K", help="show the K likeliest next tokens instead")
    generate.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")
    generate.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="a conversation with a chat model; /help there tells more")
    chat.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    chat.add_argument("--system", help="the system message")
    _sampling_options(chat)
    chat.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")
    chat.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    chat.set_defaults(run=_chat, n=None, beams=None, length_penalty=None, early_stopping=None)


def _sampling_options(parser: Any) -> None:
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


def _embed_command(commands: Any) -> None:
    embed = commands.add_parser("embed", help="vectors of texts, nearest neighbours, similar words, analogies")
    embed.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    embed.add_argument("--text", action="append", default=[], help="a text; several print how near they are")
    embed.add_argument("--file", help="texts: jsonl, json, csv or parquet, one a row; txt, one a line")
    embed.add_argument("--field", default="text", help="where a row's text stands; default: text")
    embed.add_argument("--out", help="writes the vectors: .npy, .npz (as `vectors`) or .jsonl")
    embed.add_argument("--query", action="append", default=[], metavar="TEXT", help="prints the nearest texts")
    embed.add_argument(
        "--pooling", choices=("mean", "last"), default="mean", help="over a text's tokens; default: mean"
    )
    embed.add_argument("--layer", type=int, help="0 the embeddings, -1 after the last block, the default for texts")
    embed.add_argument("--similar", action="append", default=[], metavar="WORD", help="prints the nearest words")
    embed.add_argument("--analogy", action="append", default=[], metavar="A:B::C", help="what is to C as B is to A?")
    embed.add_argument(
        "--analogies", metavar="FILE", help='jsonl of {"a", "b", "c", "d"}: ranks, and how many come first'
    )
    embed.add_argument(
        "--vectors",
        choices=("input", "output", "context"),
        default="input",
        help="of words: the embedding they are read or predicted by, or the mean state where --file holds them",
    )
    embed.add_argument("--window", type=int, help="context: the word and the tokens after it, so many; default: 16")
    embed.add_argument("--method", choices=("add", "mul"), default="add", help="3CosAdd or 3CosMul; default: add")
    embed.add_argument("--centre", action="store_true", help="subtract the words' mean vector first")
    embed.add_argument("-k", type=int, default=5, help="so many are printed; default: 5")
    embed.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    embed.set_defaults(run=_embed)


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
        choices=("person", "simulated", "none"),
        default="person",
        help="who ranks them: you, at this terminal; a function with a stated noise; nobody yet",
    )
    rank.add_argument(
        "--utility", action="append", default=[], metavar="REWARD", help="simulated: how good an answer is; see sample"
    )
    rank.add_argument(
        "--noise", type=float, metavar="T", help="simulated: P(a over b) = sigmoid((u_a - u_b) / T), Bradley-Terry"
    )
    rank.add_argument("--flip", type=float, metavar="P", help="simulated: a pair is put the wrong way round with P")
    _drawing_options(rank)
    rank.set_defaults(run=_rank)

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
    _drawing_options(sample)
    sample.set_defaults(run=_sample)


def _score_command(commands: Any) -> None:
    score = commands.add_parser("score", help="a reward model's scores for given answers")
    score.add_argument("model", help="a run, a checkpoint or a Hugging Face folder of a reward model")
    score.add_argument("file", help="rows with answers, in any layout of sft, reward or dpo, or with `responses`")
    score.add_argument("--out", metavar="FILE", help="the .jsonl to write: the rows with their scores; default: stdout")
    score.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="such as completion=answer")
    score.add_argument("--limit", type=int, help="only the first so many rows")
    score.add_argument("--raw", action="store_true", help="no chat template: prompts and answers are plain text")
    score.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of a forward pass; default: 8192")
    score.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    score.set_defaults(run=_score)


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
    compare.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")
    compare.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    compare.set_defaults(run=_compare)


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
    bench.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    bench.set_defaults(run=_bench)


def _serve_command(commands: Any) -> None:
    serve = commands.add_parser("serve", help="OpenAI-compatible server, and a chat page")
    serve.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    serve.add_argument("--host", default="127.0.0.1", help="others than this machine's own need a key")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    serve.add_argument("--api-key", metavar="K", help="what clients must send; default: $LLMKIT_API_KEY, or none")
    serve.add_argument("--name", help="what requests call the model; default: its folder's name")
    serve.add_argument("--draft", metavar="MODEL", help="a small model that proposes tokens: the same text, sooner")
    serve.add_argument("--draft-tokens", type=int, help="that it proposes at a time; default: 4")
    serve.add_argument("--max-rows", type=int, help="texts that are written side by side; default: 32")
    serve.add_argument("--cache-tokens", type=int, help="of all texts together whose keys and values are kept")
    serve.add_argument("--max-pending", type=int, help="texts that are written or wait; default: 128; then 429")
    serve.add_argument("--timeout", type=float, metavar="S", help="seconds for one request; default: 600")
    serve.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")
    serve.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    serve.set_defaults(run=_serve)


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
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: as saved")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.set_defaults(run=_eval)


def _drawing_options(parser: Any) -> None:
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
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")


def _folder_commands(commands: Any) -> None:
    verify = commands.add_parser("verify", help="check a checkpoint: manifest, hashes, shapes, finite values")
    verify.add_argument("folder", help="a run (all its checkpoints), a checkpoint or a Hugging Face folder")
    verify.set_defaults(run=_verify)

    merge = commands.add_parser("merge", help="one plain model from adapters and the model they belong to")
    merge.add_argument("adapter", help="a run, a checkpoint or a PEFT folder with adapters")
    merge.add_argument("out", help="the folder to write")
    merge.set_defaults(run=_merge)

    quantize = commands.add_parser("quantize", help="a model in 8 or 4 bits a weight, for inference")
    quantize.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    quantize.add_argument("out", help="the folder to write")
    quantize.add_argument("--bits", type=int, choices=(8, 4), required=True)
    quantize.add_argument("--group", type=int, metavar="N", help="4 bits: weights that share a scale; default: 32")
    quantize.add_argument(
        "--calibrate", metavar="FILE", help="4 bits: texts or conversations on which the products are to stay (GPTQ)"
    )
    quantize.add_argument("--field", help="--calibrate: where a document stands in its row; default: text")
    quantize.set_defaults(run=_quantize)

    export = commands.add_parser("export", help="a model for other programs: GGUF (llama.cpp), ONNX")
    export.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    export.add_argument("out", help="gguf: the file to write; onnx: the folder")
    export.add_argument("--format", choices=("gguf", "onnx"), required=True)
    export.add_argument(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        help="of the matrices; default: f16 (gguf), f32 (onnx, which has no other)",
    )
    export.set_defaults(run=_export)

    average = commands.add_parser("average", help="one model from several of one shape: the mean of their weights")
    average.add_argument("out", help="the folder to write")
    average.add_argument("models", nargs="+", help="runs, checkpoints or Hugging Face folders")
    average.add_argument("--last", type=int, metavar="N", help="the last N checkpoints of the one run that is named")
    average.add_argument("--weights", metavar="A,B", help="shares of the models; default: equal")
    average.add_argument("--ema", action="store_true", help="of the averages that training kept (optim.ema_decay)")
    average.set_defaults(run=_average)


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
    _recipe_command(
        commands, "prepare", _prepare, "turn text into token shards (train does it when missing); part=I/N: job I of N"
    )
    _recipe_command(commands, "plan", _plan, "parameters, memory, disk and tokens of a recipe, before anything runs")

    _generate_command(commands)
    _embed_command(commands)
    _answer_commands(commands)
    _score_command(commands)
    _compare_command(commands)
    _eval_command(commands)
    _bench_command(commands)
    _serve_command(commands)
    _folder_commands(commands)
    schema = commands.add_parser("schema", help="JSON schema of all recipes, for completion in editors")
    schema.set_defaults(run=_schema)
    return parser


def _speak_utf8() -> list[str]:
    """Makes the terminal's streams take any text, and returns the arguments as text: UTF-8 whatever the locale says."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError):  # replaced by something simpler, or closed
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    return [os.fsencode(text).decode("utf-8", "surrogateescape") for text in sys.argv[1:]]


def _explain(error: Exception) -> tuple[str, int] | None:
    """One sentence and the exit code for an error that is nobody's bug; None for a bug, whose traceback is wanted."""
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        what = f"{error.object!r} can't be written in the locale's encoding, {error.encoding}"
        return f"{what}: set LC_ALL=C.UTF-8", USER_MISTAKE
    if isinstance(error, OSError) and error.strerror and error.errno != errno.ENOENT:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", USER_MISTAKE if error.errno in _BAD_PATH else 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return f"out of memory: lower batch.micro_tokens, or choose a smaller model: {text or type(error).__name__}", 1
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(_speak_utf8() if argv is None else argv)
    if args.version:
        from importlib.metadata import version

        print(version("llmkit"))
        return 0
    if args.command is None:
        parser.print_help()
        return USER_MISTAKE
    from llmkit.config import MachineError, TrainingStopped, UserError

    try:
        code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to do when it fails
        return code
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER_MISTAKE
    except MachineError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it once more at its end
        if args.command != "train":
            return 0
        print("error: the reader of the output has left: start again to go on, with output to a file", file=sys.stderr)
        return 1
    except TrainingStopped as e:
        print(f"error: {e}", file=sys.stderr)
        return STOPPED_ITSELF
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as e:
        explained = _explain(e)
        if explained is None:
            raise
        print(f"error: {explained[0]}", file=sys.stderr)
        return explained[1]


if __name__ == "__main__":
    sys.exit(main())
