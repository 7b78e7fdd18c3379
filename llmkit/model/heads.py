"""A decoder with scalar outputs instead of a vocabulary: classes, numbers, rewards and values.

Shapes as in `gpt`; C scores of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.config import GPTConfig
from llmkit.model.first import give
from llmkit.model.gpt import GPT, Decoder
from llmkit.model.layouts import use_layout


class SequenceClassifier(nn.Module):
    """Scores of a whole sequence: a Hugging Face `*ForSequenceClassification`.

    Of a causal model they are read at the last real token, which alone has seen the others; the head is `score` [C, D]
    without a bias. Of a bidirectional one (EuroBERT) at the mean over all tokens, through `dense`, a GELU and
    `classifier`.
    """

    def __init__(self, config: GPTConfig, n_labels: int, activation_checkpointing: bool = False):
        """Allocates the model, unless on the meta device; call `init_head` and load a checkpoint before use."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, activation_checkpointing)
        if config.causal:
            self.score = nn.Linear(config.d_model, n_labels, bias=False)
        else:
            self.dense = nn.Linear(config.d_model, config.d_model)
            self.classifier = nn.Linear(config.d_model, n_labels)
        use_layout(self, config)

    @property
    def head_names(self) -> tuple[str, ...]:
        """The parameters that are no decoder's: what a language model's folder doesn't hold."""
        return tuple(name for name, _ in self.named_parameters() if not name.startswith("model."))

    def at_tokens(self, ids_BT: Tensor) -> Tensor:
        """A causal model's scores at every token [B, T, C], each from the tokens up to it; rows are padded on the right."""
        assert self.config.causal, "only of a causal model has every token a score of its own"
        T = ids_BT.shape[1]
        columns_1T = torch.arange(T, device=ids_BT.device)[None]
        return self.score(self.model(ids_BT, columns_1T, None, T > 1, None))

    def at_ends(self, ids_RT: Tensor, positions_RT: Tensor, mask: Tensor | None, ends_B: Tensor) -> Tensor:
        """A causal model's scores [B, C] of sequences that share rows: at their last tokens, counted over all rows."""
        hidden_RTD = self.model(ids_RT, positions_RT, mask, False, None)
        return self.score(hidden_RTD.flatten(0, 1)[ends_B])

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores [B, C].

        Args:
            ids_BT: token ids, padded on the right.
            lengths_B: tokens of each row; 0, a row of padding, is scored by its first column.
        """
        B, T = ids_BT.shape
        columns_1T = torch.arange(T, device=ids_BT.device)[None]
        lengths_B1 = lengths_B.clamp(min=1)[:, None]
        if self.config.causal:  # no token looks ahead, and so none at the padding
            hidden_BTD = self.model(ids_BT, columns_1T, None, T > 1, None)
            return self.score(hidden_BTD[torch.arange(B, device=ids_BT.device), lengths_B1[:, 0] - 1])
        real_BT = columns_1T < lengths_B1
        mask = None if bool(real_BT.all()) else real_BT[:, None, None].expand(B, 1, T, T)
        hidden_BTD = self.model(ids_BT, columns_1T, mask, False, None)
        mean_BD = (hidden_BTD * real_BT[..., None]).sum(1) / lengths_B1
        return self.classifier(F.gelu(self.dense(mean_BD.to(hidden_BTD.dtype))))


class ActorCritic(nn.Module):
    """A policy and the model that estimates its value, trained together: one optimizer, one checkpoint, one engine.

    They share no parameter. In a checkpoint the critic is a model of its own, in the folder `critic/`.
    """

    def __init__(self, actor: GPT, critic: SequenceClassifier):
        super().__init__()
        self.actor, self.critic = actor, critic

    @property
    def folders(self) -> tuple[tuple[str, nn.Module], ...]:
        """Where in a checkpoint each of the two lies."""
        return ("", self.actor), ("critic/", self.critic)


class Distilled(nn.Module):
    """A student, and the projections through which it is compared with its teacher: trained together, resumed together.

    Only the student is the model of a checkpoint; the projections lie with the training state.
    """

    def __init__(self, student: GPT, projections: nn.ModuleDict):
        super().__init__()
        self.student, self.projections = student, projections

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the student: it is called by itself."""
        self.student.compile(*args, **kwargs)


def init_head(model: SequenceClassifier, seed: int, zero: bool = False) -> None:
    """The head alone: matrices normal, std 1 / sqrt(D + 1), or zero as for values (Ziegler et al. 2019, arXiv
    1909.08593); biases 0. While the model has no memory, they wait (see `first`)."""
    shapes = {name: model.get_parameter(name).shape for name in model.head_names}

    def values() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            std = 1 / math.sqrt(shape[-1] + 1) if len(shape) == 2 and not zero else 0.0
            yield name, torch.empty(shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator) * std

    give(model, values)
