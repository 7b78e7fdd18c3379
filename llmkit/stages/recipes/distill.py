"""`stage: distill`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.distill.config import (
    CacheConfig,
    FromTeacherConfig,
    LossConfig,
    OnPolicyConfig,
    SoftConfig,
    TeacherAnswersConfig,
)
from llmkit.stages.recipes.base import ModelRecipe, check_conversations


class DistillRecipe(ModelRecipe):
    """A small model, the student, learns what a large one, the teacher, knows.

    The loss is ce_weight x cross entropy of the data + the sum of weight x term, each a mean over the trained tokens.
    """

    stage: Literal["distill"]
    teacher: str = Field(min_length=1)
    """A run, a checkpoint or a Hugging Face folder or name. It stays as it is."""
    teacher_precision: Literal["bf16", "fp32", "fp64"] | None = None
    """What the teacher is computed in. Default: as the student, in bf16 where that is mixed."""
    shard_teacher: bool = False
    """Spreads the teacher's weights over the ranks."""
    examples: Literal["conversations", "documents"] = "conversations"
    """What the data are: read as `sft` reads them, or as `pretrain` does."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Conversations: what is learnt, as in sft."""
    losses: tuple[LossConfig, ...] = (SoftConfig(kind="soft"),)
    """The terms beside cross entropy."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models in the soft terms."""
    ce_weight: float = Field(0.5, ge=0)
    """Weight of the cross entropy on the data; the student's own answers have none."""
    on_policy_frac: float = Field(0.0, ge=0, le=1)
    """Share of the steps whose answers are written by the student and judged by the teacher (lambda of GKD)."""
    on_policy: OnPolicyConfig = OnPolicyConfig()
    """How they are sampled."""
    teacher_answers: TeacherAnswersConfig | None = None
    """Trains on the teacher's answers instead of the data's. Default: on the data's."""
    cache: CacheConfig | None = None
    """Asks the teacher once, before training. Default: it is asked at every step."""
    from_teacher: FromTeacherConfig | None = None
    """Builds the student out of the teacher. Default: `model` or `init_from` say what it is."""
    term_norms_every: int | None = Field(100, ge=1)
    """Measures each term's own gradient every so many steps, at the price of a step for each; null: never."""

    @property
    def soft(self) -> tuple[SoftConfig, ...]:
        """The terms on the next token's distribution."""
        return tuple(term for term in self.losses if isinstance(term, SoftConfig))

    @property
    def shares_positions(self) -> bool:
        return True

    @property
    def builds_model(self) -> bool:
        return self.from_teacher is not None

    @property
    def tokenizer_from(self) -> str:
        """The old student's, else the teacher's."""
        return self.init_from or self.teacher

    @model_validator(mode="after")
    def _student_is_said_once(self) -> DistillRecipe:
        if self.from_teacher is not None:
            for key in ("model", "init_from"):
                if getattr(self, key) is not None:
                    raise ValueError(f"from_teacher builds the student, and so does {key}: drop one of them")
        return self

    @model_validator(mode="after")
    def _terms_fit(self) -> DistillRecipe:
        labels = [term.label for term in self.losses]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"losses: two terms are called '{label}': give one of them a name")
            if label in ("loss", "ce", "z_loss", "accuracy", "lr", "grad_norm", "denominator"):
                raise ValueError(f"losses: '{label}' is the name of another metric: choose another")
        kinds = {term.kind for term in self.losses}
        if not self.losses and not self.ce_weight:
            raise ValueError("losses is empty and ce_weight 0: nothing would be learnt")
        if "uld" in kinds and kinds & {"hidden", "attention", "relation", "soft"}:
            other = sorted(kinds - {"uld"})[0]
            raise ValueError(f"losses: uld is for a teacher with another tokenizer, whose tokens {other} can't compare")
        if self.cache is not None:
            if odd := sorted(kinds - {"soft"}):
                raise ValueError(f"cache: it holds what `soft` needs, not what {odd[0]} does: drop one of them")
            if not self.soft:
                raise ValueError("cache: no term reads it: give a `soft` one, or drop the cache")
            if self.on_policy_frac:
                raise ValueError(
                    "cache: the student's own answers are not known before training (on_policy_frac "
                    f"{self.on_policy_frac:g}): drop one of them"
                )
            if self.shard_teacher:
                raise ValueError("shard_teacher: with a cache no teacher is loaded in training: drop one of them")
        return self

    @model_validator(mode="after")
    def _on_policy_fits(self) -> DistillRecipe:
        if self.on_policy_frac and self.examples == "documents":
            raise ValueError("on_policy_frac: only conversations can be answered: set examples to conversations")
        if self.on_policy_frac and "uld" in {term.kind for term in self.losses}:
            raise ValueError("on_policy_frac: uld compares the data's texts alone: set it to 0")
        if self.on_policy_frac and not self.losses:
            raise ValueError("on_policy_frac: a student learns nothing from its own answers alone: give a loss")
        if self.teacher_answers is not None and self.examples == "documents":
            raise ValueError("teacher_answers: only conversations can be answered: set examples to conversations")
        if self.on_policy_frac and self.train_on == "all":
            raise ValueError(
                "train_on: all, but of the student's own answers only the answer is trained: use assistant"
            )
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> DistillRecipe:
        n = self.parallel.context
        if n == 1:
            return self
        if odd := sorted({term.kind for term in self.losses} - {"soft", "hidden"}):
            raise ValueError(
                f"parallel.context ({n}) with losses: {odd[0]}: it looks at whole rows: use parallel.shard"
            )
        if self.cache is not None or self.on_policy_frac:
            which = "on_policy_frac" if self.cache is None else "cache"
            raise ValueError(f"parallel.context ({n}) with {which}: its rows are not cut: drop one of them")
        return self

    @model_validator(mode="after")
    def _data_fits(self) -> DistillRecipe:
        if self.examples == "conversations":
            check_conversations(self.data, self.train_on)
        elif self.train_on != "assistant":
            raise ValueError("train_on is for conversations: every token of a document is learnt: drop it")
        if self.model is not None and not self.model.causal:
            raise ValueError("distill: the next token is learnt from left to right: set model.causal to true")
        if self.lora is not None and {"hidden", "attention", "relation"} & {term.kind for term in self.losses}:
            raise ValueError("lora: projections would be trained beside adapters alone: use soft terms, or drop lora")
        return self
