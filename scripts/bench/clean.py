"""What the rules of `clean: default` and the signatures of `dedup` cost: documents and megabytes a second on one core.

    python scripts/bench/clean.py [--repeats 5]

The text is data/demo/corpus.jsonl, half of it Chinese: as it is (short documents), and twenty joined to one (long).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llmkit.config import locate
from llmkit.data.config import CleanConfig, DedupConfig
from llmkit.data.dedup import SignatureWriter
from llmkit.data.filters import Cleaner


def clean(texts: list[str], folder: Path) -> None:
    cleaner = Cleaner(CleanConfig.model_validate("default"))
    for text in texts:
        cleaner.broken_rule(cleaner.edit(text))


def sign(kind: str) -> Callable[[list[str], Path], None]:
    def run(texts: list[str], folder: Path) -> None:
        writer = SignatureWriter(folder / "signatures", DedupConfig.model_validate(kind))
        for text in texts:
            writer.add(text)
        writer.close()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    short = [json.loads(line)["text"] for line in locate("data/demo/corpus.jsonl").read_text("utf-8").splitlines()]
    long = ["\n".join(short[i : i + 20]) for i in range(0, len(short), 20)]
    rates: dict[str, float] = {}
    print(f"{'':24s}{'documents/s':>12s}{'MB/s':>8s}")
    for size, texts in {"short": short, "long": long}.items():
        n_bytes = sum(len(t.encode()) for t in texts)
        for name, run in {"rules": clean, "exact": sign("exact"), "near": sign("near")}.items():
            best = float("inf")
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(repeats + 1):  # the first also builds the table of characters
                    start = time.process_time()
                    run(texts, Path(folder))
                    best = min(best, time.process_time() - start)
            rates[f"{size}_{name}_mb_per_s"] = round(n_bytes / best / 1e6, 2)
            print(f"{name:8s}{n_bytes / len(texts):8.0f} bytes  {len(texts) / best:12.0f}{n_bytes / best / 1e6:8.1f}")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
