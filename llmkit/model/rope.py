"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and how they are stretched to longer contexts.

Shapes: B batch, T positions, E head width; x is [B, heads, T, E].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkit.model.config import GPTConfig, LinearScaling, Llama3Scaling, YarnScaling

Rope = tuple[Tensor, Tensor]  # cos and sin, see `rope_tables`


def rope_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Angular frequency of each pair of a head, fp32 [E/2] (arXiv 2104.09864), stretched by `rope_scaling`."""
    exponent = torch.arange(0, config.width_of_head, 2, dtype=torch.int64, device=device).float() / config.width_of_head
    freq = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if isinstance(scaling, Llama3Scaling):
        return _llama3_frequencies(scaling, freq)
    if isinstance(scaling, LinearScaling):
        return freq / scaling.factor
    return _yarn_frequencies(scaling, freq, config.rope_theta)


def _llama3_frequencies(scaling: Llama3Scaling, freq: Tensor) -> Tensor:
    wavelength = 2 * math.pi / freq
    longest = scaling.original_max_seq_len / scaling.low_freq_factor
    shortest = scaling.original_max_seq_len / scaling.high_freq_factor
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freq / scaling.factor + smooth * freq
    return torch.where(wavelength > longest, freq / scaling.factor, torch.where(wavelength < shortest, freq, between))


def _yarn_frequencies(scaling: YarnScaling, freq: Tensor, theta: float) -> Tensor:
    """A ramp over the pairs, from those that turn beta_fast times over the original context to beta_slow times."""
    E = 2 * len(freq)

    def pair_that_turns(times: float) -> float:
        return E * math.log(scaling.original_max_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, E - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(E // 2, device=freq.device).float() - low) / width).clamp(0, 1)
    return freq / scaling.factor * stretched + freq * (1 - stretched)


def rope_scale(config: GPTConfig) -> float:
    """What YaRN multiplies queries and keys by; 1 without it."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor


def rope_tables(config: GPTConfig, positions_BT: Tensor) -> Rope:
    """cos and sin of every angle, fp32 [B, 1, T, E]: never in half precision, which is off by whole turns far out."""
    angles = positions_BT[:, None, :, None].float() * rope_frequencies(config, positions_BT.device)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin, scale = angles.cos(), angles.sin(), rope_scale(config)
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (i, i + E/2) by their angle, in fp32 or better."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return (x_BHTE * cos + torch.cat((-right, left), dim=-1) * sin).to(x_BHTE.dtype)
