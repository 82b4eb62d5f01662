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
from loaded import assert_same_tensors, dequantized, exact_logits, logits
from oracle import assert_as_accurate
from torch import Tensor

import mxfp4_fx

WORLD = 2

Loading = tuple[list[Loaded], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Loading:
    return load_in(WORLD, checkpoint, tmp_path_factory.mktemp("loaded"))


def load_in(world: int, checkpoint: Path, folder: Path) -> Loading:
    """Let `world` ranks load a checkpoint, and save it to ``saved`` and ``freed`` in a folder."""
    saved = folder / "saved", folder / "freed"
    return ranks.run(expert_parallel.load_run_and_save, world, folder, checkpoint, *saved), folder


def test_each_rank_reads_and_maps_its_own_experts(loaded: Loading) -> None:
    for rank, found in enumerate(loaded[0]):
        assert found.experts == [2, 2]
        read = {name: parts for name, parts in found.read.items() if ".experts." in name}
        assert len(read) == 2 * 6
        for name, parts in read.items():
            assert parts == [slice(2 * rank, 2 * rank + 2)], name
        assert found.unmapped == []


def test_every_rank_computes_the_whole_model(loaded: Loading, checkpoint: Path) -> None:
    check_results(loaded[0], checkpoint)


@pytest.mark.parametrize("folder", ["saved", "freed"])
def test_it_is_saved_byte_for_byte(loaded: Loading, checkpoint: Path, folder: str) -> None:
    check_saved(loaded[1] / folder, checkpoint)


def test_weights_of_every_rank_are_freed(loaded: Loading) -> None:
    assert [found.left for found in loaded[0]] == [0, 0]


@pytest.mark.exhaustive
def test_one_expert_for_each_rank(checkpoint: Path, tmp_path: Path) -> None:
    found, folder = load_in(4, checkpoint, tmp_path)
    assert [one.experts for one in found] == [[1, 1]] * 4
    check_results(found, checkpoint)
    check_saved(folder / "freed", checkpoint)


def check_results(found: list[Loaded], checkpoint: Path) -> None:
    """Compare the ranks with one another, and with one process and the exact values."""
    exact = exact_logits(dequantized(checkpoint, torch.float32))
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32)
    uncompiled, (tokens, last) = logits(model), expert_parallel.generate(model)
    for one in found:
        assert torch.equal(one.logits, found[0].logits)
        assert torch.equal(one.generated[1], found[0].generated[1])
        assert torch.equal(one.generated[0], tokens)
    assert_as_accurate(found[0].logits, uncompiled, exact)
    assert_as_accurate(found[0].generated[1][0], last[0], exact[:, -1])


def check_saved(saved: Path, checkpoint: Path) -> None:
    kept, expected = (
        {name: tensor for name, tensor in read_tensors(path).items() if "experts" in name}
        for path in (saved, checkpoint)
    )
    for name in expected:
        if name.endswith("_bias"):  # the model is float32
            expected[name] = expected[name].float()
    assert_same_tensors(kept, expected)


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
