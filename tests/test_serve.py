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
from typing import Any

import pytest
import torch
from checkpoints import write_packed
from processes import wait_until
from transformers import AutoTokenizer

import mxfp4_fx
from mxfp4_fx.cli import main

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
