"""`llmkit export`: a model for other programs, as GGUF or ONNX."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmkit.config import UserError
from llmkit.storage import resolve_model


def run(args: argparse.Namespace) -> int:
    """Finds the model that is meant, writes it in the other format and says where it is."""
    folder, out = resolve_model(args.model), Path(args.out)
    if out.exists():
        raise UserError(f"{out}: is there already: choose another name for the export")
    if args.format == "gguf":
        from llmkit.export.gguf import export_gguf

        kind = args.type or "f16"
        notes = export_gguf(folder, out, kind)
    else:
        from llmkit.export.onnx import export_onnx

        kind = args.type or "f32"
        if kind != "f32":
            raise UserError(f"--type {kind}: ONNX is written as f32; --format gguf has {kind}")
        notes = export_onnx(folder, out)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    n_bytes = sum(file.stat().st_size for file in files)
    print(f"{out}: {folder} as {args.format} {kind}, {n_bytes / 1e6:.2f} MB")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
