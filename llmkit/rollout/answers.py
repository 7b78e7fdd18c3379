"""Answers to held-out prompts, written while a model is trained and graded like those of a rollout."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit import storage
from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import Prompt, read_source
from llmkit.data.sources import where
from llmkit.data.turns import prompt_ids
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.inference.sampling import row_seeds
from llmkit.inference.stream import Generation
from llmkit.model.gpt import GPT
from llmkit.rollout.rewards.base import Answer, Rewards, Scores
from llmkit.rollout.rewards.config import AnswersConfig
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import Ranks
from llmkit.training.engine import Metrics
from llmkit.training.task import Context

FILE = "answers.jsonl"


@dataclass(frozen=True)
class _Question:
    """A prompt, encoded up to where the answer begins."""

    number: int
    ids: list[int]
    prompt: Prompt


class AnswerEval:
    """The questions of `eval.answers` and their graders; `evaluate` has a model answer them."""

    def __init__(
        self,
        config: AnswersConfig,
        tokenizer: Tokenizer,
        *,
        chat: bool = True,
        system: str | None = None,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
    ):
        """Reads and encodes the prompts, and builds the graders.

        Args:
            chat: as `data.chat` of the recipe.
            system: as `data.system`.
            max_seq_len: the model's context: prompts that fill it are left out, and counted.
            device: of reward models.

        Raises:
            UserError: for a row that is no prompt, or that a part cannot grade, naming file and row.
        """
        self.config, self.tokenizer = config, tokenizer
        self.rewards = Rewards(config.rewards, tokenizer, device)
        self.n_too_long = 0
        self.questions: list[_Question] = []
        source = SourceConfig(path=config.path, columns=config.columns, limit=config.limit, split=config.split)
        for piece, number, found in read_source(source, "prompt", chat, system=system):
            assert isinstance(found, Prompt)
            try:
                self.rewards.check(found.fields)
                ids = prompt_ids(tokenizer, found.prompt, chat, found.tools)
                if config.group_by is not None and config.group_by not in found.fields:
                    raise UserError(f"group_by: the row has no '{config.group_by}'")
            except UserError as e:
                raise UserError(f"eval.answers: {where(piece, number)}: {e}") from None
            if max_seq_len is not None and len(ids) >= max_seq_len:
                self.n_too_long += 1
            else:
                self.questions.append(_Question(len(self.questions), ids, found))
        if not self.questions:
            raise UserError(f"eval.answers: {config.path}: no prompt in it that the model could answer")

    def describe(self) -> list[str]:
        """What a run should say of it at its start."""
        left_out = f"; {self.n_too_long} fill the context and are left out" if self.n_too_long else ""
        graded = "; ".join(self.rewards.describe())
        return [f"answers    {len(self.questions)} prompts of {self.config.path}{left_out}", f"graded by  {graded}"]

    def close(self) -> None:
        """Ends the sandbox's processes and the like."""
        self.rewards.close()

    def evaluate(self, model: GPT, ctx: Context, step: int | None = None) -> Metrics | None:
        """Has the model answer all questions, every rank its share, and writes out/answers.jsonl.

        Args:
            model: as `engine.replica()` gives it.
            ctx: for ranks, folder and the stop flag, which is polled between batches by all ranks together.
            step: written beside the answers.

        Returns:
            `answers/<part>` and `answers/<part>/<group>` (means, before weights), `answers/mean` (of the weighted sum),
            `answers/tokens` (mean length), `answers/ended` (share that ended by itself) and, where graders failed,
            `answers/errors/<part>` (how often). None if it was asked to stop.
        """
        ranks = ctx.ranks
        answers: list[tuple[_Question, Answer]] = []
        for batch in self._batches(ranks):
            made = ranks.together(functools.partial(self._answers, model, batch, ctx))
            if ctx.all_should_stop():
                return None
            answers += made
        scores = ranks.together(lambda: self.rewards.score([answer for _, answer in answers]))
        self._write(ctx.out / FILE, ranks, step, answers, scores)
        return self._metrics(ranks, answers, scores)

    def _batches(self, ranks: Ranks) -> Iterator[list[_Question]]:
        """This rank's batches, of about one length each, the longest first; as many on every rank, the last may be empty."""
        by_length = sorted(self.questions, key=lambda q: (-len(q.ids), q.number))
        size = max(1, self.config.micro_rows // self.config.n)
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        for first in range(0, len(batches), ranks.world):
            at = first + ranks.rank
            yield batches[at] if at < len(batches) else []

    def _answers(self, model: GPT, batch: list[_Question], ctx: Context) -> list[tuple[_Question, Answer]]:
        if not batch:
            return []
        seeds = row_seeds(self.config.seed, len(self.questions))
        sampling = SamplingConfig(**{name: getattr(self.config, name) for name in SamplingConfig.model_fields})
        made = generate(
            model,
            [q.ids for q in batch],
            sampling,
            tokenizer=self.tokenizer,
            seeds=[seeds[q.number] for q in batch],
            should_stop=ctx.should_stop,
        )
        n = self.config.n
        return [(q, _answer(q, g)) for i, q in enumerate(batch) for g in made[i * n : (i + 1) * n]]

    def _metrics(self, ranks: Ranks, answers: list[tuple[_Question, Answer]], scores: Scores) -> Metrics:
        """Means over the answers of all ranks; a part that had nothing to say of an answer leaves it out."""
        values = {**scores.parts, "mean": scores.total}
        values["tokens"] = [float(a.length) for _, a in answers]
        values["ended"] = [float(a.finished) for _, a in answers]
        sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in values}
        if (by := self.config.group_by) is not None:
            groups = sorted({str(q.prompt.fields[by]) for q in self.questions})
            sums |= {f"{name}/{group}": [0.0, 0.0] for name in scores.parts for group in groups}
        for name, numbers in values.items():
            for (question, _), value in zip(answers, numbers, strict=True):
                if math.isnan(value):
                    continue
                keys = [name]
                if by is not None and name in scores.parts:
                    keys.append(f"{name}/{question.prompt.fields[by]}")
                for key in keys:
                    sums[key][0] += value
                    sums[key][1] += 1
        counts = ranks.sum_numbers(*(x for pair in sums.values() for x in pair), *map(float, scores.errors.values()))
        totals = zip(sums, counts[0 : 2 * len(sums) : 2], counts[1 : 2 * len(sums) : 2], strict=True)
        metrics = {f"answers/{name}": total / n for name, total, n in totals if n}
        errors = zip(scores.errors, counts[2 * len(sums) :], strict=True)
        return metrics | {f"answers/errors/{name}": n for name, n in errors if n}

    def _write(
        self, file: Path, ranks: Ranks, step: int | None, answers: list[tuple[_Question, Answer]], scores: Scores
    ) -> None:
        """All answers of all ranks, in the order of the prompts."""
        lines = []
        for i, (question, answer) in enumerate(answers):
            told: dict[str, Any] = {"number": question.number} | ({} if step is None else {"step": step})
            told |= {"prompt": answer.prompt, "answer": answer.text, "reward": _json(scores.total[i])}
            told["parts"] = {name: _json(values[i]) for name, values in scores.parts.items()}
            told |= {"tokens": answer.length, "ended": answer.finished, "fields": question.prompt.fields}
            lines.append(json.dumps(told, ensure_ascii=False, default=str))
        own = torch.tensor(list("".join(f"{line}\n" for line in lines).encode()), dtype=torch.uint8)
        whole = bytes(ranks.concat(own).tolist()).decode()
        if ranks.is_main:
            rows = whole.split("\n")[:-1]  # not splitlines: a text may hold other line separators
            rows.sort(key=lambda row: int(json.loads(row)["number"]))
            storage.replace_file(file, "".join(f"{row}\n" for row in rows))


def _answer(question: _Question, made: Generation) -> Answer:
    prompt = question.prompt.prompt
    messages = [] if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": made.text}]
    return Answer(
        prompt=prompt,
        text=made.text,
        ids=question.ids + made.ids,
        n_prompt=len(question.ids),
        finished=made.finish_reason == "stop",
        fields=question.prompt.fields,
        messages=messages,
        n_written=len(made.ids),
    )


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value
