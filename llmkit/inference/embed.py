"""Vectors of texts and of words, what lies near them, and analogies.

Shapes: N texts, B rows of a batch, T tokens, D width, V vocabulary, C candidates, W different words, Q queries, K nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.config import UserError
from llmkit.inference.batch import check_vocabulary, evaluating
from llmkit.model.gpt import GPT

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer

Pooling = Literal["mean", "last"]
Method = Literal["add", "mul"]
BATCH_TOKENS = 8192  # of one forward pass


# --- texts ----------------------------------------------------------------------------------------------------------


def encode_rows(tokenizer: Tokenizer, texts: Sequence[str], max_len: int) -> tuple[list[list[int]], int]:
    """Ids of each text after the tokenizer's bos, as in training, cut to max_len; and how many were cut.

    Raises UserError for a text without tokens.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows = [bos + tokenizer.encode(text) for text in texts]
    for i, row in enumerate(rows):
        if len(row) == len(bos):
            raise UserError(f"text {i + 1} is empty: leave it out")
    return [row[:max_len] for row in rows], sum(len(row) > max_len for row in rows)


def batches_of(rows: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of rows of about one length, longest first, so that little is padding; each about batch_tokens with it."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def layer_of(model: GPT, layer: int | None) -> int:
    """A layer's number: 0 the embeddings, n_layers after the last block and the final norm (the default); -1 is that too.

    Raises UserError if there is none of that number.
    """
    L = model.config.n_layers
    if layer is None:
        return L
    if not -L - 1 <= layer <= L:
        raise UserError(f"layer {layer}: the model has 0 (embeddings) to {L} (after the last block)")
    return layer if layer >= 0 else L + 1 + layer


def hidden_states(model: GPT, rows: Sequence[Sequence[int]], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass over rows of any length.

    Returns:
        The states of a layer [B, T, D], the ids [B, T], and which positions are tokens [B, T]: rows stand at the left.
    """
    device, T = model.head_weight.device, max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    real_BT = torch.arange(T, device=device) < lengths_B[:, None]
    # Looking backwards only, no token sees the padding after it.
    mask = None if model.config.causal else real_BT[:, None, None, :]
    kept: list[Tensor] = []
    handles = []
    if layer < model.config.n_layers:
        block = model.model.layers[layer]
        handles.append(block.register_forward_pre_hook(lambda _, args: kept.append(args[0])))
    try:
        last_BTD = model.forward(ids_BT, mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return (kept[0] if kept else last_BTD), ids_BT, real_BT


def text_vectors(
    model: GPT,
    rows: Sequence[Sequence[int]],
    *,
    n_skip: int = 0,
    pooling: Pooling = "mean",
    layer: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Unit vectors of texts, fp32 [N, D] on the CPU; a text's does not depend on the others.

    Args:
        model: causal or bidirectional.
        rows: ids as from `encode_rows`.
        n_skip: tokens at the beginning (the bos) that are read but don't count in the mean.
        pooling: the mean over a text's tokens, or the last one's state (of a causal model, the one that saw them all).
        layer: see `layer_of`.
        batch_tokens: most tokens of a forward pass, padding included.
        on_batch: called with the number of texts done since the last call.
    """
    at = layer_of(model, layer)
    vectors_ND = torch.empty(len(rows), model.config.d_model)
    with evaluating(model), torch.inference_mode():
        for batch in batches_of(rows, batch_tokens):
            states_BTD, _, real_BT = hidden_states(model, [rows[i] for i in batch], at)
            lengths_B = real_BT.sum(1)
            if pooling == "last":
                pooled_BD = states_BTD[torch.arange(len(batch), device=real_BT.device), lengths_B - 1].float()
            else:
                counted_BT = real_BT.clone()
                counted_BT[:, :n_skip] = False
                total_BD = (states_BTD.float() * counted_BT[:, :, None]).sum(1)
                pooled_BD = total_BD / (lengths_B - n_skip)[:, None]
            vectors_ND[batch] = F.normalize(pooled_BD, dim=-1).cpu()
            if on_batch is not None:
                on_batch(len(batch))
    return vectors_ND


def nearest(queries_QD: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest products of each query with the rows of all blocks: (products, row numbers), each [Q, K], best first.

    Memory grows with one block and k, never with the number of rows.
    """
    best = torch.empty(len(queries_QD), 0)
    places = torch.empty(len(queries_QD), 0, dtype=torch.long)
    n = 0
    for block_BD in blocks:
        products_QB = queries_QD @ block_BD.T
        own_QB = torch.arange(n, n + len(block_BD)).expand_as(products_QB)
        products, rows = torch.cat((best, products_QB), 1), torch.cat((places, own_QB), 1)
        best, index = products.topk(min(k, products.shape[1]), dim=1)
        places = rows.gather(1, index)
        n += len(block_BD)
    return best, places


# --- words ----------------------------------------------------------------------------------------------------------


def token_vectors(model: GPT, which: Literal["input", "output"], vocab_size: int) -> Tensor:
    """The embedding that a token is read by, or the one that it is predicted by, fp32 [V, D] on the CPU."""
    check_vocabulary(model, vocab_size)
    weight = model.model.embed_tokens.weight if which == "input" else model.head_weight
    return weight[:vocab_size].detach().float().cpu()


def context_vectors(
    model: GPT,
    rows: Iterable[Sequence[int]],
    vocab_size: int,
    *,
    layer: int | None = None,
    window: int = 1,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Each token's mean state over all the places where the rows hold it (Bommasani et al. 2020, ACL, "Interpreting
    Pretrained Contextualized Representations via Reductions to Static Embeddings").

    Args:
        model: causal or bidirectional.
        rows: ids as from `encode_rows`.
        vocab_size: the tokenizer's.
        layer: see `layer_of`.
        window: of a place, the token's own state and those of window - 1 tokens after it are averaged.
        batch_tokens: most tokens of a forward pass, padding included.
        on_batch: called with the number of rows done since the last call.

    Returns:
        fp32 [V, D] on the CPU, zero where a token never occurs; and how often each does [V].
    """
    check_vocabulary(model, vocab_size)
    at, rows = layer_of(model, layer), list(rows)
    device = model.head_weight.device
    sums_VD = torch.zeros(vocab_size, model.config.d_model, device=device)
    counts_V = torch.zeros(vocab_size, dtype=torch.long, device=device)
    with evaluating(model), torch.inference_mode():
        for batch in batches_of(rows, batch_tokens):
            states_BTD, ids_BT, real_BT = hidden_states(model, [rows[i] for i in batch], at)
            sums_VD.index_add_(0, ids_BT[real_BT], _mean_ahead(states_BTD.float(), real_BT, window)[real_BT])
            counts_V += ids_BT[real_BT].bincount(minlength=vocab_size)
            if on_batch is not None:
                on_batch(len(batch))
    return (sums_VD / counts_V.clamp(min=1)[:, None]).cpu(), counts_V.cpu()


def _mean_ahead(x_BTD: Tensor, real_BT: Tensor, window: int) -> Tensor:
    """At every position the mean over it and the window - 1 after it, as far as they are tokens [B, T, D]."""
    if window == 1:
        return x_BTD
    real_BT1 = real_BT[:, :, None].to(x_BTD.dtype)
    both_BTD = torch.cat((x_BTD * real_BT1, real_BT1), dim=-1)
    before_BTD = F.pad(both_BTD.cumsum(1), (0, 0, 1, 0))  # sums over what comes before a position
    first_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    sums_BTD = before_BTD[:, (first_T + window).clamp(max=len(first_T))] - before_BTD[:, first_T]
    return sums_BTD[..., :-1] / sums_BTD[..., -1:].clamp(min=1)


@dataclass(frozen=True)
class Found:
    """A word near to what was asked for."""

    word: str
    score: float


class Words:
    """A vector for every word, and what is near: by cosine, over all tokens that are text.

    A word is a token without the blanks around it, in lower case: " Queen", "queen" and " queen" are one word with three
    vectors, of which the nearest counts. A word that is several tokens is the mean of theirs, normalised.
    """

    def __init__(self, vectors_VD: Tensor, tokenizer: Tokenizer, extra: Iterable[str] = (), centre: bool = False):
        """Sets up the candidates.

        Args:
            vectors_VD: one row a token. Tokens with a zero row are no candidates.
            tokenizer: whose tokens they are. Control tokens, pieces of characters and blanks are no candidates either.
            extra: words that may be found although they are several tokens.
            centre: subtract the candidates' mean vector first (Mu & Viswanath 2018, arXiv 1702.01417, first step).
        """
        names = [_text_of(i, tokenizer) for i in range(tokenizer.vocab_size)]
        ids = [i for i, name in enumerate(names) if name and bool(vectors_VD[i].any())]
        if not ids:
            raise UserError("no token of this tokenizer is a text with a vector: there is nothing to compare")
        self._vectors_VD = vectors_VD - vectors_VD[ids].mean(0) if centre else vectors_VD
        self._known = frozenset(ids)
        self._tokenizer = tokenizer
        self.n_tokens = len(ids)
        more = [w for w in dict.fromkeys(_fold(word) for word in extra) if len(self.pieces(w)) > 1]
        of_place = [*(names[i] for i in ids), *more]
        self.names = list(dict.fromkeys(of_place))
        self._number = {name: i for i, name in enumerate(self.names)}
        self._word_C = torch.tensor([self._number[name] for name in of_place])
        self.units_CD = torch.cat([F.normalize(self._vectors_VD[ids], dim=-1), *(self.vector(w)[None] for w in more)])

    def pieces(self, word: str) -> list[int]:
        """The tokens of a word: with or without a blank before it, whichever are fewer; with it if they are equally many.

        Raises UserError if a token has no vector (it never occurs in the text of `context_vectors`).
        """
        forms = [self._tokenizer.encode(form) for form in (" " + word, word)]
        forms = [ids for ids in forms if ids and self._known.issuperset(ids)]
        if not forms or not word.strip():
            raise UserError(
                f"the word {word!r} has no vector: it is blank, or holds tokens that aren't whole characters"
            )
        return min(forms, key=len)

    def vector(self, word: str) -> Tensor:
        """The word's unit vector [D]."""
        return F.normalize(F.normalize(self._vectors_VD[self.pieces(word)], dim=-1).mean(0), dim=0)

    def analogy(self, a: str, b: str, c: str, k: int, method: Method = "add") -> list[Found]:
        """The k best d in "a is to b as c is to d", none of which is a, b or c.

        add: cos(d, b) - cos(d, a) + cos(d, c); mul: cos(d, b) cos(d, c) / (cos(d, a) + 0.001), with cosines moved to
        0..1 (Levy & Goldberg 2014, "Linguistic Regularities in Sparse and Explicit Word Representations").
        """
        return self._best(self._analogy(a, b, c, method), k)

    def rank(self, a: str, b: str, c: str, d: str, method: Method = "add") -> int | None:
        """The place of d among the answers to "a is to b as c is to what?", from 1; None if it is no candidate."""
        scores_W = self._analogy(a, b, c, method)
        own = scores_W[self._number[_fold(d)]].item() if _fold(d) in self._number else float("-inf")
        return None if own == float("-inf") else 1 + int((scores_W > own).sum())

    def similar(self, word: str, k: int) -> list[Found]:
        """The k nearest words by cosine."""
        return self._best(self._per_word(self.units_CD @ self.vector(word), word), k)

    def _analogy(self, a: str, b: str, c: str, method: Method) -> Tensor:
        cos_CA, cos_CB, cos_CC = (self.units_CD @ self.vector(word) for word in (a, b, c))
        if method == "add":
            scores_C = cos_CB - cos_CA + cos_CC
        else:
            scores_C = (cos_CB + 1) / 2 * (cos_CC + 1) / 2 / ((cos_CA + 1) / 2 + 0.001)
        return self._per_word(scores_C, a, b, c)

    def _per_word(self, scores_C: Tensor, *without: str) -> Tensor:
        """The best score of each word's candidates; -inf for the words that were asked with."""
        worst = torch.full((len(self.names),), float("-inf"))
        scores_W = worst.scatter_reduce(0, self._word_C, scores_C, "amax")
        asked = [self._number[word] for word in map(_fold, without) if word in self._number]
        return scores_W.index_fill(0, torch.tensor(asked, dtype=torch.long), float("-inf"))

    def _best(self, scores_W: Tensor, k: int) -> list[Found]:
        best = scores_W.topk(min(k, int((scores_W > float("-inf")).sum())))
        return [Found(self.names[i], x) for x, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def _fold(word: str) -> str:
    return word.strip().casefold()


def _text_of(token: int, tokenizer: Tokenizer) -> str:
    """The word that a token is; empty for control tokens, blanks and pieces of characters."""
    if token in tokenizer.special_ids:
        return ""
    try:
        return _fold(tokenizer.token_bytes(token).decode("utf-8"))
    except UnicodeDecodeError:
        return ""
