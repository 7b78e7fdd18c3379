"""What a checkpoint tells of where it comes from, and what `llmkit lineage` and the model card make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli import main
from llmkit.lineage import Lineage, folder_of, manifest_of, parents_in, sources_in
from llmkit.storage import resolve_model, verify
from llmkit.tools.lineage import _source, tree_of

TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley.\n" * 40


def train(folder: Path, name: str, **more: Any) -> Path:
    """A run of two steps."""
    (folder / "t.txt").write_text(TEXT, "utf-8")
    data: dict[str, Any] = {
        "stage": "pretrain",
        "out": str(folder / name),
        "data": {"path": str(folder / "t.txt"), "cache_dir": str(folder / "cache")},
        "batch": {"tokens_per_step": 128},
        "steps": 2,
        "eval": {"every": 1},
        "log": {"tensorboard": False, "plot": False},
        **more,
    }
    if "init_from" not in more:
        data |= {
            "tokenizer": {"kind": "byte"},
            "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
        }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data), "utf-8")
    assert main(["train", str(folder / f"{name}.yaml")]) == 0
    return folder / name


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """grandparent -> parent -> child, and the child in 8 bits."""
    folder = tmp_path_factory.mktemp("family")
    train(folder, "grandparent")
    train(folder, "parent", init_from=str(folder / "grandparent"), seed=1)
    train(folder, "child", init_from=str(folder / "parent"), seed=2)
    assert main(["quantize", str(folder / "child"), str(folder / "int8"), "--bits", "8"]) == 0
    return folder


def test_a_manifest_knows_parents_code_and_packages(family: Path) -> None:
    parent = manifest_of(resolve_model(family / "parent"))
    manifest = verify(resolve_model(family / "child"))
    assert parent is not None
    assert manifest["lineage"]["parents"] == [{
        "role": "init_from", "path": str(family / "parent"), "checkpoint": "step-00000002", "stage": "pretrain",
        "step": 2, "manifest": parent["sha256"],
    }]  # fmt: skip
    assert manifest["lineage"] == json.loads((family / "child" / "lineage.json").read_bytes())
    assert len(manifest["lineage"]["code"]) == 64 and manifest["lineage"]["packages"]["torch"]
    assert manifest["recipe"]["seed"] == 2 and len(manifest["data"]) == 64


def test_the_card_tells_it_and_names_no_folder_of_this_machine(family: Path) -> None:
    card = (resolve_model(family / "child") / "README.md").read_text("utf-8")
    manifest = manifest_of(resolve_model(family / "parent"))
    assert manifest is not None
    assert f"| init_from | pretrain, step 2 {manifest['sha256'][:12]} |" in card
    origin = card.partition("## Where it comes from")[2]
    assert "seed: 2" in origin and "| torch |" in origin and "\nout:" not in origin and str(family) not in origin
    assert card.startswith("---\nlibrary_name: transformers")


def test_a_run_keeps_what_it_began_with(family: Path, tmp_path: Path) -> None:
    """A parent that trains on, while the child is resumed, is no other parent."""
    run = Path(shutil.copytree(family / "child", tmp_path / "child"))
    before = json.loads((run / "lineage.json").read_bytes())
    kept = Lineage.note(run, {"init_from": str(family / "grandparent")}, begun=True)
    assert kept.parents == before["parents"]
    new = Lineage.note(run, {"init_from": str(family / "grandparent")}, begun=False)
    assert new.parents[0]["path"] == str(family / "grandparent")


def test_models_that_a_recipe_names() -> None:
    recipe = {
        "init_from": "a", "teacher": "b", "critic.init_from": "c", "rewards.0.kind": "model", "rewards.0.path": "d",
        "rewards.1.kind": "exact", "rewards.1.path": "no", "data.path": "corpus", "data.train.0.path": "x", "reference": None,
    }  # fmt: skip
    named = parents_in({"recipe": recipe})
    assert [p["path"] for p in named] == ["a", "b", "c", "d"] and sources_in(recipe) == ["corpus", "x"]
    assert [p["path"] for p in parents_in({"merge": {"base": "m", "adapters": "n"}})] == ["m", "n"]
    assert [p["role"] for p in parents_in({"parents": [{"folder": "m"}]})] == ["average"]


def test_the_tree_reaches_the_first_text(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["lineage", str(family / "int8")]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "(quantize" in lines[0]
    order = [said.index(f"{family / name}/checkpoints") for name in ("child", "parent", "grandparent")]
    assert order == sorted(order) and said.count(f"data: {family / 't.txt'}, SHA-256") == 3
    assert main(["lineage", str(family / "int8"), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    below = tree["parents"][0]["tree"]["parents"][0]["tree"]["parents"][0]["tree"]
    assert below["folder"].startswith(str(family / "grandparent")) and below["parents"] == []


def test_a_parent_that_is_gone_is_still_named(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = shutil.copytree(resolve_model(family / "child"), tmp_path / "step-00000002")
    manifest = manifest_of(child)
    assert manifest is not None
    parent = manifest["lineage"]["parents"][0]
    assert folder_of(parent) == family / "parent" / "checkpoints" / "step-00000002"
    gone = {**parent, "path": str(tmp_path / "gone")}
    assert folder_of(gone) is None
    other = {**parent, "path": str(family / "grandparent")}
    assert folder_of(other) is None, "another checkpoint of the same name is not the parent"


def test_answers_of_a_model_lead_to_it(family: Path, tmp_path: Path) -> None:
    """A ranking, made by a pipeline from answers that a model wrote: the tree goes on with that model."""
    for node in ("answers", "ranking"):
        (tmp_path / node).mkdir()
        (tmp_path / node / "rows.jsonl").write_text("{}\n")
    settings = {"answers": {"model": str(resolve_model(family / "parent"))}, "ranking": {"annotator": "simulated"}}
    for node, told in settings.items():
        (tmp_path / node / "rows.jsonl.notes").write_text(json.dumps({"settings": told}) + "\n")
    nodes = {
        "answers": {"file": "rows.jsonl", "parents": []},
        "ranking": {"file": "rows.jsonl", "parents": ["answers"]},
    }
    (tmp_path / "pipeline.json").write_text(json.dumps({"nodes": nodes}))
    tree = tree_of(resolve_model(family / "child"))
    assert tree["sources"][0]["answers_of"] is None
    found = _source(str(tmp_path / "ranking" / "rows.jsonl"), ())
    assert found["answers_of"]["tree"]["folder"].startswith(str(family / "parent"))
