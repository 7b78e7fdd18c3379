"""What a teacher says at every trained position of some units: its likeliest next tokens, and how likely all others are.

Shapes: N positions that are trained, C of them at once, K tokens kept of each, V vocabulary, B rows, T inputs of a row, D
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import UserError
from llmkit.data.packing import IGNORE
from llmkit.data.sequences import cut_by_length
from llmkit.distill.units import Unit, Units, where
from llmkit.inference.batch import evaluating
from llmkit.model.gpt import GPT, document_mask
from llmkit.products import linear

_CHUNK = 1 << 21  # elements of [C, V] at once; on a GPU, whose cache they don't fit anyway, more
_CHUNK_GPU = 1 << 25


@dataclass(frozen=True)
class Kept:
    """What is kept of each position: K ids, their log-probabilities, and the log of what all other tokens have together."""

    top_k: int
    dtype: Literal["bf16", "fp32"]
    """Of the log-probabilities; the tail's is fp32."""
    temperature: float
    """Divides the logits before the softmax."""
    vocab_size: int

    @property
    def ids_dtype(self) -> type[np.uint16] | type[np.int32]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    @property
    def bytes_per_position(self) -> int:
        return self.top_k * (np.dtype(self.ids_dtype).itemsize + (2 if self.dtype == "bf16" else 4)) + 4

    def bits(self, logprobs_NK: Tensor) -> NDArray[Any]:
        """As they lie in memory; numpy has no bf16."""
        if self.dtype == "fp32":
            return logprobs_NK.float().cpu().numpy()
        return logprobs_NK.to(torch.bfloat16).cpu().view(torch.int16).numpy()

    def tensor(self, bits: NDArray[Any]) -> Tensor:
        """The log-probabilities that `bits` was made of."""
        return torch.from_numpy(bits) if self.dtype == "fp32" else torch.from_numpy(bits).view(torch.bfloat16)


@torch.no_grad()
def top_logprobs(hidden_ND: Tensor, weight_VD: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest next tokens of each position, the likeliest first; fp32 or better from the logits on.

    Args:
        hidden_ND: states after the final norm.
        weight_VD: the output embedding; rows from vocab_size on belong to no token and are cut off before the softmax
            (B91).

    Returns:
        ids [N, K], their log-probabilities [N, K], and the log of the probability of all others together [N], -inf where
        there are none.
    """
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    shape = (len(hidden_ND), kept.top_k)
    ids_NK = torch.empty(shape, dtype=torch.int64, device=hidden_ND.device)
    logprobs_NK = torch.empty(shape, dtype=wide, device=hidden_ND.device)
    tail_N = torch.empty(len(hidden_ND), dtype=wide, device=hidden_ND.device)
    chunk = max(32, (_CHUNK_GPU if hidden_ND.is_cuda else _CHUNK) // kept.vocab_size)
    for start in range(0, len(hidden_ND), chunk):
        rows = slice(start, start + chunk)
        logits_CV = linear(hidden_ND[rows], weight_VD[: kept.vocab_size]).to(wide)
        if kept.temperature != 1.0:
            logits_CV /= kept.temperature
        top_CK, ids_NK[rows] = logits_CV.topk(kept.top_k)
        top_CK -= (largest_C1 := top_CK[:, :1].clone())
        exp_CV = logits_CV.sub_(largest_C1).exp_()
        log_sum_C = exp_CV.sum(-1).log()
        logprobs_NK[rows] = top_CK - log_sum_C[:, None]
        # Summed up and not taken as what is missing from 1, which is nothing but rounding where the tail is small.
        tail_N[rows] = exp_CV.scatter_(1, ids_NK[rows], 0.0).sum(-1).log() - log_sum_C
    return ids_NK, logprobs_NK, tail_N


class Asker:
    """Asks a teacher about units.

    Args:
        units: a source's.
        teacher: gives the model; called when the first question is asked.
        batch_tokens: most inputs of a forward pass, padding included.
        should_stop: asked before each of them.
    """

    def __init__(
        self,
        units: Units,
        kept: Kept,
        teacher: Callable[[], GPT],
        batch_tokens: int,
        device: torch.device,
        should_stop: Callable[[], bool],
    ):
        self.units, self.kept = units, kept
        self._load = teacher
        self._model: GPT | None = None
        self._batch_tokens, self._device, self._should_stop = batch_tokens, device, should_stop

    def tensors(self, numbers: range) -> dict[str, Tensor] | None:
        """What is said of the units with these numbers. None: asked to stop.

        It depends on nothing but those units: they are sorted by length and cut into batches among themselves.

        Returns:
            ids [N, K], logprobs [N, K] and tail [N] of their trained positions, unit by unit; starts [n_units + 1] of the
            units in them; hashes [n_units, 16] of their tokens.

        Raises:
            UserError: the teacher has fewer tokens than the vocabulary, or gives no probabilities.
        """
        units = [self.units.get(i) for i in numbers]
        starts = np.cumsum([0, *(np.count_nonzero(u.labels != IGNORE) for u in units)]).astype(np.int64)
        n = int(starts[-1])
        assert n == self.units.n_labels[numbers.start : numbers.stop].sum()
        ids = np.empty((n, self.kept.top_k), self.kept.ids_dtype)
        bits, tail = self.kept.bits(torch.empty(ids.shape)), np.empty(n, np.float32)
        lengths = np.array([len(u.inputs) for u in units], np.int64)
        for batch in cut_by_length(lengths, np.ones_like(lengths), self._batch_tokens):
            if self._should_stop():
                return None
            places = np.concatenate([np.arange(starts[j], starts[j + 1]) for j in batch.tolist()])
            ids_NK, logprobs_NK, tail_N = self._answers([units[j] for j in batch.tolist()])
            bad = np.flatnonzero(~torch.isfinite(logprobs_NK).all(-1).cpu().numpy())
            if bad.size:
                unit = numbers[int(np.searchsorted(starts, places[bad[0]], "right")) - 1]
                raise UserError(
                    f"{where(self.units, unit)}: the teacher's logits are not finite: set teacher_precision to fp32, or "
                    "take another teacher"
                )
            ids[places] = ids_NK.cpu().numpy()
            bits[places], tail[places] = self.kept.bits(logprobs_NK), tail_N.float().cpu().numpy()
        hashes = np.frombuffer(b"".join(u.hash for u in units), np.uint8).reshape(len(units), -1)
        return {
            "ids": torch.from_numpy(ids),
            "logprobs": self.kept.tensor(bits),
            "tail": torch.from_numpy(tail),
            "starts": torch.from_numpy(starts),
            "hashes": torch.from_numpy(hashes.copy()),
        }

    @torch.no_grad()
    def _answers(self, units: Sequence[Unit]) -> tuple[Tensor, Tensor, Tensor]:
        """`top_logprobs` at the trained positions of some units, one after the other."""
        model = self._teacher()
        shape = (len(units), -(-max(1, *(len(u.inputs) for u in units)) // 8) * 8)
        ids_BT, positions_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        docs_BT, is_asked_BT = np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)
        for b, unit in enumerate(units):
            here = slice(len(unit.inputs))
            ids_BT[b, here], positions_BT[b, here] = unit.inputs, unit.positions
            docs_BT[b, here], is_asked_BT[b, here] = unit.docs, unit.labels != IGNORE
        ids, positions, docs, is_asked = (
            torch.from_numpy(a).to(self._device) for a in (ids_BT, positions_BT, docs_BT, is_asked_BT)
        )
        with evaluating(model):
            hidden_BTD = model(ids, positions, document_mask(docs) if docs_BT.max(initial=0) > 0 else None)
        return top_logprobs(hidden_BTD[is_asked], model.head_weight, self.kept)

    def _teacher(self) -> GPT:
        if self._model is None:
            self._model = self._load()
            if (rows := len(self._model.head_weight)) < self.kept.vocab_size:
                raise UserError(
                    f"teacher: its output embedding has {rows} rows, the tokenizer {self.kept.vocab_size} tokens: they do "
                    "not belong together"
                )
        return self._model
