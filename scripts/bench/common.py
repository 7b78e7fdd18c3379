"""What the benches share: fresh processes, interleaved repeats, medians and spreads, a table, a JSON last line."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
# glibc's own switches, read at start-up: allocate below 1 GiB from the heap, and don't hand it back to the system.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def interleaved(contestants: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Runs A B C A B C ..., so that what else the machine does falls on all alike."""
    results: dict[str, list[T]] = {name: [] for name in contestants}
    for i in range(repeats):
        for name, run in contestants.items():
            print(f"repeat {i + 1}/{repeats}: {name}", file=sys.stderr, flush=True)
            results[name].append(run())
    return results


def in_fresh_process(
    script: Path, job: dict[str, Any], python: str = sys.executable, env: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Runs `script --worker JOB` and reads the last line it prints. None, with its last words shown, if it failed."""
    command = [python, str(script), "--worker", json.dumps(job)]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        print(f"failed ({done.returncode}): {job.get('who', job)}\n{last}", file=sys.stderr, flush=True)
        return None
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def spread(values: Iterable[float], digits: int = 2) -> str:
    """min-max."""
    values = list(values)
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as needed; the first, and every column of words, to the left."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    words = [i == 0 or all(not row[i].lstrip("+-")[:1].isdigit() for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, words, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags: list[str] = []
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        model = named.get("model name", model)
        flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in named.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": model, "units": flags, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "memory_gb": round(memory, 1), "python": platform.python_version(), "torch": version("torch"),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def introduce(bench: str) -> dict[str, Any]:
    """Prints the machine, and a warning if it is not quiet."""
    facts = machine()
    print(f"{bench}: " + ", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    if facts["load"] > 0.3 * (facts["cores"] or 1):
        print("WARNING: the machine is busy: these figures will not hold", flush=True)
    return facts


def finish(bench: str, **facts: Any) -> None:
    """The last line."""
    print(json.dumps({"bench": bench, **facts}), flush=True)


def tcmalloc() -> str | None:
    """Path of tcmalloc if it is installed (Debian: libtcmalloc-minimal4)."""
    folders = [*Path("/usr/lib").glob("*-linux-gnu*"), Path("/usr/lib64"), Path("/usr/local/lib")]
    return next((str(f / name) for f in folders for name in TCMALLOC if (f / name).exists()), None)


def allocator_for_all() -> tuple[str, dict[str, str]]:
    """A name and the environment that makes any program keep freed memory."""
    library = tcmalloc()
    return ("tcmalloc", {"LD_PRELOAD": library}) if library else ("glibc, memory kept", KEEP_MEMORY)


# --- memory of this process ------------------------------------------------------------------------------------------


def reset_peak() -> int:
    """Forgets the peak so far; returns the bytes in use now.

    Linux alone can forget. There ru_maxrss would not do: a new process inherits the peak of the one that started it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak()


def peak() -> int:
    """Most bytes in use since `reset_peak`."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
