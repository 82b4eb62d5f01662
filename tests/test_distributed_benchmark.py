"""``python -m benchmarks.distributed`` at toy sizes, and its sums. How fast is not asked here."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distributed, wire
from benchmarks.scaling import MEASURED

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_counts_what_other_ends_have_received() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = wire.sent_bytes()
        with socket.create_connection(server.getsockname()) as here, server.accept()[0] as there:
            here.sendall(b"x" * 70_000)
            left = 70_000
            while left:
                left -= len(there.recv(left))
            # The connection itself counts for one byte at each end.
            assert wire.sent_bytes() - before in (70_001, 70_002)


def test_expects_a_ring_in_each_layer_and_the_logits_once() -> None:
    config = {"hidden_size": 2880, "num_hidden_layers": 24, "vocab_size": 201088}
    assert wire.expected_bytes(config, 1, 10, 1) == 0
    assert wire.expected_bytes(config, 2, 10, 0) == 10 * 24 * 5760
    assert wire.expected_bytes(config, 4, 0, 3) == 3 * 201088 * 2 * 3 // 4


def rank(decode: float, sent: int, peak: int) -> list[dict[str, Any]]:
    """The phases of a rank, as its process tells them."""

    def phase(name: str, **facts: Any) -> dict[str, Any]:
        memory = {"resident": 100, "peak": peak}
        return {"phase": name, "memory": memory, "checkpoint_mapped": 7, **facts}

    speeds = [{"prefill": 9.0, "decode": each} for each in (decode, 1.0, 99.0)]
    return [
        phase("import"),
        phase("load", experts_bytes=50),
        phase("first generate", swizzles=4),
        phase("generate", tokens_per_second=speeds, swizzles=0, sent_bytes=sent),
        phase("result", expected_bytes=200, tokens=[1]),
    ]


def test_sums_up_the_slowest_and_the_largest_rank() -> None:
    found = distributed.summarize([rank(5.0, 600, 150), rank(4.0, 630, 140)], tokens=10)
    assert found == {
        "prefill": 9.0,
        "decode": 4.0,  # the median of a rank's rounds
        "sent_per_token": 21.0,
        "expected_per_token": 20.0,
        "swizzles": {"first": 4, "again": 0},
        "experts_bytes": 50,
        "mapped_bytes": 7,
        "peak_bytes": 50,
    }


@pytest.mark.exhaustive
def test_ranks_generate_what_one_process_generates(tmp_path: Path) -> None:
    output = tmp_path / "distributed.json"
    toy = "--tiny --ways one,TP --inner eager --prompt-tokens 4 --new-tokens 2 --rounds 1 --silent"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert distributed.main([*toy.split(), "--output", str(output)]) == 0
    results = json.loads(output.read_text("utf-8"))
    one, both = results["runs"]
    assert (one["ranks"], both["ranks"], len(both["phases"])) == (1, 2, 2)
    assert both["phases"][0][-1]["tokens"] == one["phases"][0][-1]["tokens"]
    assert one["sent_per_token"] == 0 < both["expected_per_token"] <= both["sent_per_token"]
    assert [run["swizzles"] for run in (one, both)] == [{"first": 2, "again": 0}] * 2
    assert one["experts_bytes"] > both["experts_bytes"] > one["experts_bytes"] / 2
    assert "not a speed-up" in out.getvalue()


# ---- the stored run


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(MEASURED.read_text("utf-8"))
    return results


def test_the_stored_run_swizzled_once_and_sent_little_more_than_the_model(
    stored: dict[str, Any],
) -> None:
    settings, layers = stored["settings"], distributed.SMALL.layers
    forwards = 1 + settings["new_tokens"]
    tokens = settings["prompt_tokens"] + settings["new_tokens"]
    for run in stored["runs"]:
        assert run["swizzles"] == {"first": 2 * layers, "again": 0}
        if run["ranks"] == 2:  # docs/scaling.md: half a kilobyte for each collective
            more = (run["sent_per_token"] - run["expected_per_token"]) * tokens
            assert 400 < more / (forwards * (layers + 1)) < 600


def test_the_stored_run_divided_the_experts(stored: dict[str, Any]) -> None:
    (whole,) = (run["experts_bytes"] for run in stored["runs"] if run["way"] == "one")
    # Blocks of I that a rank has of 12, and the bias of all experts that TP does not cut.
    for run in stored["runs"]:
        share = run["experts_bytes"] / whole
        assert 1 / run["ranks"] <= share < 1.02 / run["ranks"]
