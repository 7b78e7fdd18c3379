"""Hugging Face folders, both ways: the same logits as transformers, and every damaged folder refused in one line."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.config import UserError
from llmkit.model.config import GPTConfig, LinearScaling, Llama3Scaling, YarnScaling, count_params
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.hf import config_from_hf, config_to_hf, read_config, read_labels
from llmkit.model.rope import rope_tables
from llmkit.model.weights import load_model, load_weights

transformers = pytest.importorskip("transformers")

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VOCAB = 96
GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    "n_kv_heads": 4,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": GPT2,
    "eurobert": {"causal": False},
}
YARN = YarnScaling(kind="yarn", factor=4.0, original_max_seq_len=32)
VARIANTS = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "mqa_wide_heads": {"n_kv_heads": 1, "head_dim": 16},
    "odd_width": {"n_heads": 3, "n_kv_heads": 3, "head_dim": 8},
    "untied": {"tie_embeddings": False},
    "11_layers": {"n_layers": 11},
    "theta": {"rope_theta": 1e6},
    "biases": {"qkv_bias": True, "o_bias": True},
    "mlp_biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(factor=8.0, original_max_seq_len=32)},
    "yarn": {"rope_scaling": YARN},
    "yarn_of_its_own": {
        "rope_theta": 1e5,
        "rope_scaling": YARN.model_copy(
            update={"attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
        ),
    },
    "linear_rope": {"rope_scaling": LinearScaling(kind="linear", factor=2.5)},
    "window": {"sliding_window": 10},
    "wide_window": {"sliding_window": 1000},
    "some_windows": {"sliding_window": 10, "n_full_layers": 1},
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
    return GPTConfig(**{**sizes, **FAMILIES[family], **options})


def expressible() -> list[tuple[str, str]]:
    """Families and the variants they can express; the others are refused (see the random combinations below)."""
    pairs = []
    for family in FAMILIES:
        for variant, options in VARIANTS.items():
            try:
                if shape(family, **options).family == family:
                    pairs.append((family, variant))
            except ValueError:
                continue
    return pairs


PAIRS = expressible()
both = pytest.mark.parametrize("family,variant", PAIRS)


def test_variants_reach_all_families():
    counts = {family: sum(f == family for f, _ in PAIRS) for family in FAMILIES}
    assert counts == {"llama": 12, "mistral": 13, "qwen2": 14, "qwen3": 15, "gpt2": 5, "eurobert": 11}


def noisy(config: GPTConfig, std: float = 0.5) -> GPT:
    """Every tensor random, norms and biases too, so that none can be lost unseen."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, std, generator=generator)
    return model.eval()


def ids_of(model: GPT) -> dict[str, int]:
    return IDS if model.config.causal else {**IDS, "mask_token_id": 3}


def auto_class(config: GPTConfig) -> type:
    return transformers.AutoModelForCausalLM if config.causal else transformers.AutoModelForMaskedLM


def write_folder(folder: Path, model: GPT, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, dtype, ids_of(model), {"note": "ours"})))
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


@both
def test_our_folder_in_transformers(tmp_path, family, variant):
    """B60, B63: q, k, v and their groups; the scale and the mask of attention."""
    ours = noisy(shape(family, **VARIANTS[variant]))
    write_folder(tmp_path, ours)
    with silence():
        theirs = auto_class(ours.config).from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__.lower().startswith(family)
    assert_same_logits(ours, theirs.eval())
    assert count_params(ours.config).total == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert read_config(tmp_path) == ours.config.model_copy(update=written(ours.config))


@both
def test_transformers_folder_in_ours(tmp_path, family, variant):
    config = shape(family, **VARIANTS[variant])
    hf = config_to_hf(config, torch.float32, {**IDS, "mask_token_id": 3}, {})
    theirs = auto_class(config).from_config(transformers.AutoConfig.for_model(**hf)).eval()
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
    if config.family == "gpt2":
        return {"n_kv_heads": None, "d_ff": config.width_of_mlp}
    return {"n_kv_heads": config.kv_heads, "head_dim": config.width_of_head, "d_ff": config.width_of_mlp}


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_folder_of_transformers(tmp_path, family):
    """B64."""
    ours = noisy(shape(family, n_layers=11))
    write_folder(tmp_path / "one", ours)
    theirs = auto_class(ours.config).from_pretrained(tmp_path / "one", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 10
    again = load_model(tmp_path / "many")
    for name, p in ours.named_parameters():  # layer 10 is not layer 2: names are never sorted as text
        assert torch.equal(p, again.get_parameter(name)), name


@pytest.mark.parametrize(
    "scaling", [None, *(VARIANTS[v]["rope_scaling"] for v in ("llama3_rope", "yarn", "yarn_of_its_own", "linear_rope"))]
)
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


# --- what the classes can't express ----------------------------------------------------------------------------------


OPTIONS = {
    "n_layers": [1, 3], "n_heads": [4, 3], "n_kv_heads": [None, 2, 1], "head_dim": [None, 6, 16], "d_ff": [None, 40],
    "tie_embeddings": [False], "causal": [False], "sliding_window": [7, 500], "n_full_layers": [1], "norm_eps": [1e-3],
    "positions": ["learned", "rope"], "norm": ["layernorm", "rmsnorm"], "mlp": ["gelu_tanh", "swiglu"],
    "qkv_bias": [True, False], "o_bias": [True, False], "mlp_bias": [True, False], "qk_norm": [True, False],
    "rope_theta": [500.0], "rope_scaling": [YARN, VARIANTS["linear_rope"]["rope_scaling"]],
}  # fmt: skip
changes = st.lists(st.sampled_from(sorted(OPTIONS)).flatmap(lambda k: st.tuples(st.just(k), st.sampled_from(OPTIONS[k]))),
                   max_size=5)  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True)
@given(family=st.sampled_from(sorted(FAMILIES)), changes=changes)
def test_any_combination_is_expressed_or_refused(family, changes):
    """Either the family named gives a class of transformers that computes the same, or the recipe is refused."""
    try:
        config = shape(family, **dict(changes))
    except ValueError as e:
        assert re.search("no Hugging Face class .* nearest is|must be|mean.? something", str(e))
        return
    ours = noisy(config)
    with silence():
        hf = transformers.AutoConfig.for_model(**config_to_hf(config, torch.float32, ids_of(ours), {}))
        theirs = auto_class(config).from_config(hf).eval()
    theirs.load_state_dict({"lm_head.weight": ours.head_weight, **ours.state_dict()}, strict=True)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "family,options,nearest",
    [
        ("qwen3", {"qkv_bias": True}, r"Qwen3, which has o_bias true \(here false\)"),
        ("qwen3", {"causal": False}, r"EuroBERT, which has qk_norm false \(here true\)"),
        ("llama", {"o_bias": True}, r"Llama, which has o_bias false \(here true\)"),
        ("llama", {"n_heads": 3, "n_kv_heads": 3, "head_dim": 8}, r"Llama, which has d_model a multiple of n_heads"),
        ("mistral", {"mlp_bias": True}, r"Mistral, which has mlp_bias false"),
        ("mistral", {"n_full_layers": 1}, r"Qwen2, which has qkv_bias true"),
        ("eurobert", {"mlp_bias": True}, r"EuroBERT, which has mlp_bias false"),
        ("eurobert", {"sliding_window": 8}, r"EuroBERT, which has sliding_window null \(here 8\)"),
        ("gpt2", {"n_kv_heads": 2}, r"GPT-2, which has n_kv_heads 4 \(here 2\)"),
        ("gpt2", {"head_dim": 16}, r"GPT-2, which has head_dim 8 \(here 16\)"),
        ("gpt2", {"mlp": "swiglu"}, r"GPT-2, which has mlp gelu_tanh \(here swiglu\)"),
        ("gpt2", {"norm": "rmsnorm", "causal": False}, r"norm layernorm \(here rmsnorm\), causal true \(here false\)"),
    ],
)
def test_what_no_class_expresses_names_the_nearest(family, options, nearest):
    with pytest.raises(ValueError, match=f"no Hugging Face class expresses this model; the nearest is .*{nearest}"):
        shape(family, **options)


# --- details of single families --------------------------------------------------------------------------------------


def test_eurobert_sees_both_ways_but_no_padding(tmp_path):
    ours = noisy(shape("eurobert"), std=0.3)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(write_folder(tmp_path, ours), dtype=torch.float32).eval()
    assert theirs.config.mask_token_id == 3
    ids, lengths = random_ids()[:, :20], torch.tensor([20, 13])
    seen_BT = torch.arange(20) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=seen_BT.long()).logits
        got = ours.logits(ours(ids, mask=seen_BT[:, None, None, :]))
        alone = ours.logits(ours(ids[1:, :13]))
        changed = ours.logits(ours(torch.where(torch.arange(20) == 12, 5, ids), mask=seen_BT[:, None, None, :]))
    torch.testing.assert_close(got[seen_BT], expected[seen_BT], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1:, :13], alone, rtol=1e-4, atol=1e-4)
    assert (got[:, 0] - changed[:, 0]).abs().min() > 1e-4  # the last token reaches the first


@pytest.mark.parametrize("variant", ["yarn", "yarn_of_its_own", "linear_rope", "llama3_rope"])
def test_rope_far_out(variant):
    """B59: cos and sin at long positions, against transformers' own module in fp32."""
    scaling = VARIANTS[variant]["rope_scaling"]
    longer = {} if variant == "linear_rope" else {"original_max_seq_len": 8192}
    options = {**VARIANTS[variant], "rope_scaling": scaling.model_copy(update=longer), "max_seq_len": 32768}
    config = shape(**options, head_dim=64, n_heads=1, n_kv_heads=1)
    hf = transformers.AutoConfig.for_model(**config_to_hf(config, torch.bfloat16, IDS, {}))
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
    positions = torch.tensor([[0, 1, 4095, 8191, 20000, 32767]])
    expected = theirs(torch.zeros(1), positions)
    for a, b in zip(rope_tables(config, positions), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a[0], b, rtol=0, atol=4e-3)  # 32767 radians in fp32 are exact to 2e-3
        torch.testing.assert_close(a[0, :, :3], b[:, :3], rtol=0, atol=1e-3)


@pytest.mark.parametrize("hf", [{"use_sliding_window": False}, {"max_window_layers": 2}, {"sliding_window": None}])
def test_qwen_without_a_window_that_acts(hf):
    base = config_to_hf(shape("qwen3", sliding_window=10), torch.float32, IDS, {})
    assert base["use_sliding_window"] and config_from_hf(base).sliding_window == 10
    assert config_from_hf({**base, **hf}).sliding_window is None


def test_layer_types_say_the_same_or_are_refused():
    base = config_to_hf(shape("qwen2", n_layers=3, sliding_window=10), torch.float32, IDS, {})
    full, near = "full_attention", "sliding_attention"
    for kinds, n_full in (([near] * 3, 0), ([full, near, near], 1)):
        assert config_from_hf({**base, "layer_types": kinds}).n_full_layers == n_full
    assert config_from_hf({**base, "layer_types": [full] * 3}).sliding_window is None
    with pytest.raises(UserError, match="layer_types is not supported"):
        config_from_hf({**base, "layer_types": [full, near, full]})


def test_mistral_without_a_window_is_a_llama(tmp_path):
    """The newer Mistrals: `sliding_window: null`. Their weights are a Llama's, and are saved as one."""
    hf = config_to_hf(shape("mistral"), torch.float32, IDS, {}) | {"sliding_window": None}
    theirs = transformers.MistralForCausalLM(transformers.AutoConfig.for_model(**hf)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    theirs.save_pretrained(tmp_path / "mistral")
    ours = load_model(tmp_path / "mistral")
    assert ours.config.family == "llama"
    assert_same_logits(ours, theirs)
    again = transformers.AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", ours))
    assert type(again).__name__ == "LlamaForCausalLM"
    assert_same_logits(ours, again)


def test_a_key_left_out_has_its_class_default():
    """Not ours: Qwen3's heads are 128 wide, Mistral's window is 4096, unless config.json says otherwise."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
    }
    for family in ("llama", "mistral", "qwen2", "qwen3", "eurobert"):
        theirs = transformers.AutoConfig.for_model(family, **sizes)
        ours = config_from_hf({"model_type": family, **sizes})
        assert ours.width_of_head == (getattr(theirs, "head_dim", None) or 2)
        assert (ours.kv_heads, ours.max_seq_len) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
        assert (ours.norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        assert ours.tie_embeddings == theirs.tie_word_embeddings and ours.dropout == theirs.attention_dropout
    sizes = {"vocab_size": 8, "n_embd": 64, "n_layer": 1, "n_head": 4}
    theirs, ours = transformers.GPT2Config(**sizes), config_from_hf({"model_type": "gpt2", **sizes})
    assert (ours.max_seq_len, ours.norm_eps) == (theirs.n_positions, theirs.layer_norm_epsilon)
    assert (ours.width_of_mlp, ours.tie_embeddings, ours.dropout) == (256, True, theirs.attn_pdrop)


@pytest.mark.parametrize(
    "rope,max_seq_len",
    [
        ({"factor": 4.0, "original_max_position_embeddings": 32}, 128),  # Qwen's recipe leaves the old length there
        ({"factor": None, "original_max_position_embeddings": 25}, 40),
        ({"factor": 2.0}, 40),
        ({"factor": 2.0, "mscale": 0.707, "mscale_all_dim": 1.0}, 40),
    ],
)
def test_yarn_as_others_write_it(rope, max_seq_len):
    hf = {
        **config_to_hf(shape("qwen3", max_seq_len=40), torch.float32, IDS, {}),
        "rope_scaling": {"rope_type": "yarn", **rope},
    }
    del hf["rope_parameters"]
    ours = config_from_hf(hf)
    assert ours.max_seq_len == max_seq_len
    theirs = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(transformers.AutoConfig.for_model(**hf))
    for a, b in zip(
        rope_tables(ours, torch.arange(128)[None]), theirs(torch.zeros(1), torch.arange(128)[None]), strict=True
    ):
        torch.testing.assert_close(a[0], b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_folder(tmp_path, family):
    """B67: every tensor in the dtype that config.json tells, and the same numbers in transformers."""
    ours = noisy(shape(family)).bfloat16()
    write_folder(tmp_path, ours, torch.bfloat16)
    with silence():
        theirs = auto_class(ours.config).from_pretrained(tmp_path, dtype="auto")
    saved = theirs.state_dict()
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


# --- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family,n_labels", [(f, n) for f in FAMILIES for n in (1, 3)])
def test_classifier_folder(tmp_path, family, n_labels):
    """B87: no head is made up on loading, which a warning would tell. B54: padding changes no score, here and there."""
    ours = SequenceClassifier(shape(family, n_layers=3), n_labels).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    labels = ("bad", "so-so", "good") if n_labels == 3 else None
    ids = IDS if ours.config.causal else {**IDS, "mask_token_id": 3}
    hf = config_to_hf(ours.config, torch.float32, ids, {}, head="classify", n_labels=n_labels, labels=labels)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(ours.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with silence():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.problem_type == ("regression" if n_labels == 1 else "single_label_classification")
    assert [theirs.config.id2label[i] for i in range(n_labels)] == list(labels or ["LABEL_0"])
    assert read_labels(tmp_path) == (labels or ("LABEL_0",))
    ids = random_ids().clamp(min=3)
    lengths = torch.tensor([ids.shape[1], *[ids.shape[1] - 4] * (len(ids) - 1)])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    padded = ids.where(real, IDS["pad_token_id"])
    with torch.no_grad():
        expected = theirs(padded, attention_mask=real.long()).logits
        torch.testing.assert_close(ours(padded, lengths), expected, rtol=1e-4, atol=1e-4)
        alone = ours(ids[1:2, :-4], lengths[1:2])
        torch.testing.assert_close(alone, expected[1:2], rtol=1e-4, atol=1e-4)
    again = SequenceClassifier(ours.config, n_labels)
    assert load_weights(again, tmp_path).new == ()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    with pytest.raises(UserError, match="scores whole texts"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["llama", "eurobert"])
def test_a_row_of_padding_is_scored_without_harm(family):
    """B8: evaluation fills its last batch up; nothing may be NaN, nor change the other rows."""
    ours = SequenceClassifier(shape(family), 2).eval()
    init_weights(ours, 0)
    init_head(ours, 0)
    ids = random_ids().clamp(min=3)[:2]
    with torch.no_grad():
        both = ours(ids, torch.tensor([ids.shape[1], 0]))
        alone = ours(ids[:1], torch.tensor([ids.shape[1]]))
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-6)
    assert ours.head_names == (("score.weight",) if family == "llama" else HEAD)


HEAD = ("dense.weight", "dense.bias", "classifier.weight", "classifier.bias")


def test_a_classifier_starts_from_a_language_model(tmp_path):
    lm = noisy(shape("gpt2", tie_embeddings=False))
    write_folder(tmp_path, lm)
    ours = SequenceClassifier(lm.config, 2)
    score = ours.score.weight.clone()
    with pytest.raises(
        UserError, match=r"score.weight: the weights hold nothing(.|\n)*lm_head.weight: .*asks for nothing"
    ):
        load_weights(ours, tmp_path)
    report = load_weights(ours, tmp_path, may_lack=("score.weight",), may_hold=("lm_head.weight",))
    assert report.new == ("score.weight",) and "score.weight: new" in str(report)
    assert torch.equal(ours.score.weight, score)
    assert all(torch.equal(p, lm.get_parameter(n)) for n, p in ours.named_parameters() if n != "score.weight")
    assert read_labels(tmp_path) is None


# --- what old weights become -----------------------------------------------------------------------------------------


def tokenizer_json(folder: Path, n: int) -> None:
    vocab = {str(i): i for i in range(n - 2)}
    added = [{"id": n - 2, "content": "<|a|>"}, {"id": n - 1, "content": "<|b|>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_old", [None, 90])
def test_new_rows_are_the_mean_of_the_rows_in_use(tmp_path, family, tied, n_old):
    old = noisy(shape(family, tie_embeddings=tied))
    write_folder(tmp_path, old)
    if n_old:
        tokenizer_json(tmp_path, n_old)  # the other rows are padding
    model = GPT(shape(family, tie_embeddings=tied, vocab_size=128))
    report = load_weights(model, tmp_path)
    n = n_old or VOCAB
    names = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert set(report.resized.values()) == {(n, 128)} and len(report.resized) == len(names)
    assert f"rows {n} to 127 start at the mean" in str(report)
    for name, p in model.named_parameters():
        before = old.get_parameter(name)
        assert torch.equal(p[:n], before[:n]), name
        if name in names:
            torch.testing.assert_close(p[n:], before[:n].mean(0).expand(128 - n, -1))
        else:
            assert torch.equal(p, before)


def test_padding_rows_that_a_larger_tokenizer_uses(tmp_path):
    old = noisy(shape())
    write_folder(tmp_path, old)
    tokenizer_json(tmp_path, 90)
    for n_tokens, first in ((None, 96), (90, 96), (92, 90)):
        model = GPT(shape())
        report = load_weights(model, tmp_path, n_tokens=n_tokens)
        assert bool(report.resized) == (n_tokens == 92)
        assert torch.equal(model.head_weight[:first], old.head_weight[:first])
        torch.testing.assert_close(model.head_weight[first:], old.head_weight[:90].mean(0).expand(96 - first, -1))


def test_nothing_else_is_resized(tmp_path):
    write_folder(tmp_path, noisy(shape("llama", n_layers=3)))
    with pytest.raises(UserError, match=r"embed_tokens.*\(96, 32\).*\(64, 32\)"):
        load_weights(GPT(shape("llama", n_layers=3, vocab_size=64)), tmp_path)
    with pytest.raises(UserError) as e:
        load_weights(GPT(shape("llama", n_layers=2, vocab_size=128, d_ff=64, qkv_bias=True, o_bias=True)), tmp_path)
    lines = str(
        e.value
    ).splitlines()  # every mismatch, equal ones of many blocks together; the larger vocabulary is none
    assert any(
        "model.layers.*.mlp.gate_proj.weight (2 times): the weights hold (48, 32), config.json asks" in x for x in lines
    )
    assert any(
        "model.layers.2.mlp.gate_proj.weight: the weights hold (48, 32), config.json asks for nothing" in x
        for x in lines
    )
    assert any("model.layers.*.self_attn.q_proj.bias (2 times): the weights hold nothing" in x for x in lines)
    assert not any("embed" in x for x in lines)
    assert len(lines) == 3 + 4 + 9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folders_of_the_bare_decoder_and_of_old_writers(tmp_path, family):
    """openai-community/gpt2 has neither prefix nor head, but masks among the weights; old Llamas have frequencies."""
    ours = noisy(shape(family))
    write_folder(tmp_path, ours)

    def bare(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.").removeprefix("model.")] = tensors.pop(name)
        if family == "gpt2":
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
            tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(tmp_path, bare)
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_a_repeated_head_must_be_the_embedding(tmp_path):
    """B65: transformers 4 would tie the two, transformers 5 would not."""
    ours = noisy(shape())
    write_folder(tmp_path, ours)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_model(tmp_path).head_weight, ours.head_weight)
    edit_weights(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    refused(tmp_path, "ties the embeddings, but lm_head.weight is another")


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
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE of its own for each kind"),
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


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"activation_function": "gelu"}, "activation_function 'gelu' is not supported: gelu_new is"),
        ({"scale_attn_weights": False}, "scale_attn_weights false is not supported: true is"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true is not supported: false is"),
        ({"add_cross_attention": True}, "add_cross_attention true"),
        ({"resid_pdrop": 0.2}, "attn_pdrop, embd_pdrop, resid_pdrop are 0.0, 0.0, 0.2: one number"),
        ({"n_head": 5}, "d_model .32. must be a multiple of n_heads"),
        ({"n_positions": 127}, r"wpe.weight: the weights hold \(128, 32\), config.json asks for \(127, 32\)"),
    ],
)
def test_gpt2_configs_that_are_refused(tmp_path, changes, match):
    write_folder(tmp_path, noisy(shape("gpt2")))
    edit_config(tmp_path, **changes)
    refused(tmp_path, match)


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


def test_code_named_by_a_folder_is_never_imported(folder, caplog):
    canary = folder / "canary_module.py"
    canary.write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    edit_config(
        folder,
        auto_map={"AutoConfig": "canary_module.Config", "AutoModelForCausalLM": "canary_module.Model"},
        model_file="canary_module.py",
        custom_pipelines={"x": {"impl": "canary_module.Pipeline"}},
    )
    load_model(folder)
    assert "auto_map, model_file, custom_pipelines names code of the folder's own: it is ignored" in caplog.text
    assert not (folder / "ran").exists()
    assert not any("canary_module" in name for name in sys.modules)
