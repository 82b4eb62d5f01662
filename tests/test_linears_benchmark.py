"""``python -m benchmarks.linears`` at toy sizes. How fast is not asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_clock import CountedClock

from benchmarks import linears
from benchmarks.contenders import WrongResult

ROOT = Path(__file__).parent.parent
TOY = "--rows 1,3 --shapes 64x96 --rounds 2 --dtypes float32,bfloat16 --silent --output"


def run(output: Path) -> dict[str, Any]:
    argv = [*TOY.split(), str(output), "--threads", str(torch.get_num_threads())]
    assert linears.main(argv, clock=CountedClock(0.05)) == 0
    return json.loads(output.read_text("utf-8"))


def test_all_ways_are_measured_by_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "_ROTATING", 1 << 16)
    results = run(tmp_path / "linears.json")
    assert [(one["dtype"], one["rows"]) for one in results["linears"]] == [
        *(("float32", 1), ("float32", 3)),
        *(("bfloat16", 1), ("bfloat16", 3)),
    ]
    assert results["faster_up_to"].keys() == {"float32", "bfloat16"}
    printed = capsys.readouterr().out
    assert printed.count("\nfloat32 64x96   1: ") == 2  # exact weights, then MXFP8
    for one in results["linears"]:  # a weight has 64 rows of 96 codes and 3 scales
        seconds = one["milliseconds"]["mxfp8"]["median"] / 1e3
        assert one["mxfp8"]["bytes_per_second"] * seconds == pytest.approx(64 * 99)
        assert one["mxfp8"]["times_faster"]["median"] > 0


def test_the_limit_is_that_of_the_slowest_shape() -> None:
    faster = {("a", 1): 2.0, ("a", 2): 1.5, ("a", 4): 0.5, ("b", 1): 3.0, ("b", 2): 0.9}
    results = [
        {"dtype": "float32", "shape": shape, "rows": rows, "times_faster": {"median": ratio}}
        for (shape, rows), ratio in faster.items()
    ]
    assert linears.limits(results) == {"float32": 1}


def test_figures_of_the_readme_are_those_of_a_run() -> None:
    stored = ROOT / "benchmarks/results/linears-epyc-zen3-2-threads.json"
    found = json.loads(stored.read_text("utf-8"))["linears"]
    ratios = [one["times_faster"]["median"] for one in found if one["dtype"] != "float32"]
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as fast on two threads of an" in readme
    assert (min(one["rows"] for one in found), max(one["rows"] for one in found)) == (1, 256)


@pytest.mark.parametrize(
    ("machine", "header", "dtypes"),
    [
        ("epyc-zen5", "| rows of bfloat16, times as fast |", {"bfloat16": ""}),
        (
            "epyc-zen3",
            "| rows, times as fast, AVX2 |",
            {"bfloat16": "bfloat16, ", "float32": "float32, "},
        ),
    ],
)
def test_figures_of_mxfp8_in_the_readme_are_those_of_a_run(
    machine: str, header: str, dtypes: dict[str, str]
) -> None:
    stored = ROOT / f"benchmarks/results/linears-mxfp8-{machine}-2-threads.json"
    found = json.loads(stored.read_text("utf-8"))["linears"]
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme[readme.index(header) :].splitlines()
    rows = [int(cell) for cell in table[0].strip("| ").split("|")[1:]]
    shapes = ("1024x2880", "2880x4096")
    expected = []
    for dtype, name in dtypes.items():
        for shape in shapes:
            ratios = {
                one["rows"]: one["mxfp8"]["times_faster"]["median"]
                for one in found
                if (one["dtype"], one["shape"]) == (dtype, shape)
            }
            cells = " | ".join(f"{ratios[row]:.1f}" for row in rows)
            expected.append(f"| {name}[{shape.replace('x', ', ')}] | {cells} |")
    assert table[2 : 2 + len(expected)] == expected


def test_a_wrong_result_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_ROTATING", 1 << 16)
    monkeypatch.setitem(linears.WAYS, "native", lambda x, w, b: [x @ w[0].T * 2])
    with pytest.raises(WrongResult, match="native: off by"):
        run(tmp_path / "linears.json")
