"""``python -m benchmarks.start`` at toy sizes, and its sums. How fast is not asked here."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import ChromiumEventLogger, dynamo_timed

from benchmarks import plot, start, start_report
from benchmarks.compile_phases import OTHER, PHASES, Spending, followed
from benchmarks.start_child import STAGES, WAYS
from mxfp4_fx.core.errors import NativeBuildError
from mxfp4_fx.core.loaded_once import LoadedOnce
from mxfp4_fx.ops import native

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
STORED = ("start-epyc-zen3", "start-whole-epyc-zen5", "start-pieces-epyc-zen5")
STORED_FULL_SIZE = ROOT / "benchmarks/results/start-full-size-epyc-2-threads.json"
TOY = "--layers 1 --new-tokens 1 --inner eager --silent"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class Seconds:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def spend(spending: Spending, clock: Seconds, *steps: str | int) -> None:
    """Let timings begin (``"+name"``) and end (``"-name"``), and seconds pass."""
    for step in steps:
        if isinstance(step, int):
            clock.now += step
        else:
            (spending.begin if step[0] == "+" else spending.end)(step[1:])


# ---- where the time goes


def test_each_moment_belongs_to_the_innermost_phase() -> None:
    spending = Spending(clock := Seconds())
    spend(spending, clock, 1, "+entire_frame_compile", 2, "+backend_compile", 4)
    spend(spending, clock, "+inductor_compile", 8, "+compile_file", 16, "-compile_file", 32)
    spend(spending, clock, "-inductor_compile", "-backend_compile", 64, "-entire_frame_compile")
    expected = {OTHER: 1, "Dynamo": 66, "AOTAutograd": 4, "Inductor": 40, "C++ compiler": 16}
    seconds, timings = spending.take()
    assert seconds == expected
    assert timings == dict.fromkeys(
        ("entire_frame_compile", "backend_compile", "inductor_compile", "compile_file"), 1
    )
    assert spending.take() == ({OTHER: 0.0}, {})


def test_a_timing_without_a_phase_belongs_to_the_one_around_it() -> None:
    spending = Spending(clock := Seconds())
    spend(spending, clock, "+GraphLowering.run", 1, "-GraphLowering.run")
    spend(spending, clock, "+inductor_compile", "+GraphLowering.run", 2, "-GraphLowering.run")
    assert spending.take()[0] == {OTHER: 1, "Inductor": 2}


def test_an_error_ends_the_timings_inside() -> None:
    spending = Spending(clock := Seconds())
    spend(spending, clock, "+entire_frame_compile", "+compile_file", 1, "-entire_frame_compile", 2)
    spend(spending, clock, "-compile_file", 4)
    assert spending.take()[0] == {"C++ compiler": 1, "Dynamo": 0, OTHER: 6}


def test_time_of_other_threads_belongs_to_the_phase_that_runs_meanwhile() -> None:
    spending = Spending(clock := Seconds())
    thread = threading.Thread(target=spend, args=(spending, clock, "+compile_file", 1))
    thread.start()
    thread.join()
    assert spending.take() == ({OTHER: 1}, {"compile_file": 1})


def test_torch_tells_its_timings_and_this_package_its_own() -> None:
    """Without it a new torch would move time from a phase to the one around it, in silence."""
    from models import hidden, mlp

    spending = Spending()
    begin = ChromiumEventLogger.log_event_start
    with followed(spending), torch.no_grad():
        torch.compile(mlp(), backend="mxfp4", options={"inner": "aot_eager"})(hidden())
    assert ChromiumEventLogger.log_event_start is begin
    timings = spending.take()[1]
    for name in ("mxfp4_fx.passes", "mxfp4_fx.fuse_moe", "mxfp4_fx.swizzle"):
        assert timings[name] >= 1
    for name in ("entire_frame_compile", "build_guards", "backend_compile"):
        assert timings[name] == 1
    assert timings["create_aot_dispatcher_function"] == 1


def test_waiting_for_native_kernels_belongs_to_their_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spending = Spending(clock := Seconds())

    def load(path: str) -> str:
        clock.now += 1
        return path

    monkeypatch.setattr(native, "libraries", LoadedOnce(load, NativeBuildError, ()))
    with followed(spending), dynamo_timed("mxfp4_fx.passes"):
        native.load("some path")
        native.load("some path")
    assert spending.take()[0] == {OTHER: 0, "passes": 0, "C++ compiler": 1}


def test_all_timings_with_a_phase_are_in_torch_or_here() -> None:
    source = "".join(
        (Path(torch.__file__).parent / file).read_text("utf-8")
        for file in (
            "_dynamo/convert_frame.py",
            "_dynamo/output_graph.py",
            "_dynamo/backends/inductor.py",
            "_functorch/aot_autograd.py",
            "_functorch/_aot_autograd/aot_autograd_result.py",
            "_inductor/async_compile.py",
            "_inductor/compile_fx.py",
            "_inductor/cpp_builder.py",
        )
    )
    for name in PHASES:
        assert name.startswith("mxfp4_fx.") or f'"{name}"' in source, name


def test_nothing_is_told_after_the_context() -> None:
    spending = Spending(Seconds())
    with followed(spending), dynamo_timed("compile_file"):
        pass
    with dynamo_timed("compile_file"):
        pass
    assert spending.take()[1] == {"compile_file": 1}


# ---- what the stages amount to


def a_start(**changes: Any) -> dict[str, Any]:
    """Stages of 1, 2, 4, 8 and 16 CPU seconds."""
    stages = [
        {
            "phase": name,
            "cpu_seconds": 2.0**at,
            "seconds": 3.0 * 2**at,
            "spent": {"Dynamo": 0.75 * 2**at, OTHER: 0.25 * 2**at},
            "timings": {"compile_file": at},
            "graphs": at,
            "memory": {"peak": 100 + at},
            "sampled_peaks": {"with_children": 200 + at} if at else {},
        }
        for at, name in enumerate(STAGES)
    ]
    return {"layers": 1, "way": "whole", "cache": "cold", "stages": stages, **changes}


def test_a_start_is_until_the_last_token_and_its_parts_are_all_of_it() -> None:
    found = start_report.summarize(a_start(), "cpu")
    assert found["first token"] == 1 + 2 + 4
    assert found["all tokens"] == 1 + 2 + 4 + 8 == sum(found["parts"].values())
    assert found["parts"]["import"] == 1
    assert found["parts"]["load"] == 2
    assert found["parts"]["Dynamo"] == 0.75 * (4 + 8)
    assert found["again"] == 16
    assert (found["graphs"], found["graphs again"], found["files"]) == (0 + 1 + 2 + 3, 4, 6)
    assert (found["peak"], found["with_children"]) == (103, 203)


def test_wall_time_is_summed_where_that_is_the_clock() -> None:
    found = start_report.summarize(a_start(), "wall")
    assert (found["first token"], found["parts"]["import"]) == (21, 3)


def test_the_table_has_a_row_for_each_start_and_says_what_is_missing(tmp_path: Path) -> None:
    results = {
        "machine": {**dict.fromkeys(("cpu", "torch", "transformers"), "some"), "threads": 2}
        | {"cores": 2, "load_average_at_start": 0.0}
        | {"fresh_memory_rate": 2e9, "untouched_memory_rate": 1e9},
        "settings": {"full_size": False, "threads": 2, "prompt_tokens": 8, "new_tokens": 13},
        "notes": ["on a busy machine"],
        "unavailable": {"llama.cpp": "llama-cpp-python is not installed"},
        "starts": [a_start(cache=cache, way=way) for cache in start.CACHES for way in WAYS[:2]],
    }
    for each in results["starts"]:
        each["summary"] = start_report.summarize(each, "cpu")
    out = start_report.text(results)
    (row,) = (ln for ln in out.splitlines() if ln.startswith('1, warm, model.compile(backend="m'))
    cells = row.removeprefix('1, warm, model.compile(backend="mxfp4")').split()
    assert cells[:3] == ["1.0", "2.0", "9.0"]
    assert cells[-6:] == ["7.0", "15.0", "16.00", "6", "6", "0.00"]
    assert "not measured: llama.cpp: llama-cpp-python is not installed" in out
    assert "note: on a busy machine" in out
    assert "one thread gets 2.0 GB/s of it here" in out
    assert "all of it was used once before, when one got 1.0 GB/s" in out
    pytest.importorskip("matplotlib")
    plot.draw(results, tmp_path / "start.svg")
    drawn = (tmp_path / "start.svg").read_text("utf-8")
    for label in ("cold caches", "warm caches", "packed, uncompiled, 1 layers", *plot.PART_COLOURS):
        assert f"<!-- {label} -->" in drawn


def test_every_part_has_a_colour() -> None:
    assert plot.PART_COLOURS.keys() == set(start_report.PARTS)


# ---- the stored run


@pytest.fixture(scope="module", params=STORED)
def stored(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = RESULTS / f"{request.param}-2-threads.json"
    assert f"]({path.relative_to(ROOT)})" in (ROOT / "README.md").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return loaded


def test_the_stored_summaries_follow_from_their_stages(stored: dict[str, Any]) -> None:
    for each in stored["starts"]:
        assert each["summary"] == start_report.summarize(each, "cpu")
        found = each["summary"]
        assert found["all tokens"] == pytest.approx(sum(found["parts"].values()), rel=0.001)


def test_figures_of_the_readme_are_those_of_the_run(stored: dict[str, Any]) -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    rows = start_report.readme_rows(stored)
    assert rows
    for row in rows:
        assert row in lines


def test_a_row_of_the_readme_has_what_was_measured() -> None:
    starts = [
        a_start(layers=layers, way=way, cache=cache)
        for way, layers, cache in (
            *(("inductor", 4, "cold"), ("pieces", 24, "warm"), ("pieces", 24, "cold")),
            ("pieces", 4, "cold"),
        )
    ]
    for each in starts:
        each["summary"] = start_report.summarize(each, "cpu")
    assert start_report.readme_rows({"starts": starts}) == [
        "| `mxfp4_fx.compile(model)`, 4 layers | 15 |  |",
        "| `mxfp4_fx.compile(model)`, 24 layers | 15 | 15 |",
        "| Inductor alone, dense, 4 layers | 15 |  |",
    ]


def test_figures_of_the_full_size_are_those_of_the_run() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"]({STORED_FULL_SIZE.relative_to(ROOT)})" in readme
    stored = json.loads(STORED_FULL_SIZE.read_text("utf-8"))
    seconds = {
        each["cache"]: each["summary"]["all tokens"]
        for each in stored["starts"]
        if each["way"] == "pieces"
    }
    rate = stored["machine"]["fresh_memory_rate"]
    assert f"one thread got {rate / 1e9:.1f} GB/s" in readme
    assert f"takes {seconds['cold']:.0f} s cold and {seconds['warm']:.0f} s warm" in readme


# ---- the program


def test_an_unknown_way_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start.main(["--ways", "whole,half"])
    assert "--ways: half is none of uncompiled, whole, pieces" in capsys.readouterr().err


def test_a_way_that_takes_too_long_is_ended_and_told(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    layers = "--layers 1,2 --ways uncompiled --limit-seconds 0.01 --silent"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert start.main([*layers.split(), "--output", str(path)]) == 0
    results = json.loads(path.read_text("utf-8"))
    assert results["starts"] == []
    why = "1 layers, uncompiled, cold: ended after 0 s; not run with more layers"
    assert results["unavailable"] == {"uncompiled": why}
    assert f"not measured: packed, uncompiled: {why}" in out.getvalue()


@pytest.mark.exhaustive
def test_a_run_tells_all_stages_of_every_way(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    ways = "uncompiled,whole,llama.cpp"
    argv = [*TOY.split(), "--ways", ways, "--output", str(path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert start.main(argv) == 0
    results = json.loads(path.read_text("utf-8"))
    measured = {each["way"] for each in results["starts"]}
    assert measured | results["unavailable"].keys() == set(ways.split(","))
    assert {"uncompiled", "whole"} <= measured
    for each in results["starts"]:
        assert [stage["phase"] for stage in each["stages"]] == list(STAGES)
        assert each["summary"] == start_report.summarize(each, "cpu")
        found = each["summary"]
        assert found["all tokens"] == pytest.approx(sum(found["parts"].values()), rel=0.01)
        compiled = each["way"] != "uncompiled"
        assert (found["graphs"] > 0) == compiled == (found["parts"]["Dynamo"] > 0)
        assert (found["parts"]["passes"] > 0) == compiled
    assert str(tmp_path) not in path.read_text("utf-8") + out.getvalue()
