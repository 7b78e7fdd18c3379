"""A pipeline that runs in seconds: a tokenizer, a network of one layer, its fine-tuning and two commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli import build_parser
from llmkit.pipeline.graph import Pipeline, read_pipeline

TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley."
QUIET = {"tensorboard": False, "plot": False}


def parsers() -> Any:
    """The commands' parsers by name, as `llmkit run` is given them."""
    return build_parser().parse_args(["run", "x"]).parsers


class World:
    """The files of the pipeline, in a folder of the test's."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        (root / "corpus.jsonl").write_text(
            "".join(json.dumps({"text": f"{TEXT} {i}"}) + "\n" for i in range(60)), "utf-8"
        )
        rows = [{"prompt": f"Where is mill {i}?", "completion": f"By the river, {i}."} for i in range(24)]
        (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        shared = {"batch": {"tokens_per_step": 128}, "eval": {"every": 2}, "log": QUIET}
        corpus = {"path": str(root / "corpus.jsonl"), "cache_dir": str(root / "cache")}
        chats = {"train": [{"path": str(root / "chats.jsonl")}], "valid_frac": 0.25, "cache_dir": str(root / "cache")}
        shape = {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64}
        self.recipe("tokenizer", stage="tokenizer", tokenizer={"kind": "byte"}, data={"path": corpus["path"]})
        self.recipe("pretrain", stage="pretrain", data=corpus, model=shape, steps=4, **shared)
        self.recipe("sft", stage="sft", init_from="nowhere", data=chats, steps=4, **shared)
        self.nodes: dict[str, Any] = {
            "tokenizer": {"recipe": "tokenizer.yaml"},
            "pretrain": {"recipe": "pretrain.yaml", "set": {"tokenizer": {"node": "tokenizer"}}},
            "sft": {"recipe": "sft.yaml", "set": {"init_from": {"node": "pretrain"}}},
            "int8": {"run": "quantize", "set": {"model": {"node": "sft"}, "bits": 8}},
            "answers": {"run": "rank", "set": {
                "model": {"node": "sft"}, "prompts": str(root / "chats.jsonl"), "annotator": "none", "k": 2, "batch": 4,
                "max_new_tokens": 8,
            }},
        }  # fmt: skip

    def recipe(self, name: str, **data: Any) -> None:
        (self.root / f"{name}.yaml").write_text(yaml.safe_dump({"out": "unused", **data}, allow_unicode=True), "utf-8")

    def write(self, **keys: Any) -> str:
        """The pipeline's file."""
        file = self.root / "pipeline.yaml"
        data = {"out": str(self.out), "code": "version", "nodes": self.nodes, **keys}
        file.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), "utf-8")
        return str(file)

    def read(self, *overrides: str) -> Pipeline:
        return read_pipeline(self.write(), overrides, parsers())

    def read_text(self, text: str) -> Pipeline:
        (self.root / "pipeline.yaml").write_text(text, "utf-8")
        return read_pipeline(str(self.root / "pipeline.yaml"), [], parsers())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)
