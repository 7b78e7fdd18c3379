"""What the recipes of all stages that train a network share."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from llmkit.data.config import DataConfig
from llmkit.model.config import GPTConfig, LoraConfig
from llmkit.tokenizer.config import TokenizerConfig
from llmkit.training.config import RunConfig


class ModelRecipe(RunConfig):
    """What the stages that train a network on text share."""

    tokenizer: TokenizerConfig | None = None
    """A folder to load it from, or how to train one on the same data; it is kept in `out/tokenizer`. Default: with
    `init_from` the old model's; else byte pair encoding with the section's own defaults."""
    data: DataConfig
    model: GPTConfig | None = None
    """The network. Left out with `init_from`: the old model's."""
    lora: LoraConfig | None = None
    """Trains adapters beside the weights of `init_from`, which stay as they are. Default: all weights are trained."""

    @model_validator(mode="after")
    def _adapts(self) -> Self:
        if self.lora is None:
            return self
        if self.init_from is None:
            raise ValueError("lora adapts a trained model: say which with `init_from`, or drop `lora`")
        if self.freeze:
            raise ValueError("freeze: with lora all weights of the model are frozen already: drop it")
        if changed := sorted((self.model.model_fields_set if self.model is not None else set()) - {"dropout"}):
            raise ValueError(f"model.{changed[0]}: with lora the model of init_from keeps its shape: drop it")
        if self.tokenizer is not None and self.tokenizer.add:
            raise ValueError(
                "tokenizer.add: new tokens need embeddings of their own, which lora does not train: drop one"
            )
        if self.lora.quantize is not None and self.precision == "fp64":
            raise ValueError("lora.quantize: 4-bit weights have no fp64: set precision to bf16 or fp32")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model is None and self.init_from is None and not self.builds_model:
            raise ValueError("give `model`, or `init_from` to go on from old weights")
        if self.model is not None and self.batch.max_len is not None and self.batch.max_len > self.model.max_seq_len:
            raise ValueError(
                f"batch.max_len ({self.batch.max_len}) is above model.max_seq_len ({self.model.max_seq_len}): lower it"
            )
        return self

    @model_validator(mode="after")
    def _rows_may_be_cut(self) -> Self:
        if self.parallel.context > 1 and not self.shares_positions:
            raise ValueError(
                f"parallel.context ({self.parallel.context}): only pretrain, sft and distill share the positions of a row: "
                "use parallel.shard or parallel.tensor"
            )
        return self

    @property
    def shares_positions(self) -> bool:
        """Whether the stage's loss is a sum over positions, of rows that may be cut."""
        return False

    @property
    def builds_model(self) -> bool:
        """Whether the stage says by other keys what the network is."""
        return False

    @property
    def text_tokenizer(self) -> TokenizerConfig:
        """The tokenizer's section, or what its absence means."""
        if self.tokenizer is not None:
            return self.tokenizer
        return TokenizerConfig(path=self.tokenizer_from) if self.tokenizer_from is not None else TokenizerConfig()

    @property
    def tokenizer_from(self) -> str | None:
        """The model whose tokenizer serves where `tokenizer` is left out."""
        return self.init_from


def check_conversations(data: DataConfig, train_on: str) -> None:
    """Raises ValueError for what means nothing where the data are conversations."""
    for source in (*data.sources, *data.valid, *data.test):
        if source.field != "text" or source.template is not None:
            raise ValueError("field and template are for plain text: say `columns: {our name: theirs}`")
    if data.clean.is_on or data.dedup.kind is not None:
        raise ValueError("data.clean and data.dedup are for plain text: conversations are read as they are")
    if data.cross_document_attention:
        raise ValueError("data.cross_document_attention: one conversation would answer another's question: drop it")
    if not data.add_bos or not data.add_eos:
        raise ValueError("data.add_bos and data.add_eos are for plain documents: the chat template says what is added")
    if train_on == "last" and not data.chat:
        raise ValueError("train_on: last means a turn of a conversation, and data.chat is false: use assistant")
