"""`llmkit report`: gathers, and writes the page."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.storage import machine_errors, replace_file
from llmkit.tools.report.folders import Found, find
from llmkit.tools.report.gather import Limits, gather

MAX_BYTES = 5_000_000
_PLACE = "@DATA@"


def run(args: argparse.Namespace) -> int:
    """Writes the page; its path goes to stdout."""
    found = find(args.folders)
    out = _out(args)
    with machine_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, build(found, args.title or Path(args.folders[0]).resolve().name))
    print(f"{out}: {len(found.runs)} runs, {out.stat().st_size / 1e6:.2f} MB")
    return 0


def _out(args: argparse.Namespace) -> Path:
    if args.out is None:
        if len(args.folders) > 1:
            raise UserError("report: several folders: say with --out where the page goes")
        return Path(args.folders[0]) / "report.html"
    out = Path(args.out)
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"report: --out {out}: the page is one HTML file: its name must end in .html")
    return out


def build(found: Found, title: str, most: int = MAX_BYTES) -> str:
    """The page as text, of at most so many bytes: as long as it is larger, less of everything is shown.

    Raises:
        UserError: where even the least of so many runs is too large.
    """
    limits = Limits()
    while True:
        page = fill({"title": title, **gather(found, limits)})
        if len(page.encode()) <= most:
            return page
        if limits.points <= 2:
            raise UserError(
                f"report: {len(found.runs)} runs don't fit on a page of {most / 1e6:g} MB: name fewer folders"
            )
        limits = limits.scaled(0.7)


def fill(data: dict[str, Any]) -> str:
    """The page with its data inside. Nothing in them can end the element that holds them."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    page = (files("llmkit.tools.report") / "page.html").read_text("utf-8")
    return page.replace(_PLACE, text.replace("<", "\\u003c").encode("utf-8", "replace").decode())
