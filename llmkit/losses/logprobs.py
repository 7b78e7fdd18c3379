"""What a model says of given tokens: log-probabilities, entropy, and the divergence of two models at every position.

Shapes: N positions, C of them at once, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkit.losses.base import IGNORE
from llmkit.products import add_weight_gradient, linear, matmul, zeros_for_gradient

_KEPT = 2**25  # elements of [N, V] that may stay in memory until the backward pass; beyond, they are made again
_CHUNK = 2**21  # elements of [C, V] at once, where they are not kept
_ROWS = 4096  # of the output embedding whose gradient is made at once


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _distribution(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """log softmax(hidden @ weight.T / temperature), in fp32 or better from the logits on: what the sampler computes."""
    logits_CV = linear(hidden_CD, weight_VD).to(_wide(hidden_CD))
    if temperature != 1.0:
        logits_CV /= temperature
    return torch.log_softmax(logits_CV, -1)


class HeadGradient:
    """Turns gradients with respect to logits, a chunk at a time, into those of hidden states and weights."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, vocab: int, needs: tuple[bool, bool]):
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD[:vocab]
        self.of_hidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
        # fp32, since it is a sum over chunks: in bf16 each addition would lose the small terms. Rows beyond the
        # tokenizer's vocabulary keep their zeros.
        self.whole_VD = zeros_for_gradient(weight_VD, _wide(weight_VD)) if needs[1] else None
        self.of_weight_VD = None if self.whole_VD is None else self.whole_VD[:vocab]

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        grad_CV = grad_CV.to(self.hidden_ND.dtype)
        if self.of_hidden_ND is not None:
            self.of_hidden_ND[rows] = matmul(grad_CV, self.weight_VD)
        if self.of_weight_VD is None:  # the head is frozen
            return
        if self.of_weight_VD.dtype == grad_CV.dtype:
            add_weight_gradient(self.of_weight_VD, grad_CV, self.hidden_ND[rows])
            return
        # A block of rows at a time: the product in half precision then stays in the cache until it is added.
        for first in range(0, len(self.of_weight_VD), _ROWS):
            block = slice(first, first + _ROWS)
            self.of_weight_VD[block] += grad_CV[:, block].t() @ self.hidden_ND[rows]

    def result(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        return self.of_hidden_ND, None if self.whole_VD is None else self.whole_VD.to(dtype)


class _TokenLogprobs(torch.autograd.Function):
    """Gradients with z = logits / temperature, p = softmax(z), H the entropy:
    d logp[y] / dz = onehot(y) - p, d H / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        temperature: float,
        vocab: int,
        chunk: int,
        entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        n = len(labels_N)
        logp_N = torch.empty(n, dtype=_wide(hidden_ND), device=hidden_ND.device)
        entropy_N = torch.empty_like(logp_N) if entropy else None
        logp_NV = None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            logp_CV = _distribution(hidden_ND[rows], weight_VD[:vocab], temperature)
            logp_N[rows] = logp_CV.gather(1, labels_N[rows, None])[:, 0]
            if entropy_N is not None:
                entropy_N[rows] = -torch.linalg.vecdot(logp_CV.exp(), logp_CV)
            if keep and chunk >= n:
                logp_NV = logp_CV
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, logp_NV, entropy_N)
        ctx.temperature, ctx.vocab, ctx.chunk = temperature, vocab, chunk
        ctx.set_materialize_grads(False)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor | None, grad_entropy_N: Tensor | None = None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, labels_N, logp_NV, entropy_N = ctx.saved_tensors
        out = HeadGradient(hidden_ND, weight_VD, ctx.vocab, ctx.needs_input_grad[:2])
        for start in range(0, len(labels_N), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp_CV = logp_NV
            if logp_CV is None:
                logp_CV = _distribution(hidden_ND[rows], weight_VD[: ctx.vocab], ctx.temperature)
            # With g and e the gradients of logp and H: g onehot - p (g + e (log p + H)), all over the temperature.
            p_CV = logp_CV.exp()
            factor = torch.zeros((), dtype=p_CV.dtype, device=p_CV.device)
            if grad_entropy_N is not None:
                factor = (logp_CV + entropy_N[rows, None]) * grad_entropy_N[rows, None]
            if grad_N is not None:
                factor = factor + grad_N[rows, None]
            grad_CV = p_CV.mul_(-factor)
            if grad_N is not None:
                grad_CV.scatter_add_(1, labels_N[rows, None], grad_N[rows, None])
            if ctx.temperature != 1.0:
                grad_CV /= ctx.temperature
            out.add(rows, grad_CV)
        return (*out.result(weight_VD.dtype), None, None, None, None, None, None)


def token_logprobs(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[label] of every position, in nats, and the entropy there.

    The same distribution as the sampler's (`inference.sampling.log_probs`), fp32 or better from the logits on. [N, V]
    is kept for the backward pass where it is small; else it is made again there, a chunk of positions at a time.
    Differentiable with respect to hidden states and weights, once.

    Args:
        hidden: [..., D] states after the final norm.
        weight_VD: the output embedding.
        labels: [...] int64, the token that comes next; IGNORE: 0 is returned and nothing computed.
        temperature: divides the logits. 0 means greedy decoding, whose log-probabilities are those at temperature 1.
        vocab_size: rows of the embedding that belong to a token, the tokenizer's size; None: all.
        chunk: positions whose logits exist at once; None: as many as a few megabytes hold, or all where they are kept.
        entropy: also -sum p log p of the same distribution, differentiable too.

    Returns:
        log-probabilities [...] and entropy [...] or None; 0 where labels is IGNORE.
    """
    vocab = weight_VD.shape[0] if vocab_size is None else vocab_size
    kept_N = labels.reshape(-1) != IGNORE
    hidden_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    whole = bool(kept_N.all())
    if not whole:
        hidden_ND, labels_N = hidden_ND[kept_N], labels_N[kept_N]
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight_VD.requires_grad)
    keep = train and chunk is None and len(labels_N) * vocab <= _KEPT
    if chunk is None:
        chunk = max(1, len(labels_N) if keep else _CHUNK // vocab)
    outs = _TokenLogprobs.apply(hidden_ND, weight_VD, labels_N, temperature or 1.0, vocab, chunk, entropy, keep)
    logprobs, entropies = (
        None if out_N is None else (out_N if whole else _spread(out_N, kept_N)).view(labels.shape) for out_N in outs
    )
    assert logprobs is not None
    return logprobs, entropies


def _spread(values_K: Tensor, kept_N: Tensor) -> Tensor:
    """[N] with the values where `kept` is True and 0 elsewhere."""
    return values_K.new_zeros(len(kept_N)).masked_scatter(kept_N, values_K)


class _TokenKL(torch.autograd.Function):
    """d KL / dz = p (log p - log q - KL), z = logits / temperature of the policy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ref_hidden_ND: Tensor,
        ref_weight_VD: Tensor,
        temperature: float,
        vocab: int,
        chunk: int,
    ) -> Tensor:
        kl_N = torch.empty(len(hidden_ND), dtype=_wide(hidden_ND), device=hidden_ND.device)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logp_CV = _distribution(hidden_ND[rows], weight_VD[:vocab], temperature)
            gap_CV = logp_CV - _distribution(ref_hidden_ND[rows], ref_weight_VD[:vocab], temperature)
            kl_N[rows] = torch.linalg.vecdot(logp_CV.exp_(), gap_CV)
        ctx.save_for_backward(hidden_ND, weight_VD, ref_hidden_ND, ref_weight_VD, kl_N)
        ctx.temperature, ctx.vocab, ctx.chunk = temperature, vocab, chunk
        return kl_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, ref_hidden_ND, ref_weight_VD, kl_N = ctx.saved_tensors
        out = HeadGradient(hidden_ND, weight_VD, ctx.vocab, ctx.needs_input_grad[:2])
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp_CV = _distribution(hidden_ND[rows], weight_VD[: ctx.vocab], ctx.temperature)
            gap_CV = logp_CV - _distribution(ref_hidden_ND[rows], ref_weight_VD[: ctx.vocab], ctx.temperature)
            gap_CV -= kl_N[rows, None]
            grad_CV = logp_CV.exp_().mul_(gap_CV).mul_(grad_N[rows, None] / ctx.temperature)
            out.add(rows, grad_CV)
        return (*out.result(weight_VD.dtype), None, None, None, None, None)


def full_kl(
    hidden: Tensor,
    weight_VD: Tensor,
    ref_hidden: Tensor,
    ref_weight_VD: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """KL(policy || reference) = sum_v p log(p / q) over the whole vocabulary at every position, in nats [...].

    Exact in each state that was visited, unlike the estimates from the sampled token (`policy.kl_k1` and others), at
    the price of both models' logits: they exist a chunk at a time and are made again for the gradient, so neither
    [N, V] is ever whole. The reference gets no gradient.

    Args:
        hidden: [..., D] states of the policy after its final norm.
        weight_VD: the policy's output embedding.
        ref_hidden: [..., D'] states of the reference on the same tokens.
        ref_weight_VD: its output embedding, [V or more, D'].
        mask: [...] bool, True where the KL is wanted; 0 elsewhere, and nothing computed.
        temperature: of the sampler; divides the logits of both (0 as 1).
        vocab_size: the tokenizer's size; None: the smaller of the two embeddings.
        chunk: positions whose logits exist at once.
    """
    vocab = min(len(weight_VD), len(ref_weight_VD)) if vocab_size is None else vocab_size
    kept_N = mask.reshape(-1)
    hidden_ND, ref_hidden_ND = (t.reshape(-1, t.shape[-1])[kept_N] for t in (hidden, ref_hidden.detach()))
    size = max(1, _CHUNK // vocab) if chunk is None else chunk
    kl_N = _TokenKL.apply(hidden_ND, weight_VD, ref_hidden_ND, ref_weight_VD.detach(), temperature or 1.0, vocab, size)
    return _spread(kl_N, kept_N).view(mask.shape)
