"""What a pipeline's file says: references, order, options, and every mistake in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkit.config import UserError


def test_references_become_folders_and_edges(world: Any) -> None:
    pipeline = world.read()
    assert list(pipeline.nodes) == ["tokenizer", "pretrain", "sft", "int8", "answers"]
    sft, int8 = pipeline.nodes["sft"], pipeline.nodes["int8"]
    assert sft.parents == ("pretrain",) and sft.recipe.init_from == str(world.out / "pretrain")
    assert sft.what["init_from"] == "{node: pretrain}", "the key does not depend on where the pipeline lies"
    assert int8.argv == ["quantize", "--bits=8", str(world.out / "sft"), str(world.out / "int8")]
    assert pipeline.nodes["answers"].argv[-1] != str(world.out / "answers")
    assert f"--out={world.out / 'answers' / 'rows.jsonl'}" in pipeline.nodes["answers"].argv
    assert pipeline.before("int8") == {"int8", "sft", "pretrain", "tokenizer"}
    assert pipeline.behind("sft") == {"sft", "int8", "answers"}


def test_a_reference_within_a_text_and_one_that_nobody_spelt_out(world: Any) -> None:
    world.nodes["again"] = {"run": "rank", "set": {
        "answers": "{node: answers}/rows.jsonl", "annotator": "simulated", "utility": "exact", "out": "pairs.jsonl",
    }}  # fmt: skip
    world.nodes["plain"] = {"run": "merge", "set": {"adapter": str(world.out / "sft")}}
    pipeline = world.read()
    again = pipeline.nodes["again"]
    assert again.parents == ("answers",) and f"--answers={world.out / 'answers' / 'rows.jsonl'}" in again.argv
    assert again.file == "pairs.jsonl"
    assert pipeline.nodes["plain"].parents == ("sft",)


def test_parents_stand_before_their_children_whatever_the_file_says(world: Any) -> None:
    world.nodes = {
        "early": {"run": "quantize", "set": {"model": {"node": "sft"}, "bits": 4}, "after": ["answers"]},
        **world.nodes,
    }
    order = list(world.read().nodes)
    assert order.index("early") > max(order.index("sft"), order.index("answers"))
    assert order[:3] == ["tokenizer", "pretrain", "sft"]


def test_overrides_reach_a_node_and_the_pipeline(world: Any, tmp_path: Path) -> None:
    pipeline = world.read("pretrain.steps=9", "pretrain.optim.lr=0.5", f"out={tmp_path / 'b'}", "int8.bits=4")
    assert pipeline.nodes["pretrain"].recipe.steps == 9 and pipeline.nodes["pretrain"].recipe.optim.lr == 0.5
    assert pipeline.out == tmp_path / "b" and "--bits=4" in pipeline.nodes["int8"].argv
    assert pipeline.nodes["sft"].recipe.init_from == str(tmp_path / "b" / "pretrain")


def test_ranks_are_of_recipes_that_train(world: Any) -> None:
    nodes = world.read("ranks=2").nodes
    assert "torch.distributed.run" in nodes["sft"].process and "torch.distributed.run" not in nodes["tokenizer"].process
    assert "torch.distributed.run" not in nodes["int8"].process


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({}, "one of the two"),
        ({"recipe": "sft.yaml", "run": "rank"}, "one of the two"),
        ({"recipe": "sft.yaml", "set": {"init_from": {"node": "sftt"}}}, "there is no such node"),
        ({"recipe": "sft.yaml", "set": {"optim": {"lrr": 1}}}, "did you mean 'lr'"),
        ({"recipe": "sft.yaml", "set": {"out": "x"}}, "set.out"),
        ({"recipe": "sft.yaml", "set": {"stop_at": 2}}, "never done"),
        ({"recipe": "nothing.yaml"}, "recipe not found"),
        ({"run": "train"}, "run: one of generate"),
        ({"run": "quantize", "set": {"model": {"node": "sft"}}}, "--bits"),
        ({"run": "quantize", "set": {"model": {"node": "sft"}, "bits": 7}}, "invalid choice: 7"),
        ({"run": "quantize", "set": {"model": {"node": "sft"}, "bitz": 8}}, "has no such option"),
        ({"run": "quantize", "set": {"model": {"node": "sft"}, "bits": 8, "out": "x"}}, "drop it"),
        ({"run": "rank", "set": {"model": {"node": "sft"}, "prompts": "x"}}, "waits for nobody"),
        ({"run": "score", "set": {"model": "m", "file": "f", "out": "../x.jsonl"}}, "within the node's folder"),
        ({"run": "score", "set": {"model": "m", "file": "f", "raw": 3}}, "true or false"),
        ({"run": "export", "set": {"model": "m", "format": "gguf"}}, "set.out"),
        ({"run": "merge", "set": {"adapter": {"node": "odd"}}}, "refers to itself"),
        ({"run": "merge", "set": {"adapter": "x"}, "ranks": 2}, "ranks"),
        ({"run": "merge", "set": {"adapter": "x"}, "after": ["nobody"]}, "no such node"),
    ],
)
def test_a_mistake_names_the_node_and_what_is_wrong(world: Any, node: dict, told: str) -> None:
    world.nodes["odd"] = node
    with pytest.raises(UserError) as e:
        world.read()
    assert told in str(e.value) and "odd" in str(e.value) and "pipeline.yaml" in str(e.value)


def test_circles_names_and_overrides(world: Any) -> None:
    with pytest.raises(UserError, match="'nobody' is no node"):
        world.read("nobody.steps=3")
    with pytest.raises(UserError, match="expected NODE"):
        world.read("steps=3")
    world.nodes["a"] = {"run": "merge", "set": {"adapter": {"node": "b"}}}
    world.nodes["b"] = {"run": "merge", "set": {"adapter": {"node": "a"}}}
    with pytest.raises(UserError, match="run in a circle"):
        world.read()
    world.nodes = {"out": {"run": "merge", "set": {"adapter": "x"}}}
    with pytest.raises(UserError, match="is no name of a node"):
        world.read()


def test_an_unquoted_reference_is_explained(world: Any) -> None:
    with pytest.raises(UserError, match="is quoted"):
        world.read_text("out: x\nnodes:\n  a: {run: score, set: {model: m, file: {node: b}/rows.jsonl}}\n")
