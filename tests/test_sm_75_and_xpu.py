"""Turing's and Intel's GPUs: what is launched on them, in Triton's interpreter, with their tiles.

Nothing here has run on such a GPU. ``test_ahead_of_time.py`` compiles the kernels for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from combinations import covering, exhaustive
from implementations import Kernels, check_matmul, chosen, int32, randn
from models import DTYPES
from oracle import UNDERFLOW, Matrices, random_logits, random_routes, route, sort_routes

pytest.importorskip("triton")

import triton

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import tiles
from mxfp4_fx.ops import triton as launcher

GPUS = ("sm_75", "xpu")

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="on a GPU the launcher serves that GPU"
)


@pytest.fixture
def row_major() -> Iterator[Kernels]:
    with chosen("triton:row_major") as kernels:
        assert kernels.underflow == UNDERFLOW
        yield kernels


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The names of the kernels that are launched, and their named arguments."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Noting:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> None:
                seen.append((self.name, kwargs))
                self.kernel[grid](*args, **kwargs)

            return run

    for name, kernel in list(vars(launcher).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(launcher, name, Noting(name, kernel))
    return seen


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    monkeypatch.setattr(hardware, "gpu_name", lambda device: gpu)


# Tokens and experts, two a token: each is the first that an entry of one of the tables serves.
PROBLEMS = {
    "decode": (3, 3),
    "up to 8": (36, 10),
    "up to 16": (36, 5),
    "up to 64": (36, 2),
    "more": (70, 2),
}


@pytest.mark.parametrize(
    ("gpu", "dtype", "problem"), covering(GPUS, (torch.float16, torch.bfloat16), list(PROBLEMS))
)
def test_every_tile(
    row_major: Kernels, gpu: str, dtype: torch.dtype, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpu)
    tokens, experts = PROBLEMS[problem]
    indices = random_routes(tokens, experts, 2)[0]
    matrices = Matrices.random(experts, 34, 96, dtype)
    check_matmul(row_major, randn(tokens, 96, dtype=dtype), matrices, indices)


@pytest.mark.parametrize("gpu", GPUS)
def test_those_problems_take_every_entry(gpu: str) -> None:
    taken = {tiles.choose(gpu, "row_major", 2 * t, e, 96) for t, e in PROBLEMS.values()}
    assert taken == {tiles.fit(tile, "row_major", 96) for tile in tiles.table(gpu)}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [exhaustive(torch.float32), torch.bfloat16])
def test_activations_beyond_the_range_of_float16(
    row_major: Kernels, gpu: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the size 2^-100 and 2^100: none becomes zero or infinity, and each is as exact."""
    pretend(monkeypatch, gpu)
    x = randn(4, 64) * torch.exp2(torch.tensor([-100.0, -40.0, 40.0, 100.0]))[:, None]
    matrices = Matrices.random(1, 34, 64).without_bias
    indices = torch.zeros((4, 1), dtype=torch.long)
    y = check_matmul(row_major, x.to(dtype), matrices, indices, activation="none")
    assert y.isfinite().all()
    assert (y != 0).all()


@pytest.mark.parametrize("dtype", [exhaustive(torch.float16), torch.float32])
def test_every_scale_of_sm_75(
    row_major: Kernels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row n has scale byte n; codes are such that the largest is a float32 number."""
    pretend(monkeypatch, "sm_75")
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(-1, -1, 2).contiguous()
    blocks = Matrices.random(1, 256, 64).blocks
    blocks[scales >= 253] &= 0b1011_1011
    matrices = Matrices(blocks, scales, torch.zeros((1, 256), dtype=dtype))
    x = (randn(3, 64) * 2.0**-12).to(dtype)
    indices = torch.zeros((3, 1), dtype=torch.long)
    if dtype == torch.float16:  # whose range the products leave
        matrices.scales.clamp_(max=127)
    y = check_matmul(row_major, x, matrices, indices, scatter=False, activation="none")
    nan = [255] if dtype == torch.float32 else []
    assert y.isnan().all(dim=0).nonzero().flatten().tolist() == nan


@pytest.mark.parametrize("dtype", DTYPES)
def test_sm_75_multiplies_float32_once(
    row_major: Kernels,
    dtype: torch.dtype,
    launched: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "sm_75")
    row_major.matmul_ogs(randn(1, 32, dtype=dtype), Matrices.random(1, 16, 32), int32([0, 1]))
    ((_, arguments),) = launched
    assert (arguments["OPERAND"], arguments["TERMS"]) == (triton.language.float32, 1)
    assert not arguments["SCALED"]
    assert "maxnreg" not in arguments


@pytest.mark.parametrize(("dtype", "terms"), hardware.BF16_TERMS.items(), ids=str)
def test_xpu_decodes_in_the_kernel_with_options_that_its_compiler_knows(
    row_major: Kernels,
    dtype: torch.dtype,
    terms: int,
    launched: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An option that a compiler does not know is an error of Triton's."""
    pretend(monkeypatch, "xpu")
    row_major.matmul_ogs(randn(1, 32, dtype=dtype), Matrices.random(1, 16, 32), int32([0, 1]))
    ((_, arguments),) = launched
    assert (arguments["TERMS"], arguments["SCALED"]) == (terms, False)
    options = {name for name in arguments if not name.isupper()}
    assert options == {"num_warps", "num_stages", "enable_fp_fusion"}


@pytest.mark.parametrize(
    ("gpu", "names"),
    [("sm_75", ["routing_kernel"]), ("xpu", ["decide_kernel", "scan_kernel", "place_kernel"])],
)
def test_routing_of_few_tokens(
    row_major: Kernels,
    gpu: str,
    names: list[str],
    launched: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an Intel GPU no program reads what its own threads have stored."""
    pretend(monkeypatch, gpu)
    logits = random_logits(5, 6)
    routes = row_major.routing(logits, 2)
    assert [name for name, _ in launched] == names
    assert [part.tolist() for part in routes[1:]] == list(sort_routes(route(logits, 2)[0], 6))
