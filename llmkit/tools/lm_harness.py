"""`llmkit eval --harness lm-eval`: lm-eval's own prompts and figures for our models, from the hub or from local files."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from llmkit.config import UserError
from llmkit.evaluation.lm_eval_model import library, lm_eval_model
from llmkit.evaluation.rows import local_rows
from llmkit.evaluation.tasks import Record, Task
from llmkit.inference.command import is_chat_model
from llmkit.model.weights import load_model
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.tools.evaluate import DTYPES, name_of, task_names, write
from llmkit.tools.measures import mean_of
from llmkit.training.dist import pick_device

# Below lm_eval/tasks: the file that a local task differs from in its data alone, and what its hub task is called.
_TEMPLATES = {
    "mmlu": ("mmlu/default/_default_template_yaml", "mmlu"),
    "mmlu_pro": ("mmlu_pro/_default_template_yaml", "mmlu_pro"),
    "gpqa": ("gpqa/zeroshot/_gpqa_zeroshot_yaml", "gpqa_main_zeroshot"),
    "drop": ("drop/default.yaml", "drop"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "gsm8k"),
    "ceval": ("ceval/_default_ceval_yaml", "ceval-valid"),
    "cmmlu": ("cmmlu/_default_template_yaml", "cmmlu"),
}
_FIRST = ("acc", "exact_match", "f1")  # a table begins with one of these


def run(args: argparse.Namespace) -> int:
    """As `llmkit eval` does it: a table to stdout and, with --out, a folder."""
    harness, names = library(), task_names(args)
    _check(args, names)
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, DTYPES[args.precision] if args.precision else None, pick_device(args.device))
    chat = not args.raw and is_chat_model(folder, tokenizer)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        made = _local_tasks(names, args, Path(scratch)) if args.data is not None else _hub_tasks(names)
        found = _evaluated(
            harness, lm_eval_model(model, tokenizer, folder, args.batch_tokens), made, args, chat, scratch
        )
    report: Record = {
        "name": name_of(folder),
        "path": str(folder),
        "chat": chat,
        "precision": str(model.head_weight.dtype).removeprefix("torch."),
        "tasks": [],
        "text": None,
    }
    items = {}
    for name in names:
        own = [task for task, of in made.items() if of == name]
        samples = [
            sample for task in found["samples"] if belongs(task, own, found) for sample in found["samples"][task]
        ]
        report["tasks"].append(_summary(name, args.data, samples))
        items[name] = [_record(name, sample) for sample in samples]
    write(None if args.out is None else Path(args.out), report, items)
    return 0


def _check(args: argparse.Namespace, names: list[str]) -> None:
    for option in ("text", "against", "max_new_tokens"):
        if getattr(args, option) is not None:
            raise UserError(f"eval: --{option.replace('_', '-')} is not for --harness lm-eval: leave one of them out")
    if "humaneval" in names or args.run_code:
        raise UserError("eval: lm-eval runs programs outside of a sandbox: ask humaneval without --harness lm-eval")
    if not names:
        raise UserError("eval: --harness lm-eval: say what is asked: --tasks mmlu,gsm8k, or any other of its tasks")
    if args.data is not None and (unknown := [name for name in names if name not in _TEMPLATES]):
        raise UserError(f"eval: --data with --harness lm-eval has files for {', '.join(_TEMPLATES)} (got {unknown[0]})")


def _evaluated(harness: Any, lm: Any, made: dict[str, str], args: argparse.Namespace, chat: bool, scratch: str) -> Any:
    import datasets
    from lm_eval.tasks import TaskManager

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return harness.simple_evaluate(
            model=lm,
            tasks=list(made),
            num_fewshot=None if args.data is not None else args.shots,
            limit=None if args.data is not None else args.limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            task_manager=TaskManager(include_path=scratch),
        )
    except (KeyError, ValueError, OSError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"eval: lm-eval can't ask {', '.join(dict.fromkeys(made.values()))}: {reason}") from e


def belongs(task: str, own: list[str], found: Any) -> bool:
    """Whether a task that was asked is one of these, or of a group of these."""
    if task in own:
        return True
    groups: dict[str, list[str]] = found.get("group_subtasks") or {}
    return any(belongs(task, groups[name], found) for name in own if groups.get(name))


# --- tasks -----------------------------------------------------------------------------------------------------------


def _hub_tasks(names: list[str]) -> dict[str, str]:
    """lm-eval's names of the tasks, and ours."""
    return {_TEMPLATES[name][1] if name in _TEMPLATES else name: name for name in names}


def _local_tasks(names: list[str], args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Writes a task for lm-eval for every subject of a benchmark: its own template with local rows."""
    made: dict[str, str] = {}
    for name in names:
        task, rows, examples, source = local_rows(name, Path(args.data))
        asked, shown = _by_subject(task, rows), _by_subject(task, examples)
        every = [row for some in shown.values() for row in some]
        n_shots = task.n_shots if args.shots is None else args.shots
        if args.shots and not every:
            raise UserError(f"eval: --shots {args.shots}: {source} has no examples for {name}: --shots 0")
        if not asked:
            raise UserError(f"{source}: there are no questions in it")
        left = args.limit
        for k, (subject, some) in enumerate(asked.items()):
            if left is not None:  # each subject its share of what is left
                share = -(-left // (len(asked) - k))
                some = [some[i * len(some) // share] for i in range(share)] if share < len(some) else some
                left -= len(some)
            if some:
                label = f"llmkit_{name}_{k}"
                _write_task(scratch, label, task, subject, some, shown.get(subject) or every, n_shots)
                made[label] = name
    return made


def _by_subject(task: Task, rows: Iterable[Any]) -> dict[str, list[Record]]:
    """Rows by their subject, where examples are of the same one; else all under ""."""
    found: dict[str, list[Record]] = defaultdict(list)
    for place, group, row in rows:
        try:
            item = task.read(row)
        except UserError as e:
            raise UserError(f"{place()}: task {task.name}: {e}") from None
        found[(item.group or group) if task.shots_split is not None else ""].append(row)
    return dict(found)


def _write_task(
    scratch: Path, label: str, task: Task, subject: str, asked: list[Record], shown: list[Record], n_shots: int
) -> None:
    template = Path(library().__file__).parent / "tasks" / _TEMPLATES[task.name][0]
    files = {}
    for split, rows in ((task.shots_split or "train", shown), (task.split, asked)):
        file = scratch / f"{label}.{split}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows or asked), "utf-8")
        files[split] = str(file)
    intro = task.intro.format(group=subject.replace("_", " ")) if subject else ""
    spec = {
        "include": str(template),
        "task": label,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(scratch / "cache")},
        "num_fewshot": min(n_shots, len(shown)),
        "description": intro,
    }
    (scratch / f"{label}.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), "utf-8")


# --- figures ---------------------------------------------------------------------------------------------------------


def _summary(name: str, data: str | None, samples: list[Record]) -> Record:
    """A task's figures as `llmkit eval` has them; a figure of a filter is called `figure,filter`."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample.get(metric), int | float):
                values[_label(metric, sample)].append(float(sample[metric]))
    order = sorted(
        values, key=lambda label: next((i for i, f in enumerate(_FIRST) if label.startswith(f)), len(_FIRST))
    )
    means = {label: mean_of(values[label]) for label in order}
    return {
        "name": name,
        "kind": "lm-eval",
        "source": data if data is not None else f"lm-eval's {_TEMPLATES.get(name, ('', name))[1]}",
        "n": len({(s["prompt_hash"], s["doc_hash"]) for s in samples}),
        "chance": 0.0,
        "examples_asked": None,
        "examples_mean": 0.0,
        "cut": 0,
        "unfinished": 0,
        "errors": 0,
        "metrics": {label: None if mean is None else _finite(asdict(mean)) for label, mean in means.items()},
        "groups": {},
        "overlap": None,
    }


def _label(metric: str, sample: Record) -> str:
    return metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"


def _finite(told: Record) -> Record:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def _record(name: str, sample: Record) -> Record:
    prompts = [arguments[0] for arguments in sample["arguments"]]
    given = sample["filtered_resps"]
    return {
        "task": name,
        "prompt": prompts[0],
        "continuations": [a[1] for a in sample["arguments"]] if len(prompts) > 1 else None,
        "given": given[0] if len(given) == 1 else given,
        "right": sample["target"],
        "filter": sample["filter"],
        **{_label(metric, sample): sample.get(metric) for metric in sample["metrics"]},
    }
