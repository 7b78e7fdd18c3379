"""The contestants of `pretrain.py`, each run in a process of its own: `trainers.py --worker JOB`.

Everybody starts from the same weights, sees the same rows in the same order and uses AdamW with the same constants, no
weight decay (who decays embeddings differs) and a clip at norm 1. What differs is what each tool does with them.

torch and the tools are imported where they are used: litgpt may live in another interpreter than llmkit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LR, BETAS, CLIP = 3e-4, (0.9, 0.95), 1.0
EVAL_STEPS = 2  # held-out batches after those of training


@dataclass(frozen=True)
class Job:
    """One run of one contestant."""

    who: str
    model: dict[str, Any]
    """Sizes, as in a recipe's `model`."""
    batch: int
    folder: str
    """Holds tokens.npy and init.safetensors."""
    steps: int
    """All of them, the untimed first ones too."""
    dtype: str
    same_tricks: bool
    """Compiled and with the fused optimizer, whoever it is; memory is kept by the environment."""
    profile: str | None = None

    def rows(self, step: int) -> tuple[Any, Any]:
        """Inputs and labels of one step, int64 [batch, seq_len]."""
        length = self.model["max_seq_len"]
        tokens = np.load(Path(self.folder) / "tokens.npy", mmap_mode="r")
        first = step * self.batch * length
        window = np.asarray(tokens[first : first + self.batch * length + 1], dtype=np.int64)
        return window[:-1].reshape(self.batch, length), window[1:].reshape(self.batch, length)

    def tensors(self, step: int) -> tuple[Any, Any]:
        import torch

        inputs, labels = self.rows(step)
        return torch.from_numpy(inputs), torch.from_numpy(labels)

    def weights(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(Path(self.folder) / "init.safetensors")


def timed(steps: int, step: Callable[[int], Any]) -> list[float]:
    seconds = []
    for k in range(steps):
        start = time.perf_counter()
        step(k)
        seconds.append(time.perf_counter() - start)
    return seconds


def held_out(job: Job, logits_of: Callable[[Any], Any]) -> float:
    """Mean cross entropy, in fp32, of rows that were not trained on."""
    import torch
    import torch.nn.functional as F

    losses = []
    with torch.no_grad():
        for k in range(job.steps, job.steps + EVAL_STEPS):
            inputs, labels = job.tensors(k)
            losses.append(F.cross_entropy(logits_of(inputs).float().flatten(0, 1), labels.flatten()).item())
    return sum(losses) / len(losses)


def answer(seconds: list[float], loss: float, model: Any, setting: str) -> dict[str, Any]:
    n_params = sum(p.numel() for p in model.parameters())
    return {"seconds": seconds, "loss": loss, "n_params": n_params, "setting": setting}


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(job: Job) -> dict[str, Any]:
    import torch

    from llmkit.data.loader import _batch
    from llmkit.data.packing import Rows
    from llmkit.model.config import GPTConfig
    from llmkit.model.gpt import GPT
    from llmkit.training.config import OptimConfig, RunConfig
    from llmkit.training.engine import Engine, keep_freed_memory
    from llmkit.training.supervised import token_loss

    if not job.same_tricks:
        keep_freed_memory()  # as the loop does
    recipe = RunConfig(
        out="unused",
        steps=job.steps,
        precision="bf16" if job.dtype == "bf16" else "fp32",
        compile=True,
        optim=OptimConfig(lr=LR, betas=BETAS, clip=CLIP, weight_decay=0.0, schedule="constant", warmup_steps=0),
    )
    model = GPT(GPTConfig(**job.model))
    model.load_state_dict(job.weights())
    model.compile()
    engine = Engine(model, recipe)
    loss_fn = token_loss(recipe.z_loss, recipe.loss_chunk)

    def batches(k: int) -> list[Any]:
        """What the loader gives with cross-document attention: the peers know no documents either."""
        inputs, labels = job.rows(k)
        positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape).copy()
        return [_batch(Rows(inputs, labels, positions, np.zeros(inputs.shape, np.int32)), False)]

    def step(k: int) -> None:
        engine.update(batches(k), loss_fn)

    seconds = timed(job.steps, step)
    if job.profile:
        with torch.profiler.profile() as profile:
            timed(3, step)
        Path(job.profile).write_text(
            profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
        )
    with engine.evaluating() as module:
        loss = held_out(job, lambda ids: module.logits(module(ids)))
    return answer(seconds, loss, model, f"precision {recipe.precision}, compile, loss_chunk {recipe.loss_chunk}")


# --- transformers ----------------------------------------------------------------------------------------------------


def llama(job: Job) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = job.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size["vocab_size"],
            hidden_size=size["d_model"],
            intermediate_size=size["d_ff"],
            num_hidden_layers=size["n_layers"],
            num_attention_heads=size["n_heads"],
            num_key_value_heads=size["n_heads"],
            max_position_embeddings=size["max_seq_len"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    odd = model.load_state_dict(job.weights(), strict=False)
    assert odd.missing_keys in ([], ["lm_head.weight"]) and not odd.unexpected_keys, odd
    return model


def hf_plain(job: Job, weights: str = "fp32") -> dict[str, Any]:
    """The loop of the tutorials: autocast, clip, `torch.optim.AdamW`."""
    import torch

    model = llama(job)
    if weights == "bf16":
        model = model.bfloat16()
    cast = job.dtype == "bf16" and weights == "fp32"
    fused = {"fused": True} if job.same_tricks else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, **fused)
    run = torch.compile(model) if job.same_tricks else model

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if cast else nullcontext()

    def step(k: int) -> None:
        inputs, labels = job.tensors(k)
        with autocast():
            loss = run(input_ids=inputs, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    seconds = timed(job.steps, step)
    model.eval()
    with autocast():
        loss = held_out(job, lambda ids: model(input_ids=ids).logits)
    setting = (
        f"{weights} weights" + (", autocast bf16" if cast else "") + ", AdamW" + (" fused, compile" * job.same_tricks)
    )
    return answer(seconds, loss, model, setting)


def hf_plain_bf16(job: Job) -> dict[str, Any]:
    return hf_plain(job, "bf16")


def hf_trainer(job: Job) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return job.steps * job.batch

        def __getitem__(self, i: int) -> dict[str, Any]:
            if i % job.batch == 0 or not hasattr(self, "rows"):
                self.rows = job.tensors(i // job.batch)
            inputs, labels = (t[i % job.batch] for t in self.rows)
            return {"input_ids": inputs, "labels": labels, "shift_labels": labels}

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    bf16 = job.dtype == "bf16"
    clock, model = Clock(), llama(job)
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out, per_device_train_batch_size=job.batch, max_steps=job.steps, use_cpu=True, bf16=bf16,
            torch_compile=job.same_tricks, learning_rate=LR, lr_scheduler_type="constant", adam_beta1=BETAS[0],
            adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=CLIP, train_sampling_strategy="sequential",
            save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=Data(), callbacks=[clock]).train()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss = held_out(job, lambda ids: model(input_ids=ids).logits)
    setting = f"bf16={bf16}, optim={getattr(args.optim, 'value', args.optim)}, torch_compile={args.torch_compile}"
    return answer(clock.seconds, loss, model, setting)


# --- litgpt ----------------------------------------------------------------------------------------------------------


def litgpt_names(weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Hugging Face names -> litgpt's, where q, k and v are one matrix."""
    import torch

    names = {
        "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj",
    }  # fmt: skip
    yield "lm_head.weight", weights["model.embed_tokens.weight"]
    yield "transformer.wte.weight", weights["model.embed_tokens.weight"]
    yield "transformer.ln_f.weight", weights["model.norm.weight"]
    for name, t in weights.items():
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            block = name.removeprefix("model.layers.").split(".")[0]
            yield f"transformer.h.{block}.attn.qkv.weight", torch.cat(parts)
        elif name.startswith("model.layers.") and not name.endswith(("k_proj.weight", "v_proj.weight")):
            block, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            yield f"transformer.h.{block}.{names[part]}.weight", t


def litgpt(job: Job, precision: str) -> dict[str, Any]:
    """The steps of `litgpt pretrain`: Fabric, always compiled, its chunked loss, AdamW not fused on a CPU."""
    import lightning
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    size = job.model
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision=precision)
    config = Config(
        block_size=size["max_seq_len"], padded_vocab_size=size["vocab_size"], vocab_size=size["vocab_size"],
        n_layer=size["n_layers"], n_head=size["n_heads"], n_embd=size["d_model"], intermediate_size=size["d_ff"],
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    with fabric.init_module(empty_init=False):
        plain = GPT(config)
    plain.transformer.wte.weight = plain.lm_head.weight
    plain.load_state_dict(dict(litgpt_names(job.weights())))
    model = fabric.setup(torch.compile(plain))
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": LR, "betas": BETAS, "weight_decay": 0.0}}
    optimizer = instantiate_torch_optimizer(adamw, model.parameters(), fused=job.same_tricks)
    optimizer = fabric.setup_optimizers(optimizer)

    def step(k: int) -> None:
        inputs, labels = job.tensors(k)
        loss = chunked_cross_entropy(model(inputs), labels)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    seconds = timed(job.steps, step)
    plain.eval()
    with fabric.autocast():
        loss = held_out(job, plain)
    setting = f"precision {precision}, AdamW" + " fused" * job.same_tricks + ", compile"
    return answer(seconds, loss, plain, setting)


def litgpt_mixed(job: Job) -> dict[str, Any]:
    return litgpt(job, "bf16-mixed" if job.dtype == "bf16" else "32-true")


def litgpt_true(job: Job) -> dict[str, Any]:
    return litgpt(job, "bf16-true")


# --- the ceiling -----------------------------------------------------------------------------------------------------


def ceiling(job: Job) -> dict[str, Any]:
    """FLOP/s of the best of many products of two 2048 x 2048 matrices."""
    import torch

    n, dtype = 2048, torch.bfloat16 if job.dtype == "bf16" else torch.float32
    a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    best, until = float("inf"), time.perf_counter() + 2.0
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return {"flops": 2 * n**3 / best}


CONTESTANTS = {f.__name__: f for f in (ours, hf_trainer, hf_plain, hf_plain_bf16, litgpt_mixed, litgpt_true, ceiling)}

if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[2]))
    print("\n" + json.dumps(CONTESTANTS[job.who](job)))
