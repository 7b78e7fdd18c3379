"""What a pipeline's YAML says. Torch-free."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmkit.config import Config

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class NodeConfig(Config):
    """A node: a recipe that is trained, or a command that makes data, a model or a report."""

    recipe: str | None = Field(None, min_length=1)
    """A stage's recipe: a path beside the pipeline's file, or from the working directory."""
    run: str | None = Field(None, min_length=1)
    """A command: generate, sample, rank, score, quantize, merge, average, export, compare, eval, bench or report."""
    set: dict[str, Any] = {}
    """A recipe's values, or a command's options by their long names. `{node: NAME}` stands for another node's folder, also
    within a text ("{node: rank}/rows.jsonl"), and `{pipeline}` for the pipeline's."""
    after: tuple[str, ...] = ()
    """Nodes whose results this one reads without naming them."""
    ranks: int | None = Field(None, ge=1)
    """Processes that a recipe is trained by on this machine. Default: the pipeline's."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.recipe is None) == (self.run is None):
            raise ValueError("give `recipe`, what is trained, or `run`, the command: one of the two")
        if self.run is not None and self.ranks is not None:
            raise ValueError("ranks: is for recipes, a command is one process: drop it")
        return self


class PipelineConfig(Config):
    """A pipeline."""

    out: str = Field(min_length=1)
    """The folder. A node's own is `out/NAME`, its state `out/pipeline.json`."""
    code: Literal["sources", "version"] = "sources"
    """What counts as other code, after which every node is done again: any change of the package's sources, or only
    another version of it."""
    ranks: int = Field(1, ge=1)
    """Processes that a recipe is trained by on this machine, such as one a GPU."""
    nodes: dict[str, NodeConfig] = Field(min_length=1)
    """By name. What refers to no other node comes first; otherwise the file's order stands."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in self.nodes:
            if not NAME.fullmatch(name) or name in type(self).model_fields:
                raise ValueError(
                    f"nodes: '{name}' is no name of a node: letters, digits, _ and -, and none of "
                    f"{', '.join(type(self).model_fields)}"
                )
        return self
