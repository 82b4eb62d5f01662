"""A rank that dies or hangs in ``generate`` ends the others, and what is printed says where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import failing_ranks
import pytest
import ranks
import torch
import torch.distributed as dist
from checkpoints import write_packed
from models import compile_with, hidden, mlp
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD = 2
NOTE = r"mxfp4_fx: rank 0 of 2 was in the graph of model\.layers\.0\.mlp\.experts and 1 more"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


def test_a_rank_that_dies(checkpoint: Path, tmp_path: Path) -> None:
    first, second = ranks.run(
        failing_ranks.die, WORLD, tmp_path / "ranks", checkpoint, may_fail=True
    )
    assert second.status == -9
    assert re.search(rf"RuntimeError: .*\n{NOTE}\n", first.text), first.text


@pytest.mark.exhaustive
def test_a_rank_that_hangs(checkpoint: Path, tmp_path: Path) -> None:
    first, _ = ranks.run(
        failing_ranks.hang, WORLD, tmp_path / "ranks", checkpoint, may_fail=True, timeout=20.0
    )
    assert re.search(rf"RuntimeError: .*[Tt]imed out.*\n{NOTE}\n", first.text), first.text


@pytest.mark.exhaustive
def test_torchrun_names_the_rank_that_died(checkpoint: Path) -> None:
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tests / "failing_ranks.py"), str(checkpoint)]
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=ranks.LAST_RESORT,
    )
    assert ended.returncode == 1
    assert re.search(r"Root Cause.*rank +: 1 .*exitcode +: -9", ended.stderr, re.S), ended.stderr
    assert re.search(NOTE, ended.stderr), ended.stderr


# ---- what an exception says, by a group whose other ranks are none


@pytest.fixture
def second_of_two() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


class Fault(Exception):
    pass


def fail(*_: Any) -> Any:
    raise Fault


class Around(nn.Module):
    """An MLP, and code that is in no graph before and in it."""

    def __init__(self, before: Callable[[], Any], inside: Callable[[], Any]) -> None:
        super().__init__()
        self.mlp = mlp()
        self.before = torch.compiler.disable(before)
        inside = torch.compiler.disable(inside)
        experts, forward = self.mlp.experts, self.mlp.experts.forward

        def with_code_inside(*args: Any) -> Any:
            inside()
            return forward(*args)

        experts.forward = with_code_inside

    def forward(self, x: Tensor) -> Any:
        self.before()
        return self.mlp(x)[0]


def nothing() -> None:
    pass


def notes_of(module: nn.Module, inner: Any = "eager") -> list[str]:
    with pytest.raises(Fault) as raised, torch.no_grad():
        compile_with(module, inner=inner)(hidden())
    return getattr(raised.value, "__notes__", [])


def in_graph(*_: Any) -> Any:
    return fail


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("module", "inner", "where"),
    [
        (lambda: nn.Sequential(mlp()), in_graph, "in the graph of 0.experts"),
        (lambda: Around(fail, nothing), "eager", "in a call of Around"),
        (lambda: Around(nothing, fail), "eager", "in mlp.experts"),
    ],
)
def test_an_exception_says_which_rank_it_ended_and_where(
    module: Callable[[], nn.Module], inner: Any, where: str
) -> None:
    assert notes_of(module(), inner) == [f"mxfp4_fx: rank 1 of 2 was {where}"]


def test_an_exception_of_one_process_says_nothing_of_ranks() -> None:
    assert notes_of(Around(fail, nothing)) == []
