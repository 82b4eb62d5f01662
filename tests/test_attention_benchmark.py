"""``python -m benchmarks.attention`` at toy sizes. How fast is not asked here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from counted_clock import CountedClock

from benchmarks import attention
from benchmarks.contenders import WrongResult

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks/results/attention-epyc-2-threads.json"
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


def test_figures_of_the_readme_are_those_of_a_run() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"]({STORED.relative_to(ROOT)})" in readme
    cases = {
        (case["kind"], case["queries"]): case
        for case in json.loads(STORED.read_text("utf-8"))["attention"]
    }
    for title, key in (
        ("a token behind 4096", ("token", 1)),
        ("a prompt of 1024", ("full", 1024)),
        ("a prompt of 4096", ("full", 4096)),
        ("a prompt of 4096, window of 128", ("sliding", 4096)),
    ):
        times = [cases[key]["milliseconds"][way]["median"] for way in attention.WAYS]
        assert f"| {title}, ms | {' | '.join(f'{time:.1f}' for time in times)} |" in readme
    peaks = [cases["full", 4096]["peak_bytes"][way] / 2**20 for way in attention.WAYS]
    assert f"| a prompt of 4096, MiB | {' | '.join(f'{peak:.0f}' for peak in peaks)} |" in readme


def test_a_wrong_result_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(way: str, inner: str) -> attention.Layer:
        return lambda query, key, value, mask: torch.zeros(1, query.shape[2], 64, 64)

    monkeypatch.setattr(attention, "layer", layer)
    threads = str(torch.get_num_threads())
    with pytest.raises(WrongResult, match="eager: off by 1 of the result"):
        attention.main([*TOY.split()[:-1], "--threads", threads])
