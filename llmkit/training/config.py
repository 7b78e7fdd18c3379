"""What every training recipe says, whatever its stage. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llmkit.config import Config, flatten
from llmkit.inference.config import SamplingConfig
from llmkit.rollout.rewards.config import AnswersConfig

# Keys that change neither the samples nor what is optimised: they may differ on resume without a word.
FREE_KEYS = (
    "out",
    "stop_at",
    "allow_changes",
    "parallel.",
    "liveness.",
    "save.",
    "log.",
    "eval.samples.",
    "data.workers",
    "data.cache_dir",
)


class BatchConfig(Config):
    """Global sizes: what one optimizer step sees, over all ranks and micro-batches. Accumulation is derived."""

    tokens_per_step: int = Field(16384, ge=1, le=1 << 30)
    """Tokens of one optimizer step; with rows of a fixed length, a multiple of that length."""
    examples_per_step: int | None = Field(None, ge=1, le=1 << 24)
    """Rows of one optimizer step, whatever their length: texts, pairs, packs. Set, it replaces tokens_per_step."""
    micro_tokens: int | None = Field(None, ge=1, le=1 << 24)
    """Most tokens of one forward pass on one rank. Default: min(8192, the rank's share). Changes memory, not results."""
    max_len: int | None = Field(None, ge=2)
    """Row length in tokens. Default: the model's max_seq_len."""


class OptimConfig(Config):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """muon: Muon on the hidden matrices, AdamW on embeddings, head, norms and biases."""
    lr: float = Field(1e-3, ge=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon, outside the root."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """SGD: default 0. Muon: default 0.95, with Nesterov."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled; on hidden matrices and an untied head only, never on embeddings, norms or biases."""
    clip: float | None = Field(1.0, gt=0)
    """Largest L2 norm of the gradient of one group; null: none."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After warm-up: flat, straight to the floor, half a cosine, or flat and then a decay (warm-up, stable, decay)."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up."""
    warmup_frac: float | None = Field(None, ge=0, le=1)
    """The same as a share of all steps. Default when neither is set: 0.01."""
    min_lr_frac: float = Field(0.1, ge=0, le=1)
    """Floor of the schedule as a share of lr."""
    decay_frac: float = Field(0.2, gt=0, le=1)
    """wsd: the share of all steps in which the rate decays."""
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    """wsd: straight, or 1 - sqrt(progress) (Haegele et al. 2024, arXiv 2405.18392)."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keeps an exponential moving average of the weights with this decay per step."""
    ema_warmup: bool = False
    """The average's decay is min(ema_decay, (1 + step) / (10 + step)): early on it follows the weights more closely."""

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimConfig:
        if self.warmup_steps is not None and self.warmup_frac is not None:
            raise ValueError("give warmup_steps or warmup_frac, not both")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1) (got {list(self.betas)})")
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup is set but ema_decay is not: no average is kept")
        return self

    def warmup(self, total_steps: int) -> int:
        """Warm-up in steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((0.01 if self.warmup_frac is None else self.warmup_frac) * total_steps)


class SampleConfig(SamplingConfig):
    """Text the model writes at every evaluation, so that a person can watch it learn."""

    prompts: tuple[str, ...] = ()
    """One sample is written for each."""
    max_new_tokens: int = Field(64, ge=1)
    """Length of a sample."""
    temperature: float = Field(0.8, ge=0)
    """0 is greedy."""


class EvalConfig(Config):
    """Evaluation in the loop."""

    every: int | None = Field(250, ge=1)
    """Steps between evaluations; also before the first and after the last step. null: never."""
    max_tokens: int | None = Field(None, ge=1)
    """Evaluates on the first tokens only. Default: the whole split."""
    metric: str = Field("valid/loss", min_length=1)
    """The number that early stopping and keep_best look at, as it is called in metrics.jsonl."""
    better: Literal["lower", "higher"] = "lower"
    """Which way that number improves: higher for an accuracy."""
    patience: int | None = Field(None, ge=1)
    """Stops after this many evaluations in a row without a better metric."""
    min_delta: float = Field(0.0, ge=0)
    """How much better counts as better, in the metric's unit: nats for a loss."""
    weights: Literal["model", "ema"] = "model"
    """Which weights are evaluated."""
    samples: SampleConfig = SampleConfig()
    """Text written at every evaluation."""
    answers: AnswersConfig | None = None
    """Answers to held-out prompts, written at every evaluation of sft, dpo, ppo and grpo, and graded."""


class SaveConfig(Config):
    """Checkpoints."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step is always saved. Default: the evaluation's interval."""
    keep: int = Field(3, ge=1)
    """The newest checkpoints that stay."""
    keep_best: bool = True
    """The one with the best eval.metric stays too."""
    asynchronous: bool = True
    """Files are written while training goes on."""


class LogConfig(Config):
    """What is shown and recorded."""

    every: int = Field(10, ge=1)
    """Steps between lines in the log; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Writes tensorboard/ where TensorBoard is installed."""
    plot: bool = True
    """Draws plots/loss.png at the end where Matplotlib is installed."""
    norms_every: int | None = Field(None, ge=1)
    """Steps between the norms of gradient, weights and update of every layer in metrics.jsonl. null: never."""
    gradient_noise: bool = False
    """Estimates the gradient noise scale, in tokens, at every step; needs two micro-batches or ranks."""
    profile_steps: tuple[int, int] | None = None
    """Profiles steps [first, last) with torch.profiler into profile/."""


class GuardConfig(Config):
    """What is done about a step whose loss or gradient norm is far above those of the last steps, or not finite."""

    action: Literal["none", "stop", "skip", "rollback"] = "none"
    """stop: ends the run. skip: leaves that update out. rollback: goes back to a checkpoint and leaves its data out.
    none: looks at nothing; a number that is not finite ends the run."""
    loss_z: float | None = Field(6.0, gt=0)
    """Deviations (1.4826 MAD) above the median of the window from which on a loss is refused; null: never."""
    grad_norm_z: float | None = Field(10.0, gt=0)
    """The same for the logarithm of the gradient norm before the clip."""
    window: int = Field(128, ge=8, le=1 << 16)
    """Accepted steps that a new one is compared with."""
    warmup: int = Field(64, ge=4)
    """Accepted steps before the comparison begins."""
    max_loss: float | None = Field(None, gt=0)
    """Refuses a loss above this, from the first step on."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Refuses a gradient norm above this, from the first step on."""
    back: int = Field(100, ge=0)
    """rollback: to the newest checkpoint of the recipe's that is at least so many steps old; where there is none yet,
    the update is skipped."""
    beyond: int = Field(0, ge=0)
    """rollback: steps' worth of data that is left out after that of the refused step."""
    max_in_a_row: int = Field(3, ge=1)
    """So many may be refused before a step beyond the last refused one is accepted; the next ends the run."""
    max_total: int = Field(20, ge=1)
    """So many may be refused in a run; the next ends it."""

    @model_validator(mode="after")
    def _sizes(self) -> GuardConfig:
        if self.warmup > self.window:
            raise ValueError(f"warmup ({self.warmup}) is above window ({self.window}): it would never end")
        return self


class ParallelConfig(Config):
    """How one model is spread over the ranks that torchrun starts. Changes memory and speed, not results."""

    shard: Literal["none", "full", "hybrid"] = "none"
    """Weights, gradients and optimizer state: whole on every rank; in equal shares over all (FSDP2); or in shares
    within a group of ranks, of which there are `replicas`."""
    replicas: int | None = Field(None, ge=1)
    """hybrid: how many groups hold a whole model each. Default: one on every node."""
    tensor: int = Field(1, ge=1)
    """Ranks that compute one row together, each with its share of heads and of the MLP's width, and between those of the
    positions (sequence parallelism, arXiv 2205.05198): neighbours, of one node."""
    context: int = Field(1, ge=1)
    """Ranks that share the positions of each row, for rows that are too long for one: neighbours. pretrain, sft, distill."""
    experts: int = Field(1, ge=1)
    """Ranks that hold each layer's experts together, an equal number each, and send each other the tokens that visit them:
    neighbours. Each rank reads rows of its own."""
    offload: bool = False
    """With shares: they lie in main memory - weights, masters, gradients, averages, optimizer state -, where the optimizer's
    step is made; a block's weights go to the device when they are put together."""

    @model_validator(mode="after")
    def _sharded(self) -> ParallelConfig:
        if self.replicas is not None and self.shard != "hybrid":
            raise ValueError(f"replicas ({self.replicas}) belongs to shard: hybrid (shard is {self.shard})")
        if self.offload and self.shard == "none":
            raise ValueError(
                "offload: true with shard: none: what goes to main memory are shares: set shard: full or hybrid"
            )
        if self.experts > 1 and self.tensor > 1:
            raise ValueError(
                f"experts ({self.experts}) with tensor ({self.tensor}): experts are not split by width: drop tensor; experts "
                "goes with shard"
            )
        return self


class LivenessConfig(Config):
    """With several ranks: how long one may show no sign of life before the job is ended with a sentence that names it.

    A rank that died on the same machine is noticed within seconds, whatever is said here.
    """

    stopped_s: float = Field(20.0, ge=3)
    """Seconds for which a process on the same machine may be stopped (SIGSTOP, a debugger)."""
    silent_s: float = Field(60.0, ge=5)
    """Seconds for which another machine, or the rendezvous store, may be silent."""
    stalled_s: float = Field(600.0, ge=5)
    """Seconds for which the others may wait for a rank that lives but does not come to the same collective."""


class RunConfig(Config):
    """What every stage's recipe shares."""

    out: str = Field(min_length=1)
    """The run's folder. Running the same recipe again resumes from its newest good checkpoint."""
    init_from: str | None = None
    """Old weights for a new run: a run, a checkpoint or a Hugging Face folder."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run; the schedule ends here."""
    stop_at: int | None = Field(None, ge=1)
    """Stops after this step for now, with a checkpoint; the schedule stays as it is."""
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    liveness: LivenessConfig = LivenessConfig()
    parallel: ParallelConfig = ParallelConfig()
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: names, their beginnings up to a dot, or globs: layers.0-3, embed_tokens, *norm*."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds initial weights, data order, dropout and samples."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: the first of cuda, mps, cpu that is there."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16: bf16 weights with an fp32 master copy. fp16: the same with a loss scale, on CUDA. fp64: for tests of exactness."""
    compile: bool = False
    """torch.compile of the forward and backward pass; block by block where `parallel` spreads the model."""
    activation_checkpointing: bool = False
    """Recomputes each block in the backward pass: less memory, about a third more time."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log-partition (PaLM, arXiv 2204.02311): keeps logits from drifting."""
    loss_chunk: int = Field(256, ge=1)
    """Tokens whose logits exist at once in the loss."""
    allow_changes: bool = False
    """On resume: goes on although the recipe differs from the one the run was started with."""

    @model_validator(mode="after")
    def _weights_exist(self) -> RunConfig:
        if self.eval.weights == "ema" and self.optim.ema_decay is None:
            raise ValueError("eval.weights is ema but optim.ema_decay is not set: no average is kept")
        return self

    @model_validator(mode="after")
    def _rollback_has_checkpoints(self) -> RunConfig:
        if self.guard.action == "rollback" and self.save_every is None:
            raise ValueError("guard.action is rollback but neither save.every nor eval.every is set: no way back")
        return self

    @model_validator(mode="after")
    def _positions_may_be_shared(self) -> RunConfig:
        n = self.parallel.context
        if n > 1 and self.compile:
            raise ValueError(f"compile with parallel.context ({n}) is not supported: set compile to false")
        if n > 1 and self.log.gradient_noise:
            raise ValueError(
                f"log.gradient_noise with parallel.context ({n}): a rank's own gradient is not of whole rows: set it to false"
            )
        return self

    @property
    def last_step(self) -> int:
        """The step after which this process ends."""
        return min(self.steps, self.stop_at or self.steps)

    @property
    def save_every(self) -> int | None:
        return self.save.every or self.eval.every


def said(config: RunConfig) -> dict[str, Any]:
    """What a recipe says beyond the defaults, flat, of that which changes results."""
    told = flatten(config.model_dump(mode="json", exclude_defaults=True))
    return {key: value for key, value in told.items() if not f"{key}.".startswith(FREE_KEYS)}
