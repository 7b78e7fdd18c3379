"""Checkpoint folders: whole or not at all, and never trusted unchecked. Goals C1, C2, C6, C10 and B115."""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import reliability
from reliability import Crash, ShimDisk, flip_bit, good_steps

from llmkit import storage
from llmkit.config import MachineError, UserError
from llmkit.storage import Damaged, Draft, newest_good, read_manifest, resolve_model, run_lock, step_name, sweep, verify

PACKAGE = Path(storage.__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    assert reliability.train(reliability.tiny_recipe(folder, steps=8)) == 0
    assert good_steps(folder / "run") == [8, 4]
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def damage_of(folder: Path) -> str:
    with pytest.raises(Damaged) as error:
        verify(folder)
    return str(error.value)


# --- C1, C2: damage is seen ------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(run: Path) -> None:
    """C1, B98: 500 single-bit flips over all files, each file's first and last bit among them."""
    newest = run / "checkpoints" / step_name(8)
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    assert newest / "manifest.json" in files and len(files) >= 7
    pick = random.Random(1)
    flips = [(f, bit) for f in files for bit in (0, 8 * f.stat().st_size - 1)]
    manifest = newest / "manifest.json"
    flips += [(manifest, pick.randrange(8 * manifest.stat().st_size)) for _ in range(100)]
    while len(flips) < 500:
        file = pick.choice(files)
        flips.append((file, pick.randrange(8 * file.stat().st_size)))
    for file, bit in flips:
        flip_bit(file, bit)
        good, passed_over = newest_good(run)
        assert good == run / "checkpoints" / step_name(4), (file, bit)
        assert list(passed_over) == [newest]
        assert file.relative_to(newest).as_posix() in passed_over[newest]
        flip_bit(file, bit)
    assert newest_good(run) == (newest, {})


@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer_state/optimizer.safetensors", "manifest.json", "config.json"]
)
def test_every_truncation_is_seen(run: Path, name: str) -> None:
    """C2: at 0, 1, 8 bytes, around the safetensors header, at every 64th and at the last byte."""
    file = run / "checkpoints" / step_name(8) / name
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else 2
    sizes = {0, 1, 8, header - 1, header, header + 1, len(content) - 1, *(len(content) * i // 64 for i in range(64))}
    for size in sorted(s for s in sizes if s < len(content)):
        file.write_bytes(content[:size])
        assert name in damage_of(file.parents[name.count("/")])
    file.write_bytes(content + b"\0")
    assert name in damage_of(file.parents[name.count("/")])


def test_holes_and_missing_extra_swapped_files_are_seen(run: Path) -> None:
    """C2, B96, B99."""
    newest, older = (run / "checkpoints" / step_name(s) for s in (8, 4))
    model = newest / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:4096] + bytes(4096) + content[8192:])
    assert "model.safetensors: its SHA-256" in damage_of(newest)
    model.write_bytes((older / "model.safetensors").read_bytes())  # of the same size
    assert "model.safetensors: its SHA-256" in damage_of(newest)
    model.unlink()
    assert damage_of(newest) == "model.safetensors: missing"
    model.symlink_to(newest / "nowhere")
    assert "model.safetensors: cannot be read" in damage_of(newest)
    model.unlink()
    model.write_bytes(content)
    (newest / "stray.bin").write_bytes(b"")
    assert damage_of(newest) == "stray.bin: not named in the manifest"
    (newest / "stray.bin").unlink()
    (newest / ".cache").mkdir()
    (newest / ".cache" / "of_a_hub_client").write_text("harmless")
    verify(newest)
    (newest / "manifest.json").write_bytes((older / "manifest.json").read_bytes())
    assert "manifest.json: of step 4: the folder was renamed" in damage_of(newest)
    (newest / "manifest.json").unlink()
    assert "not finished" in damage_of(newest)


def test_a_folder_under_another_step_s_name_is_not_trusted(run: Path) -> None:
    """B112: names are counters."""
    shutil.copytree(run / "checkpoints" / step_name(8), run / "checkpoints" / step_name(12))
    good, passed_over = newest_good(run)
    assert good == run / "checkpoints" / step_name(8) and "of step 8" in next(iter(passed_over.values()))


def test_a_manifest_of_a_later_format_is_refused(run: Path) -> None:
    newest = run / "checkpoints" / step_name(8)
    body = {k: v for k, v in read_manifest(newest).items() if k != "sha256"}
    (newest / "manifest.json").write_bytes(storage._seal({**body, "format": 99}))
    assert "format 99" in damage_of(newest)


def test_folders_of_every_unfinished_kind_are_not_checkpoints(run: Path) -> None:
    """B96, B97: names that almost match, an empty one, a file, half a save."""
    names = (
        "step-00000099.tmp-0a1b2c3d",
        ".trash-step-00000099-0a1b2c3d",
        "step-99",
        "step-00000099x",
        "step-00000098",
    )
    for name in names:
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00000097").write_text("a file")
    good, passed_over = newest_good(run)
    assert good == run / "checkpoints" / step_name(8)
    assert [p.name for p in passed_over] == ["step-00000098"]


def test_a_damaged_checkpoint_given_by_name_is_refused(run: Path) -> None:
    newest = run / "checkpoints" / step_name(8)
    assert resolve_model(run) == newest
    flip_bit(newest / "model.safetensors", 70_000)
    assert resolve_model(run) == run / "checkpoints" / step_name(4)
    with pytest.raises(UserError, match=r"damaged checkpoint: model.safetensors"):
        resolve_model(newest)
    shutil.rmtree(run / "checkpoints" / step_name(4))
    with pytest.raises(UserError, match=r"no good checkpoint.*passed over"):
        resolve_model(run)


# --- sweeping, replacing, locking ------------------------------------------------------------------------------------


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    gone = ["step-00000001.tmp-0a1b2c3d", ".trash-step-00000001-0a1b2c3d"]
    stay = ["step-00000001", "damaged-step-00000001-0a1b2c3d", "my-notes", "step-1.tmp-notes"]
    for name in gone + stay:
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "file").write_text("x")
    (tmp_path / ".recipe.yaml.tmp-0a1b2c3d").write_text("half")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / ".tokenizer.json.tmp-0a1b2c3d").write_text("half")
    (tmp_path / ".mine.tmp-notes").write_text("x")
    sweep(tmp_path)
    assert sorted(p.name for p in checkpoints.iterdir()) == sorted(stay)
    assert [p.name for p in (tmp_path / "tokenizer").iterdir()] == []
    assert (tmp_path / ".mine.tmp-notes").exists() and not (tmp_path / ".recipe.yaml.tmp-0a1b2c3d").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B93, B97: a crash at every operation leaves the old content or the new."""
    file = tmp_path / "recipe.yaml"
    monkeypatch.setattr(storage, "disk", counting := ShimDisk())
    storage.replace_file(file, "old" * 100)
    for at in range(1, len(counting.operations) + 1):
        for half in (False, True):
            file.write_text("old" * 100)
            monkeypatch.setattr(storage, "disk", ShimDisk(at, half=half))
            with pytest.raises(Crash):
                storage.replace_file(file, "new" * 100)
            assert file.read_text() in ("old" * 100, "new" * 100)
            monkeypatch.setattr(storage, "disk", ShimDisk())
            sweep(tmp_path)
            assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(ShimDisk):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[:7])

    monkeypatch.setattr(storage, "disk", Slow())
    record = storage.write_file(tmp_path / "f", [b"0123456789" * 10, b""])
    assert (tmp_path / "f").read_bytes() == b"0123456789" * 10
    assert record == storage.FileRecord(100, storage.sha256_of(tmp_path / "f"))


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_get_the_mode_the_user_asked_for(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    """B115: a temporary file's 0600 must not become the checkpoint's."""
    old = os.umask(mask)
    try:
        draft = Draft(tmp_path / "run" / step_name(1), 100)
        draft.write("trainer_state/state.json", [b"{}"])
        draft.commit({"step": 1})
        storage.replace_file(tmp_path / "run" / "recipe.yaml", "x")
    finally:
        os.umask(old)
    for path in (tmp_path / "run").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """Also after the first was killed: the lock goes with its process."""
    code = (
        "import sys, time; from pathlib import Path; from llmkit.storage import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training here"), run_lock(tmp_path):
            pass
        other.kill()
        other.wait()
        with run_lock(tmp_path):
            pass


def test_free_space_is_asked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShimDisk, "free", lambda self, path: 1_500_000)
    monkeypatch.setattr(storage, "disk", ShimDisk())
    with pytest.raises(MachineError, match=r"3\.0 MB are needed .* 1\.5 MB are free"):
        Draft(tmp_path / step_name(1), 3_000_000)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_than_the_machine_s_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.machine_errors(tmp_path):
        (tmp_path / "nothing").read_bytes()
    said = r"x/y: No space left on device \([\d,]+ bytes are free\)"
    with pytest.raises(MachineError, match=said), storage.machine_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/y")


# --- C10: nothing that is read can run -------------------------------------------------------------------------------

PICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
CALLS = {"eval", "exec", "__import__"}
PURPOSE = {("sandbox/child.py", "exec")}  # it is what runs programs, in a process that can do no harm
METHODS = {
    ("torch", "load"), ("torch", "save"), ("os", "system"),
    ("dist", "broadcast_object_list"), ("dist", "all_gather_object"), ("dist", "gather_object"),
    ("dist", "scatter_object_list"),
}  # fmt: skip


def test_no_pickle_and_no_evaluation_in_the_package() -> None:
    """C10, X2; torch's collectives for objects pickle too."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [a.name.split(".")[0] for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            bad = [n for n in names if n in PICKLERS]
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                    bad.append(node.func.id)
                if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                    bad += [".".join(c) for c in METHODS if c == (node.func.value.id, node.func.attr)]
                bad += [f"{k.arg}=" for k in node.keywords if k.arg == "allow_pickle" and not _is_false(k.value)]
            name = file.relative_to(PACKAGE).as_posix()
            bad = [b for b in bad if (name, b) not in PURPOSE]
            found += [f"{name}:{node.lineno}: {b}" for b in bad]  # type: ignore[attr-defined]
    assert found == []


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_loading_a_checkpoint_runs_nothing(trained: Path) -> None:
    """C10: an audit hook sees no unpickling, no code, no import and no process while a checkpoint is read."""
    code = """
import json, sys
from pathlib import Path
from llmkit.model.weights import load_model
from llmkit.storage import newest_good
from llmkit.tokenizer import Tokenizer
from llmkit.training.checkpoint import load

def read():
    folder, _ = newest_good(Path(sys.argv[1]))
    load(folder), load_model(folder), Tokenizer.load(folder)

read()  # whatever is imported lazily, is now
events = []
watched = {"pickle.find_class", "marshal.loads", "exec", "compile", "import", "os.system", "subprocess.Popen"}
sandboxed = lambda args: "<template>" in str(args[-1])  # the chat template, compiled by Jinja's sandbox
sys.addaudithook(lambda event, args: events.append(event) if event in watched and not sandboxed(args) else None)
read()
seen = list(events)
print(json.dumps(seen))
"""
    done = subprocess.run([sys.executable, "-c", code, str(trained)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_hub_name_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loading code on a cache laid out as the hub's client lays it out; without network."""
    revision = "0123456789012345678901234567890123456789"
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("someone/tiny") == snapshot
    with pytest.raises(UserError, match=r"^someone/other: no such folder, nor can it be loaded from the hub: .*"):
        resolve_model("someone/other")
    (tmp_path / "someone").mkdir()
    with pytest.raises(UserError, match=r"^someone/tiny: no such folder: give"):
        resolve_model("someone/tiny")
