"""What an examination found, as a table for terminals and Markdown, and as one self-contained HTML page."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

Record = dict[str, Any]
MAX_SHOWN = 200  # questions of a task on the page; all of them are in items/

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{overflow-wrap:anywhere}.wide{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}ul{padding-left:1.2rem}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{position:relative;width:min(16rem,40vw);height:.8rem;background:#eee}
.bar i,.bar b,.bar u{position:absolute;top:0;height:100%}.bar i{left:0;background:#47a}
.bar b{background:#0006;height:30%;top:35%}
.bar u{width:2px;background:#c44}details{border-bottom:1px solid #eee;padding:.2rem 0}summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.6rem;margin:.3rem 0}
.right>summary{color:#186a2b}.wrong>summary{color:#a22}.none>summary{color:#666}
button{margin-right:.4rem;padding:.2rem .7rem}button[aria-pressed=true]{font-weight:bold}details p{margin:.5rem 0 0}
@media(max-width:40rem){td,th{padding:.25rem .4rem}}
@media(prefers-color-scheme:dark){body{background:#181a1c;color:#ddd}pre{background:#24272a}.bar{background:#333}
td,th,details{border-color:#3a3d40}.right>summary{color:#6c8}.wrong>summary{color:#e88}.none>summary{color:#aaa}
.bar b{background:#fff8}}
"""
_SCRIPT = """
for(const b of document.querySelectorAll('button'))b.onclick=()=>{
for(const o of b.parentNode.children)o.setAttribute('aria-pressed',o===b)
for(const d of b.closest('section').querySelectorAll('details[class]'))
d.hidden=b.dataset.show!=='all'&&d.className!==b.dataset.show}
"""


# --- table -----------------------------------------------------------------------------------------------------------


def table(report: Record) -> str:
    """A Markdown table with a task a row; below it what the numbers are."""
    rows = [["task", "n", "figure", "score, %", "95 %", "chance, %"], *_rows(report)]
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in rows]
    lines.insert(
        1, "|" + "|".join("-" * (w + 1) + (":" if i not in (0, 2) else "-") for i, w in enumerate(widths)) + "|"
    )
    lines = lines if report["tasks"] else []
    return "\n".join([*lines, *([""] if lines else []), *(f"- {note}" for note in notes(report))]) + "\n"


def _rows(report: Record) -> Iterator[list[str]]:
    for task in report["tasks"]:
        for i, (name, mean) in enumerate(task["metrics"].items()):
            score, span = told(mean)
            guess = f"{100 * task['chance']:.1f}" if task["chance"] else "-"
            yield [task["name"] if not i else "", f"{task['n']:,}" if not i else "", name, score, span, guess]


def told(mean: Record | None) -> tuple[str, str]:
    """A mean and its interval, in percent."""
    if mean is None:
        return "-", "-"
    span = "-" if mean["low"] is None else f"{100 * mean['low']:.1f} to {100 * mean['high']:.1f}"
    return f"{100 * mean['mean']:.1f}", span


def _padded(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for i, (text, w) in enumerate(zip(row, widths, strict=True)):
        gap = " " * (w - _width(text))
        yield text + gap if i in (0, 2) else gap + text


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def notes(report: Record) -> Iterator[str]:
    """What the numbers are, and what is to be thought of them."""
    if (text := report["text"]) is not None:
        yield (
            f"{text['path']}: perplexity {text['perplexity']:,.4f}, {text['bits_per_byte']:.4f} bits per byte, loss "
            f"{text['loss']:.4f} nats per token over {text['n_tokens']:,} tokens ({text['n_bytes']:,} bytes) in rows of at "
            f"most {text['context']:,}"
        )
    if not report["tasks"]:
        return
    yield f"asked {'through the chat template' if report['chat'] else 'in plain text'}, greedily; {report['precision']}"
    for task in report["tasks"]:
        name = task["name"]
        asked, mean = task["examples_asked"], task["examples_mean"]
        few = (
            f" of {asked} asked for: there are no more, or the context holds no more" if asked and mean < asked else ""
        )
        shown = f"{mean:.1f} examples a question{few}" if asked else "no examples"
        shown = "prompts and figures are lm-eval's" if task["kind"] == "lm-eval" else shown
        yield f"{name}: {task['source']}; {shown}"
        if task["cut"]:
            yield f"{name}: {task['cut']:,} questions are longer than the context: their beginnings are cut off"
        if task["unfinished"]:
            yield f"{name}: {task['unfinished']:,} answers were cut off at the most tokens allowed"
        if task["errors"]:
            yield f"{name}: the grader broke on {task['errors']:,} answers, which count nowhere"
        if (overlap := task["overlap"]) is not None:
            clean, dirty = told(overlap["clean"])[0], told(overlap["dirty"])[0]
            yield (
                f"{name}: {overlap['n_dirty']:,} of {overlap['n_checked']:,} questions share {overlap['n']} units in a row "
                f"with {overlap['path']}: {clean} % right of the others, {dirty} % of them; {overlap['n_short']:,} are too "
                "short to tell"
            )


# --- page ------------------------------------------------------------------------------------------------------------


def page(report: Record, items: dict[str, list[Record]]) -> str:
    """One HTML file without anything from elsewhere.

    Args:
        report: what `eval.json` holds.
        items: of each task the records of its questions.
    """
    e = html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{e(report['name'])}</title><style>{_STYLE}</style><h1>{e(report['name'])}</h1>",
        "<div class=wide><table><tr><th>task<th>n<th>figure<th>score, %<th>95 %<th>chance, %<th>",
    ]
    for row, mean, chance in zip(_rows(report), _means(report), _chances(report), strict=True):
        cells = "".join(f"<td{'' if i in (0, 2) else ' class=n'}>{e(text)}" for i, text in enumerate(row))
        parts.append(f"<tr>{cells}<td>{_bar(mean, chance)}")
    parts.append("</table></div><ul>" + "".join(f"<li>{e(note)}" for note in notes(report)) + "</ul>")
    for task in report["tasks"]:
        parts += _section(task, items.get(task["name"], []))
    parts.append(f"<script>{_SCRIPT}</script></html>")
    return "\n".join(parts) + "\n"


def _means(report: Record) -> Iterator[Record | None]:
    for task in report["tasks"]:
        yield from task["metrics"].values()


def _chances(report: Record) -> Iterator[float]:
    for task in report["tasks"]:
        yield from [task["chance"]] * len(task["metrics"])


def _bar(mean: Record | None, chance: float) -> str:
    if mean is None:
        return ""
    found = f"<div class=bar><i style='width:{100 * mean['mean']:.2f}%'></i>"
    if mean["low"] is not None:
        low, high = max(0.0, mean["low"]), min(1.0, mean["high"])
        found += f"<b style='left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%'></b>"
    return found + (f"<u style='left:{100 * chance:.2f}%'></u>" if chance else "") + "</div>"


def _section(task: Record, items: Sequence[Record]) -> Iterator[str]:
    e, main = html.escape, next(iter(task["metrics"]))
    yield f"<section><h2>{e(task['name'])}</h2>"
    if len(task["groups"]) > 1:
        yield f"<details><summary>{len(task['groups'])} groups</summary><div class=wide><table>"
        for name, mean in task["groups"].items():
            score, span = told(mean)
            yield f"<tr><td>{e(name) or '-'}<td class=n>{mean['n'] if mean else 0:,}<td class=n>{score}<td class=n>{span}"
        yield "</table></div></details>"
    yield "<p>"
    for show in ("all", "right", "wrong"):
        yield f"<button data-show={show} aria-pressed={str(show == 'all').lower()}>{show}</button>"
    yield "</p>"
    for number, item in enumerate(items[:MAX_SHOWN], 1):
        grade = item.get(main)
        kind = "none" if grade is None else "right" if grade == 1 else "wrong"
        given = str(item["given"]).strip().replace("\n", " ")[:80]
        rest = {k: v for k, v in item.items() if k not in ("task", "prompt", "given", "right")}
        prompt = item["prompt"] if isinstance(item["prompt"], str) else _chat_text(item["prompt"])
        yield (
            f"<details class={kind}><summary>{number}. {kind if grade in (None, 0, 1) else format(grade, '.2f')}: "
            f"{e(given) or '(nothing)'}</summary><pre>{e(prompt)}</pre><p>answer<pre>{e(str(item['given']))}</pre>"
            f"<p>right<pre>{e(_plain(item['right']))}</pre><pre>{e(json.dumps(rest, ensure_ascii=False))}</pre></details>"
        )
    if len(items) > MAX_SHOWN:
        yield f"<p>The first {MAX_SHOWN} of {len(items):,}; all are in items/{e(task['name'])}.jsonl."
    yield "</section>"


def _chat_text(messages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
