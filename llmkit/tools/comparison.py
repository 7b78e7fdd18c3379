"""What `llmkit compare` found, as a table and as a picture."""

from __future__ import annotations

import statistics
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Cell = Callable[[Record], str]
Span = tuple[float, float] | None  # a bar's whisker, from and to
Panel = tuple[str, list[float | None], list[Span], str]
"""Of a picture: title, a value and a whisker of each model, and how the value is written."""

_CJK = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC", "SimHei")


# --- the table -------------------------------------------------------------------------------------------------------


def table(report: Record) -> str:
    """A Markdown table with a model a column, which reads as well as plain text; below it what the numbers are."""
    models = report["models"]
    rows = [["", *(m["name"] for m in models)]]
    for name, cell in _measures(report):
        rows.append([" ".join(name.replace("|", "/").split()), *(cell(m) for m in models)])
    return markdown(rows, list(notes(report)))


def markdown(rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """A table of equally many cells a row, the first row its head, and a list of remarks below it."""
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join(f"{'-' * (w + 1)}{':' if i else '-'}" for i, w in enumerate(widths)) + "|")
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks)]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Cells as wide as their columns: the first begins at the left, numbers end at the right."""
    cells = [
        f" {' ' * (w - _width(text)) if i else ''}{text}{'' if i else ' ' * (w - _width(text))} "
        for i, (text, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "|" + "|".join(cells) + "|"


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _measures(report: Record) -> Iterator[tuple[str, Cell]]:
    """The table's rows: what each is called, and its cell of a model."""
    first = report["models"][0]
    alone = len(report["models"]) == 1

    def of_first(m: Record, key: str) -> str:
        return "" if alone else f" ({100 * m[key] / first[key]:.1f} %)"

    yield "parameters", lambda m: f"{m['parameters']:,}{of_first(m, 'parameters')}"
    yield "size on disk, MB", lambda m: f"{m['bytes'] / 1e6:,.2f}{of_first(m, 'bytes')}"
    yield "precision", lambda m: m["precision"]
    if report["held_out"] is not None:
        yield "loss, nats per token", lambda m: _number(m["loss"], ".4f")
        yield "perplexity", lambda m: _number(m["perplexity"], ",.3f")
        yield "bits per byte", lambda m: _number(m["bits_per_byte"], ".4f")
    for part, score in first.get("scores", {}).items():
        yield from _score_rows(part, score, report["models"])
    if "answers" in first:
        yield "answers that ended, %", lambda m: f"{100 * m['answers']['ended']:.1f}"
        yield "tokens of an answer", lambda m: f"{m['answers']['tokens']:.1f}"
        for part in sorted({part for m in report["models"] for part in m["answers"]["errors"]}):
            yield f"{part} failed on", partial(_errors, part)
    if report["speed"] is not None:
        yield "prompt, tokens/s", lambda m: speed_of(m["speed"]["prompt"])
        yield "generation, tokens/s", lambda m: speed_of(m["speed"]["generation"])


def _score_rows(part: str, score: Record | None, models: Sequence[Record]) -> Iterator[tuple[str, Cell]]:
    unit = ", %" if _is_share(models, part) else ""
    yield f"{part}{unit}", lambda m: _mean(m["scores"][part], bool(unit))
    if len(models) > 1:
        yield f"{part}, kept of {models[0]['name']}", lambda m: _kept(m["scores"][part], score)
    for group, told in (score or {}).get("by", {}).items():
        n = "" if told is None else f" (n = {told['n']:,})"
        yield f"{part}: {group}{unit}{n}", partial(_group_mean, part, group, bool(unit))


def _group_mean(part: str, group: str, share: bool, m: Record) -> str:
    return _mean(_group(m["scores"][part], group), share)


def _errors(part: str, m: Record) -> str:
    return f"{m['answers']['errors'].get(part, 0):,} answers"


def _group(score: Record | None, group: str) -> Record | None:
    found: Record | None = None if score is None else score["by"].get(group)
    return found


def _is_share(models: Sequence[Record], part: str) -> bool:
    """Shares are told as percentages, other grades as they are."""
    return all(score is None or score["is_share"] for score in (m["scores"][part] for m in models))


def _mean(score: Record | None, share: bool) -> str:
    if score is None:
        return "-"
    scale, form = (100, ".1f") if share else (1, ".4f")
    text = format(scale * score["mean"], form)
    if score["low"] is None:
        return text
    return f"{text} ({format(scale * score['low'], form)} to {format(scale * score['high'], form)})"


def _kept(score: Record | None, first: Record | None) -> str:
    """A share of what is nothing, or less, says nothing."""
    if score is None or first is None or first["mean"] <= 0:
        return "-"
    return f"{100 * score['mean'] / first['mean']:.1f} %"


def speed_of(runs: Sequence[float]) -> str:
    """The median of several runs, and the least and most."""
    return f"{statistics.median(runs):,.0f} ({min(runs):,.0f} to {max(runs):,.0f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def notes(report: Record) -> Iterator[str]:
    """What the numbers are: on what data, of what, and what can't be compared."""
    held_out, speed = report["held_out"], report["speed"]
    if held_out is not None:
        left_out = f" ({held_out['left_out']:,} are too long or hold no answer)" if held_out["left_out"] else ""
        what = {
            "text": f"{held_out['n']:,} documents of {held_out['path']}, without their ends",
            "chats": f"the answers, with their ends, in {held_out['n']:,} conversations of {held_out['path']}{left_out}",
        }[held_out["kind"]]
        yield f"held out: {what}; rows of at most {held_out['context']:,} tokens"
    if not report["same_tokenizer"]:
        yield (
            "the tokenizers differ: a token is not the same to each, so compare bits per byte, not loss and perplexity"
            if held_out is not None
            else "the tokenizers differ: a token of the speeds is not the same to each"
        )
    if held_out is not None and held_out["kind"] == "chats" and not report["same_template"]:
        yield "the chat templates differ: what the models are asked for is not quite the same text"
    if report["questions"] is not None:
        n = report["models"][0]["answers"]["n"]
        yield (
            f"answers: greedy, to {n:,} questions of {report['questions']['path']}; in parentheses 95 % intervals "
            "(Wilson's of right and wrong)"
        )
    if speed is not None:
        where = report["device"] + (f" ({report['threads']} of its threads)" if report["device"] == "cpu" else "")
        yield (
            f"speed: one prompt of {speed['prompt_tokens']:,} tokens and {speed['new_tokens']:,} new ones on {where}; median "
            f"(least to most) of {speed['repeats']} runs, in turns"
        )


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(report: Record, path: Path, panels: Sequence[Panel] | None = None) -> Path | None:
    """Bars of size, held-out loss, grades and speed, or of what `panels` holds, a colour a model; None where Matplotlib is
    not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import font_manager, patches, pyplot as plt

    models = report["models"]
    colours = [plt.get_cmap("tab10")(i % 10) for i in range(len(models))]
    panels = list(_panels(report)) if panels is None else panels
    groups = {part: s["by"] for part, s in models[0].get("scores", {}).items() if s is not None and s.get("by")}
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in _CJK if name in installed)]
    with plt.rc_context({"font.family": family, "font.size": 9}):
        n_columns = max(3, len(panels))
        height = 3.1 + 2.9 * len(groups) + 0.45
        figure = plt.figure(figsize=(2.5 * n_columns, height), dpi=110)
        grid = figure.add_gridspec(1 + len(groups), 1)
        top = grid[0].subgridspec(1, len(panels))
        for i, (title, values, errors, form) in enumerate(panels):
            _bars(figure.add_subplot(top[i]), title, values, errors, form, colours)
        for k, (part, by) in enumerate(groups.items()):
            _grouped(figure.add_subplot(grid[1 + k]), part, list(by), models, colours)
        handles = [patches.Patch(color=colour) for colour in colours]
        figure.legend(
            handles, [m["name"] for m in models], loc="upper center", ncols=min(len(models), 6), frameon=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # boxes, where no font has a name's characters
            figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / height))
            figure.savefig(path)
        plt.close(figure)
    return path


_LEVEL = 14  # so many labels stand side by side
_FAR = 50  # times as large: from there on a scale is logarithmic, or the small ones would be no bars


def _panels(report: Record) -> Iterator[Panel]:
    models = report["models"]
    without: list[Span] = [None] * len(models)
    yield "parameters, M", [m["parameters"] / 1e6 for m in models], without, ",.3g"
    if report["held_out"] is not None:
        key, title = (
            ("loss", "loss, nats per token") if report["same_tokenizer"] else ("bits_per_byte", "bits per byte")
        )
        yield title, [m[key] for m in models], without, ".3f"
    for part in models[0].get("scores", {}):
        scale, title, form = (100, f"{part}, %", ".1f") if _is_share(models, part) else (1, part, ".3g")
        scores = [m["scores"][part] for m in models]
        yield title, [s and scale * s["mean"] for s in scores], [_span(s, scale) for s in scores], form
    if report["speed"] is not None:
        for key, title in (("prompt", "prompt, tokens/s"), ("generation", "generation, tokens/s")):
            runs = [m["speed"][key] for m in models]
            yield title, [statistics.median(r) for r in runs], [(min(r), max(r)) for r in runs], ",.0f"


def _span(score: Record | None, scale: float) -> Span:
    return None if score is None or score["low"] is None else (scale * score["low"], scale * score["high"])


def _bars(
    axes: Any, title: str, values: Sequence[float | None], spans: Sequence[Span], form: str, colours: Sequence[Any]
) -> None:
    for i, (value, span, colour) in enumerate(zip(values, spans, colours, strict=True)):
        if value is None:
            continue
        axes.bar(i, value, color=colour, width=0.7)
        _whisker(axes, i, value, span)
        top = max(value, span[1] if span else value)
        axes.annotate(format(value, form), (i, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_title(title, fontsize=9.5)
    axes.set_xticks([])
    axes.set_xlim(-0.7, len(values) - 0.3)
    axes.margins(y=0.14)
    there = [value for value in values if value is not None]
    if there and 0 < min(there) < max(there) / _FAR:
        axes.set_yscale("log")  # with room below the smallest, so that it is a bar too
        axes.set_ylim(min(there) / 3, max(there) * 2)
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 7))
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _grouped(axes: Any, part: str, groups: Sequence[str], models: Sequence[Record], colours: Sequence[Any]) -> None:
    """A cluster of bars for each group of answers, a bar a model."""
    share = _is_share(models, part)
    scale, width = (100 if share else 1), 0.8 / len(models)
    for k, (m, colour) in enumerate(zip(models, colours, strict=True)):
        for g, group in enumerate(groups):
            score = _group(m["scores"][part], group)
            if score is not None:
                at = g + (k - (len(models) - 1) / 2) * width
                axes.bar(at, scale * score["mean"], width * 0.92, color=colour)
                _whisker(axes, at, scale * score["mean"], _span(score, scale))
    n = [_group(models[0]["scores"][part], group) for group in groups]
    labels = [group if s is None else f"{group}\nn = {s['n']:,}" for group, s in zip(groups, n, strict=True)]
    axes.set_xticks(range(len(groups)), labels, fontsize=8, rotation=90 if len(groups) > _LEVEL else 0)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel(f"{part}, %" if share else part)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _whisker(axes: Any, at: float, value: float, span: Span) -> None:
    if span is not None:
        ends = [[max(0.0, value - span[0])], [max(0.0, span[1] - value)]]
        axes.errorbar([at], [value], yerr=ends, color="black", lw=1, capsize=2.5)
