"""From logits to the next token: pure functions of logits, settings and one uniform number per row.

Shapes: B rows, V the tokenizer's vocabulary. A model's logits may have more columns, because its embedding is rounded
up to a multiple of 64; those belong to no token and are cut off before anything is normalised.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.inference.config import SamplingConfig

_PIECE = 128  # tokens over which `draw` sums up at a time
_LIKELIEST = 256  # tokens that are sorted first: most often they hold top_p together


def row_seeds(seed: int, n: int) -> list[int]:
    """Seeds of the rows 0..n-1 of one call. Pass a slice of them when rows are spread over batches or ranks."""
    return [random.Random(f"{seed}/{i}").getrandbits(63) for i in range(n)]


def sample_seeds(seed: int, n: int) -> list[int]:
    """Seeds of a row's n samples; the first is the row's own, so it is the same text whatever n is."""
    return [seed, *(random.Random(f"{seed}/sample {k}").getrandbits(63) for k in range(1, n))]


def log_probs(logits: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """log softmax(logits / temperature) over the tokenizer's vocabulary, [..., V] in fp32 or better.

    It is the one distribution that sampler and trainer must share for a ratio of 1 (filters come after it and do not
    count). Temperature 0 means greedy decoding: its log-probabilities are those at temperature 1.

    Args:
        logits: [..., V or more].
        temperature: divides the logits.
        vocab_size: the tokenizer's, V.
    """
    logits = logits[..., :vocab_size]
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def filtered(logprobs_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Probabilities [B, V] with 0 for every token that the filters exclude; the rest is not renormalised.

    Each filter is a threshold on the probability, so tied tokens share their fate and no sort has to order them.
    """
    probs_BV = logprobs_BV.exp()
    V = probs_BV.shape[1]
    k = sampling.top_k if 0 < sampling.top_k < V else V
    if k == V and sampling.top_p == 1.0:
        best_B1 = probs_BV.amax(-1, keepdim=True) if sampling.min_p > 0.0 else None
    else:
        # Tokens beyond the k-th that are tied with it are missing here; they would not move the threshold of top_p,
        # which looks at more probable tokens only.
        n_ranked = k if k < V else min(V, _LIKELIEST)
        ranked_BK = probs_BV.topk(n_ranked).values
        best_B1 = ranked_BK[:, :1]
        if k < V:
            probs_BV = probs_BV.where(probs_BV >= ranked_BK[:, -1:], 0.0)
        if sampling.top_p < 1.0:
            held_B1 = sampling.top_p * probs_BV.sum(-1, keepdim=True, dtype=torch.float64)
            if n_ranked < k and not bool((ranked_BK.sum(-1, keepdim=True, dtype=torch.float64) > held_B1).all()):
                ranked_BK = probs_BV.topk(k).values
            ranked_BK = ranked_BK.double()
            before_BK = ranked_BK.cumsum(-1) - ranked_BK
            n_kept_B1 = (before_BK < held_B1).sum(-1, keepdim=True).clamp(min=1)
            smallest_B1 = ranked_BK.gather(1, n_kept_B1 - 1)
            probs_BV = probs_BV.where(probs_BV >= smallest_B1, 0.0)
    if best_B1 is not None and sampling.min_p > 0.0:
        probs_BV = probs_BV.where(probs_BV >= sampling.min_p * best_B1, 0.0)
    return probs_BV


def drawn_log_probs(logits: Tensor, ids_B: Tensor, sampling: SamplingConfig, vocab_size: int) -> Tensor:
    """Log-probabilities [B] of tokens under the distribution that `sample` draws from: what the filters leave, as a whole.

    Without filters they are those of `log_probs`; with them a trainer needs both, to weigh one against the other.

    Args:
        logits: [B, V or more], after bias and penalties if there are any.
        ids_B: tokens that `sample` chose.
        sampling: temperature, not 0, and filters.
        vocab_size: the tokenizer's, V.
    """
    kept_BV = filtered(log_probs(logits, sampling.temperature, vocab_size), sampling)
    return (kept_BV.gather(1, ids_B[:, None])[:, 0] / kept_BV.sum(-1)).log()


def draw(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Inverts the cumulative distribution: the first token whose cumulated probability exceeds u, [B].

    Args:
        probs_BV: not negative, at least one positive per row; need not add up to 1.
        uniforms_B: float64 in [0, 1), one number per row, so that a draw depends on nothing but its own row.
    """
    B, V = probs_BV.shape
    size = min(_PIECE, V)
    pieces_BNS = F.pad(probs_BV, (0, -V % size)).view(B, -1, size)
    # A running sum over all of V in fp64 takes longer than a small network: so first over pieces, then in one of them.
    cumulated_BN = pieces_BNS.sum(-1, dtype=torch.float64).cumsum(-1)
    piece_B1, rest_B1 = _find(cumulated_BN, uniforms_B[:, None] * cumulated_BN[:, -1:])
    piece_B1 = piece_B1.clamp(max=pieces_BNS.shape[1] - 1)  # of a row of NaN nothing is found
    within_BS = pieces_BNS.gather(1, piece_B1[:, :, None].expand(B, 1, size))[:, 0]
    token_B1, _ = _find(within_BS.cumsum(-1, dtype=torch.float64), rest_B1)
    return (piece_B1 * size + token_B1)[:, 0]


def _find(cumulated_BN: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place [B, 1] whose cumulated sum exceeds the target, and what the sum before it leaves of the target."""
    # Rounding may bring the target up to the total itself, which no entry exceeds.
    total_B1 = cumulated_BN[:, -1:]
    target_B1 = torch.minimum(target_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    place_B1 = torch.searchsorted(cumulated_BN, target_B1, right=True)
    before_B1 = cumulated_BN.gather(1, (place_B1 - 1).clamp(min=0)).where(place_B1 > 0, 0.0)
    return place_B1, target_B1 - before_B1


def sample(
    logits: Tensor, uniforms_B: Tensor, sampling: SamplingConfig, vocab_size: int, steered_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses one token per row.

    Args:
        logits: [B, V or more].
        uniforms_B: float64 in [0, 1); unused when greedy.
        sampling: temperature and filters.
        vocab_size: the tokenizer's, V: ids from here on are never chosen.
        steered_BV: the logits after bias and penalties (`steering.Steering`), from which is chosen. Default: the logits.

    Returns:
        ids [B], and their log-probabilities [B] by `log_probs`: after the temperature, before bias, penalties and filters.
    """
    logprobs_BV = log_probs(logits, sampling.temperature, vocab_size)
    if sampling.temperature == 0.0:
        ids_B = (logits[:, :vocab_size] if steered_BV is None else steered_BV).argmax(-1)
    else:
        chosen_from_BV = logprobs_BV if steered_BV is None else log_probs(steered_BV, sampling.temperature, vocab_size)
        # A row of NaN has no valid draw: the clamp keeps the gather in range, and its NaN log-probability tells.
        ids_B = draw(filtered(chosen_from_BV, sampling), uniforms_B).clamp(max=vocab_size - 1)
    return ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0]
