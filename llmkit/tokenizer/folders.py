"""Reading the tokenizer of a folder, also of others: its definition, control tokens, chat template. Runs no code of it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.storage import resolve_model
from llmkit.tokenizer.chat import CHATML, ChatTemplate
from llmkit.tokenizer.config import MASKS
from llmkit.tokenizer.pieces import model_type, vocab_of

logger = logging.getLogger(__name__)

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
FILES = ("tokenizer.json", "tokenizer.model")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@dataclass(frozen=True)
class Folder:
    """What a folder says of its tokenizer."""

    spec: dict[str, Any]
    names: dict[str, str | None]
    stops: list[int]
    """Further ids that end a generation."""
    template: str | None


def find(folder: Path, adapters: bool = True) -> Path:
    """The folder itself, or a run's newest checkpoint that holds a tokenizer; for adapters that have none, unless that
    is ruled out, their model's."""
    for place in [folder, *sorted(folder.glob("checkpoints/step-*"), reverse=True)]:
        if any((place / name).is_file() for name in FILES):
            return place
    base = _read_json(folder / "adapter_config.json", {}).get("base_model_name_or_path")
    if isinstance(base, str) and adapters:  # that came without: their model's
        return find(resolve_model(base), adapters=False)
    raise UserError(f"{folder}: no tokenizer.json or tokenizer.model here, nor in checkpoints/step-*")


def read(folder: Path) -> Folder:
    """Everything but the tokenizer itself. Raises UserError for files that are missing or damaged."""
    config = _read_json(folder / "tokenizer_config.json", {})
    if (folder / "tokenizer.json").is_file():
        spec = _read_json(folder / "tokenizer.json")
        spec.setdefault("added_tokens", [])
    else:
        from llmkit.tokenizer.sentencepiece import read_model

        spec, named = read_model(folder / "tokenizer.model")
        config = {**named, **{k: v for k, v in config.items() if v is not None}}
        _add_others(spec, config, _read_json(folder / "added_tokens.json", {}))
    if config.get("auto_map"):
        logger.warning("%s: its own tokenizer code (auto_map) is ignored: code of a model folder never runs", folder)
    model_type(spec)  # raises for a model that isn't known
    spec.update(truncation=None, padding=None)  # else every text would be cut or filled up
    names, stops = _control_tokens(folder, spec, config)
    return Folder(spec, names, stops, _template(folder, config))


def _add_others(spec: dict[str, Any], config: dict[str, Any], more: dict[str, Any]) -> None:
    """Tokens that a folder with a tokenizer.model adds to it elsewhere."""
    known = {t["content"] for t in spec["added_tokens"]} | set(vocab_of(spec))
    found = {int(i): {**FLAGS, "special": False, **t} for i, t in config.get("added_tokens_decoder", {}).items()}
    found |= {int(i): {**FLAGS, "special": False, "content": t} for t, i in more.items() if int(i) not in found}
    for i, token in sorted(found.items()):
        if token["content"] not in known:
            spec["added_tokens"].append({"id": i, **{k: token[k] for k in ("content", *FLAGS, "special")}})


# --- files -----------------------------------------------------------------------------------------------------------


def _read_json(file: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not file.is_file():
        return default
    try:
        data = json.loads(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: a JSON object is expected (got {type(data).__name__})")
    return data


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 at byte {e.start}") from None


def read_template(name: str) -> ChatTemplate:
    """`chatml`, or the template in a file."""
    return ChatTemplate(CHATML, "chatml") if name == "chatml" else ChatTemplate(_read_text(Path(name)), name)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    if source is not None and not isinstance(source, str):
        raise UserError(f"tokenizer_config.json: chat_template must be text (got {type(source).__name__})")
    return source


# --- control tokens --------------------------------------------------------------------------------------------------


def _control_tokens(
    folder: Path, spec: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, str | None], list[int]]:
    """The named tokens of a foreign folder, and further ids that end a generation; marks named tokens as special."""
    added: list[dict[str, Any]] = spec["added_tokens"]
    text_of = {i: t for t, i in vocab_of(spec).items()} | {t["id"]: t["content"] for t in added}
    generation = _read_json(folder / "generation_config.json", {})

    def name_of(key: str) -> str | None:
        value = config.get(key)
        return value.get("content") if isinstance(value, dict) else value

    names = {key: name_of(key) for key in NAMED}
    stops = generation.get("eos_token_id")
    if stops is None:
        stops = _read_json(folder / "config.json", {}).get("eos_token_id")
    stops = [i for i in (stops if isinstance(stops, list) else [stops]) if i in text_of]
    if names["eos_token"] is None and stops:
        names["eos_token"] = text_of[stops[0]]
    if names["eos_token"] is None:  # BERT ends a text with its separator
        names["eos_token"], names["bos_token"] = names["sep_token"], names["bos_token"] or names["cls_token"]
    if names["eos_token"] is None:
        raise UserError("no end-of-text token: neither tokenizer_config.json nor generation_config.json names one")
    more = config.get("additional_special_tokens") or []
    more = [t.get("content") if isinstance(t, dict) else t for t in more]
    for name in dict.fromkeys([*names.values(), *more, *(text_of[i] for i in stops)]):
        mark_special(spec, name)
    controls = [t["content"] for t in added if t["special"]]
    if names["mask_token"] is None:
        names["mask_token"] = next((t for t in MASKS if t in controls), None)
    if names["pad_token"] in (None, names["eos_token"]):
        free = [t for t in controls if t not in (names["eos_token"], names["bos_token"], names["mask_token"])]
        spare = [t for word in ("pad", "reserved", "unused", "unk") for t in free if word in t.lower()]
        names["pad_token"] = spare[0] if spare else names["eos_token"]
        if not spare:
            logger.warning(
                "%s: no control token is free for padding, so the end token serves: never mask by its id", folder
            )
    return {k: v for k, v in names.items() if v is not None or k in NAMED[:3]}, stops


def mark_special(spec: dict[str, Any], name: str | None) -> None:
    """Makes a token that the configuration names a control token."""
    if name is None:
        return
    for token in spec["added_tokens"]:
        if token["content"] == name:
            token["special"] = True
            return
    vocab = vocab_of(spec)
    if name not in vocab:
        raise UserError(f"tokenizer_config.json names {name!r}, which tokenizer.json doesn't hold")
    spec["added_tokens"].append({"id": vocab[name], "content": name, **FLAGS, "special": True})
