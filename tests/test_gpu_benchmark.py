"""benchmarks/gpu.py runs in Triton's interpreter and tells all that it should."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mxfp4_fx.ops import tiles

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
H, N, A = 64, 32, 2  # hidden, intermediate, experts a token
TOY = f"--quick --device cpu --hidden {H} --intermediate {N} --top-k {A} --compiler eager --silent"

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, whose interpreter it runs in"
)
pytestmark = needs_triton


def run(options: str, *files: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The benchmark in a process of its own, which counts its time instead of measuring it.

    ``before`` is Python that changes it first.
    """
    program = (
        f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent / 'tests')!r}]\n"
        "import gpu, gpu_contenders, gpu_measure\nfrom counted_clock import CountedClock\n"
        f"clock = CountedClock(0.001)\n{before}\nraise SystemExit(gpu.main(clock=clock))"
    )
    command = [sys.executable, "-c", program, *TOY.split(), *options.split(), *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run prints, and its JSON."""
    path = tmp_path_factory.mktemp("benchmark") / "made" / "gpu.json"
    files: list[str | Path] = ["--output", path]
    if HAS_MATPLOTLIB:
        files += ["--plot", path.with_suffix(".svg")]
    done = run("--experts 2,3 --tokens 1,2 --seed 7", *files)
    assert done.returncode == 0, done.stderr
    return done.stdout, path


@pytest.fixture(scope="module")
def results(finished: tuple[str, Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(finished[1].read_text("utf-8"))
    return loaded


def test_everyone_is_measured_or_named_with_a_reason(results: dict[str, Any]) -> None:
    assert results["complete"]
    assert results["stopped"] is None
    assert [(row["experts"], row["tokens"]) for row in results["rows"]] == [
        *((2, 1), (2, 2), (3, 1), (3, 2))
    ]
    everyone = {"ours", "ours_again", "grouped_mm", "batched_mm"}
    assert results["contenders"].keys() == everyone
    for row in results["rows"]:
        assert row["ms"].keys() == row["uncaptured_ms"].keys() == everyone
        assert row["parts_ms"].keys() == {"router", "routing", "gate_up", "down"}
        assert row["tiles"]["regime"] == "decode"
    assert results["unavailable"] == {f"triton_kernels, {e} experts": "needs a GPU" for e in (2, 3)}
    assert results["settings"]["layout"] == "wgmma_fragments"


def test_times_and_rates_are_positive_numbers(results: dict[str, Any]) -> None:
    measured = list(results["floors"].values())
    for row in results["rows"]:
        for part in ("ms", "uncaptured_ms", "parts_ms"):
            measured += row[part].values()
    assert len(results["floors"]) == 2
    for stats in measured:
        assert 0 < stats["q1"] <= stats["median"] <= stats["q3"] < math.inf
        assert stats["samples"]


def test_every_result_was_compared_with_float64(results: dict[str, Any]) -> None:
    bound = results["settings"]["error_bound"]
    assert bound < 0.04
    for row in results["rows"]:
        assert row["relative_error"].keys() == row["ms"].keys()
        assert all(0 < error <= bound for error in row["relative_error"].values())


def test_floors_are_those_of_the_work(results: dict[str, Any]) -> None:
    copy, matmul = (results["floors"][name]["median"] for name in ("copy", "matmul"))
    for row in results["rows"]:
        t, e, hit = row["tokens"], row["experts"], row["experts_hit"]
        assert A <= hit <= min(e, t * A)
        expert = 3 * H * N * 17 // 32 + 2 * (2 * N + H)  # 17 bytes for 32 weights, biases
        activations = 2 * (t * H + 2 * t * A * N + t * H)  # read, between: written and read, result
        assert row["bytes"] == hit * expert + 2 * e * (H + 1) + activations
        assert row["flops"] == 2 * t * A * 3 * H * N + 2 * t * H * e
        floor = row["floor"]
        assert floor["memory_ms"] == pytest.approx(1e3 * row["bytes"] / copy)
        assert floor["matrix_ms"] == pytest.approx(1e3 * row["flops"] / matmul)
        assert floor["ms"] == max(floor["memory_ms"], floor["matrix_ms"])
        ours = row["ms"]["ours"]["median"]
        assert row["times_floor"] == pytest.approx(ours / floor["ms"])
        best = min(row["ms"][name]["median"] for name in ("grouped_mm", "batched_mm"))
        assert row["speedup_over_best"] == {"bf16": pytest.approx(best / ours)}
        again = row["ms"]["ours_again"]["median"]
        assert row["noise"] == pytest.approx(abs(again / ours - 1))


def test_the_table_comes_last_and_nothing_names_the_machine(
    finished: tuple[str, Path], results: dict[str, Any]
) -> None:
    out, path = finished
    table = out.strip().splitlines()[-len(results["rows"]) - 1 :]
    head, *lines = table
    for column in ("floor", "ours", "grouped_mm", "batched_mm", "x floor", "noise", "x bf16"):
        assert column in head
    for row, line in zip(results["rows"], lines, strict=True):
        assert line.split()[:3] == [str(row[k]) for k in ("experts", "tokens", "experts_hit")]
        assert f"{1e3 * row['ms']['ours']['median']:.1f}" in line
    assert "not available: triton_kernels, 2 experts: needs a GPU" in out
    for text in (out, path.read_text("utf-8")):
        assert str(BENCHMARKS.parent) not in text
        assert str(path.parent) not in text


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_results_are_drawn_with_a_panel_for_each_number_of_experts(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    drawn = finished[1].with_suffix(".svg").read_text("utf-8")
    assert "<!-- 2 experts -->" in drawn
    assert "<!-- 3 experts -->" in drawn
    plot = tmp_path / "plot.png"
    command = [sys.executable, str(BENCHMARKS / "gpu_plot.py"), str(finished[1]), str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


def changed(what: str, condition: str = "True") -> str:
    """Python that changes the results of this project's second matmul."""
    return f"""
down = gpu_contenders.Ours.down
def change(ours, layer, inner, routes):
    y = down(ours, layer, inner, routes)
    if {condition}:
        {what}
    return y
gpu_contenders.Ours.down = change
"""


@pytest.mark.parametrize(
    ("what", "condition", "message"),
    [
        ("y += 0.2", "True", "relative error"),
        ("y[-1, -1] = float('nan')", "True", "relative error inf"),
        ("y[0, 0] += calls.append(0) or 2**-5 * (len(calls) % 2)", "True", "two runs differ"),
        # Right when it is checked, wrong when it is timed.
        ("y += 0.2", "calls.append(0) or len(calls) > 2", "replayed: relative error"),
    ],
    ids=["wrong", "nan", "unsteady", "replayed"],
)
def test_a_contender_that_is_wrong_stops_the_run(
    tmp_path: Path, what: str, condition: str, message: str
) -> None:
    path = tmp_path / "gpu.json"
    before = "calls = []" + changed(what, condition)
    done = run("--experts 2 --tokens 1", "--output", path, before=before)
    assert done.returncode == 1, done.stderr
    assert "mxfp4_fx wgmma_fragments at E=2, T=1" in done.stderr
    assert message in done.stderr
    left = json.loads(path.read_text("utf-8"))
    assert not left["complete"]
    assert message in left["stopped"]
    assert left["floors"]
    assert not any(row["ms"] for row in left["rows"])


WRONG_PEER = """
run = gpu_contenders.Bf16.run
gpu_contenders.Bf16.run = lambda *args: run(*args) + 0.2
"""


def test_a_wrong_peer_is_left_out_only_if_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    options = "--experts 2 --tokens 1 --peers grouped_mm"
    done = run(f"{options} --drop-wrong", "--output", path, before=WRONG_PEER)
    assert done.returncode == 0, done.stderr
    left = json.loads(path.read_text("utf-8"))
    assert left["rows"][0]["ms"].keys() == {"ours", "ours_again"}
    assert "bf16 grouped_mm (eager) at E=2, T=1: relative error" in left["skipped"][0]["reason"]
    done = run(options, "--output", path, before=WRONG_PEER)
    assert done.returncode == 1
    assert "wrong result: bf16 grouped_mm (eager) at E=2" in done.stderr


def test_a_peer_that_fails_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    before = """
def fail(*_):
    raise ValueError("not today\\nand why")
gpu_contenders.Bf16.run = fail
"""
    done = run("--experts 2 --tokens 1 --peers grouped_mm", "--output", path, before=before)
    assert done.returncode == 0, done.stderr
    left = json.loads(path.read_text("utf-8"))
    assert left["complete"]
    assert left["skipped"][0]["reason"] == "ValueError: not today"
    assert "not measured: grouped_mm, 2 experts, T = 1: ValueError: not today" in done.stdout


def test_an_interrupted_run_leaves_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    before = """
measure = gpu.measure
def interrupted(contender, problem, tokens, *rest):
    if tokens > 1:
        raise KeyboardInterrupt
    return measure(contender, problem, tokens, *rest)
gpu.measure = interrupted
"""
    done = run("--experts 2 --tokens 1,2", "--output", path, before=before)
    assert done.returncode != 0
    left = json.loads(path.read_text("utf-8"))
    assert not left["complete"]
    assert left["stopped"] == "interrupted"
    assert left["rows"][0]["ms"]["ours"]["median"] > 0


def test_when_the_time_is_up_the_rest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    before = """
measure = gpu.measure
def slow(*args):
    found = measure(*args)
    clock.now += 60
    return found
gpu.measure = slow
"""
    done = run("--experts 2 --tokens 1,2 --seconds 60", "--output", path, before=before)
    assert done.returncode == 0, done.stderr
    left = json.loads(path.read_text("utf-8"))
    assert [list(row["ms"]) for row in left["rows"]] == [["ours"], []]
    assert {skip["reason"] for skip in left["skipped"]} == {"the time was up"}
    assert [(skip["contender"], skip["tokens"]) for skip in left["skipped"]] == [
        ("ours", 2),
        *itertools.product(("ours_again", "triton_kernels", "grouped_mm", "batched_mm"), (1, 2)),
    ]


# ---- tuning


def test_tuning_writes_a_table_that_the_package_reads(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tiles.FOLDER.iterdir()}
    # The entry's own tile is made slow, so that another must win.
    slow = """
import gpu_tune
run = gpu_tune.Tuner.run
def slower(tuner, *args):
    if gpu_tune.tiles._forced[-1] == tuner.entry:
        clock.now += 0.5
    return run(tuner, *args)
gpu_tune.Tuner.run = slower
"""
    options = "--tune --tune-seconds 0 --experts 2 --tokens 1"
    done = run(options, "--table-folder", tmp_path, before=slow)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in tiles.FOLDER.iterdir()} == before
    document = json.loads((tmp_path / "interpreter.json").read_text("utf-8"))
    entries = [tiles.Tile(**entry) for entry in document["tiles"]]
    old = tiles.table("sm_90")
    assert [e.regime for e in entries] == [e.regime for e in old]
    assert [(e.rows, e.rows_per_expert) for e in entries] == [
        (e.rows, e.rows_per_expert) for e in old
    ]
    assert entries[0] != old[0]
    assert entries[1:] == list(old[1:])
    facts = document["measured"]["entries"][0]
    assert facts["candidates"] >= 2
    (times,) = facts["microseconds"]
    assert (times["experts"], times["tokens"]) == (2, 1)
    assert 0 < times["after"] < times["before"]
    assert document["measured"]["machine"]["triton"]
    assert "decode: 16 x" in done.stdout


def test_tuning_counts_what_cannot_be_used(tmp_path: Path) -> None:
    before = (
        "import gpu_tune\n"
        "from mxfp4_fx.ops import tiles\n"
        "own = tiles.table('sm_90')[0]\n"
        "calls = []"
        + changed("y += 0.2", "tiles._forced and tiles._forced[-1].block_n > own.block_n")
    )
    options = "--tune --tune-seconds 0 --experts 2 --tokens 1"
    before += "\ngpu_tune.SEEDS = ((128, 1, 4, 3, 1), (64, 1, 4, 2, 1))"
    done = run(options, "--table-folder", tmp_path, before=before)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "interpreter.json").read_text("utf-8"))
    assert document["measured"]["entries"][0]["rejected"]["wrong"] == 1
    assert document["tiles"][0]["block_n"] == 64


def test_what_is_tuned_in_the_interpreter_does_not_reach_the_package() -> None:
    done = run("--tune")
    assert done.returncode == 2
    assert "name a --table-folder" in done.stderr


def test_a_forced_tile_is_fitted_and_forgotten_afterwards() -> None:
    own = tiles.choose("sm_90", "wgmma_fragments", 8, 4, 128)
    tile = tiles.Tile("x", 0, 0, 32, 64, 320, 3, 4, 2)
    with tiles.forced(tile):
        found = tiles.choose("sm_90", "wgmma_fragments", 8, 4, 128)
        assert found == tiles.fit(tile, "wgmma_fragments", 128)
        assert (found.block_m, found.block_k, found.splits) == (32, 128, 1)
    assert tiles.choose("sm_90", "wgmma_fragments", 8, 4, 128) == own


# ---- parts, in this process


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of benchmarks/ can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.usefixtures("importable")
def test_poisoned_memory_holds_no_numbers_until_it_is_written() -> None:
    measure = importlib.import_module("gpu_measure")
    like = torch.zeros(3)
    with measure.poisoned(True):
        assert like.new_empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("importable")
def test_no_choice_of_experts_hangs_on_rounding() -> None:
    layer, moe = map(importlib.import_module, ("gpu_layer", "moe"))
    sizes = moe.Sizes(64, 32, 16, 4)
    problem = layer.Problem.random(sizes, 500, torch.device("cpu"), 3)
    rounded = torch.nn.functional.linear(problem.hidden, *problem.router)
    chosen = [logits.topk(4, dim=-1).indices.sort().values for logits in (problem.logits, rounded)]
    assert torch.equal(*chosen)
    other = layer.Problem.random(sizes, 500, torch.device("cpu"), 4)
    assert not torch.equal(problem.hidden, other.hidden)
    assert problem.weights(1).down.scales.unique().numel() > 3
    first, again = problem.weights(0), problem.weights(0)
    assert torch.equal(first.gate_up.blocks, again.gate_up.blocks)
    assert not torch.equal(first.down.blocks, problem.weights(1).down.blocks)


@pytest.mark.usefixtures("importable")
def test_candidates_are_distinct_and_sensible() -> None:
    tune = importlib.import_module("gpu_tune")
    ks = (2880, 2880)
    for entry in tiles.table("sm_90"):
        for made in (
            tune.seeds(entry, "wgmma_fragments", ks),
            tune.neighbours(entry, "wgmma_fragments", ks),
        ):
            assert len(made) == len(set(made)) > 3
            for tile in made:
                assert tile.block_n >= 16 * tile.warps
                assert (tile.rows, tile.rows_per_expert) == (entry.rows, entry.rows_per_expert)
