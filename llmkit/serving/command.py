"""`llmkit serve`: a model behind OpenAI's API, and a page to chat with it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from llmkit.config import UserError, validate
from llmkit.inference.command import DTYPES, is_chat_model, load_draft, need_draft
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.model.weights import load_model
from llmkit.serving.config import ServingConfig
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device


def run(args: argparse.Namespace) -> int:
    """Serves until a signal comes; says on stderr where."""
    need_libraries("serve")
    from llmkit.serving.server import serve

    config = read_config(args)
    need_draft(args)
    engine_config: EngineConfig = validate(EngineConfig, _given(args, EngineConfig), {(): "serve"})
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, DTYPES.get(args.precision), pick_device(args.device))
    draft = None if args.draft is None else load_draft(args, tokenizer)
    engine = Engine(model, tokenizer, engine_config, draft=draft)
    chat = is_chat_model(folder, tokenizer)
    with listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        kind = "chat model" if chat else "base model: it has completions only"
        print(f"{config.name} ({kind}), context {model.config.max_seq_len}", file=sys.stderr)
        print(f"chat page http://{shown}:{port}/, API http://{shown}:{port}/v1", file=sys.stderr, flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # to stop a server is no failure
            signal.signal(number, lambda *_: None)
        serve(config, model, tokenizer, engine, chat, listener)
    return 0


def read_config(args: argparse.Namespace) -> ServingConfig:
    """The options of the command line; the key may come from the environment instead, where `ps` doesn't show it."""
    limits = {
        name: value
        for name, value in (("max_pending", args.max_pending), ("request_timeout_s", args.timeout))
        if value is not None
    }
    name = Path(args.model).resolve().name if args.name is None else args.name
    key = args.api_key if args.api_key is not None else os.environ.get("LLMKIT_API_KEY") or None
    data: dict[str, Any] = {"host": args.host, "port": args.port, "name": name, "api_key": key, "limits": limits}
    config: ServingConfig = validate(ServingConfig, data, {(): "serve"})
    return config


def _given(args: argparse.Namespace, kind: type[EngineConfig]) -> dict[str, Any]:
    return {name: value for name in kind.model_fields if (value := getattr(args, name, None)) is not None}


def need_libraries(command: str) -> None:
    """Raises UserError, naming the extra, where a server can't run."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as e:
        raise UserError(f"{command}: {e.name} is not installed: pip install 'llmkit[serve]'") from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(2048)
            stack.pop_all()
            return listener
    except OSError as e:
        raise UserError(f"serve: {host}:{port}: {e.strerror or e}: choose another --host or --port") from None
