"""`llmkit verify`: is a checkpoint whole, does it belong together, are its numbers finite?"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmkit.config import UserError
from llmkit.model.gpt import GPT
from llmkit.model.hf import read_config, read_tensors, shapes_of, weight_files
from llmkit.storage import MANIFEST, Damaged, checkpoints_of, verify


def problems_of(folder: Path) -> list[str]:
    """Everything wrong with one model folder, a sentence each; empty if it is good.

    With a manifest: sizes and hashes of all files. Always: tensor names and shapes against config.json, and that every
    number of every tensor is finite.
    """
    import torch

    problems = []
    if (folder / MANIFEST).exists():
        try:
            verify(folder)
        except Damaged as e:
            return [str(e)]  # no use in reading on
    try:
        with torch.device("meta"):
            own = {n: tuple(p.shape) for n, p in GPT(read_config(folder)).named_parameters()}
        files = weight_files(folder)
        found = shapes_of(files)
        for name in sorted(own.keys() | found.keys()):
            if own.get(name) != found.get(name):
                problems.append(f"{name}: config.json asks for {own.get(name, 'nothing')}, found {found.get(name, 'nothing')}")
        for file in [*files, *sorted((folder / "trainer_state").glob("*.safetensors"))]:
            for name, tensor in read_tensors(file):
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    problems.append(f"{file.relative_to(folder)}: {name}: {int((~tensor.isfinite()).sum())} values are not finite")
    except UserError as e:
        problems.append(str(e))
    return problems


def run(args: argparse.Namespace) -> int:
    """Prints one line a folder, `ok` or what is wrong; returns 2 if anything is."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = checkpoints_of(folder) or [folder]
    bad = 0
    for one in folders:
        problems = problems_of(one)
        bad += bool(problems)
        print("\n".join(f"{one}: {p}" for p in problems) or f"{one}: ok")
    return 2 if bad else 0
