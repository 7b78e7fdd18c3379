"""The contestants of `posttrain.py`, each run in a process of its own: `posttrainers.py --worker JOB`.

Everybody reads the same rows from the same files, starts from the same Hugging Face folder, and takes steps of the same
number of examples with the same constants. Times are those of whole steps of each tool's own loop: data, forward,
backward, update, and what the tool logs. torch and the tools are imported where they are used, since TRL with a PPO
trainer lives in another interpreter than llmkit.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LR = 1e-5
KL_COEF = 0.05


@dataclass(frozen=True)
class Job:
    """One run of one contestant."""

    who: str
    task: str
    """sft, reward, dpo, grpo or ppo."""
    folder: str
    """Holds policy/, reward/ and the rows: <task>.jsonl."""
    steps: int
    """All of them, the untimed first ones too; of grpo and ppo, rollouts with all their updates."""
    examples: int
    """Of a step: conversations, pairs, or answers."""
    samples: int
    """Answers to a prompt, of grpo."""
    new_tokens: int
    max_len: int
    dtype: str
    best: bool = False
    """TRL: no gradient checkpointing."""
    precomputed: bool = False
    """TRL: the reference's log-probabilities are computed before training."""

    @property
    def rows(self) -> str:
        return f"{self.folder}/{'grpo' if self.task == 'ppo' else self.task}.jsonl"


# --- what everybody is given -----------------------------------------------------------------------------------------


def inputs(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the policy, the reward model and the rows; returns their sizes."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from llmkit.model.config import GPTConfig
    from llmkit.model.files import model_files
    from llmkit.model.gpt import GPT, init_weights
    from llmkit.tokenizer import Tokenizer, TokenizerConfig

    folder, size, pick = Path(job["folder"]), job["model"], random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]
    words = ["".join(pick.choices(syllables, k=pick.randint(2, 4))) for _ in range(5000)]

    def text(n: int) -> str:
        return " ".join(pick.choices(words, k=n))

    corpus = [text(100) for _ in range(3000)]
    tokenizer = Tokenizer.train(corpus, TokenizerConfig(vocab_size=size["vocab_size"] - 8))
    model = GPT(GPTConfig(**size))
    init_weights(model, 0)
    policy = folder / "policy"
    policy.mkdir()
    for name, content in model_files(model.config, torch.float32, tokenizer, {"stage": "sft", "step": 0}).items():
        (policy / name).write_bytes(content)
    from safetensors.torch import save_file

    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, policy / "model.safetensors", {"format": "pt"}
    )
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    reward.config.pad_token_id = (
        tokenizer.special[tokenizer.names["pad_token"]] if "pad_token" in tokenizer.names else 0
    )
    reward.save_pretrained(folder / "reward")
    for name, content in tokenizer.files().items():
        (folder / "reward" / name).write_bytes(content)

    def user(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": text(n)}]

    def reply(n: int) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text(n)}]

    makers = {
        "sft": lambda: {"prompt": user(pick.randint(10, 60)), "completion": reply(pick.randint(20, 170))},
        "pairs": lambda: {
            "prompt": user(pick.randint(10, 60)),
            "chosen": reply(pick.randint(20, 170)),
            "rejected": reply(pick.randint(20, 170)),
        },
        "grpo": lambda: {"prompt": user(pick.randint(20, 40))},
    }
    n_tokens = {}
    for task, maker in (("sft", "sft"), ("reward", "pairs"), ("dpo", "pairs"), ("grpo", "grpo")):
        rows = [makers[maker]() for _ in range(job["n_rows"])]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        sides = [
            [row["prompt"] + row[key] for key in ("completion", "chosen", "rejected") if key in row] for row in rows
        ]
        lengths = [len(tokenizer.encode_chat(chat).ids) for some in sides for chat in some]
        n_tokens[task] = [max(lengths), round(sum(lengths) / len(lengths))] if lengths else []
    return {"tokens": n_tokens}


def length_reward(prompts: Any = None, completions: Any = None, **_: Any) -> list[float]:
    """A reward that costs nothing: the share of vowels."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch in "aeiou" for ch in t) / max(len(t), 1) for t in texts]


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(job: Job) -> dict[str, Any]:
    """`llmkit train`, with the clock at the end of every step of its loop."""
    import llmkit.inference.logprobs as reference
    from llmkit.stages import load_recipe, stage_module
    from llmkit.training.meter import Meter

    ends: list[tuple[float, float]] = []
    asked: list[float] = []
    step, logprobs = Meter.step, reference.answer_logprobs

    def timed_step(self: Meter, *args: Any) -> None:
        step(self, *args)
        ends.append(stamp())

    def timed_logprobs(*args: Any) -> Any:
        begun = time.perf_counter()
        found = logprobs(*args)
        asked.append(time.perf_counter() - begun)
        return found

    Meter.step, reference.answer_logprobs = timed_step, timed_logprobs  # type: ignore[method-assign]
    updates = 4 if job.task == "ppo" else 1
    with tempfile.TemporaryDirectory() as out:
        recipe = Path(out) / "recipe.yaml"
        recipe.write_text(json.dumps(_recipe(job, Path(out), job.steps * updates)))
        started = stamp()
        stage = load_recipe(recipe)
        stage_module(stage).run(stage)
        timing, metrics = (read_lines(Path(out) / "run" / f"{name}.jsonl") for name in ("timing", "metrics"))
    marks = [started, *ends[updates - 1 :: updates]]
    seconds, cpu = ([b[i] - a[i] for a, b in itertools.pairwise(marks)] for i in (0, 1))
    losses = [m["train/loss"] for m in metrics if "train/loss" in m]
    n_rows = len(Path(job.rows).read_text("utf-8").splitlines())
    return {
        "seconds": seconds,
        "cpu": cpu,
        "losses": losses,
        "split": _split(timing, updates),
        "prepare_s_per_step": sum(asked) / n_rows * job.examples,
        "setting": f"precision {stage.precision}",
    }


def stamp() -> tuple[float, float]:
    """Time, and the processor time of this process, in which other processes' work doesn't show."""
    return time.perf_counter(), time.process_time()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _split(timing: list[dict[str, Any]], updates: int) -> dict[str, list[float]]:
    """Of each rollout: what generation took, grading, and all else: log-probabilities, values and the updates."""
    sums: dict[int, dict[str, float]] = {}
    for record in timing:
        rollout = sums.setdefault(
            (record["step"] - 1) // updates, dict.fromkeys(("rollout_s", "score_s", "step_s"), 0.0)
        )
        for key in rollout:
            rollout[key] += record.get(key, 0.0)
    found = [sums[number] for number in sorted(sums)]
    if not any(rollout["rollout_s"] for rollout in found):
        return {}
    parts = {key: [rollout[key] for rollout in found] for key in ("rollout_s", "score_s")}
    return {**parts, "update_s": [r["step_s"] - r["rollout_s"] - r["score_s"] for r in found]}


def _recipe(job: Job, out: Path, steps: int) -> dict[str, Any]:
    """What differs from the stage's defaults: sizes, constants, and nothing written beside the logs."""
    made: dict[str, Any] = {
        "stage": job.task,
        "init_from": f"{job.folder}/policy",
        "out": str(out / "run"),
        "data": {"train": [{"path": job.rows}], "valid_frac": 0.02, "cache_dir": str(out / "cache")},
        "optim": {"lr": LR, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "precision": {"f32": "fp32", "bf16": "bf16"}[job.dtype],
        "steps": steps,
        "eval": {"every": 10**6},
        "save": {"every": 10**6},
        "log": {"every": 1, "tensorboard": False, "plot": False},
        "device": "cpu",
    }
    if job.task in ("sft", "reward", "dpo"):
        made["batch"] = {"examples_per_step": job.examples, "micro_tokens": 16384, "max_len": job.max_len}
        if job.task == "sft":
            made["data"]["packing"] = False  # a row is then one conversation, as it is to TRL
        if job.task == "reward":
            made["objective"] = "rank"
        return made
    samples = job.samples if job.task == "grpo" else 1
    made["rollout"] = {
        "prompts_per_step": job.examples // samples, "samples_per_prompt": samples, "max_new_tokens": job.new_tokens,
        "record_every": None,
    }  # fmt: skip
    made["batch"] = {"micro_tokens": 16384, "max_len": job.max_len}
    if job.task == "grpo":
        made["rewards"] = [{"kind": "python", "function": "posttrainers:length_reward"}]
        made["kl"] = {"where": "none"}
    else:
        made["rewards"] = [{"kind": "model", "path": f"{job.folder}/reward"}]
        made["kl"] = {"coef": KL_COEF}
        made["critic"] = {"init_from": f"{job.folder}/reward"}
        made["update"] = {"minibatches": 1, "epochs": 4}
    return made


# --- TRL -------------------------------------------------------------------------------------------------------------


def step_clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each step ended."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = stamp()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = stamp()
            self.seconds.append(now[0] - self.last[0])
            self.cpu.append(now[1] - self.last[1])
            self.last = now

    return Clock()


def trl(job: Job) -> dict[str, Any]:
    """A trainer of TRL with its defaults, but for the sizes and constants that all share."""
    import torch
    import trl as library
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    rows = [json.loads(line) for line in Path(job.rows).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(f"{job.folder}/policy")

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(f"{job.folder}/policy", dtype=torch.float32)

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            f"{job.folder}/reward", num_labels=1, dtype=torch.float32
        )

    clock = step_clock()
    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            "output_dir": out, "per_device_train_batch_size": job.examples, "learning_rate": LR, "use_cpu": True,
            "bf16": job.dtype == "bf16", "lr_scheduler_type": "constant", "weight_decay": 0.0, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1,
        }  # fmt: skip
        if job.best:
            shared["gradient_checkpointing"] = False
        if job.task != "ppo":
            shared["max_steps"] = job.steps
        if job.task == "sft":
            args = library.SFTConfig(**shared, max_length=job.max_len)
            trainer = library.SFTTrainer(
                policy(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
            )
        elif job.task == "reward":
            args = library.RewardConfig(**shared, max_length=job.max_len)
            trainer = library.RewardTrainer(
                scorer(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
            )
        elif job.task == "dpo":
            args = library.DPOConfig(**shared, max_length=job.max_len, precompute_ref_log_probs=job.precomputed)
            trainer = library.DPOTrainer(
                policy(),
                None,
                args,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        elif job.task == "grpo":
            args = library.GRPOConfig(
                **shared, num_generations=job.samples, max_completion_length=job.new_tokens, temperature=1.0
            )
            trainer = library.GRPOTrainer(
                policy(), length_reward, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                callbacks=[clock],
            )  # fmt: skip
        else:
            trainer = _trl_ppo(job, shared, rows, tokenizer, policy, scorer, clock)
            args = trainer.args
        trainer.train()
        history = trainer.state.log_history
    losses = [h[k] for h in history for k in ("loss", "loss/policy_avg") if k in h]
    setting = f"TRL {library.__version__}, bf16={args.bf16}, gradient_checkpointing={args.gradient_checkpointing}"
    if job.precomputed:
        setting += ", precompute_ref_log_probs"
    return {"seconds": clock.seconds, "cpu": clock.cpu, "losses": losses, "split": {}, "setting": setting}


def _trl_ppo(job: Job, shared: dict[str, Any], rows: Any, tokenizer: Any, policy: Any, scorer: Any, clock: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    ids = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in rows]
    args = PPOConfig(
        **shared, total_episodes=job.examples * job.steps, response_length=job.new_tokens, temperature=1.0,
        num_ppo_epochs=4, num_mini_batches=1, kl_coef=KL_COEF, num_sample_generations=0, stop_token="eos",
    )  # fmt: skip
    return PPOTrainer(
        args, tokenizer, policy(), policy(), scorer(), Dataset.from_dict({"input_ids": ids}), scorer(), callbacks=[clock],
        eval_dataset=Dataset.from_dict({"input_ids": ids[: job.examples]}),
    )  # fmt: skip


CONTESTANTS = {"ours": ours, "trl": trl}

if __name__ == "__main__":
    described = json.loads(sys.argv[2])
    result = inputs(described) if described["who"] == "inputs" else CONTESTANTS[described["who"]](Job(**described))
    print("\n" + json.dumps(result))
