"""`llmkit serve`: what it refuses, and a server's life from start to signal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from serving_client import ask, connect, request_bytes, tiny

from llmkit.cli import main
from llmkit.model.files import model_files
from llmkit.serving.command import listen
from llmkit.serving.config import ServingConfig
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.config import TokenizerConfig

for library in ("starlette", "uvicorn"):
    pytest.importorskip(library, reason="the extra serve is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder."""
    model, tokenizer = tiny()
    folder = tmp_path_factory.mktemp("tiny-model")
    for name, content in model_files(model.config, torch.float32, tokenizer, {"stage": "sft", "step": 1}).items():
        (folder / name).write_bytes(content)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["serve", *argv]) == 2
    return capsys.readouterr().err


def test_mistakes_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMKIT_API_KEY", raising=False)
    assert "--api-key" in refusal(capsys, str(folder), "--host", "0.0.0.0")
    assert "port" in refusal(capsys, str(folder), "--port", "70000")
    assert "max_rows" in refusal(capsys, str(folder), "--max-rows", "0")
    assert "no such folder" in refusal(capsys, str(folder / "x"))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    Tokenizer.train([], TokenizerConfig(kind="byte", special=("<|x|>",))).save(other)
    assert "its tokenizer is not the model's" in refusal(capsys, str(folder), "--draft", str(other))
    with listen("127.0.0.1", 0) as taken:
        assert "choose another --host or --port" in refusal(capsys, str(folder), "--port", str(taken.getsockname()[1]))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'llmkit[serve]'" in refusal(capsys, str(folder))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "my-host"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ValidationError, match="open to other machines"):
        ServingConfig(host=host, name="m")
    assert "sesame" not in repr(ServingConfig(host=host, name="m", api_key="sesame"))
    assert ServingConfig(host="::1", name="m").is_local and ServingConfig(host="localhost", name="m").is_local


def test_it_serves_until_a_signal_and_lets_requests_end(folder: Path) -> None:
    """The key comes from the environment; a request in flight at the signal gets its whole answer; the exit code is 0."""
    command = [
        sys.executable,
        "-m",
        "llmkit.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--name",
        "tiny",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "LLMKIT_API_KEY": "sesame", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", lines[1])
        assert found is not None and "chat model" in lines[0], lines
        server: Any = SimpleNamespace(port=int(found[1]))
        key = {"authorization": "Bearer sesame"}
        assert ask(server, "/v1/models").status == 401
        assert ask(server, "/v1/models", None, key).json["data"][0]["id"] == "tiny"
        body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "n": 4, "stream": True}
        sent = request_bytes("/v1/completions", body).replace(b"Host:", b"Authorization: Bearer sesame\r\nHost:", 1)
        with connect(server, sent) as going:
            data = going.recv(100)
            process.send_signal(signal.SIGTERM)
            while piece := going.recv(1 << 16):
                data += piece
        assert b"200 OK" in data and b"data: [DONE]" in data
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_help_needs_no_library() -> None:
    """The parser knows the command without torch, starlette and uvicorn."""
    code = "from llmkit.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
    code += "import sys; print([m for m in ('torch', 'starlette', 'uvicorn', 'pydantic') if m in sys.modules])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("[]") and time.monotonic() - began < 30
