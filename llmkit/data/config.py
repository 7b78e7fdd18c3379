"""Where the text of a run comes from. Torch-free."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator

from llmkit.config import Config

_TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def template_parts(template: str) -> tuple[list[str], list[str]]:
    """Cuts "{title}: {body}" into the text around its columns, one piece more than columns, and the columns.

    A brace of the text itself is written twice. Raises ValueError for one that stands alone.
    """
    literals, columns, end = [""], [], 0
    for match in _TEMPLATE.finditer(template):
        literals[-1] += template[end : match.start()]
        end = match.end()
        if match[1]:
            columns.append(match[1])
            literals.append("")
        elif len(match[0]) == 2:
            literals[-1] += match[0][0]
        else:
            raise ValueError(f"a single '{match[0]}' in {template!r}: a column is written {{name}}, a brace twice")
    literals[-1] += template[end:]
    return literals, columns


class SourceConfig(Config):
    """One source of documents."""

    path: str = Field(min_length=1)
    """A file (txt, jsonl, json, csv, tsv, parquet; each also .gz or .zst), a folder, a glob, or a hub data set's name."""
    name: str | None = Field(None, min_length=1)
    """What logs and metrics call it. Default: its path."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples drawn from this source, relative to the other sources' weights."""
    epochs: float | None = Field(None, gt=0)
    """Instead of weights: how often this source is seen in the run, relative to the others' epochs."""
    field: str = "text"
    """The key or column that holds the text."""
    template: str | None = Field(None, min_length=1)
    """Instead of `field`: text with columns in braces, such as "{title}\\n\\n{body}"; a brace itself is written twice."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where stages that read several columns find theirs, our name first: {prompt: question, completion: solution}."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many rows are read."""
    split: str = "train"
    """Which split of a hub data set is read; files have none."""
    subset: str | None = None
    """Which configuration of a hub data set is read."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    data_files: str | tuple[str, ...] | None = None
    """Which files of a hub data set are read; with `path: json` (or parquet, csv, text) any files or addresses."""
    stream: bool = False
    """Reads a hub data set where it lies, shard by shard, instead of downloading it first."""

    @field_validator("template")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None and not template_parts(template)[1]:
            raise ValueError(f"no column in {template!r}: write {{name}} where a column's text goes")
        return template

    @model_validator(mode="after")
    def _one_text(self) -> SourceConfig:
        if self.template is not None and self.field != "text":
            raise ValueError("give `field` or `template`, not both")
        if self.epochs is not None and self.weight != 1.0:
            raise ValueError("give `weight` or `epochs`, not both")
        return self

    @property
    def label(self) -> str:
        """What logs and errors call it."""
        return self.name or self.path


class CleanConfig(Config):
    """Which documents of the training text are not learnt from. `clean: default` turns all rules on; null turns one off.

    Where no source is named, the rules and figures of the preset are Gopher's (arXiv 2112.11446, table A1); words are
    units there and here: a word, or one character of a script without spaces.
    """

    preset: Literal["default"] | None = None
    """`default` sets every key that isn't given."""
    min_chars: int | None = Field(None, ge=1)
    """Characters that a document must have. `default`: 20, as long as a quatrain."""
    max_chars: int | None = Field(None, ge=1)
    """Characters that it may have. `default`: 1,000,000 (Gopher: 100,000 words)."""
    max_control_chars: float | None = Field(None, ge=0, le=1)
    """Share of control characters. `default`: 0.005."""
    max_replacement_chars: float | None = Field(None, ge=0, le=1)
    """Share of U+FFFD, which stands for what could not be decoded. `default`: 0.005."""
    max_mojibake: float | None = Field(None, ge=0, le=1)
    """Share of traces of UTF-8 that was read as Latin-1, Windows-1252 or GBK. `default`: 0.01."""
    min_letters: float | None = Field(None, ge=0, le=1)
    """Share of letters and numerals in what is not blank. `default`: 0.5 (Gopher: a letter in 80 % of the words)."""
    max_symbols: float | None = Field(None, ge=0)
    """Hash signs and ellipses a unit. `default`: 0.1."""
    max_bullet_lines: float | None = Field(None, ge=0, le=1)
    """Share of lines that begin with a bullet. `default`: 0.9."""
    max_ellipsis_lines: float | None = Field(None, ge=0, le=1)
    """Share of lines that end with an ellipsis. `default`: 0.3."""
    max_repeated_lines: float | None = Field(None, ge=0, le=1)
    """Share of lines that stood before in the document. `default`: 0.3, for documents of more than three lines."""
    max_repeated_line_chars: float | None = Field(None, ge=0, le=1)
    """Share of the characters on such lines. `default`: 0.2."""
    max_repeated_paragraphs: float | None = Field(None, ge=0, le=1)
    """Share of paragraphs that stood before. `default`: 0.3."""
    max_repeated_grams: float | None = Field(None, ge=0, le=1)
    """Share of the units that lie in a run of ten words, or twenty single characters, that stood before. `default`:
    0.15 (Gopher: 0.1 to 0.15 for runs of ten to five words)."""
    drop_url_lines: bool = False
    """Leaves out lines that hold nothing but an address; the rest of the document stays. `default`: true."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        data = {"preset": data} if isinstance(data, str) else data
        if isinstance(data, dict) and data.get("preset") == "default":
            return {**_CLEAN_DEFAULT, **data}
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": "default"}, handler(core_schema)]}

    @property
    def is_on(self) -> bool:
        """Whether any rule is."""
        return any(value not in (None, False) for value in self.rules.values())

    @property
    def rules(self) -> dict[str, Any]:
        """The rules without the preset that they came from."""
        return self.model_dump(exclude={"preset"})


_CLEAN_DEFAULT = {
    "min_chars": 20,
    "max_chars": 1_000_000,
    "max_control_chars": 0.005,
    "max_replacement_chars": 0.005,
    "max_mojibake": 0.01,
    "min_letters": 0.5,
    "max_symbols": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "max_repeated_lines": 0.3,
    "max_repeated_line_chars": 0.2,
    "max_repeated_paragraphs": 0.3,
    "max_repeated_grams": 0.15,
    "drop_url_lines": True,
}


class DedupConfig(Config):
    """Which copies within the training text, and of the validation and test text in it, are left out.

    `dedup: exact` and `dedup: near` are short for the kind alone. The first copy, in the order of the sources, stays.
    """

    kind: Literal["exact", "near"] | None = None
    """`exact`: equal but for case, width and blanks. `near`: also the nearly equal. Null: none."""
    threshold: float = Field(0.8, ge=0.3, le=1)
    """`near`: the share of n-grams that two documents have in common (Jaccard) from which on they are copies."""
    ngram: int = Field(5, ge=1, le=64)
    """`near`: units of an n-gram: words, or single characters of scripts without spaces (Lee et al., arXiv 2107.06499:
    5 words)."""
    permutations: int = Field(128, ge=16, le=1024)
    """`near`: hashes of a signature: more find more of the pairs just above the threshold, and take longer."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": ["exact", "near"]}, handler(core_schema)]}

    @property
    def bands(self) -> tuple[int, int]:
        """Bands, and hashes of each: two documents are compared if a band of theirs agrees.

        The widest bands with which a pair at the threshold is compared with a probability of 98 %.
        """
        for width in range(self.permutations, 0, -1):
            n = self.permutations // width
            if self.threshold == 1 or n * math.log1p(-(self.threshold**width)) <= math.log(0.02):
                return n, width
        return self.permutations, 1


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
    clean: CleanConfig = CleanConfig()
    """Rules that training documents must keep. Given validation and test text is left as it is."""
    dedup: DedupConfig = DedupConfig()
    """Whether copies are left out of the training text."""
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
    chat: bool = True
    """Stages after pretraining: conversations are written by the tokenizer's chat template. False: prompts and answers
    are plain text, a prompt after the bos token if there is one, an answer before the eos token."""
    system: str | None = Field(None, min_length=1)
    """Stages after pretraining: the system message of conversations that have none. Default: they stay without."""
    max_dropped_frac: float = Field(0.01, ge=0.0, le=1.0)
    """Stages after pretraining: a run is refused if a larger share of a source's rows can't be learnt from (nothing of
    the answer fits the row, the answer is empty) and is left out."""

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if self.path and self.train:
            raise ValueError("give `path` or `train`, not both: `path` is short for one entry of `train`")
        if not self.path and not self.train:
            raise ValueError("no training text: set `path`, or `train: [{path: ...}]`")
        counted = [s.label for s in self.train if s.epochs is not None]
        if counted and len(counted) < len(self.train):
            without = next(s.label for s in self.train if s.epochs is None)
            raise ValueError(f"`epochs` counts for all sources of `train` or for none: {without} has none")
        for split in ("train", "valid", "test"):
            sources: tuple[SourceConfig, ...] = getattr(self, split)
            names = [s.name for s in sources if s.name is not None]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{split}: two sources are named '{name}': a name stands for one")
            for source in sources if split != "train" else ():
                if source.epochs is not None or source.weight != 1.0:
                    raise ValueError(f"{split}: {source.label}: weight and epochs are for training: leave them out")
        if self.system is not None and not self.chat:
            raise ValueError("data.system is a message of a conversation, and data.chat is false: drop one of them")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training sources, whichever way they were written."""
        return self.train or (SourceConfig.model_validate({"path": self.path}),)
