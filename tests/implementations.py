"""All kernels that run on this machine, for tests that hold for each of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import hub_repository
import oracle
import pytest
import torch
from oracle import UNDERFLOW, Bounded, Matrices, assert_within
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mxfp4_fx.ops.schemas  # noqa: F401
from mxfp4_fx.core import hardware
from mxfp4_fx.core.layouts import HUB_LAYOUTS, LAYOUTS
from mxfp4_fx.ops.reference import Routes
from mxfp4_fx.weights.source import MXFP4, Source
from mxfp4_fx.weights.swizzle import swizzle_weight

ALPHA, LIMIT = 1.702, 7.0
GPT_OSS = {"activation": "swiglu", "alpha": ALPHA, "limit": LIMIT, "up_offset": 1.0}
# Activations by the names that tests give them -> the op's arguments.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {"activation": "none"},
    "swiglu": GPT_OSS,
    "silu": {"activation": "swiglu", "alpha": 1.0, "limit": torch.inf, "up_offset": 0.0},
    "clamped_silu": {"activation": "swiglu", "alpha": 1.0, "limit": 2.5, "up_offset": 0.0},
    "geglu_tanh": {"activation": "geglu_tanh", "limit": torch.inf, "up_offset": 0.0},
    "clamped_geglu": {"activation": "geglu_tanh", "limit": 2.5, "up_offset": -0.75},
    "relu2": {"activation": "relu2"},
}
ops = torch.ops.mxfp4


# Where Triton's kernels run: in its interpreter without a GPU.
DEVICE = next((t for t in hardware.GPU_TYPES if torch.get_device_module(t).is_available()), "cpu")


class Kernels:
    """The device ops by one of ``ops.schemas.KERNELS``, fed with weights in the layout it reads.

    Attributes:
        name: of the kernels.
        path: the instruction-set path of native ones, otherwise empty.
        layout: of the weights.
        device: where they run: a GPU for Triton's if there is one, otherwise the CPU.
        underflow: how far a float32 product may be off beside relative rounding: bfloat16 units
            make zeros of what is below float32's normal numbers.
    """

    def __init__(self, spec: str) -> None:
        self.name, _, self.path = spec.partition(":")
        layouts = {"cpu": "cpu_panels", "triton": self.path, "hub": self.path or "row_major"}
        self.layout = layouts.get(self.name, "row_major")
        self.device = DEVICE if self.name == "triton" else "cpu"
        has_bf16_units = self.path in BF16_UNITS or self.device != "cpu"
        self.underflow = 2.0**-126 if has_bf16_units else UNDERFLOW

    def operands(
        self, matrices: Matrices, bias: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """blocks, scales, bias and N of the matrices, swizzled expert by expert."""
        blocks, scales, given = matrices.operands
        if self.layout in HUB_LAYOUTS:  # with strides of their own
            source = Source((blocks, scales), MXFP4)
            blocks, scales = swizzle_weight(source, self.layout)
        elif self.layout != "row_major":
            swizzle = LAYOUTS[self.layout].swizzle
            each = [swizzle(*e) for e in zip(blocks, scales, strict=True)]
            blocks, scales = (torch.stack(parts) for parts in zip(*each, strict=True))
        return blocks, scales, given if bias else None, given.shape[1]

    def matmul_ogs(
        self, x: Tensor, matrices: Matrices, *args: Any, bias: bool = True, **kwargs: Any
    ) -> Tensor:
        """Without ``bias`` the op is given none, whatever the matrices have."""
        args, kwargs = self.there((x, *self.operands(matrices, bias), *args), kwargs)
        y: Tensor = ops.matmul_ogs(*args, **kwargs, layout=self.layout, kernels=self.name)
        return y.cpu()

    def routing(self, logits: Tensor, top_k: int, *here: int) -> Routes:
        """``here``: the first expert that is held here, and how many are."""
        return self._here(ops.routing(logits.to(self.device), top_k, *here, kernels=self.name))

    def routing_from_routes(self, *args: Any) -> Routes:
        return self._here(ops.routing.routes(*self.there(args), kernels=self.name))

    @staticmethod
    def _here(routes: Routes) -> Routes:
        gammas, gather_index, scatter_index, offsets = routes
        return gammas.cpu(), gather_index.cpu(), scatter_index.cpu(), offsets.cpu()

    def there(self, tree: Any, *more: Any) -> Any:
        """All tensors in it, or in each of several, on the device."""
        moved = [
            tree_map_only(Tensor, lambda tensor: tensor.to(self.device), part)
            for part in (tree, *more)
        ]
        return moved if more else moved[0]

    def topk(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """What it chooses of equal logits: Triton's kernels the first, others as torch.topk."""
        if self.name != "triton":
            return torch.topk(logits, top_k)
        chosen, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        return chosen[..., :top_k], indices[..., :top_k]


BF16_UNITS = ("amx", "amx_emulated", "avx512_bf16")
_PATHS = hardware.runnable_paths()
ARM_PATHS = [name for name, path in hardware.CPU_PATHS.items() if path.is_for_arm]
CPU_PATHS = (*_PATHS, *(("amx_emulated",) if "avx512_bf16" in _PATHS else ()))
_GPU = hardware.gpu_name(torch.device(DEVICE))
# All three layouts are right on any device that has the assembly with which fragments are decoded.
_DECODES = _GPU == "interpreter" or (
    _GPU.startswith("sm_") and not hardware.multiplies_float32(_GPU)
)
_LAYOUTS = (*(("wgmma_fragments", "mma_fragments") if _DECODES else ()), "row_major")
TRITON = tuple(f"triton:{layout}" for layout in _LAYOUTS)
if not importlib.util.find_spec("triton"):
    TRITON = ()
# Without a GPU: the package of hub_package.py, which takes the kernels library to load.
HUB = ("hub",) if importlib.util.find_spec("kernels") else ()
ALL = ("reference", "pytorch", *(f"cpu:{path}" for path in CPU_PATHS), *TRITON, *HUB)
# For what does not depend on the layout, such as routing: of Triton's kernels one is enough.
ANY_LAYOUT = tuple(spec for spec in ALL if spec not in TRITON[1:])


@contextmanager
def chosen(spec: str) -> Iterator[Kernels]:
    """The kernels of that name.

    ``cpu:PATH`` are native ones on an instruction-set path, ``hub:LAYOUT`` get such weights.
    """
    kernels = Kernels(spec)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if kernels.name == "hub":
            stack.enter_context(hub_repository.served(hub_repository.standard()))
        patch.setenv(hardware.CPU_PATH_VARIABLE, kernels.path if kernels.name == "cpu" else "")
        hardware.cpu_path.cache_clear()
        try:
            yield kernels
        finally:
            hardware.cpu_path.cache_clear()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def activated(y: Bounded, name: str) -> Bounded:
    """The oracle's result for one of ACTIVATIONS."""
    arguments = dict(ACTIVATIONS[name])
    return oracle.activate(y, arguments.pop("activation"), **arguments)


def check_matmul(
    kernels: Kernels,
    x: Tensor,
    matrices: Matrices,
    indices: Tensor,
    gather: bool = True,
    scatter: bool = True,
    gammas: bool = True,
    activation: str = "swiglu",
    bias: bool = True,
) -> Tensor:
    """Run matmul_ogs with routes [T, A] and one of ACTIVATIONS; hold it against the oracle."""
    (t, a), e = indices.shape, matrices.blocks.shape[0]
    gather_index, scatter_index, offsets = oracle.sort_routes(indices, e)
    factors = randn(t * a, seed=4).abs()
    y = kernels.matmul_ogs(
        x,
        matrices,
        int32(offsets),
        int32(gather_index) if gather else None,
        int32(scatter_index) if scatter else None,
        factors if gammas else None,
        experts_per_token=a,
        **ACTIVATIONS[activation],
        bias=bias,
    )
    if not bias:
        matrices = matrices.without_bias
    rows = Bounded.exact(x[gather_index] if gather else x)
    expert = indices.flatten()[scatter_index]
    expected = oracle.grouped_linear(rows, expert, *matrices.exact, kernels.underflow)
    expected = activated(expected, activation)
    if gammas:
        expected = oracle.times(expected, Bounded.exact(factors)[:, None])
    if scatter:
        slots = expected[torch.tensor(scatter_index, dtype=torch.long).argsort()]
        expected = oracle.combine(slots.view(t, a, slots.value.shape[1]))
    assert y.dtype == x.dtype
    assert_within(y, expected.rounded(x.dtype))
    return y
