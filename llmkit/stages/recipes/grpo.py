"""`stage: grpo`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llmkit.rollout.config import KLConfig, UpdateConfig
from llmkit.stages.recipes.policy import PolicyRecipe

# What an algorithm's name stands for; whatever a recipe says itself goes before it. Sources: docs/grpo.md.
_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
_NO_KL: dict[str, Any] = {"where": "none"}
_GROUPS: dict[str, Any] = {"samples_per_prompt": 8}  # whatever the algorithm
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {
        "advantage": "group_std",
        "aggregation": "sequence_mean",
        "surrogate": "clip",
        "update": _CLIP,
        "kl": {"where": "loss", "estimator": "k3", "coef": 0.04},
    },
    "dr_grpo": {
        "advantage": "group_mean",
        "aggregation": "constant",
        "surrogate": "clip",
        "update": _CLIP,
        "kl": _NO_KL,
    },
    "dapo": {
        "advantage": "group_std",
        "aggregation": "token_mean",
        "surrogate": "clip",
        "update": {"clip_low": 0.2, "clip_high": 0.28},
        "kl": _NO_KL,
        "dynamic_sampling": True,
    },
    "rloo": {
        "advantage": "leave_one_out",
        "aggregation": "sequence_sum",
        "surrogate": "reinforce",
        "kl": {"where": "reward", "coef": 0.05},
    },
    "reinforce++": {
        "advantage": "return",
        "aggregation": "token_mean",
        "surrogate": "clip",
        "update": _CLIP,
        "kl": {"where": "reward", "coef": 0.01},
    },
    "reinforce++-baseline": {
        "advantage": "baseline",
        "aggregation": "token_mean",
        "surrogate": "clip",
        "update": _CLIP,
        "kl": {"where": "loss", "estimator": "k2", "coef": 0.01},
    },
    "gspo": {
        "advantage": "group_std",
        "aggregation": "sequence_mean",
        "surrogate": "gspo",
        "update": {"clip_low": 3e-4, "clip_high": 4e-4},
        "kl": _NO_KL,
    },
    "cispo": {
        "advantage": "group_std",
        "aggregation": "token_mean",
        "surrogate": "cispo",
        "update": {"ratio_max": 5.0},
        "kl": _NO_KL,
    },
}


def _tuples(value: Any) -> Any:
    """A model validator that runs before turns JSON into Python data, where strict types know no list for a tuple."""
    if isinstance(value, dict):
        return {name: _tuples(v) for name, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class GRPOUpdateConfig(UpdateConfig):
    """What is done with one rollout, and the bounds of the surrogate. With one update a rollout (minibatches 1, epochs 1)
    every ratio is 1, and the bounds do nothing."""

    clip_low: float = Field(0.2, gt=0, le=1)
    """clip, gspo: the ratio counts no lower than 1 - this. Default: the algorithm's."""
    clip_high: float = Field(0.2, gt=0)
    """clip, gspo: the ratio counts no higher than 1 + this. Default: the algorithm's."""
    dual_clip: float | None = Field(None, gt=1)
    """clip: bounds the loss of a bad answer's token at this times its advantage (arXiv 1912.09729)."""
    ratio_max: float = Field(5.0, ge=1)
    """cispo: the ratio counts no higher than this itself (it is no distance from 1)."""
    entropy: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""


class GRPORecipe(PolicyRecipe):
    """A policy learns from its own answers without a critic: each is compared with the others to its prompt.

    An algorithm is a choice of advantage x aggregation x surrogate and of where the KL stands; its name fills in what the
    recipe leaves open, and rollout.samples_per_prompt is 8 unless it is given.
    """

    stage: Literal["grpo"]
    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "reinforce++-baseline", "gspo", "cispo"] = (
        "grpo"
    )
    """The preset: see docs/grpo.md for what each name stands for, and its paper."""
    advantage: Literal["group_std", "group_mean", "group_batch", "leave_one_out", "return", "baseline"] = "group_std"
    """What an answer is credited with. group_mean: its reward minus the mean of its group, the answers to one prompt;
    group_std, group_batch: that over the deviation of its group, or of all rewards; leave_one_out: its reward minus the
    mean of the others of its group; return: every token's reward to go, whitened over the rollout; baseline: the same of
    rewards minus their group's mean. Default: the algorithm's."""
    aggregation: Literal["token_mean", "sequence_mean", "constant", "sequence_sum"] = "sequence_mean"
    """How tokens are weighed. token_mean: all alike; sequence_mean: an answer counts once, however long; constant: a
    token by 1 / rollout.max_new_tokens; sequence_sum: an answer is the sum of its tokens. Default: the algorithm's."""
    surrogate: Literal["clip", "gspo", "cispo", "reinforce"] = "clip"
    """The loss of a token. clip: PPO's; gspo: the same with the ratio of the whole answer; cispo: bounded ratio times
    log-probability; reinforce: log-probability alone, for one epoch. Default: the algorithm's."""
    update: GRPOUpdateConfig = GRPOUpdateConfig()
    kl: KLConfig = KLConfig(where="loss", estimator="k3", coef=0.04)
    dynamic_sampling: bool = False
    """Groups in which all rewards are equal teach nothing: they are left out, and other prompts drawn in their place,
    up to rollout.max_refills times. Default: true for dapo."""
    equal_by: str | None = None
    """dynamic_sampling: looks at this part of the rewards alone, such as `exact`. Default: at their weighted sum."""
    drop_cut_off: bool = False
    """Answers that reached max_new_tokens count for their group's mean, but nothing is learnt from them (overlong
    filtering)."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: _tuples(value) for name, value in data.items()}
        name = data.get("algorithm", "grpo")
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            return data  # what is wrong is said of the field
        filled = {"rollout": {}, **preset, **data}
        for section, values in ({"rollout": _GROUPS} | preset).items():
            said = data.get(section, {})
            # A KL that stands elsewhere than the algorithm's has no use for the algorithm's estimator.
            if isinstance(values, dict) and isinstance(said, dict) and not (section == "kl" and "where" in said):
                filled[section] = {**values, **said}
        return filled

    @model_validator(mode="after")
    def _grpo_fits(self) -> GRPORecipe:
        in_groups = self.advantage != "return"
        if in_groups and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"advantage {self.advantage} compares the answers to a prompt: set rollout.samples_per_prompt to 2 or more "
                f"(got {self.rollout.samples_per_prompt}), or take advantage: return"
            )
        if self.dynamic_sampling and not in_groups:
            raise ValueError("dynamic_sampling looks for groups that differ, and advantage: return has none: drop it")
        if self.equal_by is not None:
            if not self.dynamic_sampling:
                raise ValueError("equal_by belongs to dynamic_sampling: set it, or drop equal_by")
            if self.equal_by not in (names := [r.label for r in self.rewards]):
                raise ValueError(f"equal_by: no part of the rewards is called '{self.equal_by}': {', '.join(names)}")
        if self.surrogate == "gspo" and self.aggregation != "sequence_mean":
            raise ValueError(
                f"surrogate gspo is the loss of an answer, spread over its tokens: aggregation {self.aggregation} would "
                "weigh long answers twice: take sequence_mean"
            )
        if self.surrogate == "reinforce" and self.update.epochs > 1:
            raise ValueError(
                f"surrogate reinforce has no ratio to correct for an older policy: set update.epochs to 1 (got "
                f"{self.update.epochs}), or take surrogate: clip"
            )
        return self
