"""Networks that are spread before they have weights: the same bits as those cut up after, and little main memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from test_parallel import GPT2, MOE, QWEN, save
from torch import nn
from toys import recipe, tiny_gpt

from llmkit.config import UserError
from llmkit.model.adapters import CONFIG, WEIGHTS, adapter_tensors, base_named
from llmkit.model.config import GPTConfig, LoraConfig
from llmkit.model.first import make
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import ActorCritic, Distilled, SequenceClassifier, init_head
from llmkit.model.hf import config_to_hf
from llmkit.model.lora import Base, adapters_of, apply_lora
from llmkit.model.weights import load_weights
from llmkit.storage import newest_good, to_json
from llmkit.training import wholes
from llmkit.training.checkpoint import index_of, safetensors_chunks, shard
from llmkit.training.config import ParallelConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine
from llmkit.training.parallel import Split, local
from llmkit.training.team import Team

SIZES = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "d_ff": 48, "max_seq_len": 64, "vocab_size": 67}


def shape(**said: Any) -> GPTConfig:
    return GPTConfig(**{**SIZES, **said})


def write_model(folder: Path, model: nn.Module, config: GPTConfig, limit: int = 1 << 40) -> Path:
    """A Hugging Face folder, in several files if they may hold no more than `limit` bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config_to_hf(config, torch.float32, {}, {})))
    files = shard("model.safetensors", {n: t.detach() for n, t in model.state_dict().items()}, limit)
    for file, tensors in files.items():
        (folder / file).write_bytes(b"".join(bytes(part) for part in safetensors_chunks(tensors)))
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_of(files))
    return folder


def write_folders(path: Path) -> None:
    """What networks are read from."""
    write_model(path / "untied", tiny_gpt(3, **SIZES, **QWEN).bfloat16(), shape(**QWEN), limit=20_000)
    write_model(path / "gpt2", tiny_gpt(4, **{**SIZES, **GPT2}), shape(**GPT2), limit=20_000)
    write_model(path / "experts", tiny_gpt(5, **SIZES, **MOE), shape(**MOE))
    base = base_named(str(path / "untied"))
    model = tiny_gpt(6, **SIZES, **QWEN)
    apply_lora(model, LoraConfig(r=3, alpha=6.0, targets=("q_proj", "down_proj")), 7, base)
    for layer in adapters_of(model).values():
        layer.lora_B.weight.data.fill_(0.1)
    (path / "adapters").mkdir()
    tensors = {n: t.detach() for n, t in adapter_tensors(model).items()}
    (path / "adapters" / WEIGHTS).write_bytes(b"".join(bytes(part) for part in safetensors_chunks(tensors)))
    told = {"peft_type": "LORA", "base_model_name_or_path": base.name, "r": 3, "lora_alpha": 6}
    (path / "adapters" / CONFIG).write_text(to_json(told))


def drawn(folder: Path, **said: Any) -> nn.Module:
    model = GPT(shape(**said))
    init_weights(model, 1)
    return model


def read(folder: Path, name: str, n_tokens: int | None = None, **said: Any) -> nn.Module:
    model = GPT(shape(**said))
    report = load_weights(model, folder / name, n_tokens=n_tokens)
    assert bool(report.resized) == (n_tokens is not None)
    return model


def classifier(folder: Path, name: str | None, **said: Any) -> nn.Module:
    model = SequenceClassifier(shape(**said), 3)
    if name is None:
        init_weights(model, 1)
    init_head(model, 2)
    if name is not None:
        load_weights(model, folder / name, may_lack=model.head_names, may_hold=("lm_head.weight",))
    return model


def adapted(folder: Path, **said: Any) -> nn.Module:
    model = read(folder, "gpt2", **GPT2)
    apply_lora(model, LoraConfig(r=3, **said), 7, Base("base", "hash"))
    return model


def distilled(folder: Path) -> nn.Module:
    student = drawn(folder, **QWEN)
    assert isinstance(student, GPT)
    hidden = nn.Linear(32, 8, bias=False, device="cpu")
    nn.init.ones_(hidden.weight)
    return Distilled(student, nn.ModuleDict({"hidden": hidden}))


def pair(folder: Path) -> nn.Module:
    actor, critic = read(folder, "untied", **QWEN), classifier(folder, "untied", **QWEN)
    assert isinstance(actor, GPT) and isinstance(critic, SequenceClassifier)
    return ActorCritic(actor, critic)


CASES: dict[str, Callable[[Path], nn.Module]] = {
    "drawn": lambda path: drawn(path, **QWEN),
    "drawn, tied, biases": lambda path: drawn(path, **GPT2),
    "read": lambda path: read(path, "untied", **QWEN),
    "read, more tokens": lambda path: read(path, "untied", 71, vocab_size=75, **QWEN),
    "read, transposed": lambda path: read(path, "gpt2", **GPT2),
    "read, transposed, more tokens": lambda path: read(path, "gpt2", 71, **{**GPT2, "vocab_size": 75}),
    "read, adapters merged": lambda path: read(path, "adapters", **QWEN),
    "classifier drawn": lambda path: classifier(path, None, **QWEN),
    "classifier read": lambda path: classifier(path, "untied", **QWEN),
    "lora": adapted,
    "dora": lambda path: adapted(path, dora=True, targets=("k_proj", "mlp")),
    "student": distilled,
    "policy and critic": pair,
}
EXPERTS: dict[str, Callable[[Path], nn.Module]] = {
    "experts drawn": lambda path: drawn(path, **MOE),
    "experts read": lambda path: read(path, "experts", **MOE),
}


def compare(ranks: Ranks, cases: dict[str, Callable[[Path], nn.Module]], folder: Path) -> list[str]:
    """The cases in which a piece is not, to the bit, that of a network that was whole."""
    said = ParallelConfig(shard="full", tensor=ranks.tensor)
    config = recipe().model_copy(update={"parallel": said})
    odd = []
    for name, build in cases.items():
        for dtype in (torch.float64, torch.bfloat16):
            pieces: list[dict[str, torch.Tensor]] = []
            for where in (nullcontext(), torch.device("meta")):
                torch.manual_seed(0)
                with where:
                    module = build(folder)
                assert all(p.is_meta for n, p in module.named_parameters() if not n.startswith("projections")) == (
                    not isinstance(where, nullcontext)
                )
                next(module.parameters()).requires_grad_(False)  # it stays as it was rounded
                Split(module, config, ranks, dtype, torch.promote_types(dtype, torch.float32))
                pieces.append({n: local(p).detach() for n, p in module.named_parameters()})
            whole, mine = pieces
            if whole.keys() != mine.keys() or not all(
                mine[n].dtype == t.dtype and torch.equal(mine[n], t) for n, t in whole.items()
            ):
                odd.append(f"{name}, {dtype}")
    return odd


def gathered(ranks: Ranks, cases: dict[str, Callable[[Path], nn.Module]], folder: Path) -> list[str]:
    """What of a checkpoint this process gathers, each tensor marked if it is not, to the bit, what one process saves."""
    said = ParallelConfig(shard="full", tensor=ranks.tensor)
    found = []
    for case, build in cases.items():
        config = recipe("bf16", ema_decay=0.9)
        alone = Engine(build(folder), config).tensors()
        with torch.device("meta"):
            module = build(folder)
        engine = Engine(module, config.model_copy(update={"parallel": said}), ranks)
        mine = engine.tensors()
        for (file, name), part in engine.wholes.names.items():
            if name in mine.get(part, ()):
                good = (
                    torch.equal(mine[part][name], alone[file][name])
                    and mine[part][name].dtype == alone[file][name].dtype
                )
                found.append(f"{'' if good else 'odd '}{case} {file} {name}")
        if ranks.is_main:
            found += [f"alone {case} {file} {name}" for file, tensors in alone.items() for name in tensors]
    return found


# --- main memory -----------------------------------------------------------------------------------------------------

BIG = {"n_layers": 16, "n_heads": 8, "d_model": 448, "d_ff": 1280, "vocab_size": 2048, "max_seq_len": 128}
BYTES = 4 * (16 * (4 * 448 * 448 + 3 * 448 * 1280 + 2 * 448) + 2048 * 448 + 448)  # 165 MB


def big_gpt() -> GPT:
    return GPT(GPTConfig(**BIG))


def memory(key: str) -> int:
    """Of this process, bytes: VmRSS now, or VmHWM, the most since `risen` began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def risen(work: Callable[[], Any]) -> tuple[int, Any]:
    """By how much the memory of this process rose at most while it did something, files that it looked at included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    made = work()
    return memory("VmHWM") - before, made


def measure(ranks: Ranks, folder: Path) -> dict[str, int]:
    """How much main memory three starts take."""
    said = ParallelConfig(shard="full")
    config = recipe("fp32", name="sgd").model_copy(update={"parallel": said})

    def begin(first: Callable[[GPT], Any]) -> Engine:
        with torch.device("meta"):
            model = big_gpt()
        first(model)
        return Engine(model, config, ranks)

    begin_small = Engine(tiny_gpt(), config, ranks)  # what is imported and set up once
    found = {}
    found["drawn"], engine = risen(lambda: begin(lambda model: init_weights(model, 0)))
    del engine
    found["read"], engine = risen(lambda: begin(lambda model: load_weights(model, folder / "big")))
    good = newest_good(folder / "run")[0]
    assert good is not None
    found["resumed"], _ = risen(lambda: engine.load_pieces(good, (), begin_small.state()))
    return found


def _child(process: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    wholes._BUCKET = 10_000
    for port, tensor in zip(ports, (2, 1), strict=True):
        place = {"RANK": process, "WORLD_SIZE": 4, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({k: str(v) for k, v in {**place, "MASTER_PORT": port}.items()})
        ranks = connect("cpu", timeout_s=60, tensor=tensor)
        told: dict[str, Any] = {}
        if tensor == 1 and platform.libc_ver()[0] == "glibc":
            told["memory"] = measure(ranks, folder)
        told["odd"] = compare(ranks, CASES if tensor == 2 else EXPERTS, folder)
        told["gathered"] = gathered(ranks, CASES if tensor == 2 else EXPERTS, folder)
        (folder / f"{tensor}-{process}.json").write_text(json.dumps(told))
        ranks.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What 4 processes found: rows computed together in shares, and shares alone."""
    folder = tmp_path_factory.mktemp("first")
    write_folders(folder)
    big = big_gpt()
    init_weights(big, 1)
    write_model(folder / "big", big, GPTConfig(**BIG))
    save(Engine(big, recipe("fp32", name="sgd")), Ranks(), Team(Ranks()), folder / "run")
    ports = [free_port() for _ in range(2)]
    mp.spawn(_child, (ports, folder), nprocs=4)
    return {n: [json.loads((folder / f"{n}-{p}.json").read_text()) for p in range(4)] for n in (1, 2)}


def test_the_same_pieces(told: dict[int, list[dict[str, Any]]]) -> None:
    """To the bit those of a network that was whole, in every process: drawn or read, of every layout and head."""
    assert [found["odd"] for n in (1, 2) for found in told[n]] == [[]] * 8


def test_one_checkpoint_is_gathered(told: dict[int, list[dict[str, Any]]]) -> None:
    """Each tensor by one process, with the bits that one process alone would save, in messages of many small buckets."""
    for n in (1, 2):
        found = [line for process in told[n] for line in process["gathered"]]
        alone = [line.removeprefix("alone ") for line in found if line.startswith("alone ")]
        assert len(alone) > 50
        assert sorted(alone) == sorted(line for line in found if not line.startswith("alone "))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is measured as Linux and glibc tell it")
@pytest.mark.parametrize("start", ["drawn", "read", "resumed"])
def test_no_process_holds_the_whole(told: dict[int, list[dict[str, Any]]], start: str) -> None:
    """Of 165 MB each of 4 processes keeps 41, and meanwhile a layer, or a window of the file."""
    assert max(found["memory"][start] for found in told[1]) < 0.7 * BYTES


def test_a_reference_is_made_whole() -> None:
    """A copy of a network without memory gets the same values, and leaves them to the network."""
    whole = GPT(shape(**QWEN))
    init_weights(whole, 1)
    with torch.device("meta"):
        bare = GPT(shape(**QWEN))
    init_weights(bare, 1)
    for dtype in (torch.bfloat16, torch.float32):
        made = copy.deepcopy(bare)
        make(made, torch.device("cpu"), dtype)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(made.parameters(), whole.parameters(), strict=True))


def test_what_is_wrong_is_told_when_it_is_read(tmp_path: Path) -> None:
    """Names and shapes at once; a head that is tied, but another tensor, with its values."""
    model = tiny_gpt(3, **SIZES, **QWEN)
    write_model(tmp_path / "odd", model, shape(**{**QWEN, "tie_embeddings": True}))
    with torch.device("meta"):
        bare = GPT(shape(qk_norm=True))
        with pytest.raises(UserError, match="q_norm"):
            load_weights(GPT(shape()), tmp_path / "odd")
    load_weights(bare, tmp_path / "odd")
    with pytest.raises(UserError, match="ties the embeddings"):
        make(bare, torch.device("cpu"), torch.float32)
