"""benchmarks/cpu.py runs at toy sizes and tells all that it should. How fast is not asked here."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

SIZES = "--hidden 64 --intermediate 96 --experts 8 --top-k 2 --layers 2 --probe-mib 8"
TOY = f"{SIZES} --rounds 2 --paths best --compiler eager --silent"
MODEL = "--tiny --prompt-tokens 6 --new-tokens 3 --model-rounds 1"

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")


def run(script: str, options: str, *files: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options.split(), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measure(options: str, *files: str | Path) -> subprocess.CompletedProcess[str]:
    """cpu.py with a clock that is counted: no call is too slow to be measured, on no machine."""
    program = (
        f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent / 'tests')!r}]\n"
        "import cpu\nfrom counted_clock import CountedClock\n"
        "raise SystemExit(cpu.main(clock=CountedClock(0.01)))"
    )
    command = [sys.executable, "-c", program, *options.split(), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run prints, and its JSON."""
    path = tmp_path_factory.mktemp("benchmark") / "made" / "cpu.json"
    done = measure(f"{TOY} --tokens 1,5 --no-end-to-end", "--output", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, path


@pytest.fixture(scope="module")
def results(finished: tuple[str, Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(finished[1].read_text("utf-8"))
    return loaded


def test_every_contender_is_measured_or_named_with_a_reason(results: dict[str, Any]) -> None:
    expected = {"pytorch", "grouped_mm", "grouped_mm_compiled"}
    native = {n for n, c in results["contenders"].items() if c["kind"] == "native"}
    assert results["contenders"].keys() == expected | native
    assert len(native) == 1 or results["unavailable"]
    assert all(results["unavailable"].values())
    for row in results["layer"]:
        assert row["ms"].keys() == results["contenders"].keys()
    assert [row["tokens"] for row in results["layer"]] == [1, 5]


def test_times_and_rates_are_positive_numbers(results: dict[str, Any]) -> None:
    floors = results["floors"]
    measured = [stats for row in results["layer"] for stats in row["ms"].values()]
    measured += [floors["read"], floors["matrix_peak"], *floors["units"].values()]
    measured += [results["alternating"]["ratio"]]
    measured += [
        stats for calls in results["overhead"]["calls"].values() for stats in calls.values()
    ]
    assert_positive(measured)


def assert_positive(measured: list[dict[str, Any]]) -> None:
    assert measured
    for stats in measured:
        assert 0 < stats["q1"] <= stats["median"] <= stats["q3"] < math.inf
        assert stats["samples"]


def test_every_result_was_compared_with_float64(results: dict[str, Any]) -> None:
    bound = results["settings"]["error_bound"]
    for contender in results["contenders"].values():
        errors = contender["relative_error"]
        assert errors.keys() == {"1", "5"}
        assert all(0 < error <= bound for error in errors.values())


def test_floors_are_those_of_the_work(results: dict[str, Any]) -> None:
    one, five = results["layer"]
    assert one["experts_hit"] == 2
    assert one["bytes"] == 2 * 3 * 64 * 96 * 17 // 32  # two experts, 17 bytes for 32 weights
    assert five["flops"] == 5 * 2 * 2 * 3 * 64 * 96  # five tokens, two experts each
    for row in (one, five):
        floor = row["floor"]
        assert floor["ms"] == max(floor["memory_ms"], floor["matrix_ms"])
        best = results["path"]["contender"]
        fraction = row["fraction_of_floor"][best]
        assert fraction == pytest.approx(floor["ms"] / row["ms"][best]["median"])


def test_the_table_shows_all_contenders_and_no_paths(
    finished: tuple[str, Path], results: dict[str, Any]
) -> None:
    out, path = finished
    for contender in results["contenders"].values():
        assert contender["label"] in out
    assert results["machine"]["cpu"] in out
    assert "the whole model was left out" in out
    for text in (out, path.read_text("utf-8")):
        assert str(BENCHMARKS.parent) not in text
        assert str(path.parent) not in text


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_results_are_drawn(
    finished: tuple[str, Path], tmp_path: Path, suffix: str, start: bytes
) -> None:
    plot = tmp_path / f"plot{suffix}"
    done = run("plot.py", "", finished[1], plot)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(start)


def test_a_whole_model_is_measured_and_drawn_beside(tmp_path: Path) -> None:
    output, plot = tmp_path / "cpu.json", tmp_path / "made" / "plot.svg"
    files: list[str | Path] = ["--output", output]
    if HAS_MATPLOTLIB:
        files += ["--plot", plot]
    done = measure(f"{TOY} {MODEL} --tokens 2 --peers grouped_mm", *files)
    assert done.returncode == 0, done.stderr
    speeds = json.loads(output.read_text("utf-8"))["end_to_end"]["tokens_per_second"]
    assert speeds.keys() == {"uncompiled", "inductor", "mxfp4"}
    assert_positive([stats for parts in speeds.values() for stats in parts.values()])
    assert 'backend="mxfp4"' in done.stdout
    assert plot.exists() == HAS_MATPLOTLIB


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of benchmarks/ can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.usefixtures("importable")
def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plot = importlib.import_module("plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plot.PlotUnavailable, match="pip install matplotlib"):
        plot.draw({}, tmp_path / "plot.png")


@pytest.mark.usefixtures("importable")
def test_a_contender_that_is_wrong_stops_the_run() -> None:
    moe, contenders, rounds = map(importlib.import_module, ("moe", "contenders", "rounds"))
    sizes = moe.Sizes(hidden=64, intermediate=96, experts=4, top_k=2)
    weights, inputs = moe.random_weights(sizes, seed=0), moe.random_inputs(sizes, 6, seed=0)
    truth = moe.exact(weights, inputs, sizes)
    (experts,) = contenders.transformers_experts(sizes, [weights])

    def check(experts: Any) -> list[Any]:
        right = contenders.Transformers("loop", sizes, [experts], "eager")
        by_tokens = {3: inputs.first(3), 6: inputs}
        return rounds.check_all([right], by_tokens, range(6), truth, lambda _: None)[0]

    assert [cell.tokens for cell in check(experts)] == [3, 6]
    experts.down_proj_bias += 0.05
    with pytest.raises(rounds.WrongResult, match=r"eager loop at T=3: relative error"):
        check(experts)


def test_figures_of_the_readme_are_those_of_a_run() -> None:
    readme = (BENCHMARKS.parent / "README.md").read_text("utf-8")
    (name,) = re.findall(r"`benchmarks/(results/\S+\.json)`", readme)
    results = json.loads((BENCHMARKS / name).read_text("utf-8"))
    best, rows = results["path"]["contender"], results["layer"]

    def row(title: str) -> list[float]:
        (line,) = re.findall(rf"^\| {title} \| (.*) \|$", readme, re.MULTILINE)
        return [float(cell) for cell in line.split(" | ")]

    assert row("tokens") == [r["tokens"] for r in rows]
    faster = [round(r["speedup_over_best_bf16"][best], 1) for r in rows]
    assert row("times faster than the best of bfloat16") == faster
    floor = [round(r["fraction_of_floor"][best], 2) for r in rows]
    assert row("part of what the machine can do at best") == floor
    speeds = results["end_to_end"]["tokens_per_second"]
    decode = [f"{speeds[name]['decode']['median']:.1f}" for name in ("mxfp4", "inductor")]
    assert f"decodes {decode[0]} tokens a second instead of {decode[1]}" in readme


def test_an_unknown_peer_is_an_error_that_names_the_known_ones() -> None:
    done = run("cpu.py", "--peers grouped")
    assert done.returncode == 2
    assert "not of grouped_mm, grouped_mm_compiled, batched_mm, loop" in done.stderr
