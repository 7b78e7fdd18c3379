"""Text -> token ids on disk: `llmkit prepare` against `datasets.map` and nanoGPT's script, with equal ids.

    python scripts/bench/prepare.py [--mb 50] [--repeats 3] [--processes 4]

The text is the Python sources that come with the interpreter and its packages, one document a file, as jsonl. Ours is
timed from an empty cache, with reading and hashing; the others from a data set that `datasets` has already read.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import tokenizers

from llmkit.data.config import DataConfig
from llmkit.data.prepare import prepare
from llmkit.tokenizer import Tokenizer, TokenizerConfig

VOCAB_SIZE = 8192


def sources(n_bytes: int) -> list[str]:
    """Python files of the standard library, then of installed packages; repeated if they are too few."""
    paths = sysconfig.get_paths()
    stdlib = [p for p in sorted(Path(paths["stdlib"]).rglob("*.py")) if "site-packages" not in p.parts]
    texts: list[str] = []
    total = 0
    while total < n_bytes:
        for path in [*stdlib, *sorted(Path(paths["purelib"]).rglob("*.py"))]:
            text = path.read_bytes().decode("utf-8", "ignore")
            if text and total < n_bytes:
                texts.append(text)
                total += len(text.encode())
    return texts


class Bench:
    """The contestants; each returns what it wrote as one array."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, folder: Path, processes: int):
        self._tokenizer, self._folder, self._processes = tokenizer, folder, processes
        self._file = folder / "text.jsonl"
        with self._file.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        self._data = datasets.load_dataset(
            "json", data_files=str(self._file), split="train", cache_dir=str(folder / "hub")
        )
        tokenizer.save(folder / "tokenizer")
        self._backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        self._backend.encode_special_tokens = True
        self._run = 0

    def ours(self) -> np.ndarray:
        self._run += 1
        cfg = DataConfig(
            path=str(self._file),
            valid_frac=0.0,
            cache_dir=str(self._folder / f"cache{self._run}"),
            workers=self._processes,
        )
        shards = prepare(cfg, self._tokenizer, progress=False).train[0]
        return shards.tokens(0, shards.n_tokens)

    def _map(self, encode: Callable[[list[str]], list[list[int]]]) -> datasets.Dataset:
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        return self._data.map(
            lambda rows: {"ids": [[bos, *ids, eos] for ids in encode(rows["text"])]},
            batched=True,
            num_proc=self._processes,
            remove_columns=["text"],
        )

    def datasets_map(self) -> np.ndarray:
        backend = self._backend
        mapped = self._map(lambda texts: [e.ids for e in backend.encode_batch(texts)])
        return mapped.with_format("arrow")

    def datasets_map_fast(self) -> np.ndarray:
        backend = self._backend
        mapped = self._map(lambda texts: [e.ids for e in backend.encode_batch_fast(texts)])
        return mapped.with_format("arrow")

    def nanogpt(self) -> np.ndarray:
        """tiktoken in `datasets.map`, one document a call, then 1024 slices into a memory map."""
        tokenizer = self._tokenizer
        bos, eos = tokenizer.bos_id, tokenizer.eos_id

        def encode(row: dict[str, str]) -> dict[str, object]:
            ids = [bos, *tokenizer.encode(row["text"]), eos]
            return {"ids": ids, "len": len(ids)}

        mapped = self._data.map(encode, remove_columns=["text"], num_proc=self._processes)
        total = int(np.sum(mapped["len"], dtype=np.uint64))
        out = np.memmap(self._folder / "train.bin", np.uint16, "w+", shape=(total,))
        at, n_slices = 0, min(1024, len(mapped))
        for i in range(n_slices):
            part = mapped.shard(n_slices, i, contiguous=True).with_format("numpy")
            ids = np.concatenate(part["ids"])
            out[at : at + len(ids)] = ids
            at += len(ids)
        out.flush()
        return out


def flat(result: object) -> np.ndarray:
    """The ids as one array; of a mapped data set outside of what is timed."""
    if isinstance(result, np.ndarray):
        return result
    return np.concatenate([b["ids"].combine_chunks().values.to_numpy() for b in result.iter(1000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=float, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes fill the cores already
    datasets.disable_progress_bars()
    datasets.disable_caching()

    texts = sources(int(args.mb * 1e6))
    mb = sum(len(t.encode()) for t in texts) / 1e6
    tokenizer = Tokenizer.train(texts[: len(texts) // 5], TokenizerConfig(vocab_size=VOCAB_SIZE))
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(texts, tokenizer, Path(name), args.processes)
        contestants = [bench.ours, bench.datasets_map, bench.datasets_map_fast, bench.nanogpt]
        seconds: dict[str, list[float]] = {c.__name__: [] for c in contestants}
        expected = None
        for _ in range(args.repeats):
            for contestant in contestants:
                start = time.perf_counter()
                result = contestant()
                seconds[contestant.__name__].append(time.perf_counter() - start)
                ids = np.asarray(flat(result), np.int64)
                expected = ids if expected is None else expected
                if not np.array_equal(ids, expected):
                    raise SystemExit(f"{contestant.__name__}: its ids differ from ours")

    print(f"{mb:.1f} MB, {len(texts)} documents, {len(expected)} tokens, {args.processes} processes; equal ids\n")
    print(f"{'':20} {'median s':>9} {'min':>6} {'max':>6} {'MB/s':>6} {'ours is':>8}")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        ratio = median[name] / median["ours"]
        print(
            f"{name:20} {median[name]:9.2f} {min(times):6.2f} {max(times):6.2f} {mb / median[name]:6.1f} {ratio:7.1f}x"
        )
    ratios = {name: round(m / median["ours"], 2) for name, m in median.items() if name != "ours"}
    print(
        json.dumps(
            {"bench": "prepare", "mb": round(mb, 1), "mb_per_s": round(mb / median["ours"], 1), "ratios": ratios}
        )
    )


if __name__ == "__main__":
    main()
