"""The command line as a user meets it: help, exit codes, streams, locales."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmkit.cli import EXIT_CODES, build_parser, main
from llmkit.commands import recipes
from llmkit.config import MachineError, TrainingStopped, UserError
from llmkit.inference.generate import generate
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer

COMMANDS = (
    "train",
    "prepare",
    "plan",
    "generate",
    "chat",
    "embed",
    "rank",
    "sample",
    "score",
    "compare",
    "eval",
    "bench",
    "serve",
    "verify",
    "merge",
    "export",
    "quantize",
    "average",
    "schema",
    "report",
    "sweep",
    "run",
    "lineage",
    "diff",
    "inspect",
    "doctor",
    "replay",
)
TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley.\n" * 60


def recipe_in(folder: Path, **more: Any) -> Path:
    """A recipe that trains in a moment, writing below `folder`."""
    (folder / "t.txt").write_text(TEXT, "utf-8")
    data = {
        "stage": "pretrain",
        "out": str(folder / "run"),
        "tokenizer": {"kind": "byte"},
        "data": {"path": str(folder / "t.txt"), "cache_dir": str(folder / "cache")},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
        "batch": {"tokens_per_step": 128},
        "steps": 3,
        "log": {"tensorboard": False, "plot": False},
        **more,
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(data), "utf-8")
    return folder / "r.yaml"


def llmkit(*argv: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", "llmkit.cli", *argv], capture_output=True, env=environment, timeout=120, **options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["train", str(recipe_in(folder))]) == 0
    return folder / "run"


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint, to be spoilt."""
    return Path(shutil.copytree(run / "checkpoints" / "step-00000003", tmp_path / "step-00000003"))


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


# --- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    assert e.value.code == 0 and f"usage: llmkit {command}" in capsys.readouterr().out


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and EXIT_CODES in out and all(f"\n    {c} " in out for c in COMMANDS)
    assert all(len(line) <= 120 for line in out.splitlines())


def test_wrong_usage_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys)
    assert code == 2 and "usage: llmkit" in out
    for argv in (
        ["trian"],
        ["train"],
        ["generate", "m"],
        ["generate", "m", "--prompt", "p", "--top-k", "x"],
        ["verify"],
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 2 and "error: " in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--version")
    assert code == 0 and out.strip().count(".") == 2


def test_errors_become_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence and a code for what is nobody's bug; a bug keeps its traceback."""

    def ending(error: BaseException) -> tuple[int, str, str]:
        def fail(_: Any) -> int:
            raise error

        monkeypatch.setattr(recipes, "_schema", fail)
        return said(capsys, "schema")

    assert ending(UserError("mend it")) == (2, "", "error: mend it\n")
    assert ending(MachineError("full")) == (1, "", "error: full\n")
    assert ending(TrainingStopped("NaN")) == (3, "", "error: NaN\n")
    assert ending(KeyboardInterrupt()) == (130, "", "interrupted\n")
    assert ending(BrokenPipeError()) == (0, "", "")
    assert ending(FileExistsError(17, "File exists", "x")) == (2, "", "error: x: File exists\n")
    assert ending(PermissionError(13, "Permission denied", "x")) == (1, "", "error: x: Permission denied\n")
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA"),
    ):
        code, _, err = ending(error)
        assert code == 1 and err.startswith("error: out of memory: lower batch.micro_tokens") and err.count("\n") == 1
    for bug in (
        KeyError("x"),
        RuntimeError("a bug"),
        FileNotFoundError(2, "No such file", "x"),
        UnicodeEncodeError("utf-8", "x", 0, 1, "y"),
    ):
        with pytest.raises(type(bug)):
            ending(bug)


# --- train, prepare, plan, schema ------------------------------------------------------------------------------------


def test_train_prepare_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """prepare makes the shards and nothing else; train uses them, and done again says that nothing is left to do."""
    recipe = str(recipe_in(tmp_path))
    code, out, _ = said(capsys, "plan", recipe, "steps=7")
    assert code == 0 and "in 7 steps" in out and not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    code, out, _ = said(capsys, "prepare", recipe)
    assert code == 0 and "documents" in out and not (tmp_path / "run" / "checkpoints").exists()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tokens")}
    assert stamps and said(capsys, "prepare", recipe)[0] == 0
    assert said(capsys, "train", recipe, "steps=2")[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tokens")} == stamps
    code, out, _ = said(capsys, "train", recipe, "steps=2")
    assert code == 0 and "finished: nothing to do" in out
    code, _, err = said(capsys, "train", recipe, "optim.lr=1", "steps=2")
    assert code == 2 and "optim.lr: 0.001 -> 1.0" in err and "allow_changes=true" in err


def test_training_that_stops_itself_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(
        capsys, "train", str(recipe_in(tmp_path)), "optim.lr=1e30", "optim.warmup_steps=0", "optim.clip=null"
    )
    assert code == 3 and err.splitlines()[-1].startswith("error: ")


def test_a_signal_is_exit_75_and_the_same_command_goes_on(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, steps=100_000, eval={"every": None})
    command = [sys.executable, "-m", "llmkit.cli", "train", str(recipe)]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and b"start again to go on" in out and b"Traceback" not in out
    assert (tmp_path / "run" / "PREEMPTED").is_file() and list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "schema")
    assert code == 0 and {"oneOf", "$defs"} <= set(json.loads(out))


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stdout is the continuation and a line end; the same seed gives the same text, another one another."""
    argv = ["generate", str(run), "--prompt", "The mill", "--max-new-tokens", "24"]
    code, out, err = said(capsys, *argv, "--seed", "3")
    assert code == 0 and err == "" and out.endswith("\n") and len(out) > 5
    assert said(capsys, *argv, "--seed", "3")[1] == out
    assert said(capsys, *argv, "--seed", "4")[1] != out
    assert said(capsys, *argv)[1] == said(capsys, *argv, "--seed", "0")[1], "the default is SamplingConfig's"
    greedy = said(capsys, *argv, "--temperature", "0", "--seed", "5")[1]
    assert greedy == said(capsys, *argv, "--temperature", "0")[1] == said(capsys, *argv, "--top-k", "1")[1]


def test_generate_is_what_the_library_makes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stream adds up to the text of the same call, whichever folder names the model."""
    folder = run / "checkpoints" / "step-00000003"
    from llmkit.inference.config import SamplingConfig

    tokenizer, sampling = Tokenizer.load(folder), SamplingConfig(max_new_tokens=30, temperature=0.8, seed=9)
    ids = [tokenizer.bos_id, *tokenizer.encode("山谷")]
    (result,) = generate(load_model(folder), [ids], sampling, tokenizer=tokenizer, seeds=[9])
    for model in (run, folder):
        argv = ["generate", str(model), "--prompt", "山谷", "--max-new-tokens", "30", "--seed", "9"]
        assert said(capsys, *argv)[1] == result.text + "\n"


def test_generate_stops_where_it_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(run), "--prompt", "The mill", "--max-new-tokens", "40", "--seed", "1"]
    whole = said(capsys, *argv)[1]
    stop = whole[5:7]
    assert said(capsys, *argv, "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"
    assert said(capsys, *argv, "--stop", "nowhere to be found", "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"


def test_generate_says_when_the_context_is_full(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "generate", str(run), "--prompt", "The mill", "--max-new-tokens", "5000")
    assert code == 0 and err in ("", "note: the context of 64 tokens is full\n")
    code, _, err = said(capsys, "generate", str(run), "--prompt", "x" * 500)
    assert code == 2 and "64" in err and err.count("\n") == 1


def test_candidates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of falling probabilities, no text."""
    code, out, _ = said(capsys, "generate", str(run), "--prompt", "The", "--candidates", "5")
    shares = [float(line.split("%")[0]) for line in out.splitlines()]
    assert code == 0 and len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
    assert len(said(capsys, "generate", str(run), "--prompt", "The", "--candidates", "100000")[1].splitlines()) > 200
    for k in ("0", "-1"):
        code, _, err = said(capsys, "generate", str(run), "--prompt", "The", "--candidates", k)
        assert code == 2 and "candidates: must be at least 1" in err


def test_a_draft_changes_no_greedy_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model as its own draft: all it proposes is taken."""
    greedy = ["generate", str(run), "--prompt", "The mill", "--temperature", "0", "--max-new-tokens", "24"]
    plain = said(capsys, *greedy)[1]
    code, out, err = said(capsys, *greedy, "--draft", str(run))
    n_taken, n_drafted = (int(word) for word in err.replace("draft's", "").split() if word.isdigit())
    assert code == 0 and out == plain and n_taken == n_drafted > 8
    code, out, _ = said(capsys, *greedy, "--draft", str(run), "--n", "2", "--temperature", "1")
    assert code == 0 and out.startswith("--- 1 of 2\n") and "\n--- 2 of 2\n" in out
    code, _, err = said(capsys, *greedy, "--draft-tokens", "2")
    assert code == 2 and "give --draft" in err
    code, out, _ = said(capsys, *greedy, "--draft", str(run), "--draft-tokens", "2")
    assert code == 0 and out == plain
    code, _, err = said(capsys, *greedy, "--draft", str(run), "--beams", "2")
    assert code == 2 and "drop --draft" in err


BAD_OPTIONS = {
    "--temperature=-1": "temperature: must be greater",
    "--temperature=nan": "finite",
    "--temperature=1e-9": "must be 0",
    "--top-k=-1": "top_k: must be greater",
    "--top-p=1.5": "top_p: must be less",
    "--min-p=-0.1": "min_p: must be greater",
    "--seed=-1": "seed: must be greater",
    "--max-new-tokens=0": "max_new_tokens: must be greater",
    "--stop=": "stop",
    "--device=cuda": "no CUDA device",
    "--system=be nice": "--system is for chat models",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_generate_refuses_bad_options(option: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if option == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    code, out, err = said(capsys, "generate", str(run), "--prompt", "x", option)
    assert code == 2 and out == "" and err.startswith("error: ") and BAD_OPTIONS[option] in err and err.count("\n") == 1


def test_bad_model_folders(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one sentence that names the folder or the file; nothing is printed on stdout."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "config.json").write_bytes(b"{")  # the manifest knows
    plain = {}
    for name, edit in {
        "json": lambda f: (f / "config.json").write_bytes(b"{"),
        "list": lambda f: (f / "config.json").write_text("[1]"),
        "bert": lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "weights": lambda f: (f / "model.safetensors").unlink(),
        "garbage": lambda f: (f / "model.safetensors").write_bytes(os.urandom(50_000)),
        "tokenizer": lambda f: (f / "tokenizer.json").unlink(),
        "token": lambda f: (f / "tokenizer.json").write_text('{"a": 1}'),
    }.items():
        plain[name] = Path(shutil.copytree(checkpoint, tmp_path / name))
        (plain[name] / "manifest.json").unlink()
        edit(plain[name])
    for model in ("nowhere", "empty", "file", "run", "broken", *plain):
        code, out, err = said(capsys, "generate", str(tmp_path / model), "--prompt", "x")
        assert code == 2 and out == "", (model, err)
        assert err.startswith("error: ") and model in err and err.count("\n") == 1, (model, err)


def test_a_lying_config_is_refused_at_once(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.json that claims a billion layers must not be built: generate and verify compare it with the file."""
    (checkpoint / "manifest.json").unlink()
    told = json.loads((checkpoint / "config.json").read_text("utf-8"))
    for key, value in (("num_hidden_layers", 10_000), ("hidden_size", 10**12), ("vocab_size", 10**15)):
        (checkpoint / "config.json").write_text(json.dumps({**told, key: value, "llmkit": "x"}))
        start = time.monotonic()
        code, _, err = said(capsys, "generate", str(checkpoint), "--prompt", "x")
        assert code == 2 and ("parameters" in err or "multiple" in err), err
        code, out, _ = said(capsys, "verify", str(checkpoint))
        assert code == 2 and out.count("\n") == 1 and time.monotonic() - start < 10


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_good_folders(run: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run (each of its checkpoints), a checkpoint, and a Hugging Face folder that has no manifest."""
    assert said(capsys, "verify", str(run)) == (0, f"{run / 'checkpoints' / 'step-00000003'}: ok\n", "")
    assert said(capsys, "verify", str(checkpoint))[:2] == (0, f"{checkpoint}: ok\n")
    (checkpoint / "manifest.json").unlink()
    shutil.rmtree(checkpoint / "trainer_state")
    assert said(capsys, "verify", str(checkpoint))[:2] == (0, f"{checkpoint}: ok\n")
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # as some writers repeat a tied tensor
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert said(capsys, "verify", str(checkpoint))[0] == 0


def test_verify_finds_a_flipped_bit_in_every_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        raw = file.read_bytes()
        at = len(raw) // 2
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        code, out, _ = said(capsys, "verify", str(checkpoint))
        assert code == 2 and str(file.relative_to(checkpoint)) in out and out.count("\n") == 1, out
        file.write_bytes(raw)
    assert said(capsys, "verify", str(checkpoint))[0] == 0


def test_verify_finds_what_does_not_belong(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a manifest: numbers that are not finite, missing, unknown and misshapen tensors, all of them."""
    (checkpoint / "manifest.json").unlink()
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if "mlp" in n)
    weights[name][0, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(weights, file)
    code, out, _ = said(capsys, "verify", str(checkpoint))
    assert code == 2 and out == f"{checkpoint}: model.safetensors: {name}: 2 values are not finite\n"
    del weights[name]
    weights["extra"] = torch.zeros(3)
    weights["model.norm.weight"] = torch.ones(7)
    weights["filler"] = torch.zeros(100_000)
    save_file(weights, file)
    code, out, _ = said(capsys, "verify", str(checkpoint))
    assert code == 2 and all(n in out for n in (name, "extra", "model.norm.weight", "nothing")) and out.count("\n") == 4


def test_verify_looks_into_the_trainer_state(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "manifest.json").unlink()
    file = next((checkpoint / "trainer_state").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    code, out, _ = said(capsys, "verify", str(checkpoint))
    assert code == 2 and f"trainer_state/{file.name}: {name}: 1 values are not finite" in out


def test_verify_of_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", str(tmp_path / "x")) == (2, "", f"error: {tmp_path / 'x'}: no such folder\n")
    assert "holds neither config.json nor checkpoints" in said(capsys, "verify", str(tmp_path))[2]


# --- terminals and locales -------------------------------------------------------------------------------------------

NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def test_chinese_under_a_locale_without_it(tmp_path: Path, run: Path) -> None:
    """B47: text is UTF-8 whatever the locale says: in recipes, arguments, logs and on stdout."""
    here = llmkit("generate", str(run), "--prompt", "从前", "--max-new-tokens", "20", env={"LC_ALL": "C.UTF-8"})
    there = llmkit("generate", str(run), "--prompt", "从前", "--max-new-tokens", "20", env=NO_UTF8)
    assert there.returncode == here.returncode == 0 and there.stdout == here.stdout, there.stderr
    recipe = recipe_in(tmp_path, steps=1, eval={"samples": {"prompts": ["从前"], "max_new_tokens": 4}})
    done = llmkit("train", str(recipe), env=NO_UTF8)
    assert done.returncode == 0 and "从前".encode() in done.stdout + done.stderr, done.stderr[-2000:]
    assert "从前" in (tmp_path / "run" / "train.log").read_text("utf-8")
    wrong = llmkit("plan", str(recipe), "学习率=1", env=NO_UTF8)
    assert wrong.returncode == 2 and "学习率: unknown key".encode() in wrong.stderr


def test_chinese_paths_under_a_locale_without_them(tmp_path: Path) -> None:
    """Either it works, or one sentence says what to set."""
    recipe = recipe_in(tmp_path, steps=1, out=str(tmp_path / "演示"))
    done = llmkit("train", str(recipe), env=NO_UTF8)
    assert b"Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 0 or (done.returncode == 2 and b"set LC_ALL=C.UTF-8" in done.stderr), done.stderr[-2000:]
    renamed = recipe.rename(tmp_path / "配方.yaml")
    done = llmkit("plan", str(renamed), env=NO_UTF8)
    assert done.returncode in (0, 2) and b"Traceback" not in done.stderr, done.stderr[-2000:]


def test_arguments_that_are_no_text(run: Path) -> None:
    """Bytes that aren't UTF-8, as a terminal in another encoding sends them."""
    argv: list[Any] = [sys.executable, "-m", "llmkit.cli", "generate", str(run), "--prompt", b"caf\xe9"]
    done = subprocess.run(argv, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, done.stderr


# As a shell has it: with a buffer, what is wrong with stdout shows only when that is flushed.
BUFFERED = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


@pytest.mark.parametrize("command", ["schema", "plan configs/tokenizer/demo.yaml", "generate RUN --prompt x"])
def test_a_reader_that_leaves(command: str, run: Path) -> None:
    """`llmkit ... | head -1` is no error, and says nothing, whether much is written or little."""
    argv = f"{sys.executable} -m llmkit.cli {command.replace('RUN', str(run))}"
    script = f"{{ sleep 0.5; {argv}; }} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120, env=BUFFERED)
    assert (done.returncode, done.stderr) == (0, b"")


def test_training_whose_reader_leaves_is_not_done(tmp_path: Path) -> None:
    """Nobody may take a run for finished that isn't: the code is 1, and the same command goes on."""
    argv = f"{sys.executable} -m llmkit.cli train {recipe_in(tmp_path, steps=40, log={'every': 1, 'plot': False})}"
    done = subprocess.run(
        ["bash", "-c", f"{argv} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=120, env=BUFFERED
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"start again to go on" in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "run" / "DONE").exists()
    assert llmkit("train", str(tmp_path / "r.yaml")).returncode == 0 and (tmp_path / "run" / "DONE").is_file()


def test_no_stdout_at_all() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m llmkit.cli schema >&-"], capture_output=True, timeout=120
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    if Path("/dev/full").exists():
        for command in ("schema", "plan configs/tokenizer/demo.yaml"):
            script = f"{sys.executable} -m llmkit.cli {command} > /dev/full"
            done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120, env=BUFFERED)
            assert done.returncode in (1, 120) and b"error: No space left on device" in done.stderr, done.stderr


def test_the_entry_points_agree() -> None:
    """`llmkit`, `python -m llmkit.cli` and scripts/train.py are the same program."""
    script = Path(__file__).parent.parent / "scripts" / "train.py"
    done = subprocess.run(
        [sys.executable, str(script), "configs/pretrain/demo.yaml", "x=1"], capture_output=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith(b"error: override 'x=1': x: unknown key")
    assert build_parser().prog == "llmkit"


def test_training_leaves_no_thread_behind(tmp_path: Path) -> None:
    """Whoever calls it in a process of his own gets that back as it was (tqdm keeps one monitor)."""
    before = set(threading.enumerate())
    assert main(["train", str(recipe_in(tmp_path))]) == 0
    assert not [t.name for t in threading.enumerate() if t.name == "prefetch" and t not in before]
