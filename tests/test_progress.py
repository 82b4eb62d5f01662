"""Work that takes seconds on a whole model shows on a terminal how far it is."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_packed
from models import compile_with, hidden, mlp

import mxfp4_fx

fcntl, termios = (pytest.importorskip(name) for name in ("fcntl", "termios"))


def shown(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> str:
    """What the work writes to a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(ours, "rb", buffering=0) as screen, open(theirs, "w") as terminal:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            work()
        terminal.write("the end")
        terminal.flush()
        text = b""
        while b"the end" not in text:
            text += screen.read(10_000)
    return text.decode()


@pytest.mark.exhaustive
def test_dequantizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mxfp4_fx.from_pretrained(write_packed(tmp_path / "packed"))
    told = shown(monkeypatch, lambda: mxfp4_fx.dequantize(model))
    assert "dequantizing experts:   0%" in told


@pytest.mark.usefixtures("no_gradients")
def test_restoring(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlp()
    compile_with(module, options={"free_weights": True})(hidden())
    assert "restoring expert weights:   0%" in shown(monkeypatch, lambda: mxfp4_fx.restore(module))
    assert shown(monkeypatch, lambda: mxfp4_fx.restore(module)) == "the end"  # nothing is freed
