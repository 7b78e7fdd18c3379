"""Prompts -> sampled answers, with the ids, log-probabilities and turns as they were sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.config import Interrupted
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.inference.packed import network_of
from llmkit.inference.sampling import sample_seeds
from llmkit.inference.stream import Generation
from llmkit.model.gpt import GPT
from llmkit.rollout.batch import Rollouts
from llmkit.rollout.config import RolloutConfig
from llmkit.rollout.environment import Environment, continue_ids
from llmkit.rollout.prompts import PromptRow
from llmkit.rollout.rewards.base import Answer
from llmkit.tokenizer import Tokenizer

Message = dict[str, Any]
Generate = Callable[[Sequence[Sequence[int]], Sequence[int], int], list[Generation]]
"""(prompts, a seed for each, n) -> n continuations of each prompt, in the order of the prompts; a continuation is a
function of the weights, its prompt, its seed and its number. Raises Interrupted."""


@dataclass
class Sampled:
    """One answer while it is written. Nothing that was sampled is ever decoded and encoded again (B75)."""

    row: PromptRow
    seed: int
    ids: list[int]
    is_action: list[bool]
    """Of every id: the policy sampled it."""
    logprobs: list[float]
    """Of every id; 0 where it is no action."""
    messages: list[Message]
    """The conversation so far; empty where prompts are plain text."""
    text: str = ""
    """The last turn's."""
    finished: bool = False
    n_turns: int = 0

    def answer(self) -> Answer:
        """What a grader sees of it."""
        row = self.row
        messages = [*self.messages, {"role": "assistant", "content": self.text}] if self.messages else []
        n_written = sum(self.is_action)
        return Answer(
            row.prompt, self.text, self.ids, len(row.ids), self.finished, row.fields, messages, n_written
        )  # fmt: skip


def sampling_of(config: RolloutConfig, n: int, max_new_tokens: int) -> SamplingConfig:
    """The sampler's settings of a rollout."""
    return SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        n=n,
    )


def own_engine(
    model: GPT, config: RolloutConfig, tokenizer: Tokenizer, n_rows: int, should_stop: Callable[[], bool]
) -> Generate:
    """The policy itself writes. `n_rows` answers are to come; should_stop() is asked before every token."""
    network = network_of(model, n_rows * config.max_new_tokens, min(n_rows, config.batch_size))

    def write(prompts: Sequence[Sequence[int]], seeds: Sequence[int], n: int) -> list[Generation]:
        sampling = sampling_of(config, n, config.max_new_tokens)
        return generate(
            model, prompts, sampling, tokenizer=tokenizer, seeds=seeds, should_stop=should_stop, network=network
        )  # fmt: skip

    return write


def sample_answers(
    model: GPT,
    rows: Sequence[PromptRow],
    seeds: Sequence[int],
    config: RolloutConfig,
    tokenizer: Tokenizer,
    *,
    environment: Environment | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    engine: Generate | None = None,
) -> list[Sampled]:
    """config.samples_per_prompt answers to each prompt, in order. A prompt's are a function of its seed.

    Args:
        engine: writes them, batch by batch. Default: the model itself.

    Raises:
        Interrupted: should_stop() said so, which is asked before every token, or before every batch of an engine.
    """
    n = config.samples_per_prompt
    answers = [
        Sampled(row, s, list(row.ids), [False] * len(row.ids), [0.0] * len(row.ids), _messages(row))
        for row, seed in zip(rows, seeds, strict=True)
        for s in sample_seeds(seed, n)
    ]
    write = own_engine(model, config, tokenizer, len(answers), should_stop) if engine is None else engine
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    size = max(1, config.batch_size // n)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        if should_stop():
            raise Interrupted("stopped inside a rollout, which begins anew")
        made = write([rows[i].ids for i in part], [seeds[i] for i in part], n)
        for k, i in enumerate(part):
            for j in range(n):
                _take(answers[i * n + j], made[k * n + j])
    going = answers if environment is not None else []
    while going:
        assert environment is not None
        going = [a for a in going if _goes_on(a, environment, tokenizer, model.config.max_seq_len)]
        for start in range(0, len(going), config.batch_size):
            turn = going[start : start + config.batch_size]
            if should_stop():
                raise Interrupted("stopped inside a rollout, which begins anew")
            made = write([a.ids for a in turn], [sample_seeds(a.seed, a.n_turns + 1)[-1] for a in turn], 1)
            for answer, generation in zip(turn, made, strict=True):
                _take(answer, generation)
    return answers


def _messages(row: PromptRow) -> list[Message]:
    return [] if isinstance(row.prompt, str) else [dict(m) for m in row.prompt]


def _take(answer: Sampled, made: Any) -> None:
    """Adds a turn that was sampled."""
    if made.finish_reason == "interrupted":
        raise Interrupted("stopped inside a rollout, which begins anew")
    answer.ids += made.ids
    answer.is_action += [True] * len(made.ids)
    answer.logprobs += made.drawn_logprobs or made.logprobs
    answer.text, answer.finished = made.text, made.finish_reason == "stop"
    answer.n_turns += 1


def _goes_on(answer: Sampled, environment: Environment, tokenizer: Tokenizer, max_seq_len: int) -> bool:
    """Lets the environment reply; whether the policy has another turn."""
    if not answer.finished or answer.ids[-1] != tokenizer.end_of_turn_id or answer.n_turns >= environment.max_turns:
        return False
    reply = environment.reply(answer.messages, answer.text, answer.row.fields)
    if reply is None:
        return False
    added = continue_ids(tokenizer, answer.messages, answer.text, reply, answer.row.tools)
    if len(answer.ids) + len(added) >= max_seq_len:
        answer.finished = False  # there is no room for another turn: it is cut off
        return False
    answer.messages += [{"role": "assistant", "content": answer.text}, *reply]
    answer.ids += added
    answer.is_action += [False] * len(added)
    answer.logprobs += [0.0] * len(added)
    return True


def flat(answers: Sequence[Sampled]) -> dict[str, torch.Tensor]:
    """This rank's answers as one-dimensional tensors, to be put together with those of other ranks."""
    return {
        "ids": torch.tensor([i for a in answers for i in a.ids], dtype=torch.int64),
        "is_action": torch.tensor([f for a in answers for f in a.is_action], dtype=torch.int64),
        "logprobs": torch.tensor([p for a in answers for p in a.logprobs], dtype=torch.float64),
        "lengths": torch.tensor([len(a.ids) for a in answers], dtype=torch.int64),
        "prompt_lengths": torch.tensor([len(a.row.ids) for a in answers], dtype=torch.int64),
        "prompt": torch.tensor([a.row.number for a in answers], dtype=torch.int64),
        "finished": torch.tensor([a.finished for a in answers], dtype=torch.int64),
    }


def gathered(
    whole: dict[str, torch.Tensor],
    group_N: torch.Tensor,
    scores_N: torch.Tensor,
    parts: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> Rollouts:
    """The ranks' tensors from `flat`, one after the other, as a rollout."""
    lengths_N = whole["lengths"]
    N, T = len(lengths_N), int(lengths_N.max())
    here_NT = torch.arange(T) < lengths_N[:, None]

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(N, T, dtype=values.dtype).masked_scatter(here_NT, values)

    def before(values_NT: torch.Tensor) -> torch.Tensor:
        """What is known of token t + 1 stands at position t."""
        return torch.cat([values_NT[:, 1:], torch.zeros_like(values_NT[:, :1])], 1)

    return Rollouts(
        ids_NT=spread(whole["ids"]),
        actions_NT=before(spread(whole["is_action"])).bool(),
        lengths_N=lengths_N,
        prompt_lengths_N=whole["prompt_lengths"],
        group_N=group_N,
        prompt_N=whole["prompt"],
        finished_N=whole["finished"].bool(),
        sampler_NT=before(spread(whole["logprobs"])).to(dtype),
        scores_N=scores_N.to(dtype),
        parts={name: t.to(dtype) for name, t in parts.items()},
    )
