"""Expert parallelism over a network between two hosts."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import ranks
import torch
import two_hosts
from checkpoints import write_packed
from loaded import exact_logits, logits
from oracle import assert_as_accurate

import mxfp4_fx


@pytest.mark.exhaustive
def test_two_hosts_compute_what_one_does(tmp_path: Path) -> None:
    checkpoint = write_packed(tmp_path / "packed")
    with contextlib.ExitStack() as stack:
        try:
            namespaces = stack.enter_context(two_hosts.hosts())
        except OSError as error:
            pytest.skip(f"hosts cannot be made of network namespaces here: {error}")
        found = ranks.run(two_hosts.ask, 2, tmp_path / "ranks", namespaces, checkpoint)
    shown = [addresses for addresses, _ in found]
    for mine, (address, other) in zip(shown, [(0, 1), (1, 0)], strict=True):
        assert two_hosts.ADDRESSES[address] in mine
        assert two_hosts.ADDRESSES[other] not in mine
    (_, first), (_, second) = found
    assert torch.equal(first, second)
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32)
    alone = logits(model)
    assert_as_accurate(first, alone, exact_logits(mxfp4_fx.dequantize(model)))
