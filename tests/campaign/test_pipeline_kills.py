"""A pipeline that is killed at random inside every node ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.campaign
SEED = int(os.environ.get("LLMKIT_KILL_SEED", "7"))
KILLS = 2  # inside each node
TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley."
# Every stage of the demo's pipeline, small. ROOT stands for the folder of the test.
RECIPES = """
tokenizer: {tokenizer: {kind: bpe, vocab_size: 400}, data: {path: ROOT/corpus.jsonl}}
pretrain:
  model: {n_layers: 2, n_heads: 2, d_model: 32, max_seq_len: 96}
  data: {path: ROOT/corpus.jsonl}
  batch: {tokens_per_step: 384}
  steps: 120
sft: {data: {train: [{path: ROOT/chats.jsonl}], valid_frac: 0.2}, batch: {tokens_per_step: 384}, steps: 100}
reward: {objective: rank, data: {train: [{path: x}]}, batch: {examples_per_step: 8}, steps: 40}
ppo:
  data: {train: [{path: ROOT/asked.jsonl}], valid_frac: 0.1}
  rewards: [{kind: length, target: 8}]
  rollout: {prompts_per_step: 8, max_new_tokens: 12}
  update: {minibatches: 2, epochs: 1}
  critic: {lr: 1e-3}
  steps: 24
distill:
  teacher: x
  model: {n_layers: 2, n_heads: 2, d_model: 16, max_seq_len: 96}
  data: {train: [{path: ROOT/chats.jsonl}], valid_frac: 0.2}
  losses: [{kind: soft}]
  batch: {tokens_per_step: 384}
  steps: 100
"""
PIPELINE = """
out: x
nodes:
  tokenizer: {recipe: tokenizer.yaml}
  pretrain: {recipe: pretrain.yaml, set: {tokenizer: {node: tokenizer}}}
  sft: {recipe: sft.yaml, set: {init_from: {node: pretrain}}}
  answers:
    run: rank
    set: {model: {node: sft}, prompts: ROOT/asked.jsonl, annotator: none, k: 3, batch: 8, max_new_tokens: 24}
  ranking:
    run: rank
    set:
      answers: "{node: answers}/rows.jsonl"
      annotator: simulated
      utility: "{kind: length, target: 24, unit: characters}"
      noise: 0.1
  reward: {recipe: reward.yaml, set: {init_from: {node: sft}, data.train: [{path: "{node: ranking}/rows.jsonl"}]}}
  ppo:
    recipe: ppo.yaml
    set:
      init_from: {node: sft}
      critic.init_from: {node: reward}
      rewards: [{kind: model, path: {node: reward}, min_accuracy: 0.0}]
  distill: {recipe: distill.yaml, set: {teacher: {node: ppo}}}
  int8: {run: quantize, set: {model: {node: distill}, bits: 8}}
"""


def write(root: Path) -> Path:
    """The files of the pipeline; returns its own."""
    asked = [{"prompt": f"Where is mill {i}?", "answer": f"By the river, {i}."} for i in range(120)]
    chats = [{"prompt": row["prompt"], "completion": row["answer"]} for row in asked]
    texts = [{"text": f"{TEXT} {i}"} for i in range(300)]
    for name, rows in {"asked": asked, "chats": chats, "corpus": texts}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage, recipe in yaml.safe_load(RECIPES.replace("ROOT", str(root))).items():
        recipe |= {"stage": stage, "out": "x"}
        if stage != "tokenizer":
            recipe["data"]["cache_dir"] = str(root / "cache")
            recipe |= {"eval": {"every": 8}, "log": {"tensorboard": False, "plot": False}}
        if stage in ("sft", "reward", "ppo"):
            recipe["init_from"] = "x"
        (root / f"{stage}.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    (root / "pipeline.yaml").write_text(PIPELINE.replace("ROOT", str(root)))
    return root / "pipeline.yaml"


def start(file: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llmkit.cli", "run", str(file), f"out={out}", "code=version", *more]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def nodes_of(out: Path) -> dict[str, dict]:
    try:
        found: dict[str, dict] = json.loads((out / "pipeline.json").read_bytes())["nodes"]
        return found
    except OSError:
        return {}


def bits(out: Path) -> dict[str, str]:
    """Hashes of all weights and of all rows: what came of every node."""
    kept = [
        p
        for p in sorted(out.rglob("*"))
        if p.suffix == ".safetensors" or p.name in ("rows.jsonl", "metrics.jsonl", "tokenizer.json")
    ]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.mark.timeout(3600)
def test_killed_twice_inside_every_node(tmp_path: Path) -> None:
    file, pick = write(tmp_path), random.Random(SEED)
    assert start(file, tmp_path / "whole").wait() == 0, (tmp_path / "whole.log").read_text()[-3000:]
    took = {name: one["seconds"] for name, one in nodes_of(tmp_path / "whole").items()}
    out = tmp_path / "killed"
    killed = dict.fromkeys(took, 0)
    for name, seconds in took.items():
        while killed[name] < KILLS:
            process = start(file, out, "--until", name)
            while nodes_of(out).get(name, {}).get("status") != "running" and process.poll() is None:
                time.sleep(0.01)
            time.sleep(pick.uniform(0.3, 0.9) * seconds)  # the first seconds are imports
            if nodes_of(out).get(name, {}).get("status") == "done":  # it was faster than the first time
                seconds *= 0.7
                kill(process, signal.SIGKILL)
                subprocess.run(["rm", "-rf", str(out / name)], check=True)
                continue
            kill(process, pick.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            killed[name] += 1
    assert start(file, out).wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert bits(out) == bits(tmp_path / "whole")
    print(f"{sum(killed.values())} kills inside {len(killed)} nodes: the same bits")


def kill(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    process.send_signal(how)
    process.wait()
