"""Keys and values in blocks, and how one forward pass sees them.

Shapes: B rows, T tokens of this pass, S columns, L layers, K key/value heads, E head width, N places (a token's keys
and values in every layer; a block has `block_tokens` of them), M blocks of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkit.inference.packed import Network
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import KVCache, window_of


class BlockTable:
    """The blocks of every line; a line belongs to one running request."""

    def __init__(self, n_lines: int, n_columns: int, block_tokens: int, device: torch.device):
        self.n_lines, self.block_tokens = n_lines, block_tokens
        self._blocks_RM = torch.zeros(n_lines, n_columns, dtype=torch.long, device=device)

    def set(self, line: int, blocks: Sequence[int]) -> None:
        """Gives a line its blocks, in the text's order."""
        self._blocks_RM[line, : len(blocks)] = torch.tensor(blocks, device=self._blocks_RM.device)

    def places(self, lines_B: Tensor, positions_BS: Tensor) -> Tensor:
        """Where the keys and values of positions are, [B, S]; before a text's beginning: place 0, which holds zeros."""
        at_BS = positions_BS.clamp(min=0)
        blocks_BS = self._blocks_RM[lines_B].gather(1, at_BS // self.block_tokens)
        places_BS = blocks_BS * self.block_tokens + at_BS % self.block_tokens
        return places_BS.where(positions_BS >= 0, 0)


class PagedStore:
    """The keys and values of one model, for all texts together. The places of block 0 stay zero."""

    def __init__(self, config: GPTConfig, n_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, (n_blocks + 1) * block_tokens, config.kv_heads, config.width_of_head)
        self.k_LNKE = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LNKE = torch.zeros(shape, dtype=dtype, device=device)
        self.windows = [window_of(config, layer) for layer in range(config.n_layers)]


class Chunks:
    """The next tokens of several texts as one grid, in which all texts end in the same column.

    So the distance of two columns is the distance of their positions, on which a sliding window relies. Every token
    has the position that it has alone and sees only its own text.
    """

    def __init__(
        self,
        table: BlockTable,
        lines: Sequence[int],
        tokens: Sequence[Sequence[int]],
        before: Sequence[int],
        device: torch.device,
    ):
        """Takes each text's line, its next tokens, and how many tokens stand before them."""
        counts, ends = [len(t) for t in tokens], [n + len(t) for n, t in zip(before, tokens, strict=True)]
        self.T, self.S = max(counts), max(ends)
        self.lines_B = torch.tensor(lines, device=device)
        self.ids_BT = torch.tensor([[0] * (self.T - len(t)) + list(t) for t in tokens], device=device)
        starts_B1 = self.S - torch.tensor(ends, device=device)[:, None]
        columns_S = torch.arange(self.S, device=device)
        positions_BS = columns_S - starts_B1
        self.places_BS = table.places(self.lines_B, positions_BS)
        self.positions_BT = positions_BS[:, self.S - self.T :].clamp(min=0)
        self.new_N: Tensor | None = None
        """Which of the B * T tokens are no padding; None: all."""
        if min(counts) < self.T:
            kept = [b * self.T + t for b, n in enumerate(counts) for t in range(self.T - n, self.T)]
            self.new_N = torch.tensor(kept, device=device)
        self.mask: Tensor | None = None
        if min(counts) < self.T or min(ends) < self.S:
            seen_BTS = (columns_S >= starts_B1)[:, None]
            if self.T > 1:
                own_T1 = columns_S[self.S - self.T :, None]
                # Padding sees itself: a softmax over nothing would be NaN.
                seen_BTS = (seen_BTS & (columns_S <= own_T1)) | (columns_S == own_T1)
            self.mask = seen_BTS[:, None]

    def forward(self, network: Network, store: PagedStore) -> Tensor:
        """Hidden states [B, T, D]; the keys and values of the new tokens are kept."""
        return network.forward(self.ids_BT, self.positions_BT, self.mask, PagedCache(store, self))


class PagedCache(KVCache):
    """What a model sees of the store in one forward pass."""

    def __init__(self, store: PagedStore, chunks: Chunks):
        self._store, self._chunks = store, chunks
        self.length, self.max_len = chunks.S - chunks.T, chunks.S
        self.windows = store.windows

    def reserve(self, T: int) -> None:
        """Nothing to do: the blocks are there."""

    def whole(self, layer: int) -> None:
        """Blocks lie apart."""

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new columns of one layer and returns its filled ones, from the first that any of the T may see."""
        window = self.windows[layer]
        first = 0 if window is None else max(0, self.length + 1 - window)
        places_BS = self._chunks.places_BS[:, first:]
        written_N = self._chunks.places_BS[:, self.length :].flatten()
        new_N = self._chunks.new_N
        if new_N is not None:
            written_N = written_N[new_N]
        found = []
        for store_NKE, x_BKTE in ((self._store.k_LNKE[layer], k_BKTE), (self._store.v_LNKE[layer], v_BKTE)):
            x_NKE = x_BKTE.transpose(1, 2).flatten(0, 1)
            store_NKE.index_copy_(0, written_N, x_NKE if new_N is None else x_NKE[new_N])
            x_BSKE = store_NKE.index_select(0, places_BS.flatten()).unflatten(0, places_BS.shape)
            found.append(x_BSKE.transpose(1, 2))
        return found[0], found[1]

    def select(self, rows: Tensor) -> None:
        raise AssertionError("the rows of a pass are those it was made for")
