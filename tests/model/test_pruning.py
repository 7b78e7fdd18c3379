"""A student cut out of its teacher: what is kept computes what it computed, and what is cut away is the smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_hf import PAIRS, VARIANTS, auto_class, noisy, shape, silence, write_folder
from torch import Tensor

from llmkit.config import UserError
from llmkit.distill.config import FromTeacherConfig
from llmkit.model.config import ExpertsConfig, GPTConfig, count_params
from llmkit.model.gpt import GPT, document_mask, window_of
from llmkit.model.pruning import Rows, kept_layers, pruned, student_config
from llmkit.model.weights import load_model

EXPERTS = ExpertsConfig(n=4, n_active=2, d_ff=24)
MOES = {
    "qwen3_moe": {"qk_norm": True, "experts": EXPERTS.model_copy(update={"every": 2})},
    "qwen2_moe": {"qkv_bias": True, "experts": EXPERTS.model_copy(update={"shared_d_ff": 20, "dense_layers": (1,)})},
}
WIDE = {"head_dim": 8, "norm_eps": 1e-12, "n_layers": 3}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


def spec(**keys) -> FromTeacherConfig:
    return FromTeacherConfig(**keys)


def rows(n: int = 4, T: int = 12, seed: int = 0) -> Rows:
    """Random ids; the last row is two documents and padding."""
    ids_BT = torch.randint(0, 96, (n, T), generator=torch.Generator().manual_seed(seed))
    docs_BT = torch.zeros(n, T, dtype=torch.int64)
    docs_BT[-1, T // 2 :], docs_BT[-1, T - 2 :] = 1, -1
    positions_BT = torch.arange(T).repeat(n, 1)
    positions_BT[-1, T // 2 :] -= T // 2
    return ids_BT, positions_BT, document_mask(docs_BT), docs_BT >= 0


def logits(model: GPT, batch: Rows | None = None) -> Tensor:
    ids_BT, positions_BT, mask, _ = rows(seed=7) if batch is None else batch
    with torch.no_grad():
        return model.logits(model(ids_BT, positions_BT, mask))


def never() -> Iterator[Rows]:
    raise AssertionError("there is nothing to measure")
    yield


def zero(parameter: Tensor, places: Tensor | list[int], axis: int) -> None:
    with torch.no_grad():
        parameter.index_fill_(axis, torch.as_tensor(places), 0.0)


# --- nothing is lost that was asked for ------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["nothing", "everything"])
@pytest.mark.parametrize(("family", "variant"), [*PAIRS, *((family, None) for family in MOES)])
def test_all_of_it_is_a_copy(family, variant, named):
    config = shape(family, **VARIANTS[variant]) if variant else GPTConfig(
        **{**shape().model_dump(exclude={"n_layers", "experts"}), "n_layers": 4, **MOES[family]}
    )  # fmt: skip
    teacher = noisy(config)
    whole = {"layers": config.n_layers, "d_model": 32, "n_kv_heads": config.kv_heads}
    if config.experts is None:
        whole["d_ff"] = 48
    student = pruned(teacher, spec(**whole) if named else spec(), never())
    assert student.config == config
    assert [name for name, _ in student.named_parameters()] == [name for name, _ in teacher.named_parameters()]
    for (name, ours), theirs in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), name
        assert ours.requires_grad
    if config.causal:
        assert torch.equal(logits(student.eval()), logits(teacher))


@given(st.data())
def test_layers_are_spread_evenly_with_both_ends(data):
    n_layers = data.draw(st.integers(1, 100))
    n = data.draw(st.integers(1, n_layers))
    kept = kept_layers(spec(layers=n), n_layers)
    assert len(kept) == n and kept == sorted(set(kept)) and kept[0] == 0
    if n > 1:
        assert kept[-1] == n_layers - 1
        steps = [b - a for a, b in pairwise(kept)]
        assert max(steps) - min(steps) <= 1
    assert kept_layers(spec(layers=tuple(i + 1 for i in kept)), n_layers) == kept


def test_layers_by_number():
    assert kept_layers(spec(layers=4), 12) == [0, 4, 7, 11]
    assert kept_layers(spec(layers=3), 6) == [0, 3, 5]  # 2.5: halves go up
    assert kept_layers(spec(layers=(2, 5)), 6) == [1, 4]
    assert kept_layers(spec(), 3) == [0, 1, 2]


def skipping(teacher: GPT, kept: list[int]) -> GPT:
    """The teacher with its other blocks turned into ones that add nothing."""
    config = teacher.config
    other = GPT(config)
    other.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for layer in set(range(config.n_layers)) - set(kept):
            for name, p in other.model.layers[layer].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    p.zero_()
    return other.eval()


LAYERED = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "n_full_layers": 3},
    "qwen3": {"sliding_window": 4, "n_full_layers": 2, "n_kv_heads": 2},
}


@pytest.mark.parametrize("layers", [4, (1, 2), (3,), (2, 5, 6)], ids=str)
@pytest.mark.parametrize("family", [*LAYERED, *MOES])
def test_chosen_layers_compute_what_they_computed(family, layers):
    if family in MOES:
        base = shape().model_dump(exclude={"n_layers", "experts"})
        config = GPTConfig(**{**base, "n_layers": 6, **MOES[family]})
    else:
        config = shape(family, **{"n_layers": 6, **LAYERED[family]})
    teacher = noisy(config, std=0.3)
    asked = spec(layers=layers)
    kept = kept_layers(asked, 6)
    student = pruned(teacher, asked, never()).eval()
    assert student.config == student_config(config, asked) and student.config.n_layers == len(kept)
    for new, old in enumerate(kept):
        assert window_of(student.config, new) == window_of(config, old)
        ours, theirs = (m.layers[i].mlp for m, i in ((student.model, new), (teacher.model, old)))
        assert type(ours) is type(theirs)
    torch.testing.assert_close(logits(student), logits(skipping(teacher, kept)), rtol=1e-5, atol=1e-5)


# --- what is cut away is the smallest --------------------------------------------------------------------------------


def wide(family: str = "llama", **options) -> GPT:
    return noisy(shape(family, **{**WIDE, **options}), std=0.3).double()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neurons_that_are_always_zero_are_cut_away_and_nothing_changes(family):
    teacher = wide(family)
    dead = {0: [0, 3, 47], 1: [5, 6, 7], 2: [40, 41, 42]}
    for layer, places in dead.items():
        mlp = teacher.model.layers[layer].mlp
        zero(mlp.up_proj.weight, places, 0)
        if family == "gpt2":
            zero(mlp.up_proj.bias, places, 0)
    student = pruned(teacher, spec(d_ff=45), [rows()]).eval()
    assert student.config.d_ff == 45 and student.model.layers[0].mlp.down_proj.weight.shape == (32, 45)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-10, atol=1e-10)
    for layer, places in dead.items():
        left = [i for i in range(48) if i not in places]
        ours, theirs = (m.model.layers[layer].mlp.up_proj.weight for m in (student, teacher))
        assert torch.equal(ours, theirs[left])


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_heads": 2}, {"qkv_bias": True, "o_bias": True, "tie_embeddings": False}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_heads_that_say_nothing_are_cut_away_and_nothing_changes(family, options):
    if family == "qwen2" and "o_bias" in options:
        options = {"tie_embeddings": False}
    # 3 query heads must divide the channels of a Llama.
    teacher = wide(family, d_model=24, **options)
    K = teacher.config.kv_heads
    silent = [0, K - 1, 1]  # one in each layer
    for block, head in zip(teacher.model.layers, silent, strict=True):
        entries = list(range(head * 8, head * 8 + 8))
        zero(block.self_attn.v_proj.weight, entries, 0)
        if teacher.config.qkv_bias:
            zero(block.self_attn.v_proj.bias, entries, 0)
    student = pruned(teacher, spec(n_kv_heads=K - 1), [rows()]).eval()
    config = student.config
    assert (config.kv_heads, config.n_heads, config.width_of_head) == (K - 1, 4 * (K - 1) // K, 8)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-10, atol=1e-10)


def silence_channels(model: GPT, places: list[int]) -> None:
    """Nothing ever writes to these channels of the residual stream."""
    for name, p in model.named_parameters():
        if "embed" in name:
            zero(p, places, 1)
        elif "o_proj" in name or "down_proj" in name:
            zero(p, places, 0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"n_kv_heads": 2}),
        ("llama", {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_embeddings": False}),
        ("qwen3", {}),
        ("mistral", {}),
        ("qwen3_moe", MOES["qwen3_moe"]),
    ],
)
def test_channels_that_are_always_zero_are_cut_away_and_nothing_changes(family, options):
    """The norms then divide by the mean over fewer channels, all of them larger: their weights make up for that."""
    base = "llama" if family == "qwen3_moe" else family
    teacher = wide(base, **options)
    silence_channels(teacher, [0, 9, 10, 31])
    student = pruned(teacher, spec(d_model=28), [rows()]).eval()
    config = student.config
    assert (config.d_model, config.n_heads, config.width_of_head, config.width_of_mlp) == (28, 4, 8, 48)
    assert student.model.layers[1].self_attn.q_proj.weight.shape == (32, 28)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-9, atol=1e-9)
    assert count_params(config).total == sum(p.numel() for p in student.parameters())


def test_the_loudest_stay():
    """Each layer's own neurons and heads; the same channels everywhere."""
    teacher = wide()
    loud = {0: [4, 20, 33], 1: [0, 1, 2], 2: [7, 8, 47]}
    with torch.no_grad():
        for layer, places in loud.items():
            block = teacher.model.layers[layer]
            block.mlp.up_proj.weight[places] *= 30
            block.self_attn.v_proj.weight[8 * layer : 8 * layer + 8] *= 30
            for norm in (block.input_layernorm, block.post_attention_layernorm, teacher.model.norm):
                norm.weight[[3, 14, 15, 30]] = 5.0
    student = pruned(teacher, spec(d_model=4, d_ff=3, n_kv_heads=1), [rows()])
    channels = torch.tensor([3, 14, 15, 30])
    assert student.config.n_heads == 1
    for layer, places in loud.items():
        ours, theirs = student.model.layers[layer], teacher.model.layers[layer]
        head = slice(8 * layer, 8 * layer + 8)
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight[places][:, channels])
        assert torch.equal(ours.mlp.gate_proj.weight, theirs.mlp.gate_proj.weight[places][:, channels])
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[channels][:, places])
        for name in ("q_proj", "k_proj", "v_proj"):
            mine, old = (block.self_attn.get_submodule(name).weight for block in (ours, theirs))
            assert torch.equal(mine, old[head][:, channels])
        assert torch.equal(ours.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight[channels][:, head])
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, channels])


def test_layers_that_go_have_no_say_in_which_channels_stay():
    teacher = wide()
    with torch.no_grad():
        for block in teacher.model.layers:
            block.input_layernorm.weight[[20, 21, 22, 23]] = 100.0
        teacher.model.layers[1].input_layernorm.weight[[5, 6, 7, 8]] = 1e6
    embedding_VD = teacher.model.embed_tokens.weight
    without = pruned(teacher, spec(layers=(1, 3), d_model=4), [rows()])
    assert torch.equal(without.model.embed_tokens.weight, embedding_VD[:, 20:24])
    alone = pruned(teacher, spec(layers=(2,), d_model=4), [rows()])
    assert torch.equal(alone.model.embed_tokens.weight, embedding_VD[:, 5:9])


def test_norms_give_out_as_much_as_they_gave():
    """The mean square of what is kept, also where no channel is zero; exactly so where the inputs are the same."""
    teacher, batch = wide(d_model=64), rows(n=16)
    with torch.no_grad():
        teacher.model.embed_tokens.weight *= torch.logspace(-1, 1, 64, dtype=torch.float64)
        for block in teacher.model.layers:
            block.input_layernorm.weight.fill_(1.0)
    student = pruned(teacher, spec(d_model=16), [batch])
    channels = [
        int((teacher.model.embed_tokens.weight == own_V[:, None]).all(0).nonzero())
        for own_V in student.model.embed_tokens.weight.T
    ]
    assert channels == sorted(set(channels))
    seen: list[Tensor] = []
    for model in (teacher, student):
        norm = model.model.layers[0].input_layernorm
        handle = norm.register_forward_hook(lambda module, args, out: seen.append(out[batch[3]].square()))
        logits(model, batch)
        handle.remove()
    assert seen[1].mean().item() == pytest.approx(seen[0][:, channels].mean().item(), rel=1e-9)
    assert student.model.layers[0].input_layernorm.weight[0].item() > 1.2  # what it is without: 1


def test_equal_sizes_keep_the_first():
    teacher = wide()
    with torch.no_grad():
        for block in teacher.model.layers:
            for p in (block.mlp.up_proj.weight, block.mlp.gate_proj.weight):
                p.copy_(p[:1].expand_as(p))
    student = pruned(teacher, spec(d_ff=5), [rows()])
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[:, :5])


# --- the data --------------------------------------------------------------------------------------------------------

NARROW = {"layers": 2, "d_model": 24, "d_ff": 20, "n_kv_heads": 2}


def same(one: GPT, two: GPT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_padding_counts_nothing():
    teacher, (ids_BT, positions_BT, mask, real_BT) = wide(), rows()
    other_BT = torch.where(real_BT, ids_BT, 5)
    assert not torch.equal(other_BT, ids_BT)
    one, two = (pruned(teacher, spec(**NARROW), [(ids, positions_BT, mask, real_BT)]) for ids in (ids_BT, other_BT))
    assert same(one, two)


def test_how_rows_are_cut_into_batches_decides_nothing():
    teacher, whole = wide(), rows(n=6)
    one = pruned(teacher, spec(**NARROW), [whole])
    two = pruned(teacher, spec(**NARROW), (tuple(x[i : i + 2] for x in whole) for i in (0, 2, 4)))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=name)


def test_the_data_decide():
    """A channel that only one token uses is kept if the data are made of it."""
    teacher = wide()
    with torch.no_grad():
        teacher.model.embed_tokens.weight[11, 17] = 1000.0
        teacher.model.embed_tokens.weight[:, 17][torch.arange(96) != 11] = 0.0
        for name, p in teacher.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p[17] = 0.0

    def keeps(ids_BT: Tensor) -> bool:
        T = ids_BT.shape[1]
        batch = ids_BT, torch.arange(T)[None], None, torch.ones_like(ids_BT, dtype=torch.bool)
        student = pruned(teacher, spec(d_model=4), [batch])
        return bool((student.model.embed_tokens.weight == 1000.0).any())

    assert keeps(torch.full((2, 6), 11)) and not keeps(torch.full((2, 6), 12))


def test_the_teacher_stays_as_it_is():
    teacher = wide(dropout=0.3).train().requires_grad_(False)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    one, two = (pruned(teacher, spec(**NARROW), [rows()]) for _ in range(2))
    assert same(one, two)  # dropout was off
    assert teacher.training and one.training and all(p.requires_grad for p in one.parameters())
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in teacher.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    with pytest.raises(ZeroDivisionError):
        pruned(teacher, spec(**NARROW), (rows(n=1 // 0) for _ in range(1)))
    assert teacher.training and not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_the_teachers(dtype):
    teacher = wide().to(dtype)
    student = pruned(teacher, spec(**NARROW), [rows()])
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert logits(student.eval()).isfinite().all()


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "asked"),
    [
        ("llama", {"n_kv_heads": 2}, {**NARROW, "n_kv_heads": 1}),
        ("mistral", {}, NARROW),
        ("qwen2", {"tie_embeddings": False, "sliding_window": 6, "n_full_layers": 1}, NARROW),
        ("qwen3", {"n_kv_heads": 2}, {**NARROW, "d_model": 26, "n_kv_heads": 1}),
        ("gpt2", {}, {**NARROW, "n_kv_heads": 3}),
    ],
)
def test_a_student_is_a_folder_that_transformers_loads(tmp_path: Path, family, options, asked):
    transformers = pytest.importorskip("transformers")
    teacher = noisy(shape(family, n_layers=4, **options), std=0.3)
    student = pruned(teacher, spec(**asked), [rows()]).eval()
    assert student.config.family == family and (student.config.n_layers, student.config.width_of_mlp) == (2, 20)
    folder = write_folder(tmp_path, student)
    ids_BT = rows()[0]
    ours = student.logits(student(ids_BT)).detach()
    with silence():
        theirs = auto_class(student.config).from_pretrained(folder)
    assert isinstance(theirs, transformers.PreTrainedModel)
    torch.testing.assert_close(ours, theirs.eval()(ids_BT).logits.detach(), rtol=1e-4, atol=1e-4)
    assert same(load_model(folder), student)


# --- what can't be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({}, {"layers": 3}, "from_teacher.layers: 3: the teacher has 2 layers: set it to 2 at most"),
        ({}, {"layers": (1, 3)}, "from_teacher.layers: 3: the teacher's layers are 1 to 2"),
        ({}, {"d_model": 33}, "from_teacher.d_model: 33: the teacher has 32 channels: set it to 32 at most"),
        ({}, {"d_ff": 49}, "from_teacher.d_ff: 49: the teacher has 48 neurons in each MLP: set it to 48 at most"),
        ({}, {"n_kv_heads": 5}, "from_teacher.n_kv_heads: 5: the teacher has 4 key-value heads: set it to 4 at most"),
        ({}, {"d_model": 30}, "from_teacher: no Hugging Face class .* Llama, which has d_model a multiple of n_heads"),
        ({"family": "gpt2"}, {"d_model": 24}, "24 channels, and 4 heads of 8: in a gpt2 they must be as many"),
        ({"family": "gpt2"}, {"n_kv_heads": 3}, "32 channels, and 3 heads of 8: .* choose d_model and n_kv_heads together"),
        (MOES["qwen3_moe"], {"d_ff": 20}, "from_teacher.d_ff: the teacher has experts in place of an MLP"),
        (MOES["qwen2_moe"], {"d_model": 24}, "24 channels, and 4 heads of 8: in a qwen2_moe they must be as many"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, asked, message):
    with pytest.raises(UserError, match=message):
        student_config(shape(**options), spec(**asked))


def test_what_is_not_named_stays_as_wide():
    """Also where the teacher's widths are not said, but derived from d_model."""
    teacher = GPTConfig(n_layers=2, n_heads=4, d_model=96, vocab_size=96)
    student = student_config(teacher, spec(d_model=48))
    assert (student.d_model, student.width_of_mlp, student.width_of_head, student.n_heads) == (48, 256, 24, 4)
    gpt2 = student_config(shape("gpt2", d_ff=None), spec(d_model=24, n_kv_heads=3))
    assert (gpt2.d_model, gpt2.width_of_mlp, gpt2.width_of_head, gpt2.n_heads) == (24, 128, 8, 3)


@pytest.mark.parametrize(
    "batches", [[], [(*rows()[:3], torch.zeros(4, 12, dtype=torch.bool))]], ids=["none", "padding"]
)
def test_no_data_to_measure(batches):
    with pytest.raises(UserError, match="not one token of training data"):
        pruned(wide(), spec(d_ff=5), batches)


def test_a_broken_teacher():
    teacher = wide()
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"activations at model\.layers\.1\.mlp\.down_proj are not finite"):
        pruned(teacher, spec(d_ff=5), [rows()])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes_fit(data):
    """Every size below the teacher's gives a model of that size, or is refused; never anything else."""
    family = data.draw(st.sampled_from(["llama", "qwen2", "qwen3", "gpt2", "mistral"]))
    options: dict = {"n_layers": data.draw(st.integers(1, 4))}
    if family != "gpt2":
        options |= {"n_kv_heads": data.draw(st.sampled_from([1, 2, 4])), "tie_embeddings": data.draw(st.booleans())}
    teacher = noisy(shape(family, **options))

    def size(limit: int) -> Callable:
        return st.none() | st.integers(1, limit)

    asked = spec(
        layers=data.draw(size(options["n_layers"])),
        d_model=data.draw(size(32)),
        d_ff=data.draw(size(48)),
        n_kv_heads=data.draw(size(teacher.config.kv_heads)),
    )
    try:
        config = student_config(teacher.config, asked)
    except UserError:
        assert asked.d_model is not None or asked.n_kv_heads is not None
        return
    student = pruned(teacher, asked, [rows(n=2)]).eval()
    assert student.config == config and config.family == family
    assert (config.n_layers, config.d_model) == (asked.layers or options["n_layers"], asked.d_model or 32)
    assert (config.width_of_mlp, config.kv_heads) == (asked.d_ff or 48, asked.n_kv_heads or teacher.config.kv_heads)
    assert config.n_heads // config.kv_heads == 4 // teacher.config.kv_heads and config.width_of_head == 8
    assert logits(student).isfinite().all()
