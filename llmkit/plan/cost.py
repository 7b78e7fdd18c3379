"""Parameters, FLOPs, memory and disk of a network that is trained, from its shape alone. Torch-free.

In formulas: D d_model, H query heads, K key/value heads, E head width, F MLP width, V vocabulary, T row length.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.model.config import GPTConfig, count_params

_PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight in 4 bits: its share of a scale, and of the scale's scale
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
_PLAIN_ATTENTION = 512  # on a CPU in bf16, rows up to this length keep their scores (`model.gpt.attend`)


@dataclass(frozen=True)
class Cost:
    """What a model costs. Memory in bytes, work in floating-point operations."""

    n_params: int
    n_embedding_params: int
    n_active_params: int
    flops_per_token: float
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    n_trained_params: int
    weight_bytes: int
    """Of the state: the weights that are computed with."""
    gradient_bytes: int
    """Of the state: the flat gradient."""

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def _seen(window: int | None, seq_len: int) -> float:
    """How many positions a token of a causal row attends to, on average."""
    seen = min(window or seq_len, seq_len)
    return seen - seen * seen / (2 * seq_len)


def attention_flops_per_token(model: GPTConfig, seq_len: int) -> float:
    """Forward and backward: 12 per position a token attends to and width of the heads."""
    full, windowed = _seen(None, seq_len) if model.causal else seq_len, _seen(model.sliding_window, seq_len)
    n_windowed = 0 if model.sliding_window is None else model.n_layers - model.n_full_layers
    return 12 * model.n_heads * model.width_of_head * ((model.n_layers - n_windowed) * full + n_windowed * windowed)


def flops_per_token(model: GPTConfig, seq_len: int) -> float:
    """Forward and backward: 6 per weight that a token is multiplied with, and 12 per position it attends to and width
    of the heads (PaLM, appendix B): half of them where attention is causal, fewer with a sliding window."""
    count = count_params(model)
    multiplied = count.active - count.embedding + (model.vocab_size or 0) * model.d_model
    return 6 * multiplied + attention_flops_per_token(model, seq_len)


def block_bytes(model: GPTConfig, seq_len: int, precision: str, device: str = "cpu", tensor: int = 1) -> float:
    """What autograd keeps of one token in one block, on average over the blocks, in eager mode.

    On a CPU the norms are made of small operations, which keep two wide copies of their input; on a GPU they are one
    kernel, which keeps the input. Counted with `torch.autograd.graph.saved_tensors_hooks` (tests/test_plan.py).
    `tensor` processes that compute a row together have all of it in shares: heads and the MLP's width, or positions.
    """
    width = BYTES[precision]
    D, heads, kv = model.d_model, model.n_heads * model.width_of_head, model.kv_heads * model.width_of_head
    wide = 2 * max(width, 4) if device == "cpu" and model.norm == "rmsnorm" else width
    attention = 4 * heads * width + 4 * model.n_heads  # queries, keys and values for every head, and what they gave
    if model.qk_norm:
        attention += (heads + kv) * wide
    if device == "cpu" and precision == "bf16" and seq_len <= _PLAIN_ATTENTION:
        attention += model.n_heads * seq_len * (4 + width)
    # Gate, up, silu(gate) and their product; GPT-2's MLP keeps up and gelu(up).
    mlp: float = (4 if model.mlp == "swiglu" else 2) * model.width_of_mlp * width
    if (experts := model.experts) is not None:  # states once for each expert they visit, before it and after
        mixture = (4 * experts.active_width + 2 * D * experts.n_active) * width + 8 * experts.n
        mlp += (mixture - mlp) * model.n_expert_layers / model.n_layers
    return (2 * D * wide + 2 * D * width + attention + mlp) / tensor


def activation_bytes(
    model: GPTConfig, seq_len: int, micro_tokens: int, precision: str, loss_chunk: int, recompute: bool,
    device: str = "cpu", tensor: int = 1,
) -> float:  # fmt: skip
    """Most bytes that forward and backward pass of a micro-batch take at once, beside weights and flat gradient.

    There are two peaks: in the loss, which makes the head's gradient in fp32 while everything is kept, and just after it,
    when the last MLP's gradients come on top. Of processes that compute rows together each has all positions of what leaves
    the network, and of what enters a block's attention or MLP while that is computed.
    """
    width, wide = BYTES[precision], 8 if precision == "fp64" else 4
    D, V = model.d_model, model.vocab_size or 0
    block = block_bytes(model, seq_len, precision, device, tensor)
    widest = model.width_of_mlp if model.experts is None else model.experts.active_width
    kept = model.n_layers * (D * width / tensor if recompute else block)
    around_head = (
        D * width * (1 + 1 / tensor) + 2 * D * wide
    )  # the final norm's output and input, and the gradient of that
    in_loss = micro_tokens * around_head + min(loss_chunk, micro_tokens) * V * (width + 2 * wide)
    again = block + 2 * D * width * (1 - 1 / tensor)  # of the block that is computed again
    in_block = micro_tokens * (3 * (widest / tensor + D) * width + recompute * again)
    head = V * D * (wide + (width if width < wide else 0))
    return micro_tokens * kept + head + max(in_loss, in_block)


def cost_of(
    model: GPTConfig, *, seq_len: int, micro_tokens: int, precision: str, optimizer: str, loss_chunk: int,
    activation_checkpointing: bool, ema: bool, momentum: bool = False, n_frozen: int = 0, n_frozen_hidden: int = 0,
    n_adapter: int = 0, n_adapter_hidden: int = 0, n_packed: int = 0,
) -> Cost:  # fmt: skip
    """The cost of training one replica.

    Memory of the state is exact, but for AdamW's 4 bytes a tensor; that of activations counts the tensors autograd
    keeps per token and block in eager mode on a CPU.

    Args:
        momentum: whether SGD has one.
        n_frozen: parameters that are not trained: they have neither gradient, nor master, average or moments.
        n_frozen_hidden: those of them that Muon would update.
        n_adapter: weights of adapters, which are trained beside the model's own; a checkpoint then holds what is trained.
        n_adapter_hidden: those of them that Muon would update.
        n_packed: weights of the model that are kept in 4 bits.
    """
    count = count_params(model)
    n_params = count.total + n_adapter
    n_trained = n_params - n_frozen
    width, wide = BYTES[precision], 8 if precision == "fp64" else 4
    # Muon has one moment for each weight of a hidden matrix, and AdamW's two for everything else.
    n_hidden = count.hidden - n_frozen_hidden + n_adapter_hidden
    moments = {"adamw": 2 * n_trained, "muon": 2 * n_trained - n_hidden, "sgd": n_trained * momentum}[optimizer]
    master = wide if width != wide else 0
    # Weights, master, average, optimizer.
    weights = n_params * width - n_packed * (width - _PACKED_BYTES)
    training = n_trained * (master + wide * ema) + wide * moments
    checkpoint = (n_trained * width if n_adapter else weights) + training
    state = weights + training + n_trained * wide  # and the gradient
    activations = activation_bytes(model, seq_len, micro_tokens, precision, loss_chunk, activation_checkpointing)
    return Cost(
        n_params,
        count.embedding,
        count.active + n_adapter,
        flops_per_token(model, seq_len),
        round(state),
        round(activations),
        round(checkpoint),
        n_trained,
        round(weights),
        n_trained * wide,
    )
