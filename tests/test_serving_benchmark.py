"""``python -m benchmarks.serving`` for seconds, and what it says of memory and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_packed

from benchmarks import serving, serving_child


def sample(part: str, memory: int, calls: int, graphs: int) -> dict[str, Any]:
    own = {"anonymous": memory, "resident": memory}
    counts = {"calls": calls, "graphs": graphs, "swizzles": 4}
    return {"part": part, "phase": f"{calls} {part}", "seconds": 1.0, "memory": own, **counts}


def test_each_part_is_judged_by_itself() -> None:
    samples = [sample("requests", 1000, n, 8) for n in range(8)]
    samples += [sample("models", 1000 + 5 * n, n, 8 + n) for n in range(8)]
    samples += [sample("peers", 1000 + n, n, 8) for n in range(8)]
    requests, models, peers = serving.judge(samples)
    assert (requests["part"], requests["flat"], requests["graphs"]) == ("requests", True, 8)
    assert (models["part"], models["flat"], models["growth"]) == ("models", False, 20)
    assert models["new"]["graphs"] == 4
    assert (models["bytes_each"], peers["bytes_each"]) == (5, 1)
    text = serving.text({"samples": samples, "judgements": [requests, models, peers]})
    assert "requests: memory is flat" in text
    assert "8 graphs, at most 12 expected" in text
    assert "models: memory is NOT flat" in text


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_requests_and_models(tmp_path: Path) -> None:
    settings = {"requests": 6, "models": 2, "samples": 2, "threads": 2, "inner": "eager"}
    samples: list[dict[str, Any]] = []
    checkpoint = write_packed(tmp_path / "packed")
    serving_child.serve({**settings, "checkpoint": str(checkpoint)}, samples.append)
    phases = ["3 requests", "6 requests", "1 models", "2 models", "1 peers", "2 peers"]
    assert [one["phase"] for one in samples] == phases
    assert samples[1]["graphs"] <= serving.MOST_GRAPHS
    assert all(one["memory"]["anonymous"] > 0 for one in samples)
