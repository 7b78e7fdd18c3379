"""Weighted sums of graders, functions of the user's, reward models, and what happens when a grader itself fails."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkit.config import MachineError, UserError, validate
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.layouts import to_disk
from llmkit.rollout.rewards.base import Answer, Part, Rewards
from llmkit.rollout.rewards.code import program_of
from llmkit.rollout.rewards.config import AnswersConfig, PythonReward
from llmkit.rollout.rewards.grading import EachAnswer, Failed, Grade
from llmkit.tokenizer import Tokenizer, TokenizerConfig

TOKENIZER = Tokenizer.train([], TokenizerConfig(kind="byte"))


def answers(*texts: str, **fields: Any) -> list[Answer]:
    """One answer a text, with the fields of each row as lists."""
    rows = [{name: values[i] for name, values in fields.items()} for i in range(len(texts))]
    prompt = [{"role": "user", "content": "q"}]
    return [
        Answer(prompt, t, [5, 6, *TOKENIZER.encode(t)], 2, True, row, [*prompt, {"role": "assistant", "content": t}])
        for t, row in zip(texts, rows, strict=True)
    ]


def rewards(*configs: dict[str, Any]) -> Rewards:
    parts = validate(AnswersConfig, {"path": "x", "rewards": list(configs)}).rewards
    return Rewards(parts, TOKENIZER)


class Says(EachAnswer):
    """Grades by a table of texts."""

    def __init__(self, table: dict[str, Any]):
        self.table = table

    def one(self, answer: Answer) -> Grade:
        grade = self.table[answer.text]
        if isinstance(grade, Exception):
            raise grade
        return grade


# --- sums and errors ------------------------------------------------------------------------------------------------


def test_the_sum_is_weighted_and_the_parts_are_not() -> None:
    """B92: what is logged can be added up again to what was learnt from."""
    graders = rewards(
        {"kind": "exact", "weight": 2.0},
        {"kind": "regex", "pattern": "a", "weight": -0.5, "name": "has_a"},
        {"kind": "length", "target": 4, "weight": 0.0},
    )
    scores = graders.score(answers("ab", "b", "xa", answer=["ab", "b", "b"]))
    assert scores.parts == {"exact": [1.0, 1.0, 0.0], "has_a": [1.0, 0.0, 1.0], "length": [0.5, 0.25, 0.5]}
    assert scores.total == [1.5, 2.0, -0.5]
    weights = {part.name: part.weight for part in graders.parts}
    again = [sum(weights[name] * values[i] for name, values in scores.parts.items()) for i in range(3)]
    assert again == scores.total
    assert scores.errors == {"exact": 0, "has_a": 0, "length": 0}


def test_a_graders_failure_is_no_wrong_answer() -> None:
    """B71: it is counted apart, and the answer has no reward, whatever the other parts say; 0 and False are grades."""
    table = {"zero": 0, "false": False, "none": None, "broken": ZeroDivisionError("no"), "nan": math.nan, "text": "1"}
    scores = Rewards([Part("a", 1.0, Says(table)), Part("b", 1.0, Says(dict.fromkeys(table, 1.0)))], TOKENIZER).score(
        answers(*table)
    )
    assert scores.total[:3] == [1.0, 1.0, 1.0] and all(map(math.isnan, scores.total[3:]))
    assert scores.parts["a"][:2] == [0.0, 0.0] and all(map(math.isnan, scores.parts["a"][2:]))
    assert scores.errors == {"a": 3, "b": 0}
    assert scores.reasons == {"a": "ZeroDivisionError: no"}


def test_a_failure_may_count_as_a_value() -> None:
    table = {"fine": 1.0, "broken": ValueError("x")}
    scores = Rewards([Part("a", 2.0, Says(table), on_error=-1.0)], TOKENIZER).score(answers(*table))
    assert scores.total == [2.0, -2.0] and scores.errors == {"a": 1} and math.isnan(scores.parts["a"][1])


def test_a_part_that_is_only_logged_cannot_spoil_the_sum() -> None:
    table = {"fine": 1.0, "broken": ValueError("x")}
    parts = [Part("a", 0.0, Says(table)), Part("b", 1.0, Says({"fine": 0.25, "broken": 0.5}))]
    assert Rewards(parts, TOKENIZER).score(answers(*table)).total == [0.25, 0.5]


def test_an_answer_that_no_part_grades_has_no_reward() -> None:
    """A part that is only logged makes none either, unless all are."""
    logged = {"kind": "length", "max": 9, "weight": 0.0}
    assert math.isnan(rewards({"kind": "exact"}, logged).score(answers("a", answer=[None])).total[0])
    assert rewards(logged).score(answers("a")).total == [0.0]


def test_a_grader_that_fails_on_everything_ends_the_run() -> None:
    """At once when it never worked; later on, when it failed three times in a row."""
    table: dict[str, Any] = {"fine": 1.0, "broken": OSError("gone")}
    with pytest.raises(MachineError, match=r"rewards: a: the grader failed on all 2 answers: OSError: gone"):
        Rewards([Part("a", 1.0, Says(table))], TOKENIZER).score(answers("broken", "broken"))
    later = Rewards([Part("a", 1.0, Says(table))], TOKENIZER)
    for text in ("fine", "broken", "broken", "fine", "broken", "broken"):
        later.score(answers(text))
    with pytest.raises(MachineError):
        later.score(answers("broken"))


def test_no_answers_have_all_parts() -> None:
    """A rank without a share must know the same names as the others."""
    scores = rewards({"kind": "exact"}, {"kind": "length", "max": 3}).score([])
    assert (
        scores.total == []
        and scores.parts == {"exact": [], "length": []}
        and list(scores.errors) == ["exact", "length"]
    )


def test_a_row_that_cannot_be_graded_is_named_before_the_run() -> None:
    graders = rewards({"kind": "exact"}, {"kind": "numeric", "field": "n"})
    graders.check({"answer": "a", "n": 3})
    with pytest.raises(UserError, match=r"rewards: numeric: 'n' holds no number"):
        graders.check({"answer": "a", "n": "x"})


def test_grading_works_in_a_thread() -> None:
    """B71: a grader that sets an alarm would fail there, and be swallowed."""
    graders = rewards({"kind": "exact"}, {"kind": "code", "weight": 0.5})
    rows = answers("def f(): return 1", "def f(): return 0", answer=["a", "b"], tests=["assert f() == 1"] * 2)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(graders.score(rows)))
    thread.start()
    thread.join()
    graders.close()
    assert seen[0].total == [0.5, 0.0] and not any(seen[0].errors.values())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "name at least one"),
        ([{"kind": "exact"}, {"kind": "exact"}], "two parts are called 'exact'"),
        ([{"kind": "exact", "name": "mean"}], "name of another metric"),
        ([{"kind": "nope"}], "exact"),
        ([{"kind": "exact", "feild": "a"}], "did you mean 'field'"),
    ],
)
def test_mistakes_in_a_recipe(parts: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards(*parts)


# --- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nthat's it", "x = 1\n"),
        ("```\nx = 1\n```\n```py\nx = 2\n```\n```text\nno\n```", "x = 2\n"),
        ("```python\nx = 1\n", "x = 1\n"),
    ],
)
def test_the_program_in_an_answer(text: str, code: str) -> None:
    assert program_of(text) == code


def test_code() -> None:
    """All tests or nothing; a share of them; HumanEval's `check`; input and output."""
    double = "```python\ndef f(x):\n    return 2 * x\n```"
    tests = ["assert f(1) == 2", "assert f(2) == 4", "assert f(2) == 5"]
    graders = rewards({"kind": "code"}, {"kind": "code", "partial": True, "name": "share"})
    scores = graders.score(answers(double, double, "no code", tests=[tests[:2], tests, tests]))
    assert scores.parts == {"code": [1.0, 0.0, 0.0], "share": [1.0, 2 / 3, 0.0]}
    human = rewards({"kind": "code", "field": "test", "setup": "prompt", "entry_point": "entry"})
    row = {"prompt": ["def f(x):\n"], "test": ["def check(c):\n    assert c(2) == 4\n"], "entry": ["f"]}
    assert human.score(answers("    return x + 2", **row)).total == [1.0]
    pairs = [[{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "7"}]]
    contest = rewards({"kind": "code"}, {"kind": "code", "partial": True, "name": "share"})
    assert contest.score(answers("print(2 * int(input()))", tests=pairs)).parts == {"code": [0.0], "share": [0.5]}
    for wrong in (3, [], [1], [{"input": "a"}]):
        with pytest.raises(UserError, match="must be Python statements"):
            graders.check({"tests": wrong})
    for held in (graders, human, contest):
        held.close()


def test_a_sandbox_that_breaks_is_not_the_programs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """B71: a failure, not a 0."""
    graders = rewards({"kind": "code", "sandbox": {"workers": 1}})
    rows = answers("x = 1", "x = 1", tests=["assert x == 1"] * 2)
    assert graders.score(rows).total == [1.0, 1.0]
    sandbox = graders.parts[0].grader.sandbox  # type: ignore[attr-defined]
    worker = sandbox._idle.get()
    worker._process.kill()
    sandbox._idle.put(worker)
    scores = graders.score(rows)
    graders.close()
    assert math.isnan(scores.total[0]) and scores.total[1] == 1.0 and scores.errors == {"code": 1}


# --- functions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of reward functions in the working directory."""
    name = f"own_rewards_{random.getrandbits(32)}"
    (tmp_path / f"{name}.py").write_text(
        "def length(completions, scale=1.0, **columns):\n"
        "    return [len(c[-1]['content']) * scale for c in completions]\n"
        "def known(prompts, completions, answer):\n"
        "    return [None if a is None else float(c[-1]['content'] == a) for c, a in zip(completions, answer)]\n"
        "def raises(completions, **columns):\n    raise KeyError('x')\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "async def later(completions, **columns):\n    return [0.5 for _ in completions]\n"
        "def seen(prompts, completions, completion_ids, kind, **columns):\n"
        "    return [float(p[0]['content'] == 'q' and k == 'fact' and len(i) == len(c[0]['content']))\n"
        "            for p, c, i, k in zip(prompts, completions, completion_ids, kind)]\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_functions_are_called_as_trl_calls_them(module: str) -> None:
    parts = [
        {"kind": "python", "function": f"{module}:length", "name": "length", "arguments": {"scale": 2.0}},
        {"kind": "python", "function": f"{module}.known", "name": "known"},
        {"kind": "python", "function": f"{module}:later", "name": "later"},
        {"kind": "python", "function": f"{module}:seen", "name": "seen"},
    ]
    scores = rewards(*parts).score(answers("a", "bc", answer=["a", None], kind=["fact", "fact"]))
    assert scores.parts["length"] == [2.0, 4.0]
    assert scores.parts["known"][0] == 1.0 and math.isnan(scores.parts["known"][1])
    assert scores.parts["later"] == [0.5, 0.5] and scores.parts["seen"] == [1.0, 1.0]
    assert scores.total == [4.5, 5.5]  # what says nothing of an answer is left out of its sum


def test_trl_still_calls_them_so() -> None:
    """Its own line, read and not imported (that takes longer than all of these tests)."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "trainer" / "grpo_trainer.py").read_text("utf-8")
    assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs" in source


def test_failures_of_functions(module: str) -> None:
    for name in ("raises", "short"):
        with pytest.raises(MachineError, match="failed on all 2 answers"):
            rewards({"kind": "python", "function": f"{module}:{name}"}).score(answers("a", "b"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("MODULE:nope", r"has no function 'nope'; it has length, known"),
        ("MODULE:value", "has no function 'value'"),
    ],
)
def test_functions_that_are_not_there(module: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards({"kind": "python", "function": name.replace("MODULE", module)})
    with pytest.raises(UserError, match="takes no 'scael'"):
        rewards({"kind": "python", "function": f"{module}:known", "arguments": {"scael": 1}})


def test_a_module_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"importing broken_rewards failed: ModuleNotFoundError: .*no_such_thing"):
        rewards({"kind": "python", "function": "broken_rewards:f"})


def test_the_demo_worlds_rewards_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the oracle, every right answer is exact, correct and of good quality, and silence is not."""
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "data" / "demo" / "heldout.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()][:60]
    names = ("exact", "quality", "correct")
    graders = rewards(*({"kind": "python", "function": f"data.rewards.{n}", "name": n} for n in names))
    prompt = [{"role": "user", "content": "q"}]

    def of(text: str, row: dict[str, Any]) -> Answer:
        return Answer(prompt, text, [1], 1, True, row, [*prompt, {"role": "assistant", "content": text}])

    right = graders.score([of(row["answer"], row) for row in rows])
    assert set(right.parts["exact"]) == set(right.parts["correct"]) == {1.0} and min(right.parts["quality"]) > 0.8
    wrong = graders.score([of("", {"item": row}) for row in rows])
    assert set(wrong.parts["exact"]) == set(wrong.parts["quality"]) == {0.0}
    strange = graders.score([of("a", row) for row in ({"answer": "a"}, rows[0])])
    assert math.isnan(strange.total[0]) and not any(strange.errors.values())


# --- reward models --------------------------------------------------------------------------------------------------


def write_classifier(
    folder: Path,
    *,
    tokenizer: Tokenizer = TOKENIZER,
    head: bool = True,
    facts: dict[str, Any] | None = None,
    **shape: Any,
) -> SequenceClassifier:
    """A tiny reward model with random weights in a folder."""
    sizes: dict[str, Any] = {
        "n_layers": 1,
        "n_heads": 2,
        "d_model": 16,
        "d_ff": 32,
        "max_seq_len": 32,
        "vocab_size": 320,
    }
    config = GPTConfig(**{**sizes, **shape})
    model = SequenceClassifier(config, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)
    init_head(model, 1)
    folder.mkdir()
    files = model_files(
        config, torch.float32, tokenizer, {"stage": "reward", "step": 0, **(facts or {})},
        head="classify", n_labels=1, problem_type="regression",
    )  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tensors = {k: v.clone() for k, v in to_disk(config, dict(model.named_parameters())).items()}
    if not head:
        del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model.eval()


def sampled(rng: random.Random, lengths: Sequence[int]) -> list[Answer]:
    rows = [[rng.randrange(5, TOKENIZER.vocab_size) for _ in range(n)] for n in lengths]
    return [Answer("p", "whatever", ids, 2, True, {}, []) for ids in rows]


def test_a_reward_model_reads_the_sampled_ids(tmp_path: Path) -> None:
    """B75, B78: no decoding; the score is that of the last token, normalised by the stored figures, then bounded."""
    facts = {"reward_mean": 0.5, "reward_std": 0.25, "reward_n": 9}
    model = write_classifier(tmp_path / "rm", facts=facts)
    rows = sampled(random.Random(0), [9, 3, 30, 3, 17])
    with torch.no_grad():
        alone = [model(torch.tensor([a.ids]), torch.tensor([len(a.ids)])).item() for a in rows]
    path = {"kind": "model", "path": str(tmp_path / "rm")}
    found = rewards({**path, "clip": None, "micro_tokens": 32}).score(rows).total
    assert found == pytest.approx([(r - 0.5) / 0.25 for r in alone], abs=1e-5)
    assert rewards({**path, "normalise": False, "clip": None}).score(rows).total == pytest.approx(alone, abs=1e-5)
    bound = 0.5 * max(map(abs, found))
    clipped = rewards({**path, "clip": bound}).score(rows).total
    assert clipped == pytest.approx([max(-bound, min(bound, r)) for r in found], abs=1e-5)
    assert rewards(path).describe()[0].endswith("mean 0.5, std 0.25")


def test_a_conversation_too_long_for_the_reward_model_loses_its_beginning(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "rm", max_seq_len=8)
    (row,) = sampled(random.Random(0), [20])
    with torch.no_grad():
        kept = model(torch.tensor([row.ids[-8:]]), torch.tensor([8])).item()
    graders = rewards({"kind": "model", "path": str(tmp_path / "rm"), "clip": None})
    assert graders.score([row]).total == pytest.approx([kept], abs=1e-5)
    assert "no mean and std" in graders.describe()[0]


def test_reward_models_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    """A head that would be random, another tokenizer, another template: one sentence before the run."""
    write_classifier(tmp_path / "headless", head=False)
    with pytest.raises(UserError, match=r"rewards: model: .*headless.* no score\.weight"):
        rewards({"kind": "model", "path": str(tmp_path / "headless")})
    other = Tokenizer.train([], TokenizerConfig(kind="byte", special=("<|extra|>",)))
    write_classifier(tmp_path / "other", tokenizer=other)
    with pytest.raises(UserError, match=r"tokenizer is another than the policy's \(\d+ and \d+ tokens\)"):
        rewards({"kind": "model", "path": str(tmp_path / "other")})
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    template = Tokenizer.train([], TokenizerConfig(kind="byte", chat_template=str(tmp_path / "t.jinja")))
    write_classifier(tmp_path / "template", tokenizer=template)
    with pytest.raises(UserError, match="chat template is another than the policy's"):
        rewards({"kind": "model", "path": str(tmp_path / "template")})


def test_a_score_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    """B71: NaN is no reward, and no 0 either."""
    write_classifier(tmp_path / "rm")
    graders = rewards({"kind": "model", "path": str(tmp_path / "rm")})
    grader = graders.parts[0].grader
    assert isinstance(grader._grade(math.nan), Failed) and isinstance(grader._grade(math.inf), Failed)  # type: ignore[attr-defined]
    assert grader._grade(0.0) == 0.0  # type: ignore[attr-defined]


def test_configs_and_labels() -> None:
    config = PythonReward(kind="python", function="a.b:c")
    assert config.label == "python" and PythonReward(kind="python", function="a.b", name="x").label == "x"
