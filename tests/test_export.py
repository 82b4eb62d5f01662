"""A program that is exported keeps the kernels that a packed layer has uncompiled, and says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import compile_with, hidden, mlp, pack

from mxfp4_fx.core.errors import SlowKernelsWarning

pytestmark = pytest.mark.usefixtures("no_gradients")


def export(strict: bool) -> Callable[..., Any]:
    return lambda module, x: torch.export.export(module, (x,), strict=strict).module()


WAYS = {
    "strict export": export(True),
    "export": export(False),
    "torch.jit.trace": lambda module, x: torch.jit.trace(module, (x,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_exported_program_is_right_and_said_to_be_slow(way: str) -> None:
    module, x = pack(mlp()), hidden()
    with pytest.warns(SlowKernelsWarning, match=r"exported with the reference kernels.*mxfp4"):
        program = WAYS[way](module, x)
    for actual, expected in zip(program(x), module(x), strict=True):
        assert torch.equal(actual, expected)


def test_nothing_is_said_of_a_model_that_is_not_exported() -> None:
    module, x = pack(mlp()), hidden()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowKernelsWarning)
        module(x)
        compile_with(module)(x)
        torch.compile(module, backend="eager")(x)
