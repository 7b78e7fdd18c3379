"""The terms of a recipe, bound to a student and its teacher: what a batch costs the student.

Every term is a sum over the positions that are trained; the engine divides by their number. Queries and hidden states are
taken at those positions, whatever else of the row they look at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.data.loader import Batch
from llmkit.distill.alignment import AlignedBatch
from llmkit.distill.cache import TeacherBatch
from llmkit.distill.config import AttentionConfig, HiddenConfig, RelationConfig, SoftConfig, TermConfig, UldConfig
from llmkit.distill.layers import Taps, layer_pairs, projection_name, projections_of
from llmkit.distill.teaching import attention_mask
from llmkit.losses import IGNORE, LossSum
from llmkit.losses.distillation import DenseTeacher, SoftTerm, TopKTeacher, distillation_loss, rows_at_once, uld_loss
from llmkit.losses.features import attention_loss, hidden_loss, relation_loss
from llmkit.model.config import GPTConfig
from llmkit.model.context import RowPart
from llmkit.model.gpt import GPT, causal_mask
from llmkit.model.heads import Distilled
from llmkit.stages.recipes import DistillRecipe
from llmkit.training.engine import LossFn
from llmkit.training.supervised import with_balance

Pairs = list[tuple[int, int]]
FeatureConfig = HiddenConfig | AttentionConfig | RelationConfig


def student_of(module: nn.Module) -> GPT:
    """The student in what is trained."""
    student = module.student if isinstance(module, Distilled) else module
    assert isinstance(student, GPT)
    return student


class Terms:
    """What the recipe's losses make of a batch."""

    def __init__(
        self,
        recipe: DistillRecipe,
        student: GPTConfig,
        teacher_config: GPTConfig,
        vocab_size: int,
        teacher_vocab_size: int,
    ):
        """Checks that the terms fit the two shapes.

        Args:
            vocab_size: of the student's tokenizer.
            teacher_vocab_size: of the teacher's, where that is another.

        Raises:
            UserError: a layer is not there, or attention scores can't be compared.
        """
        self.recipe, self.vocab_size, self.teacher_vocab_size = recipe, vocab_size, teacher_vocab_size
        self.student_config, self.teacher_config = student, teacher_config
        self.teacher: GPT | None = None
        """To be set before the first batch, unless a cache speaks for it."""
        features = [t for t in recipe.losses if isinstance(t, FeatureConfig)]
        self.pairs: dict[str, Pairs] = {
            t.label: layer_pairs(t.layers, student.n_layers, teacher_config.n_layers, t.label) for t in features
        }
        for term in features:
            self._check(term)

    def _check(self, term: FeatureConfig) -> None:
        student, teacher = self.student_config, self.teacher_config
        if isinstance(term, AttentionConfig) and student.n_heads != teacher.n_heads:
            raise UserError(
                f"losses: {term.label}: the student has {student.n_heads} heads, the teacher {teacher.n_heads}: their scores "
                "can't be compared one by one: take kind: relation"
            )
        if isinstance(term, RelationConfig):
            heads = term.heads or student.n_heads
            for whose, config in (("student", student), ("teacher", teacher)):
                widths = {"queries": config.n_heads, "keys": config.kv_heads, "values": config.kv_heads}
                for of in term.of:
                    if (widths[of] * config.width_of_head) % heads:
                        raise UserError(
                            f"losses: {term.label}: {heads} heads do not divide the {whose}'s {of} of "
                            f"{widths[of] * config.width_of_head}: set heads to a number that divides both"
                        )

    def projections(self, seed: int) -> nn.ModuleDict:
        """Between hidden states of unequal widths; empty where none are compared."""
        hidden = {t.label: self.pairs[t.label] for t in self.recipe.losses if isinstance(t, HiddenConfig)}
        return projections_of(hidden, self.student_config, self.teacher_config, seed)

    # --- what a batch costs ------------------------------------------------------------------------------------------

    def loss_fn(self, terms: Collection[TermConfig], ce_weight: float, accuracy: bool = False) -> LossFn:
        """The weighted sum of some terms and of cross entropy.

        Parts: `loss`, `ce` and each term's label, the last two before their weights.
        """
        soft = [_soft_term(t) for t in terms if isinstance(t, SoftConfig)]
        uld = [t for t in terms if isinstance(t, UldConfig)]
        features = [t for t in terms if isinstance(t, FeatureConfig)]
        told_weight = ce_weight or (
            1.0 if accuracy else 0.0
        )  # evaluations tell it also where nothing is learnt from it

        def loss(module: nn.Module, batch: Batch) -> LossSum:
            student, recipe = student_of(module), self.recipe
            mask = batch.part or attention_mask(batch.docs_BT, batch.one_document)
            with self._taps(student, features, 0) as mine:
                hidden_BTD = student(batch.ids_BT, batch.positions_BT, mask)
            taught: DenseTeacher | TopKTeacher | None = None
            theirs: Taps | None = None
            if isinstance(batch, TeacherBatch):
                taught = TopKTeacher(batch.top_ids_NK, batch.top_logprobs_NK, batch.tail_N)
            elif soft or features:
                assert self.teacher is not None
                with torch.no_grad(), self._taps(self.teacher, features, 1) as theirs:
                    states_BTD = self.teacher.forward(batch.ids_BT, batch.positions_BT, mask)
                taught = DenseTeacher(states_BTD, self.teacher.head_weight)
            out = distillation_loss(
                hidden_BTD,
                student.head_weight,
                batch.labels_BT,
                taught,
                soft,
                ce_weight=told_weight,
                temperature=recipe.temperature,
                vocab_size=self.vocab_size,
                chunk=min(recipe.loss_chunk, rows_at_once(hidden_BTD.device, self.vocab_size)),
                z_loss=recipe.z_loss,
                accuracy=accuracy,
            )
            extra = {t.label: (t.weight, self._uld(student, hidden_BTD, batch)) for t in uld}
            if features:
                assert theirs is not None
                seen = None if isinstance(mask, RowPart) else _visible(batch, mask)
                extra |= {t.label: (t.weight, self._feature(t, module, mine, theirs, batch, seen)) for t in features}
            total, parts = out.total, dict(out.parts)
            if told_weight != ce_weight:
                total = total - parts["ce"].to(total.dtype)
            for label, (weight, value) in extra.items():
                total, parts[label] = total + weight * value.to(total.dtype), value.detach()
            whole = LossSum(total, {**parts, "loss": total.detach()}, out.stats)
            return with_balance(whole, student, batch.labels_BT)

        return loss

    def _taps(self, model: GPT, features: Sequence[FeatureConfig], side: int) -> Taps:
        """Keeps what the features need of one side's layers."""
        hidden = {pair[side] for t in features if isinstance(t, HiddenConfig) for pair in self.pairs[t.label]}
        inside = {pair[side] for t in features if not isinstance(t, HiddenConfig) for pair in self.pairs[t.label]}
        return Taps(model, hidden=hidden, attention=inside)

    def _feature(
        self, term: FeatureConfig, module: nn.Module, mine: Taps, theirs: Taps, batch: Batch, seen: Tensor | None
    ) -> Tensor:
        """Sum over positions of a feature's distance, the mean over its pairs of layers."""
        queries_BT = batch.labels_BT != IGNORE
        pairs = self.pairs[term.label]
        if isinstance(term, HiddenConfig):
            weights = dict(module.projections.named_parameters()) if isinstance(module, Distilled) else {}
            found = []
            for s, t in pairs:
                weight = weights.get(f"{projection_name(term.label, s, t)}.weight")
                found.append(
                    hidden_loss(mine.hidden[s][queries_BT], theirs.hidden[t][queries_BT], weight, term.measure)
                )
            return torch.stack(found).sum() / len(pairs)
        assert seen is not None, "refused by the recipe"
        if isinstance(term, AttentionConfig):
            found = [
                attention_loss(mine.queries[s], mine.keys[s], theirs.queries[t], theirs.keys[t], seen, queries_BT)
                for s, t in pairs
            ]
        else:
            heads = term.heads or self.student_config.n_heads
            found = [
                relation_loss(_flat(getattr(mine, of)[s]), _flat(getattr(theirs, of)[t]), heads, seen, queries_BT)
                / len(term.of)
                for s, t in pairs
                for of in term.of
            ]
        return torch.stack(found).sum() / len(pairs)

    def _uld(self, student: GPT, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """The distance of sorted distributions at the places where both tokenisations end."""
        assert isinstance(batch, AlignedBatch) and self.teacher is not None
        with torch.no_grad():
            mask = attention_mask(batch.teacher_docs_UT, batch.one_document)
            theirs = self.teacher.forward(batch.teacher_ids_UT, batch.teacher_positions_UT, mask)
        return uld_loss(
            hidden_BTD.flatten(0, 1)[batch.student_at_M],
            student.head_weight,
            theirs.flatten(0, 1)[batch.teacher_at_M],
            self.teacher.head_weight,
            vocab_size=self.vocab_size,
            teacher_vocab_size=self.teacher_vocab_size,
            chunk=min(
                self.recipe.loss_chunk, rows_at_once(hidden_BTD.device, max(self.vocab_size, self.teacher_vocab_size))
            ),
        ).total


def _soft_term(config: SoftConfig) -> SoftTerm:
    return SoftTerm(config.label, config.weight, config.divergence, config.beta)


def _flat(x_BHTE: Tensor) -> Tensor:
    """[B, T, H * E]."""
    return x_BHTE.transpose(1, 2).flatten(2)


def _visible(batch: Batch, mask: Tensor | None) -> Tensor:
    """Which positions each may look at, [B or 1, 1, T, T]: padding comes last, so no trained position sees any."""
    return causal_mask(0, batch.ids_BT.shape[1], batch.ids_BT.device) if mask is None else mask


Said = Callable[[str], Any]


def described(recipe: DistillRecipe, pairs: dict[str, Pairs]) -> list[str]:
    """The loss in words, as it is printed at a run's start."""
    terms = [f"{recipe.ce_weight:g} x ce"] if recipe.ce_weight else []
    for term in recipe.losses:
        layers = ", ".join(f"{s} from {t}" for s, t in pairs.get(term.label, ()))
        terms.append(f"{term.weight:g} x {term.label}" + (f" (layers {layers})" if layers else ""))
    soft = f"; temperature {recipe.temperature:g}" if recipe.soft and recipe.temperature != 1 else ""
    return [f"loss       {' + '.join(terms)}{soft}"]
