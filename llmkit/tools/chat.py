"""`llmkit chat`: a conversation with a model, at a terminal or line by line through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.config import MachineError, UserError, validate
from llmkit.data.layouts import Message
from llmkit.inference.batch import check_model
from llmkit.inference.command import DTYPES, drafting_engine, is_chat_model, need_draft, note_drafts, read_sampling
from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Request
from llmkit.inference.generate import generate
from llmkit.inference.stream import FinishReason, Generation, TextStream
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device

COMMANDS = {
    "/help": "these lines",
    "/reset": "forgets the conversation, but not the system message",
    "/system [TEXT]": "another system message, or none; forgets the conversation",
    "/set [NAME VALUE]": "changes a setting, such as /set temperature 0.2; without a name: shows them all",
    "/retry": "another answer to what was said last",
    "/save FILE": "adds the conversation to a file, a line of JSON that `stage: sft` reads",
    "/quit": "ends the chat, as Ctrl-D does",
}
HELP = "\n".join(
    [
        *(f"{name:<18} {what}" for name, what in COMMANDS.items()),
        r"A line that ends with \ goes on in the next one; // begins a message with /. Ctrl-C ends an answer.",
    ]
)
# Of one text only, and streamed: so no samples side by side and no beams.
_NOT_SET = ("n", "beams", "length_penalty", "early_stopping")
SETTINGS = tuple(name for name in SamplingConfig.model_fields if name not in _NOT_SET)


def run(args: argparse.Namespace) -> int:
    """Answers alone on stdout, as they are made; all else goes to stderr. In a pipe a mistake ends the command."""
    sampling = read_sampling(args)
    need_draft(args)
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    if not is_chat_model(folder, tokenizer):
        what = "has no chat template" if tokenizer.template is None else "is a base model"
        raise UserError(f"{args.model}: {what}: it continues text, `llmkit generate`; `stage: sft` makes a chat model")
    model = load_model(folder, DTYPES.get(args.precision), pick_device(args.device))
    check_model(model, tokenizer.vocab_size)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    engine = None if args.draft is None else drafting_engine(args, model, tokenizer)
    chat = Chat(model, tokenizer, sampling, args.system, interactive, engine)
    if interactive:
        _say(f"{folder}: {model.config.max_seq_len} tokens of context; /help tells what else can be typed")
    for line in _messages(interactive):
        try:
            if not chat.take(line):
                break
        except UserError as e:
            if not interactive:
                raise
            _say(f"error: {e}")
    if engine is not None:
        note_drafts(engine)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the conversation ------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What was said, and from where on the model still sees it."""

    system: str | None
    turns: list[Message] = field(default_factory=list)
    """The user's and the assistant's, in turn."""
    n_forgotten: int = 0
    """Turns at the beginning that the context has no room for."""

    def messages(self) -> list[Message]:
        """All of it."""
        return [*self._instruction(), *self.turns]

    def _instruction(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def prompt(self, text: str, tokenizer: Tokenizer, n_columns: int) -> list[int]:
        """Ids of the conversation with another message of the user, in at most `n_columns` tokens.

        Where that is too long its oldest exchanges are forgotten, never the system message (`n_forgotten` tells).

        Raises:
            UserError: the message is too long on its own, or the template refuses it.
        """
        said: Message = {"role": "user", "content": text}
        for first in range(self.n_forgotten, len(self.turns) + 1, 2):
            asked = [*self._instruction(), *self.turns[first:], said]
            ids = tokenizer.encode_chat(asked, add_generation_prompt=True).ids
            if len(ids) <= n_columns:
                self.n_forgotten = first
                return ids
        raise UserError(
            f"the message is too long: with the system message and the template it takes {len(ids)} tokens, there is "
            f"room for {n_columns}: shorten it"
        )

    def add(self, text: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


class Chat:
    """A model, its settings and a conversation with it."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        system: str | None,
        interactive: bool,
        engine: Engine | None = None,
    ):
        """engine: of the same model with a draft; it then writes the answers."""
        self.model, self.tokenizer, self.sampling, self.interactive = model, tokenizer, sampling, interactive
        self.engine = engine
        self.history = History(system)
        self.n_asked = 0
        """Answers that were asked for: each draws from a seed of its own, also another one to the same message."""

    def take(self, line: str) -> bool:
        """Does what a line says; False if it ends the chat. Raises UserError for what can't be done."""
        if not line.strip():
            return True
        if line.startswith("//"):
            self.answer(line[1:])
        elif line.startswith("/"):
            name, _, rest = line.partition(" ")
            return self._command(name, rest.strip())
        else:
            self.answer(line)
        return True

    def _command(self, name: str, rest: str) -> bool:
        if rest and name in ("/help", "/reset", "/retry", "/quit"):
            raise UserError(f"{name} takes nothing more (got {rest!r})")
        match name:
            case "/help":
                _say(HELP)
            case "/reset":
                self.history = History(self.history.system)
            case "/system":
                self.history = History(rest or None)
            case "/set":
                self._set(rest)
            case "/retry":
                self._retry()
            case "/save":
                self._save(rest)
            case "/quit":
                return False
            case _:
                known = ", ".join(text.split()[0] for text in COMMANDS)
                raise UserError(f"{name}: no such command: {known}; // begins a message with /")
        return True

    def answer(self, text: str) -> None:
        """Writes an answer to a message of the user to stdout as it is made; both become part of the conversation."""
        context = self.model.config.max_seq_len
        # An answer needs room too: as much as was asked for, but no more than a quarter of the context.
        room = min(self.sampling.max_new_tokens, max(1, context // 4))
        fits = not self.history.n_forgotten
        ids = self.history.prompt(text, self.tokenizer, context - room)
        if fits and self.history.n_forgotten:
            _say(f"note: the context of {context} tokens is full: from here on the oldest messages are forgotten")
        seed = random.Random(f"{self.sampling.seed}/{self.n_asked}").getrandbits(63)
        self.n_asked += 1
        result = self._write(ids, seed)
        self.history.add(text, result.text)
        if result.finish_reason == "length":
            limit = self.sampling.max_new_tokens
            why = f"max_new_tokens is {limit}" if len(result.ids) == limit else f"the context of {context} is full"
            _say(f"note: the answer is cut off: {why}")

    def _write(self, ids: list[int], seed: int) -> Generation:
        with _ctrl_c_stops() if self.interactive else contextlib.nullcontext(lambda: False) as should_stop:
            if self.engine is not None:
                return self._write_drafted(self.engine, Request(ids, self.sampling, seed), should_stop)
            stream = TextStream(self.tokenizer, self.sampling.stop)
            (result,) = generate(
                self.model,
                [ids],
                self.sampling,
                tokenizer=self.tokenizer,
                seeds=[seed],
                should_stop=should_stop,
                on_token=lambda _row, token: print(stream.push(token), end="", flush=True),
            )
        print(stream.finish(), flush=True)
        return result

    def _write_drafted(self, engine: Engine, request: Request, should_stop: Callable[[], bool]) -> Generation:
        """The same by the engine, which keeps the keys and values of what was said before."""
        number = engine.submit(request)
        ids: list[int] = []
        logprobs: list[float] = []
        text = ""
        reason: FinishReason = "interrupted"
        try:
            while engine.busy and not should_stop():
                for event in engine.step():
                    if event.token is None or event.logprob is None or event.finish_reason == "error":
                        raise MachineError(f"the answer broke off: {event.error}")
                    ids.append(event.token)
                    logprobs.append(event.logprob)
                    text += event.text
                    reason = event.finish_reason or reason
                    print(event.text, end="", flush=True)
        finally:
            engine.cancel(number)  # what was interrupted holds no room
        print(flush=True)
        return Generation(ids, logprobs, text, reason)

    def _retry(self) -> None:
        if not self.history.turns:
            raise UserError("/retry: nothing was said yet")
        asked, answer = self.history.turns[-2:]
        del self.history.turns[-2:]
        self.history.n_forgotten = min(self.history.n_forgotten, len(self.history.turns))
        try:
            self.answer(asked["content"])
        except UserError:
            self.history.add(asked["content"], answer["content"])
            raise

    def _set(self, rest: str) -> None:
        name, *others = re.split(r"[\s=]+", rest, maxsplit=1)
        text = "".join(others)
        if not name:
            for setting in SETTINGS:
                _say(f"{setting:<20} {json.dumps(getattr(self.sampling, setting), ensure_ascii=False)}")
            return
        name = name.replace("-", "_")
        if name not in SETTINGS:
            raise UserError(f"/set {name}: no such setting: {', '.join(SETTINGS)}")
        if not text:
            raise UserError(f"/set {name}: give its value, such as /set {name} {_EXAMPLES.get(name, '0.5')}")
        try:
            value: Any = json.loads(text)
        except ValueError:
            value = text
        if name == "stop" and isinstance(value, str):
            value = [value]
        options = {**self.sampling.model_dump(mode="json"), name: value}
        self.sampling = validate(SamplingConfig, options, {(): "/set"})

    def _save(self, rest: str) -> None:
        if not rest or not self.history.turns:
            raise UserError("/save: nothing was said yet" if rest else "/save: name a file: /save talk.jsonl")
        try:
            with Path(rest).open("a", encoding="utf-8") as f:
                f.write(json.dumps({"messages": self.history.messages()}, ensure_ascii=False) + "\n")
        except OSError as e:
            raise UserError(f"/save {rest}: {e.strerror}") from None
        _say(f"{rest}: {len(self.history.turns)} messages added")


_EXAMPLES = {"max_new_tokens": "256", "top_k": "40", "stop": '["\\n"]', "seed": "1", "min_new_tokens": "8"}
_EXAMPLES |= {"logit_bias": '{" the": -5}'}


# --- lines -----------------------------------------------------------------------------------------------------------


def _messages(interactive: bool) -> Iterator[str]:
    """What is typed, or comes through a pipe: lines, those that end with a backslash put together with the next."""
    parts: list[str] = []
    for line in _typed(lambda: bool(parts)) if interactive else _piped():
        if line is None:  # given up with Ctrl-C
            parts.clear()
        elif line.endswith("\\"):
            parts.append(line[:-1])
        else:
            yield "\n".join([*parts, line])
            parts.clear()
    if parts:
        yield "\n".join(parts)


def _piped() -> Iterator[str]:
    with contextlib.suppress(AttributeError, ValueError):  # replaced by something simpler, or closed
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _typed(goes_on: Callable[[], bool]) -> Iterator[str | None]:
    """Lines of the terminal, where the system has it with a history and editing; None for one that was given up."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import is what makes input() better
    while True:
        try:
            yield input("... " if goes_on() else "> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D ends the chat")
            yield None


@contextlib.contextmanager
def _ctrl_c_stops() -> Iterator[Callable[[], bool]]:
    """Meanwhile a first Ctrl-C only makes the function it gives tell so; a second one interrupts as ever."""
    pressed = False

    def on_signal(_number: int, _frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
