"""Conversations that go on: who answers the model between its turns, and which tokens that puts after its own.

What the model sampled stays as it was sampled (B75). Only the tokens that the chat template writes after it, up to where
the next turn begins, are encoded; they are no actions, so nothing of them is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.config import UserError
from llmkit.rollout.environment.config import EnvironmentConfig, ToolsConfig
from llmkit.rollout.environment.kinds import FunctionEnvironment, ToolEnvironment

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer

Message = dict[str, Any]


class Environment(Protocol):
    """Who answers the model."""

    max_turns: int
    """Turns of the model, the first included; who samples ends an answer there."""

    def reply(self, messages: Sequence[Message], text: str, fields: Mapping[str, Any]) -> list[Message] | None:
        """What comes after a turn of the model; None: the answer is complete.

        Args:
            messages: the conversation before that turn.
            text: the turn.
            fields: the row's other columns.
        """

    def describe(self) -> str:
        """What a person should know of it at the start of a run."""

    def close(self) -> None:
        """Ends what it has begun."""


def environment_of(config: EnvironmentConfig | None, tokenizer: Tokenizer) -> Environment | None:
    """The environment of a recipe; the tokenizer's chat template is tried with a small conversation.

    Raises:
        UserError: for a function that isn't there, or a template with which no conversation can go on.
    """
    if config is None:
        return None
    role = "tool" if isinstance(config, ToolsConfig) else "user"
    continue_ids(tokenizer, [{"role": "user", "content": "a"}], "b", [{"role": role, "content": "c"}])
    return ToolEnvironment(config) if isinstance(config, ToolsConfig) else FunctionEnvironment(config)


def continue_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    reply: str,
    observation: Sequence[Message],
    tools: list[Any] | None = None,
) -> list[int]:
    """The ids that the template writes between the end of a sampled turn and the beginning of the next.

    They begin after the turn's end-of-turn token, which was sampled, and end with the header of the assistant's next turn.
    Text in the observation never becomes a control token.

    Args:
        messages: the conversation before the turn.
        reply: the turn's text, without its end-of-turn token.
        observation: what was said to it: messages of users and tools.
        tools: as the prompt had them.

    Raises:
        UserError: for a template that is not prefix-preserving, as it would write the turns before otherwise once there is
            another message, or one that ends no turns.
    """
    if not messages:
        raise UserError("environment: prompts are plain text (data.chat: false), but only a conversation can go on")
    if not tokenizer.ends_turns:
        raise UserError("environment: the chat template writes no control token at the end of a turn: choose another")
    turn = [*messages, {"role": "assistant", "content": reply}]
    whole = tokenizer.encode_chat([*turn, *observation], add_generation_prompt=True, tools=tools)
    before = tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)
    after = tokenizer.render_chat(turn, tools=tools).rstrip()
    kept = whole.text.startswith(before) and whole.text.startswith(after) and after.startswith(before)
    if not kept or reply.strip() not in after[len(before) :] or not whole.turns:
        raise UserError(
            "environment: the chat template changes earlier turns when a conversation goes on (as those do that drop what "
            "was thought), so what was sampled could not stay as it was: set tokenizer.chat_template to one that keeps "
            "them, such as chatml"
        )
    return whole.ids[whole.turns[-1][1] :]
