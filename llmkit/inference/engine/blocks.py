"""Which block of the cache belongs to whom: pure bookkeeping, without a tensor."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def beginnings(ids: Sequence[int], block_tokens: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """One digest for every full block of a text, of all that stands up to its end.

    Equal digests mean equal ids from the very first on, so that the keys and values are equal too. Prompts come from
    strangers: the hash is one for which no two texts with the same digest can be made.

    Args:
        ids: the text's tokens.
        block_tokens: tokens of a block.
        known: digests of its first blocks, which are not computed again.
    """
    found = list(known)
    for start in range(len(found) * block_tokens, len(ids) - block_tokens + 1, block_tokens):
        before = found[-1] if found else b""
        content = array("q", ids[start : start + block_tokens]).tobytes()
        found.append(hashlib.blake2b(before + content, digest_size=32).digest())
    return found


class Blocks:
    """Hands out blocks 1 to n. Block 0 is nobody's: padding points at it.

    A block is free, held by one or more texts, or kept: held by none, but its content may serve a text that begins the
    same. Of those kept, the ones that were unused for longest give way first.
    """

    def __init__(self, n_blocks: int):
        self.n_blocks = n_blocks
        self._free = list(range(n_blocks, 0, -1))
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # in the order in which they give way
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def n_available(self) -> int:
        """Blocks that `take` could hand out."""
        return len(self._free) + len(self._kept)

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    @property
    def n_held(self) -> int:
        return len(self._holders)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a text."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def n_available_beside(self, shared: Sequence[int]) -> int:
        """Blocks that `take` could hand out once the given ones are held."""
        return self.n_available - sum(block in self._kept for block in shared)

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds a holder to blocks that `find` gave."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def take(self, n: int) -> list[int]:
        """n blocks for a new holder, whose content is nobody's any more."""
        assert n <= self.n_available, (n, self.n_available)
        taken: list[int] = []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, digest: bytes) -> None:
        """Says what a filled block holds. Where another block holds the same, that one goes on to serve."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one holder from each block of a text, which are given in the text's order."""
        for block in reversed(blocks):  # the end of a text gives way before its beginning, which more texts may share
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._digest_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def withdraw(self, blocks: Sequence[int]) -> None:
        """The given blocks, which are held, serve nobody new: what they hold is not to be trusted."""
        for block in blocks:
            if block in self._digest_of:
                del self._block_of[self._digest_of.pop(block)]

    def forget(self) -> None:
        """Nothing that was computed so far serves a new text."""
        self._block_of.clear()
        self._digest_of.clear()
        self._free.extend(self._kept)
        self._kept.clear()
