"""The order of data as pure functions: a permutation that needs no memory, a mixture that needs no state.

Which row comes g-th in a run depends on the seed and g alone - not on ranks, workers, micro-batches or restarts - so
the position in the data is one integer, and resuming is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_SMALL = 256
_UNIT = 1 << 32  # a share of one in the integer arithmetic of Mixture


def epoch_key(seed: int, source: int, epoch: int) -> int:
    """The key of the permutation that orders one epoch of one source."""
    return int.from_bytes(blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=16).digest(), "little")


class Permutation:
    """A keyed bijection of [0, n), computed in O(1) time and memory for each index.

    A balanced Feistel network permutes the next larger power of four; indices that land outside [0, n) walk on until
    they land inside (cycle walking), fewer than four steps on average. A network of few bits reaches only some of the
    permutations, so up to 256 entries are sorted by a keyed hash instead.
    """

    def __init__(self, n: int, key: int):
        if not 0 < n <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2**62 entries (got {n})")
        self.n = n
        self._half = ((n - 1).bit_length() + 1) // 2
        seed = key.to_bytes(16, "little")
        self._keys = [
            int.from_bytes(blake2b(seed, digest_size=8, salt=bytes([r])).digest(), "little") for r in range(ROUNDS)
        ]
        self._table: NDArray[np.int64] | None = None
        if n <= _SMALL:
            x = np.arange(n, dtype=np.uint64)
            for round_key in self._keys[:2]:
                x = _mix(x ^ np.uint64(round_key))
            self._table = np.argsort(x, kind="stable").astype(np.int64)

    def __call__(self, index: int) -> int:
        """Where index goes. Raises IndexError outside [0, n)."""
        return int(self.many(np.array([index]))[0])

    def many(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The same for an array of indices."""
        x = np.asarray(indices).astype(np.uint64)  # a negative index becomes a huge one
        if x.size and int(x.max()) >= self.n:
            raise IndexError(f"an index is outside [0, {self.n})")
        if self._table is not None:
            return self._table[x]
        outside = np.arange(x.size)
        while outside.size:
            x[outside] = self._rounds(x[outside])
            outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)

    def _rounds(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = x >> half, x & mask
        for key in self._keys:
            left, right = right, left ^ ((_mix(right ^ np.uint64(key)) >> np.uint64(32)) & mask)
        return left << half | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_unit(cells: NDArray[np.int64], seed: int, draw: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each cell: a hash of (seed, draw, cell), evenly spread, with no state."""
    key = np.frombuffer(blake2b(f"{seed}/{draw}".encode(), digest_size=16).digest(), "<u8")
    bits = _mix(_mix(cells.astype(np.uint64) ^ key[0]) ^ key[1])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Mixture:
    """Interleaves endless streams by weight: the g-th sample of the mixture is (source, index within that source).

    The sources are the leaves of a binary tree. At a node whose left subtree has the share p, floor(k * p) of the
    first k samples go left, so the counts of a node's children are off by less than one, and those of a source among
    n samples by less than the depth of the tree, ceil(log2(sources)). Shares are kept in units of 2**-32, and all
    arithmetic is on integers: the same on every machine.
    """

    def __init__(self, weights: Sequence[float]):
        if not weights or not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights must be positive numbers, at least one (got {list(weights)})")
        self.n_sources = len(weights)
        self._weights = [Fraction(w) for w in weights]

    def _share(self, low: int, high: int) -> tuple[int, int]:
        """Splits sources [low, high) in two: the first source of the right half, and the left half's share."""
        middle = (low + high + 1) // 2
        share = sum(self._weights[low:middle]) / sum(self._weights[low:high])
        return middle, min(max(round(share * _UNIT), 1), _UNIT - 1)

    def __call__(self, g: int) -> tuple[int, int]:
        """The source of sample g, and its index within that source's own stream."""
        source, index = self.many(np.array([g]))
        return int(source[0]), int(index[0])

    def many(self, samples: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same for an array of sample numbers."""
        k = np.asarray(samples).astype(np.int64)
        if k.size and int(k.min()) < 0:
            raise IndexError(f"sample numbers begin at 0 (got {int(k.min())})")
        source, index = np.zeros_like(k), k.copy()
        stack = [(0, self.n_sources, np.arange(k.size))]
        while stack:
            low, high, here = stack.pop()
            if high - low == 1 or not here.size:
                source[here] = low
                continue
            middle, share = self._share(low, high)
            before = _left_count(index[here], share)
            left = _left_count(index[here] + 1, share) > before
            index[here] = np.where(left, before, index[here] - before)
            stack += [(low, middle, here[left]), (middle, high, here[~left])]
        return source, index

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples each source gives."""
        result = [0] * self.n_sources
        stack = [(0, self.n_sources, n)]
        while stack:
            low, high, k = stack.pop()
            if high - low == 1:
                result[low] = k
                continue
            middle, share = self._share(low, high)
            left = k * share // _UNIT
            stack += [(low, middle, left), (middle, high, k - left)]
        return result


def _left_count(k: NDArray[np.int64], share: int) -> NDArray[np.int64]:
    """floor(k * share / 2**32) without overflow for k up to 2**62."""
    high, low = k >> 32, (k & 0xFFFFFFFF).astype(np.uint64)
    return high * share + ((low * np.uint64(share)) >> np.uint64(32)).astype(np.int64)


class SampleOrder:
    """Which row each sample of a run is: the mixture says of which source, a permutation of its epoch which row.

    Args:
        n_rows: rows of one epoch of each source.
        weights: share of each source in the samples. Default: equal.
        seed: of the permutations.
    """

    def __init__(self, n_rows: Sequence[int], weights: Sequence[float] | None, seed: int):
        self.n_rows = list(n_rows)
        self.mixture = Mixture(weights or [1.0] * len(self.n_rows))
        # One epoch's permutation is made of a few hashes; those of the current epochs are kept.
        self._permutation: Callable[[int, int], Permutation] = lru_cache(64)(
            lambda source, epoch: Permutation(self.n_rows[source], epoch_key(seed, source, epoch))
        )

    def rows(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources, and rows within them, of samples of these numbers."""
        source, index = self.mixture.many(numbers)
        epoch, row = np.divmod(index, np.array(self.n_rows)[source])
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            here = (source == s) & (epoch == e)
            row[here] = self._permutation(s, e).many(row[here])
        return source, row
