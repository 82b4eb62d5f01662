"""``matmul_ogs`` by the hub's ``gpt-oss-triton-kernels``, a version of OpenAI's triton_kernels.

Weights stay in checkpoint order and are wrapped, not copied. Nothing is read back from the device,
so that CUDA graphs can capture a call. Routing is plain PyTorch (``ops/reference.py``): the
package's own ``routing`` orders a token's experts by their ids and breaks ties otherwise than
``torch.topk``, so its slots are not those of the op.

What the package cannot do, or does otherwise, is done here:

- It knows no float32, and beside float16 it makes float16 of the weights, too, whose scales need a
  wider range. So float16 goes in as a sum of two bfloat16 numbers and float32 as one of three:
  exactly, but for what is outside bfloat16's range, and at two and three times the price.
- With a scatter, or when it cuts K into parts to fill the device, it applies the activation after
  the gammas, or to a token's sum. So an activation goes in alone, and gammas and scatter follow it.
- Its scatter takes a power of two of experts a token. It rounds each row before it adds them,
  unless the result is float32.
- Rows that belong to nobody are left as they were in memory.

Scales in checkpoint order are loaded with a mask, so K need not fill a tile; it is the swizzled
ones that the package reads beyond their end (vllm#47303).

Known limits: Triton decodes the scale bytes. Before Triton 3.9 byte 0 (2^-127) counts as zero
(triton#11624), and byte 255 (NaN) gives infinity or NaN by the value that it scales. An expert has
at most 2^15 tiles of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mxfp4_fx.core.formats import BLOCK, E8M0_BIAS
from mxfp4_fx.core.hardware import BF16_TERMS
from mxfp4_fx.ops import hub_loader
from mxfp4_fx.ops.reference import combine, swiglu

# Rows of the tiles that the package may choose, 2^4 to 2^8: 256 on AMD only.
_LOG2_HEIGHTS = range(4, 9)


def matmul_ogs(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    expert_offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    gammas: Tensor | None,
    experts_per_token: int,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
) -> Tensor:
    """See ``ops.reference.matmul_ogs``; only ``layout="row_major"``, on a GPU.

    Raises:
        ValueError: another layout.
        KernelsUnavailableError: the package cannot be loaded.
    """
    if layout != "row_major":
        raise ValueError(
            f"mxfp4::matmul_ogs: kernels='hub' reads layout 'row_major', not {layout!r}"
        )
    (e, n), k = bias.shape, x.shape[1]
    r = x.shape[0] if gather_index is None else gather_index.shape[0]
    has_swiglu = activation == "swiglu"
    if not r * n * e:
        rows = r if scatter_index is None else r // experts_per_token
        return x.new_zeros((rows, n // 2 if has_swiglu else n))
    if not k:  # a block of zeros, as the package wants K > 0
        x, blocks = pad(x, (0, BLOCK)), pad(blocks, (0, 0, 0, 1))
        scales = pad(scales, (0, 1), value=E8M0_BIAS)
    expert_offsets = expert_offsets.int().contiguous()
    if gammas is not None:
        gammas = gammas.float().contiguous()
    a = experts_per_token
    scatters = scatter_index is not None and not has_swiglu and a > 1 and not a & (a - 1)
    terms = _bf16_terms(x)
    fuses_swiglu = has_swiglu and len(terms) == 1 and limit >= 0  # else its clamp is undefined
    # The only rounding to the activations' dtype is the last one.
    alone = len(terms) == 1 and scatter_index is None and not (has_swiglu and gammas is not None)
    call = _Call(
        hub_loader.load(),
        blocks,
        scales,
        expert_offsets,
        r,
        torch.bfloat16 if alone else torch.float32,
    )
    if gather_index is not None:
        call.gather(gather_index, a if scatters else 1)
    if scatter_index is not None and scatters:
        call.scatter(scatter_index, a)
    if fuses_swiglu:
        call.swiglu(alpha, limit)
    if gammas is not None and not has_swiglu:
        call.arguments["gammas"] = gammas
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y = call(terms[0], bias.float().contiguous())
        for term in terms[1:]:
            y = y + call(term, None)
    if has_swiglu and not fuses_swiglu:
        y = swiglu(y, alpha, limit)
    if gammas is not None and has_swiglu:
        y = y * gammas[:, None]
    if not scatters:
        y = y.masked_fill(call.is_foreign[:, None], 0)
        if scatter_index is not None:
            y = combine(y, scatter_index, a)
    return y.to(x.dtype)


class _Call:
    """The arguments of the package's ``matmul_ogs``, which has its own words for routes."""

    def __init__(
        self,
        package: Any,
        blocks: Tensor,
        scales: Tensor,
        expert_offsets: Tensor,
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        self._package = package
        self._offsets = expert_offsets
        row = torch.arange(rows, dtype=torch.int32, device=expert_offsets.device)
        self.is_foreign = row >= expert_offsets[-1]
        self._row = row.masked_fill(self.is_foreign, -1)  # "nobody's" in the package's words
        e, n, groups, _ = blocks.shape
        # [E, K, N] with K contiguous, two values a byte along it.
        self._weight = package.tensor.wrap_torch_tensor(
            blocks.contiguous().view(e, n, -1).transpose(1, 2), dtype=package.tensor.FP4
        )
        self._weight.shape = [e, groups * BLOCK, n]
        self._scales, self._dtype = scales.contiguous().transpose(1, 2), dtype
        self._experts_per_token = 1
        self._expert_data = _expert_data(package, expert_offsets, rows)
        self.arguments: dict[str, Any] = {}

    def gather(self, gather_index: Tensor, experts_per_token: int) -> None:
        """The package gathers by slot, which it divides by the number of experts a token."""
        src = gather_index.int() * experts_per_token
        self.arguments["gather_indx"] = self._package.routing.GatherIndx(src, src)

    def scatter(self, scatter_index: Tensor, experts_per_token: int) -> None:
        """The package wants the row of each slot beside the slot of each row; -1 for nobody's."""
        row_of = torch.empty_like(self._row).scatter_(0, scatter_index.long(), self._row)
        slot_of = scatter_index.int().masked_fill(self.is_foreign, -1)
        self.arguments["scatter_indx"] = self._package.routing.ScatterIndx(row_of, slot_of)
        self._experts_per_token = experts_per_token

    def swiglu(self, alpha: float, limit: float) -> None:
        ogs = self._package.matmul_ogs
        specs = ogs.FnSpecs("swiglu", self._package.swiglu.swiglu_fn, ("alpha", "limit"))
        self.arguments["fused_activation"] = ogs.FusedActivation(specs, (alpha, limit), 2)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        package, tensor = self._package, self._package.tensor
        routing = package.routing.RoutingData(
            self.arguments.get("gammas"),
            self._expert_data.hist,
            self._offsets.shape[0] - 1,
            self._experts_per_token,
            self._expert_data,
        )
        # A new one each time: the package writes into it.
        precision = package.matmul_ogs.PrecisionConfig(
            weight_scale=tensor.wrap_torch_tensor(self._scales), out_dtype=self._dtype
        )
        y: Tensor = package.matmul_ogs.matmul_ogs(
            x, self._weight, bias, routing, precision_config=precision, **self.arguments
        )
        return y


def _expert_data(package: Any, expert_offsets: Tensor, rows: int) -> Any:
    """The package's table of tiles: for each height of tiles, whose rows each program takes.

    An entry holds (tile of the expert) << 16 | expert, or -1. The package has two functions for
    this; the one that transformers calls reads counts back from the device.
    """
    device, e = expert_offsets.device, expert_offsets.shape[0] - 1
    counts = expert_offsets.diff()
    log2 = torch.arange(_LOG2_HEIGHTS.start, _LOG2_HEIGHTS.stop, device=device)[:, None]
    ends = (-(-counts >> log2)).cumsum(1)  # [heights, E]: tiles of this expert and those before
    starts = pad(ends, (1, 0))
    # At least as many as the package launches: R of them if R <= E, else (R-E+1)/height + E - 1.
    programs = (rows >> _LOG2_HEIGHTS.start) + e + 1
    program = torch.arange(programs, device=device).expand(len(_LOG2_HEIGHTS), -1).contiguous()
    expert = torch.searchsorted(ends, program, right=True)
    tile = program - starts.gather(1, expert)
    tiles = torch.where(expert < e, tile << 16 | expert, -1).int()
    heights = [1 << log2 for log2 in _LOG2_HEIGHTS]
    return package.routing.ExptData(
        counts,
        expert_offsets,
        dict(zip(heights, starts.int(), strict=True)),
        dict(zip(heights, tiles, strict=True)),
    )


def _bf16_terms(x: Tensor) -> list[Tensor]:
    """bfloat16 numbers whose sum is x, the largest first."""
    terms, rest = [x.to(torch.bfloat16).contiguous()], x
    for _ in range(BF16_TERMS[x.dtype] - 1):
        # Exact in float32. What is infinite or NaN stays so by the first term alone.
        rest = torch.where(terms[-1].isfinite(), rest.float() - terms[-1].float(), 0)
        terms.append(rest.to(torch.bfloat16).contiguous())
    return terms
