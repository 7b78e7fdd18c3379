"""Which layer learns from which, what is seen of layers, and the projections between their widths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from llmkit.config import UserError
from llmkit.distill.layers import Taps, layer_pairs, projection_name, projections_of
from llmkit.model.config import ExpertsConfig, GPTConfig, LoraConfig
from llmkit.model.gpt import GPT, document_mask
from llmkit.model.hf import config_to_hf
from llmkit.model.lora import Base, adapters_of, apply_lora

FAMILIES = {
    "llama": {},
    "gqa": {"n_kv_heads": 2, "qk_norm": True},
    "qwen2_windows": {"qkv_bias": True, "sliding_window": 5, "n_full_layers": 1},
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    },
    "moe": {"qk_norm": True, "experts": ExpertsConfig(n=4, n_active=2, d_ff=16)},
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


def build(family: str = "gqa", checkpointing: bool = False, **shape) -> GPT:
    """A tiny model with every tensor random, norms and biases too."""
    sizes = {"n_layers": 3, "n_heads": 4, "d_model": 32, "d_ff": 48, "max_seq_len": 64, "vocab_size": 50}
    model = GPT(GPTConfig(**{**sizes, **FAMILIES[family], **shape}), checkpointing)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


# --- the map ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_student", "n_teacher", "expected"),
    [
        (4, 12, [3, 6, 9, 12]),
        (4, 6, [2, 3, 5, 6]),  # 1.5 and 4.5: halves go up, to 2 and 5
        (3, 3, [1, 2, 3]),
        (1, 9, [9]),
        (6, 2, [1, 1, 1, 1, 2, 2]),  # 1/3 would be layer 0, which there isn't
        (2, 5, [3, 5]),
    ],
)
def test_uniform(n_student, n_teacher, expected):
    assert layer_pairs("uniform", n_student, n_teacher, "hidden") == list(enumerate(expected, 1))


@given(st.integers(1, 80), st.integers(1, 130))
def test_uniform_goes_through_all_of_the_student_and_ends_at_both_ends(n_student, n_teacher):
    pairs = layer_pairs("uniform", n_student, n_teacher, "hidden")
    ours, theirs = zip(*pairs, strict=True)
    assert list(ours) == list(range(1, n_student + 1))
    assert list(theirs) == sorted(theirs) and theirs[0] >= 1 and theirs[-1] == n_teacher
    for m, n in pairs:
        assert n == 1 or abs(n - m * n_teacher / n_student) <= 0.5
    if n_student <= n_teacher:
        assert len(set(theirs)) == n_student


def test_last_and_pairs():
    assert layer_pairs("last", 4, 12, "relation") == [(4, 12)]
    assert layer_pairs(((4, 2), (1, 12)), 4, 12, "hidden") == [(4, 2), (1, 12)]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((5, 1), r"losses: hidden/mse: layers: \[5, 1\]: the student has no layer 5, its layers are 1 to 4"),
        ((4, 13), r"losses: hidden/mse: layers: \[4, 13\]: the teacher has no layer 13, its layers are 1 to 12"),
    ],
)
def test_layers_that_are_not_there_are_refused(pair, message):
    with pytest.raises(UserError, match=message):
        layer_pairs(((1, 1), pair), 4, 12, "hidden/mse")


# --- taps ------------------------------------------------------------------------------------------------------------


def by_hand(model: GPT, taps: Taps, layer: int, mask: Tensor) -> Tensor:
    """What a block's attention writes, made of its queries, keys and values."""
    attention = model.model.layers[layer - 1].self_attn
    q, k, v = taps.queries[layer], taps.keys[layer], taps.values[layer]
    k, v = (x.repeat_interleave(attention.groups, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return attention.o_proj((weights @ v).transpose(1, 2).flatten(2))


@families
def test_taps_see_what_the_blocks_compute(family):
    """One layer's states, put through the next block's parts by hand, are the next layer's."""
    model, ids_BT = build(family).double(), random_ids(2, 11)
    docs_BT = torch.tensor([[0] * 6 + [1] * 5, [0] * 9 + [-1] * 2])
    mask = document_mask(docs_BT)
    every = range(1, 4)
    with torch.no_grad(), Taps(model, every, every) as taps:
        out_BTD = model(ids_BT, mask=mask)
    assert torch.equal(model.model.norm(taps.hidden[3]), out_BTD)
    assert taps.queries[1].shape == (2, 4, 11, 8)
    assert taps.keys[1].shape == taps.values[1].shape == (2, model.config.kv_heads, 11, 8)
    for layer in (2, 3):
        block, x_BTD = model.model.layers[layer - 1], taps.hidden[layer - 1]
        near = mask
        if model.config.sliding_window is not None:
            T = torch.arange(11)
            near = mask & (T[:, None] - T < model.config.sliding_window)
        x_BTD = x_BTD + by_hand(model, taps, layer, near)
        added = block.mlp(block.post_attention_layernorm(x_BTD))
        x_BTD = x_BTD + (added[0] if family == "moe" else added)
        torch.testing.assert_close(taps.hidden[layer], x_BTD, rtol=1e-9, atol=1e-9)


def test_taps_equal_transformers():
    """Layer i is entry i of its hidden_states, whose entry 0 is the embedding and whose last comes after the norm; the
    scores of layer i are behind its attention probabilities."""
    transformers = pytest.importorskip("transformers")
    model, ids_BT = build("gqa"), random_ids(2, 9)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.Qwen3Config(**config_to_hf(model.config, torch.float32, ids, {}))
    config._attn_implementation = "eager"
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad(), Taps(model, (1, 2, 3), (1, 2, 3)) as taps:
        model(ids_BT)
        out = theirs(ids_BT, output_hidden_states=True, output_attentions=True)
        last_BTD = model.model.norm(taps.hidden[3])
    for layer, state in ((1, taps.hidden[1]), (2, taps.hidden[2]), (3, last_BTD)):
        torch.testing.assert_close(state, out.hidden_states[layer], rtol=1e-4, atol=1e-4)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    for layer in (1, 2, 3):
        k_BHTE = taps.keys[layer].repeat_interleave(2, 1)
        scores = (taps.queries[layer] @ k_BHTE.transpose(-1, -2)) * 8**-0.5
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        torch.testing.assert_close(probabilities, out.attentions[layer - 1], rtol=1e-4, atol=1e-4)


@families
def test_looking_changes_nothing_and_leaves_nothing(family):
    model, ids_BT = build(family), random_ids(2, 11)
    plain_BTD = model(ids_BT)
    with Taps(model, [2], [1, 3]) as taps:
        assert torch.equal(model(ids_BT), plain_BTD)
    assert list(taps.hidden) == [2] and list(taps.queries) == list(taps.keys) == list(taps.values) == [1, 3]
    kept = taps.hidden[2]
    with pytest.raises(KeyError), Taps(model, [1], [1]):
        raise KeyError
    model(ids_BT)
    assert taps.hidden[2] is kept
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "tap", None) is None


def test_a_layer_that_is_not_there():
    for layers in ({"hidden": [4]}, {"attention": [0]}):
        with pytest.raises(ValueError, match="the model's layers are 1 to 3"):
            Taps(build(), **layers)


def test_the_last_pass_is_kept():
    model = build()
    with Taps(model, [1], [1]) as taps:
        model(random_ids(1, 4, seed=1))
        model(random_ids(1, 6, seed=2))
    assert taps.hidden[1].shape[1] == taps.queries[1].shape[2] == 6


def loss_of(taps: Taps, out_BTD: Tensor) -> Tensor:
    """Depends on everything that is seen, unevenly."""
    found = [out_BTD, *taps.hidden.values(), *taps.queries.values(), *taps.keys.values(), *taps.values.values()]
    return sum(((n + 1) * x.square().mean() for n, x in enumerate(found)), torch.zeros(()))


@pytest.mark.parametrize("inside", [True, False], ids=["backward_inside", "backward_after"])
@pytest.mark.parametrize("family", ["gqa", "moe"])
def test_gradients_flow_with_activation_checkpointing_too(family, inside):
    """Its second run of a block, in the backward pass, replaces nothing."""
    gradients = []
    for checkpointing in (False, True):
        model = build(family, checkpointing).train()
        with set_checkpoint_early_stop(not inside), Taps(model, [1, 2], [2, 3]) as taps:
            out_BTD = model(random_ids(2, 7))  # run again to their ends, blocks come to their hooks, too
            seen = dict(taps.hidden), dict(taps.queries)
            if inside:
                loss_of(taps, out_BTD).backward(retain_graph=True)
                loss_of(taps, out_BTD).backward()
        if not inside:
            loss_of(taps, out_BTD).backward(retain_graph=True)
            loss_of(taps, out_BTD).backward()
        for before, now in zip(seen, (taps.hidden, taps.queries), strict=True):
            assert all(before[layer] is now[layer] for layer in before)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient is None or torch.equal(gradient, checkpointed[name]), name
    assert plain["model.layers.0.self_attn.q_proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["queries", "keys", "values"])
def test_each_gives_gradients_to_what_made_it_alone(kind):
    model = build("gqa").train()
    with Taps(model, attention=[2]) as taps:
        model(random_ids(2, 7))
    getattr(taps, kind)[2].exp().sum().backward()  # a sum of squares would not see the rotation
    having = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "model.layers.0.mlp.down_proj.weight" in having and "model.layers.2.mlp.up_proj.weight" not in having
    of_attention = {name for name in having if name.startswith("model.layers.1.") and "_proj" in name}
    assert of_attention == {f"model.layers.1.self_attn.{kind[0]}_proj.weight"}


def test_a_frozen_teacher_in_bf16():
    model = build().to(torch.bfloat16)
    with torch.no_grad(), Taps(model, [3], [3]) as taps:
        model(random_ids(2, 7))
    for x in (taps.hidden[3], taps.queries[3], taps.keys[3], taps.values[3]):
        assert x.dtype == torch.bfloat16 and not x.requires_grad and x.isfinite().all()


def test_adapters_with_dropout_are_seen_as_they_were_used():
    """Nothing is computed again: that would draw another mask, and move the random numbers of the layers after it."""
    model = build("gqa")
    apply_lora(model, LoraConfig(r=4, dropout=0.5), 0, Base("base", ""))
    with torch.no_grad():
        for layer in adapters_of(model).values():
            layer.lora_B.weight.normal_(0.0, 0.3)
    model.train()
    ids_BT = random_ids(2, 7)
    torch.manual_seed(3)
    plain_BTD = model(ids_BT)
    values: list[Tensor] = []
    handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, args, out: values.append(out))
    torch.manual_seed(3)
    with Taps(model, [1, 2, 3], [1, 2, 3]) as taps:
        out_BTD = model(ids_BT)
    handle.remove()
    assert torch.equal(out_BTD, plain_BTD)
    assert torch.equal(taps.values[2].transpose(1, 2).flatten(2), values[0])
    taps.values[3].sum().backward()
    assert model.model.layers[2].self_attn.v_proj.lora_B.weight.grad.abs().sum() > 0


def test_a_compiled_model_runs_uncompiled_while_it_is_looked_into():
    model, ids_BT = build(), random_ids(2, 7)
    calls: list[int] = []

    def compiled(*args: Tensor) -> Tensor:
        calls.append(len(args))
        return model.forward(*args)

    model._compiled_call_impl = compiled
    block = model.model.layers[1]  # as where the model is spread over processes
    block._compiled_call_impl = lambda *args: calls.append(0) or block.forward(*args)
    with Taps(model, [1]) as taps:
        model(ids_BT)
    assert not calls and taps.hidden[1].shape == (2, 7, 32)
    with Taps(model) as taps:  # nothing to see
        model(ids_BT)
    assert calls == [1, 0] and not taps.hidden
    assert model._compiled_call_impl is compiled


# --- projections -----------------------------------------------------------------------------------------------------

SMALL, LARGE = GPTConfig(n_heads=2, d_model=24), GPTConfig(n_heads=4, d_model=40)
PAIRS = {"hidden/mse": [(1, 2), (2, 4)], "v1.5": [(2, 4)]}


def test_projections_keep_lengths_and_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    projections = projections_of(PAIRS, SMALL, LARGE, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(projections) == 3
    for matrix in projections.values():
        assert matrix.weight.shape == (40, 24) and matrix.weight.dtype == torch.float32 and matrix.bias is None
        assert matrix.weight.requires_grad
        torch.testing.assert_close(matrix.weight.T @ matrix.weight, torch.eye(24), rtol=0, atol=1e-5)
    with torch.device("meta"):
        again = projections_of(PAIRS, SMALL, LARGE, seed=5)
    other = projections_of(PAIRS, SMALL, LARGE, seed=6)
    first, *rest = (m.weight for m in projections.values())
    assert not any(torch.equal(first, weight) for weight in rest)
    for name, matrix in projections.items():
        assert torch.equal(matrix.weight, again[name].weight)
        assert not torch.equal(matrix.weight, other[name].weight)
    narrower = projections_of({"hidden": [(1, 1)]}, LARGE, SMALL, seed=5)
    (matrix,) = narrower.values()
    torch.testing.assert_close(matrix.weight @ matrix.weight.T, torch.eye(24), rtol=0, atol=1e-5)


def test_projections_are_found_by_their_names_and_saved_under_them():
    projections = projections_of(PAIRS, SMALL, LARGE, seed=5)
    assert set(projections) == {
        projection_name(label, s, t) for label, pairs in PAIRS.items() for s, t in pairs
    } == {"hidden%2Fmse%2F1-2", "hidden%2Fmse%2F2-4", "v1%2E5%2F2-4"}  # fmt: skip
    assert set(projections.state_dict()) == {f"{name}.weight" for name in projections}


def test_equal_widths_need_none():
    assert not projections_of(PAIRS, LARGE, LARGE, seed=5)


@given(st.tuples(*[st.text("a%./2E-0 ü", min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 30)] * 2))
def test_a_projection_has_one_name_that_a_module_may_have(both):
    one, two = both[:3], both[3:]
    assert (projection_name(*one) == projection_name(*two)) == (one == two)
    modules = nn.ModuleDict({projection_name(*one): nn.Identity()})
    assert "/" not in next(iter(modules))
