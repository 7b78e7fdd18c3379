"""Where the text of a run comes from. Torch-free."""

from __future__ import annotations

from pydantic import Field, model_validator

from llmkit.config import Config


class SourceConfig(Config):
    """One source of documents."""

    path: str = Field(min_length=1)
    """A file (txt, jsonl, json, parquet, csv; each also .gz or .zst), a folder, a glob, or a hub data set's name."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples drawn from this source, relative to the other sources' weights."""
    field: str = "text"
    """The key or column that holds the text."""
    split: str = "train"
    """Which split of a hub data set is read; files have none."""


class DataConfig(Config):
    """Training, validation and test text. `path: X` is short for `train: [{path: X}]`."""

    path: str | None = Field(None, min_length=1)
    """One source of training text."""
    train: tuple[SourceConfig, ...] = ()
    """Sources of training text, mixed by weight."""
    valid: tuple[SourceConfig, ...] = ()
    """Sources of validation text. Without any, `valid_frac` of the training text is held out."""
    test: tuple[SourceConfig, ...] = ()
    """Scored once, at the end of the run."""
    valid_frac: float = Field(0.1, ge=0.0, lt=1.0)
    """Share held out when `valid` is empty: the end of a single text, else documents chosen by a hash of their text."""
    packing: bool = True
    """Rows are filled with as many documents as fit, each seeing only itself. False: one document per row, cut or padded."""
    cross_document_attention: bool = False
    """With packing: lets tokens attend to the documents before their own in the row, with running positions."""
    add_bos: bool = True
    """Every document begins with the tokenizer's bos token."""
    add_eos: bool = True
    """Every document ends with the tokenizer's eos token."""
    cache_dir: str = "runs/cache"
    """Token shards are kept here, keyed by the text's and the tokenizer's hashes, and shared between runs."""
    workers: int | None = Field(None, ge=1)
    """Processes that prepare shards. Default: the number of cores."""

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if self.path and self.train:
            raise ValueError("give `path` or `train`, not both: `path` is short for one entry of `train`")
        if not self.path and not self.train:
            raise ValueError("no training text: set `path`, or `train: [{path: ...}]`")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training sources, whichever way they were written."""
        return self.train or (SourceConfig.model_validate({"path": self.path}),)
