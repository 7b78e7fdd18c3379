"""What is kept of a pipeline: `pipeline.json` in its folder, replaced whole after every change. Torch-free.

    {"format": 1, "pipeline": FILE, "order": [NAME, ...], "files": {...}, "nodes": {NAME: {
        "does": "sft", "folder": "runs/demo/sft", "file": "", "parents": ["pretrain"], "command": "llmkit train ...",
        "status": "running" | "stopped" | "failed" | "done" | "again", "key": ..., "parts": {...},
        "seconds": 81.2, "code": 0, "finished": "2026-01-31T12:00:00+00:00", "took": {"seconds": 81.2, "steps": 700}}}}

`seconds` are those of all starts of the result that is there or in the making, `took` those of the last that was done.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.pipeline.graph import Pipeline
from llmkit.pipeline.keys import Seen
from llmkit.storage import replace_file, to_json

FILE, FORMAT = "pipeline.json", 1
Record = dict[str, Any]


@dataclass
class State:
    """Of every node that was ever begun, what became of it."""

    path: Path
    pipeline: str
    order: list[str]
    nodes: dict[str, Record] = field(default_factory=dict)
    files: Seen = field(default_factory=dict)

    @classmethod
    def read(cls, pipeline: Pipeline) -> State:
        """What is kept in the pipeline's folder, or nothing. Raises UserError for a file that is not ours."""
        state = cls(pipeline.out / FILE, pipeline.file, list(pipeline.nodes))
        if not state.path.is_file():
            return state
        try:
            kept = json.loads(state.path.read_bytes())
            if kept["format"] != FORMAT:
                raise UserError(f"{state.path}: format {kept['format']!r}: this version reads {FORMAT}")
            state.nodes, state.files = kept["nodes"], kept["files"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{state.path}: is no state of a pipeline: move it away, or choose another `out`") from None
        return state

    def write(self) -> None:
        told = {"pipeline": self.pipeline, "order": self.order, "nodes": self.nodes, "files": self.files}
        replace_file(self.path, to_json({"format": FORMAT, **told}))

    def note(self, name: str, **facts: Any) -> None:
        """Adds to what is known of a node, on disk when this returns."""
        self.nodes[name] = {**self.nodes.get(name, {}), **facts}
        self.write()
