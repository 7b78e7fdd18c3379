"""How many programs a second the sandbox runs, beside starting a Python for each of them, which protects from nothing.

python scripts/bench/sandbox.py [--programs 200] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

from llmkit.sandbox.cage import Sandbox
from llmkit.sandbox.config import SandboxConfig
from llmkit.sandbox.verdict import Program

CODE, TEST = "def f(x):\n    return x + 1\n", "assert f(1) == 2"


def caged(sandbox: Sandbox, n: int) -> None:
    results = sandbox.run([Program(CODE, (TEST,))] * n)
    assert all(r.status == "passed" for r in results)


def bare(n: int) -> None:
    for _ in range(n):
        subprocess.run([sys.executable, "-I", "-S", "-c", CODE + TEST], check=True)


def rate(run: Callable[[int], None], n: int, repeats: int) -> float:
    """Programs a second, the best of some repeats."""
    run(max(1, n // 10))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run(n)
        best = min(best, time.perf_counter() - start)
    return n / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates = {"bare": rate(bare, args.programs // 4, args.repeats)}
    for n in (1, 2, 4):
        sandbox = Sandbox(SandboxConfig(workers=n))
        rates[f"workers_{n}"] = rate(lambda k, s=sandbox: caged(s, k), args.programs, args.repeats)
        sandbox.close()
    for name, value in rates.items():
        print(f"{name:12s}{value:8.0f} programs/s")
    print(json.dumps({name: round(value, 1) for name, value in rates.items()}))


if __name__ == "__main__":
    main()
