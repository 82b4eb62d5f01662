"""``python -m benchmarks.gpu`` without a GPU tells all that it should.

Most runs take the plain PyTorch kernels, which are a hundred times faster than Triton's interpreter
and as right: what is tested is the benchmark. One run takes Triton's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_clock import CountedClock

from mxfp4_fx.ops import tiles

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter, which is off beside a GPU", allow_module_level=True)

from benchmarks import contenders, gpu, gpu_compile, gpu_tune, openai, plot
from benchmarks.contenders import Ours, Transformers
from benchmarks.moe import Problem
from benchmarks.sizes import Sizes

ROOT = Path(__file__).parent.parent
H, N, A = 64, 32, 2  # hidden, intermediate, experts a token
TOY = f"--quick --device cpu --hidden {H} --intermediate {N} --top-k {A} --compiler eager --silent"
ONE = "--experts 2 --tokens 1"

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


class Done:
    """What a run returned, printed and wrote."""

    def __init__(self, status: int, out: str, errors: str, path: Path) -> None:
        self.status, self.out, self.errors, self.path = status, out, errors, path

    @property
    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
        return loaded


def run(options: str, folder: Path, *files: str, clock: CountedClock | None = None) -> Done:
    """The benchmark with a clock that counts its time instead of measuring it."""
    path = folder / "made" / "gpu.json"
    argv = [*TOY.split(), *options.split(), "--output", str(path), *files]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = gpu.main(argv, clock=clock or CountedClock(0.001))
    return Done(status, out.getvalue(), errors.getvalue(), path)


PLAIN = "--layout row_major"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are the plain PyTorch kernels; runs take ``PLAIN``."""
    monkeypatch.setattr(gpu, "KERNELS", "pytorch")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--plot", str(folder / "gpu.svg")] if HAS_MATPLOTLIB else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "KERNELS", "pytorch")
        done = run(f"{PLAIN} --experts 2,3 --tokens 1,2 --seed 7", folder, *files)
    assert done.status == 0, done.errors
    return done


@pytest.fixture(scope="module")
def results(finished: Done) -> dict[str, Any]:
    return finished.data


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of Triton's kernels, for the layout that the backend chooses."""
    done = run(f"{ONE} --layers 1 --peers ,", tmp_path_factory.mktemp("interpreted"))
    assert done.status == 0, done.errors
    return done.data


def test_everyone_is_measured_or_named_with_a_reason(results: dict[str, Any]) -> None:
    assert results["complete"]
    assert results["stopped"] is None
    assert [(row["experts"], row["tokens"]) for row in results["rows"]] == [
        *((2, 1), (2, 2), (3, 1), (3, 2))
    ]
    everyone = {"ours", "ours_again", "grouped_mm", "batched_mm"}
    assert results["contenders"].keys() == everyone
    for contender in results["contenders"].values():
        assert all(count >= 2 for count in contender["layers"].values())
    for row in results["rows"]:
        assert row["ms"].keys() == row["uncaptured_ms"].keys() == everyone
        assert row["parts_ms"].keys() == {"router", "routing", "gate_up", "down"}
        assert row["tiles"]["regime"] == "decode"
        assert not any(row["captured"].values())
    assert results["unavailable"] == {f"triton_kernels, {e} experts": "needs a GPU" for e in (2, 3)}


def test_tritons_kernels_are_measured(interpreted: dict[str, Any]) -> None:
    assert interpreted["complete"]
    assert interpreted["settings"]["layout"] == "wgmma_fragments"
    assert interpreted["contenders"]["ours"]["label"] == "mxfp4_fx wgmma_fragments"
    (row,) = interpreted["rows"]
    assert row["ms"].keys() == {"ours", "ours_again"}
    assert row["parts_ms"].keys() == {"router", "routing", "gate_up", "down"}
    check_errors(interpreted)
    check_positive(interpreted)


def test_times_and_rates_are_positive_numbers(results: dict[str, Any]) -> None:
    check_positive(results)


def check_positive(results: dict[str, Any]) -> None:
    measured = list(results["floors"].values())
    for row in results["rows"]:
        for part in ("ms", "uncaptured_ms", "parts_ms"):
            measured += row[part].values()
    assert results["floors"].keys() == {"copy", "matmul"}
    for stats in measured:
        assert 0 < stats["q1"] <= stats["median"] <= stats["q3"] < math.inf
        assert stats["samples"]


def test_every_result_was_compared_with_float64(results: dict[str, Any]) -> None:
    check_errors(results)


def check_errors(results: dict[str, Any]) -> None:
    bound = results["settings"]["error_bound"]
    assert bound == 16 * 2**-9
    for row in results["rows"]:
        assert row["relative_error"].keys() == row["ms"].keys()
        assert all(0 < error <= bound for error in row["relative_error"].values())


def test_floors_are_those_of_the_work_and_measured_twice(results: dict[str, Any]) -> None:
    assert all(len(stats["samples"]) == 2 for stats in results["floors"].values())
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
    finished: Done, results: dict[str, Any]
) -> None:
    head, *lines = finished.out.strip().splitlines()[-len(results["rows"]) - 1 :]
    for column in ("floor", "ours", "grouped_mm", "batched_mm", "x floor", "noise", "x bf16"):
        assert column in head
    for row, line in zip(results["rows"], lines, strict=True):
        cells = line.split()
        floor, ms = row["floor"], row["ms"]
        assert cells[:3] == [str(row[k]) for k in ("experts", "tokens", "experts_hit")]
        assert cells[3:5] == [f"{1e3 * floor['ms']:.1f}", floor["by"]]
        shown = [f"{1e3 * ms[n]['median']:.1f}" for n in ("ours", "grouped_mm", "batched_mm")]
        assert cells[5:8] == shown
        assert cells[8:10] == [f"{row['times_floor']:.2f}", f"{row['noise']:.1%}"]
        assert cells[-1] == f"{row['speedup_over_best']['bf16']:.2f}"
    assert "not available: triton_kernels, 2 experts: needs a GPU" in finished.out
    for text in (finished.out, finished.path.read_text("utf-8")):
        assert str(ROOT) not in text
        assert str(finished.path.parent) not in text


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_results_are_drawn_with_a_panel_for_each_number_of_experts(
    finished: Done, results: dict[str, Any], tmp_path: Path
) -> None:
    drawn = (finished.path.parent.parent / "gpu.svg").read_text("utf-8")
    labels = [each["label"] for each in results["contenders"].values()]
    for text in ("2 experts", "3 experts", "floor: memory or multiplying", *labels):
        assert f"<!-- {text} -->" in drawn
    assert "incomplete" not in drawn
    plot.draw({**results, "complete": False}, tmp_path / "cut.svg")
    assert "incomplete run" in (tmp_path / "cut.svg").read_text("utf-8")


def change(monkeypatch: pytest.MonkeyPatch, how: str, when: Any) -> None:
    """Change results of this project's second matmul: "wrong", "nan" or "unsteady"."""
    down, calls = Ours.down, itertools.count(1)

    def changed(ours: Ours, *args: Any) -> torch.Tensor:
        y = down(ours, *args)
        call = next(calls)
        if not when(call):
            return y
        if how == "wrong":
            return y + 0.2
        if how == "nan":
            y[-1, -1] = math.nan
        if how == "unsteady":
            y[0, 0] += 2**-5 * (call % 2)
        return y

    monkeypatch.setattr(Ours, "down", changed)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("how", "when", "message"),
    [
        ("wrong", lambda call: True, "relative error"),
        ("nan", lambda call: True, "relative error inf"),
        ("unsteady", lambda call: True, "two runs differ"),
        # Right when it is checked, wrong when it is timed.
        ("wrong", lambda call: call > 2, "replayed: relative error"),
    ],
    ids=["wrong", "nan", "unsteady", "replayed"],
)
def test_a_contender_that_is_wrong_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, when: Any, message: str
) -> None:
    change(monkeypatch, how, when)
    done = run(f"{PLAIN} {ONE}", tmp_path)
    assert done.status == 1
    assert "mxfp4_fx row_major at E=2, T=1" in done.errors
    assert message in done.errors
    assert not done.data["complete"]
    assert message in done.data["stopped"]
    assert done.data["floors"]
    assert not any(row["ms"] for row in done.data["rows"])


@pytest.mark.usefixtures("plain")
def test_a_wrong_peer_is_left_out_only_if_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zeros = torch.zeros(1, H, dtype=torch.bfloat16)
    monkeypatch.setattr(Transformers, "run", lambda *_: zeros)
    options = f"{PLAIN} {ONE} --peers grouped_mm"
    done = run(f"{options} --drop-wrong", tmp_path)
    assert done.status == 0, done.errors
    assert done.data["rows"][0]["ms"].keys() == {"ours", "ours_again"}
    reason = done.data["skipped"][0]["reason"]
    assert "bf16 grouped_mm (eager) at E=2, T=1: relative error" in reason
    done = run(options, tmp_path)
    assert done.status == 1
    assert "wrong result: bf16 grouped_mm (eager) at E=2" in done.errors


@pytest.mark.usefixtures("plain")
def test_a_peer_that_fails_is_named_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise ValueError("not today\nand why")

    monkeypatch.setattr(Transformers, "run", fail)
    done = run(f"{PLAIN} {ONE} --peers grouped_mm", tmp_path)
    assert done.status == 0, done.errors
    assert done.data["complete"]
    assert done.data["skipped"][0]["reason"] == "ValueError: not today"
    line = "not measured: bf16 grouped_mm (eager), 2 experts, T = 1: ValueError: not today"
    assert line in done.out


@pytest.mark.usefixtures("plain")
def test_an_interrupted_run_leaves_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "made" / "gpu.json"
    measure = gpu.measure
    left: list[dict[str, Any]] = []

    def interrupted(contender: Any, tokens: int, *rest: Any) -> Any:
        if tokens > 1:  # what a kill would leave, which nothing can clean up after
            left.append(json.loads(path.read_text("utf-8")))
            raise KeyboardInterrupt
        return measure(contender, tokens, *rest)

    monkeypatch.setattr(gpu, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(f"{PLAIN} --experts 2 --tokens 1,2", tmp_path)
    left.append(json.loads(path.read_text("utf-8")))
    for data in left:
        assert not data["complete"]
        assert data["stopped"] == "interrupted"
        assert data["rows"][0]["ms"]["ours"]["median"] > 0
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.usefixtures("plain")
def test_when_the_time_is_up_the_rest_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure, clock = gpu.measure, CountedClock(0.001)

    def slow(*args: Any) -> Any:
        found = measure(*args)
        clock.now += 60
        return found

    monkeypatch.setattr(gpu, "measure", slow)
    options = f"{PLAIN} --experts 2 --tokens 1,2 --seconds 60"
    done = run(options, tmp_path, clock=clock)
    assert done.status == 0, done.errors
    left = done.data
    assert [list(row["ms"]) for row in left["rows"]] == [["ours"], []]
    assert {skip["reason"] for skip in left["skipped"]} == {"the time was up"}
    assert [(skip["contender"], skip["tokens"]) for skip in left["skipped"]] == [
        ("ours", 2),
        *itertools.product(("ours_again", "triton_kernels", "grouped_mm", "batched_mm"), (1, 2)),
    ]


# ---- tuning


def tune(folder: Path, clock: CountedClock | None = None) -> dict[str, Any]:
    """The table that tuning writes."""
    options = f"{PLAIN} {ONE} --tune --tune-seconds 0 --table-folder {folder}"
    done = run(options, folder, clock=clock)
    assert "decode: 16 x" in done.out
    document: dict[str, Any] = json.loads((folder / "interpreter.json").read_text("utf-8"))
    return document


@pytest.mark.usefixtures("plain")
def test_tuning_writes_a_table_that_the_package_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in tiles.FOLDER.iterdir()}
    clock, both = CountedClock(0.001), gpu_tune.Tuner.run

    def slower(tuner: Any, *args: Any) -> torch.Tensor:
        """The entry's own tile is made slow, so that another must win."""
        if tiles._forced[-1] == tuner.entry:
            clock.now += 0.5
        return both(tuner, *args)

    monkeypatch.setattr(gpu_tune.Tuner, "run", slower)
    document = tune(tmp_path, clock)
    assert {path: path.read_bytes() for path in tiles.FOLDER.iterdir()} == before
    assert document["target"] == "interpreter"
    entries = [tiles.Tile(**entry) for entry in document["tiles"]]
    old = tiles.table(tiles.table_name("interpreter", "row_major"))
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


@pytest.mark.usefixtures("plain")
def test_tuning_counts_what_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tiles.table(tiles.table_name("interpreter", "row_major"))[0]
    change(
        monkeypatch, "wrong", lambda _: tiles._forced and tiles._forced[-1].block_n > own.block_n
    )
    shapes = ((2 * own.block_n, 1, 4, 3, 1), (own.block_n, 1, 4, 2, 1))
    monkeypatch.setattr(gpu_tune, "SEEDS", shapes)
    document = tune(tmp_path)
    assert document["measured"]["entries"][0]["rejected"]["wrong"] == 1
    assert document["tiles"][0]["block_n"] == own.block_n


@pytest.mark.exhaustive
def test_tuning_runs_tritons_kernels(tmp_path: Path) -> None:
    done = run(f"{ONE} --layers 1 --tune --tune-seconds 0 --table-folder {tmp_path}", tmp_path)
    assert done.status == 0
    document = json.loads((tmp_path / "interpreter.json").read_text("utf-8"))
    assert document["measured"]["entries"][0]["candidates"] >= 2
    assert [tiles.Tile(**entry).regime for entry in document["tiles"]] == [
        entry.regime for entry in tiles.table("sm_90")
    ]


@pytest.mark.exhaustive
def test_the_command_that_contributing_shows(tmp_path: Path) -> None:
    options = "--quick --device cpu --compiler eager"
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"TRITON_INTERPRET=1 python -m benchmarks.gpu {options}\n" in contributing
    output = tmp_path / "gpu.json"
    with contextlib.redirect_stdout(io.StringIO()):
        argv = [*options.split(), "--output", str(output), "--silent"]
        assert gpu.main(argv, clock=CountedClock(0.001)) == 0
    data = json.loads(output.read_text("utf-8"))
    assert data["complete"]
    assert len(data["rows"]) == 4
    assert all(len(row["ms"]) == 4 for row in data["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cpu --tune", "name a --table-folder"),
        ("--device cpu --peers ours", "not of triton_kernels, grouped_mm, batched_mm"),
        ("", "there is no CUDA GPU"),
    ],
)
def test_what_cannot_be_run_is_an_error_with_the_remedy(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(options.split())
    assert message in capsys.readouterr().err


def test_on_a_cpu_the_interpreter_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


# ---- its parts


@pytest.mark.exhaustive
def test_workers_compile_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    sizes, tile = Sizes(H, N, 2, A), tiles.table("sm_90")[0]
    jobs = [
        gpu_compile.Job(tile, sizes, "wgmma_fragments"),
        gpu_compile.Job(None, sizes, tokens=1),
        gpu_compile.Job(dataclasses.replace(tile, block_n=7), sizes, "wgmma_fragments"),
    ]
    with gpu_compile.start_pool(1, "sm_90", ("cuda", 90, 32)) as pool:
        assert list(pool.map(gpu_compile.compile_job, jobs)) == ["", "", "CompilationError"]


def test_a_forced_tile_is_fitted_and_forgotten_afterwards() -> None:
    own = tiles.choose("sm_90", "wgmma_fragments", 8, 4, 128)
    tile = tiles.Tile("x", 0, 0, 32, 64, 320, 3, 4, 2)
    with tiles.forced(tile):
        found = tiles.choose("sm_90", "wgmma_fragments", 8, 4, 128)
        assert found == tiles.fit(tile, "wgmma_fragments", 128)
        assert (found.block_m, found.block_k, found.splits) == (32, 128, 1)
    assert tiles.choose("sm_90", "wgmma_fragments", 8, 4, 128) == own


def test_poisoned_memory_holds_no_numbers_until_it_is_written() -> None:
    like = torch.zeros(3)
    with contenders.poisoned(True):
        assert like.new_empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_result_that_was_never_written_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written may hold an older, right result: a check poisons it."""
    sizes = Sizes(H, N, 2, A)
    problem = Problem.random(sizes, 1, torch.device("cpu"), 0, has_router=True)
    name = ("o", "ours", "o")
    options = {"kernels": "pytorch", "layout": "row_major"}
    ours = Ours(problem, [problem.weights(0)], *name, **options)
    contenders.check(ours, problem.inputs(1))
    right = ours.run(0, problem.inputs(1))

    def forgets_to_write(*_: Any) -> torch.Tensor:
        """What was right before, unless the memory that it lies in was poisoned since."""
        y = torch.empty_like(right)
        return torch.where(y.isnan(), y, right)

    monkeypatch.setattr(Ours, "down", forgets_to_write)
    with pytest.raises(contenders.WrongResult, match="relative error inf"):
        contenders.check(ours, problem.inputs(1))


def test_triton_kernels_is_not_to_be_had_on_a_cpu() -> None:
    with pytest.raises(contenders.Unavailable, match="needs a GPU"):
        openai.load(None, torch.device("cpu"))
    with pytest.raises(contenders.Unavailable, match="not installed, neither alone nor in vllm"):
        openai.load(None, torch.device("cuda"))


def test_no_choice_of_experts_hangs_on_rounding() -> None:
    sizes, cpu = Sizes(64, 32, 16, 4), torch.device("cpu")
    problem = Problem.random(sizes, 500, cpu, 3, has_router=True)
    assert problem.router is not None
    rounded = torch.nn.functional.linear(problem.hidden, *problem.router)
    chosen = [logits.topk(4, dim=-1).indices.sort().values for logits in (problem.logits, rounded)]
    assert torch.equal(*chosen)
    other = Problem.random(sizes, 500, cpu, 4, has_router=True)
    assert not torch.equal(problem.hidden, other.hidden)
    assert problem.weights(1).down.scales.unique().numel() > 3
    first, again = problem.weights(0), problem.weights(0)
    assert torch.equal(first.gate_up.blocks, again.gate_up.blocks)
    assert not torch.equal(first.down.blocks, problem.weights(1).down.blocks)


def test_candidates_are_distinct_and_sensible() -> None:
    ks = (2880, 2880)
    for entry in tiles.table("sm_90"):
        for made in (
            gpu_tune.seeds(entry, "wgmma_fragments", ks),
            gpu_tune.neighbours(entry, "wgmma_fragments", ks),
        ):
            assert len(made) == len(set(made)) > 3
            for tile in made:
                assert tile.block_n >= 16 * tile.warps
                assert (tile.rows, tile.rows_per_expert) == (entry.rows, entry.rows_per_expert)
