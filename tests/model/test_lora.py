"""Adapters: the same outputs and gradients as PEFT's, only what should be trained is, merging and switching off are exact."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.model import quantized
from llmkit.model.adapters import (
    CONFIG,
    OWN,
    WEIGHTS,
    adapter_files,
    adapter_tensors,
    base_named,
    base_of,
    is_adapter,
)
from llmkit.model.config import ExpertsConfig, GPTConfig, LoraConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import ActorCritic, SequenceClassifier, init_head
from llmkit.model.hf import read_config, read_labels
from llmkit.model.lora import (
    Base,
    LoraLinear,
    adapter_size,
    adapters_of,
    apply_lora,
    describe,
    heads_of,
    merge_into_base,
    merged,
    row_norms,
    targets_of,
    without_adapters,
)
from llmkit.model.saving import load_saved, saved_tensors
from llmkit.model.weights import load_classifier, load_model, load_weights
from llmkit.plan import cost_of
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.verify import problems_of

V = 320
BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip
FAMILIES = {
    "llama": {"n_kv_heads": 2},
    "qwen2": {"qkv_bias": True, "tie_embeddings": False},
    "gpt2": GPT2,
    "qwen3_moe": {"qk_norm": True, "experts": ExpertsConfig(n=4, n_active=2, d_ff=16)},
}
KINDS = {
    "lora": {},
    "rslora": {"rslora": True, "targets": ("q_proj", "v_proj", "layers.1.mlp")},
    "dora": {"dora": True},
    "some_dora": {"dora": True, "targets": ("k_proj", "layers.0.self_attn.o_proj")},
}
HERE = Base("base", "hash")
# transformers computes RMSNorm, angles and experts in fp32 at best; GPT-2 has none of them.
CLOSE = {"llama": 1e-5, "qwen2": 1e-5, "gpt2": 1e-10, "qwen3_moe": 1e-4}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


def shape(family: str = "llama", **options) -> GPTConfig:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 48, "max_seq_len": 32, "vocab_size": V}
    return GPTConfig(**{**sizes, **FAMILIES[family], **options})


def noise(parameters, seed: int = 1, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * std)


def plain(family: str = "llama", dtype: torch.dtype = torch.float64, **options) -> GPT:
    model = GPT(shape(family, **options))
    init_weights(model, 0)
    noise(p for n, p in model.named_parameters() if not n.endswith("norm.weight"))
    return model.to(dtype)


def adapted(model: nn.Module, base: Base = HERE, **options) -> nn.Module:
    """With adapters that do something."""
    apply_lora(model, LoraConfig(**{"r": 4, "alpha": 6.0, **options}), 7, base)
    noise((p for p in model.parameters() if p.requires_grad), seed=2)
    return model


def write(folder: Path, model: nn.Module, facts: dict | None = None, **head) -> Path:
    """A base's folder, as training writes it."""
    folder.mkdir(parents=True)
    config = model.config
    files = model_files(config, next(model.parameters()).dtype, BYTES, facts or {"stage": "sft", "step": 1}, **head)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_adapter(folder: Path, model: nn.Module, **head) -> Path:
    folder.mkdir(parents=True)
    dtype = next(model.parameters()).dtype
    save_file({n: t.detach().contiguous() for n, t in adapter_tensors(model).items()}, folder / WEIGHTS)
    files = model_files(model.config, dtype, BYTES, {"stage": "sft", "step": 1}, **head)
    for name, content in adapter_files(files, model).items():
        (folder / name).write_bytes(content)
    return folder


IDS = torch.randint(0, V, (3, 11), generator=torch.Generator().manual_seed(5))


def logits(model: GPT, ids: Tensor = IDS) -> Tensor:
    return model.logits(model(ids))


def theirs(folder: Path, dtype: torch.dtype):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def silently(caplog, load):
    """What `load` gives, if neither PEFT nor transformers had anything to say of what it read."""
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls what transformers will rename
        loaded = load()
    assert not [r for r in caplog.records if r.name.startswith(("peft", "transformers"))]
    return loaded


# --- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save(family, kind, tmp_path, caplog):
    """B23: `PeftModel.from_pretrained` says nothing, gives our logits, and the gradients of its tensors are ours."""
    import peft

    dtype = torch.float32 if family == "qwen3_moe" else torch.float64  # its experts have no fp64
    base, close = write(tmp_path / "base", plain(family, dtype)), CLOSE[family]
    if family == "qwen3_moe" and kind == "rslora":
        with pytest.raises(UserError, match="experts"):
            adapted(load_model(base), **KINDS[kind])  # of layer 1's MLP there are experts alone
        return
    model = adapted(load_model(base), base_named(str(base)), **KINDS[kind])
    folder = write_adapter(tmp_path / "adapter", model)
    hf = theirs(base, dtype)
    their = silently(caplog, lambda: peft.PeftModel.from_pretrained(hf, folder, is_trainable=True)).to(dtype)
    got, want = logits(model), their(IDS).logits[..., :V]
    assert (got - want).abs().max() < close
    with without_adapters(model):
        assert (got - logits(model)).abs().max() > 1e-2
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    compared = 0
    for name, p in their.named_parameters():
        if p.requires_grad and ".attn.c_attn." not in name:  # there three of ours are one of theirs
            own = name.removeprefix("base_model.model.").replace(".default", "")
            own = own.replace("transformer.h", "model.layers").replace("attn.c_proj", "self_attn.o_proj")
            own = own.replace("mlp.c_fc", "mlp.up_proj").replace("mlp.c_proj", "mlp.down_proj")
            own = own.replace(".attn.", ".self_attn.") if family != "gpt2" else own
            grad = model.get_parameter(own).grad
            assert grad is not None and p.grad is not None, name
            assert (grad - p.grad).abs().max() < close * max(1, float(p.grad.abs().max())), name
            compared += 1
    assert compared > 2 or family == "gpt2"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_we_load_what_peft_saves(family, options, tmp_path):
    """Ranks and scales of their own for some matrices, q, k and v in one: merged into the base on loading."""
    import peft

    base = write(tmp_path / "base", plain(family))
    (leaf, wide), layered = (("c_attn", "c_fc"), True) if family == "gpt2" else (("q_proj", "up_proj"), False)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[leaf, wide, "c_proj" if layered else "down_proj"], fan_in_fan_out=layered,
        task_type="CAUSAL_LM", rank_pattern={leaf: 3}, alpha_pattern={leaf: 5}, **options,
    )  # fmt: skip
    their = peft.get_peft_model(theirs(base, torch.float64), config).double()
    noise((p for p in their.parameters() if p.requires_grad), seed=4)
    want = their.eval()(IDS).logits[..., :V]
    their.save_pretrained(tmp_path / "adapter")
    folder = resolve_model(tmp_path / "adapter")
    assert is_adapter(folder) and base_of(folder) == base
    model = load_model(folder, torch.float64)
    assert not adapters_of(model)
    assert (logits(model) - want).abs().max() < CLOSE[family]
    assert (want - logits(load_model(base, torch.float64))).abs().max() > 1e-2
    assert read_config(folder) == read_config(base)
    assert Tokenizer.load(folder).hash == Tokenizer.load(base).hash, "PEFT saved none: it is the base's"
    assert not problems_of(folder)


def test_a_reward_model_of_adapters(tmp_path, caplog):
    """The head is trained and saved whole; PEFT and we give the same scores from the folder."""
    import peft
    import transformers

    base = write(tmp_path / "base", plain("llama"))
    model = SequenceClassifier(read_config(base), 1).double()
    init_head(model, 3)
    load_weights(model, base, may_lack=model.head_names, may_hold=("lm_head.weight",))
    adapted(model, base_named(str(base)), targets=("q_proj",))
    assert model.score.weight.requires_grad and "score.weight" in describe(model)
    folder = write_adapter(tmp_path / "adapter", model, head="classify", n_labels=1)
    lengths = torch.tensor([11, 4, 7])
    want = model(IDS, lengths)
    assert read_labels(folder) == ("LABEL_0",)
    again = load_classifier(folder, torch.float64, n_scores=1)
    assert (again(IDS, lengths) - want).abs().max() < 1e-10
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float64, pad_token_id=BYTES.pad_id
    )
    their = silently(caplog, lambda: peft.PeftModel.from_pretrained(hf, folder)).double()
    mask = (torch.arange(11)[None] < lengths[:, None]).long()
    ids = torch.where(mask.bool(), IDS, BYTES.pad_id)
    ids[ids == BYTES.pad_id] = torch.where(mask.bool(), 5, BYTES.pad_id)[ids == BYTES.pad_id]
    assert (their(ids, attention_mask=mask).logits - model(ids, lengths)).abs().max() < CLOSE["llama"]
    # A head of PEFT's without our llmkit.json: how many scores it gives is counted.
    (folder / OWN).unlink()
    assert read_labels(folder) == ("LABEL_0",)
    assert (load_classifier(folder, torch.float64)(IDS, lengths) - want).abs().max() < 1e-10


# --- what is trained, and what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained(kind):
    """B23: the first output is the base's, only adapters change, and the model's state dict is the base's to the bit."""
    model = plain(dtype=torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    first = logits(model)
    config = LoraConfig(r=3, **KINDS[kind])
    n_matrices, n_lengths, _ = adapter_size(model, config)
    apply_lora(model, config, 0, HERE)
    assert (logits(model) - first).abs().max() < 1e-5
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == n_matrices + n_lengths
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        logits(model).logsumexp(-1).mean().backward()
        optimizer.step()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert (logits(model) - first).abs().max() > 1e-4, "training moved it"
    with without_adapters(model):
        assert torch.equal(logits(model), first)
    assert (logits(model) - first).abs().max() > 1e-4
    model.load_state_dict(before)  # a base's state dict, strictly


def test_first_weights():
    """A as PEFT draws it, from the seed alone; B zero; DoRA's lengths are those of the rows."""
    models = [plain(dtype=torch.float32) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        apply_lora(model, LoraConfig(r=64, dora=True), seed, HERE)
    one, same, other = (model.get_submodule("model.layers.0.mlp.down_proj") for model in models)
    assert isinstance(one, LoraLinear) and isinstance(same, LoraLinear) and isinstance(other, LoraLinear)
    assert torch.equal(one.lora_A.weight, same.lora_A.weight) and not torch.equal(
        one.lora_A.weight, other.lora_A.weight
    )
    bound = 48**-0.5
    assert 0.98 * bound < one.lora_A.weight.abs().max() <= bound
    assert abs(float(one.lora_A.weight.detach().std()) - bound / 3**0.5) < 0.01 * bound
    assert not one.lora_B.weight.any()
    assert one.magnitude is not None and torch.equal(one.magnitude, one.weight.norm(dim=1))


def test_dropout_in_training_alone():
    """B23: evaluation is deterministic and equals dropout 0; training drops, scales up, and leaves W x whole."""
    model, undropped = (adapted(plain(), dropout=p, targets=("o_proj",)) for p in (0.5, 0.0))
    assert torch.equal(logits(model.eval()), logits(undropped.eval()))
    layer = model.get_submodule("model.layers.0.self_attn.o_proj").train()
    assert isinstance(layer, LoraLinear)
    x = torch.ones(20_000, 32, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = layer(x) - nn.functional.linear(x, layer.weight)
    assert (drawn[0] - drawn[1]).abs().max() > 0
    expected = (layer.eval()(x) - nn.functional.linear(x, layer.weight))[0]
    assert (drawn.mean(0) - expected).abs().max() < 0.05 * expected.abs().max()
    zero = adapted(plain(), dropout=0.5, targets=("o_proj",)).train()
    for p in zero.parameters():
        if p.requires_grad:
            p.data.zero_()
    assert torch.equal(logits(zero), logits(plain())), "with B = 0 nothing is dropped of the model itself"


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_a_layer_is_pefts(options, dropout):
    """Outputs and gradients to 1e-10, with the same draw of dropout: one mask for both branches of DoRA."""
    from peft import LoraConfig as TheirConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    linear = nn.Linear(12, 10).double()
    layer = LoraLinear(linear, LoraConfig(r=3, alpha=4.0, dropout=dropout, **options), HERE)
    for name, p in layer.named_parameters():
        if "lora_" in name:
            p.data.fill_("magnitude" in name)
    noise(p for n, p in layer.named_parameters() if "lora_" in n)
    told = {f"use_{name}": value for name, value in options.items()}
    their = Linear(
        linear, "default", r=3, lora_alpha=4, config=TheirConfig(r=3, lora_alpha=4, lora_dropout=dropout, **told)
    ).double()
    pairs = [
        (layer.lora_A.weight, their.lora_A["default"].weight),
        (layer.lora_B.weight, their.lora_B["default"].weight),
    ]
    if layer.magnitude is not None:
        pairs.append((layer.magnitude, their.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, yours in pairs:
            yours.copy_(mine)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    outputs, inputs = [], []
    for module in (layer.train(), their.train()):
        torch.manual_seed(9)
        outputs.append(module(x))
        outputs[-1].square().sum().backward()
        inputs.append(x.grad)
        x.grad = None
    for mine, yours in [outputs, inputs, *((a.grad, b.grad) for a, b in pairs)]:
        assert (mine - yours).abs().max() < 1e-10 * max(1, float(yours.detach().abs().max()))
    assert (layer.eval()(x) - their.eval()(x)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recomputed_activations(kind):
    """Activation checkpointing gives the same gradients, dropout included, though no input of a block has one."""
    grads = []
    for recompute in (False, True):
        model = GPT(shape(), recompute).double()
        model.load_state_dict(plain().state_dict())
        adapted(model, dropout=0.3, **KINDS[kind]).train()
        torch.manual_seed(4)
        logits(model).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(g, grads[1][n]) and g.any() for n, g in grads[0].items())


def test_row_norms():
    """Against the matrix itself, and not negative where it is zero."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 7), (3, 7), (9, 3)))
    assert torch.allclose(row_norms(W, A, B, 1.5), (W + 1.5 * B @ A).norm(dim=1), rtol=0, atol=1e-12)
    assert row_norms(-2.0 * B @ A, A, B, 2.0).isfinite().all()


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets():
    model = plain()
    leaves = lambda *patterns: [n.removeprefix("model.layers.") for n in targets_of(model, patterns)]  # noqa: E731
    assert len(leaves()) == 14
    assert leaves("q_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert leaves("layers.1.mlp") == ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]
    assert leaves("layers.0-1.self_attn.o_proj") == ["0.self_attn.o_proj", "1.self_attn.o_proj"]
    assert leaves("model.layers.0.*.[qk]_proj") == ["0.self_attn.q_proj", "0.self_attn.k_proj"]
    assert len(targets_of(plain("qwen3_moe"), ())) == 8, "attention alone: experts and routers have none"


@pytest.mark.parametrize(
    "family,pattern,said",
    [
        ("llama", "qproj", "did you mean q_proj?"),
        ("llama", "attention", "there are q_proj"),
        ("llama", "layers.3-1", "the range 3-1 is empty"),
        ("qwen2", "lm_head", "heads, experts or routers"),
        ("qwen3_moe", "mlp", "heads, experts or routers"),
        ("llama", "proj", "is no matrix of the blocks"),
    ],
)
def test_targets_that_mean_nothing(family, pattern, said):
    with pytest.raises(UserError, match=r"lora\.targets") as e:
        targets_of(plain(family), (pattern,))
    assert said in str(e.value) and "\n" not in str(e.value)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(family, kind):
    """B23: the same logits, and afterwards the same bits as before; gradients still flow."""
    model = adapted(plain(family), **KINDS[kind]).eval()
    want, base = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    with merged(model):
        assert (logits(model) - want).abs().max() < 1e-10
        assert any(not torch.equal(t, base[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model), want)
    with pytest.raises(RuntimeError), merged(model):
        raise RuntimeError
    assert torch.equal(logits(model), want), "also after an error"
    merge_into_base(model)
    assert not adapters_of(model) and (logits(model) - want).abs().max() < 1e-10
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain(family).named_parameters()]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_there_and_back(family, kind):
    """What is saved is what is put back, to the bit, also where three matrices are one on disk; nothing else fits."""
    if family == "qwen3_moe" and kind == "rslora":
        return
    model, other = (adapted(plain(family, dtype=torch.bfloat16), **KINDS[kind]) for _ in range(2))
    noise((p for p in other.parameters() if p.requires_grad), seed=11)
    saved = {n: t.clone() for n, t in adapter_tensors(model).items()}
    load_saved(other, {WEIGHTS: saved})
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    name = next(iter(saved))
    with pytest.raises(ValueError, match="lora_A"):
        load_saved(other, {WEIGHTS: {**saved, name: saved[name][1:]}})
    with pytest.raises(ValueError, match="nothing"):
        load_saved(other, {WEIGHTS: {n: t for n, t in saved.items() if n != name}})


def test_an_actor_and_its_critic():
    """Each has its adapters in a folder of its own, and takes them back; switching off leaves the critic's head trained."""
    pair = [ActorCritic(plain(), SequenceClassifier(shape(), 1).double()) for _ in range(2)]
    for number, both in enumerate(pair):
        init_head(both.critic, 5)
        load_weights_of(both.critic, plain())
        for part in (both.actor, both.critic):
            adapted(part)
            noise((p for p in part.parameters() if p.requires_grad), seed=20 + number)
    one, two = pair
    saved = {file: {n: t.clone() for n, t in tensors.items()} for file, tensors in saved_tensors(one).items()}
    assert set(saved) == {WEIGHTS, f"critic/{WEIGHTS}"}
    assert (
        not any("score" in n for n in saved[WEIGHTS]) and "base_model.model.score.weight" in saved[f"critic/{WEIGHTS}"]
    )
    load_saved(two, saved)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    lengths = torch.tensor([11, 4, 7])
    want = one.critic(IDS, lengths)
    with without_adapters(one.actor):
        assert torch.equal(one.critic(IDS, lengths), want)
        assert torch.equal(logits(one.actor), logits(plain()))
    with without_adapters(one):
        assert (one.critic(IDS, lengths) - want).abs().max() > 1e-4
    assert torch.equal(one.critic(IDS, lengths), want)


def load_weights_of(critic: SequenceClassifier, model: GPT) -> None:
    critic.model.load_state_dict(model.model.state_dict())


def test_a_plain_models_files_stay():
    files = {"config.json": b"{}"}
    assert adapter_files(files, plain()) is files


def test_another_base_is_refused(tmp_path):
    """Adapters say which model they belong to, by a hash of its weights; a missing one is one sentence."""
    base = write(tmp_path / "base", plain(dtype=torch.float32))
    model = adapted(load_model(base), base_named(str(base)), targets=("q_proj",))
    folder = write_adapter(tmp_path / "adapter", model)
    assert (logits(load_model(folder)) - logits(model)).abs().max() < 1e-4
    assert not problems_of(folder)
    told = (base / "model.safetensors").read_bytes()
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other weights than the model these adapters were trained beside"):
        load_model(folder)
    assert "other weights" in problems_of(folder)[0]
    (base / "model.safetensors").write_bytes(told)
    load_model(folder)
    base.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"these are adapters; the model they belong to can't be loaded") as e:
        load_model(folder)
    assert "\n" not in str(e.value)
    assert "can't be loaded" in problems_of(folder)[0]
    with pytest.raises(UserError, match="merge them first"):
        base_named(str(folder))


@pytest.mark.parametrize(
    "change,said",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"init_lora_weights": "pissa"}, "also changed the base"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "names of modules are supported"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    ],
)
def test_foreign_configs_that_are_refused(change, said, tmp_path):
    base = write(tmp_path / "base", plain(dtype=torch.float32))
    folder = write_adapter(tmp_path / "adapter", adapted(load_model(base), base_named(str(base))))
    told = json.loads((folder / CONFIG).read_bytes())
    (folder / CONFIG).write_text(json.dumps({**told, **change}))
    with pytest.raises(UserError, match=said):
        load_model(folder)
    assert said in problems_of(folder)[0]


def test_damaged_adapters(tmp_path):
    base = write(tmp_path / "base", plain(dtype=torch.float32))
    folder = write_adapter(tmp_path / "adapter", adapted(load_model(base), base_named(str(base))))
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, said in (
        ({name: tensors[name][:, 1:].contiguous()}, "do not belong together"),
        ({name.replace("layers.0", "layers.9"): tensors[name]}, "lora_A and lora_B are expected"),
        ({"x": tensors[name]}, "no tensor of a LoRA adapter"),
        ({name.replace("lora_A.weight", "base_layer.bias"): tensors[name]}, "biases are not supported"),
        ({"base_model.model.lm_head.weight": tensors[name]}, "do not belong together"),
    ):
        save_file({n: t.clone() for n, t in {**tensors, **changed}.items()}, folder / WEIGHTS)
        with pytest.raises(UserError, match=said):
            load_model(folder)
        assert said in problems_of(folder)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, folder / WEIGHTS)
    assert "not finite" in problems_of(folder)[0]
    (folder / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(folder)


# --- 4 bits ----------------------------------------------------------------------------------------------------------


def test_quantised_base():
    """QLoRA: forward and backward are those of the unpacked matrices; state dicts and adapters don't hold them."""
    pytest.importorskip("bitsandbytes")
    config = {"quantize": "nf4", "dora": True, "targets": ("self_attn", "mlp")}
    whole = plain(dtype=torch.float32, d_model=64, d_ff=128)
    model = adapted(whole, **config)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, LoraLinear) and layer.packed is not None
    assert layer.packed.codes.numel() * 2 == 64 * 128 and layer.weight is None
    dense = plain(dtype=torch.float32, d_model=64, d_ff=128)
    with torch.no_grad():
        for name, packed in adapters_of(model).items():
            target = dense.get_parameter(f"{name}.weight")
            assert (packed.dense() - target).abs().max() < 0.2 * target.abs().max()
            target.copy_(packed.dense())
    dense = adapted(dense, **{**config, "quantize": None})
    load_saved(dense, {WEIGHTS: adapter_tensors(model)})
    for one in (model, dense):
        logits(one).logsumexp(-1).sum().backward()
    assert (logits(model) - logits(dense)).abs().max() < 1e-4
    for (name, a), (_, b) in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad),
        ((n, p) for n, p in dense.named_parameters() if p.requires_grad),
        strict=True,
    ):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4), name
    model.to(torch.bfloat16)
    assert layer.dense().dtype == torch.bfloat16 and layer.packed.codes.dtype == torch.uint8
    assert logits(model).isfinite().all()
    with pytest.raises(UserError, match="4-bit weights"), merged(model):
        pass
    assert "on nf4 weights" in describe(model)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install llmkit\[quant\]"):
        adapted(plain(dtype=torch.float32), quantize="nf4")


# --- cost ------------------------------------------------------------------------------------------------------------


def test_cost_is_that_of_the_model():
    """Parameters, weights and training state, counted on the model itself."""
    model = plain(dtype=torch.float32)
    config = LoraConfig(r=4, dora=True)
    matrices, lengths, _ = adapter_size(model, config)
    total = sum(p.numel() for p in model.parameters())
    hidden = sum(m.weight.numel() for m in targets_of(model, ()).values())
    options = {"seq_len": 32, "micro_tokens": 64, "precision": "fp32", "loss_chunk": 64, "ema": False,
               "activation_checkpointing": False}  # fmt: skip
    adapter = {"n_adapter": matrices + lengths, "n_adapter_hidden": matrices}
    frozen = {"n_frozen": total, "n_frozen_hidden": hidden}
    cost = cost_of(model.config, optimizer="adamw", **options, **frozen, **adapter)
    apply_lora(model, config, 0, HERE)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.n_trained_params == trained == matrices + lengths
    assert cost.n_params == total + trained
    assert cost.checkpoint_bytes == 4 * trained * 3, "adapters and two moments"
    assert cost.state_bytes == 4 * (total + trained) + 4 * trained * 3, "all weights; gradient and two moments"
    muon = cost_of(model.config, optimizer="muon", **options, **frozen, **adapter)
    assert cost.state_bytes - muon.state_bytes == 4 * matrices
    packed = cost_of(model.config, optimizer="adamw", **options, **frozen, **adapter, n_packed=hidden)
    assert abs(cost.state_bytes - packed.state_bytes - hidden * (4 - 0.516)) < hidden * 0.001
    assert not heads_of(model)
