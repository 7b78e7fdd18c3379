"""Rollouts: what stands where, what is drawn when, and what is no action."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig
from llmkit.data.order import Mixture, Permutation, SampleOrder, epoch_key
from llmkit.losses import IGNORE
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.rollout import collect
from llmkit.rollout.batch import Rollouts, by_length
from llmkit.rollout.collect import Sampled, flat, gathered, sample_answers
from llmkit.rollout.config import RolloutConfig
from llmkit.rollout.prompts import PromptOrder, PromptRow, read_prompts
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.config import TokenizerConfig


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_config(TokenizerConfig(kind="byte"))


def policy(seed: int = 0) -> GPT:
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=16, max_seq_len=64, vocab_size=320))
    init_weights(model, seed)
    return model


def prompt(ids: list[int], number: int = 0) -> PromptRow:
    return PromptRow(ids, "text", {}, None, number)


def answers() -> list[Sampled]:
    """Two answers of unequal length; in the second, ids 8 and 9 are what a tool said."""
    return [
        Sampled(prompt([1, 2]), 0, [1, 2, 3, 4], [False, False, True, True], [0.0, 0.0, -1.0, -2.0], [], finished=True),
        Sampled(
            prompt([5], 1), 0, [5, 6, 7, 8, 9, 10], [False, True, True, False, False, True], [0, -3, -4, 0, 0, -5], []
        ),
    ]


def rollouts() -> Rollouts:
    scores = torch.tensor([1.0, float("nan")])
    return gathered(flat(answers()), torch.tensor([10, 11]), scores, {"a": torch.tensor([1.0, 2.0])}, torch.float64)


# --- what stands where -----------------------------------------------------------------------------------------------


def test_what_is_known_of_a_token_stands_before_it() -> None:
    """B6: position t is the choice of token t + 1; prompts, what a tool said and padding are no actions."""
    r = rollouts()
    assert r.ids_NT.tolist() == [[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 10]]
    assert r.actions_NT.tolist() == [[False, True, True, False, False, False], [True, True, False, False, True, False]]
    X = IGNORE
    assert r.labels_NT.tolist() == [[X, 3, 4, X, X, X], [6, 7, X, X, 10, X]]
    assert r.sampler_NT.tolist() == [[0, -1, -2, 0, 0, 0], [-3, -4, 0, 0, -5, 0]]
    assert r.n_actions == 5 and r.finished_N.tolist() == [True, False] and r.prompt_N.tolist() == [0, 1]


def test_an_answer_without_a_reward_has_no_action() -> None:
    assert rollouts().without_ungraded().actions_NT.any(1).tolist() == [True, False]


def test_rollouts_are_their_tensors() -> None:
    r = rollouts().knowing({"advantages_NT": torch.ones(2, 6)})
    again = Rollouts.of({name: t.clone() for name, t in r.tensors().items()})
    assert again.tensors().keys() == r.tensors().keys() and again.parts.keys() == {"a"}
    for name, t in again.tensors().items():
        assert torch.equal(t.nan_to_num(9), r.tensors()[name].nan_to_num(9)), name


def test_rows_and_joined_keep_the_answers() -> None:
    r = rollouts()
    one, two = r.rows(torch.tensor([0])), r.rows(torch.tensor([1]))
    assert one.ids_NT.shape == (1, 4) and two.ids_NT.shape == (1, 6)
    back = one.joined([two])
    for name, t in back.tensors().items():
        assert torch.equal(t.nan_to_num(9), r.tensors()[name].nan_to_num(9)), name


def test_batches_by_length() -> None:
    batches = by_length([3, 9, 4, 4, 20, 1], 12)
    assert batches == [[4], [1], [2, 3, 0], [5]] and sorted(i for b in batches for i in b) == list(range(6))


# --- what is drawn when ----------------------------------------------------------------------------------------------


def test_the_order_is_that_of_mixture_and_permutation() -> None:
    order = SampleOrder([5, 7], [1.0, 3.0], seed=4)
    numbers = np.arange(40)
    source, row = order.rows(numbers)
    expected, index = Mixture([1.0, 3.0]).many(numbers)
    assert source.tolist() == expected.tolist()
    for s, i, r in zip(source.tolist(), index.tolist(), row.tolist(), strict=True):
        n = [5, 7][s]
        assert r == Permutation(n, epoch_key(4, s, i // n))(i % n)


def data_of(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> DataConfig:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return DataConfig.model_validate({"train": ({"path": str(tmp_path / "p.jsonl")},), "chat": False, **more})


def test_prompts_are_drawn_once_an_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cfg = data_of(tmp_path, [{"prompt": f"第{i}题", "answer": str(i)} for i in range(30)], valid_frac=0.2)
    data = read_prompts(cfg, tokenizer, 32)
    order, n = PromptOrder(data, 3), len(data.train[0])
    assert 15 < n < 30 and n + len(data.valid[0]) == 30
    for epoch in range(2):
        drawn = [row.number for row in order.draw(epoch * n, n)]
        assert sorted(drawn) == sorted(row.number for row in data.train[0])
    assert [r.number for r in order.draw(0, n)] != [r.number for r in order.draw(n, n)]
    assert [row.number for row in data.all] == list(range(30))
    assert data.all[7].fields == {"answer": "7"} and data.all[7].prompt == "第7题"


def test_long_prompts_lose_their_beginning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = read_prompts(data_of(tmp_path, [{"prompt": "abcdef"}], valid_frac=0.0), tokenizer, 3)
    assert data.train[0][0].ids == tokenizer.encode("def") and data.n_cut == 1


def test_a_row_that_cannot_be_graded_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def check(fields: Any) -> None:
        if "answer" not in fields:
            raise UserError("the row has no 'answer'")

    cfg = data_of(tmp_path, [{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
    with pytest.raises(UserError, match=r"p\.jsonl:2: the row has no 'answer'"):
        read_prompts(cfg, tokenizer, 9, check=check)
    with pytest.raises(Interrupted):
        read_prompts(cfg, tokenizer, 9, should_stop=lambda: True)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_their_company(tokenizer: Tokenizer) -> None:
    """B57, B88: the samples of a prompt differ, and are the same in any batch."""
    rows = [prompt(tokenizer.encode(t), i) for i, t in enumerate(("a", "some", "longer prompt", "b"))]
    config = RolloutConfig(samples_per_prompt=3, max_new_tokens=6)
    model = policy().double()
    together = sample_answers(model, rows, [5, 6, 7, 8], config, tokenizer)
    apart = [
        a for r, s in zip(rows, (5, 6, 7, 8), strict=True) for a in sample_answers(model, [r], [s], config, tokenizer)
    ]
    small = sample_answers(model, rows, [5, 6, 7, 8], config.model_copy(update={"batch_size": 3}), tokenizer)
    for a, b, c in zip(together, apart, small, strict=True):
        assert a.ids == b.ids == c.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-12)
    assert len({tuple(a.ids) for a in together}) == 12


def test_turns_of_tools_are_no_actions(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """B75: what was sampled stays as it is; what the environment says comes between, and is not the policy's."""
    said = {"role": "tool", "content": "42"}
    added = tokenizer.encode("[42]")
    monkeypatch.setattr(collect, "continue_ids", lambda *args: added)

    class Twice:
        max_turns = 3

        def reply(self, messages: Any, text: str, fields: Any) -> Any:
            return [said] if True else None

    row = PromptRow(tokenizer.encode("hi"), [{"role": "user", "content": "hi"}], {}, None, 0)
    config = RolloutConfig(samples_per_prompt=2, max_new_tokens=5)
    made: list[list[int]] = []
    original: Callable[..., Any] = collect.generate

    def ending(model: GPT, prompts: Any, *args: Any, **more: Any) -> Any:
        made.extend(list(p) for p in prompts)
        return [  # as if every turn had ended by itself
            type(g)(ids=[*g.ids[:-1], tokenizer.end_of_turn_id], logprobs=g.logprobs, text=g.text, finish_reason="stop")
            for g in original(model, prompts, *args, **more)
        ]

    monkeypatch.setattr(collect, "generate", ending)
    for answer in sample_answers(policy(), [row], [1], config, tokenizer, environment=Twice()):
        assert answer.n_turns == 3 and len(answer.ids) == 2 + 3 * 5 + 2 * len(added)
        spoken = [i for i, own in zip(answer.ids, answer.is_action, strict=True) if not own]
        assert spoken == tokenizer.encode("hi") + added + added
        assert all((p < 0) == own for p, own in zip(answer.logprobs, answer.is_action, strict=True))
        roles = [m["role"] for m in answer.answer().messages]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
        assert answer.answer().length == 15
    assert all(any(p == whole[: len(p)] for whole in made) for p in made)  # later prompts go on from earlier ones


def test_a_stop_inside_a_rollout(tokenizer: Tokenizer) -> None:
    with pytest.raises(Interrupted):
        sample_answers(
            policy(), [prompt([1, 2])], [0], RolloutConfig(max_new_tokens=4), tokenizer, should_stop=lambda: True
        )
