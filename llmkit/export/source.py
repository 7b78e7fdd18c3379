"""The model that is exported: whole, in floating point, with its adapters merged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llmkit.config import UserError
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model


def load_plain(folder: Path, dtype: torch.dtype | None = None) -> GPT:
    """A language model whose parameters are plain tensors.

    Args:
        folder: a checkpoint or Hugging Face folder.
        dtype: of the parameters. Default: as saved.

    Raises:
        UserError: if the folder holds no language model, or a quantised one.
    """
    model = load_model(folder, dtype)
    if any(type(p) is not nn.Parameter for p in model.parameters()):  # codes and scales in a matrix's place
        raise UserError(f"{folder}: is quantised already: export the model that it was made from")
    return model
