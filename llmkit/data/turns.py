"""Conversations and plain texts -> ids of a prompt and of the answer to it: the one way for training, rewards and rollouts.

A prompt ends with the beginning of the assistant's turn; an answer ends with its end of turn and nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmkit.config import UserError
from llmkit.data.row import Message
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.chat import TurnsUnclear

TrainOn = Literal["assistant", "last", "all"]


def prompt_ids(
    tokenizer: Tokenizer, prompt: Sequence[Message] | str, chat: bool = True, tools: list[Any] | None = None
) -> list[int]:
    """The ids that an answer follows.

    Args:
        prompt: messages up to the assistant's turn; or text: with `chat` one message of the user, else plain text, which
            follows the bos token if there is one.

    Raises:
        UserError: the template refuses the conversation, or there is none.
    """
    if not chat:
        if not isinstance(prompt, str):
            raise UserError("a conversation, but data.chat is false: prompts and answers would have to be text")
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.encode_chat(messages, add_generation_prompt=True, tools=tools).ids


def encode_turn(
    tokenizer: Tokenizer,
    prompt: Sequence[Message] | str,
    response: str,
    tools: list[Any] | None = None,
    chat: bool = True,
) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and of an answer to it.

    The two together are the ids of the whole conversation up to its last end of turn, wherever the template writes the
    prompt as the beginning of that conversation; where it doesn't, the answer is what follows the prompt in generation.

    Args:
        prompt: see `prompt_ids`.
        response: the assistant's text.

    Raises:
        UserError: as `prompt_ids`.
    """
    before = prompt_ids(tokenizer, prompt, chat, tools)
    if not chat:
        return before, [*tokenizer.encode_on(response, before), tokenizer.eos_id]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        turn = [*messages, {"role": "assistant", "content": response}]
        whole = tokenizer.encode_chat(turn, train_on="last", tools=tools)
    except TurnsUnclear:
        return before, tokenizer.encode_reply(response, before)
    end = whole.turns[-1][1]
    if end <= len(before) or whole.ids[: len(before)] != before:
        return before, tokenizer.encode_reply(response, before)
    after = whole.ids[len(before) : end]
    if tokenizer.end_of_turn_id not in after:
        return before, [*after, tokenizer.end_of_turn_id]
    while after[-1] != tokenizer.end_of_turn_id:
        after.pop()
    return before, after


@dataclass(frozen=True)
class Turns:
    """One row's worth of a dialogue."""

    ids: list[int]
    is_trained: list[int]
    """1: this token is learnt."""


def encode_dialogue(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    train_on: TrainOn = "assistant",
    chat: bool = True,
) -> list[Turns]:
    """A conversation as one row; or, where the template would change earlier turns later on, as one row a turn.

    Each row of the latter is what the model sees when it writes that turn: so the text that is learnt is the text that
    is generated, whatever the template drops from the history (as Qwen3's does with thinking).

    Args:
        messages: with `chat: false` the user's text and the answer.
        train_on: the assistant's turns, the last of them, or every token.

    Raises:
        UserError: the template refuses the conversation, or doesn't tell what the assistant wrote in a single turn either.
    """
    if not chat:
        question, answer = (str(m["content"]) for m in messages)
        before, after = encode_turn(tokenizer, question, answer, chat=False)
        return [Turns(before + after, [int(train_on == "all")] * len(before) + [1] * len(after))]
    if train_on == "all":
        whole = tokenizer.encode_chat(messages, train_on="all", tools=tools)
        return [Turns(whole.ids, whole.loss_mask)]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    try:
        whole = tokenizer.encode_chat(messages, train_on=train_on, tools=tools)
        assert tokenizer.template is not None
        trained = turns if train_on == "assistant" else turns[-1:]
        if not tokenizer.template.marks_assistant:
            trained = []  # without tags, the spans were found by the same comparison
        if all(_stands_in(tokenizer, whole.text, messages, i, tools) for i in trained if i):
            return [Turns(whole.ids, whole.loss_mask)]
    except TurnsUnclear:
        if len(turns) < 2 and turns != [0]:
            raise
    if train_on == "last" or turns == [0]:
        raise TurnsUnclear(
            "the chat template doesn't write the conversation before the assistant's turn as the beginning of the whole, so "
            "what would be learnt is not what is generated from: choose another one (tokenizer.chat_template)"
        )
    rows = []
    for i in turns:
        if i:  # a turn that nothing precedes answers no prompt
            rows += encode_dialogue(tokenizer, messages[: i + 1], tools, "last")
    return rows


def _stands_in(
    tokenizer: Tokenizer, whole: str, messages: Sequence[Message], turn: int, tools: list[Any] | None
) -> bool:
    """Whether a conversation's text begins with the prompt of a turn, and with the text up to that turn's end."""
    prompt = tokenizer.render_chat(messages[:turn], add_generation_prompt=True, tools=tools)
    return whole.startswith(prompt) and (
        turn == len(messages) - 1 or whole.startswith(tokenizer.render_chat(messages[: turn + 1], tools=tools))
    )
