"""`llmkit generate`: streams a continuation, or shows what the model thinks comes next."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from llmkit.config import MachineError, UserError, validate
from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import requests_of
from llmkit.inference.generate import candidates, generate
from llmkit.inference.stream import TextStream
from llmkit.model.gpt import GPT
from llmkit.model.hf import read_json
from llmkit.model.weights import load_model
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device

TEMPERATURE = 0.8  # of text that people look at; rollouts need SamplingConfig's own default, 1, to be on policy
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(args: argparse.Namespace) -> int:
    """Prints the text alone on stdout, as it is made. Notes go to stderr."""
    sampling = read_sampling(args)
    if args.candidates is not None and args.candidates < 1:
        raise UserError(f"generate: candidates: must be at least 1 (got {args.candidates})")
    if args.draft is not None and (args.candidates or sampling.beams > 1):
        raise UserError("generate: a draft has no part in --beams and --candidates: drop --draft, or these")
    need_draft(args)
    for option in ("out", "column", "limit", "batch"):
        if getattr(args, option):
            raise UserError(f"generate: --{option} is about many prompts: give --prompts, a file of them")
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, DTYPES.get(args.precision), pick_device(args.device))
    ids = encode_prompt(tokenizer, args.prompt, args.system, chat=not args.raw and is_chat_model(folder, tokenizer))
    if args.candidates:
        print_candidates(model, tokenizer, ids, args.candidates)
        return 0
    if args.draft is not None:
        print_drafted(drafting_engine(args, model, tokenizer, sampling.n), ids, sampling)
        return 0
    print_texts(model, tokenizer, ids, sampling)
    return 0


def read_sampling(args: argparse.Namespace) -> SamplingConfig:
    """The options of the command line; those not given have SamplingConfig's defaults, but for the temperature."""
    options = {name: value for name in SamplingConfig.model_fields if (value := getattr(args, name)) is not None}
    biases = [read_bias(text, args.command) for text in args.logit_bias]
    options["logit_bias"] = dict(biases)
    if len(options["logit_bias"]) < len(biases):
        raise UserError(f"{args.command}: logit_bias: the same token is named twice: keep one")
    if args.temperature is None:
        options["temperature"] = TEMPERATURE if args.beams in (None, 1) else 0.0
    sampling: SamplingConfig = validate(SamplingConfig, options, {(): args.command})
    return sampling


def read_bias(text: str, command: str) -> tuple[str, float]:
    """`TEXT=BIAS`; the text may hold further equals signs."""
    name, equals, bias = text.rpartition("=")
    try:
        if equals:
            return name, float(bias)
    except ValueError:
        pass
    raise UserError(f"{command}: logit_bias: expected TEXT=BIAS, such as ' the=-5' (got {text!r})")


def print_texts(model: GPT, tokenizer: Tokenizer, ids: list[int], sampling: SamplingConfig) -> None:
    """One text is printed as it is made. Several follow one another, each under a line with its number."""
    stream = TextStream(tokenizer, sampling.stop)

    def show(row: int, token: int) -> None:
        print(stream.push(token), end="", flush=True)

    alone = sampling.n == 1
    results = generate(
        model, [ids], sampling, tokenizer=tokenizer, seeds=[sampling.seed], on_token=show if alone else None
    )
    if alone:
        print(stream.finish())
    else:
        for k, result in enumerate(results, 1):
            score = "" if result.score is None else f", score {result.score:.4f}"
            print(f"--- {k} of {sampling.n}{score}\n{result.text}")
    _note_end(model, ids, sampling, any(r.finish_reason == "length" for r in results))


def _note_end(model: GPT, ids: list[int], sampling: SamplingConfig, cut_off: bool) -> None:
    if cut_off and model.config.max_seq_len - len(ids) < sampling.max_new_tokens:
        print(f"note: the context of {model.config.max_seq_len} tokens is full", file=sys.stderr)


def need_draft(args: argparse.Namespace) -> None:
    """Raises UserError if something is told of a draft that there is not."""
    if args.draft is None and args.draft_tokens is not None:
        raise UserError(f"{args.command}: --draft-tokens is about a draft: give --draft, a small model, too")


def load_draft(args: argparse.Namespace, tokenizer: Tokenizer) -> GPT:
    """The model of --draft. Raises UserError if its tokens are others."""
    folder = resolve_model(args.draft)
    if Tokenizer.load(folder).hash != tokenizer.hash:
        raise UserError(
            f"--draft {args.draft}: its tokenizer is not the model's, so its tokens mean something else: take a draft that "
            "was trained with the same one, such as a distilled student"
        )
    return load_model(folder, DTYPES.get(args.precision), pick_device(args.device))


def drafting_engine(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, n_texts: int = 1) -> Engine:
    """An engine with the draft of --draft, for so many texts at once, each as long as the context.

    Raises:
        UserError: the draft doesn't fit the model, or it can't propose so many tokens.
    """
    longest = -(-model.config.max_seq_len // EngineConfig().block_tokens) * EngineConfig().block_tokens
    options = {"max_rows": n_texts, "cache_tokens": n_texts * longest}
    if args.draft_tokens is not None:
        options["draft_tokens"] = args.draft_tokens
    limits: EngineConfig = validate(EngineConfig, options, {(): args.command})
    return Engine(model, tokenizer, limits, draft=load_draft(args, tokenizer))


def note_drafts(engine: Engine) -> None:
    """Says on stderr how much a draft was worth."""
    done = engine.counters
    print(f"note: the model took {done.accepted_tokens} of the draft's {done.drafted_tokens} tokens", file=sys.stderr)


def print_drafted(engine: Engine, ids: list[int], sampling: SamplingConfig) -> None:
    """As `print_texts`, but a draft proposes tokens, and a note says how many of them the model took."""
    texts = {engine.submit(request): "" for request in requests_of(ids, sampling, sampling.seed)}
    alone, cut_off = sampling.n == 1, False
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise MachineError(event.error)
            texts[event.request_id] += event.text
            cut_off |= event.finish_reason == "length"
            if alone:
                print(event.text, end="", flush=True)
    if alone:
        print()
    for k, text in enumerate(() if alone else texts.values(), 1):
        print(f"--- {k} of {sampling.n}\n{text}")
    note_drafts(engine)
    _note_end(engine.model, ids, sampling, cut_off)


def is_chat_model(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether prompts belong into the chat template: it has one, and is not a base model of ours."""
    facts = read_json(folder).get("llmkit")
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
