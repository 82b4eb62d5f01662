"""benchmarks/full_size.py runs at toy sizes and its sums hold. How fast is not asked here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mxfp4_fx.checkpoints.random_weights import CheckpointShape, checkpoint_bytes

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOY = "--tiny --layers 2 --vocab 512 --prompt-tokens 6 --new-tokens 3 --uncompiled-tokens 1"
MEASURE = "--rounds 2 --probe-mib 8 --inner eager --silent"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(options: str, *files: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "full_size.py"), *options.split(), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full_size") / "checkpoint"


@pytest.fixture(scope="module")
def finished(checkpoint: Path) -> tuple[str, Path]:
    """What a run prints, and its JSON."""
    path = checkpoint.parent / "made" / "full-size.json"
    done = run(f"{TOY} {MEASURE}", "--checkpoint", checkpoint, "--output", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, path


@pytest.fixture(scope="module")
def results(finished: tuple[str, Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(finished[1].read_text("utf-8"))
    return loaded


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, imported from benchmarks/ and forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import full_size

    yield full_size
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_every_process_tells_its_phases(results: dict[str, Any]) -> None:
    told = {name: [p["phase"] for p in run["phases"]] for name, run in results["runs"].items()}
    compiling = ["import", "load", "first forward", "first generate", "decode"]
    assert told == {
        "baseline": compiling,
        "compiled": [*compiling, "measure"],
        "uncompiled": ["import", "load", "generate"],
    }


def test_peaks_are_no_less_than_what_is_there_at_the_end(results: dict[str, Any]) -> None:
    for run in results["runs"].values():
        for phase in run["phases"]:
            memory = phase["memory"]
            assert 0 < phase["seconds"] < math.inf
            # The kernel counts the parts by themselves, some pages later than the whole.
            parts = memory["anonymous"] + memory["mapped"]
            assert memory["resident"] == pytest.approx(parts, abs=1 << 20)
            assert memory["resident"] <= memory["peak"]
            assert 0 <= phase["checkpoint_mapped"] <= memory["mapped"]


def test_graphs_are_compiled_before_measuring(results: dict[str, Any]) -> None:
    graphs = {p["phase"]: p["graphs"] for p in results["runs"]["compiled"]["phases"]}
    assert graphs["first forward"] == 1
    assert graphs["first generate"] >= 1
    assert graphs["decode"] == graphs["measure"] == 0
    assert results["summary"]["graphs"] == sum(graphs.values())
    assert not any(p["graphs"] for p in results["runs"]["uncompiled"]["phases"])


def test_the_peak_is_the_sum_of_its_parts(results: dict[str, Any]) -> None:
    peak = results["summary"]["peak"]
    parts = ("baseline", "experts", "other_tensors", "more")
    assert peak["bytes"] == sum(peak[part] for part in parts)
    (phase,) = (p for p in results["runs"]["compiled"]["phases"] if p["phase"] == peak["phase"])
    assert peak["bytes"] == phase["memory"]["peak"]
    assert peak["more_in_layers"] == peak["more"] / results["bytes"]["layer"]


def test_the_floor_is_that_of_the_bytes(results: dict[str, Any]) -> None:
    expert = 3 * 64 * 96 * 17 // 32 + 2 * (2 * 96 + 64)  # blocks and scales, biases
    attention = 2 * (64 * (64 + 2 * 32) + 64 + 2 * 32 + 64 * 64 + 64 + 4)  # q, k, v; o; sinks
    router = 2 * (8 * 64 + 8)
    norms = 2 * 2 * 64
    last = 2 * 64 + 2 * 512 * 64  # the last norm and the head
    per_token = 2 * (4 * expert + attention + router + norms) + last + 2 * 64  # and an embedding
    assert results["bytes"]["per_token"] == per_token
    assert results["bytes"]["per_token_experts"] == 2 * 4 * expert
    floor = results["summary"]["floor"]
    assert floor["decode"] == pytest.approx(floor["read_rate"]["median"] / per_token)
    reached = results["summary"]["tokens_per_second"]["decode"]["median"] / floor["decode"]
    assert floor["reached"] == pytest.approx(reached)


def test_compiled_logits_are_the_uncompiled_ones(results: dict[str, Any]) -> None:
    assert 0 <= results["logits"]["relative_difference"] <= results["logits"]["bound"]


def test_the_tables_show_all_phases_and_no_paths(
    finished: tuple[str, Path], results: dict[str, Any]
) -> None:
    out, path = finished
    for name, run in results["runs"].items():
        assert all(f"{name}: {phase['phase']} " in out for phase in run["phases"])
    assert "at most one layer's experts" in out or "MORE THAN one layer's experts" in out
    for text in (out, path.read_text("utf-8")):
        assert str(BENCHMARKS.parent) not in text
        assert str(path.parent.parent) not in text


def test_more_memory_than_the_limit_is_an_error(
    finished: tuple[str, Path], checkpoint: Path
) -> None:
    done = run(f"{MEASURE} --limit-gib 0.1", "--checkpoint", checkpoint)
    assert done.returncode == 1
    assert "baseline: 0." in done.stderr
    assert "--limit-gib allows 0.10" in done.stderr


def test_a_disk_without_room_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    done = run("--layers 20000 --silent", "--checkpoint", path)
    assert done.returncode == 1
    assert "make room there" in done.stderr
    assert not path.exists()


def test_bytes_are_those_of_the_20b_model(full_size: ModuleType) -> None:
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
    found = full_size.model_bytes(config)
    assert found["checkpoint"] == checkpoint_bytes(shape) == 13761264768
    assert found["layer"] == 32 * 3 * 2880 * 2880 * 17 // 32
    weights = 24 * 32 * 3 * 2880 * 2880
    assert found["bfloat16"] - found["checkpoint"] == 2 * weights - weights * 17 // 32


def test_figures_of_the_readme_are_those_of_the_run() -> None:
    root = BENCHMARKS.parent
    readme = (root / "README.md").read_text("utf-8")
    name = "benchmarks/results/full-size-epyc-zen4-2-threads.json"
    assert f"]({name})" in readme
    results = json.loads((root / name).read_text("utf-8"))
    found, sizes = results["summary"], results["bytes"]
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
