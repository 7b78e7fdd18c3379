"""What a model says of given answers: whatever pads them, in whichever batch, and computed once for a reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import V, build

from llmkit.config import Interrupted, UserError
from llmkit.data.sequences import padded
from llmkit.data.shared import share_prompts
from llmkit.inference import logprobs
from llmkit.inference.logprobs import Texts, answer_labels, answer_logprobs, cached_logprobs, shared_logprobs
from llmkit.model.gpt import GPT

RNG = np.random.default_rng(0)
SEQUENCES = [(RNG.integers(5, V, n).astype(np.int32), int(RNG.integers(1, n))) for n in RNG.integers(3, 40, 30)]


def test_which_tokens_count() -> None:
    """B84, B85: the answer's, predicted from the position before; never the prompt's, never padding's."""
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 9, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    labels = answer_labels(ids, torch.tensor([4, 3, 1]), torch.tensor([2, 2, 1]))
    assert labels.tolist() == [[-100, 7, 8, -100, -100, -100], [-100, 9, -100, -100, -100, -100], [-100] * 6]


def test_padding_and_neighbours_change_nothing() -> None:
    """B86: in fp64, each alone, all together and behind more padding, equal to the logits' own log-softmax."""
    model = build().double()
    alone = []
    for ids, n_prompt in SEQUENCES:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        logps = model.logits(model(row)).log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
        alone.append(logps[n_prompt - 1 :].sum())
    wanted = torch.stack(alone)
    for width, pad in ((40, 0), (64, 7)):
        ids, lengths, prompts = padded([s for s, _ in SEQUENCES], [n for _, n in SEQUENCES], 64, pad)
        wide = torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad)
        assert torch.allclose(answer_logprobs(model, wide, lengths, prompts), wanted, atol=1e-10, rtol=0)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often the model is loaded and asked; parts are small."""
    counts = {"loaded": 0, "batches": 0}
    monkeypatch.setattr(logprobs, "_PART_TOKENS", 100)
    original = logprobs._of_batch

    def counted(*args):
        counts["batches"] += 1
        return original(*args)

    monkeypatch.setattr(logprobs, "_of_batch", counted)
    return counts


def cached(tmp_path: Path, counts: dict[str, int], stop_after: int = 10**9, **options) -> np.ndarray:
    folder = tmp_path / "model"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    def load() -> GPT:
        counts["loaded"] += 1
        return build()

    arguments = {
        "texts": Texts(np.array([len(s) for s, _ in SEQUENCES]), lambda i: SEQUENCES[i], "hash"),
        "inputs": {"precision": "fp32"},
        "micro_tokens": 80,
        "pad_id": 0,
        "device": torch.device("cpu"),
        "should_stop": lambda: counts["batches"] >= stop_after,
        "say": lambda line: None,
    }
    return cached_logprobs(tmp_path / "cache", [folder], load, **{**arguments, **options})


def test_computed_once_and_in_parts(tmp_path: Path, asked: dict[str, int]) -> None:
    """A2: stopped again and again, it loses at most a part each time, and ends with the same bits as at one go."""
    whole = cached(tmp_path, asked)
    n_batches = asked["batches"]
    assert n_batches > 8 and asked["loaded"] == 1
    assert np.array_equal(cached(tmp_path, asked), whole) and asked == {"loaded": 1, "batches": n_batches}
    (file,) = (tmp_path / "cache").glob("*.logprobs.safetensors")
    assert not list((tmp_path / "cache").glob("*.parts"))
    file.unlink()
    stops = 0
    while True:
        try:
            again = cached(tmp_path, asked, stop_after=asked["batches"] + 5)
            break
        except Interrupted:
            stops += 1
    assert stops >= 2 and np.array_equal(again, whole)
    assert asked["batches"] <= 2 * n_batches + 5 * stops
    model = build()
    for i in (0, 7, 29):
        ids, lengths, prompts = padded([SEQUENCES[i][0]], [SEQUENCES[i][1]], 64, 0)
        assert whole[i] == pytest.approx(answer_logprobs(model, ids, lengths, prompts).item(), abs=1e-4)


def test_what_it_is_keyed_by(tmp_path: Path, asked: dict[str, int]) -> None:
    """B43: other weights, sequences or precision are asked again; a damaged file is no answer."""
    cached(tmp_path, asked)
    cached(tmp_path, asked, inputs={"precision": "bf16"})
    cached(tmp_path, asked, texts=Texts(np.array([len(s) for s, _ in SEQUENCES]), lambda i: SEQUENCES[i], "other"))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others!")
    cached(tmp_path, asked)
    files = list((tmp_path / "cache").glob("*.logprobs.safetensors"))
    assert asked["loaded"] == 4 and len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"logprobs\.safetensors: damaged"):
        cached(tmp_path, asked)


def test_each_prompt_once() -> None:
    """B67, B85: prompts that are there once, answers that don't see each other, several groups in a row: the same sums
    and gradients as row by row, to 1e-10."""
    rng = np.random.default_rng(1)
    texts, prompts, sizes = [], [], []
    for _ in range(9):
        prompt = rng.integers(5, V, rng.integers(1, 20))
        sizes.append(int(rng.integers(1, 5)))
        for _ in range(sizes[-1]):
            texts.append(np.concatenate([prompt, rng.integers(5, V, rng.integers(1, 15))]))
            prompts.append(len(prompt))
    shared = share_prompts(texts, prompts, sizes, 0)
    n_ids = sum(len(t) for t in texts) - sum((s - 1) * p for s, p in zip(sizes, firsts(prompts, sizes), strict=True))
    assert (shared.groups_RT >= 0).sum() == n_ids and 1 < len(shared.ids_RT) < 9
    grads = []
    for packed in (False, True):
        model = build(qk_norm=True).double().train()
        if packed:  # noqa: SIM108
            sums = shared_logprobs(model, shared, len(texts))
        else:
            sums = answer_logprobs(model, *padded(texts, prompts, 64, 0))
        (sums * torch.linspace(-1, 1, len(texts), dtype=torch.float64)).sum().backward()
        grads.append([sums.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def firsts(prompts: list[int], sizes: list[int]) -> list[int]:
    """The prompt's length of each group."""
    return [prompts[i] for i in np.cumsum([0, *sizes[:-1]]).tolist()]


def test_no_group_at_all() -> None:
    """A batch of padding alone is one row, in which nothing is predicted."""
    shared = share_prompts([], [], [], 0)
    assert shared.ids_RT.shape[0] == 1 and shared.labels_N.numel() == 0
    assert shared_logprobs(build(), shared, 1).tolist() == [0.0]
