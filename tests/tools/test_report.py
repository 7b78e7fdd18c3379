"""`llmkit report`: what is on the page is what was on disk, it stays small, and a person can use it without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import opened

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.storage import Draft, step_name
from llmkit.tools.report.command import build
from llmkit.tools.report.curves import curves_of, read_some, thin
from llmkit.tools.report.folders import find, names_of
from llmkit.tools.report.gather import read_table
from llmkit.tools.report.lineage import lineage
from llmkit.tools.report.rollouts import whole_characters

EVIL = "</script><script>document.title='taken'</script><img src=http://example.com/x.png>"
TABLE = "|        |  one |  two |\n|--------|-----:|-----:|\n| exact  |  0.5 | 0.75 |\n\n- greedy\n"


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


def write_run(folder: Path, stage: str, n_steps: int = 50, **recipe: Any) -> Path:
    """A run's folder with its logs, as training leaves it."""
    steps = [{"step": s, "train/loss": 2 / s, "train/data_hash": 7 * s} for s in range(1, n_steps + 1)]
    lines(folder / "metrics.jsonl", [*steps, {"step": n_steps, "valid/loss": 0.25}])
    lines(folder / "timing.jsonl", [{"step": n_steps, "tokens_per_s": 1000.0}])
    lines(folder / "samples.jsonl", [{"step": s, "prompt": "山", "text": f"text {s}"} for s in (0, n_steps)])
    answers = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "answer": f"{stage} {i % 2}", "reward": float(i % 2)}
        for i in range(30)
    ]
    lines(folder / "answers.jsonl", [{**a, "fields": {"answer": "a 1", "kind": "ab"[len(a) % 2]}} for a in answers])
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"stage": stage, "steps": n_steps, "out": str(folder), **recipe})
    )
    (folder / "environment.json").write_text('{"python": "3"}')
    (folder / "DONE").write_text("{}")
    stamp = "2026-01-31 12:00:0"
    log = [f"{stamp}0 step      1 | loss 2", f"{stamp}1 warning: {EVIL}", f"{stamp}2 step 7 was left out"]
    (folder / "train.log").write_text("\n".join(log) + "\n")
    return folder


def write_checkpoint(run: Path, step: int, **recipe: Any) -> None:
    draft = Draft(run / "checkpoints" / step_name(step), 0)
    draft.write("config.json", [b"{}"])
    draft.commit({"recipe": {"stage": "sft", **recipe}, "step": step, "data": "abc"})


def write_rollouts(folder: Path, numbers: tuple[int, ...] = (1, 11), n: int = 12) -> None:
    for number in numbers:
        tokens = [{"id": 5, "text": "\ufffd", "logprob": -0.5, "kl": 0.25 * number, "value": 0.5, "advantage": -1.0},
                  {"id": 6, "text": "\ufffd", "logprob": -0.5, "kl": 0.0, "value": 0.5, "advantage": 1.0},
                  {"id": 7, "text": "<|im_end|>"}]  # fmt: skip
        told = [{"group": i // 4, "prompt": f"p{i // 4}", "answer": "山<|im_end|>", "reward": i / 10, "parts": {"exact": 1.0},
                 "finished": i % 3 > 0, "tokens": tokens} for i in range(n)]  # fmt: skip
        lines(folder / "rollouts" / f"rollout-{number:08d}.jsonl", told)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of two stages and a comparison, beside a run that is no part of it."""
    out = tmp_path / "life"
    write_run(out / "sft", "sft")
    write_checkpoint(out / "sft", 50)
    write_run(out / "ppo", "ppo", init_from=str(out / "sft"), title=EVIL)
    write_rollouts(out / "ppo")
    write_run(out / "old", "sft")
    lines(out / "compare" / "answers-one.jsonl", [{"prompt": "q", "answer": EVIL, "reward": 1.0, "fields": {}}])
    (out / "compare" / "compare.json").write_text('{"models": [{"name": "one"}]}')
    (out / "compare" / "compare.md").write_text(TABLE)
    card = {"accuracy": 0.75, "calibration_bins": [{"confidence": 0.6, "accuracy": 0.5}], "n_pairs": 3,
            "accuracy_by_length_gap": [{"from_tokens": -3, "to_tokens": 2, "accuracy": 0.75, "n": 3}],
            "margins": {"counts": [1, 2], "edges": [-1.0, 0.0, 1.0]}}  # fmt: skip
    (out / "sft" / "reward_card.json").write_text(json.dumps(card))
    names = ["sft", "ppo", "compare", "later"]
    nodes = {n: {"does": n, "folder": str(out / n), "status": "done", "seconds": 2.5, "parents": []} for n in names[:3]}
    (out / "pipeline.json").write_text(json.dumps({"format": 1, "order": names, "nodes": nodes}))
    return out


def data_of(page: Path | str) -> dict[str, Any]:
    text = page if isinstance(page, str) else page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


def test_a_pipeline(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its nodes in their order, and nothing that only lies beside them; nothing on the page can act."""
    assert main(["report", str(pipeline)]) == 0
    page = pipeline / "report.html"
    assert capsys.readouterr().out.startswith(f"{page}: 2 runs, ")
    told = data_of(page)
    assert [run["name"] for run in told["runs"]] == ["sft", "ppo"]
    assert [node["status"] for node in told["pipelines"][0]["nodes"]] == ["done"] * 3 + [None]
    sft, ppo = told["runs"]
    assert sft["curves"]["train/loss"][1][:2] == [2, 1] and "train/data_hash" not in sft["curves"]
    assert (sft["state"], sft["step"], sft["headlines"]) == ("done", 50, {"valid/loss": 0.25})
    assert sft["samples"] == [{"prompt": "山", "texts": [[0, "text 0"], [50, "text 50"]]}]
    assert [line for _, line in sft["warnings"]] == [f"warning: {EVIL}", "step 7 was left out"]
    assert ppo["lineage"]["from"][0]["key"] == "init_from" and ppo["lineage"]["from"][0]["name"] == "sft"
    assert told["results"][0]["head"] == ["", "one", "two"] and told["results"][0]["remarks"] == ["greedy"]
    compared, evaluated = told["answers"]
    assert compared["rows"][0]["said"] == [[EVIL, 1.0]] and evaluated["names"] == ["sft", "ppo"]
    assert evaluated["rows"][1]["said"] == [["sft 1", 1.0], ["ppo 1", 1.0]] and evaluated["n"] == 30
    first = ppo["rollouts"][0]["answers"][0]
    assert first["texts"] == ["山", "", "<|im_end|>"] and first["kl"] == [0.25, 0, None]


def test_runs_and_folders_of_runs(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [p.name for p in find([str(pipeline / "old"), str(pipeline / "sft"), str(pipeline / "old")]).runs] == [
        "old",
        "sft",
    ]
    (pipeline / "pipeline.json").unlink()
    assert {p.name for p in find([str(tmp_path)]).runs} == {"sft", "ppo", "old"}
    (tmp_path / "empty").mkdir()
    for path, what in (("nowhere", "no such folder"), ("empty", "holds no run")):
        assert main(["report", str(tmp_path / path)]) == 2
        assert f"{tmp_path / path}: {what}" in capsys.readouterr().err
    assert main(["report", str(pipeline), str(pipeline / "old")]) == 2 and "--out" in capsys.readouterr().err
    assert main(["report", str(pipeline), "--out", str(tmp_path / "x.txt")]) == 2
    assert names_of([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "y"]


def test_a_page_stays_small(tmp_path: Path) -> None:
    """Whatever is too much is thinned: long logs, many rollouts; the first and last values and the peaks stay."""
    run = write_run(tmp_path / "run", "ppo", n_steps=30_000)
    write_rollouts(run, tuple(range(1, 40)), n=64)
    found = find([str(run)])
    large, small = build(found, "t"), build(found, "t", most=70_000)
    assert len(small.encode()) <= 70_000 < len(large.encode()) < 1_000_000
    for page in (large, small):
        (told,) = data_of(page)["runs"]
        curve = told["curves"]["train/loss"]
        assert curve[0][0] == 1 and curve[1][0] == 2 and curve[0][-1] > 29_990
        assert [r["number"] for r in told["rollouts"]][:: len(told["rollouts"]) - 1] == [1, 39]


def test_curves() -> None:
    points = [(i, 1.0) for i in range(10_000)]
    points[4321] = (4321, 99.0)
    thinned = thin(points, 100)
    assert len(thinned) <= 202 and (4321, 99.0) in thinned and (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert thin(points[:50], 100) == points[:50]
    told = curves_of([{"step": 1, "a": 1.0, "b": None, "c": True, "d": 3}, {"step": 2, "a": 0.1234567891}], 10)
    assert told == {"a": [[1, 2], [1, 0.123457]], "d": [[1], [3]]}


def test_long_logs_keep_their_evaluations(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines(file, [{"step": s, **({"valid/loss": 1.0} if s % 100 == 0 else {"train/loss": 1.0})} for s in range(1, 1001)])
    read = read_some(file, most=50)
    assert sum("valid/loss" in r for r in read) == 10 and 40 <= sum("train/loss" in r for r in read) <= 60
    with file.open("a") as f:
        f.write('{"step": 10')  # a writer that was killed
    assert len(read_some(file)) == 1000
    file.write_text('{"step": 1}\n{"step": 2\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: a line is not JSON"):
        read_some(file)


@pytest.mark.parametrize(
    ("texts", "answer", "expected"),
    [
        (["a", "\ufffd", "\ufffd", "b"], "a山b", ["a", "山", "", "b"]),
        (["\ufffd", "\ufffd", "，", "\ufffd"], "山，\ufffd", ["山", "", "，", "\ufffd"]),
        (["x", "\ufffd"], "something else", ["x", "\ufffd"]),
        ([], "", []),
    ],
)
def test_pieces_of_characters(texts: list[str], answer: str, expected: list[str]) -> None:
    assert whole_characters(texts, answer) == expected


def test_tables() -> None:
    assert read_table(TABLE)["rows"] == [["exact", "0.5", "0.75"]]
    assert read_table("- only a remark\n") == {"head": [], "rows": [], "remarks": ["only a remark"]}


def test_lineage_ends(tmp_path: Path) -> None:
    """Two runs that name each other don't go on for ever; what is not on this machine any more keeps its path."""
    a, b = tmp_path / "a", tmp_path / "b"
    write_run(a, "sft", init_from=str(b))
    write_run(b, "sft", init_from=str(a), teacher="/nowhere/at/all")
    assert [one["path"] for one in lineage(b)["from"]] == [str(a), "/nowhere/at/all"]  # nothing is saved yet
    write_checkpoint(a, 3, init_from=str(b))
    write_checkpoint(b, 5, init_from=str(a), **{"data.train.0.path": "x.jsonl"})
    told = lineage(a)
    assert (told["name"], told["step"], told["from"][0]["name"], told["from"][0]["step"]) == ("a", 3, "b", 5)
    assert told["from"][0]["from"][1] == {"key": "data", "path": "x.jsonl"}
    depth = 0
    while "name" in told:
        told, depth = told["from"][0], depth + 1
    assert 5 < depth < 50


def test_a_person_reads_it(pipeline: Path) -> None:
    """No request but for the page itself, no error; values by key and pointer, filters, the other language, narrow."""
    assert main(["report", str(pipeline)]) == 0
    url = f"file://{pipeline / 'report.html'}"
    with opened(url, 1400) as tab:
        page = tab.page
        assert page.title() == "life" and tab.requests == [url] and not tab.errors and not tab.too_wide()
        loss = page.locator("#curves figure", has_text="train/loss").first
        loss.locator("svg").focus()
        page.keyboard.press("ArrowLeft")
        assert "0.04" in loss.locator(".read").text_content()
        loss.locator("svg").hover(position={"x": 60, "y": 40})
        assert re.search(r"step [1-9]: ", loss.locator(".read").text_content())
        rollouts = page.locator("#rollouts")
        assert rollouts.locator(".answer").count() == 8
        rollouts.locator("input[type=number]").first.fill("1.05")
        assert rollouts.locator(".answer").count() == 1
        rollouts.locator("input[type=number]").first.fill("")
        rollouts.locator(".answer button").first.click()
        assert {*rollouts.locator(".answer").all_text_contents()} and "rollout 1 " in rollouts.inner_text()
        rollouts.locator(".tokens").first.focus()
        page.keyboard.press("ArrowRight")
        assert "山" in rollouts.locator(".read").first.text_content()
        page.locator("#answers input[type=search]").last.fill("q7")
        assert page.locator("#answers tbody").last.locator("tr").count() == 1
        page.locator("#language").click()
        assert "采样轨迹" in page.locator("#rollouts h2").text_content() and not tab.errors
    with opened(url, 400, language="zh-CN") as tab:
        assert tab.page.locator("#curves h2").text_content() == "曲线" and not tab.too_wide() and not tab.errors
