"""`llmkit generate`: streams a continuation, or shows what the model thinks comes next."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from llmkit.config import UserError, validate
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import TextStream, candidates, generate
from llmkit.model.gpt import GPT
from llmkit.model.hf import load_model
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(args: argparse.Namespace) -> int:
    """Prints the text alone on stdout, as it is made. Notes go to stderr."""
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "stop": args.stop,
        "seed": args.seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    sampling: SamplingConfig = validate(SamplingConfig, given, {(): "generate"})
    if args.candidates is not None and args.candidates < 1:
        raise UserError(f"generate: candidates: must be at least 1 (got {args.candidates})")
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    dtype = _DTYPES[args.precision] if args.precision else None
    model = load_model(folder, dtype, pick_device(args.device))
    ids = encode_prompt(tokenizer, args.prompt, args.system, chat=not args.raw and is_chat_model(folder, tokenizer))
    if args.candidates:
        print_candidates(model, tokenizer, ids, args.candidates)
        return 0
    stream = TextStream(tokenizer, sampling.stop)

    def show(row: int, token: int) -> None:
        print(stream.push(token), end="", flush=True)

    (result,) = generate(model, [ids], sampling, tokenizer=tokenizer, seeds=[sampling.seed], on_token=show)
    print(stream.finish())
    if result.finish_reason == "length" and len(result.ids) < sampling.max_new_tokens:
        print(f"note: the context of {model.config.max_seq_len} tokens is full", file=sys.stderr)
    return 0


def is_chat_model(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether prompts belong into the chat template: it has one, and is not a base model of ours."""
    facts = json.loads((folder / "config.json").read_bytes()).get("llmkit")
    is_base = isinstance(facts, dict) and facts.get("stage") == "pretrain"
    return tokenizer.template is not None and not is_base


def encode_prompt(tokenizer: Tokenizer, prompt: str, system: str | None, chat: bool) -> list[int]:
    """The prompt's ids, with exactly one bos where the tokenizer has one."""
    if not chat:
        if system is not None:
            raise UserError("--system is for chat models: this one continues text")
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True).ids


def print_candidates(model: GPT, tokenizer: Tokenizer, ids: list[int], k: int) -> None:
    """The k likeliest next tokens with their probabilities, as a table."""
    for token, probability in candidates(model, ids, k, tokenizer.vocab_size):
        print(f"{100 * probability:6.2f} %  {tokenizer.decode([token], skip_special=False)!r}")
