"""`stage: dpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.stages.recipes.base import ModelRecipe
from llmkit.training.config import OptimConfig

WITHOUT_REFERENCE = ("simpo", "orpo")


class DPOOptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule."""

    lr: float = Field(1e-6, ge=0)
    """Peak learning rate. Peers use 5e-7 to 1e-6 for whole models, ten times that for adapters."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; on hidden matrices and an untied head only, never on embeddings, norms or biases."""


class DPORecipe(ModelRecipe):
    """Learns from people's preferences, or judgements, without a reward model: DPO and its family."""

    stage: Literal["dpo"]
    loss: Literal["dpo", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = "dpo"
    """What is made of a pair of answers (see docs/dpo.md); kto takes single answers that were judged good or bad."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to its reference. simpo: a scale, about 2 to 10. orpo: the odds term's weight."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo, robust, simpo: the share of pairs that are taken to be the wrong way round."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the better answer's negative log-likelihood, a mean over its tokens: keeps that answer likely (arXiv
    2404.19733). orpo always has it, with weight 1."""
    gamma: float = Field(1.0, ge=0)
    """simpo: the margin by which the better answer must lead, in units of beta x nats a token."""
    ipo_mean: bool = True
    """ipo: compares means over tokens, as its authors meant it. False: sums."""
    good_weight: float = Field(1.0, ge=0)
    """kto: weight of good answers. Its authors: good_weight x good answers : bad_weight x bad ones from 1:1 to 4:3."""
    bad_weight: float = Field(1.0, ge=0)
    """kto: weight of bad answers."""
    reference: str | None = None
    """The model that is not to be left too far behind. Default: init_from, that is, the model as it starts."""
    max_drift: float | None = Field(0.5, gt=0)
    """Says so when the better answers are less likely than under the reference by more than this, in nats a token."""
    optim: DPOOptimConfig = DPOOptimConfig()

    @property
    def needs_reference(self) -> bool:
        return self.loss not in WITHOUT_REFERENCE

    @model_validator(mode="after")
    def _starts_from_a_model(self) -> DPORecipe:
        if self.init_from is None:
            raise ValueError("dpo goes on from a model that can answer, say one of `stage: sft`: give `init_from`")
        if self.model is not None and self.model.dropout:
            raise ValueError(
                f"model.dropout ({self.model.dropout}): policy and reference would differ by chance: set it to 0"
            )
        if self.tokenizer is not None and self.tokenizer.add and self.needs_reference:
            raise ValueError("tokenizer.add: the reference knows no new tokens: add them in an earlier stage (sft)")
        if self.reference is not None and not self.needs_reference:
            raise ValueError(f"reference: {self.loss} has none: drop it, or choose another loss")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> DPORecipe:
        owners = {
            "label_smoothing": ("dpo", "robust", "simpo"),
            "gamma": ("simpo",),
            "ipo_mean": ("ipo",),
            "good_weight": ("kto",),
            "bad_weight": ("kto",),
            "nll_weight": ("dpo", "robust", "hinge", "ipo", "simpo"),
        }
        for key, losses in owners.items():
            if self.loss not in losses and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to loss: {' | '.join(losses)} (loss is {self.loss}): drop it")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust undoes label noise: say how much in label_smoothing, or take loss: dpo")
        if self.loss == "kto" and not self.good_weight + self.bad_weight:
            raise ValueError("good_weight and bad_weight are both 0: nothing would be learnt")
        if self.loss == "kto" and self.batch.examples_per_step == 1:
            raise ValueError(
                "batch.examples_per_step: kto sets answers against each other's prompts: at least 2 are needed"
            )
        return self

    @model_validator(mode="after")
    def _data_fits(self) -> DPORecipe:
        for source in (*self.data.sources, *self.data.valid, *self.data.test):
            if source.field != "text" or source.template is not None:
                raise ValueError("field and template are for plain text: say `columns: {our name: theirs}`")
        if self.data.clean.is_on or self.data.dedup.kind is not None:
            raise ValueError("data.clean and data.dedup are for plain text: preferences are read as they are")
        if not self.data.packing or self.data.cross_document_attention:
            raise ValueError(
                "data.packing and data.cross_document_attention: a row is one answer to a prompt: drop them"
            )
        if self.eval.samples.prompts:
            raise ValueError(
                "eval.samples: have held-out prompts answered and graded with eval.answers: drop the prompts"
            )
        if self.z_loss:
            raise ValueError("z_loss is a term of pretraining: drop it")
        return self
