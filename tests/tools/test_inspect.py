"""`llmkit inspect`: what it shows is what is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from posttraining import tiny_stage, tiny_world
from safetensors.torch import load_file

from llmkit.cli import main
from llmkit.stages import load_recipe
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.inspect.parameters import parameters_of
from llmkit.tools.inspect.shown import roles_of, text_of, texts_of
from llmkit.tools.inspect.terminal import lines_of
from llmkit.tools.opening import opened_data

STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "distill")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("inspect"))


def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train([], TokenizerConfig(kind="byte"))


def test_roles_follow_the_template() -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": r, "content": c} for r, c in (("system", "Be."), ("user", "user"), ("assistant", "好"))]
    chat = tokenizer.encode_chat(messages)
    roles = roles_of(chat.ids, tokenizer)
    by_role = {
        role: tokenizer.decode([i for i, r in zip(chat.ids, roles, strict=True) if r == role], skip_special=False)
        for role in roles
    }
    assert by_role["system"] == "system\nBe." and by_role["user"] == "user\nuser"
    assert by_role["assistant"] == "assistant\n好"
    text = text_of("x", chat.ids, [float(m) for m in chat.loss_mask], tokenizer)
    learnt = "".join(t.text for t in text.tokens if t.learnt)
    assert learnt == "好<|im_end|>" and "".join(t.text for t in text.tokens) == chat.text


def test_a_role_between_two_control_tokens_is_found() -> None:
    """Llama 3's way: <|start|>user<|end|> and then what is said."""
    config = TokenizerConfig(kind="byte", special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    tokenizer = Tokenizer.train([], config)
    start, end, over = (tokenizer.special[f"<|{n}|>"] for n in ("start_header_id", "end_header_id", "eot_id"))
    ids = [start, *tokenizer.encode("user"), end, *tokenizer.encode("\n\nhi"), over, *tokenizer.encode("x")]
    roles = roles_of(ids, tokenizer)
    assert set(roles[6:10]) == {"user"} and roles[-1] == "text" and roles[0] == roles[5] == roles[10] == "control"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_shown(stage: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_stage(world, stage, f"shown_{stage}")), "--texts", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n--- ") == 2 and "<|im_start|>user" in out
    learns = stage not in ("ppo", "grpo")
    assert ("\u27e6" in out.split("\n--- ")[1]) == learns
    assert ("are learnt" in out) == learns and not (world / f"shown_{stage}" / "checkpoints").exists()


def test_what_is_shown_as_learnt_is_the_batch(world: Path) -> None:
    recipe = load_recipe(tiny_stage(world, "sft", "counted"))
    with opened_data(recipe) as (task, ctx), task.open_rows(ctx) as loader:
        batches = loader.step(2)
        n = sum(t.learnt for b in batches for text in texts_of(b, task.tokenizer) for t in text.tokens)
        assert n == sum(b.denominator for b in batches) > 0
        shown = [text for b in batches for text in texts_of(b, task.tokenizer)]
    assert all(t.position == i for text in shown for i, t in enumerate(text.tokens))


def test_the_table_has_a_token_a_line() -> None:
    tokenizer = byte_tokenizer()
    text = text_of("x", tokenizer.encode("a\nb"), [0.0, 1.0, 0.5], tokenizer, values=[None, 2.0, None])
    head, columns, *rows = lines_of(text, coloured=False, table=True)
    assert head == "--- x: 3 tokens, 2 learnt" and columns.split()[-1] == "value"
    assert [row.split()[4] for row in rows] == ["-", "1", "0.5"] and rows[1].split()[-2:] == ["\\n", "2.0000"]


def test_the_page_is_whole(world: Path, tmp_path: Path) -> None:
    """One file, no address in it, and the numbers of every token."""
    file = tmp_path / "page.html"
    assert main(["inspect", str(tiny_stage(world, "sft", "paged")), "--html", str(file)]) == 0
    page = file.read_text("utf-8")
    assert not re.findall(r"(?:src|href)=|https?://", page) and len(page) < 5_000_000
    data = json.loads(re.search(r"<script id=data[^>]*>(.*?)</script>", page, re.S)[1])  # type: ignore[index]
    assert sum(len(text) for text in data) == page.count("<b>") + page.count("<b class=l>")


def test_a_text_that_looks_like_html_stays_text(tmp_path: Path) -> None:
    from llmkit.tools.inspect.page import page

    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("</script><img src=x>")
    made = page("<t>", ["a & b"], [text_of("x", ids, [0.0] * len(ids), tokenizer)])
    assert "<img" not in made and made.count("</script>") == 2 and "<t>" not in made


def test_parameters_of_a_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {p.name: p for p in parameters_of(world / "base")}
    tensors = load_file(world / "base" / "model.safetensors")
    assert found.keys() == tensors.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name].norm == pytest.approx(torch.linalg.vector_norm(tensors[name]).item())
    kinds = {p.kind for p in found.values()}
    assert kinds == {"embeddings", "attention", "mlp", "norms"}
    assert main(["inspect", str(world / "base")]) == 0
    out = capsys.readouterr().out
    assert f"{sum(t.numel() for t in tensors.values()):,}" in out and name in out


def test_wrong_questions(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_stage(world, "sft", "asked"))
    for argv, said in (
        ([recipe, "--step", "0"], "count from 1"),
        ([str(world / "base"), "--html", "x"], "are for recipes"),
        ([str(world / "nothing")], "no such folder"),
        ([str(Path("configs/tokenizer/demo.yaml").resolve())], "trains no network"),
    ):
        assert main(["inspect", *argv]) == 2
        assert said in capsys.readouterr().err
