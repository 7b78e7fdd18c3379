"""The files for clusters: they parse, their commands exist, and a stopped job is requeued while a failed one is not."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "scripts" / "slurm"
RECIPE = "configs/pretrain/demo.yaml"
FAKES = {
    # What SLURM's own commands would do, noted line by line.
    "scontrol": 'echo "scontrol $*" >> "$NOTES"; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    # Instead of training: the file that it would leave behind, and its exit code.
    "python": """case "$1" in
  scripts/slurm/folder.py) exec "$REAL" "$@" ;;
  *) echo "python $*" >> "$NOTES"; [ -n "$LEAVES" ] && touch "$OUT/$LEAVES"; exit "$CODE" ;;
esac""",
}


class Cluster:
    """A batch script's surroundings, played by shell scripts."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.notes = folder, folder / "run", folder / "notes"
        self.run.mkdir()
        for name, text in FAKES.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)

    def submit(self, script: str, *arguments: str, leaves: str = "", code: int = 0, **environment: str) -> int:
        """Runs a batch script; a training process in it would leave a file and exit with a code."""
        self.notes.write_text("")
        told = {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "REAL": sys.executable, "PYTHON": str(self.folder / "python"),
            "NOTES": str(self.notes), "OUT": str(self.run), "LEAVES": leaves, "CODE": str(code), "HOME": str(self.folder),
            "SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "32", "SLURM_SUBMIT_DIR": str(ROOT), "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        command = ["bash", str(SLURM / script), *arguments]
        done = subprocess.run(command, env={**told, **environment}, capture_output=True, text=True, timeout=60)
        self.said = done.stdout + done.stderr
        return done.returncode

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 4711" in self.notes.read_text()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("leaves", "code", "restarts", "exits", "requeued"),
    [
        ("DONE", 0, 0, 0, False),
        ("PREEMPTED", 1, 0, 0, True),  # torchrun's code after a signal is 1: the folder tells
        ("", 138, 3, 0, True),  # SIGUSR1 met torchrun while it started
        ("", 1, 0, 1, False),  # an error is nothing to repeat
        ("", 137, 0, 137, False),  # out of memory
        ("PREEMPTED", 1, 100, 1, False),  # a loop that makes no progress ends
    ],
)
def test_what_is_requeued(leaves: str, code: int, restarts: int, exits: int, requeued: bool, cluster: Cluster) -> None:
    (cluster.run / "PREEMPTED").touch()  # of the start before: it says nothing of this one
    told = {"SLURM_RESTART_COUNT": str(restarts)}
    arguments = (RECIPE, f"out={cluster.run}", "optim.lr=0.002")
    assert cluster.submit("train.sbatch", *arguments, leaves=leaves, code=code, **told) == exits, cluster.said
    assert cluster.requeued == requeued


def test_what_is_started(cluster: Cluster) -> None:
    """torchrun knows every option, and the recipe's own arguments arrive whole."""
    assert (
        cluster.submit("train.sbatch", RECIPE, f"out={cluster.run}", "eval.samples.prompts=[the cat]", leaves="DONE")
        == 0
    )
    line = next(line for line in cluster.notes.read_text().splitlines() if line.startswith("python -m"))
    assert line.endswith(f"scripts/train.py {RECIPE} out={cluster.run} eval.samples.prompts=[the cat]")
    options = parse_args(line.removeprefix("python -m torch.distributed.run ").split(" "))
    assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", 1, "8")
    assert options.master_addr == "node1" and options.master_port == 20000 + 4711
    assert "SIGUSR1" in options.signals_to_handle and options.shutdown_timeout == 240


def test_a_mistake_in_the_recipe_starts_nothing(cluster: Cluster) -> None:
    assert cluster.submit("train.sbatch", RECIPE, "optim.lrr=1") == 2
    assert "did you mean" in cluster.said and "Traceback" not in cluster.said
    assert cluster.notes.read_text() == ""


@pytest.mark.parametrize(("code", "exits", "requeued"), [(0, 0, False), (75, 0, True), (2, 2, False)])
def test_the_other_jobs(code: int, exits: int, requeued: bool, cluster: Cluster) -> None:
    """Without torchrun the exit code tells."""
    assert cluster.submit("pipeline.sbatch", "configs/demo/pipeline.yaml", code=code) == exits, cluster.said
    assert cluster.requeued == requeued
    array = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    told = {**array, "SLURM_ARRAY_TASK_COUNT": "16"}
    assert cluster.submit("prepare_array.sbatch", RECIPE, code=code, **told) == exits, cluster.said
    assert ("scontrol requeue 4711_3" in cluster.notes.read_text()) == requeued
    assert "part=3/16" in cluster.notes.read_text()


@pytest.mark.parametrize("file", sorted(SLURM.iterdir()), ids=lambda p: p.name)
def test_scripts_of_slurm(file: Path) -> None:
    if file.suffix == ".py":
        return
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
    text = file.read_text()
    if file.suffix == ".sbatch":
        directives = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
        assert {"job-name", "time", "signal", "requeue", "open-mode", "output"} <= set(directives)
        assert "--signal=B:" not in text  # it would reach the shell alone, and srun would end the step before it saved
        assert not re.search(r"^#SBATCH [^\n]* #", text, re.MULTILINE)  # SLURM takes a comment for an argument


def commands_in(text: str) -> list[list[str]]:
    """torchrun's arguments wherever a shell line calls it."""
    joined = re.sub(r"\\\n\s*", " ", text)
    calls = re.findall(r"-m torch\.distributed\.run (.*)", joined)
    return [shlex.split(re.sub(r"\$\{?\w+\}?", "1", call)) for call in calls]


def test_manifests_of_kubernetes() -> None:
    documents: dict[str, Any] = {
        d["kind"]: d for d in yaml.safe_load_all((ROOT / "scripts/k8s/train.yaml").read_text())
    }
    job, service = documents["Job"], documents["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    shell = pod["containers"][0]["command"][-1]
    [call] = commands_in(shell)
    options = parse_args(call)
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert f"--nproc-per-node={pod['containers'][0]['resources']['limits']['nvidia.com/gpu']}" in call
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}" == options.master_addr
    assert "exec python" in shell
    trainer = yaml.safe_load((ROOT / "scripts/k8s/trainjob.yaml").read_text())["spec"]["trainer"]
    assert parse_args([*trainer["command"][3:], *trainer["args"]]).training_script == "scripts/train.py"


def test_kubernetes_knows_every_field() -> None:
    """What its own client reads and writes again is what was written."""
    client = pytest.importorskip("kubernetes.client", reason="the Kubernetes client is not installed")
    api = client.ApiClient()
    for document in yaml.safe_load_all((ROOT / "scripts/k8s/train.yaml").read_text()):
        read = api.deserialize(json.dumps(document), f"V1{document['kind']}", "application/json")
        assert api.sanitize_for_serialization(read) == document


def test_task_of_skypilot() -> None:
    task = yaml.safe_load((ROOT / "scripts/sky/train.yaml").read_text())
    [call] = commands_in(task["run"])
    assert parse_args(call).training_script == "scripts/train.py"
    assert task["file_mounts"]["/bucket"]["mode"] == "MOUNT_CACHED" and "/bucket/" in task["run"]


def test_image() -> None:
    """What the image copies is there, and all that the package is built from is copied."""
    text = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    assert {"llmkit", "configs", "data", "scripts", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= copied
    assert re.search(r"^USER llmkit$", text, re.MULTILINE)
