"""Packed experts that are spread over processes: each loads its own, and saving gathers them."""

from __future__ import annotations

import re
from pathlib import Path

import expert_parallel
import pytest
import ranks
import torch
from checkpoints import copied, edit_tensors, read_tensors, write_packed
from expert_parallel import Loaded
from loaded import assert_same_tensors, logits
from torch import Tensor

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


# ---- faults


Told = list[tuple[dict[str, str], list[str]]]


@pytest.fixture(scope="module")
def told(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each rank is told of the faults of the second one, and by ``explain``."""
    folder = tmp_path_factory.mktemp("faults")
    other = edit_tensors(copied(checkpoint, folder / "other"), doubled_norm)
    return ranks.run(expert_parallel.faults, WORLD, folder, checkpoint, other)


def doubled_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] *= 2


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("checkpoint", r"the checkpoint of rank {} is \w{{16}}, and of this rank \w{{16}}; give"),
        ("options", "skip of rank {} is "),
        ("versions", "the version of mxfp4_fx of rank {} is "),
    ],
)
def test_ranks_that_load_different_models(told: Told, fault: str, what: str) -> None:
    for rank, (faults, _) in enumerate(told):
        expected = f"CheckpointError: the processes load different models: {what.format(1 - rank)}"
        assert re.match(expected, faults[fault]), faults[fault]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("path", "CheckpointError: .*nowhere is no directory"),
        ("memory", "OutOfMemoryError: no room for the experts"),
        ("door", "it gave up"),  # through transformers' own from_pretrained
    ],
)
def test_a_rank_that_fails_leaves_nobody_waiting(told: Told, fault: str, reason: str) -> None:
    (first, _), (second, _) = told
    failed = "CheckpointError: rank 1 could not load its part of the model, so this rank cannot run"
    assert re.match(f"{failed}: {reason}", first[fault]), first[fault]
    assert failed not in second[fault]


def test_after_a_failure_they_can_load(told: Told) -> None:
    assert [faults["none"] for faults, _ in told] == ["nothing", "nothing"]


def test_explain_on_one_rank_says_what_to_do(told: Told) -> None:
    (_, [refusal, first]), (_, [second]) = told
    assert "is spread over ranks 0, 1, and within 0 seconds rank 1 did not call it" in refusal
    assert "call it on every rank" in refusal
    for explained in (first, second):
        assert "of 2 MoE layers rewritten, 1 graph" in explained
