"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors, which `peft` loads, and beside
them llmkit.json, which says what model they belong to.

PEFT names layers as the family's checkpoint does. GPT-2 has q, k and v in one matrix there (`c_attn`): their adapters
become one of the sum of their ranks, with B in blocks.

Shapes as in `lora`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.model.config import GPTConfig, LoraConfig
from llmkit.model.layouts import config_of, from_disk, to_disk
from llmkit.model.lora import Base, LoraLinear, adapters_of, candidates, heads_of, merged_weight
from llmkit.storage import MANIFEST, Damaged, read_manifest, resolve_model, sha256_of, to_json

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "llmkit.json"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# Of an adapter_config.json: what must not be set, because it changes what is computed in a way that isn't done here.
_UNKNOWN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base as well


# --- what an adapter folder is ---------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters, and not a model of its own."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in whole)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{file}: not JSON: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: a JSON object is expected")
    return data


def _own(folder: Path) -> dict[str, Any]:
    """What llmkit.json says; empty for a folder that PEFT wrote."""
    return _read_json(folder / OWN) if (folder / OWN).is_file() else {}


def told_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of base and adapters together, if the folder says it; else it is that of the base."""
    config = _own(folder).get("config")
    return config if isinstance(config, dict) else None


def base_of(folder: Path, check: bool = False) -> Path:
    """The folder of the model that adapters belong to.

    Args:
        folder: of the adapters.
        check: also that it is the very model they were trained beside, as far as the folder can tell. Reads all of it.

    Raises:
        UserError: the base is not there, or is another.
    """
    name = _read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{folder / CONFIG}: base_model_name_or_path is missing: set it to the model they were trained on"
        )
    path = Path(name)
    if check or not (path / "config.json").is_file():
        try:
            path = resolve_model(name)
        except UserError as e:
            raise UserError(
                f"{folder}: these are adapters; the model they belong to can't be loaded: {e} (named by "
                f"base_model_name_or_path in {CONFIG})"
            ) from None
    if is_adapter(path):
        raise UserError(f"{folder}: its base {name} is itself an adapter: merge that first with `llmkit merge`")
    told = _own(folder).get("base")
    if check and isinstance(told, dict) and told.get("weights") != weights_hash(path):
        raise UserError(
            f"{folder}: its base {name} has other weights than the model these adapters were trained beside: put that "
            f"back, or name it as base_model_name_or_path in {CONFIG}"
        )
    return path


def weights_hash(folder: Path) -> str:
    """A hash that stands for all weights of a model folder: by its manifest, or else by reading them."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no model*.safetensors: adapters need a model to belong to")
    digest = hashlib.sha256()
    try:
        known = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
    except Damaged as e:
        raise UserError(f"{folder}: damaged checkpoint: {e}") from None
    for file in files:
        digest.update((known[file.name]["sha256"] if file.name in known else sha256_of(file)).encode())
    return digest.hexdigest()


def base_named(name: str) -> Base:
    """The base that a recipe names: a run by its checkpoint, so that PEFT finds it too, a hub model by its name."""
    folder = resolve_model(name)
    if is_adapter(folder):
        raise UserError(
            f"init_from ({name}): these are adapters, and lora would put more on top of them: merge them first with "
            f"`llmkit merge {name} OUT`"
        )
    return Base(str(folder) if Path(name).exists() else name, weights_hash(folder))


def refuse_other_base(folder: Path, base: Base) -> None:
    """Raises UserError if a checkpoint's adapters were trained beside another model than the one at hand."""
    told = _own(folder).get("base")
    if isinstance(told, dict) and told.get("weights") != base.weights:
        raise UserError(
            f"{base.name}: is not the model this run was started with (weights {base.weights[:12]}, then "
            f"{str(told.get('weights'))[:12]}): put it back, or choose another `out`"
        )


# --- names -----------------------------------------------------------------------------------------------------------


def _parts(config: GPTConfig, module: str) -> list[str]:
    """Our layers in one matrix on disk, in the order of its rows: names of weights."""
    return list(from_disk(config, {f"{module}.weight": torch.empty(1, 3, device="meta")}))


def _modules(model: nn.Module) -> dict[str, list[str]]:
    """Every matrix on disk that may have an adapter: our layers in it."""
    config = config_of(model)
    own = {f"{name}.weight": torch.empty(1, 1, device="meta") for name in candidates(model)}
    disk = [name.removesuffix(".weight") for name in to_disk(config, own)]
    return {module: [p.removesuffix(".weight") for p in _parts(config, module)] for module in disk}


# --- writing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained, under PEFT's names: views, but where layers share a matrix on disk."""
    layers, plain = adapters_of(model), candidates(model)
    out: dict[str, Tensor] = {}
    for module, names in _modules(model).items():
        here = [layers[name] for name in names if name in layers]
        if not here:
            continue
        A_RI: Tensor = here[0].lora_A.weight
        B_OR: Tensor = here[0].lora_B.weight
        magnitude_O = here[0].magnitude
        if len(names) > 1:
            A_RI = torch.cat([layer.lora_A.weight for layer in here])
            B_OR = torch.zeros(sum(plain[name].out_features for name in names), len(A_RI)).to(A_RI)
            for rows, columns, layer in _blocks(names, layers, plain):
                B_OR[rows, columns] = layer.lora_B.weight
            if magnitude_O is not None:  # the lengths of rows without an adapter are what they are
                lengths = [
                    layers[n].magnitude if n in layers else torch.linalg.vector_norm(plain[n].weight, dim=1)
                    for n in names
                ]
                magnitude_O = torch.cat([t for t in lengths if t is not None])
        out |= {f"{_PREFIX}{module}.lora_A.weight": A_RI, f"{_PREFIX}{module}.lora_B.weight": B_OR}
        if magnitude_O is not None:
            out[f"{_PREFIX}{module}.lora_magnitude_vector"] = magnitude_O
    return {**out, **{_PREFIX + name: p for name, p in heads_of(model).items()}}


def adapter_parameters(model: nn.Module) -> set[str]:
    """The parameters that `adapter_tensors` holds, by our names: those of adapters, and a head of scores."""
    layers = adapters_of(model)
    own = {n for n, _ in model.named_parameters() if ".lora_" in n and n.rpartition(".lora_")[0] in layers}
    return own | heads_of(model).keys()


def adapter_sources(model: nn.Module) -> set[str]:
    """What `adapter_tensors` looks at beside those: weights without an adapter whose rows stand beside rows with one."""
    layers = adapters_of(model)
    return {
        f"{name}.weight"
        for names in _modules(model).values()
        if any(name in layers and layers[name].magnitude is not None for name in names)
        for name in names
        if name not in layers
    }


def _blocks(
    names: list[str], layers: dict[str, LoraLinear], plain: dict[str, nn.Linear]
) -> list[tuple[slice, slice, LoraLinear]]:
    """Where each adapter's B stands in that of the matrix on disk: rows, columns, the layer."""
    blocks, row, column = [], 0, 0
    for name in names:
        end = row + plain[name].out_features
        if name in layers:
            r = layers[name].config.r
            blocks.append((slice(row, end), slice(column, column + r), layers[name]))
            column += r
        row = end
    return blocks


def adapter_values(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What `adapter_tensors` gave as parameters of a model with the same adapters, which need have no memory: views, by our
    names. Raises ValueError for other names or shapes."""
    layers, plain, own = adapters_of(model), candidates(model), adapter_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        mine, given = (tuple(t[name].shape) if name in t else "nothing" for t in (own, tensors))
        if mine != given:
            raise ValueError(f"{name}: the adapters hold {given}, the model {mine}")
    places = {layer: name for name, layer in layers.items()}
    for module, names in _modules(model).items():
        if not any(name in layers for name in names):
            continue
        A_RI, B_OR = (tensors[f"{_PREFIX}{module}.lora_{kind}.weight"] for kind in "AB")
        magnitude_O = tensors.get(f"{_PREFIX}{module}.lora_magnitude_vector")
        for rows, columns, layer in _blocks(names, layers, plain):
            name = places[layer]
            yield f"{name}.lora_A.weight", A_RI[columns]
            yield f"{name}.lora_B.weight", B_OR[rows, columns]
            if magnitude_O is not None and layer.magnitude is not None:
                yield f"{name}.lora_magnitude_vector.weight", magnitude_O[rows]
    yield from ((name, tensors[_PREFIX + name]) for name in heads_of(model))


def adapter_files(files: dict[str, bytes], model: nn.Module) -> dict[str, bytes]:
    """Makes the small files of a model those of its adapters; a model without any keeps what it has.

    Args:
        files: what `files.model_files` gave.
        model: a GPT or a classifier.
    """
    layers = adapters_of(model)
    if not layers:
        return files
    first = next(iter(layers.values()))
    base, config = first.origin, first.config
    told = {"base": {"name": base.name, "weights": base.weights}, "config": json.loads(files["config.json"])}
    if config.quantize is not None:
        told["quantize"] = config.quantize
    peft = _peft_config(model, config, base)
    rest = {n: data for n, data in files.items() if n not in ("config.json", "README.md")}
    n_scores = next((len(p) for n, p in heads_of(model).items() if n in ("score.weight", "classifier.weight")), None)
    card = _card(files["README.md"].decode(), base.name, peft["task_type"], n_scores)
    return {CONFIG: to_json(peft).encode(), OWN: to_json(told).encode(), **rest, "README.md": card.encode()}


def _peft_config(model: nn.Module, config: LoraConfig, base: Base) -> dict[str, Any]:
    """adapter_config.json."""
    layers, modules, shape = adapters_of(model), _modules(model), config_of(model)
    here = {module: sum(name in layers for name in names) for module, names in modules.items()}
    targeted = [module for module, n in here.items() if n]
    ranks = {module: config.r * here[module] for module in targeted if here[module] > 1}
    widen = math.sqrt if config.rslora else float
    alphas = {module: config.alpha * widen(here[module]) for module in ranks}
    heads = list(dict.fromkeys(name.rpartition(".")[0] for name in heads_of(model)))
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM" if shape.causal else None,
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _number(config.alpha),
        "rank_pattern": _by_leaf(ranks, targeted),
        "alpha_pattern": _by_leaf({module: _number(a) for module, a in alphas.items()}, targeted),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": shape.family == "gpt2",
        "target_modules": _short(targeted, list(modules) if shape.experts is None else None),
        "modules_to_save": heads or None,
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _short(targeted: list[str], known: list[str] | None) -> list[str]:
    """The last parts of their names where these mean no other layer; else whole names (with experts, whose matrices
    bear the same names, always)."""
    leaves = sorted({_leaf(module) for module in targeted})
    meant = known is not None and {m for m in known if _leaf(m) in leaves} == set(targeted)
    return leaves if meant else targeted


def _by_leaf(values: dict[str, Any], targeted: list[str]) -> dict[str, Any]:
    """The same by last parts of names, where those of one last part are equal."""
    short = {_leaf(module): value for module, value in values.items()}
    same = all(values.get(module) == short.get(_leaf(module)) for module in targeted)
    return short if same else values


def _card(card: str, base: str, task: str | None, n_scores: int | None) -> str:
    """The model's card, with how to load the adapters in place of how to load a model."""
    told = card.split("---\n", 2)[2].partition("```python")[0]
    auto = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}.get(
        task or "", "AutoModelForMaskedLM"
    )
    labels = "" if n_scores is None else f", num_labels={n_scores}"
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(base)}\ntags: [llmkit, lora]\n---\n"
        f"{told}Adapters for `{base}`, which is needed with them:\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f"base = {auto}.from_pretrained({json.dumps(base)}{labels})\n"
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n\n'
        "`llmkit merge THIS_FOLDER OUT` writes one plain model.\n"
    )


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """What one of our matrices gains."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    magnitude_O: Tensor | None

    def merged(self, W_OI: Tensor) -> Tensor:
        device = W_OI.device
        magnitude_O = None if self.magnitude_O is None else self.magnitude_O.to(device)
        return merged_weight(W_OI, self.A_RI.to(device), self.B_OR.to(device), self.scaling, magnitude_O)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read: what it does to the tensors of its base, under our names."""

    folder: Path
    updates: dict[str, Update]
    whole: dict[str, Tensor]
    """Tensors that were trained as they are: a head of scores, embeddings."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors that are not the base's."""
        return (*self.updates, *self.whole)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError unless everything fits a model whose parameters have these shapes."""
        for name, update in self.updates.items():
            (R, I), (O, R2) = update.A_RI.shape, update.B_OR.shape
            lengths = (O,) if update.magnitude_O is None else tuple(update.magnitude_O.shape)
            if shapes.get(name) != (O, I) or R != R2 or lengths != (O,):
                raise UserError(
                    f"{self.folder}: adapts {name} by {R} x {I} and {O} x {R2}, the base's is "
                    f"{shapes.get(name, 'not there')}: they do not belong together"
                )
        for name, tensor in self.whole.items():
            if shapes.get(name) != tuple(tensor.shape):
                raise UserError(
                    f"{self.folder}: {name} is {tuple(tensor.shape)}, the base's is {shapes.get(name, 'not there')}: they "
                    "do not belong together"
                )

    @torch.no_grad()
    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """What becomes of one of the base's tensors; in its dtype."""
        if name in self.whole:
            return self.whole[name].to(tensor)
        return self.updates[name].merged(tensor) if name in self.updates else tensor


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    except Exception as e:  # safetensors raises its own class, OSError and ValueError for malformed files
        raise UserError(f"{file}: not a readable safetensors file: {e}") from None


def adapter_heads(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that came with a folder's adapters as a whole; none for a plain model."""
    if not is_adapter(folder):
        return {}
    tensors = _read_tensors(folder / WEIGHTS)
    return {n.removeprefix(_PREFIX): tuple(t.shape) for n, t in tensors.items() if "lora_" not in n}


def head_rows(folder: Path) -> int | None:
    """How many scores an adapter's head gives; None: it has none."""
    for name, shape in adapter_heads(folder).items():
        if name in ("score.weight", "classifier.weight"):
            return shape[0]
    return None


def read_adapter(folder: Path, config: GPTConfig) -> Adapter:
    """Reads what PEFT or we wrote.

    Args:
        folder: of the adapters.
        config: the base's shape.

    Raises:
        UserError: another method than LoRA, options that aren't computed here, or files that are no adapters.
    """
    told, file = _read_json(folder / CONFIG), folder / WEIGHTS
    _check_supported(folder / CONFIG, told)
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in _read_tensors(file).items():
        if not name.startswith(_PREFIX) or not tensor.is_floating_point():
            raise UserError(f"{file}: {name} ({tensor.dtype}) is no tensor of a LoRA adapter")
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if match:
            modules.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in name or ".base_layer." in name:
            raise UserError(f"{file}: {name}: adapters of embeddings and biases are not supported")
        else:
            whole |= from_disk(config, {name.removeprefix(_PREFIX): tensor})
    updates: dict[str, Update] = {}
    for module, found in modules.items():
        if not {"lora_A.weight", "lora_B.weight"} <= found.keys():
            raise UserError(f"{file}: {module} has {', '.join(found)}: lora_A and lora_B are expected")
        updates |= _split(_update(folder / CONFIG, told, module, found), _parts(config, module))
    return Adapter(folder, updates, whole)


def _check_supported(file: Path, told: dict[str, Any]) -> None:
    if told.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {told.get('peft_type')!r} is not supported: LORA is")
    if odd := [key for key in _UNKNOWN if told.get(key)]:
        raise UserError(f"{file}: {odd[0]} is not supported: plain LoRA, rsLoRA and DoRA are")
    if told.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise UserError(
            f"{file}: init_lora_weights {told['init_lora_weights']!r} also changed the base: convert the adapters with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _update(file: Path, told: dict[str, Any], module: str, found: dict[str, Tensor]) -> Update:
    """One matrix on disk."""
    A_RI, B_OR = found["lora_A.weight"], found["lora_B.weight"]
    if A_RI.dim() != 2 or B_OR.dim() != 2 or not len(A_RI):
        raise UserError(f"{file.parent / WEIGHTS}: {module}: lora_A and lora_B must be matrices")
    alpha = _pattern_value(file, told.get("alpha_pattern") or {}, module, told.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{file}: lora_alpha must be a number (got {alpha!r})")
    rank = len(A_RI)
    scaling = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
    return Update(A_RI, B_OR, scaling, found.get("lora_magnitude_vector"))


def _pattern_value(file: Path, patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or its end. PEFT takes regular expressions; from a file
    that anyone may have written, names alone are taken."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(
                f"{file}: alpha_pattern {pattern!r}: names of modules are supported, other patterns are not"
            )
        if module == name or module.endswith(f".{name}"):
            return value
    return default


def _split(update: Update, names: Iterable[str]) -> dict[str, Update]:
    """The rows of a matrix on disk as those of our matrices in it."""
    names = list(names)
    if len(names) == 1:
        return {names[0]: update}
    rows = update.B_OR.chunk(len(names))
    lengths = (None,) * len(names) if update.magnitude_O is None else update.magnitude_O.chunk(len(names))
    return {n: replace(update, B_OR=B, magnitude_O=m) for n, B, m in zip(names, rows, lengths, strict=True)}
