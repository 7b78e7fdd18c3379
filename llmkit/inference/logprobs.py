"""How likely a model finds given answers: the sums that preference losses compare, and a reference's, kept in the cache.

Shapes: B sequences, T ids of the longest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from llmkit import storage
from llmkit.config import Interrupted
from llmkit.data.cache import ContentHashes, cache_writable, key_of
from llmkit.data.encoded import read_arrays
from llmkit.data.sequences import cut_by_length, padded
from llmkit.data.shared import SharedRows
from llmkit.data.sources import File
from llmkit.losses import IGNORE, token_logprobs
from llmkit.model.gpt import GPT

_VERSION = 1
_PART_TOKENS = 1 << 18  # about so many tokens are lost at most when the work is killed


def answer_logprobs(model: GPT, ids_BT: Tensor, lengths_B: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """Sum over each answer's tokens of their log-probabilities after all that stands before them, [B], in nats.

    Which tokens those are is told by the lengths, never by an id: prompts and padding count nothing.

    Args:
        ids_BT: prompt, answer and padding.
        lengths_B: ids of prompt and answer.
        prompt_lengths_B: ids of the prompt, at least 1.
    """
    labels_BT = answer_labels(ids_BT, lengths_B, prompt_lengths_B)
    logprobs_BT, _ = token_logprobs(model(ids_BT), model.head_weight, labels_BT)
    return logprobs_BT.sum(-1)


def shared_logprobs(model: GPT, shared: SharedRows, n_sequences: int) -> Tensor:
    """`answer_logprobs` of sequences in rows that hold each prompt once, [n_sequences].

    A model whose layers look back over a window of columns can't be asked so: an answer's prompt may be out of sight.
    """
    hidden_RTD = model(shared.ids_RT, shared.positions_RT, shared.mask())
    logprobs_N, _ = token_logprobs(hidden_RTD.flatten(0, 1)[shared.from_N], model.head_weight, shared.labels_N)
    # Placed and summed, not added up by index: that order would differ from run to run on a GPU.
    logprobs_BA = logprobs_N.new_zeros(n_sequences, shared.longest)
    return logprobs_BA.index_put((shared.sequence_N, shared.offset_N), logprobs_N).sum(-1)


def answer_labels(ids_BT: Tensor, lengths_B: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """The next id at every position where that is one of the answer's, IGNORE elsewhere."""
    columns_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    is_answer_BT = (columns_1T >= prompt_lengths_B[:, None] - 1) & (columns_1T < lengths_B[:, None] - 1)
    return torch.where(is_answer_BT, ids_BT.roll(-1, 1), IGNORE)


@dataclass(frozen=True)
class Texts:
    """What a model is asked about."""

    lengths: NDArray[np.int64]
    """Ids of each sequence."""
    get: Callable[[int], tuple[NDArray[np.int32], int]]
    """A sequence's ids, and how many are the prompt's."""
    hash: str
    """Names all of them."""


def folder_files(folder: Path) -> list[File]:
    """The files of a model's folder that decide what it computes."""
    paths = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("config.json"))
    return [File(str(p), "model", "", p.stat().st_size) for p in paths]


def cached_logprobs(
    cache: Path,
    folders: Sequence[Path],
    load: Callable[[], GPT],
    texts: Texts,
    *,
    inputs: dict[str, Any],
    micro_tokens: int,
    pad_id: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> NDArray[Any]:
    """`answer_logprobs` of every sequence under a frozen model: computed once, a part at a time, and kept.

    The key is a hash of the model's files, of the sequences and of `inputs`, so nothing old is ever taken for new. Work
    that was cut short goes on with the first part that is missing.

    Args:
        cache: the folder that keeps them.
        folders: those of the model, for its hash.
        load: gives the model; called only if something must be computed.
        texts: the sequences.
        inputs: what else the numbers depend on (JSON): the precision.
        micro_tokens: most ids of one forward pass.

    Raises:
        Interrupted: should_stop() said so; the parts that are done are kept.
    """
    hashes = ContentHashes(cache)
    key = {
        "version": _VERSION,
        "model": [hashes.of(folder_files(folder)) for folder in folders],
        "texts": texts.hash,
        "micro_tokens": micro_tokens,
        "device": device.type,
        **inputs,
    }
    with cache_writable(cache):
        hashes.save()
    file = cache / f"{key_of(key)[:32]}.logprobs.safetensors"
    if file.is_file():
        return read_arrays(file)["logprobs"]
    batches = cut_by_length(texts.lengths, np.ones(len(texts.lengths), np.int64), micro_tokens)
    parts = _parts(batches, texts.lengths)
    folder = file.with_suffix(".parts")
    model: GPT | None = None
    found: list[NDArray[Any]] = []
    for n, part in enumerate(parts):
        place = folder / f"{n:05d}.safetensors"
        if not place.is_file():
            model = load() if model is None else model
            values = []
            for batch in part:
                if should_stop():
                    raise Interrupted(
                        "stopped while the reference's log-probabilities were computed; run again to go on"
                    )
                values.append(_of_batch(model, batch, texts, pad_id, device))
            with cache_writable(folder):
                storage.replace_file(place, save({"logprobs": np.concatenate(values)}))
            if len(parts) > 1:
                say(f"reference  part {n + 1} of {len(parts)}")
        found.append(read_arrays(place)["logprobs"])
    result = np.empty(len(texts.lengths), found[0].dtype)
    result[np.concatenate(batches)] = np.concatenate(found)
    with cache_writable(cache):
        storage.replace_file(file, save({"logprobs": result}))
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _parts(batches: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
    parts: list[list[NDArray[np.int64]]] = []
    n = _PART_TOKENS
    for batch in batches:
        if n >= _PART_TOKENS:
            parts.append([])
            n = 0
        parts[-1].append(batch)
        n += int(lengths[batch].sum())
    return parts


@torch.no_grad()
def _of_batch(model: GPT, batch: NDArray[np.int64], texts: Texts, pad_id: int, device: torch.device) -> NDArray[Any]:
    pairs = [texts.get(i) for i in batch.tolist()]
    longest = max(len(ids) for ids, _ in pairs)
    tensors = padded([ids for ids, _ in pairs], [n for _, n in pairs], longest, pad_id)
    ids_BT, lengths_B, prompt_lengths_B = (t.to(device) for t in tensors)
    return answer_logprobs(model, ids_BT, lengths_B, prompt_lengths_B).cpu().numpy()
