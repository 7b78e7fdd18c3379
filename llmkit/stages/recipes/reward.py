"""`stage: reward`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmkit.data.config import SourceConfig
from llmkit.stages.recipes.base import ModelRecipe

LABELLED = ("classify", "regress")  # objectives whose rows are a text and what it deserves


class RewardRecipe(ModelRecipe):
    """Trains a network to judge texts: which of two answers is better, which step is right, a class, or numbers."""

    stage: Literal["reward"]
    objective: Literal["rank", "process", "classify", "regress"]
    """rank: a reward model, from pairs and rankings of answers. process: a score for each step of an answer. classify:
    cross entropy over classes. regress: squared error of one number or several."""
    margin: Annotated[float, Field(ge=0)] | Literal["data"] = 0.0
    """rank: by how much the better answer must lead. data: what a row says in `margin`, or the difference of `scores`
    (Llama 2, arXiv 2307.09288)."""
    center: float = Field(0.01, ge=0)
    """rank: weight of the squared sum of a pair's scores, which keeps the mean of all at 0 (arXiv 2312.09244)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """rank: the share of pairs that are taken to be the wrong way round."""
    reference: SourceConfig | None = None
    """rank: answers whose rewards set the scale (mean and standard deviation in config.json), in a layout of `sft`.
    Default: the best answers of the training data."""
    reference_limit: int = Field(512, ge=2)
    """rank: so many answers set the scale, and as many held-out prompts the accuracy that a checkpoint tells."""
    step_separator: str = Field("\n", min_length=1)
    """process: written after every step; the step is judged at its last token."""
    classes: tuple[str, ...] = ()
    """classify: the classes' names, in the order of the scores. Default: the labels of the training data, sorted."""

    @property
    def is_labelled(self) -> bool:
        """Whether rows are a text and its label."""
        return self.objective in LABELLED

    @model_validator(mode="after")
    def _data_fits(self) -> RewardRecipe:
        for source in (*self.data.sources, *self.data.valid, *self.data.test):
            if source.field != "text" or source.template is not None:
                raise ValueError("field and template are for plain text: say `columns: {our name: theirs}`")
            unknown = sorted(source.columns.keys() - {"text", "messages", "label"})
            if self.is_labelled and unknown:
                raise ValueError(f"columns: unknown name '{unknown[0]}': text (or messages) and label are known")
            if self.is_labelled and {"text", "messages"} <= source.columns.keys():
                raise ValueError("columns: give text or messages, not both")
        if self.data.clean.is_on or self.data.dedup.kind is not None:
            raise ValueError("data.clean and data.dedup are for plain text: judged texts are read as they are")
        if not self.data.packing or self.data.cross_document_attention:
            raise ValueError("data.packing and data.cross_document_attention: a row is one judged text: drop them")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_objective(self) -> RewardRecipe:
        owners = {
            "rank": ("margin", "center", "label_smoothing", "reference", "reference_limit"),
            "process": ("step_separator",),
            "classify": ("classes",),
        }
        for objective, keys in owners.items():
            for key in keys:
                if objective != self.objective and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} belongs to objective: {objective}")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"classes: at least two, each once (got {list(self.classes)})")
        if self.model is not None and not self.is_labelled and self.model.dropout:
            raise ValueError(
                f"model.dropout ({self.model.dropout}): a reward would differ from one reading to the next: set it to 0"
            )
        if self.model is not None and self.objective == "process" and not self.model.causal:
            raise ValueError("objective process judges a step by what stands before it: model.causal must be true")
        if self.eval.samples.prompts:
            raise ValueError("eval.samples: a model that judges texts writes none: drop the prompts")
        return self
