"""What is computed with the codes of a matrix in few bits: the matrix again, and products with it.

Shapes: N rows (outputs), K columns, G groups of a row, M rows of input.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.products import linear

_BLOCK = 1 << 20  # weights that are unpacked at once: a few megabytes, which stay in the cache until they are used
_TINY = 1e-30  # instead of a scale of 0, so that zeros stay zeros


def pack(codes_NK: Tensor) -> Tensor:
    """uint8 codes below 16 [N, K], K even, as two a byte [N, K / 2]: a row's first half in the low bits, its second in the
    high ones, so that each half is unpacked as one run."""
    low, high = codes_NK.chunk(2, dim=1)
    return low | (high << 4)


def unpack(packed: Tensor, out_NK: Tensor) -> Tensor:
    """The codes less 8, which are exact in every floating-point dtype, into given memory."""
    h = packed.shape[1]
    out_NK[:, :h] = ((packed & 15) - 8).view(torch.int8)
    out_NK[:, h:] = ((packed >> 4) - 8).view(torch.int8)
    return out_NK


def dense_of(codes: Tensor, scales: Tensor, lows: Tensor | None, n_columns: int) -> Tensor:
    """Rows of a matrix in fp32, [N, K]."""
    if lows is None:
        return codes.float() * scales[:, None]
    n_rows, G = scales.shape
    values_NK = unpack(codes, torch.empty(n_rows, 2 * codes.shape[1], device=codes.device))
    values_NGg = values_NK.view(n_rows, G, -1)
    values_NGg.mul_(scales.float()[..., None]).add_(middles_of(scales, lows)[..., None])
    return values_NK[:, :n_columns]


def middles_of(scales: Tensor, lows: Tensor) -> Tensor:
    """The value of code 8 of each group, fp32."""
    return lows.float() + 8 * scales.float()


# --- products --------------------------------------------------------------------------------------------------------


def int8_product(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    """x (s c)^T, [M, N], for int8 codes.

    Of a few rows on a CPU from the codes as they lie, a quarter of the bytes of fp32 weights: in bf16 by PyTorch's packed
    product, in fp32, where that is slow, by whole numbers. Of many rows from the codes in x's dtype.
    """
    few = 0 < len(x_MK) <= _FEW_ROWS.get(x_MK.dtype, 0) and codes_NK.device.type == "cpu"
    if few and codes_NK.shape[1] % 32 == 0 and _fast_works(x_MK.dtype):
        return _FAST[x_MK.dtype](x_MK, codes_NK, scales_N)
    out_MN = x_MK.new_empty(len(x_MK), len(codes_NK))
    for rows, block in _blocks(codes_NK, codes_NK.shape[1], x_MK.dtype):
        # Codes up to 127 are exact in every floating-point dtype; the scales are put on what comes out.
        out_MN[:, rows] = linear(x_MK, block.copy_(codes_NK[rows])) * scales_N[rows]
    return out_MN


def dynamic_product(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    """x (s c)^T, [M, N], for int8 codes, each row of x rounded to codes and a scale as a row of weights is.

    On a CPU the products of codes are summed exactly; a row's result doesn't depend on the rows beside it.
    """
    unit_M1 = torch.linalg.vector_norm(x_MK, torch.inf, 1, keepdim=True, dtype=torch.float32).div_(127)
    codes_MK = (x_MK / unit_M1.clamp(min=_TINY)).round_()
    if len(x_MK) and codes_NK.is_cpu and codes_NK.shape[1] % 32 == 0 and _fast_works(torch.float32):
        sums_MN = torch._int_mm(codes_MK.to(torch.int8), codes_NK.t())
        return ((sums_MN * unit_M1).mul_(scales_N)).to(x_MK.dtype)
    return int8_product((codes_MK * unit_M1).to(x_MK.dtype), codes_NK, scales_N)


def int4_product(x_MK: Tensor, packed: Tensor, scales_NG: Tensor, lows_NG: Tensor) -> Tensor:
    """x W^T, [M, N], for w = s c + low, a block of rows after the other, so that the whole matrix is never unpacked.

    The part of a group's middle value, which is the same for all its weights, is put on what comes out: it takes the sum
    of the group's inputs alone.
    """
    G = scales_NG.shape[1]
    x_MK = F.pad(x_MK, (0, 2 * packed.shape[1] - x_MK.shape[1]))
    sums_MG = x_MK.unflatten(1, (G, x_MK.shape[1] // G)).sum(-1, dtype=torch.float32)
    out_MN = F.linear(sums_MG, middles_of(scales_NG, lows_NG)).to(x_MK.dtype)
    for rows, block in _blocks(packed, x_MK.shape[1], torch.float32):  # in bf16 the scaling is several times slower
        unpack(packed[rows], block).view(len(block), G, -1).mul_(scales_NG[rows, :, None].float())
        out_MN[:, rows] += linear(x_MK, block.to(x_MK.dtype))
    return out_MN


def tiles_of(packed: Tensor, scales_NG: Tensor, lows_NG: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of 4 bits as PyTorch's product on a CPU wants it: its own order of codes, [N, K / 2], and bf16 scales and
    middles [G, N, 2]. The codes are so held twice, which is still less than 8 bits take."""
    codes_NK = unpack(packed, torch.empty(len(packed), 2 * packed.shape[1])) + 8
    lines = torch.stack((scales_NG.float(), middles_of(scales_NG, lows_NG)), -1).transpose(0, 1)
    return torch._convert_weight_to_int4pack_for_cpu(codes_NK.to(torch.int32), 1), lines.bfloat16().contiguous()


def tiled_product(x_MK: Tensor, G: int, tiles: Tensor, lines_GN2: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x_MK.contiguous(), tiles, x_MK.shape[1] // G, lines_GN2)


@cache
def tiled_works(group: int) -> bool:
    """Whether this PyTorch has that product for groups of a size, and it gives what ours does."""
    generator = torch.Generator().manual_seed(0)
    for M, N, G in ((1, 16, 2), (3, 80, 1), (FEW_TILED, 64, 3)):
        x_MK = torch.randn(M, G * group, generator=generator).bfloat16()
        packed = torch.randint(0, 256, (N, G * group // 2), generator=generator, dtype=torch.uint8)
        scales_NG = torch.rand(N, G, generator=generator) + 0.5
        lows_NG = -15 * torch.rand(N, G, generator=generator)
        want_MN = int4_product(x_MK.float(), packed, scales_NG, lows_NG)
        try:
            found_MN = tiled_product(x_MK, G, *tiles_of(packed, scales_NG, lows_NG)).float()
        except (AttributeError, RuntimeError):
            return False
        if not (found_MN - want_MN).norm() <= 1e-2 * want_MN.norm():
            return False
    return True


def _blocks(codes: Tensor, n_columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of codes, some after the others, each with memory for them unpacked, [rows, K]. It is one piece of memory for
    all: fresh pages would cost more than the arithmetic."""
    step = min(len(codes), max(1, _BLOCK // n_columns))
    memory = torch.empty(step, n_columns, dtype=dtype, device=codes.device)
    for first in range(0, len(codes), step):
        rows = slice(first, min(first + step, len(codes)))
        yield rows, memory[: rows.stop - first]


def _packed_product(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x_MK.contiguous(), codes_NK.contiguous(), scales_N.to(x_MK.dtype))


def _whole_number_product(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    """In fp32: a row of x is two rows of digits to the base 254, and a product of int8 matrices sums exactly.

    A row is so known to 1 / 32,000 of its largest number, finer than bf16 knows it and 100 times finer than the weights.
    """
    M = len(x_MK)
    unit_M1 = x_MK.abs().amax(1, keepdim=True) / 127
    digits_MK = x_MK / unit_M1.where(unit_M1 > 0, 1.0)
    first_MK = digits_MK.round()
    second_MK = ((digits_MK - first_MK) * 254).round_()
    both = torch.cat((first_MK, second_MK)).to(torch.int8)
    sums = torch._int_mm(both, codes_NK.t())
    return (sums[:M] + sums[M:] / 254.0) * unit_M1 * scales_N


_FAST = {torch.bfloat16: _packed_product, torch.float32: _whole_number_product}
FEW_TILED = 16  # rows, up to which PyTorch's product in 4 bits is faster than ours
_FEW_ROWS = {torch.bfloat16: 4, torch.float32: 16}  # of input, up to which they are faster than the plain product


@cache
def _fast_works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the fast product, and it gives what the plain one does."""
    if dtype == torch.float32 and not torch.backends.mkldnn.is_available():
        return False  # it would be there, as a plain loop
    generator = torch.Generator().manual_seed(0)
    for M, N, K in ((1, 33, 64), (3, 70, 96), (4, 16, 32)):
        x_MK = torch.randn(M, K, generator=generator).to(dtype)
        codes_NK = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
        scales_N = torch.rand(N, generator=generator) + 0.5
        want_MN = F.linear(x_MK.float(), codes_NK * scales_N[:, None])
        try:
            found_MN = _FAST[dtype](x_MK, codes_NK, scales_N).float()
        except (AttributeError, RuntimeError):
            return False
        if not (found_MN - want_MN).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * want_MN.norm():
            return False
    return True
