"""Graders of text by rules: what counts as right, in English and Chinese."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from llmkit.config import UserError, validate
from llmkit.rollout.rewards.config import (
    ChoiceReward,
    CodeReward,
    ExactReward,
    FormatReward,
    LengthReward,
    NumericReward,
    RegexReward,
)
from llmkit.rollout.rewards.graders import (
    ChoiceGrader,
    ExactGrader,
    FormatGrader,
    LengthGrader,
    NumericGrader,
    RegexGrader,
    chosen_letter,
)
from llmkit.rollout.rewards.grading import Answer
from llmkit.rollout.rewards.quantities import last_number, marked_number, numbers_in


def answer(text: str, n_tokens: int = 0, **fields: Any) -> Answer:
    return Answer("p", text, [0] * (3 + n_tokens), 3, True, fields, [])


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right", "grade"),
    [
        ("Oakford", "Oakford", 1.0),
        (" oakford. ", "Oakford", 1.0),
        ("Oak  ford!", "oak ford", 1.0),
        ("橡渡。", "橡渡", 1.0),
        ("４２", "42", 1.0),
        ("42", 42, 1.0),
        ("In Oakford", "Oakford", 0.0),
        ("", "Oakford", 0.0),
        ("b", ["a", "b"], 1.0),
    ],
)
def test_exact(text: str, right: Any, grade: float) -> None:
    assert ExactGrader(ExactReward(kind="exact")).one(answer(text, answer=right)) == grade


def test_exact_by_its_options() -> None:
    strict = ExactReward(
        kind="exact", nfkc=False, ignore_case=False, ignore_whitespace=False, ignore_final_punctuation=False
    )
    for text in ("oakford", "Oakford.", " Oakford", "Ｏakford"):
        assert ExactGrader(strict).one(answer(text, answer="Oakford")) == 0.0
    assert ExactGrader(ExactReward(kind="exact")).one(answer("no", answer="yes", accept=["NO"])) == 1.0
    after = ExactReward(kind="exact", extract=r"</think>(.*)")
    assert ExactGrader(after).one(answer("<think>no</think> yes", answer="yes")) == 1.0
    assert ExactGrader(after).one(answer("yes", answer="yes")) == 0.0  # what was asked for isn't there


def test_rows_without_an_answer() -> None:
    """Null is a row that this part doesn't grade; no column at all, or one of the wrong kind, is a mistake."""
    grader = ExactGrader(ExactReward(kind="exact"))
    assert grader.one(answer("a", answer=None)) is None
    with pytest.raises(UserError, match=r"no 'answer', it has gold: set `field`"):
        grader.check({"gold": "a"})
    with pytest.raises(UserError, match="must be text"):
        grader.check({"answer": {"a": 1}})


# --- numeric --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", "1234.5"), ("-3", "-3"), ("−3", "-3"), ("1.5e3", "1500"), ("$5", "5"), ("-$5", "-5"), ("3/4", "3/4"),
        ("1 3/4", "7/4"), (r"\frac{3}{4}", "3/4"), ("１２３", "123"), ("１，２３４", "1234"), ("三千零五", "3005"),
        ("一点五", "1.5"), ("三分之二", "2/3"), ("3万", "30000"), ("1.5亿", "150000000"), ("负五", "-5"), ("贰佰", "200"),
        ("二十五", "25"), ("十五", "15"), ("三百五", "350"), ("三百零五", "305"), ("两万零五百", "20500"),
        ("二〇二四", "2024"),
        ("一亿三千万", "130000000"), ("一万亿", "1000000000000"), ("10-5", "5"), ("it is 7.", "7"), ("2 + 3 = 5", "5"),
        (".5", "0.5"), ("1,2,3", "3"), ("第一，共12个", "12"),
    ],
)  # fmt: skip
def test_numbers(text: str, value: str) -> None:
    found = last_number(text)
    assert found is not None and found.value == Fraction(value)


def test_a_clause_is_no_thousand() -> None:
    assert [n.value for n in numbers_in("有3，400不算")] == [3, 400]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 7\n#### 1,234", 1234), (r"\boxed{x = 5} and 3", 5), (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        ("答案是二十五。", 25), ("答案：12个", 12), ("The answer is $18. Not 20.", 18), ("<answer> 4 </answer> 9", 4),
        ("The final answer to the question is 5 of 12", 5), ("The answer is 3. No: the answer is 4", 4), ("just 3", None),
        ("#### none, but 3 here\n4", 3), ("####\n4", 4),
    ],
)  # fmt: skip
def test_marked_numbers(text: str, value: Any) -> None:
    found = marked_number(text)
    assert (None if found is None else found.value) == value


@pytest.mark.parametrize(
    ("text", "right", "grade"),
    [
        ("The answer is 72 of 100.", "48 + 24 = 72\n#### 72", 1.0),
        ("I think 72", "72", 1.0),
        ("72.0", 72, 1.0),
        ("1/2", "0.5", 1.0),
        ("50%", "0.5", 1.0),
        ("50%", "50", 1.0),
        ("50", "50%", 1.0),
        ("5000%", "50%", 0.0),
        ("seventy", "70", 0.0),
        ("71", "72", 0.0),
        ("四十二", "42", 1.0),
        ("", "1", 0.0),
        ("9" * 10_000, "1", 0.0),
        ("亿" * 10_000, "1", 0.0),
    ],
)
def test_numeric(text: str, right: Any, grade: float) -> None:
    assert NumericGrader(NumericReward(kind="numeric")).one(answer(text, answer=right)) == grade


def test_numeric_by_its_options() -> None:
    near = NumericGrader(NumericReward(kind="numeric", tolerance=0.3))
    assert near.one(answer("3.3", answer=3)) == 1.0 and near.one(answer("3.31", answer=3)) == 0.0
    relative = NumericGrader(NumericReward(kind="numeric", relative_tolerance=0.01))
    assert relative.one(answer("202", answer=200)) == 1.0 and relative.one(answer("203", answer=200)) == 0.0
    marked = NumericGrader(NumericReward(kind="numeric", marked=True))
    assert marked.one(answer("it is 5", answer=5)) == 0.0 and marked.one(answer("#### 5", answer=5)) == 1.0
    with pytest.raises(UserError, match="holds no number"):
        marked.check({"answer": "blue"})


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789,./%-e零一二十百万亿点分之负 \\frac{}答案是#", max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    """B71: whatever a model writes is right or wrong, never an error of the grader."""
    assert NumericGrader(NumericReward(kind="numeric")).one(answer(text, answer="1")) in (0.0, 1.0)
    assert ChoiceGrader(ChoiceReward(kind="choice")).one(answer(text, answer="A")) in (0.0, 1.0)


@pytest.mark.parametrize("number", [0, 7, 10, 19, 100, 101, 110, 1000, 1001, 10_000, 100_010, 99_999_999, 120_000_000])
def test_chinese_numerals_of_a_writer(number: int) -> None:
    found = last_number(written(number))
    assert found is not None and found.value == number, written(number)


def written(n: int) -> str:
    """A number in Chinese numerals."""
    if n < 10:
        return "零一二三四五六七八九"[n]
    for value, unit in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= value:
            rest = n % value
            zero = "零" if rest and rest < value // 10 else ""
            return written(n // value) + unit + zero + (written(rest) if rest else "")
    raise AssertionError


# --- choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"), ("(B)", "B"), ("b", "B"), ("The answer is C.", "C"), ("The answer is (D) because A is wrong", "D"),
        ("Answer: **B**", "B"), ("答案是Ｃ。", "C"), ("选B", "B"), ("故选：A", "A"), ("应选D。", "D"), ("B. Paris", "B"),
        ("I think it is B", "B"), ("A house is nice", None), ("The answer is a house", None), ("Not A but C", None),
        (r"\boxed{\text{C}}", "C"), ("#### A", "A"), ("Option B is right", "B"), ("I choose D", "D"), ("我选择选项C", "C"),
        ("A, because it is red", "A"), ("The correct answer is option A because x", "A"), ("答案：B、因为", "B"),
        ("Both A and B", None), ("答案不是A，而是C", "C"), ("The answer is E", None), ("【答案】B", "B"),
        ("The right choice is B", "B"), ("It's D", "D"), ("<answer>B</answer>", "B"), ("The answer is A", "A"), ("", None),
        ("First I said the answer is A. The answer is B.", "B"),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert chosen_letter(text, "ABCD") == letter


def test_choice_by_letter_index_and_text() -> None:
    grader = ChoiceGrader(ChoiceReward(kind="choice"))
    options = ["red", "blue", "green"]
    for right in ("B", "b", "(B)", 1, "Blue"):
        fields = {"answer": right, "choices": options}
        grades = [grader.one(answer(t, **fields)) for t in ("B", "blue.", "The answer is B", "A", "red", "D")]
        assert grades == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert grader.one(answer("D", answer="D")) == 1.0
    for wrong in ({"answer": 3, "choices": options}, {"answer": "pink", "choices": options}, {"answer": "E"}):
        with pytest.raises(UserError, match="must be one of"):
            grader.check(wrong)
    with pytest.raises(UserError, match="list of 2 to 26"):
        grader.check({"answer": "A", "choices": "red"})


# --- regex, length, format ------------------------------------------------------------------------------------------


def test_regex() -> None:
    found = RegexGrader(RegexReward(kind="regex", pattern=r"\bplease\b", ignore_case=True))
    assert found.one(answer("Please sit")) == 1.0 and found.one(answer("pleased")) == 0.0
    whole = RegexGrader(RegexReward(kind="regex", pattern=r"\d+", whole=True))
    assert whole.one(answer("12")) == 1.0 and whole.one(answer("12 ")) == 0.0
    with pytest.raises(UserError, match="no regular expression"):
        validate(RegexReward, {"kind": "regex", "pattern": "("})


@pytest.mark.parametrize(("n", "grade"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (150, -1.0)])
def test_soft_overlong_punishment(n: int, grade: float) -> None:
    """DAPO, eq. 13: 0 up to L_max - L_cache, then falling evenly to -1 at L_max."""
    config = LengthReward(kind="length", max=100, buffer=20)
    assert LengthGrader(config).one(answer("x", n)) == grade


def test_length() -> None:
    hard = LengthGrader(LengthReward(kind="length", max=10))
    assert [hard.one(answer("x", n)) for n in (10, 11)] == [0.0, -1.0]
    target = LengthGrader(LengthReward(kind="length", target=20, spread=10, unit="characters"))
    assert [target.one(answer("x" * n)) for n in (20, 25, 15, 30, 99)] == [1.0, 0.5, 0.5, 0.0, 0.0]
    turns = Answer("p", "x", [0] * 100, 3, True, {}, [], n_written=20)  # what tools said doesn't count
    assert LengthGrader(LengthReward(kind="length", target=20)).one(turns) == 1.0
    for wrong in ({}, {"target": 1, "max": 1}, {"max": 5, "buffer": 5}, {"target": 5, "buffer": 1}):
        with pytest.raises(UserError):
            validate(LengthReward, {"kind": "length", **wrong})


@pytest.mark.parametrize(
    ("text", "grade", "partial"),
    [
        ("<think>a</think>\n<answer>b</answer>", 1.0, 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0, 0.5),
        ("<answer>b</answer><think>a</think>", 0.0, 0.5),
        ("<think>a</think><answer></answer>", 0.0, 0.5),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 0.5),
        ("<think>a<answer>b</answer>", 0.0, 0.5),
        ("b", 0.0, 0.0),
    ],
)
def test_format(text: str, grade: float, partial: float) -> None:
    assert FormatGrader(FormatReward(kind="format")).one(answer(text)) == grade
    assert FormatGrader(FormatReward(kind="format", partial=True)).one(answer(text)) == partial


def test_format_may_allow_text_outside() -> None:
    loose = FormatGrader(FormatReward(kind="format", strict=False))
    assert loose.one(answer("Well: <think>a</think> so <answer>b</answer>!")) == 1.0


def test_code_has_limits_of_its_own() -> None:
    config = validate(CodeReward, {"kind": "code", "sandbox": {"timeout_s": 1, "memory_mb": 128}})
    assert config.sandbox.timeout_s == 1 and config.field == "tests"
