"""How answers are sampled from a policy, and how it is updated on them. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.config import Config

VLLM_MIN_TEMPERATURE = 0.01  # _MAX_TEMP in vllm/sampling_params.py: what is below is raised to it


class VllmConfig(Config):
    """vLLM beside the trainer: an engine of its own for every rank, on that rank's device."""

    memory_frac: float = Field(0.3, gt=0, le=1)
    """Share of the device's memory for its weights and cache (vLLM's gpu_memory_utilization; TRL's default beside a
    trainer). It must be free when vLLM starts."""
    sleep: bool = True
    """Gives that memory back between rollouts. On CUDA devices; elsewhere vLLM can't."""
    eager: bool = False
    """Starts faster, without compiled graphs, and writes slower (vLLM's enforce_eager)."""
    folder: str | None = None
    """Where weights are handed over; best in main memory. Default: /dev/shm where they fit, else the run's own folder."""


class RolloutConfig(Config):
    """What is sampled before each round of updates, over all ranks."""

    prompts_per_step: int = Field(16, ge=1, le=1 << 20)
    """Prompts of one rollout."""
    samples_per_prompt: int = Field(1, ge=1, le=1 << 16)
    """Answers to each."""
    max_new_tokens: int = Field(128, ge=1)
    """Length at which an answer is cut off."""
    engine: Literal["own", "vllm"] = "own"
    """What writes the answers: the policy itself, or vLLM with its weights (`pip install llmkit[vllm]`), which computes
    with other kernels and so needs `correction`."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM is run. Needs `engine: vllm`."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits when sampling and wherever log-probabilities are computed."""
    top_k: int = Field(0, ge=0)
    """Samples from the k likeliest tokens only; 0: all. Needs `correction`, for the policy is then not what is sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Samples from the likeliest tokens that hold this share of the probability. Needs `correction`."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drops tokens less probable than this share of the likeliest one. Needs `correction`."""
    correction: Literal["none", "token", "sequence", "product"] = "none"
    """Weighs the loss by policy / sampler. token: each token by its ratio, at most `correction_cap` (truncated importance
    sampling); product: by the ratio of its whole answer, at most the cap; sequence: leaves out answers whose mean ratio
    is above the cap or below its inverse."""
    correction_cap: float = Field(2.0, gt=1)
    """See correction."""
    max_prompt_len: int | None = Field(None, ge=1)
    """Longer prompts lose tokens at their beginning. Default: what max_new_tokens leaves of the context."""
    batch_size: int = Field(128, ge=1)
    """Answers that are written side by side on one rank."""
    max_refills: int = Field(4, ge=0)
    """How many more rounds of prompts may be drawn where a stage leaves out groups that teach nothing (dynamic sampling,
    DAPO, arXiv 2503.14476); what is missing then is filled up with such groups."""
    record_every: int | None = Field(10, ge=1)
    """Every n-th rollout is written to rollouts/*.jsonl, token by token; null: none."""

    @model_validator(mode="after")
    def _engine_fits(self) -> RolloutConfig:
        if self.engine == "own":
            if self.vllm != VllmConfig():
                raise ValueError("vllm: the answers are not written by vLLM: set engine: vllm, or drop the section")
            return self
        if self.correction == "none":
            raise ValueError(
                "engine vllm computes with other kernels than the trainer, so what it samples is not quite the policy: set "
                "correction: token"
            )
        if self.temperature < VLLM_MIN_TEMPERATURE:
            raise ValueError(
                f"temperature ({self.temperature:g}) with engine vllm, which samples at {VLLM_MIN_TEMPERATURE} at least: "
                "raise it, or take engine: own"
            )
        return self

    @model_validator(mode="after")
    def _warped(self) -> RolloutConfig:
        warped = [
            name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off
        ]  # fmt: skip
        if warped and self.correction == "none":
            raise ValueError(
                f"{warped[0]} ({getattr(self, warped[0])}) samples from another distribution than the one that is trained, "
                "which shows as a negative KL: leave it out, or set correction: token"
            )
        return self


class UpdateConfig(Config):
    """What is done with one rollout."""

    minibatches: int = Field(1, ge=1)
    """Optimizer steps in one pass over the rollout."""
    epochs: int = Field(1, ge=1)
    """Passes over the rollout."""
    target_kl: float | None = Field(None, gt=0)
    """Ends the updates on a rollout when the policy has moved this far from the one that sampled it: mean over tokens of
    (ratio - 1) - log ratio, looked at before each update is applied."""

    @property
    def steps(self) -> int:
        """Optimizer steps of one rollout."""
        return self.minibatches * self.epochs


class KLConfig(Config):
    """What keeps the policy near the reference.

    reward: every token's log-ratio is taken off its reward (the estimator k1, whose gradient is the right one there).
    loss: a term of the loss: k2 (its gradient is that of KL(policy || reference) on-policy), full (the exact sum over
    the vocabulary) or k3 (as in the GRPO paper; its gradient is that of the forward KL(reference || policy)).
    """

    where: Literal["reward", "loss", "none"] = "reward"
    """See above; none: no reference is kept."""
    estimator: Literal["k1", "k2", "k3", "full"] | None = None
    """Default: k1 in the reward, k2 in the loss."""
    coef: float = Field(0.05, ge=0)
    """Its weight; with `target` where it starts."""
    target: float | None = Field(None, gt=0)
    """Adapts the weight so that the KL of an answer, summed over its tokens, stays near this many nats (Ziegler et al.
    2019, arXiv 1909.08593, section 2.2)."""
    horizon: int = Field(10_000, ge=1)
    """Answers over which the weight adapts."""

    @model_validator(mode="after")
    def _pair(self) -> KLConfig:
        why = {
            ("reward", "k2"): "its gradient as a reward points elsewhere: use k1",
            ("reward", "k3"): "its value is unbiased, but its gradient as a reward is not that of the KL: use k1",
            ("reward", "full"): "a reward that depends on every token alike has no gradient at its own token: use k1",
            ("loss", "k1"): "its gradient is zero on average, so it would do nothing: use k2, full or k3",
        }.get((self.where, self.estimator or ""))
        if why is not None:
            raise ValueError(f"estimator {self.estimator} with where: {self.where}: {why}")
        if self.where == "none" and (self.estimator is not None or self.target is not None):
            raise ValueError("where is none: estimator and target mean nothing then: leave them out")
        return self

    @property
    def kind(self) -> str:
        """The estimator, its default filled in."""
        return self.estimator or ("k1" if self.where == "reward" else "k2")
