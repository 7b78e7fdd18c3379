"""Mutated recipes and data files: each is valid, or one clear sentence with its place; no traceback, no leftovers.

What may be left behind: of a recipe that is wrong nothing at all; of data that is wrong the run's folder with its
recipe and log (the run was begun), but no checkpoint, no finished token shards and no temporary file.

Set LLMKIT_FUZZ_SEED to repeat a failure (it is printed) and LLMKIT_FUZZ_CASES for more than the normal run's.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from posttraining import tiny_model
from pydantic import BaseModel

from llmkit import config
from llmkit.cli import main
from llmkit.config import UserError
from llmkit.data import sources
from llmkit.stages import STAGES, load_recipe
from llmkit.tokenizer import Tokenizer, TokenizerConfig

SEED = int(os.environ.get("LLMKIT_FUZZ_SEED", "20240601"))
CASES = int(os.environ.get("LLMKIT_FUZZ_CASES", "300"))
CONFIGS = Path(__file__).parent.parent / "configs"
MOST_SECONDS = 20.0  # a case alone takes well under one; other tests may run beside it
TINY: dict[str, dict[str, Any]] = {
    "ppo": {
        "stage": "ppo",
        "out": "out",
        "tokenizer": {"kind": "byte"},
        "data": {"train": [{"path": "t.jsonl", "columns": {"prompt": "text"}}], "valid_frac": 0.2, "chat": False},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 2},
        "rewards": [{"kind": "numeric", "field": "label", "weight": 1.0}, {"kind": "length", "target": 2}],
        "update": {"minibatches": 1, "epochs": 1, "clip_low": 0.2},
        "critic": {"lr": 1e-3, "warmup_updates": 0},
        "steps": 1,
        "eval": {"every": 1, "max_prompts": 1},
        "log": {"tensorboard": False, "plot": False},
    },
    "grpo": {
        "stage": "grpo",
        "algorithm": "dapo",
        "out": "out",
        "tokenizer": {"kind": "byte"},
        "data": {"train": [{"path": "t.jsonl", "columns": {"prompt": "text"}}], "valid_frac": 0.2, "chat": False},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 2, "max_refills": 1},
        "rewards": [{"kind": "numeric", "field": "label", "weight": 1.0}, {"kind": "length", "target": 2}],
        "steps": 1,
        "eval": {"every": 1, "max_prompts": 1},
        "log": {"tensorboard": False, "plot": False},
    },
    "pretrain": {
        "stage": "pretrain",
        "out": "out",
        "tokenizer": {"kind": "byte"},
        "data": {"train": [{"path": "t.jsonl", "weight": 1.0}], "valid_frac": 0.2, "cache_dir": "cache"},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 32},
        "batch": {"tokens_per_step": 64},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "warmup_steps": 0},
        "steps": 1,
        "eval": {"every": 1, "samples": {"prompts": ["a"], "max_new_tokens": 2}},
        "log": {"tensorboard": False, "plot": False},
    },
    "sft": {
        "stage": "sft",
        "out": "out",
        "tokenizer": {"kind": "byte"},
        "data": {
            "train": [{"path": "t.jsonl", "columns": {"prompt": "text", "completion": "text"}}],
            "valid_frac": 0.2,
            "cache_dir": "cache",
            "max_dropped_frac": 1.0,
        },
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 128},
        "batch": {"examples_per_step": 2},
        "neftune_alpha": 5.0,
        "steps": 1,
        "eval": {"every": 1, "samples": {"prompts": ["a"], "max_new_tokens": 2}},
        "log": {"tensorboard": False, "plot": False},
    },
    "reward": {
        "stage": "reward",
        "objective": "classify",
        "out": "out",
        "tokenizer": {"kind": "byte"},
        "data": {"path": "t.jsonl", "valid_frac": 0.2, "cache_dir": "cache"},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 32},
        "batch": {"tokens_per_step": 64},
        "steps": 1,
        "log": {"tensorboard": False, "plot": False},
    },
    "dpo": {
        "stage": "dpo",
        "init_from": "nowhere",
        "out": "out",
        "data": {"path": "t.jsonl", "valid_frac": 0.2, "cache_dir": "cache"},
        "batch": {"examples_per_step": 4},
        "steps": 1,
        "log": {"tensorboard": False, "plot": False},
    },
    "distill": {
        "stage": "distill",
        "teacher": "../teacher",
        "out": "out",
        "data": {
            "train": [{"path": "t.jsonl", "columns": {"prompt": "text", "completion": "text"}}],
            "valid_frac": 0.2,
            "cache_dir": "cache",
            "max_dropped_frac": 1.0,
        },
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
        "losses": [{"kind": "soft", "weight": 1.0}, {"kind": "hidden", "layers": "last"}],
        "batch": {"examples_per_step": 4},
        "steps": 1,
        "log": {"tensorboard": False, "plot": False},
    },
    "tokenizer": {
        "stage": "tokenizer",
        "out": "out",
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "special": ["<|x|>"]},
        "data": {"path": "t.jsonl", "cache_dir": "cache"},
    },
}
ROWS = [{"text": f"row {i}: 山谷 the mill and the river {i * i}", "label": i % 3} for i in range(30)]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e-300, 1e300, 10**9, 10**18, 10**30, -(10**30), "", "x", "a b", "3",
    "1e-3", "yes", "中文", "a" * 300, "/dev/null", "/dev/null/x", "t.jsonl", ".", "\ud800", "\0", "../" * 3 + "nope/x",
    [], {}, [1], [[]], {"a": 1}, [None], ["x"], float("nan"), float("inf"),
]  # fmt: skip

GARBAGE = [
    b"\0", b"\xff\xfe", b"\t", b"\xef\xbb\xbf", b"%", b"&a *b", b"{", b"]", b"'", b"!!", b"\x1b[2J", b"\xed\xa0\x80",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    errors: list[str]
    seconds: float


def command(*argv: str) -> Ended:
    """Runs the command line in this process."""
    out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    return Ended(code, lines, time.perf_counter() - start)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small text, beside it a teacher; names that are no files are not looked up on the hub."""
    tiny_model(tmp_path / "teacher", Tokenizer.train([], TokenizerConfig(kind="byte")), seed=0, n_layers=1, d_model=16)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("t.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS), "utf-8")

    def no_hub(source: Any) -> Any:
        raise UserError(f"{source.path}: no such file or folder")

    monkeypatch.setattr(sources, "_hub", no_hub)
    return work


def leftovers(folder: Path) -> list[str]:
    """What no command may leave: checkpoints of a run that failed, and files under a temporary name."""
    odd = [p for p in folder.rglob("*") if ".tmp-" in p.name or p.name.startswith(".trash-")]
    return [str(p) for p in [*odd, *folder.rglob("checkpoints/step-*")]]


# --- recipes ---------------------------------------------------------------------------------------------------------


def paths_of(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from paths_of(value, (*path, key))


def change(data: Any, path: tuple[Any, ...], edit: Callable[[Any, Any], None]) -> Any:
    """A copy in which `edit(container, key)` was applied where `path` leads."""
    data = copy.deepcopy(data)
    node = data
    for key in path[:-1]:
        node = node[key]
    edit(node, path[-1])
    return data


def mutate_tree(rng: random.Random, data: Any) -> Any:
    """Drops, renames, duplicates, retypes, negates, enlarges or nests one value."""
    path = rng.choice(list(paths_of(data)))
    value = rng.choice(VALUES)

    def rename(node: Any, key: Any) -> None:
        if isinstance(node, dict):
            node[f"{key}{rng.choice(['s', '_', '.x', ' ', '中'])}"] = node.pop(key)

    edits: list[Callable[[Any, Any], None]] = [
        lambda node, key: node.pop(key),
        rename,
        lambda node, key: (
            node.update({rng.choice(["x", "lr", "base", "<<"]): node[key]}) if isinstance(node, dict) else None
        ),
        lambda node, key: node.__setitem__(key, value),
        lambda node, key: node.__setitem__(key, value),
        lambda node, key: node.__setitem__(key, -node[key] if isinstance(node[key], int | float) else [node[key]]),
        lambda node, key: node.__setitem__(key, node[key] * 10**6 if isinstance(node[key], int) else {key: node[key]}),
        lambda node, key: node.__setitem__(key, str(node[key])),
    ]
    return change(data, path, rng.choice(edits))


def mutate_text(rng: random.Random, text: bytes) -> bytes:
    """Cuts, doubles, swaps or indents lines, and puts bytes in that don't belong there."""
    lines, at = text.splitlines(keepends=True), rng.randrange(len(text))
    n = rng.randrange(len(lines))
    garbage = rng.choice(GARBAGE)
    edits: list[Callable[[], bytes]] = [
        lambda: text[:at],
        lambda: text[:at] + garbage + text[at:],
        lambda: text[:at] + bytes(rng.randrange(256) for _ in range(8)) + text[at + 8 :],
        lambda: b"".join(lines[:n] + lines[n + 1 :]),
        lambda: b"".join([*lines[:n], lines[n], *lines[n:]]),
        lambda: b"".join([*lines[:n], b"  " + lines[n], *lines[n + 1 :]]),
        lambda: b"".join(rng.sample(lines, len(lines))),
        lambda: text.replace(b": ", b":", 1),
        lambda: text.replace(b"\n", b"\r\n"),
        lambda: text + text,
        lambda: text.decode("utf-8").encode("utf-16"),
    ]
    return rng.choice(edits)()


def as_yaml(data: Any) -> bytes:
    return yaml.safe_dump(data, sort_keys=False, width=80).encode()  # ASCII: what isn't text is escaped


def mutants(rng: random.Random, n: int) -> Iterator[bytes]:
    """Half by value and half by text, from the tiny recipes and the shipped ones."""
    texts = [as_yaml(t) for t in TINY.values()] * 4 + [f.read_bytes() for f in sorted(CONFIGS.rglob("*.yaml"))]
    for i in range(n):
        text = rng.choice(texts)
        if i % 2:
            yield mutate_text(rng, text)
        else:
            data = yaml.safe_load(text)
            for _ in range(rng.choice([1, 1, 2])):
                data = mutate_tree(rng, data) if data else data
            yield as_yaml(data)


def is_small(recipe: Any) -> bool:
    """Whether it runs in a moment: what is valid but long is planned, not trained."""
    if recipe.stage == "tokenizer":
        return "demo" not in str(recipe.data.sources[0].path) and recipe.tokenizer.vocab_size < 10_000
    m, batch = recipe.model, recipe.batch
    sizes = (
        ()
        if m is None
        else (m.d_model, m.n_layers * 16, m.n_heads * 4, m.max_seq_len, (m.d_ff or 0) / 8, (m.vocab_size or 0) / 8)
    )
    if recipe.init_from is None and recipe.text_tokenizer.vocab_size > 10_000:
        return False
    long = recipe.last_step > 3 or batch.tokens_per_step > 4096 or any(size > 1024 for size in sizes)
    return not (long or recipe.compile or "demo" in recipe.data.sources[0].path)


def check_recipe(file: Path, folder: Path) -> str:
    """Runs one recipe and judges how it ended; returns a word for the statistics."""
    shown = file.read_bytes()[:2000]
    before = set(folder.rglob("*"))
    try:
        recipe = load_recipe(file)
    except UserError:
        ended = command("train", str(file))
        assert ended.code == 2, (ended, shown)
        assert ended.errors[0].startswith("error: "), (ended, shown)
        for line in [ended.errors[0].removeprefix("error: "), *ended.errors[1:]]:
            placed = re.match(rf"{re.escape(str(file))}:\d+(:\d+)?: \S", line) or re.match(
                rf"{re.escape(str(file))}: not ", line
            )
            assert placed or line.startswith("recipe not found: "), (line, shown)
            assert len(line) < 600, (line, shown)
        assert set(folder.rglob("*")) == before, "a wrong recipe left something behind"
        return "wrong"
    ended = command("train" if is_small(recipe) else "plan", str(file))
    assert ended.seconds < MOST_SECONDS, (ended, shown)
    assert ended.code in (0, 1, 2, 3), (ended, shown)
    if ended.code:
        mine = [line for line in ended.errors if line.startswith("error: ")]
        assert len(mine) == 1 and len(mine[0]) > 20, (ended, shown)
        # A run that stops itself keeps the checkpoints it had, as long as they are good.
        kept = sorted(folder.rglob("checkpoints/step-*")) if ended.code == 3 else []
        assert set(leftovers(folder)) == set(map(str, kept)), (ended, shown)
        assert all(command("verify", str(checkpoint)).code == 0 for checkpoint in kept), (ended, shown)
    if ended.code == 1:  # a folder that can't be written is the machine's fault
        assert "cannot be written" in ended.errors[-1] or "denied" in ended.errors[-1], (ended, shown)
    return {0: "valid", 2: "refused"}.get(ended.code, "stopped")


def clean(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_mutated_recipes(folder: Path) -> None:
    """F2: `CASES` mutants of tiny and shipped recipes, trained in this process where they are still valid."""
    rng = random.Random(SEED)
    counts: dict[str, int] = {}
    file = folder / "r.yaml"
    for i, text in enumerate(mutants(rng, CASES)):
        file.write_bytes(text)
        try:
            kind = check_recipe(file, folder)
        except BaseException:
            print(f"LLMKIT_FUZZ_SEED={SEED}, mutant {i}:\n{text[:3000]!r}")
            raise
        counts[kind] = counts.get(kind, 0) + 1
        clean(folder, {"t.jsonl", "r.yaml"})
    print(f"seed {SEED}: {counts}")
    assert counts["wrong"] > CASES / 3 and counts["valid"] > CASES / 20, f"no mixture: {counts}"


def fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a recipe, sections and their insides, by path; entries of lists are left to their own class."""
    for name, f in model.model_fields.items():
        yield (*path, name)
        for inner in config._models_in(f.annotation):
            if "tuple" not in str(f.annotation):
                yield from fields(inner, (*path, name))


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_with_every_wrong_value(stage: str, folder: Path) -> None:
    """13 of the values in each field (all in a longer run): accepted, or refused by file, line and the field's name."""
    file, n_refused, n_fields, rng = folder / "r.yaml", 0, 0, random.Random(SEED)
    model = STAGES[stage][0]
    for path in fields(model):
        n_fields += 1
        refused = 0
        tried = VALUES if CASES > 300 else rng.sample(VALUES, 13)
        for value in tried:
            data = copy.deepcopy(TINY[stage])
            node = data
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value
            file.write_bytes(as_yaml(data))
            try:
                load_recipe(file)
            except UserError as e:
                refused += 1
                for line in str(e).splitlines():
                    assert re.match(rf"{re.escape(str(file))}:\d+: ", line), (path, value, line)
                at = [line for line in str(e).splitlines() if any(key in line for key in path) or "is no text" in line]
                assert at, (path, value, str(e))
        assert refused >= len(tried) // 5, (path, refused)
        n_refused += refused
    print(f"seed {SEED}, {stage}: {n_fields} fields x {len(tried)} values, {n_refused} refused")


HUGE = {
    "model.d_model=1000000000": "parameters need",
    "model.d_ff=1000000000000": "parameters need",
    "model.vocab_size=1000000000000": "parameters need",
    "model.n_layers=1000000000": "less than or equal to 10000",
    "batch.tokens_per_step=1000000000000000": "less than or equal to",
    "batch.micro_tokens=1000000000000000": "less than or equal to",
    "tokenizer.vocab_size=1000000000000": "less than or equal to",
    "seed=100000000000000000000000": "less than",
    "model.max_seq_len=1000000000000": "tokens_per_step (64) is no multiple of the row length",
    "batch.tokens_per_step=65": "is no multiple of the row length 32: set 64 or 96",
    "out=t.jsonl": "t.jsonl: File exists",
    "out=t.jsonl/x": "t.jsonl/x: Not a directory",
    "out=" + "a" * 300: "File name too long",
    "out=": "out: expected a string",
    "data.cache_dir=" + "a" * 300: "File name too long",
    "init_from=" + "a" * 300: "File name too long",
    "tokenizer={kind: bpe, path: nowhere}": "nowhere: ",
    "init_from=nowhere": "nowhere: no such folder",
    "data.train.0.field=txt": "t.jsonl:1: no field 'txt' - did you mean 'text'?",
    "data.valid_frac=0.999999": "valid_frac holds out all",
}


@pytest.mark.parametrize("override", HUGE, ids=lambda o: o[:40])
def test_absurd_values_are_sentences(override: str, folder: Path) -> None:
    """Sizes that can't be, folders that are files: refused before anything is allocated or written."""
    (folder / "r.yaml").write_bytes(as_yaml(TINY["pretrain"]))
    ended = command("train", "r.yaml", override)
    assert ended.code in ((1, 2) if "cache_dir" in override else (2,)), ended
    assert len(ended.errors) == 1 and HUGE[override] in ended.errors[0] and ended.seconds < MOST_SECONDS, ended
    assert not leftovers(folder)


# --- data ------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> None:
    """The rows in the format that the name says."""
    rows = ROWS if rows is None else rows
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if name.endswith(".csv"):
        text = "text\n" + "\n".join(json.dumps(r["text"], ensure_ascii=False) for r in rows)
    elif name.endswith(".txt"):
        text = "\n".join(r["text"] for r in rows)
    elif name.endswith(".json"):
        text = json.dumps(rows, indent=1)
    else:
        text = "\n".join(json.dumps(r) for r in rows)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)


KINDS = ("d.jsonl", "d.json", "d.csv", "d.txt", "d.parquet", "d.jsonl.gz", "d.txt.gz")
ROW_EDITS: list[Any] = [
    {"text": 3}, {"text": None}, {"text": ["x"]}, {"text": {"a": 1}}, {"txt": "x"}, {}, [], 3, None, "text",
    {"text": ""}, {"text": "\ud800"}, {"text": "a\0b"}, {"text": "x" * 200_000}, {"text": True, "more": 1},
]  # fmt: skip


def mutate_file(rng: random.Random, path: Path) -> str:
    """Damages a data file by bytes, or one of its rows by value; says what it did."""
    if path.name == "d.jsonl" and rng.random() < 0.6:
        row, n = rng.choice(ROW_EDITS), rng.randrange(len(ROWS))
        lines = path.read_text("utf-8").splitlines()
        lines[n] = json.dumps(row)
        path.write_text("\n".join(lines), "utf-8")
        return f"row {n + 1} = {row!r}"[:80]
    raw = path.read_bytes()
    at, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
    edits: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut": lambda: raw[:at],
        "NUL": lambda: raw[:at] + b"\0" + raw[at:],
        "not UTF-8": lambda: raw[:at] + b"\xff\xfe\xfd" + raw[at:],
        "surrogate": lambda: raw[:at] + b"\xed\xa0\x80" + raw[at:],
        "bit": lambda: raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :],
        "hole": lambda: raw[:at] + bytes(len(raw[at : at + 64])) + raw[at + 64 :],
        "BOM": lambda: b"\xef\xbb\xbf" + raw,
        "CRLF": lambda: raw.replace(b"\n", b"\r\n"),
        "UTF-16": lambda: raw.decode("latin-1").encode("utf-16"),
        "tail": lambda: raw + bytes(rng.randrange(256) for _ in range(16)),
        "deep": lambda: raw[:at] + b"[" * 100_000,
        "blank": lambda: b" \n" * 10,
        "twice": lambda: raw + raw,
    }
    what = rng.choice(list(edits))
    path.write_bytes(edits[what]())
    return f"{what} at {at}"


def check_data(path: Path, folder: Path, run: str) -> str:
    ended = command(run, "r.yaml", f"data.train.0.path={path.name}")
    assert ended.code in (0, 2), ended
    assert ended.seconds < MOST_SECONDS, ended
    if ended.code == 0:
        return "valid"
    mine = [line for line in ended.errors if line.startswith("error: ")]
    assert len(mine) == 1 and mine[0].startswith(f"error: {path.name}"), ended
    whole_file = (
        r"broken or cut off|no text in it|holds out all|not UTF-8|a row is not UTF-8|cannot be read|longer than"
    )
    assert re.match(rf"error: {re.escape(path.name)}(:\d+|: row \d+): ", mine[0]) or re.search(whole_file, mine[0]), (
        mine
    )
    assert not leftovers(folder), leftovers(folder)
    if not re.search("no text in it|holds out all", mine[0]):  # those were read, and found to be empty
        assert not list(folder.glob("cache/*/*/index.json")), "a source that can't be read counts as prepared"
    return "refused"


def test_mutated_data_files(folder: Path) -> None:
    """F1: damaged files of every format: read as they are, or refused by file and line or row."""
    rng = random.Random(SEED + 1)
    counts: dict[str, int] = {}
    (folder / "r.yaml").write_bytes(as_yaml(TINY["pretrain"]))
    for i in range(CASES * 2 // 3):
        path = folder / rng.choice([*KINDS, "d.jsonl"])
        write_rows(path)
        what = mutate_file(rng, path)
        try:
            kind = check_data(path, folder, "train" if i % 8 == 0 else "prepare")
        except BaseException:
            print(f"LLMKIT_FUZZ_SEED={SEED}, file {i}: {path.name}: {what}")
            raise
        counts[kind] = counts.get(kind, 0) + 1
        clean(folder, {"t.jsonl", "r.yaml"})
    print(f"seed {SEED}: {counts}")
    assert min(counts["valid"], counts["refused"]) > CASES / 20, f"no mixture: {counts}"


def test_through_the_command_line(folder: Path) -> None:
    """Ten of them as a user meets them: exit 2, one message on stderr, nothing on stdout."""
    rng = random.Random(SEED + 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = 0
    for text in mutants(rng, 1000):
        (folder / "r.yaml").write_bytes(text)
        with contextlib.suppress(UserError):
            load_recipe(folder / "r.yaml")
            continue
        got = subprocess.run(
            [sys.executable, "-m", "llmkit.cli", "train", "r.yaml"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
        assert got.returncode == 2 and got.stdout == "", (got, text)
        assert got.stderr.startswith("error: r.yaml:") and "Traceback" not in got.stderr, (got, text)
        assert sorted(p.name for p in folder.iterdir()) == ["r.yaml", "t.jsonl"]
        done += 1
        if done == 10:
            return
