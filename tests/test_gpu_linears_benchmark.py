"""``python -m benchmarks.gpu_linears`` without a GPU, at toy sizes. How fast is not asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_clock import CountedClock
from implementations import DEVICE

pytest.importorskip("triton")

from benchmarks import device_ops, gpu_linears
from benchmarks.contenders import WrongResult

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
TOY = "--device cpu --rows 1,3 --shapes 40+8x64"

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU its times would count")


def run(output: Path, *more: str) -> None:
    argv = [*TOY.split(), "--silent", "--output", str(output), *more]
    assert gpu_linears.main(argv, clock=CountedClock(0.001)) == 0


def test_every_way_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = CONTRIBUTING.read_text("utf-8")
    assert f"TRITON_INTERPRET=1 python -m benchmarks.gpu_linears {TOY}\n" in commands
    output = tmp_path / "linears.json"
    run(output)
    results = json.loads(output.read_text("utf-8"))
    assert results["complete"]
    assert [(row["shape"], row["rows"]) for row in results["linears"]] == [
        ("40+8x64", 1),
        ("40+8x64", 3),
    ]
    for row in results["linears"]:
        assert row["milliseconds"].keys() == {
            *("bf16", "mxfp8"),
            *("bf16_backward", "mxfp8_backward"),
        }
        seconds = row["milliseconds"]["mxfp8"]["median"] / 1e3
        assert row["bytes_per_second"] * seconds == pytest.approx(48 * 66)  # codes and scales
    assert "40+8x64   1: " in capsys.readouterr().out


def test_nothing_is_begun_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "linears.json"
    run(output, "--shapes", "8x64,16x64", "--seconds", "0.001")
    results = json.loads(output.read_text("utf-8"))
    assert not results["complete"]
    assert not results["linears"]
    assert "not begun in time: 8x64: 1, 8x64: 3, 16x64: 1, 16x64: 3" in capsys.readouterr().out


def test_each_number_of_rows_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, measure = tmp_path / "linears.json", gpu_linears._time
    left: list[int] = []

    def noted(name: str, *args: Any) -> dict[str, Any]:
        if name == "bf16" and output.exists():
            left.append(len(json.loads(output.read_text("utf-8"))["linears"]))
        return measure(name, *args)

    monkeypatch.setattr(gpu_linears, "_time", noted)
    run(output)
    assert left == [1]


def test_a_wrong_result_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = device_ops.linears_mxfp8

    def off(*args: object) -> list[torch.Tensor]:
        return [1.05 * y for y in linears(*args)]

    monkeypatch.setattr(device_ops, "linears_mxfp8", off)
    with pytest.raises(WrongResult, match=r"mxfp8: off by 0\.05"):
        run(tmp_path / "linears.json")
