"""``python -m benchmarks.attention`` at toy sizes. How fast is not asked here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from counted_clock import CountedClock

from benchmarks import attention
from benchmarks.contenders import WrongResult

TOY = "--tokens 24 --context 24 --rounds 2 --inner eager --silent --output"


def test_all_ways_are_measured_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, threads = tmp_path / "attention.json", str(torch.get_num_threads())
    argv = [*TOY.split(), str(output), "--threads", threads]
    assert attention.main(argv, clock=CountedClock(0.001)) == 0
    cases = json.loads(output.read_text("utf-8"))["attention"]
    assert [(case["kind"], case["queries"]) for case in cases] == [
        ("token", 1),
        ("full", 24),
        ("sliding", 24),
    ]
    for case in cases:
        assert list(case["milliseconds"]) == [*attention.WAYS]
        assert set(case["ratio"]["ours"]["samples"]) == {1.0}
    assert "token, 1 queries, 24 keys: eager " in capsys.readouterr().out


def test_a_wrong_result_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(way: str, inner: str) -> attention.Layer:
        return lambda query, key, value, mask: torch.zeros(1, query.shape[2], 64, 64)

    monkeypatch.setattr(attention, "layer", layer)
    threads = str(torch.get_num_threads())
    with pytest.raises(WrongResult, match="eager: off by 1 of the result"):
        attention.main([*TOY.split()[:-1], "--threads", threads])
