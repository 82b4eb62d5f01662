"""The ranks of ``python -m benchmarks.soak`` for seconds, and what it says of memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import soaking
from checkpoints import write_packed

from benchmarks import soak


def sample(memory: int, graphs: int = 6, calls: int = 0) -> dict[str, Any]:
    own = {"anonymous": memory, "resident": memory}
    return {"rank": 0, "memory": own, "graphs": graphs, "swizzles": 4, "calls": calls}


def test_memory_that_grows_until_all_is_compiled_is_flat() -> None:
    found = soak.judge([sample(50 * n, n) for n in (1, 2)] + [sample(100, 6, n) for n in range(6)])
    assert found["flat"]
    assert found["growth"] == 0
    assert found["new"] == {"graphs": 0, "swizzles": 0, "calls": 4}


def test_memory_that_grows_a_little_with_each_call_is_not_flat() -> None:
    samples = [sample(1000 + 5 * n, calls=n) for n in range(8)]
    judged = soak.judge(samples)
    assert judged["growth"] == 20
    assert not judged["flat"]
    assert "rank 0: memory is NOT flat" in soak.text(
        {"samples": [[{"seconds": 1, "tokens": 1, **samples[0]}]], "judgements": [judged]}
    )


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_ranks_generate_for_seconds(tmp_path: Path) -> None:
    checkpoint = write_packed(tmp_path / "packed")
    args = soak.parse(["--minutes", "0", "--every", "0", "--least-calls", "4", "--inner", "eager"])
    first, second = ranks.run(soaking.soak_here, 2, tmp_path / "ranks", vars(args), checkpoint)
    assert [one["calls"] for one in first] == [1, 2, 3, 4]
    for one, other in zip(first, second, strict=True):
        assert (one["calls"], one["tokens"]) == (other["calls"], other["tokens"])
        assert one["swizzles"] == other["swizzles"] == 4  # two layers, each swizzled once
        assert one["memory"]["anonymous"] > 0
    samples = [first, second]
    shown = soak.text({"samples": samples, "judgements": [soak.judge(rank) for rank in samples]})
    assert "rank 1: memory is " in shown
