"""What every test runs under: one thread a process, since the tests themselves run side by side."""

from __future__ import annotations

import os

import pytest

# Before torch is imported, and inherited by the processes that tests start. Threads that wait for others by spinning
# make a shared machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files that take long: begun first, so that nobody waits for them at the end.
LONG = (
    "test_readme.py",
    "test_fuzz.py",
    "test_parallel.py",
    "test_distill.py",
    "test_worked_examples.py",
    "test_doctor_faults.py",
    "test_posttrain_resume.py",
    "test_objectives.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
