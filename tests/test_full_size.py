"""``python -m benchmarks.full_size`` at toy sizes, and its sums. How fast is not asked here."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import end_to_end, full_size, full_size_report, model_bytes, process_memory
from benchmarks.timing import summary
from mxfp4_fx.checkpoints.random_weights import (
    CheckpointShape,
    checkpoint_bytes,
    write_random_checkpoint,
)

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks/results/full-size-epyc-zen4-2-threads.json"
TOY = "--only memory --tiny --layers 1 --vocab 512 --prompt-tokens 6 --new-tokens 1"
MEASURE = "--uncompiled-tokens 1 --rounds 2 --probe-mib 8 --inner eager --silent"
COMPILING = ["import", "load", "first forward", "first generate", "decode"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full_size") / "checkpoint"
    shape = dataclasses.replace(end_to_end.TINY, vocab=512)
    write_random_checkpoint(path, shape, progress=False)
    return path


def settings(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Of a measured process."""
    return {
        "checkpoint": str(checkpoint),
        "cores": full_size.choose_cores(2),
        "threads": 2,
        "prompt_tokens": 6,
        "new_tokens": 1,
        "inner": "eager",
        "probe_mib": 8,
        "compile": True,
        "rounds": 2,
        "logits": str(checkpoint.parent / "logits.pt"),
        **changes,
    }


@pytest.fixture(scope="module")
def phases(checkpoint: Path) -> list[dict[str, Any]]:
    """What a process tells that compiles a model."""
    return full_size.run("compiled", settings(checkpoint), 22 << 30, lambda _: None)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(STORED.read_text("utf-8"))
    return loaded


# ---- a measured process


@pytest.mark.exhaustive
def test_a_process_tells_its_phases(phases: list[dict[str, Any]], checkpoint: Path) -> None:
    assert [phase["phase"] for phase in phases] == [*COMPILING, "measure"]
    assert torch.load(checkpoint.parent / "logits.pt").shape == (512,)
    measured = phases[-1]
    assert len(measured["rounds"]) == len(measured["read_rates"]) == 2
    rates = [rate for turn in measured["rounds"] for rate in turn.values()]
    assert all(0 < rate < math.inf for rate in (*rates, *measured["read_rates"]))


@pytest.mark.exhaustive
def test_peaks_are_no_less_than_what_is_there_at_the_end(phases: list[dict[str, Any]]) -> None:
    check_memory(phases)
    # torch's libraries are mapped, and what it allocates is anonymous: 10 MB and more of each.
    assert phases[0]["memory"]["mapped"] > 10 << 20 < phases[0]["memory"]["anonymous"]
    assert phases[1]["checkpoint_mapped"] > 0


def check_memory(phases: list[dict[str, Any]]) -> None:
    for phase in phases:
        memory, sampled = phase["memory"], phase["sampled_peaks"]
        assert 0 < phase["seconds"] < math.inf
        assert memory["resident"] == memory["anonymous"] + memory["mapped"]
        assert memory["resident"] <= memory["peak"]
        assert 0 <= phase["checkpoint_mapped"] <= memory["mapped"]
        for name in ("anonymous", "mapped"):
            assert sampled.get(name, 0) <= sampled.get("resident", 0)


@pytest.mark.exhaustive
def test_graphs_are_compiled_before_measuring(phases: list[dict[str, Any]]) -> None:
    graphs = {phase["phase"]: phase["graphs"] for phase in phases}
    assert graphs["import"] == graphs["load"] == 0
    assert graphs["first forward"] == 2  # the two pieces that all layers share
    assert graphs["first generate"] >= 1
    assert graphs["decode"] == graphs["measure"] == 0


def test_more_memory_than_the_limit_ends_the_process(checkpoint: Path) -> None:
    with pytest.raises(full_size.ProcessFailed) as error:
        full_size.run("baseline", settings(checkpoint), 100 << 20, lambda _: None)
    assert "baseline: 0.1" in str(error.value)
    assert "of resident memory after the phases []; --limit-gib allows 0.10" in str(error.value)


def test_a_process_that_fails_is_an_error_with_its_message(checkpoint: Path) -> None:
    broken = settings(checkpoint)
    del broken["cores"]
    message = r"uncompiled: the process failed:(.|\n)*cores"
    with pytest.raises(full_size.ProcessFailed, match=message):
        full_size.run("uncompiled", broken, 22 << 30, lambda _: None)


# ---- memory


def test_the_peak_is_the_most_since_it_began_anew() -> None:
    room = 64 << 20
    process_memory.reset_peak()
    before = process_memory.memory(psutil.Process())["resident"]
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, room, private) as fresh:  # which no memory that was freed before can serve
        fresh.write(bytes(room))
    assert process_memory.peak() > before + room // 2
    peak = process_memory.peak()
    assert peak > process_memory.memory(psutil.Process())["resident"] + room // 2
    process_memory.reset_peak()
    assert process_memory.peak() < peak - room // 2


def test_mapped_bytes_are_files_and_anonymous_ones_are_not(tmp_path: Path) -> None:
    count = 8 << 20
    path = tmp_path / "some.mapped"
    path.write_bytes(bytes(count))
    process = psutil.Process()
    assert process_memory.mapped_bytes(".mapped") == 0
    before = process_memory.memory(process)
    mapped = torch.from_file(str(path), shared=True, size=count, dtype=torch.uint8)
    mapped.sum()
    assert process_memory.mapped_bytes(".mapped") == pytest.approx(count, rel=0.1)
    assert process_memory.mapped_bytes(".other") == 0
    read = process_memory.memory(process)
    assert read["mapped"] - before["mapped"] > count // 2 > read["anonymous"] - before["anonymous"]
    with mmap.mmap(-1, 8 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        room.write(bytes(8 * count))
        filled = process_memory.memory(process)
        assert filled["anonymous"] - read["anonymous"] > len(room) // 2
        assert filled["mapped"] - read["mapped"] < len(room) // 2


def test_child_processes_count() -> None:
    """A parent of few bytes has a child of many: the child is what is too much."""
    room = 64 << 20
    child = f"room = bytearray(b'x') * {room}; print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=pipe, stdout=pipe, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"  # the child is there, and so are its bytes
        watch = process_memory.Watch(process.pid, room)
        watch.sample()
        assert watch.exceeded is not None
        assert watch.exceeded > room
        assert process.wait() == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    peaks = watch.take()
    assert peaks["resident"] < room < peaks["with_children"]
    assert watch.take() == {}


# ---- what the phases amount to


def test_the_stored_summary_follows_from_its_phases(stored: dict[str, Any]) -> None:
    assert full_size_report.summarize(stored) == stored["summary"]
    check_summary(stored)


def check_summary(results: dict[str, Any]) -> None:
    found = results["summary"]
    peak = found["peak"]
    parts = ("baseline", "experts", "other_tensors", "more")
    assert peak["bytes"] == sum(peak[part] for part in parts)
    *phases, measured = results["runs"]["compiled"]["phases"]
    assert peak["bytes"] == max(phase["memory"]["peak"] for phase in phases)
    (phase,) = (p for p in phases if p["phase"] == peak["phase"])
    assert peak["bytes"] == phase["memory"]["peak"]
    assert peak["more_in_layers"] == peak["more"] / results["bytes"]["layer"]
    assert found["graphs"] == sum(phase["graphs"] for phase in phases)
    floor = found["floor"]
    assert floor["read_rate"] == summary(measured["read_rates"])
    per_token = results["bytes"]["per_token"]
    assert floor["decode"] == pytest.approx(floor["read_rate"]["median"] / per_token)
    decode = summary([turn["decode"] for turn in measured["rounds"]])
    assert found["tokens_per_second"]["decode"] == decode
    assert floor["reached"] == pytest.approx(decode["median"] / floor["decode"])


def test_the_tables_of_the_stored_run_show_its_figures(stored: dict[str, Any]) -> None:
    check_text(full_size_report.text(stored), stored)


def check_text(out: str, results: dict[str, Any]) -> None:
    def gib(nbytes: int) -> str:
        return f"{nbytes / 2**30:.2f}"

    for name, run in results["runs"].items():
        for phase in run["phases"]:
            (line,) = (ln for ln in out.splitlines() if ln.startswith(f"{name}: {phase['phase']} "))
            cells = line.removeprefix(f"{name}: {phase['phase']}").split()
            memory = phase["memory"]
            assert cells[0] == f"{phase['seconds']:.1f}"
            assert cells[3:6] == [gib(memory[part]) for part in ("anonymous", "mapped", "peak")]
    peak, found = results["summary"]["peak"], results["summary"]
    for text in (
        f"peak in {peak['phase']!r}: {gib(peak['bytes'])} GiB",
        f"{gib(peak['baseline'])} Python, torch and compiling",
        f"{gib(peak['experts'])} experts, swizzled",
        f"{gib(peak['other_tensors'])} other tensors",
        f"with child processes at most {gib(peak['with_children'])} GiB",
        f"of which {found['floor']['reached']:.2f} is reached",
    ):
        assert text in out
    claim = "at most" if peak["more"] <= results["bytes"]["layer"] else "MORE THAN"
    assert f"{gib(peak['more'])} more: {claim} one layer's experts" in out


def test_more_than_a_layer_is_said_aloud(stored: dict[str, Any]) -> None:
    peak = {**stored["summary"]["peak"], "more": stored["bytes"]["layer"] + 1}
    results = {**stored, "summary": {**stored["summary"], "peak": peak}}
    assert "more: MORE THAN one layer's experts" in full_size_report.text(results)
    assert "more: at most one layer's experts" in full_size_report.text(stored)


def test_compiled_logits_that_are_not_the_uncompiled_ones_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    moved = 0.0

    def run(name: str, settings: dict[str, Any], *_: Any) -> list[dict[str, Any]]:
        torch.save(torch.ones(8) + moved * (name == "compiled"), settings["logits"])
        return []

    monkeypatch.setattr(full_size, "run", run)
    args = full_size.parse(["--checkpoint", str(checkpoint)])
    config = full_size.read_config(checkpoint)
    _, difference = full_size.measure_all(args, config, tmp_path, lambda _: None)
    assert difference == {"relative_difference": 0.0, "bound": end_to_end.logits_bound(1)}
    moved = 1.1 * end_to_end.logits_bound(1)
    (tmp_path / "tiny").rename(tmp_path / "earlier")
    with pytest.raises(full_size.ProcessFailed, match=r"they differ by 1\.03e-01 of themselves"):
        full_size.measure_all(args, config, tmp_path, lambda _: None)


@pytest.mark.exhaustive
def test_a_whole_run_tells_all_phases_and_no_paths(tmp_path: Path) -> None:
    path = tmp_path / "made" / "full-size.json"
    files = ["--checkpoint", str(tmp_path / "checkpoint"), "--output", str(path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert full_size.main([*TOY.split(), *MEASURE.split(), *files]) == 0
    results = json.loads(path.read_text("utf-8"))
    told = {name: [p["phase"] for p in run["phases"]] for name, run in results["runs"].items()}
    assert told == {
        "baseline": COMPILING,
        "compiled": [*COMPILING, "measure"],
        "uncompiled": ["import", "load", "generate"],
    }
    assert not any(p["graphs"] for p in results["runs"]["uncompiled"]["phases"])
    assert results["write"]["seconds"] > 0
    assert 0 <= results["logits"]["relative_difference"] <= results["logits"]["bound"]
    for run in results["runs"].values():
        check_memory(run["phases"])
    check_summary(results)
    check_text(out.getvalue(), results)
    for text in (out.getvalue(), path.read_text("utf-8")):
        assert str(ROOT) not in text
        assert str(tmp_path) not in text


# ---- before anything is measured


def test_a_disk_without_room_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(SystemExit, match="make room there"):
        full_size.main(["--layers", "2000", "--silent", "--checkpoint", str(path)])
    assert not path.exists()


def test_too_little_memory_is_an_error(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(full_size, "available_bytes", lambda: 1 << 30)
    with pytest.raises(SystemExit, match="3 GiB of memory are needed, 1 are free"):
        full_size.main(["--checkpoint", str(checkpoint), "--silent"])


def test_bytes_of_a_token_are_those_that_it_reads(checkpoint: Path) -> None:
    expert = 3 * 64 * 96 * 17 // 32 + 2 * (2 * 96 + 64)  # blocks and scales, biases
    attention = 2 * (64 * (64 + 2 * 32) + 64 + 2 * 32 + 64 * 64 + 64 + 4)  # q, k, v; o; sinks
    router = 2 * (8 * 64 + 8)
    norms = 2 * 2 * 64
    last = 2 * 64 + 2 * 512 * 64  # the last norm and the head
    found = model_bytes.of_model(full_size.read_config(checkpoint))
    assert found["per_token"] == 4 * expert + attention + router + norms + last + 2 * 64
    assert found["per_token_experts"] == 4 * expert


def test_bytes_are_those_of_the_20b_model() -> None:
    shape = CheckpointShape(layers=24, vocab=201088)
    config = {
        "num_hidden_layers": shape.layers,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    found = model_bytes.of_model(config)
    assert found["checkpoint"] == checkpoint_bytes(shape) == 13761264768
    assert found["layer"] == 32 * 3 * 2880 * 2880 * 17 // 32
    weights = 24 * 32 * 3 * 2880 * 2880
    assert found["bfloat16"] - found["checkpoint"] == 2 * weights - weights * 17 // 32


def test_figures_of_the_readme_are_those_of_the_run(stored: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"]({STORED.relative_to(ROOT)})" in readme
    found, sizes = stored["summary"], stored["bytes"]
    peak, gib = found["peak"], 2**30
    for part in ("experts", "other_tensors", "baseline", "more"):
        assert f"\n| {peak[part] / gib:.2f} | " in readme
    decode = found["tokens_per_second"]["decode"]["median"]
    times = found["times_faster_than_uncompiled"]["decode"]
    for figure in (
        f"generates within\n{peak['bytes'] / gib:.1f} GiB",
        f"would be {sizes['bfloat16'] / gib:.0f} GiB",
        f"decodes {decode:.1f} tokens a second there, {times:.0f} times",
        f"and {found['floor']['reached']:.2f} of what reading",
    ):
        assert figure in readme
