"""Checks of whole runs: what a checkpoint holds, going on from one, several processes, and transformers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.config import dump
from llmkit.model.adapters import is_adapter
from llmkit.model.heads import SequenceClassifier
from llmkit.model.weights import load_classifier, load_model
from llmkit.stages import stage_module
from llmkit.storage import checkpoints_of, verify
from llmkit.tools.doctor.check import Check
from llmkit.tools.doctor.patient import STEPS, NotHere, Patient, Trainer
from llmkit.tools.opening import task_of
from llmkit.training import checkpoint
from llmkit.training.log import read_lines
from llmkit.training.loop import train

_TIMEOUT_S = 60.0


def _run(patient: Patient, name: str, **changes: Any) -> Path:
    """Trains the small network as `llmkit train` does, silently; the run's folder."""
    out = patient.folder / name
    recipe = patient.small.model_copy(update={"out": str(out), **changes})
    with contextlib.redirect_stdout(io.StringIO()):
        stage_module(recipe).run(recipe)
    return out


def _straight(patient: Patient) -> Path:
    out = patient.folder / "straight"
    return out if (out / "DONE").is_file() else _run(patient, "straight")


def _resume(patient: Patient) -> str | None:
    whole, parts = _straight(patient), None
    for stop in (3, None):
        parts = _run(patient, "parts", stop_at=stop)
    assert parts is not None
    lines = [(run / "metrics.jsonl").read_text("utf-8").splitlines() for run in (whole, parts)]
    for number, (a, b) in enumerate(zip(*lines, strict=False), 1):
        if a != b:
            one, two = json.loads(a), json.loads(b)
            keys = [k for k in one if one[k] != two.get(k)]
            return f"after going on, line {number} of metrics.jsonl has another {', '.join(keys[:4])}"
    tensors = [checkpoint.load(checkpoints_of(run)[0])[0] for run in (whole, parts)]
    for file, mine in tensors[0].items():
        for name, tensor in mine.items():
            if not torch.equal(tensor, tensors[1][file][name]):
                return f"after going on, {name} of {file} is another"
    return None if len(lines[0]) == len(lines[1]) else "a run that went on has another number of lines in metrics.jsonl"


def _probe(module: Any) -> Tensor:
    """What a network says of some ids: logits, or scores."""
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        module.eval()
        if isinstance(module, SequenceClassifier):
            found: Tensor = module(ids, torch.tensor([12, 12]))
        else:
            found = module.logits(module(ids))
        module.train()
    return found.double()


def _saved(patient: Patient) -> tuple[Path, Tensor]:
    """A checkpoint in fp32, and what the network in training said of the probe when it was written."""
    recipe = patient.small.model_copy(
        update={"out": str(patient.folder / "saved"), "precision": "fp32", "steps": 2, "allow_changes": True}
    )
    if "llmkit_probe" not in patient.__dict__:
        task, seen = task_of(recipe), []
        files = task.files

        def watching(engine: Any) -> Any:
            seen.append(_probe(Trainer(task, None, engine).policy))  # type: ignore[arg-type]
            return files(engine)

        task.files = watching  # type: ignore[method-assign]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train(recipe, task)
        finally:
            getattr(task, "close", lambda: None)()
        patient.__dict__["llmkit_probe"] = seen[-1]
    folder = checkpoints_of(Path(recipe.out))[0]
    return folder, patient.__dict__["llmkit_probe"]


def _save_load(patient: Patient) -> str | None:
    folder, said = _saved(patient)
    verify(folder)
    if is_adapter(folder):
        raise NotHere("lora: a checkpoint holds adapters; see `llmkit verify`")
    load = load_model if said.shape[-1] == patient.shape.vocab_size else load_classifier
    again = _probe(load(folder))
    off = float((said - again).abs().max())
    return None if off <= 1e-5 else f"what was saved says otherwise than what was trained (by {off:.2g})"


def _transformers(patient: Patient) -> str | None:
    folder, said = _saved(patient)
    if is_adapter(folder):
        raise NotHere("lora: a checkpoint holds adapters for PEFT")
    try:
        import transformers
    except ImportError:
        raise NotHere("transformers is not installed") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    classes = {True: "AutoModelForCausalLM", False: "AutoModelForSequenceClassification"}
    is_writer = said.shape[-1] == patient.shape.vocab_size
    name = classes[is_writer] if patient.shape.causal or not is_writer else "AutoModelForMaskedLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if odd := sorted(str(k) for k in [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]):
        return f"transformers misses or doesn't know {odd[0]} ({len(odd)} such)"
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        given = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()
    off = float((given - said).abs().max())
    return None if off <= 1e-3 * max(1.0, float(said.abs().max())) else f"its answers are off by {off:.2g}"


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def _ranks(patient: Patient) -> str | None:
    """Two processes make the steps of one."""
    if sys.platform == "win32":
        raise NotHere("torch.distributed over gloo is tried on Linux and macOS")
    alone, out = _straight(patient), patient.folder / "two"
    recipe, file = patient.small.model_copy(update={"out": str(out)}), patient.folder / "two.yaml"
    file.write_text(dump(recipe), "utf-8")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "llmkit.cli", "train", str(file)]
    started = [
        subprocess.Popen(
            argv, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=_TIMEOUT_S)[1] for process in started]
    except subprocess.TimeoutExpired:
        return f"two processes were not done after {_TIMEOUT_S:.0f} s"
    finally:
        for process in started:
            process.kill()
            process.wait()
    for rank, process in enumerate(started):
        if process.returncode:
            return (
                f"rank {rank} ended with {process.returncode}: {(errors[rank].strip().splitlines() or ['?'])[-1][:200]}"
            )
    records = [[r for r in read_lines(run / "metrics.jsonl") if "train/loss" in r] for run in (alone, out)]
    if len(records[1]) != STEPS:
        return f"two processes made {len(records[1])} of {STEPS} steps"
    for one, two in zip(*records, strict=True):
        if one["train/data_hash"] != two["train/data_hash"]:
            return f"step {one['step']}: two processes read other tokens than one"
        for key in ("train/loss", "train/grad_norm"):
            if abs(one[key] - two[key]) > 1e-7 * max(1.0, abs(one[key])):
                return f"step {one['step']}: {key} is {one[key]:.9g} on one process and {two[key]:.9g} on two"
    return None


CHECKS = (
    Check("resume", "a run that was interrupted ends with the same bits", "something that changes and is not saved",
          "derive it from (seed, step), or put it into state_dict", _resume, ("save-load",)),
    Check("save-load", "what is loaded says what was saved", "a name, layout or precision lost on the way",
          "see `llmkit verify`; compare config.json with the recipe", _save_load, ("gradients", "first-loss")),
    Check("transformers", "plain transformers loads a checkpoint, and says the same", "a config.json that describes "
          "another network", "see the nearest family in docs/models.md", _transformers, ("save-load", "causality")),
    Check("ranks", "two processes make the steps of one", "gradients averaged over ranks, or rows read twice",
          "sum gradients, divide by the step's count; cut rows by (rank, world)", _ranks,
          ("rank-shares", "accumulation", "resume")),
)  # fmt: skip
