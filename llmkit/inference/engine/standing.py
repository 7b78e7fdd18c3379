"""Rows that write in step, with their keys and values once more in one piece.

Gathering every block at every token costs about as much as a third of all the rest; rows that go on together from one
token to the next need it only when another joins them.

Shapes: B rows, S columns, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkit.inference.engine.paged import BlockTable, PagedStore
from llmkit.inference.engine.scheduler import Row
from llmkit.inference.packed import Network
from llmkit.model.gpt import KVCache

_ROOM = 64  # columns to go on in before the rows are gathered again


class Standing(KVCache):
    """The rows that wrote in the last step. All end in the same column, as in `paged.Chunks`."""

    def __init__(self, store: PagedStore, table: BlockTable, rows: Sequence[Row], n_columns: int):
        counts = [row.n_computed for row in rows]
        device, self.length, self.max_len = store.k_LNKE.device, max(counts), n_columns
        self.rows, self.windows = list(rows), store.windows
        self._store, self._table = store, table
        self._lines_B = torch.tensor([row.line for row in rows], device=device)
        self._starts_B = self.length - torch.tensor(counts, device=device)
        self._columns_S = torch.arange(n_columns, device=device)
        self._places_B = self._lines_B
        places_BS = table.places(self._lines_B, self._columns_S[: self.length] - self._starts_B[:, None])
        self.k_LBKSE, self.v_LBKSE = (self._gathered(x, places_BS) for x in (store.k_LNKE, store.v_LNKE))
        self._see()

    @staticmethod
    def n_columns_for(rows: Sequence[Row], max_seq_len: int) -> int:
        """Columns of one piece for these rows, with room to go on."""
        return min(max(row.n_computed for row in rows) + _ROOM, max_seq_len)

    def follow(self, rows: Sequence[Row]) -> bool:
        """Makes these its rows, in an order of its own, if they were among them before; False if that is not so.

        False too if it is full, or if most of its columns have become empty.
        """
        wanted = set(rows)
        going = [row in wanted for row in self.rows]
        longest = max(row.n_computed for row in rows)
        if sum(going) < len(rows) or self.length == self.max_len or 2 * longest + _ROOM < self.length:
            return False
        if not all(going):  # gaps are filled from the end, which copies least
            spare = [i for i in range(len(rows), len(going)) if going[i]]
            kept = [i if going[i] else spare.pop() for i in range(len(rows))]
            self.rows = [self.rows[i] for i in kept]
            kept_B = torch.tensor(kept, device=self._lines_B.device)
            self.select(kept_B)
            self._lines_B, self._starts_B = self._lines_B[kept_B], self._starts_B[kept_B]
            self._see()
        return True

    def forward(self, network: Network) -> Tensor:
        """Hidden states [B, 1, D] of every row's last token, whose keys and values are kept, in the store too."""
        device = self._lines_B.device
        ids_B1 = torch.tensor([row.tokens[-1:] for row in self.rows], device=device)
        positions_B1 = self.length - self._starts_B[:, None]
        self._places_B = self._table.places(self._lines_B, positions_B1)[:, 0]
        mask = None if self._seen_B11S is None else self._seen_B11S[..., : self.length + 1]
        return network.forward(ids_B1, positions_B1, mask, self)

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one new column of one layer and returns its filled ones, from the first that it may see."""
        for store_NKE, x_BKTE in ((self._store.k_LNKE[layer], k_BKTE), (self._store.v_LNKE[layer], v_BKTE)):
            store_NKE.index_copy_(0, self._places_B, x_BKTE[:, :, 0])
        return super().append(layer, k_BKTE, v_BKTE)

    def _see(self) -> None:
        """Which columns each row may see [B, 1, 1, S]; None if it is all of them."""
        ragged = len({row.n_computed for row in self.rows}) > 1 or self.rows[0].n_computed < self.length
        self._seen_B11S = (self._columns_S >= self._starts_B[:, None])[:, None, None] if ragged else None

    def _gathered(self, store_LNKE: Tensor, places_BS: Tensor) -> Tensor:
        L, _, K, E = store_LNKE.shape
        B, S = places_BS.shape
        x_LBKSE = store_LNKE.new_zeros(L, B, K, len(self._columns_S), E)
        for layer in range(L):
            x_BSKE = store_LNKE[layer].index_select(0, places_BS.flatten()).view(B, S, K, E)
            x_LBKSE[layer, :, :, :S] = x_BSKE.transpose(1, 2)
        return x_LBKSE
