"""`llmkit chat` as a user meets it: through a pipe and at a terminal; what it remembers, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.engine import Engine
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.config import TokenizerConfig
from llmkit.tools.chat import COMMANDS, SETTINGS, Chat, History, _ctrl_c_stops

ANSWERS = ("yes", "no", "ok", "好", "fine", "well")  # what the model of conftest has learnt


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str, *argv: object
) -> tuple[int, list[str], str]:
    """(exit code, lines of stdout, stderr) of a chat through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    capsys.readouterr()
    code = main(["chat", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.fixture
def session(answering: Path) -> Chat:
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=8)
    return Chat(load_model(answering), Tokenizer.load(answering), sampling, None, interactive=False)


# --- through a pipe --------------------------------------------------------------------------------------------------


def test_a_line_is_a_message(
    answering: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer a line, and nothing else on stdout; the same again with the same seed; blank lines ask nothing."""
    short = ("--max-new-tokens", 8)
    talk = "q1\n\n   \nq2\n"
    code, out, err = chat(capsys, monkeypatch, talk, answering, "--seed", 3, *short)
    assert code == 0 and len(out) == 2 and set(out) <= set(ANSWERS) and err == ""
    assert chat(capsys, monkeypatch, talk, answering, "--seed", 3, *short)[1] == out
    many = {tuple(chat(capsys, monkeypatch, talk, answering, "--seed", k, *short)[1]) for k in range(4)}
    assert len(many) > 1


def test_commands(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said is saved as `stage: sft` reads it; /quit leaves what follows unread."""
    file = tmp_path / "talk.jsonl"
    typed = (
        f"q1\n/save {file}\n/reset\nq\\\n2\n/save {file}\n/system Be brief.\n//q\n"
        f"/set temperature=0.5\n/set max-new-tokens 3\n/save {file}\n/set\n/help\n/retry\n/quit\nq9\n"
    )
    code, out, err = chat(capsys, monkeypatch, typed, answering, "--temperature", 0)
    assert code == 0 and len(out) == 4
    first, second, third = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    assert first == [{"role": "user", "content": "q1"}, {"role": "assistant", "content": out[0]}]
    assert [m["content"] for m in second] == ["q\n2", out[1]]
    assert [m["content"] for m in third] == ["Be brief.", "/q", out[2]] and third[0]["role"] == "system"
    assert "temperature          0.5" in err and "max_new_tokens       3" in err
    assert all(name in err for name in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/nonsense\n", "/nonsense: no such command: /help"),
        ("/set heat 1\n", "no such setting: max_new_tokens"),
        ("/set temperature\n", "give its value"),
        ("/set temperature hot\n", "temperature"),
        ("/set temperature -1\n", "temperature"),
        ("/set top_p 2\n", "top_p"),
        ("/retry\n", "nothing was said yet"),
        ("/save x.jsonl\n", "nothing was said yet"),
        ("/reset all\n", "takes nothing more"),
        ("q" * 200 + "\n", "the message is too long"),
        ("\udcff\n", "surrogate"),
    ],
)
def test_mistakes_end_a_pipe(
    answering: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    code, out, err = chat(capsys, monkeypatch, typed + "q1\n", answering)
    assert code == 2 and not out and said in err and "Traceback" not in err


def test_a_model_that_does_not_chat(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(answering, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["llmkit"]["stage"] = "pretrain"
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    code, _, err = chat(capsys, monkeypatch, "q1\n", base)
    assert code == 2 and "is a base model" in err and "llmkit generate" in err
    assert chat(capsys, monkeypatch, "q1\n", tmp_path / "nowhere")[0] == 2
    assert chat(capsys, monkeypatch, "q1\n", answering, "--top-p", 3)[0] == 2


def test_a_draft_changes_no_greedy_answer(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn after turn, to the end of the context and beyond; a note tells what the draft was worth."""
    talk = "".join(f"q{k}\n" for k in range(8)) + "/retry\n"
    greedy = (answering, "--temperature", 0, "--max-new-tokens", 8)
    plain = chat(capsys, monkeypatch, talk, *greedy)
    code, out, err = chat(capsys, monkeypatch, talk, *greedy, "--draft", answering)
    assert code == plain[0] == 0 and out == plain[1] and "messages are forgotten" in err
    n_taken, n_drafted = (int(word) for word in err.split("note: the model")[1].split() if word.isdigit())
    assert 0 < n_taken <= n_drafted
    assert chat(capsys, monkeypatch, "q1\n", answering, "--draft", answering, "--draft-tokens", 2)[1][0] in ANSWERS
    code, _, err = chat(capsys, monkeypatch, "q1\n", *greedy, "--draft-tokens", 2)
    assert code == 2 and "--draft-tokens is about a draft" in err
    code, _, err = chat(capsys, monkeypatch, "q1\n", *greedy, "--draft", answering, "--draft-tokens", 0)
    assert code == 2 and "draft_tokens" in err
    other = Path(shutil.copytree(answering, tmp_path / "other"))
    Tokenizer.train([], TokenizerConfig(kind="byte", special=("<|x|>",))).save(other)
    code, _, err = chat(capsys, monkeypatch, "q1\n", *greedy, "--draft", other)
    assert code == 2 and "its tokenizer is not the model's" in err


def test_an_interrupted_draft_gives_its_room_back(
    session: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends an answer of the engine's too: what is written stays, and the next answer is whole."""
    session.engine = Engine(session.model, session.tokenizer, draft=session.model)
    session.interactive = True
    with monkeypatch.context() as pressed:
        pressed.setattr("llmkit.tools.chat._ctrl_c_stops", lambda: contextlib.nullcontext(lambda: True))
        session.take("q1")
    assert session.history.turns[1]["content"] == "" and not session.engine.busy
    assert session.engine.counters.blocks_in_use == 0
    session.take("/reset")
    session.take("q1")
    assert session.history.turns[1]["content"] in ANSWERS


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_every_setting_can_be_shown_and_set(session: Chat) -> None:
    values = {"stop": '["x", "\\n"]', "logit_bias": '{"a": -5}', "seed": "3", "top_k": "2", "min_new_tokens": "1"}
    for name in SETTINGS:
        session.take(f"/set {name} {values.get(name, '1')}")
    assert session.sampling.stop == ("x", "\n") and session.sampling.logit_bias == {"a": -5.0}
    session.take("/set stop end of text")
    assert session.sampling.stop == ("end of text",)
    with pytest.raises(UserError, match="top_p"):
        session.take("/set top_p 1.5")
    assert session.sampling.top_p == 1.0


def test_the_prompt_is_the_conversation(session: Chat) -> None:
    """System message, what was said, and the new message, in the template's words."""
    tokenizer, history = session.tokenizer, History("Be brief.")
    history.add("q1", "yes")
    ids = history.prompt("q2", tokenizer, 96)
    said = [("system", "Be brief."), ("user", "q1"), ("assistant", "yes"), ("user", "q2")]
    messages = [{"role": r, "content": c} for r, c in said]
    assert ids == tokenizer.encode_chat(messages, add_generation_prompt=True).ids
    assert history.messages() == messages[:3] and history.n_forgotten == 0


def test_a_full_context_forgets_the_oldest(
    session: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchange by exchange, aloud, never the system message; /save and the history still have all of it."""
    session.history.system = "S"
    for k in range(12):
        session.take(f"q{k}")
    history, context = session.history, session.model.config.max_seq_len
    assert len(history.turns) == 24 and 0 < history.n_forgotten < 24 and history.n_forgotten % 2 == 0
    assert len(history.messages()) == 25
    err = capsys.readouterr().err
    assert err.count("messages are forgotten") == 1 and f"the context of {context} tokens" in err
    ids = history.prompt("q", session.tokenizer, context - 8)
    text = session.tokenizer.decode(ids, skip_special=False)
    assert "S" in text and "q0" not in text and "q11" in text


def test_another_answer(session: Chat) -> None:
    """/retry draws anew, and takes the place of the answer it replaces."""
    session.take("/set temperature 1")
    session.take("q1")
    answers = set()
    for _ in range(12):
        session.take("/retry")
        assert len(session.history.turns) == 2 and session.history.turns[0]["content"] == "q1"
        answers.add(session.history.turns[1]["content"])
    assert len(answers) > 1
    session.take("/set max_new_tokens 40")
    before = list(session.history.turns)
    session.history.system = "s" * 100
    with pytest.raises(UserError, match="too long"):
        session.take("/retry")
    assert session.history.turns == before


def test_an_answer_that_is_cut_off_says_so(session: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    session.take("/set max_new_tokens 1")
    session.take("q1")
    assert "the answer is cut off: max_new_tokens is 1" in capsys.readouterr().err


# --- at a terminal ---------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_an_answer(session: Chat) -> None:
    """The first one: what is written so far stays, and is part of the conversation. A second one interrupts."""
    session.interactive = True
    session.take('/set logit_bias {"x": 100}')
    session.take("/set max_new_tokens 60")
    written: list[str] = []

    class Stopping(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            if text and "".join(written) == "xxx":
                os.kill(os.getpid(), signal.SIGINT)
            return len(text)

    before = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(Stopping()):
        session.take("q1")
    assert 3 <= "".join(written).count("x") < 10 and "".join(written).endswith("x\n")
    assert session.history.turns[-1]["content"] + "\n" == "".join(written)
    with pytest.raises(KeyboardInterrupt), _ctrl_c_stops() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A process whose streams are a terminal of its own."""

    def __init__(self, *argv: str):
        self.fd, inner = pty.openpty()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        # What runs the tests may ignore Ctrl-C, and a child would inherit that.
        begin = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
        command = [sys.executable, "-c", f"{begin}; from llmkit.cli import main; sys.exit(main(sys.argv[1:]))", *argv]
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=env, start_new_session=True, close_fds=True
        )
        os.close(inner)
        self.seen = ""

    def until(self, text: str, seconds: float = 90) -> str:
        """What is written up to and with a text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


def test_at_a_terminal(answering: Path) -> None:
    """A prompt, an answer, a mistake that ends nothing, Ctrl-D."""
    terminal = Terminal("chat", str(answering), "--temperature", "0")
    try:
        terminal.until("> ")
        terminal.type("q1\n")
        told = terminal.until("> ")
        assert any(answer in told for answer in ANSWERS)
        terminal.type("/nonsense\n")
        assert "error: /nonsense: no such command" in terminal.until("> ")
        terminal.process.send_signal(signal.SIGINT)
        assert "Ctrl-D ends the chat" in terminal.until("> ")
        terminal.type("q\\\n")
        terminal.until("... ")
        terminal.type("2\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
        os.close(terminal.fd)
