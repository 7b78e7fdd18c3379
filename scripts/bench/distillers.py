"""The contestants of `distill.py`, each run in a process of its own: `distillers.py --worker JOB`.

Trainers read the same rows from the same file, start from the same two Hugging Face folders, and take steps of the same
number of conversations with the same constants; times are those of whole steps of each tool's own loop. Losses get the
same states, output embeddings and labels. torch and the tools are imported where they are used.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import peak, reset_peak
from posttrainers import LR, inputs as policy_and_rows, read_lines, stamp, step_clock

BETA = 0.5  # the teacher's share of the mixture, TRL's default and ours
BETAS = [0.9, 0.999]  # of Adam, TRL's default
TRL_BETA = {"forward": 0.0, "reverse": 1.0, "jsd": BETA}
D_STUDENT, D_TEACHER = 768, 1024


@dataclass(frozen=True)
class Job:
    """One run of one trainer."""

    who: str
    """ours, trl (its GKDTrainer) or trl_distillation (its DistillationTrainer, which always samples)."""
    folder: str
    """Holds policy/, teacher/ and rows.jsonl."""
    steps: int
    """All of them, the untimed first ones too."""
    examples: int
    """Conversations of a step."""
    on_policy: bool
    """The student writes all answers; else the data hold them."""
    divergence: str
    new_tokens: int
    max_len: int
    dtype: str
    best: bool = False
    """TRL: no gradient checkpointing, which is also what lets its GKD generate with a KV cache."""

    @property
    def rows(self) -> str:
        return f"{self.folder}/rows.jsonl"


# --- what everybody is given -----------------------------------------------------------------------------------------


def inputs(job: dict[str, Any]) -> dict[str, Any]:
    """Writes student, teacher and rows of at most `max_len` ids; returns how long the rows are.

    A row that is longer would be cut from its beginning by one tool and from its end by the other.
    """
    import torch
    from safetensors.torch import save_file

    from llmkit.model.config import GPTConfig
    from llmkit.model.files import model_files
    from llmkit.model.gpt import GPT, init_weights
    from llmkit.tokenizer import Tokenizer

    folder = Path(job["folder"])
    policy_and_rows(job)
    tokenizer = Tokenizer.load(folder / "policy")
    teacher = GPT(GPTConfig(**job["teacher"]))
    init_weights(teacher, 1)
    (folder / "teacher").mkdir()
    for name, content in model_files(teacher.config, torch.float32, tokenizer, {"stage": "sft", "step": 0}).items():
        (folder / "teacher" / name).write_bytes(content)
    tensors = {name: tensor.contiguous() for name, tensor in teacher.state_dict().items()}
    save_file(tensors, folder / "teacher" / "model.safetensors", {"format": "pt"})

    chats = [row["prompt"] + row["completion"] for row in read_lines(folder / "sft.jsonl")]
    encoded = [(chat, tokenizer.encode_chat(chat)) for chat in chats]
    kept = [(chat, made) for chat, made in encoded if len(made.ids) <= job["max_len"]]
    if len(kept) < job["least_rows"]:
        raise SystemExit(f"{len(kept)} rows of at most {job['max_len']} ids, {job['least_rows']} are needed")
    text = "".join(json.dumps({"messages": chat}) + "\n" for chat, _ in kept)
    (folder / "rows.jsonl").write_text(text, "utf-8")
    lengths = [len(made.ids) for _, made in kept]
    return {"rows": len(kept), "longest": max(lengths), "mean": round(statistics.fmean(lengths))}


# --- trainers --------------------------------------------------------------------------------------------------------


def ours(job: Job) -> dict[str, Any]:
    """`llmkit train`, with the clock at the end of every step of its loop."""
    import llmkit.distill.on_policy as on_policy
    from llmkit.stages import load_recipe, stage_module
    from llmkit.training.meter import Meter

    ends: list[tuple[float, float]] = []
    written: list[tuple[float, float]] = []
    step, generate = Meter.step, on_policy.generate

    def timed_step(self: Meter, *args: Any) -> None:
        step(self, *args)
        ends.append(stamp())

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        answers = generate(*args, **kwargs)
        written.append((time.perf_counter() - begun, statistics.fmean(len(a.ids) for a in answers)))
        return answers

    Meter.step, on_policy.generate = timed_step, timed_generate  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "recipe.yaml"
        path.write_text(json.dumps(_recipe(job, Path(out))))
        recipe = load_recipe(path)
        started = stamp()
        stage_module(recipe).run(recipe)
        metrics = read_lines(Path(out) / "run" / "metrics.jsonl")
    seconds, cpu = ([b[i] - a[i] for a, b in itertools.pairwise([started, *ends])] for i in (0, 1))
    losses = [m["train/loss"] for m in metrics if "train/loss" in m]
    setting = f"precision {recipe.precision}"
    return {"seconds": seconds, "cpu": cpu, "losses": losses, "written": written, "setting": setting}


def _recipe(job: Job, out: Path) -> dict[str, Any]:
    """What differs from the stage's defaults: sizes, constants, and nothing written beside the logs.

    Each term's own gradient is not measured: TRL has no such figure.
    """
    return {
        "stage": "distill",
        "init_from": f"{job.folder}/policy",
        "teacher": f"{job.folder}/teacher",
        "out": str(out / "run"),
        "data": {
            "train": [{"path": job.rows}], "valid_frac": 0.02, "cache_dir": str(out / "cache"),
            "packing": False,  # a row is then one conversation, as it is to TRL
        },
        "losses": [{"kind": "soft", "divergence": job.divergence, "beta": BETA}],
        "ce_weight": 0.0,
        "on_policy_frac": 1.0 if job.on_policy else 0.0,
        "on_policy": {"max_new_tokens": job.new_tokens, "temperature": 1.0},
        "term_norms_every": None,
        "batch": {"examples_per_step": job.examples, "micro_tokens": 16384, "max_len": job.max_len},
        "optim": {"lr": LR, "betas": BETAS, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "precision": {"f32": "fp32", "bf16": "bf16"}[job.dtype],
        "steps": job.steps,
        "eval": {"every": 10**6},
        "save": {"every": 10**6},
        "log": {"every": 1, "tensorboard": False, "plot": False},
        "device": "cpu",
    }  # fmt: skip


def trl(job: Job) -> dict[str, Any]:
    """A trainer of TRL with its defaults, but for the sizes and constants that all share."""
    import torch
    import trl as library
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = read_lines(Path(job.rows))
    tokenizer = AutoTokenizer.from_pretrained(f"{job.folder}/policy")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(f"{job.folder}/{name}", dtype=torch.float32)
        for name in ("policy", "teacher")
    )
    clock = step_clock()
    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            "output_dir": out, "per_device_train_batch_size": job.examples, "max_steps": job.steps, "learning_rate": LR,
            "lr_scheduler_type": "constant", "weight_decay": 0.0, "use_cpu": True, "bf16": job.dtype == "bf16",
            "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
            "beta": TRL_BETA[job.divergence], "temperature": 1.0, "logging_steps": 1, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        if job.best:
            shared["gradient_checkpointing"] = False
        if job.who == "trl":
            args = GKDConfig(
                **shared, lmbda=float(job.on_policy), max_new_tokens=job.new_tokens, max_length=job.max_len
            )
            trainer = GKDTrainer(
                student, teacher, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                callbacks=[clock],
            )  # fmt: skip
            cached = trainer.generation_config.use_cache
        else:
            tokenizer.padding_side = "left"
            args = library.DistillationConfig(**shared, max_completion_length=job.new_tokens)
            prompts = Dataset.from_list([{"prompt": row["messages"][:-1]} for row in rows])
            trainer = library.DistillationTrainer(
                student, teacher, args, train_dataset=prompts, processing_class=tokenizer, callbacks=[clock]
            )
            cached = True
        written = _watch_answers(trainer) if job.who == "trl" else []
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    setting = f"TRL {library.__version__}, bf16={args.bf16}, gradient_checkpointing={args.gradient_checkpointing}"
    if job.on_policy:
        setting += f", KV cache={cached}"
    return {"seconds": clock.seconds, "cpu": clock.cpu, "losses": losses, "written": written, "setting": setting}


def _watch_answers(trainer: Any) -> list[tuple[float, float]]:
    """Fills with what each generation of GKDTrainer takes, and how many tokens an answer has."""
    written: list[tuple[float, float]] = []
    generate = trainer.generate_on_policy_outputs

    def timed(*args: Any) -> Any:
        begun = time.perf_counter()
        ids, mask, labels = generate(*args)
        written.append((time.perf_counter() - begun, (labels != -100).sum().item() / len(labels)))
        return ids, mask, labels

    trainer.generate_on_policy_outputs = timed
    return written


# --- losses ----------------------------------------------------------------------------------------------------------

Loss = Callable[[Any, Any, Any, Any, Any], Any]


def loss_of(who: str, divergence: str) -> Loss:
    """(student's states, its embedding, the teacher's states, its embedding, labels) -> mean divergence."""
    return {"naive": _naive, "trl": _trl_whole, "trl_chunked": _trl_chunked, "ours": _ours}[who](divergence)


def _naive(divergence: str) -> Loss:
    """As one would write it: both logits whole."""
    import math

    import torch
    import torch.nn.functional as F

    def kl(of: Any, to: Any) -> Any:
        return F.kl_div(to, of, reduction="sum", log_target=True)

    def loss(h_ND: Any, w_VD: Any, t_ND: Any, w_t_VD: Any, labels_N: Any) -> Any:
        student_NV = F.log_softmax((h_ND @ w_VD.t()).float(), -1)
        with torch.no_grad():
            teacher_NV = F.log_softmax((t_ND @ w_t_VD.t()).float(), -1)
        if divergence == "forward":
            total = kl(teacher_NV, student_NV)
        elif divergence == "reverse":
            total = kl(student_NV, teacher_NV)
        else:
            mixed_NV = torch.logaddexp(student_NV + math.log(1 - BETA), teacher_NV + math.log(BETA))
            total = BETA * kl(teacher_NV, mixed_NV) + (1 - BETA) * kl(student_NV, mixed_NV)
        return total / len(labels_N)

    return loss


def _trl_whole(divergence: str) -> Loss:
    """What GKDTrainer does with two models' logits."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    def loss(h_ND: Any, w_VD: Any, t_ND: Any, w_t_VD: Any, labels_N: Any) -> Any:
        with torch.no_grad():
            teacher_NV = (t_ND @ w_t_VD.t()).float()
        student_NV = (h_ND @ w_VD.t()).float()
        return GKDTrainer.generalized_jsd_loss(student_NV, teacher_NV, labels_N, beta=TRL_BETA[divergence])

    return loss


def _trl_chunked(divergence: str) -> Loss:
    """What DistillationTrainer does."""
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(h_ND: Any, w_VD: Any, t_ND: Any, w_t_VD: Any, labels_N: Any) -> Any:
        everywhere_1N = torch.ones_like(labels_N)[None]
        return _chunked_divergence_loss(h_ND[None], t_ND[None], w_VD, w_t_VD, everywhere_1N, TRL_BETA[divergence])[0]

    return loss


def _ours(divergence: str) -> Loss:
    from llmkit.losses import DenseTeacher, SoftTerm, distillation_loss

    soft = (SoftTerm("soft", 1.0, divergence, BETA),)  # type: ignore[arg-type]

    def loss(h_ND: Any, w_VD: Any, t_ND: Any, w_t_VD: Any, labels_N: Any) -> Any:
        made = distillation_loss(
            h_ND, w_VD, labels_N, DenseTeacher(t_ND, w_t_VD), soft, ce_weight=0.0, temperature=1.0, vocab_size=len(w_VD)
        )
        return made.total / len(labels_N)

    return loss


def states(n: int, vocab: int) -> list[Any]:
    """What a loss is given, in bf16; the student's is to be trained."""
    import torch

    torch.manual_seed(0)
    made = []
    for width in (D_STUDENT, D_TEACHER):  # in place: freed memory that is kept would hide what comes after it
        made += [
            torch.empty(n, width, dtype=torch.bfloat16).normal_(),
            torch.empty(vocab, width, dtype=torch.bfloat16).normal_(std=width**-0.5),
        ]
    for tensor in made[:2]:
        tensor.requires_grad_()
    return [*made, torch.randint(vocab, (n,))]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each forward and backward pass, the extra bytes of the first and the peak of the whole process."""
    loss_fn = loss_of(job["who"], job["divergence"])
    loss_fn(*states(64, 512)).backward()  # threads, kernels and buffers of the libraries
    given = states(job["n"], job["vocab"])
    before, seconds, extra, whole = reset_peak(), [], 0, 0
    for i in range(1 + job["passes"]):
        given[0].grad = given[1].grad = None
        start = time.perf_counter()
        loss_fn(*given).backward()
        seconds.append(time.perf_counter() - start)
        if i == 0:
            whole = peak()
            extra = whole - before
    return {"seconds": seconds[1:], "extra": extra, "whole": whole}


def gradient_errors(job: dict[str, Any]) -> dict[str, float]:
    """Of each loss in bf16, the larger relative error of its two gradients against naive in f32 from the same numbers."""
    given = states(job["n"], job["vocab"])
    exact = [tensor.detach().float() if tensor.is_floating_point() else tensor for tensor in given]
    for tensor in exact[:2]:
        tensor.requires_grad_()
    loss_of("naive", job["divergence"])(*exact).backward()
    errors = {}
    for who in job["whos"]:
        given[0].grad = given[1].grad = None
        loss_of(who, job["divergence"])(*given).backward()
        pairs = zip(given[:2], exact[:2], strict=True)
        errors[who] = max(((t.grad.float() - e.grad).norm() / e.grad.norm()).item() for t, e in pairs)
    return errors


PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "inputs": inputs,
    "train": lambda job: (ours if job["who"] == "ours" else trl)(Job(**job)),
    "measure": measure,
    "errors": gradient_errors,
}

if __name__ == "__main__":
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    described = json.loads(sys.argv[2])
    result = PARTS[described.pop("part")](described)
    print("\n" + json.dumps(result))
