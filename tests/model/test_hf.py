"""Hugging Face folders, both ways: the same logits as transformers, and every damaged folder refused in one line."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.config import UserError
from llmkit.model.config import GPTConfig, RopeScaling
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.hf import config_from_hf, config_to_hf, count_parameters, load_model, read_config

transformers = pytest.importorskip("transformers")

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VOCAB = 96
FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
VARIANTS = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "mqa_wide_heads": {"n_kv_heads": 1, "head_dim": 16},
    "untied": {"tie_embeddings": False},
    "11_layers": {"n_layers": 11},
    "theta": {"rope_theta": 1e6},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_theta": 5e5, "rope_scaling": RopeScaling(factor=8.0, original_max_seq_len=32)},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


def shape(family: str = "llama", **options) -> GPTConfig:
    sizes = {
        "n_layers": 2,
        "n_heads": 4,
        "d_model": 32,
        "d_ff": 48,
        "max_seq_len": 128,
        "vocab_size": VOCAB,
        "norm_eps": 1e-5,
    }
    if options.get("mlp_bias") and family == "qwen3":
        options = {**options, "mlp_bias": False}  # Qwen3's attention_bias covers q, k, v and o; its MLP has none
    if options.get("o_bias") and family == "qwen2":
        options = {}  # Qwen2 always has q, k and v biases and no others
    return GPTConfig(**{**sizes, **FAMILIES[family], **options})


def noisy(config: GPTConfig, std: float = 0.5) -> GPT:
    """Every tensor random, norms and biases too, so that none can be lost unseen."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, std, generator=generator)
    return model.eval()


def write_folder(folder: Path, model: GPT, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, dtype, IDS, {"note": "ours"})))
    (folder / "generation_config.json").write_text(json.dumps(IDS))
    save_file({n: t.to(dtype) for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@contextmanager
def silence() -> Iterator[None]:
    """Asserts that nothing is logged by any library at INFO or above a progress bar, and nothing warned."""
    records: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(f"{record.name}: {record.getMessage()}")

    handler, loggers = Recorder(logging.WARNING), [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert records == []
    assert [str(w.message) for w in caught] == []


def random_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, 100), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    ids = random_ids()
    with torch.no_grad():
        a, b = ours.logits(ours(ids)), theirs(ids).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    # At this std a wrong detail shows: the check would be empty on near-uniform logits.
    assert b.std() > 1.0


# --- the same function as transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_folder_in_transformers(tmp_path, family, variant):
    ours = noisy(shape(family, **VARIANTS[variant]))
    write_folder(tmp_path, ours)
    with silence():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__.lower().startswith(family)
    assert_same_logits(ours, theirs.eval())
    assert count_parameters(ours.config) == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert read_config(tmp_path) == ours.config.model_copy(update=written(ours.config))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_folder_in_ours(tmp_path, family, variant):
    config = shape(family, **VARIANTS[variant])
    hf = config_to_hf(config, torch.float32, IDS, {})
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    with silence():
        theirs.save_pretrained(tmp_path)
        ours = load_model(tmp_path)
    assert_same_logits(ours, theirs)
    assert ours.config == config.model_copy(update=written(config))
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def written(config: GPTConfig) -> dict[str, int]:
    """The sizes that a config.json spells out although they were derived."""
    return {"n_kv_heads": config.kv_heads, "head_dim": config.width_of_head, "d_ff": config.width_of_mlp}


def test_sharded_folder_of_transformers(tmp_path):
    ours = noisy(shape("llama", n_layers=11))
    write_folder(tmp_path / "one", ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 10
    again = load_model(tmp_path / "many")
    for name, p in ours.named_parameters():  # layer 10 is not layer 2: names are never sorted as text
        assert torch.equal(p, again.get_parameter(name)), name


@pytest.mark.parametrize("scaling", [None, VARIANTS["llama3_rope"]["rope_scaling"]])
def test_rope_is_read_from_either_generation_of_keys(scaling):
    config = shape(rope_theta=12345.0, rope_scaling=scaling)
    hf = config_to_hf(config, torch.float32, IDS, {})
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    new = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    for form in (hf, old, new):
        read = config_from_hf(form)
        assert (read.rope_theta, read.rope_scaling) == (12345.0, scaling)


def test_tied_weights_stay_one_tensor(tmp_path):
    ours = noisy(shape())
    write_folder(tmp_path, ours)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert again.head_weight is again.model.embed_tokens.weight
    ids = random_ids()
    assert torch.equal(again.logits(again(ids)), ours.logits(ours(ids)))


def test_dtype_is_the_saved_one_unless_asked_for(tmp_path):
    ours = noisy(shape())
    write_folder(tmp_path, ours, torch.bfloat16)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.bfloat16}
    wide = load_model(tmp_path, dtype=torch.float32)
    for name, p in wide.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, ours.get_parameter(name).bfloat16().float()), name


# --- folders that are refused ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    model = GPT(shape())
    init_weights(model, 0)
    return write_folder(tmp_path / "model", model)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as e:
        load_model(folder)
    assert "\n" not in str(e.value)


def edit_config(folder: Path, **changes) -> None:
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change,match",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"layers\.1\.mlp\.up_proj\.weight: .*nothing.*\(48, 32\)",
        ),
        (lambda t: t.update({"model.layers.2.x": torch.zeros(1)}), r"layers\.2\.x: .*\(1,\).*nothing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(33)}), r"norm\.weight: .*\(33,\).*\(32,\)"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(32, VOCAB)}), r"embed_tokens"),
        (lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()}), r"int8: floating-point weights"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), r"int8: floating-point weights"),
        (lambda t: t.update({"lm_head.weight": t["model.norm.weight"][None].clone(), "y": torch.ones(1)}), r": y: "),
    ],
)
def test_weights_that_do_not_fit_the_config(folder, change, match):
    edit_weights(folder, change)
    refused(folder, match)


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"num_attention_heads": 5}, "n_heads"),
        ({"hidden_size": "many"}, "d_model"),
        ({"num_hidden_layers": 10**4}, "do not belong together"),
        ({"hidden_size": 2**20, "intermediate_size": 2**22}, "do not belong together"),
        ({"vocab_size": 10**12}, "do not belong together"),
        ({"hidden_size": 10**30, "head_dim": 8}, "do not belong together"),
        ({"vocab_size": VOCAB + 1}, "embed_tokens"),
    ],
)
def test_configs_that_are_refused(folder, changes, match):
    edit_config(folder, **changes)
    refused(folder, match)


def test_missing_key_in_config(folder):
    hf = json.loads((folder / "config.json").read_text())
    del hf["hidden_size"]
    (folder / "config.json").write_text(json.dumps(hf))
    refused(folder, "'hidden_size' is missing")


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "\xff\xfe"])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json")


def test_no_config_and_no_folder(folder, tmp_path):
    (folder / "config.json").unlink()
    refused(folder, "config.json: No such file")
    refused(tmp_path / "absent", "No such file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, "only safetensors are read, `llmkit import` converts")


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_weights(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    refused(folder, "not a readable safetensors file|do not belong together")


@pytest.mark.parametrize("target", ["../outside.safetensors", "sub/../../outside.safetensors", "/etc/passwd"])
def test_index_cannot_leave_the_folder(folder, tmp_path, target):
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "sub").mkdir()
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), target)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused(folder, "points outside the folder")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "{"]
)
def test_broken_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "index")


def test_index_with_a_missing_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00001-of-00002.safetensors: no such file")


def test_code_named_by_a_folder_is_never_imported(folder):
    canary = folder / "canary_module.py"
    canary.write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    edit_config(
        folder,
        auto_map={"AutoConfig": "canary_module.Config", "AutoModelForCausalLM": "canary_module.Model"},
        model_file="canary_module.py",
        custom_pipelines={"x": {"impl": "canary_module.Pipeline"}},
    )
    load_model(folder)
    assert not (folder / "ran").exists()
    assert not any("canary_module" in name for name in sys.modules)
