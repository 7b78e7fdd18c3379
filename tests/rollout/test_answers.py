"""Answers to held-out prompts in the evaluations of a run."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.config import UserError, validate
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.rollout.answers import AnswerEval
from llmkit.rollout.rewards.config import AnswersConfig
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.training.dist import Ranks
from llmkit.training.task import Context, Stop

TOKENIZER = Tokenizer.train([], TokenizerConfig(kind="byte"))


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=16, d_ff=32, max_seq_len=96, vocab_size=320))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.4, generator=generator)
    return model.eval()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "ab" * (1 + i * 5 % 7), "answer": "x" if i % 3 else "never", "kind": ("sum", "fact")[i % 2], "n": i}
        for i in range(10)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(file: Path, **said: Any) -> AnswersConfig:
    given = {
        "path": str(file), "max_new_tokens": 6, "micro_rows": 4,
        "rewards": [{"kind": "exact"}, {"kind": "length", "target": 6, "weight": 0.5}], **said,
    }  # fmt: skip
    found = validate(AnswersConfig, given)
    assert isinstance(found, AnswersConfig)
    return found


def context(out: Path, ranks: Ranks | None = None, stop: Stop | None = None) -> Context:
    return Context(None, out, ranks or Ranks(), None, stop or Stop())  # type: ignore[arg-type]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").split("\n")[:-1]]


def test_answers_are_greedy_graded_and_kept(model: GPT, prompts: Path, tmp_path: Path) -> None:
    """One by one, the same prompts get the same answers; the metrics are their means."""
    answers = AnswerEval(config(prompts, group_by="kind"), TOKENIZER)
    metrics = answers.evaluate(model, context(tmp_path), step=7)
    assert metrics is not None
    told = lines(tmp_path)
    assert [row["number"] for row in told] == list(range(10)) and told[0]["step"] == 7
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
    for row in told:
        ids = TOKENIZER.encode_chat(row["prompt"], add_generation_prompt=True).ids
        (alone,) = generate(model, [ids], greedy, tokenizer=TOKENIZER)
        assert alone.text == row["answer"] and row["tokens"] == len(alone.ids)
        assert row["parts"]["length"] == pytest.approx(1 - abs(6 - len(alone.ids)) / 6)
        assert row["reward"] == row["parts"]["exact"] + 0.5 * row["parts"]["length"]
    n = len(told)
    assert metrics["answers/mean"] == pytest.approx(sum(row["reward"] for row in told) / n)
    assert metrics["answers/tokens"] == pytest.approx(sum(row["tokens"] for row in told) / n)
    assert metrics["answers/ended"] == pytest.approx(sum(row["ended"] for row in told) / n)
    for kind in ("sum", "fact"):
        values = [row["parts"]["length"] for row in told if row["fields"]["kind"] == kind]
        assert metrics[f"answers/length/{kind}"] == pytest.approx(sum(values) / len(values))
    assert answers.evaluate(model, context(tmp_path)) == metrics  # greedy: the same every time


def test_a_right_answer_counts(model: GPT, prompts: Path, tmp_path: Path) -> None:
    AnswerEval(config(prompts), TOKENIZER).evaluate(model, context(tmp_path))
    given = lines(tmp_path)[0]["answer"]
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "ab", "answer": given}) + "\n")
    metrics = AnswerEval(config(tmp_path / "own.jsonl"), TOKENIZER).evaluate(model, context(tmp_path))
    assert metrics is not None and metrics["answers/exact"] == 1.0


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks that are threads of this process."""

    shared: dict[str, Any] = field(default_factory=dict)

    def sum_(self, tensor: Tensor) -> Tensor:
        self.shared["barrier"].wait(60)
        self.shared[self.rank] = tensor.clone()
        self.shared["barrier"].wait(60)
        tensor.copy_(sum(self.shared[r] for r in range(self.world)))
        return tensor

    def any(self, flag: bool) -> bool:
        return bool(self.sum_(torch.tensor(int(flag))).item())


def test_two_ranks_say_the_same_as_one(model: GPT, prompts: Path, tmp_path: Path) -> None:
    """Also where one of them has nothing to do in the last round."""
    alone = AnswerEval(config(prompts, group_by="kind"), TOKENIZER).evaluate(model, context(tmp_path))
    kept = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    shared: dict[str, Any] = {"barrier": threading.Barrier(2)}
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        answers = AnswerEval(config(prompts, group_by="kind"), TOKENIZER)
        found[rank] = answers.evaluate(model, context(tmp_path, Threads(rank, 2, rank, shared=shared)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and found[0] == pytest.approx(alone)
    assert (tmp_path / "answers.jsonl").read_bytes() == kept


def test_a_signal_stops_it_between_batches(model: GPT, prompts: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop.signal = "SIGTERM"
    assert AnswerEval(config(prompts), TOKENIZER).evaluate(model, context(tmp_path, stop=stop)) is None
    assert not (tmp_path / "answers.jsonl").exists()


def test_several_samples_of_a_prompt(model: GPT, prompts: Path, tmp_path: Path) -> None:
    answers = AnswerEval(config(prompts, temperature=1.0, n=3, limit=2), TOKENIZER)
    answers.evaluate(model, context(tmp_path))
    told = lines(tmp_path)
    assert [row["number"] for row in told] == [0, 0, 0, 1, 1, 1] and len({row["answer"] for row in told}) > 2


def test_prompts_that_fill_the_context_are_left_out(prompts: Path) -> None:
    whole = AnswerEval(config(prompts), TOKENIZER)
    shortest = min(len(q.ids) for q in whole.questions)
    some = AnswerEval(config(prompts), TOKENIZER, max_seq_len=shortest + 1)
    assert 0 < len(some.questions) < 10 and some.n_too_long == 10 - len(some.questions)
    assert "fill the context" in some.describe()[0]
    with pytest.raises(UserError, match="no prompt in it"):
        AnswerEval(config(prompts), TOKENIZER, max_seq_len=3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"group_by": "colour"}, r"prompts\.jsonl:1: group_by: the row has no 'colour'"),
        ({"rewards": [{"kind": "numeric"}]}, r"prompts\.jsonl:1: rewards: numeric: 'answer' holds no number"),
        ({"rewards": [{"kind": "exact", "field": "gold"}]}, r"no 'gold', it has answer, kind, n"),
    ],
)
def test_rows_that_cannot_be_graded_are_named(prompts: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AnswerEval(config(prompts, **said), TOKENIZER)


def test_plain_text_prompts(model: GPT, prompts: Path, tmp_path: Path) -> None:
    """`data.chat: false`."""
    answers = AnswerEval(config(prompts, limit=3), TOKENIZER, chat=False)
    assert answers.evaluate(model, context(tmp_path)) is not None
    assert all(isinstance(row["prompt"], str) for row in lines(tmp_path))
