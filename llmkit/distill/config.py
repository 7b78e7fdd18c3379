"""What a student learns from a teacher, and how: the distill stage's sections of a recipe. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.inference.config import MIN_TEMPERATURE

LayerMap = Literal["uniform", "last"] | tuple[tuple[int, int], ...]


class TermConfig(Config):
    """A term of the loss."""

    weight: float = Field(1.0, gt=0)
    """Its weight in the loss, as it stands: weights are not divided by their sum."""
    name: str | None = Field(None, min_length=1)
    """What it is called in the log. Default: its kind, with what sets it apart."""


class SoftConfig(TermConfig):
    """The teacher's distribution over the next token, temperature^2 x divergence (Hinton et al. 2015, arXiv 1503.02531)."""

    kind: Literal["soft"]
    """Which term this is."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """forward: KL(teacher || student), which covers all the teacher does; reverse: KL(student || teacher), which seeks
    what it does most; jsd: between the two (GKD, arXiv 2306.13649)."""
    beta: float = Field(0.5, gt=0, lt=1)
    """jsd: the teacher's share of the mixture."""

    @property
    def label(self) -> str:
        return self.name or f"soft/{self.divergence}"


class UldConfig(TermConfig):
    """For a teacher with another tokenizer: the distance of the two sorted distributions wherever the texts' tokens end at
    the same place (universal logit distillation, arXiv 2402.12030)."""

    kind: Literal["uld"]
    """Which term this is."""

    @property
    def label(self) -> str:
        return self.name or "uld"


class _LayerTermConfig(TermConfig):
    layers: LayerMap = "uniform"
    """Which of the student's layers learns from which of the teacher's, counted from 1: uniform: layer m of M from layer
    m N / M of N; last: the last from the last; or pairs [[student, teacher], ...]."""

    @model_validator(mode="after")
    def _layers_fit(self) -> _LayerTermConfig:
        if isinstance(self.layers, tuple):
            if not self.layers:
                raise ValueError("layers: name at least one pair [student, teacher], or uniform, or last")
            if low := [pair for pair in self.layers if min(pair) < 1]:
                raise ValueError(f"layers: {list(low[0])}: layers are counted from 1")
            if len(set(self.layers)) < len(self.layers):
                raise ValueError("layers: a pair is named twice")
        return self


class HiddenConfig(_LayerTermConfig):
    """Hidden states behind learned projections (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351)."""

    kind: Literal["hidden"]
    """Which term this is."""
    measure: Literal["mse", "cosine"] = "mse"
    """mse: mean square of the difference of normalised states; cosine: 1 - their cosine."""

    @property
    def label(self) -> str:
        return self.name or f"hidden/{self.measure}"


class AttentionConfig(_LayerTermConfig):
    """Attention scores before the softmax (TinyBERT). Student and teacher need as many heads."""

    kind: Literal["attention"]
    """Which term this is."""

    @property
    def label(self) -> str:
        return self.name or "attention"


class RelationConfig(_LayerTermConfig):
    """How alike the tokens' vectors are to each other: KL of softmax(v v^T / sqrt(width)) (MiniLMv2, arXiv 2012.15828). Any
    widths and numbers of heads."""

    kind: Literal["relation"]
    """Which term this is."""
    layers: LayerMap = "last"
    """See `hidden`."""
    of: tuple[Literal["queries", "keys", "values"], ...] = ("values",)
    """Whose relations."""
    heads: int | None = Field(None, ge=1)
    """Into how many heads both sides' vectors are cut anew. Default: the student's heads."""

    @model_validator(mode="after")
    def _of_fits(self) -> RelationConfig:
        if not self.of or len(set(self.of)) < len(self.of):
            raise ValueError("of: name each of queries, keys, values once at most, and at least one of them")
        return self

    @property
    def label(self) -> str:
        return self.name or "relation"


LossConfig = Annotated[
    SoftConfig | UldConfig | HiddenConfig | AttentionConfig | RelationConfig, Field(discriminator="kind")
]


class CacheConfig(Config):
    """What the teacher says of the training data, asked once, before training, and kept in data.cache_dir."""

    top_k: int = Field(64, ge=1)
    """How many of its likeliest next tokens are kept; the probability of all others together is kept too."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the log-probabilities."""


class FromTeacherConfig(Config):
    """The student begins as a part of the teacher. Whatever is not named stays as wide as the teacher's."""

    layers: int | tuple[int, ...] | None = None
    """How many of its layers, spread evenly with the first and the last among them; or which, counted from 1."""
    d_model: int | None = Field(None, ge=1)
    """The residual stream: the channels with the largest mean size on training data are kept (arXiv 2407.14679)."""
    d_ff: int | None = Field(None, ge=1)
    """The MLPs: the neurons with the largest mean activation are kept, in each layer its own."""
    n_kv_heads: int | None = Field(None, ge=1)
    """Attention: the key-value heads, with their query heads, whose output is largest are kept."""
    rows: int = Field(32, ge=1)
    """Rows of training data that the activations are measured on."""

    @model_validator(mode="after")
    def _layers_fit(self) -> FromTeacherConfig:
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError("from_teacher.layers: at least 1")
        if isinstance(self.layers, tuple):
            if not self.layers or min(self.layers) < 1:
                raise ValueError("from_teacher.layers: name at least one layer, counted from 1")
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError("from_teacher.layers: in rising order, each once")
        return self


class OnPolicyConfig(Config):
    """How the student's own answers are sampled (GKD, arXiv 2306.13649)."""

    max_new_tokens: int = Field(128, ge=1)
    """Length at which an answer is cut off."""
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE)
    """Divides the logits."""
    batch_size: int = Field(128, ge=1)
    """Answers that are written side by side on one rank."""


class TeacherAnswersConfig(Config):
    """Sequence-level distillation (arXiv 1606.07947): the teacher's answers take the place of the data's, once, before
    training."""

    max_new_tokens: int = Field(256, ge=1)
    """Length at which an answer is cut off; one that is cut off is left out."""
    temperature: float = Field(0.0, ge=0)
    """0: the likeliest token each time."""
    batch_size: int = Field(64, ge=1)
    """Answers that are written side by side."""

    @model_validator(mode="after")
    def _is_no_overflow(self) -> TeacherAnswersConfig:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature ({self.temperature}) must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        return self
