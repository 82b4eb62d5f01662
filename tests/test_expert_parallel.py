"""Packed experts that are spread over processes: each loads its own, and saving gathers them."""

from __future__ import annotations

from pathlib import Path

import expert_parallel
import pytest
import ranks
import torch
from checkpoints import read_tensors, write_packed
from expert_parallel import Loaded
from loaded import assert_same_tensors, logits

import mxfp4_fx

WORLD = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Loaded], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    saved = folder / "saved"
    found = ranks.run(expert_parallel.load_and_save, WORLD, folder, checkpoint, saved)
    return found, saved


def test_each_rank_reads_its_own_experts(loaded: tuple[list[Loaded], Path]) -> None:
    for rank, found in enumerate(loaded[0]):
        assert found.experts == [2, 2]
        read = {name: parts for name, parts in found.read.items() if ".experts." in name}
        assert len(read) == 2 * 6
        for name, parts in read.items():
            assert parts == [slice(2 * rank, 2 * rank + 2)], name


def test_its_bytes_stay_pages_of_the_files(loaded: tuple[list[Loaded], Path]) -> None:
    assert [found.unmapped for found in loaded[0]] == [[], []]


def test_every_rank_computes_the_whole_model(
    loaded: tuple[list[Loaded], Path], checkpoint: Path
) -> None:
    first, second = (found.logits for found in loaded[0])
    assert torch.equal(first, second)
    expected = logits(mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)


def test_it_is_saved_byte_for_byte(loaded: tuple[list[Loaded], Path], checkpoint: Path) -> None:
    kept = {k: v for k, v in read_tensors(checkpoint).items() if v.dtype == torch.uint8}
    saved = {k: v for k, v in read_tensors(loaded[1]).items() if v.dtype == torch.uint8}
    assert_same_tensors(saved, kept)
