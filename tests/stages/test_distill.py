"""Distillation through the command line: each term teaches, a cache says what the teacher says, nothing of a term is left
in the student's folder, and what cannot work is refused in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import PARAMETERS, stand_in
from ports import free_port
from posttraining import tiny_model, tiny_stage, tiny_world
from reliability import read_jsonl, train
from safetensors import safe_open
from safetensors.torch import load_file
from test_objectives import Quiet

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.data.cache import ContentHashes
from llmkit.distill import terms
from llmkit.distill.lessons import Lessons
from llmkit.distill.on_policy import is_on_policy, last_answer
from llmkit.distill.terms import Terms
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.stages import load_recipe
from llmkit.storage import newest_good, resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.training.dist import Ranks

SOFT = [{"kind": "soft"}]
ALONE: dict[str, Any] = {"on_policy_frac": 0.0, "temperature": 1.0, "term_norms_every": None, "ce_weight": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world, and a teacher that has read its rows."""
    folder = tiny_world(tmp_path_factory.mktemp("distill"))
    file = tiny_stage(
        folder,
        "sft",
        "taught",
        init_from=str(folder / "teacher"),
        steps=150,
        eval={"every": 150},
        save={"every": 150},
        optim={"lr": 1e-2},
    )
    assert train(file) == 0
    return folder


def distill(world: Path, out: str, **changes: Any) -> Path:
    """A recipe of plain soft labels from the trained teacher, but for the changes; `init_from=None` drops the old student."""
    file = tiny_stage(world, "distill", out, **{**ALONE, "losses": SOFT, "teacher": str(world / "taught"), **changes})
    recipe = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "init_from" or v is not None}
    file.write_text(yaml.safe_dump(recipe))
    return file


def metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and evaluations."""
    found = read_jsonl(run / "metrics.jsonl")
    return [m for m in found if "train/loss" in m], [m for m in found if "valid/loss" in m]


# --- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_soft_labels_teach(world: Path, divergence: str) -> None:
    """Of the held-out divergence a third at most is left; the cross entropy that is not in the loss falls too."""
    run = world / f"soft-{divergence}"
    losses = [{"kind": "soft", "divergence": divergence, "name": "it"}]
    file = distill(world, run.name, losses=losses, steps=120, eval={"every": 60}, optim={"lr": 1e-2})
    assert train(file) == 0
    first, *_, last = metrics(run)[1]
    assert last["valid/it"] < 0.35 * first["valid/it"] and last["valid/ce"] < 0.8 * first["valid/ce"]
    assert last["valid/loss"] == pytest.approx(last["valid/it"], rel=1e-6)


@pytest.mark.parametrize(
    "term",
    [
        {"kind": "hidden"},
        {"kind": "hidden", "measure": "cosine", "layers": [[1, 2]]},
        {"kind": "attention", "layers": "last"},
        {"kind": "relation", "of": ["queries", "keys", "values"]},
    ],
    ids=lambda t: f"{t['kind']}-{t.get('measure', '')}",
)
def test_each_feature_alone_lowers_its_distance_by_half(world: Path, term: dict[str, Any]) -> None:
    """On held-out rows; and it alone moves no word, for the head has no part in it."""
    run = world / f"feature-{term['kind']}-{term.get('measure', '')}"
    losses = [{**term, "name": "it"}]
    file = distill(world, run.name, losses=losses, steps=120, eval={"every": 120}, optim={"lr": 1e-2})
    assert train(file) == 0
    first, *_, last = metrics(run)[1]
    assert last["valid/it"] <= 0.5 * first["valid/it"]


def test_the_teacher_itself_has_nothing_to_learn(world: Path) -> None:
    """student == teacher: every term is 0 with zero gradient, and the weights stay as they are but for weight decay."""
    run = world / "itself"
    kinds = ["soft", "hidden", "attention", "relation"]
    file = distill(
        world,
        run.name,
        init_from=None,
        from_teacher={},
        losses=[{"kind": k, "name": k} for k in kinds],
        steps=2,
        optim={"lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 0, "name": "sgd"},
        term_norms_every=1,
    )
    assert train(file) == 0
    steps, evaluations = metrics(run)
    for step in steps:
        for kind in kinds:
            assert abs(step[f"train/{kind}"]) < 1e-6 and step[f"train/{kind}/grad_norm"] < 1e-5, kind
    assert evaluations[0]["valid/ce"] > 0.1  # which is not 0
    theirs, ours = (load_file(resolve_model(world / name) / "model.safetensors") for name in ("taught", run.name))
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=0, atol=1e-5)


def test_students_own_answers_teach(world: Path) -> None:
    """lambda 1: every step is on what the student wrote, which alone is trained; the reverse divergence falls."""
    run = world / "own"
    losses = [{"kind": "soft", "divergence": "reverse", "name": "it"}]
    file = distill(world, run.name, losses=losses, on_policy_frac=1.0, steps=60, eval={"every": 60}, optim={"lr": 1e-2})
    assert train(file) == 0
    steps, (first, *_, last) = metrics(run)
    assert all(s["train/on_policy"] == 1 and 1 <= s["train/own_length"] <= 12 for s in steps)
    assert all("train/ce" not in s for s in steps)
    early, late = (sum(s["train/it"] for s in part) / 10 for part in (steps[:10], steps[-10:]))
    assert late < 0.5 * early and last["valid/it"] < first["valid/it"]


def test_share_of_own_steps() -> None:
    """It is a function of seed and step, near the share that was asked for, and none or all at the ends."""
    chosen = [is_on_policy(7, step, 0.3) for step in range(4000)]
    assert 0.27 < sum(chosen) / 4000 < 0.33 and chosen == [is_on_policy(7, step, 0.3) for step in range(4000)]
    assert not any(is_on_policy(7, step, 0.0) for step in range(100))
    assert all(is_on_policy(7, step, 1.0) for step in range(100))


def test_the_last_answer_is_asked_for() -> None:
    """Of several turns the one that the conversation ends with."""
    import numpy as np

    assert last_answer(np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool)) == 6
    assert last_answer(np.array([0, 1, 1], bool)) == 1


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_whole_cache_is_the_live_teacher(world: Path) -> None:
    """fp32, k = vocabulary: the same losses and weights to 1e-5; two students share the files; bf16 within 1 %."""
    sections = {"steps": 20, "ce_weight": 0.5, "temperature": 2.0, "eval": {"every": 10}}
    assert train(distill(world, "live", **sections)) == 0
    assert train(distill(world, "cached", cache={"top_k": 10**6, "dtype": "fp32"}, **sections)) == 0
    made = sorted((world / "cache").rglob("*"))
    assert train(distill(world, "shared", cache={"top_k": 10**6, "dtype": "fp32"}, seed=1, **sections)) == 0
    assert [p.name for p in made] == [p.name for p in sorted((world / "cache").rglob("*"))]
    assert train(distill(world, "half", cache={"top_k": 10**6}, **sections)) == 0
    live, cached, half = (metrics(world / name) for name in ("live", "cached", "half"))
    for a, b, c in zip(*(m[0] for m in (live, cached, half)), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert c["train/loss"] == pytest.approx(a["train/loss"], rel=1e-2)
    for a, b in zip(live[1], cached[1], strict=True):
        assert b["valid/soft/forward"] == pytest.approx(a["valid/soft/forward"], rel=1e-5)


def test_a_short_cache_teaches(world: Path) -> None:
    """8 of 320 tokens and the rest as one: the true divergence falls nearly as far."""
    run = world / "short"
    file = distill(world, run.name, cache={"top_k": 8}, steps=120, eval={"every": 60}, optim={"lr": 1e-2})
    assert train(file) == 0
    first, *_, last = metrics(run)[1]
    assert last["valid/soft/forward"] < 0.35 * first["valid/soft/forward"]


def test_prepare_in_parts(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two jobs make what one makes; training finds it and loads no teacher."""
    file = distill(world, "parts", cache={"top_k": 5}, steps=1)
    for part in ("part=1/2", "part=2/2"):
        assert main(["prepare", str(file), part]) == 0
    assert main(["prepare", str(file)]) == 0
    assert "train" in capsys.readouterr().out
    assert train(file) == 0


def test_documents(world: Path) -> None:
    """Plain text, as pretraining reads it: live and from a cache."""
    rows = [json.loads(line)["completion"] for line in (world / "sft.jsonl").read_text().splitlines()]
    (world / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    data = {"path": str(world / "texts.jsonl")}
    for name, more in (("docs", {}), ("docs-cached", {"cache": {"top_k": 10**6, "dtype": "fp32"}})):
        file = distill(
            world,
            name,
            examples="documents",
            data=data,
            steps=10,
            batch={"max_len": 32, "examples_per_step": 4, "micro_tokens": 64},
            **more,
        )
        assert train(file) == 0
    live, cached = (metrics(world / name)[0] for name in ("docs", "docs-cached"))
    for a, b in zip(live, cached, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)


def test_the_teachers_answers_take_the_datas_place(world: Path) -> None:
    """Sequence-level: questions stay, the last answers are the teacher's greedy ones."""
    file = distill(
        world, "sequence", losses=[], ce_weight=1.0, teacher_answers={"max_new_tokens": 40}, steps=60,
        eval={"every": 30}, optim={"lr": 1e-2},
    )  # fmt: skip
    assert train(file) == 0
    first, *_, last = metrics(world / "sequence")[1]
    assert last["valid/ce"] < 0.6 * first["valid/ce"]
    (answers,) = (world / "cache").glob("*.answers.jsonl")
    given = {json.loads(line)["prompt"] for line in (world / "distill.jsonl").read_text().splitlines()}
    told = [json.loads(line)["messages"] for line in answers.read_text().splitlines()]
    assert told and {m[0]["content"] for m in told} <= given


# --- the same, however it is computed --------------------------------------------------------------------------------


def test_terms_add_up(world: Path) -> None:
    """The loss is the weighted sum of its parts, and one term's own gradient is the whole one's where it is alone."""
    losses = [{"kind": "soft", "weight": 0.7}, {"kind": "relation", "weight": 3.0}]
    assert train(distill(world, "sum", losses=losses, ce_weight=0.3, steps=3, term_norms_every=1)) == 0
    for step in metrics(world / "sum")[0]:
        parts = 0.3 * step["train/ce"] + 0.7 * step["train/soft/forward"] + 3 * step["train/relation"]
        assert step["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert step["train/relation/weight"] == 3.0 and step["train/relation/grad_norm"] > 0
        assert step["train/grad_norm"] <= sum(step[f"train/{k}/grad_norm"] for k in ("ce", "soft/forward", "relation"))
    assert train(distill(world, "one", steps=3, term_norms_every=1)) == 0
    for step in metrics(world / "one")[0]:
        assert step["train/soft/forward/grad_norm"] == pytest.approx(step["train/grad_norm"], rel=1e-5)


def test_a_teacher_spread_over_ranks(world: Path) -> None:
    """2 ranks that hold half of its layers each train what one does, on their own answers too (fp64)."""
    changes = {"precision": "fp64", "steps": 6, "on_policy_frac": 0.5, "losses": [{"kind": "soft"}, {"kind": "hidden"}]}
    assert train(distill(world, "whole", **changes)) == 0
    file = distill(world, "spread", shard_teacher=True, **changes)
    port = str(free_port())
    place = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmkit.cli", "train", str(file)]
    children = [
        subprocess.Popen(command, env={**place, "RANK": r, "LOCAL_RANK": r}, stdout=subprocess.DEVNULL) for r in "01"
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    one, two = (metrics(world / name)[0] for name in ("whole", "spread"))
    for a, b in zip(one, two, strict=True):
        assert a["train/data_hash"] == b["train/data_hash"] and a["train/tokens"] == b["train/tokens"]
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-9)
    a, b = (load_file(resolve_model(world / name) / "model.safetensors") for name in ("whole", "spread"))
    for name, t in a.items():
        torch.testing.assert_close(b[name], t, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"lora": {"r": 2}, "losses": SOFT},
        {"activation_checkpointing": True},
        {"freeze": ["embed_tokens"]},
        {
            "init_from": None,
            "model": {
                "n_layers": 1,
                "n_heads": 2,
                "d_model": 16,
                "max_seq_len": 96,
                "qk_norm": True,
                "experts": {"n": 4, "n_active": 2, "d_ff": 8},
            },
        },
        {"init_from": None, "from_teacher": {"layers": 1, "d_ff": 16}},
        {"optim": {"name": "muon"}},
    ],
    ids=lambda c: next(iter(c)) if "init_from" not in c else list(c)[1],
)
def test_other_settings_run(world: Path, changes: dict[str, Any]) -> None:
    """With what the other stages allow; the loss is finite and falls."""
    name = "set-" + "-".join(changes)
    given = {"losses": [{"kind": "soft"}, {"kind": "hidden"}], "steps": 30, "optim": {"lr": 1e-2}, **changes}
    assert train(distill(world, name, **given)) == 0
    steps = metrics(world / name)[0]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]


def test_the_recipes_chunk_bounds_the_loss(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`loss_chunk` positions have logits at once, never more."""
    seen, real = [], terms.distillation_loss

    def watched(*args: Any, chunk: int, **more: Any) -> Any:
        seen.append(chunk)
        return real(*args, chunk=chunk, **more)

    monkeypatch.setattr(terms, "distillation_loss", watched)
    assert train(distill(world, "chunk", loss_chunk=3, steps=1)) == 0
    assert set(seen) == {3}


def test_the_plan_tells_of_the_teacher(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are memory too; a cache spares it."""
    assert main(["plan", str(distill(world, "plan"))]) == 0
    assert "teacher    0.02 M parameters, 0 MB in fp32; held beside" in capsys.readouterr().out
    assert main(["plan", str(distill(world, "plan", cache={}))]) == 0
    assert "not held then" in capsys.readouterr().out


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_students_folder_is_a_model_alone(world: Path) -> None:
    """No projection in it, though training state has them; transformers loads it in silence and computes the same."""
    from transformers import AutoModelForCausalLM

    assert train(distill(world, "kept", losses=[{"kind": "soft"}, {"kind": "hidden"}], steps=2)) == 0
    folder = newest_good(world / "kept")[0]
    assert folder is not None
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert not [n for n in f.keys() if "projection" in n]  # noqa: SIM118 (a file, not a dict)
    with safe_open(folder / "trainer_state" / "projections.safetensors", "pt") as f:
        assert list(f.keys()) == ["hidden%2Fmse%2F1-2.weight"]
        assert tuple(f.get_tensor("hidden%2Fmse%2F1-2.weight").shape) == (24, 16)
    with Quiet() as log:
        theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert not log.said
    ours, ids = load_model(folder), torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)


# --- other tokenizers ------------------------------------------------------------------------------------------------


def test_a_teacher_with_another_tokenizer(world: Path) -> None:
    """Soft labels are refused with the reason; sorted distributions teach what they can."""
    texts = (world / "sft.jsonl").read_text().splitlines()
    tokenizer = Tokenizer.train(texts, TokenizerConfig(kind="bpe", vocab_size=330))
    tiny_model(world / "stranger", tokenizer, seed=3, n_layers=1, d_model=24)
    with pytest.raises(UserError, match="uld"):
        refused(distill(world, "no", teacher=str(world / "stranger"), tokenizer=str(world / "base")))
    sections = {"init_from": str(world / "stranger"), "data": {"path": str(world / "sft.jsonl")}, "steps": 80}
    assert train(tiny_stage(world, "sft", "stranger-taught", optim={"lr": 1e-2}, **sections)) == 0
    file = distill(
        world, "uld", teacher=str(world / "stranger-taught"), losses=[{"kind": "uld"}], steps=40, eval={"every": 20},
        optim={"lr": 1e-2},
    )  # fmt: skip
    assert train(file) == 0
    first, *_, last = metrics(world / "uld")[1]
    assert last["valid/uld"] < 0.7 * first["valid/uld"]


# --- mistakes --------------------------------------------------------------------------------------------------------


def refused(file: Path) -> None:
    """Runs what a recipe asks for, up to the error."""
    from llmkit.stages import stage_module

    recipe = load_recipe(file)
    stage_module(recipe).run(recipe)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"losses": [], "ce_weight": 0.0}, "nothing would be learnt"),
    ({"losses": [{"kind": "soft"}, {"kind": "soft"}]}, "two terms are called 'soft/forward'"),
    ({"losses": [{"kind": "soft", "name": "ce"}]}, "'ce' is the name of another metric"),
    ({"cache": {}, "losses": [{"kind": "hidden"}]}, "cache: it holds what `soft` needs, not what hidden does"),
    ({"cache": {}, "on_policy_frac": 0.5}, "not known before training"),
    ({"cache": {}, "shard_teacher": True}, "no teacher is loaded in training"),
    ({"on_policy_frac": 0.5, "examples": "documents"}, "only conversations can be answered"),
    ({"from_teacher": {"layers": 1}}, "from_teacher builds the student, and so does init_from"),
    ({"losses": [{"kind": "soft"}, {"kind": "uld"}]}, "uld is for a teacher with another tokenizer"),
    ({"lora": {"r": 2}, "losses": [{"kind": "hidden"}]}, "projections would be trained beside adapters"),
    ({"losses": [{"kind": "hidden", "layers": [[1, 3]]}]}, "the teacher has no layer 3, its layers are 1 to 2"),
    ({"losses": [{"kind": "relation", "heads": 5}]}, "5 heads do not divide the student's values of 16"),
    ({"teacher": "nowhere"}, "nowhere: no such folder"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_mistakes_are_told_in_a_sentence(world: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace("[", r"\[").replace("|", r"\|")):
        refused(distill(world, "wrong", **changes))


def test_a_short_teacher_and_other_heads(world: Path) -> None:
    """Rows longer than the teacher's context, and attention scores of unequal numbers of heads."""
    tokenizer = Tokenizer.load(world / "base")
    tiny_model(world / "short-teacher", tokenizer, seed=0, n_layers=1, d_model=16)
    config = json.loads((world / "short-teacher" / "config.json").read_text())
    config["max_position_embeddings"] = 48
    (world / "short-teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its context is 48 tokens, the rows have 96: set batch.max_len=48"):
        refused(distill(world, "wrong", teacher=str(world / "short-teacher")))
    shape = {"n_layers": 1, "n_heads": 4, "d_model": 16, "max_seq_len": 96}
    with pytest.raises(UserError, match="the student has 4 heads, the teacher 2"):
        refused(distill(world, "wrong", init_from=None, model=shape, losses=[{"kind": "attention"}]))


def test_another_teacher_has_another_cache(world: Path) -> None:
    """The key holds the teacher's files: nothing old is ever taken for new."""
    from llmkit.distill.cache import teacher_key

    keys = [
        teacher_key([resolve_model(world / name)], "t", "fp32", world / "cache")["teacher"]
        for name in ("taught", "teacher")
    ]
    assert keys[0] != keys[1] and isinstance(ContentHashes(world / "cache"), ContentHashes)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_recipe_on_hub_models_builds_on_the_meta_device(tmp_path: Path) -> None:
    """Student and teacher of the hub's shapes, whose embeddings have other numbers of rows for one tokenizer."""
    file = Path(__file__).parents[2] / "configs/distill/7b.yaml"
    named = load_recipe(file)
    assert named.init_from is not None
    folders = {key: stand_in(getattr(named, key), tmp_path / key) for key in ("teacher", "init_from")}
    recipe = load_recipe(file, [f"{key}={folder}" for key, folder in folders.items()])
    lessons = Lessons(recipe, Ranks(), lambda: False, print)
    assert lessons.same_tokens and lessons.row_len == 2048
    assert lessons.model_config.vocab_size != lessons.teacher_config.vocab_size
    with torch.device("meta"):
        model = GPT(lessons.model_config)
        projections = Terms(recipe, lessons.model_config, lessons.teacher_config, 261, 261).projections(0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[named.init_from] and not len(projections)


@pytest.mark.parametrize("name", ["demo", "features", "on_policy"])
def test_the_demos_student_is_a_quarter(name: str) -> None:
    """Of the demo's chat model; `sft/demo_alone` is the same one on the same tokens."""
    folder = Path(__file__).parents[2] / "configs"
    recipe, alone = load_recipe(folder / f"distill/{name}.yaml"), load_recipe(folder / "sft/demo_alone.yaml")
    teacher = load_recipe(folder / "pretrain/demo.yaml").model
    assert recipe.teacher == "runs/demo/sft" and alone.model is not None and teacher is not None
    sizes = []
    for shape in (alone.model, teacher):
        with torch.device("meta"):
            model = GPT(shape.model_copy(update={"vocab_size": 2048}))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[0] <= sizes[1] / 4
    if name != "on_policy":
        assert recipe.model == alone.model and recipe.steps == alone.steps and recipe.batch == alone.batch
