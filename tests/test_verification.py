"""``verify=True``: right rewrites pass, wrong results are found, on the first call only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import DTYPES, Layers, compile_with, hidden, mlp
from torch import Tensor

from mxfp4_fx.core.errors import VerificationError
from mxfp4_fx.ops import cpu, schemas
from mxfp4_fx.passes import verification

VERIFY = {"verify": True}

pytestmark = pytest.mark.usefixtures("no_gradients")


def break_kernel(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    real = cpu.matmul_ogs

    def broken(*args: Any) -> Tensor:
        return change(real(*args))

    monkeypatch.setattr(cpu, "matmul_ogs", broken)
    schemas.kernel.cache_clear()
    monkeypatch.setattr(schemas, "kernel", schemas.kernel.__wrapped__)


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_rewrites_pass(dtype: torch.dtype, form: str) -> None:
    compiled = compile_with(mlp(dtype, form), options=VERIFY)
    for seed in (0, 1):
        assert compiled(hidden(dtype=dtype, seed=seed))[0].isfinite().all()


def test_weights_that_are_not_mxfp4_are_no_difference() -> None:
    """They are quantized on both sides: what is verified is the rewrite, not the quantization."""
    module = mlp()
    torch.nn.init.normal_(module.experts.gate_up_proj)
    torch.nn.init.normal_(module.experts.down_proj)
    compile_with(module, options=VERIFY)(hidden())


def test_dynamic_shapes() -> None:
    compile_with(mlp(), options=VERIFY, dynamic=True)(hidden())


def test_routes_chosen_by_the_caller() -> None:
    module, x = mlp(), hidden()[0]
    indices, weights = torch.randint(0, 6, (7, 3)), torch.rand(7, 3)
    compile_with(module.experts, options=VERIFY)(x, indices, weights)


CHANGES = {
    "scaled": lambda y: y * 1.25,
    "rows moved": lambda y: y.roll(1, 0),
    "a column lost": lambda y: y.index_fill(1, torch.tensor([3]), 0.0),
    "NaN": lambda y: y.index_fill(0, torch.tensor([3]), float("nan")),
}


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        *(pytest.param(change, torch.bfloat16, id=name) for name, change in CHANGES.items()),
        *(
            pytest.param(change, dtype, id=f"{name}-{dtype}", marks=pytest.mark.exhaustive)
            for name, change in CHANGES.items()
            for dtype in (torch.float32, torch.float16)
        ),
    ],
)
def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Any, dtype: torch.dtype
) -> None:
    break_kernel(monkeypatch, change)
    with pytest.raises(VerificationError, match=r"experts differs from its original"):
        compile_with(mlp(dtype), options=VERIFY)(hidden(dtype=dtype))


def test_a_small_error_is_found_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, lambda y: y * (1 + 2**-9))
    with pytest.raises(VerificationError):
        compile_with(mlp(), options=VERIFY)(hidden())


def test_only_the_first_call_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = verification.compare

    def counting(layer: str, *args: Any) -> None:
        calls.append(layer)
        real(layer, *args)

    monkeypatch.setattr(verification, "compare", counting)
    compiled = compile_with(Layers(), options=VERIFY)
    for seed in range(3):
        compiled(hidden(seed=seed))
    assert calls == ["layers.0.experts", "layers.1.experts"]


def test_the_verified_call_returns_the_rewritten_result() -> None:
    module, x = mlp(), hidden()
    torch.nn.init.normal_(module.experts.down_proj)
    first = compile_with(module, options=VERIFY)
    assert torch.equal(first(x)[0], first(x)[0])
