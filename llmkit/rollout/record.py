"""Rollouts for people to read: one JSONL file each, an answer a line, token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkit import storage
from llmkit.rollout.batch import Rollouts
from llmkit.rollout.prompts import PromptRow
from llmkit.tokenizer import Tokenizer


def record(out: Path, number: int, rollouts: Rollouts, prompts: Sequence[PromptRow], tokenizer: Tokenizer) -> None:
    """Writes out/rollouts/rollout-<number>.jsonl.

    A line holds `prompt` and `answer` as text, `reward` and its `parts` before their weights, whether the answer
    `finished`, and `tokens`: of every token after the prompt its text, whether the policy wrote it, and where it did
    `logprob`, `kl` (log-ratio to the reference), `value` and `advantage`, as far as the stage has them.
    """
    folder = out / "rollouts"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(_told(rollouts, i, prompts, tokenizer), ensure_ascii=False) for i in range(len(rollouts))]
    storage.replace_file(folder / f"rollout-{number:08d}.jsonl", "\n".join(lines) + "\n")


def _told(rollouts: Rollouts, i: int, prompts: Sequence[PromptRow], tokenizer: Tokenizer) -> dict[str, Any]:
    first, end = int(rollouts.prompt_lengths_N[i]), int(rollouts.lengths_N[i])
    ids = rollouts.ids_NT[i, :end].tolist()
    logprobs = rollouts.sampler_NT if rollouts.old_NT is None else rollouts.old_NT
    kl = None if rollouts.ref_NT is None else logprobs - rollouts.ref_NT
    columns = {"logprob": logprobs, "kl": kl, "value": rollouts.values_NT, "advantage": rollouts.advantages_NT}
    row = prompts[int(rollouts.prompt_N[i])]
    return {
        "group": int(rollouts.group_N[i]),
        "prompt": tokenizer.decode(row.ids, skip_special=False),
        "answer": tokenizer.decode(ids[first:], skip_special=False, start=False),
        "reward": _number(rollouts.scores_N[i]),
        "parts": {name: _number(values[i]) for name, values in rollouts.parts.items()},
        "finished": bool(rollouts.finished_N[i]),
        "tokens": [_token(rollouts, i, t, ids, columns, tokenizer) for t in range(first, end)],
    }


def _token(
    rollouts: Rollouts, i: int, t: int, ids: list[int], columns: dict[str, Tensor | None], tokenizer: Tokenizer
) -> dict[str, Any]:
    told: dict[str, Any] = {"id": ids[t], "text": tokenizer.decode([ids[t]], skip_special=False, start=False)}
    if not rollouts.actions_NT[i, t - 1]:  # what is known of a token stands at the position before it
        return told
    return told | {name: _number(v[i, t - 1]) for name, v in columns.items() if v is not None}


def _number(value: Tensor) -> float | None:
    """Six digits are enough to read; JSON has no NaN."""
    number = value.item()
    return float(f"{number:.6g}") if math.isfinite(number) else None
