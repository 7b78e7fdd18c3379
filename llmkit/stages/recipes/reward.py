"""`stage: reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmkit.stages.recipes.base import ModelRecipe


class RewardRecipe(ModelRecipe):
    """Trains a network to judge whole texts: to name their class, or to give them numbers."""

    stage: Literal["reward"]
    objective: Literal["classify", "regress"]
    """classify: cross entropy over classes. regress: squared error of one number or several."""
    classes: tuple[str, ...] = ()
    """classify: the classes' names, in the order of the scores. Default: the labels of the training data, sorted."""

    @model_validator(mode="after")
    def _labels_fit(self) -> RewardRecipe:
        for source in (*self.data.sources, *self.data.valid, *self.data.test):
            if unknown := sorted(source.columns.keys() - {"text", "messages", "label"}):
                raise ValueError(f"columns: unknown name '{unknown[0]}': text (or messages) and label are known")
            if {"text", "messages"} <= source.columns.keys():
                raise ValueError("columns: give text or messages, not both")
            if source.field != "text" or source.template is not None:
                raise ValueError("field and template are for plain text: say `columns: {text: NAME, label: NAME}`")
        if self.data.clean.is_on or self.data.dedup.kind is not None:
            raise ValueError("data.clean and data.dedup are for plain text: labelled texts are read as they are")
        if not self.data.packing or self.data.cross_document_attention:
            raise ValueError("data.packing and data.cross_document_attention: a row is one labelled text: drop them")
        if self.classes and self.objective == "regress":
            raise ValueError("classes belong to objective: classify")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"classes: at least two, each once (got {list(self.classes)})")
        if self.eval.samples.prompts:
            raise ValueError("eval.samples: a model that judges texts writes none: drop the prompts")
        return self
