"""`llmkit quantize`: a model's folder in 8 or 4 bits a weight."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import Dialogue, keys_of, read_source
from llmkit.data.sources import documents, files_of, units_of, where
from llmkit.data.turns import encode_dialogue
from llmkit.export.calibration import quantize_model
from llmkit.inference.batch import check_vocabulary
from llmkit.model.adapters import is_adapter
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.model.hf import read_config, read_json, read_labels
from llmkit.model.quantization import (
    GROUP,
    KEY,
    MAX_GROUP,
    QUANTIZED,
    Quantization,
    quantizable,
    stored_tensors,
)
from llmkit.model.weights import load_classifier, load_model, quantization_in, weight_files
from llmkit.storage import MANIFEST, Draft, machine_errors, resolve_model, to_json
from llmkit.tokenizer import Tokenizer
from llmkit.training.checkpoint import index_of, safetensors_chunks, shard

TOKENS = 65_536  # of calibration: beyond, the codes hardly change
_SMALL = (".json", ".txt", ".model", ".jinja")
_NOT_COPIED = ("config.json", MANIFEST)


def run(args: argparse.Namespace) -> int:
    """Finds the model that is meant, writes it in few bits and says how large it is."""
    folder, out = resolve_model(args.model), Path(args.out)
    quantization = _asked(args)
    if out.exists():
        raise UserError(f"{out}: is there already: choose another folder for the quantised model")
    if is_adapter(folder):
        raise UserError(f"{folder}: holds adapters, no whole model: `llmkit merge` makes one of them and their base")
    if (there := quantization_in(folder)) is not None:
        raise UserError(f"{folder}: is quantised already ({there}): take the model it was made from")
    model: nn.Module = load_model(folder) if read_labels(folder) is None else load_classifier(folder)
    texts: list[list[int]] = []
    if args.calibrate is not None:
        tokenizer = Tokenizer.load(folder)
        if isinstance(model, GPT):
            check_vocabulary(model, tokenizer.vocab_size)
        texts = calibration_texts(args.calibrate, args.field, tokenizer, read_config(folder).max_seq_len)
    n = len(quantizable(model))
    with tqdm(total=n, desc="quantize", unit=" matrices", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        quantize_model(model, quantization, texts, bar.update)
    told: dict[str, Any] = {"from": str(folder), **quantization.to_json()}
    if texts:
        told |= {"calibrated_on": args.calibrate, "calibration_tokens": sum(map(len, texts))}
    n_bytes = write_quantized(model, folder, out, quantization, told)
    before = sum(file.stat().st_size for file in weight_files(folder))
    print(f"{out}: {folder} as {quantization}: {n_bytes / 1e6:,.2f} MB of weights, {n_bytes / before:.3f} of its size")
    return 0


def _asked(args: argparse.Namespace) -> Quantization:
    """What the options ask for, if they go together."""
    if args.bits == 8:
        for name in ("group", "calibrate"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"--{name} {getattr(args, name)}: is for --bits 4: 8 bits have a scale a row: leave it out"
                )
    if args.bits == 4 and args.dynamic:
        raise UserError("--dynamic: is for --bits 8: 4 bits are computed with as floating-point numbers: leave it out")
    group = GROUP if args.group is None else args.group
    if not 2 <= group <= MAX_GROUP or group % 2:
        raise UserError(f"--group {group}: an even number from 2 to {MAX_GROUP} is expected: 32, 64 or 128 are usual")
    if args.field is not None and args.calibrate is None:
        raise UserError(f"--field {args.field}: says where the text of --calibrate stands: name its file too")
    return Quantization(args.bits, group, args.dynamic)


# --- texts of calibration --------------------------------------------------------------------------------------------


def calibration_texts(path: str, field: str | None, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Ids of texts or conversations as the model sees them, none longer than its context, about TOKENS of them.

    Args:
        path: documents, or conversations in any layout of stage sft: which, the first file's keys tell.
        field: where a document stands in its row. Default: text.
        tokenizer: the model's.
        context: tokens of a row; longer texts are several.

    Raises:
        UserError: there is no text, or a file can't be read.
    """
    rows: list[list[int]] = []
    n = 0
    for ids in _encoded(path, field, tokenizer):
        for first in range(0, len(ids), context):
            rows.append(ids[first : min(first + context, first + TOKENS - n)])
            n += len(rows[-1])
            if n >= TOKENS:
                return rows
    if not rows:
        raise UserError(f"--calibrate {path}: there is no text in it")
    return rows


def _encoded(path: str, field: str | None, tokenizer: Tokenizer) -> Iterator[list[int]]:
    source = SourceConfig(path=path, field=field or "text")
    files = files_of(source)
    keys = [] if files[0].kind == "txt" else keys_of(files[0])
    if field is None and keys and "text" not in keys:
        for piece, number, dialogue in read_source(source, "dialogue", tokenizer.template is not None):
            assert isinstance(dialogue, Dialogue)
            try:
                turns = encode_dialogue(
                    tokenizer, dialogue.messages, dialogue.tools, chat=tokenizer.template is not None
                )
            except UserError as e:
                raise UserError(f"{where(piece, number)}: {e}") from None
            yield from ([int(i) for i in t.ids] for t in turns)
        return
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for unit in units_of(files, None):
        for piece in unit:
            for text in documents(piece, source.field):
                if ids := tokenizer.encode(text):
                    yield start + ids


# --- the folder ------------------------------------------------------------------------------------------------------


def write_quantized(model: nn.Module, folder: Path, out: Path, quantization: Quantization, told: dict[str, Any]) -> int:
    """Writes a quantised model as a folder, whole or not at all; returns the bytes of its weights.

    Args:
        model: quantised.
        folder: the model it was made from, whose tokenizer and configuration it keeps.
        out: is not there yet.
        quantization: how its matrices are held.
        told: what configuration, card and manifest tell of where it comes from.
    """
    tensors: dict[str, Tensor] = {name: t.cpu().contiguous() for name, t in stored_tensors(model).items()}
    shards = shard(QUANTIZED, tensors)
    blobs = _small_files(folder, quantization, told)
    if len(shards) > 1:
        blobs[f"{QUANTIZED}.index.json"] = index_of(shards)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    with machine_errors(out.parent):
        draft = Draft(out, n_bytes + sum(map(len, blobs.values())) + (1 << 16))
        try:
            for file, part in shards.items():
                draft.write(file, safetensors_chunks(part))
            for file, content in blobs.items():
                draft.write(file, [content])
            draft.commit({"quantize": told})
        except BaseException:
            draft.discard()
            raise
    return sum((out / file).stat().st_size for file in shards)


def _small_files(folder: Path, quantization: Quantization, told: dict[str, Any]) -> dict[str, bytes]:
    """What else makes a model: the files beside the weights it was made from, with a configuration and a card of its own."""
    files = {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.is_file() and p.suffix in _SMALL and p.name not in _NOT_COPIED and not p.name.endswith(".index.json")
    }
    hf = read_json(folder)
    facts = hf.get("llmkit") if isinstance(hf.get("llmkit"), dict) else {}
    hf |= {KEY: quantization.to_json(), "llmkit": {**(facts or {}), "quantize": told}}
    files["config.json"] = to_json(hf).encode()
    files["README.md"] = _card(read_config(folder), quantization, {**(facts or {}), **told}).encode()
    return files


def _card(config: GPTConfig, quantization: Quantization, facts: dict[str, Any]) -> str:
    """README.md. Its front matter names no library of the hub's: these weights are read here alone."""
    rows = {
        "architecture": config.family,
        "layers x width": f"{config.n_layers} x {config.d_model}",
        "context": f"{config.max_seq_len} tokens",
        "weights": str(quantization),
        **facts,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\ntags: [llmkit, quantized]\n---\n\n# A model in {quantization.bits} bits\n\n| | |\n|---|---|\n{table}\n\n"
        '```\nllmkit generate THIS_FOLDER --prompt "..."\n```\n'
    )
