"""What preference data costs a model: the losses of its batches, what they are before the first step, what is told of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from llmkit.data.feedback import FeedbackBatch
from llmkit.data.preferences import PreferenceBatch
from llmkit.inference.logprobs import answer_logprobs, shared_logprobs
from llmkit.losses import LossSum
from llmkit.losses.preference import kto_loss, preference_loss
from llmkit.model.gpt import GPT
from llmkit.stages.recipes import DPORecipe
from llmkit.training.engine import Metrics


def pair_loss(recipe: DPORecipe) -> Callable[[nn.Module, PreferenceBatch], LossSum]:
    """The recipe's loss of the pairs of a batch; better and worse answers go through the model together."""

    def loss(module: nn.Module, batch: PreferenceBatch) -> LossSum:
        assert isinstance(module, GPT)
        if batch.shared is None:
            logps_B = answer_logprobs(module, batch.ids_BT, batch.lengths_B, batch.prompt_lengths_B)
        else:
            logps_B = shared_logprobs(module, batch.shared, len(batch.lengths_B))
        return _pairs(recipe, logps_B, batch)

    return loss


def _pairs(recipe: DPORecipe, logps_B: Tensor, batch: PreferenceBatch) -> LossSum:
    assert recipe.loss != "kto"
    return preference_loss(
        recipe.loss,
        logps_B,
        batch.lengths_B - batch.prompt_lengths_B,
        batch.extra_B,
        batch.better_P,
        batch.worse_P,
        batch.weights_P,
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
        gamma=recipe.gamma,
        ipo_mean=recipe.ipo_mean,
        nll_weight=recipe.nll_weight,
    )


def mismatch_sum(module: nn.Module, batch: FeedbackBatch) -> LossSum:
    """Sum of the log-ratios of prompts with answers to others: z0 is their mean over the step, if that is positive."""
    assert isinstance(module, GPT)
    other = batch.mismatched
    assert other.extra_B is not None
    logps_B = answer_logprobs(module, other.ids_BT, other.lengths_B, other.prompt_lengths_B)
    total = (batch.weights_B.to(logps_B.dtype) * (logps_B - other.extra_B.to(logps_B.dtype))).sum()
    return LossSum(total, {"w": total.detach()})


def feedback_loss(recipe: DPORecipe, z0: float) -> Callable[[nn.Module, FeedbackBatch], LossSum]:
    """KTO's loss of a batch, given the divergence on the whole step."""

    def loss(module: nn.Module, batch: FeedbackBatch) -> LossSum:
        assert isinstance(module, GPT)
        own = batch.matched
        assert own.extra_B is not None
        logps_B = answer_logprobs(module, own.ids_BT, own.lengths_B, own.prompt_lengths_B)
        out = kto_loss(
            logps_B - own.extra_B.to(logps_B.dtype),
            batch.is_good_B,
            batch.weights_B,
            z0,
            beta=recipe.beta,
            good_weight=recipe.good_weight,
            bad_weight=recipe.bad_weight,
        )
        n_B = (own.lengths_B - own.prompt_lengths_B).clamp(min=1)
        good_B = batch.weights_B * batch.is_good_B
        drift = (good_B.to(logps_B.dtype) * (logps_B.detach() - own.extra_B.to(logps_B.dtype)) / n_B).sum()
        return LossSum(out.total, out.parts, {**out.stats, "drift_good": drift})

    return loss


def loss_at_start(recipe: DPORecipe) -> float | None:
    """What a pair costs while policy and reference are the same model: ln 2 for DPO. None: it depends on the data."""
    if not recipe.needs_reference or recipe.reference is not None or recipe.loss == "kto":
        return None
    return {"hinge": 1.0, "ipo": 1 / (4 * recipe.beta**2)}.get(recipe.loss, math.log(2))


def feedback_figures(stats: dict[str, Tensor], z0: float) -> Metrics:
    """Means over good and over bad answers apart; what a step has none of is left out."""
    sums = {name: value.item() for name, value in stats.items()}
    n_good, n_bad = sums["n_good"], sums["n_bad"]
    figures: Metrics = {"kl": z0, "accuracy": (sums["right_good"] + sums["right_bad"]) / max(n_good + n_bad, 1.0)}
    if n_good:
        figures |= {"rewards/chosen": sums["rewards_good"] / n_good, "drift/chosen": sums["drift_good"] / n_good}
    if n_bad:
        figures["rewards/rejected"] = sums["rewards_bad"] / n_bad
    if n_good and n_bad:
        figures["rewards/margin"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    return figures
