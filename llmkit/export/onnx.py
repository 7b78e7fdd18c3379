"""ONNX: the network as a graph for ONNX Runtime and others, with its keys and values as inputs and outputs.

One graph serves the prompt (no past) and every token after it, any number of rows, and rows of different lengths by a
mask. Names of inputs and outputs are those that Hugging Face's exporters chose, which its runtimes look for.

Shapes: B rows, T new tokens, P positions in the past, S = P + T, K key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.export.source import load_plain
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.model.hf import read_config, read_json
from llmkit.model.rope import rope_tables
from llmkit.products import Linear
from llmkit.storage import Draft, FileRecord, disk, machine_errors, sha256_of
from llmkit.tokenizer import Tokenizer

_MODEL = "model.onnx"
_IN_ONE_FILE = 1 << 30  # bytes of weights; protobuf ends at 2 GiB, so larger ones lie in a second file
_LARGEST_DIFFERENCE = 1e-4  # of logits, for each unit of the largest: more is a fault


class Past:
    """Keys and values of the positions before, as the graph gets them; `append` as in `gpt.KVCache`."""

    def __init__(self, past: list[Tensor]):
        """Args: past: k_BKPE and v_BKPE of each layer, one after the other."""
        self._past = past
        self.present: list[Tensor] = []

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.cat((self._past[2 * layer], k_BKTE), dim=2)
        v = torch.cat((self._past[2 * layer + 1], v_BKTE), dim=2)
        self.present += [k, v]
        return k, v


class Graph(nn.Module):
    """What is exported: the blocks of a GPT, with positions and masks made of one mask as data, not as control flow."""

    def __init__(self, model: GPT):
        super().__init__()
        self.gpt = _with_plain_linears(model)

    def forward(self, ids_BT: Tensor, mask_BS: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits [B, T, V] and `past` with the new positions.

        Args:
            ids_BT: the new tokens.
            mask_BS: 1 for tokens, 0 for padding, of the past and the new ones. Positions count the 1s.
            past: as in `Past`; P may be 0.
        """
        decoder, config = self.gpt.model, self.gpt.config
        T, P = ids_BT.shape[1], past[0].shape[2]
        positions_BT = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, P:]
        x_BTD, rope = decoder.embed_tokens(ids_BT), None
        if config.positions == "learned":
            x_BTD = x_BTD + decoder.embed_positions(positions_BT)
        else:
            rope = rope_tables(config, positions_BT)
        columns_S = torch.arange(P + T, device=ids_BT.device)
        own_T1 = columns_S[P:, None]
        # Padding sees itself, since the softmax over nothing is no number, and would spread.
        seen = ((columns_S <= own_T1) & mask_BS.bool()[:, None, None, :]) | (columns_S == own_T1)
        near = seen if config.sliding_window is None else seen & (columns_S > own_T1 - config.sliding_window)
        cache: Any = Past(past)
        for i, block in enumerate(decoder.layers):
            x_BTD, _ = block(x_BTD, rope, seen if i < config.n_full_layers else near, False, cache)
        return F.linear(decoder.norm(x_BTD), self.gpt.head_weight), *cache.present


def _with_plain_linears(module: nn.Module) -> Any:
    """Replaces our matrices, which choose among libraries by size, by PyTorch's own on the same weights."""
    for name, child in module.named_children():
        if isinstance(child, Linear):
            plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
            plain.weight, plain.bias = child.weight, child.bias
            setattr(module, name, plain)
        else:
            _with_plain_linears(child)
    return module


# --- the command -----------------------------------------------------------------------------------------------------


def export_onnx(folder: Path, out: Path) -> list[str]:
    """Writes a folder with the graph, config.json and the tokenizer, whole or not at all; returns what to tell a user.

    The graph is run by ONNX Runtime before anything is kept: with and without a past its logits must be ours.

    Args:
        folder: a checkpoint or Hugging Face folder; adapters are merged.
        out: the folder to write; it is not there yet.

    Raises:
        UserError: for a model that isn't supported.
        MachineError: if the files can't be written.
    """
    _require_packages()
    config = read_config(folder)
    if config.experts is not None:
        raise UserError(f"{folder}: a mixture of experts is not written as ONNX: its graph depends on the tokens")
    if not config.causal:
        raise UserError(f"{folder}: a {config.family} sees text in both directions: it has no past to keep")
    tokenizer, model = Tokenizer.load(folder), load_plain(folder, torch.float32)
    facts = read_json(folder).get("llmkit")
    facts = {"stage": "exported", "step": 0, **(facts if isinstance(facts, dict) else {}), "export": "onnx"}
    files = model_files(config, torch.float32, tokenizer, facts)
    files["README.md"] = _card(config, facts).encode()
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    with machine_errors(out.parent):
        draft = Draft(out, n_bytes + sum(map(len, files.values())) + (4 << 20))
        try:
            program = _program_of(model)
            _tidy(program.model, config)
            program.save(draft.folder / _MODEL, external_data=n_bytes > _IN_ONE_FILE)
            for file in sorted(draft.folder.iterdir()):
                draft.files[file.name] = _synced(file)
            worst = largest_difference(model, draft.folder / _MODEL)
            if not worst <= _LARGEST_DIFFERENCE:
                raise RuntimeError(f"{folder}: the graph's logits differ by {worst:.2g} of the largest: it is not kept")
            for name, content in files.items():
                draft.write(name, [content])
            draft.commit({"export": {"format": "onnx", "from": str(folder)}})
        except BaseException:
            draft.discard()
            raise
    return [f"ONNX Runtime's logits differ from llmkit's by at most {worst:.1g} of the largest"]


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(f"writing ONNX needs the extra ({e.name}): pip install 'llmkit[onnx]'") from None


def _synced(file: Path) -> FileRecord:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.sync(fd)
    finally:
        os.close(fd)
    return FileRecord(file.stat().st_size, sha256_of(file))


def input_names(config: GPTConfig) -> list[str]:
    """In order; the past's are `past_key_values.0.key`, `past_key_values.0.value` and so on."""
    past = [f"past_key_values.{i}.{kind}" for i in range(config.n_layers) for kind in ("key", "value")]
    return ["input_ids", "attention_mask", *past]


def output_names(config: GPTConfig) -> list[str]:
    """In order, as in `input_names`."""
    return ["logits", *(f"present.{i}.{kind}" for i in range(config.n_layers) for kind in ("key", "value"))]


def _program_of(model: GPT) -> Any:
    """What PyTorch's exporter makes of the model."""
    config = model.config
    B, T, P = 2, 3, 4  # nothing is 0 or 1, which would be taken for constants
    example = torch.zeros(B, T, dtype=torch.long), torch.ones(B, P + T, dtype=torch.long)
    past = [torch.zeros(B, config.kv_heads, P, config.width_of_head) for _ in range(2 * config.n_layers)]
    any_size = torch.export.Dim.AUTO
    shapes = ({0: any_size, 1: any_size}, {0: any_size, 1: any_size}, [{0: any_size, 2: any_size} for _ in past])
    chatty = logging.getLogger("torch.onnx")  # names packages that nothing here needs
    level = chatty.level
    with warnings.catch_warnings(), torch.no_grad(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # of what changes inside PyTorch in its next version
        stack.callback(chatty.setLevel, level)
        chatty.setLevel(logging.ERROR)
        return torch.onnx.export(
            Graph(model).eval(), (*example, past), dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=input_names(config), output_names=output_names(config),
        )  # fmt: skip


def _tidy(model: Any, config: GPTConfig) -> None:
    """Names the sizes that may vary, and drops the exporter's notes: source files and lines for every node."""
    graph = model.graph
    batch, new, past = "batch_size", "sequence_length", "past_sequence_length"
    whole = f"{past} + {new}"
    heads, wide = config.kv_heads, config.width_of_head
    shapes = {"input_ids": [batch, new], "attention_mask": [batch, whole], "logits": [batch, new, config.vocab_size]}
    for name in (*input_names(config), *output_names(config)):
        if name not in shapes:
            shapes[name] = [batch, heads, past if name.startswith("past") else whole, wide]
    for value in (*graph.inputs, *graph.outputs):
        value.shape = type(value.shape)(shapes[value.name])
    named = {*graph.inputs, *graph.outputs}
    values = [value for node in graph for value in node.outputs]
    for value in values:
        if value not in named:
            value.shape = None  # in the exporter's own names for sizes; runtimes work them out again
    for part in (model, graph, *graph, *values, *graph.inputs, *graph.initializers.values()):
        part.metadata_props.clear()
    model.producer_name, model.producer_version = "llmkit", None


# --- running it ------------------------------------------------------------------------------------------------------


class Session:
    """A graph in ONNX Runtime, on the CPU."""

    def __init__(self, file: Path, config: GPTConfig):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._config = config

    def __call__(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, past: list[np.ndarray] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [B, T, V] and the past for the next call; arguments as in `Graph.forward`, no past to begin with."""
        config = self._config
        if past is None:
            nothing = np.zeros((len(ids_BT), config.kv_heads, 0, config.width_of_head), np.float32)
            past = [nothing] * (2 * config.n_layers)
        feeds = dict(zip(input_names(config), [ids_BT, mask_BS, *past], strict=True))
        logits, *present = self._session.run(None, feeds)
        return logits, present


def largest_difference(model: GPT, file: Path) -> float:
    """Between the graph's logits and the model's, for each unit of the largest logit: over shapes, in one call and two."""
    session, longest = Session(file, model.config), model.config.max_seq_len
    worst = 0.0
    for B, P, T in _shapes(longest):
        generator = torch.Generator().manual_seed(B * 1000 + P + T)
        ids = torch.randint(0, model.model.embed_tokens.num_embeddings, (B, P + T), generator=generator)
        with torch.no_grad():
            want = model.logits(model(ids)).numpy()
        mask, pieces, past = np.ones((B, P + T), np.int64), [], None
        for start, end in ((0, P), (P, P + T)):
            if end > start:
                logits, past = session(ids[:, start:end].numpy(), mask[:, :end], past)
                pieces.append(logits)
        found = np.concatenate(pieces, axis=1)
        worst = max(worst, float(np.abs(found - want).max() / max(1.0, np.abs(want).max())))
    return worst


def _shapes(longest: int) -> Iterator[tuple[int, int, int]]:
    """(B, P, T) to be tried, within the context."""
    for B, P, T in ((1, 0, 1), (3, 0, 7), (2, 4, 3), (1, 9, 1), (2, 1, 40)):
        P = min(P, longest - 1)
        yield B, P, min(T, longest - P)


def _card(config: GPTConfig, facts: dict[str, Any]) -> str:
    return (
        "---\nlibrary_name: onnxruntime\npipeline_tag: text-generation\ntags: [llmkit, onnx]\n---\n\n"
        f"# {facts['stage']} checkpoint, step {facts['step']}, as ONNX\n\n"
        f"`{_MODEL}` is the network in fp32 ({config.family}, {config.n_layers} layers of {config.d_model}, context "
        f"{config.max_seq_len}).\n\n| input | shape | type |\n|---|---|---|\n"
        "| input_ids | [batch, new] | int64 |\n"
        "| attention_mask | [batch, past + new]: 1 for tokens, 0 for padding | int64 |\n"
        f"| past_key_values.i.key, .value | [batch, {config.kv_heads}, past, {config.width_of_head}]; past may be 0 | "
        "float32 |\n\nOutputs: `logits` [batch, new, vocabulary] and `present.i.key`, `.value`, the past of the next "
        "call.\n"
    )
