"""`llmkit rank --serve`: people rank in a browser; what they said is on disk, survives a death, and trains a reward model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import Opened, opened
from posttraining import tiny_model

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import read_source
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.candidates import Asked
from llmkit.tools.ledger import Ledger, read_rows
from llmkit.tools.sitting import Sitting

N = 20
ANSWERS = ["好", "good answer", "worse", "aa"]
BEST_FIRST = sorted(ANSWERS, key=len, reverse=True)


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """Answers that are to be ranked."""
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"问题 {i}", "responses": [f"{a} {i}" for a in ANSWERS], "kind": "x"} for i in range(N)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@contextlib.contextmanager
def serving(answered: Path, out: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own, and where its page is."""
    argv = [sys.executable, "-m", "llmkit.cli", "rank", "--answers", str(answered), "--out", str(out), "--serve"]
    child = subprocess.Popen([*argv, "--port", "0", *more], stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert child.stderr is not None
        told = next((line for line in child.stderr if "http://" in line), "")
        found = re.search(r"http://\S+/", told)
        assert found is not None, child.wait()
        yield found[0], child
    finally:
        child.kill()
        child.communicate()


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}v1/ranking{path}", data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def shown(tab: Opened) -> list[str]:
    texts: list[str] = tab.page.locator(".card .said").all_inner_texts()
    return texts


def until(tab: Opened, holds: Callable[[], bool]) -> None:
    """Waits for the page, which lets nobody evaluate a text as a program."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, tab.page.locator("body").inner_text()
        tab.page.wait_for_timeout(5)


def rank_one(tab: Opened) -> None:
    """Puts the longest answer first and so on, with the keyboard alone, and saves."""
    page, at = tab.page, 0
    for place in range(len(ANSWERS)):
        texts = shown(tab)
        wanted = texts.index(max(texts[place:], key=len))
        for _ in range(abs(wanted - at)):
            page.keyboard.press("ArrowDown" if wanted > at else "ArrowUp")
        page.keyboard.press(str(place + 1))
        at = place if wanted != place else wanted
    done = page.locator("#count").inner_text()
    page.keyboard.press("Enter")
    until(tab, lambda: page.locator("#count").inner_text() != done and page.locator("#annotator").is_enabled())


def test_a_person_ranks_twenty_prompts(answered: Path, tmp_path: Path) -> None:
    """With the keyboard; the server is killed on the way, and started again; a second person; a reward model."""
    out = tmp_path / "pairs.jsonl"
    with serving(answered, out) as (url, child), opened(url) as tab:
        tab.page.locator("#annotator").fill("Ann 安")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector(".card")
        assert not tab.too_wide() and tab.page.locator("#prompt").inner_text() == "问题 0"
        for _ in range(8):
            rank_one(tab)
        assert {*tab.requests} <= {url, *(f"{url}v1/ranking{p}" for p in ("", "/next", "/judge"))} and not tab.errors
        child.send_signal(signal.SIGKILL)
    assert len(read_rows(out)) == 8  # all that was saved, none twice
    with serving(answered, out, "--annotator", "Ann 安") as (url, child):
        with opened(url, 400, language="zh-CN") as tab:
            tab.page.wait_for_selector(".card")
            assert tab.page.locator("#count").inner_text() == f"8 / {N}" and not tab.too_wide()
            assert tab.page.locator("#save").inner_text().startswith("保存")
            for _ in range(N - 8):
                rank_one(tab)
            assert tab.page.locator("#note").inner_text() == "这是最后一条提示。谢谢！" and not tab.errors
        for number in (1, 2):
            code, told = ask(url, "/judge", {"annotator": "Bo", "number": number, "ranking": [[1], [2], [0, 3]]})
            assert code == 200 and told["left"] == N - number
        code, told = ask(url, "/agreement")
        assert told["judged"] == {"Ann 安": N, "Bo": 2} and told["pairs"][0]["tau"] > 0.8 and told["alpha"] > 0.8
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
        assert child.returncode == 0 and "Kendall's tau 0.9" in err and f"{N + 2} rows" in err, err
    rows = read_rows(out)
    for row in rows[:N]:
        best = [row["responses"][i].rpartition(" ")[0] for i in row["ranking"]]
        assert best == BEST_FIRST and row["annotator"] == "Ann 安" and row["kind"] == "x"
    assert sum(len(row.pairs) for *_, row in read_source(SourceConfig(path=str(out)), "preference")) == N * 6 + 10
    train_on(out, tmp_path)
    card = json.loads((tmp_path / "reward" / "reward_card.json").read_text())
    assert card["n_pairs"] == N * 6 + 10 and card["accuracy"] > 0.95


def train_on(rows: Path, folder: Path) -> None:
    """The file as it is, through `stage: reward`."""
    tiny_model(folder / "base", Tokenizer.train([], TokenizerConfig(kind="byte")), seed=0, n_layers=1, d_model=32)
    recipe = {
        "stage": "reward",
        "objective": "rank",
        "init_from": str(folder / "base"),
        "out": str(folder / "reward"),
        "data": {"train": [{"path": str(rows)}], "valid": [{"path": str(rows)}], "cache_dir": str(folder / "cache")},
        "batch": {"examples_per_step": 8},
        "optim": {"lr": 1e-2},
        "steps": 40,
        "log": {"tensorboard": False, "plot": False},
    }
    (folder / "reward.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    assert main(["train", str(folder / "reward.yaml")]) == 0


def test_drag_ratings_ties_comment_undo(answered: Path, tmp_path: Path) -> None:
    """What the mouse does, and what is kept of it; a reload loses nothing."""
    out = tmp_path / "pairs.jsonl"
    with serving(answered, out, "--annotator", "Ann") as (url, _), opened(url) as tab:
        page = tab.page
        page.wait_for_selector(".card")
        before = shown(tab)
        first, last = (page.locator(".card .head b").nth(i).bounding_box() for i in (0, 3))
        page.mouse.move(last["x"] + 4, last["y"] + 4)
        page.mouse.down()
        for y in (last["y"], first["y"] + 40, first["y"] - 15):
            page.mouse.move(first["x"] + 4, y, steps=4)
        page.mouse.up()
        assert shown(tab) == [before[3], *before[:3]]
        page.locator(".card").nth(1).get_by_role("button", name="as good as").click()
        page.locator("#comment").fill("why")
        page.reload()
        page.wait_for_selector(".card")
        assert shown(tab) == [before[3], *before[:3]] and page.locator("#comment").input_value() == "why"
        page.locator("#save").click()
        until(tab, lambda: page.locator("#prompt").inner_text() == "问题 1")
        (row,) = read_rows(out)
        told = [[row["responses"][i] for i in ([g] if isinstance(g, int) else g)] for g in row["ranking"]]
        assert [sorted(g) for g in told] == [sorted([before[3], before[0]]), [before[1]], [before[2]]]
        assert row["comment"] == "why"
        texts = shown(tab)
        for i, text in enumerate(texts):
            card = page.locator(".card", has_text=text).first
            card.locator("input").fill(str(i % 2))
            card.locator("input").press("Tab")
        assert page.locator(".card.tied").count() == 2 and {*shown(tab)[:2]} == {texts[1], texts[3]}
        page.locator("#save").click()
        until(tab, lambda: page.locator("#prompt").inner_text() == "问题 2")
        row = read_rows(out)[-1]
        assert [row["scores"][row["responses"].index(text)] for text in texts] == [0, 1, 0, 1]
        page.locator("#skip").click()
        until(tab, lambda: page.locator("#prompt").inner_text() == "问题 3")
        for title in ("问题 2", "问题 1", "问题 0"):
            page.locator("#undo").click()
            until(tab, lambda title=title: page.locator("#prompt").inner_text() == title)
        assert page.locator("#comment").input_value() == "why" and shown(tab)[2:] == before[1:3]
        assert read_rows(out) == [] and not tab.errors


def test_what_is_refused(answered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rankings that are none, other sites, and other options."""
    out = tmp_path / "pairs.jsonl"
    with serving(answered, out) as (url, _):
        good = {"annotator": "Ann", "number": 1, "ranking": [[0], [1], [2], [3]]}
        for change, what in (
            ({"ranking": [[0], [1]]}, "every answer from 0 to 3 once"),
            ({"ranking": [[0, 0], [1], [2], [3]]}, "every answer"),
            ({"ranking": [[], [0, 1, 2, 3]]}, "every answer"),
            ({"ranking": [["0"]]}, "ranking"),
            ({"scores": [1.0, 2.0, 3.0, 4.0]}, "another order"),
            ({"scores": [1.0]}, "1 for 4 answers"),
            ({"number": 99}, "no prompt 99"),
            ({"annotator": " "}, "annotator"),
            ({"annotator": "x" * 99}, "annotator"),
            ({"colour": 1}, "colour"),
        ):
            code, told = ask(url, "/judge", {**good, **change})
            assert code == 400 and what in told["error"]["message"], (change, told)
        assert ask(url, "/judge", good)[0] == 200
        code, told = ask(url, "/judge", good)
        assert code == 400 and "judged prompt 1 already" in told["error"]["message"]
        assert ask(url, "/next", {"annotator": "Ann"}, **{"content-type": "text/plain"})[0] == 415
        assert ask(url, "/agreement", Host="example.com")[0] == 403
        assert ask(url, "/undo", {"annotator": "Bo"}) == (200, {"undone": None})
        assert ask(url, "/undo", {"annotator": "Ann"})[1]["undone"]["ranking"] == [0, 1, 2, 3]
    for argv, what in (
        (["--serve", "--annotator", "simulated", "--utility", "exact"], "--serve is for people"),
        (["--annotator", "Ann"], "with --serve the name"),
        (["--serve", "--host", "0.0.0.0"], "set --api-key"),
    ):
        assert main(["rank", "--answers", str(answered), "--out", str(tmp_path / "x.jsonl"), *argv]) == 2
        assert what in capsys.readouterr().err


def test_rows_of_several_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One's undo takes out her row from among the others', also when the process dies before the file is written anew."""
    out = tmp_path / "a.jsonl"
    rows = [Asked(n, f"q{n}", {}, None, f"f:{n}") for n in (1, 2, 3)]
    texts = {1: ["a", "b"], 2: ["only one"], 3: ["c", "d"]}

    def source(asked: Any) -> list[list[str]]:
        return [texts[row.number] for row in asked]

    with Ledger(out, {}) as ledger, contextlib.closing(Sitting(ledger, rows, source)) as sitting:
        sitting.judge("Ann", 1, [[1], [0]])
        sitting.judge("Bo", 1, [[0, 1]])  # nothing can be learnt from it, but it is noted
        sitting.judge("Bo", 3, [[0], [1]], [2.0, 1.0], " so ")
        asked = sitting.next("Ann")
        assert asked is not None and asked.row.number == 3 and sorted(asked.places) == [0, 1]
        assert sitting.progress("Ann") == {"total": 3, "left": 1} and sitting.next("Bo") is None
        with pytest.raises(UserError, match="judged prompt 1 already"):
            sitting.judge("Bo", 1, [[0], [1]])
        monkeypatch.setattr(Ledger, "_cut_rows", lambda self: None)
        assert sitting.undo("Ann") == {"number": 1, "ranking": [1, 0], "scores": None, "comment": None}
    assert len(read_rows(out)) == 2
    monkeypatch.undo()
    with Ledger(out, {}) as ledger, contextlib.closing(Sitting(ledger, rows, source)) as sitting:
        (row,) = read_rows(out)
        assert (row["annotator"], row["scores"], row["comment"]) == ("Bo", [2.0, 1.0], "so")
        sitting.judge("Ann", 3, [[1], [0]])
        assert [r["annotator"] for r in read_rows(out)] == ["Bo", "Ann"]
        assert sitting.undo("Bo") == {"number": 3, "ranking": [0, 1], "scores": [2.0, 1.0], "comment": "so"}
        assert [r["annotator"] for r in read_rows(out)] == ["Ann"]
        assert sitting.undo("Bo") == {"number": 1} and sitting.undo("Bo") is None
        sitting.judge("Ann", 1, [[0], [1]])  # the file is still the one that is written to
        assert [r["prompt_row"] for r in read_rows(out)] == [3, 1]
