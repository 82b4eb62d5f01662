"""Whole models in several processes: tokens sent to experts, FSDP, stages, and training.

Each rank's results are compared with those of one process by float64.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import ways_to_spread
from checkpoints import TINY, write_dense, write_packed
from loaded import IDS, exact_logits, logits
from oracle import assert_as_accurate
from torch import Tensor
from ways_to_spread import ALL_TO_ALL, FSDP, LAYERS, STAGES, Answer, Trained, load_dense, own_batch

from mxfp4_fx.checkpoints.random_weights import CheckpointShape

pytestmark = pytest.mark.exhaustive

WORLD = 2
WAYS = [ALL_TO_ALL, FSDP, STAGES]  # with packed experts; test_all_to_all.py has dense ones


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of layers -> a checkpoint."""
    folder = tmp_path_factory.mktemp("dense")
    return {n: write_dense(folder / str(n), shape(n), torch.float32) for n in (1, 2)}


@pytest.fixture(scope="module")
def alone(dense: dict[int, Path]) -> dict[int, Any]:
    """Number of layers -> the model in one process."""
    return {layers: load_dense(path) for layers, path in dense.items()}


@pytest.fixture(scope="module")
def answered(
    dense: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[dict[str, Answer], Trained]]:
    folder = tmp_path_factory.mktemp("ranks")
    packed = {n: write_packed(folder / str(n), shape(n)) for n in (1, 2)}
    return ranks.run(ways_to_spread.ask, WORLD, folder / "two", dense[1], packed)


def shape(layers: int) -> CheckpointShape:
    return dataclasses.replace(TINY, layers=layers)


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_computes_the_whole_model(
    answered: list[tuple[dict[str, Answer], Trained]], alone: dict[int, Any], way: str
) -> None:
    for rank, (answers, _) in enumerate(answered):
        ids = own_batch(rank) if way == FSDP else IDS
        assert_right(answers[way], alone[LAYERS[way]], ids)


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_swizzled_once_and_nothing_is_warned_of(
    answered: list[tuple[dict[str, Answer], Trained]], way: str
) -> None:
    for answers, _ in answered:
        assert answers[way].swizzles == [2, 0]  # a rank has one layer, or a stage of one
        assert not answers[way].told


def test_gradients_go_through_experts_of_all_ranks(
    answered: list[tuple[dict[str, Answer], Trained]], alone: dict[int, Any]
) -> None:
    exact = copy.deepcopy(alone[1]).double()
    exact.set_experts_implementation("batched_mm")  # grouped_mm does not support float64
    (own, one), (exact_loss, expected) = step(copy.deepcopy(alone[1])), step(exact)
    for _, (loss, gradients) in answered:
        assert_as_accurate(*map(torch.tensor, (loss, own)), torch.tensor(exact_loss).double())
        assert gradients.keys() == expected.keys()
        assert_as_accurate(*(relative(each, expected) for each in (gradients, one, expected)))


def test_what_fsdp_gathers_for_each_call_is_swizzled_for_each(
    dense: dict[int, Path], alone: dict[int, Any], tmp_path: Path
) -> None:
    answers = ranks.run(ways_to_spread.ask_four, 4, tmp_path / "four", dense[1])
    for rank, answer in enumerate(answers):
        assert_right(answer, alone[1], own_batch(rank))
        assert answer.told == {"RepeatedSwizzleWarning"}


def assert_right(answer: Answer, alone: Any, ids: Tensor) -> None:
    for found in answer.calls:
        assert_as_accurate(found, logits(alone, ids), exact_logits(alone, ids))


def relative(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Return all gradients in one, each in units of its parameter's largest."""
    parts = [gradients[name] / each.abs().max() for name, each in exact.items()]
    return torch.cat([part.flatten() for part in parts])


def step(model: Any) -> Trained:
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
