"""Folders -> what a page shows of them: JSON of a bounded size. Reads files only; no model is loaded."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.storage import checkpoints_of
from llmkit.tools.report.curves import curves_of, read_some
from llmkit.tools.report.folders import RESULTS, Found, names_of, nodes_of, read_json
from llmkit.tools.report.lineage import lineage, read_recipe
from llmkit.tools.report.rollouts import read_rollouts, spread

Record = dict[str, Any]
_TIMED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)$")
# What deserves a look among the lines of a log; all else is progress and facts.
_WARNING = re.compile(
    r"^(warning|watch)\b|was passed over|was left out|bytes are missing|not finite|batch is kept|back to step|damaged"
    r"|remedy|recipe changed",
    re.IGNORECASE,
)
_HEADLINES = ("valid/loss", "valid/perplexity", "valid/accuracy", "valid/reward", "answers/exact", "answers/mean")


@dataclass(frozen=True)
class Limits:
    """How much of everything a page shows; smaller when a page would be too large."""

    points: int = 500
    """Of a curve."""
    files: int = 8
    """Rollouts of a run."""
    answers: int = 40
    """Of a rollout."""
    tokens: int = 256
    """Of an answer."""
    questions: int = 400
    """Answered side by side."""
    lines: int = 200
    """Warnings of a log."""
    prompts: int = 40
    """Whose samples are shown."""
    picture_bytes: int = 300_000
    """Of a picture; a larger one is left out."""

    def scaled(self, by: float) -> Limits:
        """Less of everything."""
        return Limits(**{name: max(2, int(value * by)) for name, value in vars(self).items()})


def gather(found: Found, limits: Limits) -> Record:
    """All that the page shows."""
    names = names_of(found.runs)
    return {
        "runs": [_run(run, name, limits) for run, name in zip(found.runs, names, strict=True)],
        "results": [result for folder in found.results for result in _results(folder, limits.picture_bytes)],
        "answers": list(_side_by_side(found, names, limits.questions)),
        "pipelines": [{"path": str(folder), "nodes": _pipeline(folder)} for folder in found.pipelines],
    }


# --- a run -----------------------------------------------------------------------------------------------------------


def _run(run: Path, name: str, limits: Limits) -> Record:
    recipe, metrics = read_recipe(run), read_some(run / "metrics.jsonl")
    last = max((record["step"] for record in metrics), default=0)
    done = run / "DONE"
    state = "done" if done.is_file() else "preempted" if (run / "PREEMPTED").is_file() else "unfinished"
    evaluations = [record for record in metrics if not any(key.startswith("train/") for key in record)]
    headlines = {key: next((r[key] for r in reversed(evaluations) if key in r), None) for key in _HEADLINES}
    text = run / "recipe.yaml"
    return {
        "name": name,
        "path": str(run),
        "stage": recipe.get("stage"),
        "state": state,
        "step": last,
        "steps": recipe.get("steps"),
        "headlines": {key: value for key, value in headlines.items() if value is not None},
        "best": read_json(done) if state == "done" else None,
        "curves": curves_of(metrics, limits.points),
        "timing": curves_of(read_some(run / "timing.jsonl"), limits.points),
        "samples": _samples(run, limits.prompts),
        "card": read_json(run / "reward_card.json"),
        "rollouts": read_rollouts(run, limits.files, limits.answers, limits.tokens),
        "recipe": text.read_text("utf-8") if text.is_file() else "",
        "environment": read_json(run / "environment.json"),
        "lineage": lineage(run),
        "checkpoints": [{"name": c.name, "bytes": _size(c)} for c in reversed(checkpoints_of(run))],
        **_log(run / "train.log", limits.lines),
    }


def _samples(run: Path, most: int, most_steps: int = 12) -> list[Record]:
    """By prompt, what the model wrote at some of the steps."""
    texts: dict[str, list[list[Any]]] = {}
    for record in read_some(run / "samples.jsonl"):
        texts.setdefault(record["prompt"], []).append([record["step"], record["text"][:2000]])
    return [{"prompt": prompt, "texts": spread(found, most_steps)} for prompt, found in list(texts.items())[:most]]


def _log(path: Path, most: int) -> Record:
    """When a run's log begins and ends, and those of its lines that warn."""
    if not path.is_file():
        return {"began": None, "ended": None, "warnings": []}
    lines = [match for line in path.read_text("utf-8").splitlines() if (match := _TIMED.match(line))]
    warnings = [[match[1], match[2][:500]] for match in lines if _WARNING.search(match[2])]
    return {
        "began": lines[0][1] if lines else None,
        "ended": lines[-1][1] if lines else None,
        "warnings": warnings[-most:],
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- results ---------------------------------------------------------------------------------------------------------


def _results(folder: Path, most_bytes: int) -> Iterator[Record]:
    """The table and the picture of eval, bench or compare in a folder."""
    for kind in RESULTS:
        table = folder / f"{kind}.md"
        if (folder / f"{kind}.json").is_file() and table.is_file():
            picture = folder / f"{kind}.png"
            is_shown = picture.is_file() and picture.stat().st_size <= most_bytes
            yield {
                "kind": kind,
                "path": str(folder),
                **read_table(table.read_text("utf-8")),
                "picture": _data_url(picture) if is_shown else None,
            }


def _data_url(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def read_table(text: str) -> Record:
    """A Markdown table and the remarks below it: `head`, `rows` and `remarks`."""
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    return {
        "head": rows[0] if rows else [],
        "rows": rows[1:],
        "remarks": [line.removeprefix("- ") for line in lines if line.startswith("- ")],
    }


# --- the same questions, side by side --------------------------------------------------------------------------------


def _side_by_side(found: Found, names: Sequence[str], most: int) -> Iterator[Record]:
    """Answers of several models to the same questions: those that `compare` wrote, and those of the runs' evaluations."""
    for folder in found.results:
        files = sorted(folder.glob("answers-*.jsonl"))
        report = read_json(folder / "compare.json")
        order = [model["name"] for model in report["models"]] if isinstance(report, dict) else []
        by_name = {file.stem.removeprefix("answers-"): file for file in files}
        known = [name for name in order if name in by_name]
        if known:
            yield _questions(str(folder), known, [read_some(by_name[name]) for name in known], most)
    runs = [(name, run / "answers.jsonl") for name, run in zip(names, found.runs, strict=True)]
    runs = [(name, file) for name, file in runs if file.is_file()]
    if runs:
        yield _questions("", [name for name, _ in runs], [read_some(file) for _, file in runs], most)


def _questions(path: str, names: Sequence[str], answers: Sequence[Sequence[Record]], most: int) -> Record:
    """A row for each question: what is right, and what each model said and was given for it.

    Questions are told apart by their prompts, since runs may have been asked different ones.
    """
    by_prompt: list[dict[str, Record]] = []
    order: dict[str, Record] = {}
    for some in answers:
        mine: dict[str, Record] = {}
        for record in some:
            prompt = prompt_text(record["prompt"])
            mine.setdefault(prompt, record)
            order.setdefault(prompt, record["fields"])
        by_prompt.append(mine)
    rows = []
    for prompt in spread(list(order), most):
        fields = order[prompt]
        said = [mine.get(prompt) for mine in by_prompt]
        rows.append(
            {
                "prompt": prompt[-3000:],
                "right": str(fields["answer"])[:1000] if "answer" in fields else None,
                "kind": str(fields["kind"])[:60] if "kind" in fields else None,
                "said": [None if one is None else [one["answer"][:2000], one["reward"]] for one in said],
            }
        )
    return {"path": path, "names": list(names), "n": len(order), "rows": rows}


def prompt_text(prompt: Any) -> str:
    """A conversation as text; a question that stands alone without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content") or "")
    return "\n".join(f"[{m['role']}] {m.get('content') or ''}" for m in prompt)


# --- a pipeline ------------------------------------------------------------------------------------------------------


def _pipeline(folder: Path) -> list[Record]:
    """What every node does, how it stands and how long it took."""
    keys = ("name", "does", "status", "seconds", "parents", "finished", "command")
    return [{key: node.get(key) for key in keys} for node in nodes_of(folder)]
