"""What a machine is like, and what of it costs speed or stops a run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

_GB = 1e9
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "datasets", "transformers")


@dataclass(frozen=True)
class Fact:
    """One line on the machine."""

    name: str
    told: str
    advice: str | None = None
    """What to do, where it is not as it should be."""
    fatal: bool = False
    """No run can be well with it."""


def facts(out: Path) -> Iterator[Fact]:
    """The machine, from where `out` would lie."""
    yield Fact("system", f"{platform.platform()}, Python {platform.python_version()}")
    yield from _packages()
    yield _threads()
    yield _memory()
    yield _disk(out)
    yield _allocator()
    yield from _devices()


def _packages() -> Iterator[Fact]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    yield Fact("packages", ", ".join(f"{name} {v}" for name, v in found.items()))
    wrong = []
    for line in _required():
        name, _, pinned = line.partition("==")
        if pinned and found.get(name, pinned).split("+")[0] != pinned.split("+")[0]:
            wrong.append(f"{name} {found[name]}, asked for {pinned}")
    if wrong:
        yield Fact("pins", "; ".join(wrong), "install llmkit's own versions: pip install -c constraints.txt llmkit")


def _required() -> list[str]:
    try:
        return [line.split(";")[0].strip() for line in requires("llmkit") or []]
    except PackageNotFoundError:
        return []


def _threads() -> Fact:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    told = f"{threads} of PyTorch's on {cores} cores this process may use, {torch.backends.cpu.get_cpu_capability()}"
    if threads > cores:
        return Fact("threads", told, f"they wait for each other: set OMP_NUM_THREADS={cores}")
    return Fact("threads", told)


def _memory() -> Fact:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    except (OSError, ValueError, IndexError):
        return Fact("memory", "unknown")
    total, free = found["MemTotal"], found["MemAvailable"]
    told = f"{free / _GB:.1f} of {total / _GB:.1f} GB are free"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text("ascii").strip()).isdecimal():
        told += f", this container may use {int(text) / _GB:.1f}"
    return Fact("memory", told, "close other programs, or lower batch.micro_tokens" if free < 1 * _GB else None)


def _disk(out: Path) -> Fact:
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    told = f"{free / _GB:.1f} GB are free at {folder}"
    if not os.access(folder, os.W_OK):
        return Fact("disk", told, "it can't be written to: choose another `out`", fatal=True)
    return Fact("disk", told, "checkpoints need some: delete old runs, or lower save.keep" if free < 2 * _GB else None)


def _allocator() -> Fact:
    loaded = os.environ.get("LD_PRELOAD", "")
    other = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in loaded), None)
    if other is not None:
        return Fact("allocator", f"{other} (LD_PRELOAD)")
    return Fact("allocator", f"{platform.libc_ver()[0] or 'the system'}'s; training tells glibc to keep what it frees")


def _devices() -> Iterator[Fact]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            told = torch.cuda.get_device_properties(i)
            free = torch.cuda.mem_get_info(i)[0]
            capability = f"{told.major}.{told.minor}"
            advice = None if told.major >= 8 else "it has no bf16: set precision to fp16"
            yield Fact(f"cuda:{i}", f"{told.name}, {free / _GB:.1f} of {told.total_memory / _GB:.1f} GB free, "
                                    f"capability {capability}", advice)  # fmt: skip
    elif Path("/proc/driver/nvidia/version").exists():
        yield Fact("cuda", "a driver is there, but PyTorch sees no GPU",
                   "check CUDA_VISIBLE_DEVICES, and that torch was built for CUDA (torch.version.cuda)")  # fmt: skip
    else:
        yield Fact("device", "mps" if torch.backends.mps.is_available() else "cpu")
