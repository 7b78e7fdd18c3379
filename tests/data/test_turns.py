"""Prompts and answers as ids: the same for training, rewards and rollouts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmkit.config import UserError
from llmkit.data.turns import encode_dialogue, encode_turn, prompt_ids
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tokenizer.chat import CHATML, ChatTemplate, TurnsUnclear

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
PLAIN = """{{- bos_token -}}{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# As Qwen3 does: what was thought is written for the last turn only.
FORGETS = """{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}
{%- if m['role'] == 'assistant' and not loop.last -%}{{- m['content'].split('</think>')[-1] -}}
{%- else -%}{{- m['content'] -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
FORGETS_TAGGED = """{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}
{%- if m['role'] == 'assistant' -%}{%- generation -%}
{{- (m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
NO_END = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}assistant: {% endif -%}"  # noqa: E501


def with_template(source: str) -> Tokenizer:
    return Tokenizer(BYTES._spec, BYTES.names, ChatTemplate(source, "own"))


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["tags", "none"])
def test_a_turn_is_the_beginning_of_the_whole(template: str) -> None:
    """B28: prompt and answer are the ids of the conversation up to the end of turn: one terminator, nothing after it."""
    tokenizer, rng = with_template(template), random.Random(0)
    for _ in range(20):
        texts = ["".join(rng.choices(" a\n<|im_end|>é漢", k=rng.randrange(12))) for _ in range(rng.choice([2, 4, 6]))]
        messages = chat(*texts)
        prompt, answer = encode_turn(tokenizer, messages[:-1], texts[-1])
        whole = tokenizer.encode_chat(messages).ids
        assert prompt + answer == whole[: len(prompt) + len(answer)]
        assert answer.count(tokenizer.end_of_turn_id) == 1 and answer[-1] == tokenizer.end_of_turn_id
        assert tokenizer.decode(answer) == texts[-1]
        assert prompt == prompt_ids(tokenizer, messages[:-1])
        assert whole.count(tokenizer.bos_id) == 1  # B26


def test_plain_text_has_one_bos_and_one_eos() -> None:
    """B26, with data.chat: false."""
    prompt, answer = encode_turn(BYTES, "Q: a\nA:", " b", chat=False)
    assert prompt == [BYTES.bos_id, *BYTES.encode("Q: a\nA:")] and answer == [*BYTES.encode(" b"), BYTES.eos_id]
    assert prompt_ids(BYTES, "a") == prompt_ids(BYTES, [{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match=r"data\.chat is false"):
        prompt_ids(BYTES, chat("a"), chat=False)


def test_a_template_that_forgets_answers_as_it_generates() -> None:
    """B30: the prompt is that of generation, whatever the template makes of the conversation later."""
    tokenizer = with_template(FORGETS)
    messages = chat("a", "<think>x</think>b", "c")
    prompt, answer = encode_turn(tokenizer, messages, "<think>y</think>d")
    assert tokenizer.decode(prompt, skip_special=False).count("think") == 0
    assert tokenizer.decode(answer) == "<think>y</think>d" and answer[-1] == tokenizer.end_of_turn_id


def trained_text(tokenizer: Tokenizer, turns: Any) -> str:
    return tokenizer.decode([i for i, t in zip(turns.ids, turns.is_trained, strict=True) if t], skip_special=False)


def test_what_is_trained_is_the_assistants_text_and_its_end() -> None:
    """B29: decoding the trained ids gives every answer and its end of turn, for random conversations."""
    rng = random.Random(1)
    for _ in range(20):
        texts = ["".join(rng.choices("ab \n漢", k=rng.randrange(1, 9))) for _ in range(rng.choice([2, 4]))]
        (row,) = encode_dialogue(BYTES, chat(*texts))
        assert trained_text(BYTES, row) == "".join(f"{t}<|im_end|>" for t in texts[1::2])
        (row,) = encode_dialogue(BYTES, chat(*texts), train_on="last")
        assert trained_text(BYTES, row) == f"{texts[-1]}<|im_end|>"
        (row,) = encode_dialogue(BYTES, chat(*texts), train_on="all")
        assert all(row.is_trained)


@pytest.mark.parametrize("tags", [False, True])
def test_a_template_that_forgets_is_trained_turn_by_turn(tags: bool) -> None:
    """B30: each row is what the model sees when it writes that turn, also when generation tags hide the difference."""
    tokenizer = with_template(FORGETS_TAGGED if tags else FORGETS)
    messages = chat("a", "<think>x</think>b", "c", "<think>y</think>d")
    first, second = encode_dialogue(tokenizer, messages)
    assert trained_text(tokenizer, first) == "<think>x</think>b<|im_end|>"
    assert trained_text(tokenizer, second) == "<think>y</think>d<|im_end|>"
    for row, n in ((first, 1), (second, 3)):
        prompt = prompt_ids(tokenizer, messages[:n])
        assert row.ids[: len(prompt)] == prompt and row.is_trained[: len(prompt)] == [0] * len(prompt)
    (only_last,) = encode_dialogue(tokenizer, messages, train_on="last")
    assert only_last == second


def test_what_a_template_does_not_tell_is_refused() -> None:
    """A template in which no answer follows the prompt that would be generated from."""
    odd = with_template(FORGETS.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'"))
    with pytest.raises(TurnsUnclear):
        encode_dialogue(odd, chat("a", "b"))
    with pytest.raises(TurnsUnclear):
        encode_dialogue(odd, chat("a", "b", "c", "d"))


def test_a_template_that_leaves_out_tools_is_refused() -> None:
    """Else the model would learn answers to what it never saw."""
    tools = [{"type": "function", "function": {"name": "clock"}}]
    with pytest.raises(UserError, match=r"doesn't write the tools of this conversation \(clock\)"):
        with_template(PLAIN).encode_chat(chat("a", "b"), tools=tools)
    called = [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [tools[0]]}]
    with pytest.raises(UserError, match="doesn't write the tool_calls"):
        with_template(PLAIN).encode_chat(called)


def test_tools_calls_and_results_in_chatml() -> None:
    """Calls are learnt, what a tool answers is not; the system message and the tools share a turn."""
    call = {"name": "clock", "arguments": {"zone": "UTC <|im_end|>"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ]
    tools = [{"type": "function", "function": {"name": "clock", "description": "the time"}}]
    (row,) = encode_dialogue(BYTES, messages, tools)
    written = '<tool_call>{"name": "clock", "arguments": {"zone": "UTC <|im_end|>"}}</tool_call>'
    assert trained_text(BYTES, row) == f"{written}<|im_end|>Noon.<|im_end|>"
    assert row.ids.count(BYTES.end_of_turn_id) == 5  # B50: one for each turn, none from the call
    text = BYTES.decode(row.ids, skip_special=False)
    assert (
        text.startswith("<|bos|><|im_start|>system\nBe brief.\n\nTools") and '{"name": "clock", "description"' in text
    )
    prompt, answer = encode_turn(BYTES, messages[:-1], "Noon.", tools)
    assert prompt + answer == row.ids[: len(prompt + answer)]


def test_whether_a_template_ends_turns_is_known() -> None:
    assert BYTES.ends_turns and not with_template(NO_END).ends_turns
    assert with_template(NO_END).end_of_turn_id == BYTES.eos_id
