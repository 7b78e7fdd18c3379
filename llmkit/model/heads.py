"""A decoder with scalar outputs instead of a vocabulary: classification, regression, and later rewards and values.

Shapes as in `gpt`; C scores of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmkit.model.config import GPTConfig
from llmkit.model.gpt import Decoder
from llmkit.model.layouts import use_layout


class SequenceClassifier(nn.Module):
    """Scores of a whole sequence, read at its last real token: a Hugging Face `*ForSequenceClassification`.

    The head has no bias, as there (`score.weight` [C, D]).
    """

    def __init__(self, config: GPTConfig, n_labels: int, activation_checkpointing: bool = False):
        """Allocates the model; call `init_score` and load a checkpoint before use."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, activation_checkpointing)
        self.score = nn.Linear(config.d_model, n_labels, bias=False)
        use_layout(self, config)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores [B, C].

        Args:
            ids_BT: token ids, padded on the right; causal attention never looks at the padding.
            lengths_B: tokens of each row; 0, a row of padding, is scored at its first column.
        """
        B, T = ids_BT.shape
        positions_BT = torch.arange(T, device=ids_BT.device)[None]
        hidden_BTD = self.model(ids_BT, positions_BT, None, T > 1, None)
        last_B = (lengths_B - 1).clamp(min=0)
        return self.score(hidden_BTD[torch.arange(B, device=ids_BT.device), last_B])


def init_score(model: SequenceClassifier, seed: int) -> None:
    """The head alone: normal, std 1 / sqrt(D + 1) (Ziegler et al. 2019, arXiv 1909.08593)."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.score.weight
    with torch.no_grad():
        std = 1 / math.sqrt(weight.shape[1] + 1)
        weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
