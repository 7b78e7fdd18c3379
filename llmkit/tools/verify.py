"""`llmkit verify`: is a checkpoint whole, does it belong together, are its numbers finite?"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmkit.config import UserError
from llmkit.model.adapters import WEIGHTS, base_of, is_adapter, read_adapter
from llmkit.model.config import count_params
from llmkit.model.gpt import GPT
from llmkit.model.heads import SequenceClassifier
from llmkit.model.hf import read_config, read_labels
from llmkit.model.layouts import canonical_names
from llmkit.model.quantization import stored_shapes
from llmkit.model.weights import checkpoint_shapes, misfits, quantization_in, read_tensors, shapes_of, weight_files
from llmkit.storage import MANIFEST, Damaged, checkpoints_of, verify


def problems_of(folder: Path) -> list[str]:
    """Everything wrong with one model folder, a sentence each; empty if it is good.

    With a manifest: sizes and hashes of all files. Always: tensor names and shapes against config.json, and that every
    number of every tensor is finite. Of adapters: that they fit their base, and that it is the one they belong to.
    """
    import torch

    problems = []
    if (folder / MANIFEST).exists():
        try:
            verify(folder)
        except Damaged as e:
            return [str(e)]  # no use in reading on
    try:
        if is_adapter(folder):
            return _adapter_problems(folder)
        config, files, labels = read_config(folder), weight_files(folder), read_labels(folder)
        if labels is not None:
            config = config.model_copy(update={"tie_embeddings": True})  # a classifier has no head for words
        n_params, on_disk = count_params(config).total, sum(file.stat().st_size for file in files)
        quantization = quantization_in(folder)
        least_bits = 8 if quantization is None else quantization.bits
        if (
            n_params * least_bits > on_disk * 8
        ):  # a config.json may claim anything: nothing is built before this is known
            return [f"config.json asks for {n_params} parameters, the weights are {on_disk} bytes"]
        with torch.device("meta"):
            model = GPT(config) if labels is None else SequenceClassifier(config, len(labels))
        raw = shapes_of(files)
        if quantization is not None:
            return misfits(stored_shapes(model, quantization), raw) + _not_finite(folder, files)
        own = checkpoint_shapes(model)
        found = {name: raw[old] for old, name in canonical_names(config, raw).items()}
        if config.tie_embeddings:
            found.pop("lm_head.weight", None)  # some writers repeat the tied tensor
        problems += misfits(own, found)
        problems += _not_finite(folder, files)
    except UserError as e:
        problems.append(str(e))
    return problems


def _not_finite(folder: Path, files: list[Path]) -> list[str]:
    """Tensors of weights and training state with a NaN or an infinity."""
    problems = []
    for file in [*files, *sorted((folder / "trainer_state").glob("*.safetensors"))]:
        for name, tensor in read_tensors(file):
            if tensor.is_floating_point() and (n_bad := int((~tensor.isfinite()).sum())):
                problems.append(f"{file.relative_to(folder)}: {name}: {n_bad} values are not finite")
    return problems


def _adapter_problems(folder: Path) -> list[str]:
    """What is wrong with adapters; raises UserError for what can't be read, or a base that is another."""
    import torch

    labels, base = read_labels(folder), base_of(folder, check=True)
    if problems := problems_of(base):
        return [f"its base {base}: {line}" for line in problems]
    config = read_config(base)
    with torch.device("meta"):
        model = GPT(config) if labels is None else SequenceClassifier(config, len(labels))
    read_adapter(folder, config).check({name: tuple(p.shape) for name, p in model.named_parameters()})
    return _not_finite(folder, [folder / WEIGHTS])


def run(args: argparse.Namespace) -> int:
    """Prints one line a folder, `ok` or what is wrong; returns 2 if anything is."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = checkpoints_of(folder) or [folder]
    known = (MANIFEST, "config.json", "adapter_config.json")
    if folders == [folder] and not any((folder / name).is_file() for name in known):
        raise UserError(f"{folder}: holds neither config.json nor checkpoints: give a run, a checkpoint or a model")
    bad = 0
    for one in folders:
        problems = problems_of(one)
        bad += bool(problems)
        print("\n".join(f"{one}: {p}" for p in problems) or f"{one}: ok")
    return 2 if bad else 0
