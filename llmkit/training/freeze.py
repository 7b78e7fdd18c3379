"""`freeze:` of a recipe: which parameters stay as they are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from llmkit.config import UserError
from llmkit.model.heads import Distilled
from llmkit.training.norms import layers_of

_RANGE = re.compile(r"(\d+)-(\d+)")


def frozen_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The parameters that patterns mean.

    A pattern is a prefix of a name up to a dot (`layers.0`, `layers.0-3.mlp`, `embed_tokens`), or a glob
    (`*.self_attn.*`, `*norm*`). A leading `model.` may be left out.

    Raises:
        UserError: a pattern means nothing, or together they leave nothing to train.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if any(_means(p, name) for p in _without_range(pattern))}
        if not found:
            raise UserError(f"freeze: '{pattern}' is no parameter's name: {_hint(pattern, names)}")
        frozen |= found
    if patterns and len(frozen) == len(names):
        raise UserError(f"freeze: {', '.join(patterns)}: this is every parameter: nothing would be trained")
    return frozen


def _without_range(pattern: str) -> list[str]:
    """`layers.0-2.mlp` -> `layers.0.mlp`, `layers.1.mlp`, `layers.2.mlp`."""
    patterns = [""]
    for part in pattern.split("."):
        match = _RANGE.fullmatch(part)
        if match and not int(match[1]) <= int(match[2]) < int(match[1]) + 100_000:
            raise UserError(f"freeze: '{pattern}': the range {part} is empty or too long")
        parts = range(int(match[1]), int(match[2]) + 1) if match else [part]
        patterns = [f"{p}.{n}" if p else str(n) for p in patterns for n in parts]
    return patterns


def _means(pattern: str, name: str) -> bool:
    return any(
        n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)
        for n in (name, name.removeprefix("model."))
    )


def _hint(pattern: str, names: Sequence[str]) -> str:
    short = [name.removeprefix("model.") for name in names]
    if pattern.startswith("lm_head") and any(n.startswith("embed_tokens") for n in short):
        return "the head is tied to embed_tokens: freeze that, or train a model with tie_embeddings: false"
    prefixes = {".".join(n.split(".")[:i]) for n in short for i in range(1, n.count(".") + 2)}
    near = difflib.get_close_matches(pattern.removeprefix("model."), sorted(prefixes), 4, 0.6)
    if near:
        return f"near are {', '.join(near)}"
    return f"there are {', '.join(layers_of(names))}"


def freeze(module: nn.Module, patterns: Sequence[str]) -> str | None:
    """Freezes what the patterns mean; returns the sentence that a run says of it."""
    if not patterns:
        return None
    parameters = dict((module.student if isinstance(module, Distilled) else module).named_parameters())
    frozen = frozen_names(list(parameters), patterns)
    for name in frozen:
        parameters[name].requires_grad_(False)
    total = sum(p.numel() for p in parameters.values())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    text = f"training {trained:,} of {total:,} parameters ({trained / total:.1%}); frozen: {', '.join(patterns)}"
    tied = any(n.endswith("embed_tokens.weight") for n in frozen) and not any(
        n.startswith("lm_head") for n in parameters
    )
    return text + (" (and with it the output head, which is tied to it)" if tied else "")
