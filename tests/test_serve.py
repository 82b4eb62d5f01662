"""``mxfp4_fx serve``: transformers' server answers with the compiled model's tokens."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import write_packed
from processes import wait_until
from transformers import AutoTokenizer

import mxfp4_fx
from mxfp4_fx.cli import main
from mxfp4_fx.huggingface import server

PACKAGES = all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai", "pydantic")))
PROMPT, NEW = "hello world", 4
# The command, with a compiler that is quick; it writes how many layers were compiled.
SERVER = """
import sys
import mxfp4_fx
from mxfp4_fx.huggingface.server import serve

def prepare(model):
    mxfp4_fx.compile(model, options={"inner": "eager", "strict": True})
    mxfp4_fx.warmup(model, lengths=[5])
    print("swizzled", mxfp4_fx.refresh(model), flush=True)

serve(sys.argv[1], sys.argv[2:], prepare)
"""


@pytest.mark.parametrize(
    ("option", "why"), [("--compile", "is compiled with"), ("--quantization=bnb-4bit", "in MXFP4")]
)
def test_options_that_it_refuses(capsys: Any, tmp_path: Path, option: str, why: str) -> None:
    assert main(["serve", str(tmp_path), "--lengths", "8", "--port", "1", option]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {option.partition('=')[0]}: ")
    assert why in told


def test_packages_that_it_lacks(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(tmp_path)]) == 1
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err


@pytest.mark.skipif(not PACKAGES, reason="needs transformers[serving]")
def test_another_transformers(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the server, and one whose server loads in another way."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.cli.transformers", None)
        assert main(["serve", str(tmp_path)]) == 1
    assert "the server needs a transformers with `transformers serve`" in capsys.readouterr().err
    monkeypatch.delattr("transformers.cli.serving.model_manager.ModelManager._load_model")
    assert main(["serve", str(tmp_path)]) == 1
    assert "in another way than ModelManager._load_model" in capsys.readouterr().err


@pytest.mark.skipif(not PACKAGES, reason="needs transformers[serving]")
@pytest.mark.parametrize(("asked", "revision"), [("org/name@v@1", "1"), ("a/b@main", "main")])
def test_how_it_loads(asked: str, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the server's own settings; afterwards transformers loads as before."""
    from transformers.cli.serving.model_manager import ModelManager

    before, found, whole = ModelManager._load_model, [], torch.nn.Dropout()
    settings = SimpleNamespace(dtype="auto", device="cuda:1", attn_implementation="eager")

    def from_pretrained(path: str, **given: Any) -> torch.nn.Module:
        found.append((path, given))
        return whole

    def app(argv: list[str], **given: Any) -> None:
        found.append((argv, given))
        assert ModelManager._load_model(settings, asked) is whole
        raise KeyboardInterrupt

    prepared: list[bool] = []
    monkeypatch.setattr(server, "from_pretrained", from_pretrained)
    monkeypatch.setattr("transformers.cli.transformers.app", app)
    with pytest.raises(KeyboardInterrupt):
        server.serve("path", ["--port", "1"], lambda made: prepared.append(made.training))
    assert found[0] == (["serve", "path", "--port", "1"], {"standalone_mode": False})
    given = {"revision": revision, "dtype": "auto", "device_map": "cuda:1"}
    given["attn_implementation"] = "eager"
    assert found[1:] == [(asked.rpartition("@")[0], given)]
    assert prepared == [False]
    assert ModelManager._load_model is before


def test_only_it_takes_options_that_are_not_its_own(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--port", "1"])
    assert "unrecognized arguments: --port 1" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.skipif(not PACKAGES, reason="needs transformers[serving]")
def test_a_request_over_http(tmp_path: Path) -> None:
    checkpoint = write_packed(tmp_path / "packed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-c", SERVER, str(checkpoint), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_until(
            lambda: server.poll() is not None or "Uvicorn running" in log.read_text(), "the server"
        )
        assert server.poll() is None, log.read_text()
        body = {"model": str(checkpoint), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            text = json.load(answer)["choices"][0]["text"]
    finally:
        server.kill()
        server.wait()
    assert "swizzled 4" in log.read_text()  # two weights of two layers

    plain = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = plain.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(new, skip_special_tokens=True)
