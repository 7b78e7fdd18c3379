"""The recipe of every stage. Torch-free, so that a mistake in a recipe is reported at once."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.data.config import DataConfig
from llmkit.model.config import GPTConfig
from llmkit.tokenizer.config import Kind, TokenizerConfig
from llmkit.training.config import RunConfig


class TokenizerRecipe(Config):
    """Trains a tokenizer and reports on it, or trains several kinds and compares them."""

    stage: Literal["tokenizer"]
    out: str = Field(min_length=1)
    """The folder that tokenizer.json, tokenizer_config.json and report.json are written to."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    compare: tuple[Kind, ...] = ()
    """Kinds to train on the same text, each into a folder of its own in `out`, beside compare.md and compare.json. The
    other settings are those of `tokenizer`."""
    data: DataConfig
    """Trained on the training documents, reported on the validation documents."""

    @model_validator(mode="after")
    def _compares(self) -> TokenizerRecipe:
        if self.compare and self.tokenizer.path is not None:
            raise ValueError("compare trains tokenizers, so drop tokenizer.path (or drop compare)")
        if len(set(self.compare)) < len(self.compare):
            raise ValueError(f"compare names a kind twice ({', '.join(self.compare)}): name each once")
        for kind in self.compare:
            self.tokenizer.of_kind(kind)  # raises where the vocabulary is too small for a kind
        return self


class MaskingConfig(Config):
    """Which tokens `objective: masked` hides, and by what (BERT, arXiv 1810.04805, section 3.1)."""

    frac: float = Field(0.15, gt=0, le=1)
    """Share of the tokens, control tokens aside, that are predicted."""
    replace_frac: float = Field(0.8, ge=0, le=1)
    """Share of those that become the mask token."""
    random_frac: float = Field(0.1, ge=0, le=1)
    """Share of those that become a random token; the rest stays as it is."""

    @model_validator(mode="after")
    def _shares(self) -> MaskingConfig:
        if self.replace_frac + self.random_frac > 1:
            raise ValueError(f"replace_frac ({self.replace_frac}) + random_frac ({self.random_frac}) must be at most 1")
        return self


class ModelRecipe(RunConfig):
    """What the stages that train a network on text share."""

    tokenizer: TokenizerConfig | None = None
    """A folder to load it from, or how to train one on the same data; it is kept in `out/tokenizer`. Default: with
    `init_from` the old model's; else byte pair encoding with the section's own defaults."""
    data: DataConfig
    model: GPTConfig | None = None
    """The network. Left out with `init_from`: the old model's."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model is None and self.init_from is None:
            raise ValueError("give `model`, or `init_from` to go on from old weights")
        if self.model is not None and self.batch.max_len is not None and self.batch.max_len > self.model.max_seq_len:
            raise ValueError(
                f"batch.max_len ({self.batch.max_len}) is above model.max_seq_len ({self.model.max_seq_len}): lower it"
            )
        return self

    @property
    def text_tokenizer(self) -> TokenizerConfig:
        """The tokenizer's section, or what its absence means."""
        if self.tokenizer is not None:
            return self.tokenizer
        return TokenizerConfig(path=self.init_from) if self.init_from is not None else TokenizerConfig()


class PretrainRecipe(ModelRecipe):
    """Trains a network on text: to predict the next token, or tokens that were hidden."""

    stage: Literal["pretrain"]
    objective: Literal["next_token", "masked"] = "next_token"
    """masked: some tokens are hidden and predicted from both sides; asks for `model: {causal: false}` and a mask token."""
    masking: MaskingConfig = MaskingConfig()
    """With `objective: masked`: what is hidden."""

    @model_validator(mode="after")
    def _objective_fits(self) -> PretrainRecipe:
        masked = self.objective == "masked"
        if self.model is not None and self.model.causal == masked:
            raise ValueError(
                "objective masked sees both sides: set model.causal to false"
                if masked
                else "objective next_token would see the token it predicts: set model.causal to true, or objective: masked"
            )
        if not masked and self.masking != MaskingConfig():
            raise ValueError("masking means something with objective: masked only")
        if masked and self.data.cross_document_attention:
            raise ValueError("objective masked keeps documents apart: drop data.cross_document_attention")
        if masked and self.eval.samples.prompts:
            raise ValueError("eval.samples: a model trained on hidden tokens continues no text: drop the prompts")
        return self


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
