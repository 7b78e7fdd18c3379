"""What answers are graded by, as a recipe says it. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.inference.config import SamplingConfig
from llmkit.sandbox.config import SandboxConfig


def _compile(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as e:
        raise ValueError(f"{key}: {pattern!r} is no regular expression: {e}") from None


class _Part(Config):
    """What every grader says of itself."""

    weight: float = 1.0
    """How much of this part goes into the reward; negative for what is to be avoided, 0 to log it alone."""
    name: str | None = Field(None, min_length=1)
    """What logs and metrics call it. Default: its kind."""
    on_error: float | None = None
    """The value of an answer that the grader itself failed on. Null: the answer is left out of the update."""

    @property
    def label(self) -> str:
        """What logs and metrics call it."""
        return self.name or str(getattr(self, "kind", ""))


class _TextPart(_Part):
    """A grader that reads the answer's text."""

    extract: str | None = Field(None, min_length=1)
    """A regular expression whose first group (or whole match), at its last match, is what is graded, such as
    `</think>(.*)`; an answer in which it isn't found scores 0. Null: the whole answer."""

    @model_validator(mode="after")
    def _extracts(self) -> _TextPart:
        if self.extract is not None:
            _compile(self.extract, "extract")
        return self


class _FieldPart(_TextPart):
    """A grader that compares with what the row holds."""

    field: str = Field("answer", min_length=1)
    """The row's column with the right answer, or a list of right ones. A row where it is null isn't graded by this part."""


class ExactReward(_FieldPart):
    """1 if the answer is the right one, else 0."""

    kind: Literal["exact"]
    """Which grader this is."""
    accept: str | None = Field("accept", min_length=1)
    """A column with further right answers; rows need not have it."""
    nfkc: bool = True
    """Full-width and half-width forms are the same (Unicode NFKC)."""
    ignore_case: bool = True
    """Upper and lower case are the same."""
    ignore_whitespace: bool = True
    """Blanks at the ends don't count, and any blank inside is one space."""
    ignore_final_punctuation: bool = True
    """Full stops, question and exclamation marks at the end don't count, Chinese ones neither."""


class NumericReward(_FieldPart):
    """1 if the number that the answer ends in is the right one, else 0."""

    kind: Literal["numeric"]
    """Which grader this is."""
    marked: bool = False
    """Only a number that is marked as the answer counts (`####`, `\\boxed{}`, `<answer>`, "the answer is", 答案是); else the
    last number serves where none is marked."""
    tolerance: float = Field(0.0, ge=0)
    """How far off it may be, in its own unit. 0: equal as fractions."""
    relative_tolerance: float = Field(0.0, ge=0, lt=1)
    """The same as a share of the right number; the larger of both counts."""


class ChoiceReward(_FieldPart):
    """1 if the chosen option is the right one, else 0. The right one may be a letter, an index from 0, or its text."""

    kind: Literal["choice"]
    """Which grader this is."""
    choices: str | None = Field("choices", min_length=1)
    """The row's column with the options' texts, in the order of the letters; rows need not have it."""
    n_choices: int = Field(4, ge=2, le=26)
    """How many letters there are where the row has no options' texts."""


class RegexReward(_TextPart):
    """1 if the pattern is found in the answer, else 0."""

    kind: Literal["regex"]
    """Which grader this is."""
    pattern: str = Field(min_length=1)
    """A regular expression of Python's; `.` matches newlines too. One that backtracks without end hangs the run."""
    whole: bool = False
    """It must match the whole answer."""
    ignore_case: bool = False
    """Upper and lower case are the same."""

    @model_validator(mode="after")
    def _matches(self) -> RegexReward:
        _compile(self.pattern, "pattern")
        return self


class LengthReward(_Part):
    """How well the answer's length fits: a penalty from 0 to -1 above a maximum, or 1 to 0 away from a target."""

    kind: Literal["length"]
    """Which grader this is."""
    unit: Literal["tokens", "characters"] = "tokens"
    """tokens: those that the model wrote, its end of turn too. characters: of the text."""
    target: int | None = Field(None, ge=1)
    """1 at this length, falling evenly to 0 at `spread` away from it."""
    spread: int | None = Field(None, ge=1)
    """Default: the target itself."""
    max: int | None = Field(None, ge=1)
    """0 up to `max - buffer`, falling evenly to -1 at `max`: the soft overlong punishment of DAPO (arXiv 2503.14476, eq.
    13)."""
    buffer: int = Field(0, ge=0)
    """Units before `max` from which on the penalty begins. 0: all at once above `max`."""

    @model_validator(mode="after")
    def _one_way(self) -> LengthReward:
        if (self.target is None) == (self.max is None):
            raise ValueError("give `target` (1 to 0 around it) or `max` (0 to -1 before it)")
        if self.max is not None and self.buffer >= self.max:
            raise ValueError(f"buffer ({self.buffer}) must be below max ({self.max})")
        if self.target is None and self.spread is not None:
            raise ValueError("spread belongs to target")
        if self.max is None and self.buffer:
            raise ValueError("buffer belongs to max")
        return self


class FormatReward(_Part):
    """1 if the answer consists of the tags in their order, each once and not empty, else 0."""

    kind: Literal["format"]
    """Which grader this is."""
    tags: tuple[str, ...] = ("think", "answer")
    """Names of the tags: `<think>...</think>` and so on."""
    strict: bool = True
    """Nothing but blanks may stand outside of the tags."""
    partial: bool = False
    """Gives the share of the tags that stand there once and in order, instead of all or nothing; `strict` then asks for
    nothing outside before it gives the whole 1."""

    @model_validator(mode="after")
    def _names(self) -> FormatReward:
        wrong = [t for t in self.tags if not re.fullmatch(r"[A-Za-z_][\w-]*", t)]
        if not self.tags or wrong or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags: names of letters, digits, - and _, each once (got {list(self.tags)})")
        return self


class CodeReward(_TextPart):
    """1 if the answer's program passes the row's tests in the sandbox, else 0."""

    kind: Literal["code"]
    """Which grader this is."""
    field: str = Field("tests", min_length=1)
    """The row's column with the tests: Python statements as one text or a list of texts, or a list of `{input, output}`,
    which are given to the program on its standard input and expected on its standard output."""
    setup: str | None = Field(None, min_length=1)
    """A column with Python that stands before the answer's program: imports, or the head of the function to complete."""
    entry_point: str | None = Field(None, min_length=1)
    """A column with a function's name: the tests define `check`, which is called with it, as in HumanEval."""
    partial: bool = False
    """Gives the share of the tests that pass, instead of all or nothing."""
    sandbox: SandboxConfig = SandboxConfig()
    """Its limits."""


class PythonReward(_Part):
    """What a function of yours returns: `f(prompts=..., completions=..., **columns) -> list of numbers or None`."""

    kind: Literal["python"]
    """Which grader this is."""
    function: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[:.][A-Za-z_]\w*$")
    """`package.module:name`; the module is looked for in the working directory too. It runs in this process, uncaged."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Passed to every call by name."""


class ModelReward(_Part):
    """A reward model's score of the whole conversation, (score - mean) / std by the figures stored with it."""

    kind: Literal["model"]
    """Which grader this is."""
    path: str = Field(min_length=1)
    """A run of stage reward, a checkpoint, or a folder of a *ForSequenceClassification with one label."""
    normalise: bool = True
    """Uses the stored mean and std; where the folder has none, the score is taken as it is, which is said once."""
    min_accuracy: float | None = Field(0.6, ge=0, le=1)
    """A reward model that tells less than this share of its held-out pairs right is refused: a policy would learn its
    mistakes. Only what its folder tells is looked at; null: any will do."""
    clip: float | None = Field(10.0, gt=0)
    """Bounds the normalised score to this in both directions."""
    micro_tokens: int = Field(8192, ge=1)
    """Most tokens of one forward pass."""


RewardConfig = Annotated[
    ExactReward
    | NumericReward
    | ChoiceReward
    | RegexReward
    | LengthReward
    | FormatReward
    | CodeReward
    | PythonReward
    | ModelReward,
    Field(discriminator="kind"),
]


def check_rewards(rewards: tuple[RewardConfig, ...]) -> None:
    """Raises ValueError where there are none, or two parts have one name."""
    if not rewards:
        raise ValueError("rewards: name at least one, such as {kind: exact}")
    labels = [r.label for r in rewards]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"rewards: two parts are called '{label}': give them names")


class AnswersConfig(SamplingConfig):
    """Answers to held-out prompts, written at every evaluation and graded."""

    path: str = Field(min_length=1)
    """The prompts: a file, folder, glob or hub data set, in the layouts of ppo and grpo."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where the prompt stands if it isn't called so: {prompt: question}."""
    split: str = "test"
    """Which split of a hub data set is read; files have none."""
    rewards: tuple[RewardConfig, ...]
    """What the answers are graded by: the metrics `answers/<name>`."""
    group_by: str | None = Field(None, min_length=1)
    """A column: each part also as the mean of each of its values, `answers/<name>/<value>`."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many prompts."""
    temperature: float = Field(0.0, ge=0.0)
    """0 is greedy."""
    micro_rows: int = Field(64, ge=1)
    """Answers that are written side by side on one rank. Changes memory, not results."""

    @model_validator(mode="after")
    def _named_apart(self) -> AnswersConfig:
        check_rewards(self.rewards)
        taken = {"mean", "tokens", "ended", "errors"}
        if wrong := taken & {r.label for r in self.rewards}:
            raise ValueError(f"rewards: '{wrong.pop()}' is the name of another metric: give the part another one")
        return self
