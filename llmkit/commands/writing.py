"""Commands by which a model writes or reads: generate, chat, embed, serve."""

from __future__ import annotations

import argparse
from typing import Any

from llmkit.commands.options import device_option, precision_option, sampling_options, tool


def _generate(args: argparse.Namespace) -> int:
    if args.prompts is not None:
        from llmkit.tools.write import run as write

        return write(args)
    from llmkit.inference.command import run

    return run(args)


def _draft_options(parser: Any) -> None:
    parser.add_argument("--draft", metavar="MODEL", help="a small model of the same tokenizer that proposes tokens")
    parser.add_argument("--draft-tokens", type=int, help="that it proposes at a time; default: 4")


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
    sampling_options(generate)
    generate.add_argument("--n", type=int, help="so many samples; with --beams, the n best")
    generate.add_argument("--beams", type=int, help="beam search with so many")
    generate.add_argument("--length-penalty", type=float, help="beams: above 0 favours long texts; default: 1")
    generate.add_argument("--early-stopping", action="store_true", default=None, help="beams: end with the first ended")
    _draft_options(generate)
    generate.add_argument("--candidates", type=int, metavar="K", help="show the K likeliest next tokens instead")
    precision_option(generate)
    device_option(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="a conversation with a chat model; /help there tells more")
    chat.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    chat.add_argument("--system", help="the system message")
    sampling_options(chat)
    _draft_options(chat)
    precision_option(chat)
    device_option(chat)
    chat.set_defaults(run=tool("llmkit.tools.chat"), n=None, beams=None, length_penalty=None, early_stopping=None)


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
    device_option(embed)
    embed.set_defaults(run=tool("llmkit.tools.embed"))


def _serve_command(commands: Any) -> None:
    serve = commands.add_parser("serve", help="OpenAI-compatible server, and a chat page")
    serve.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    serve.add_argument("--host", default="127.0.0.1", help="others than this machine's own need a key")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    serve.add_argument("--api-key", metavar="K", help="what clients must send; default: $LLMKIT_API_KEY, or none")
    serve.add_argument("--name", help="what requests call the model; default: its folder's name")
    _draft_options(serve)
    serve.add_argument("--max-rows", type=int, help="texts that are written side by side; default: 32")
    serve.add_argument("--cache-tokens", type=int, help="of all texts together whose keys and values are kept")
    serve.add_argument("--max-pending", type=int, help="texts that are written or wait; default: 128; then 429")
    serve.add_argument("--timeout", type=float, metavar="S", help="seconds for one request; default: 600")
    precision_option(serve)
    device_option(serve)
    serve.set_defaults(run=tool("llmkit.serving.command"))


def add(commands: Any) -> None:
    """Adds the parsers."""
    _generate_command(commands)
    _embed_command(commands)
    _serve_command(commands)
