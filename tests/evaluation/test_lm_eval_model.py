"""Our model behind lm-eval: the numbers of its own backend for transformers, request by request (B70)."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkit.evaluation.lm_eval_model import TextEncoder, adds_bos, lm_eval_model
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig

pytest.importorskip("lm_eval", reason="lm-eval is not installed (llmkit[eval])")
TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = Tokenizer.train([TEXT * 20], TokenizerConfig(vocab_size=320))
    rows = -(-tokenizer.vocab_size // 64) * 64
    model = GPT(GPTConfig(n_layers=2, n_heads=2, d_model=32, d_ff=48, max_seq_len=48, vocab_size=rows))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2, generator=generator)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in model_files(model.config, torch.float32, tokenizer, {"stage": "sft", "step": 1}).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    """Ours and lm-eval's of the same folder."""
    pytest.importorskip("transformers", reason="transformers is not installed (llmkit[hf])")
    pytest.importorskip("accelerate", reason="lm-eval's own backend needs accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    return lm_eval_model(load_model(folder), Tokenizer.load(folder), folder, 512), theirs


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args, request_type="") for args in arguments]


def test_log_likelihoods_equal(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    rng = random.Random(0)
    chat = [{"role": "user", "content": "Where is the mill?"}]
    prompt = ours.apply_chat_template(chat)
    assert prompt == theirs.apply_chat_template(chat)
    requests = [(prompt, "By the river."), ("", "Mira"), (TEXT * 9, " yes"), ("Answer: ", "磨坊"), ("x", TEXT * 2)]
    for _ in range(20):
        n = rng.choice([i for i, c in enumerate(TEXT) if c == " "])
        requests.append((TEXT[:n], TEXT[n : n + rng.randrange(2, 9)]))
    found = ours.loglikelihood(asked(*requests), disable_tqdm=True)
    # One at a time: theirs takes requests whose inputs are the same, but cut elsewhere, for one.
    expected = [theirs.loglikelihood(asked(request), disable_tqdm=True)[0] for request in requests]
    for (a, a_greedy), (b, b_greedy) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and a_greedy == b_greedy


def test_rolling_log_likelihoods_equal(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    texts = asked((TEXT,), (TEXT * 7,), ("Mira",))
    found, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_texts_equal(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    settings = [{"until": ["e"], "max_gen_toks": 9}, {"until": [], "max_gen_toks": 5, "do_sample": False}]
    requests = asked(*[(TEXT[:n], s) for n in (3, 20, 30) for s in settings])
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_an_answer_that_is_begun_goes_on(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "By the"}]
    found = [lm.apply_chat_template(chat, add_generation_prompt=False) for lm in both]
    assert found[0] == found[1] and found[0].endswith("By the")
    assert ours.chat_template(True) == theirs.chat_template(True) and ours.chat_template(False) is None


def test_control_tokens_in_a_text_count_as_such(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert not adds_bos(folder) and tokenizer.bos_id is not None
    bos = next(text for text, i in tokenizer.special.items() if i == tokenizer.bos_id)
    plain = tokenizer.encode("Mira")
    assert TextEncoder(tokenizer, False)(f"{bos}Mira") == [tokenizer.bos_id, *plain]
    with_bos = TextEncoder(tokenizer, True)
    assert with_bos(f"{bos}Mira") == with_bos("Mira") == [tokenizer.bos_id, *plain]
    assert with_bos("Mira", add_special_tokens=False) == plain


def test_a_post_processor_that_adds_bos_is_seen(tmp_path: Path) -> None:
    step = '{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}'
    for found, expected in [(step, True), (f'{{"type": "Sequence", "processors": [{step}]}}', True), ("null", False)]:
        (tmp_path / "tokenizer.json").write_text(f'{{"post_processor": {found}}}')
        assert adds_bos(tmp_path) == expected
    assert not adds_bos(tmp_path / "none")
