"""``matmul_ogs`` by the hub's ``gpt-oss-triton-kernels``, a version of OpenAI's triton_kernels.

Weights stay in checkpoint order, or as transformers' MXFP4 modules hold them, and are wrapped, not
copied. Nothing is read back from the device,
so that CUDA graphs can capture a call. Routing is plain PyTorch (``ops/reference.py``): the
package's own ``routing`` orders a token's experts by their ids and breaks ties in another way than
``torch.topk``, so its slots are not those of the op.

This module makes up for what the package lacks or does in another way:

- The package has no float32. With float16 activations it converts the weights to float16, too, and
  float16's range is too small for their scales. So this module passes float16 as a sum of two
  bfloat16 terms and float32 as a sum of three. That is exact within bfloat16's range, and two and
  three times as expensive.
- With a scatter, or when it splits K to fill the device, the package applies the activation after
  the gammas, or to a token's sum. So this module applies gammas and scatter itself if there is an
  activation.
- The package's scatter needs a power of two of experts per token. It rounds each row before it adds
  them, unless the result is float32.
- The package does not write rows whose expert is not held here. This module makes them zero.

The package loads scales in checkpoint order with a mask, so K need not fill a tile. It reads only
swizzled scales beyond their end (vllm#47303).

Known limits: Triton decodes the scale bytes. Before Triton 3.9 byte 0 (2^-127) counts as zero
(triton#11624), and byte 255 (NaN) gives infinity or NaN, depending on the value that it scales. An
expert has at most 2^15 tiles of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mxfp4_fx.core import hardware
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E8M0_BIAS
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER
from mxfp4_fx.ops import hub_loader
from mxfp4_fx.ops.operands import Activation, Rows, Weight, result_shape
from mxfp4_fx.ops.reference import activate, combine

# Rows of the tiles that the package may choose: 2^4 to 2^8, with 2^8 on AMD only.
_LOG2_HEIGHTS = range(4, 9)


def matmul_ogs(x: Tensor, weight: Weight, rows: Rows, activation: Activation | None) -> Tensor:
    """Compute ``ops.reference.matmul_ogs`` for ``hub_loader.LAYOUTS``, on a GPU.

    Raises:
        ValueError: the weight has another layout.
        KernelsUnavailableError: the package cannot be loaded.
    """
    if weight.layout not in hub_loader.LAYOUTS:
        raise ValueError(
            f"mxfp4::matmul_ogs: kernels='hub' reads layouts {', '.join(hub_loader.LAYOUTS)}, "
            f"not {weight.layout!r}"
        )
    if not rows.total * weight.n * weight.experts:
        return x.new_zeros(result_shape(weight, rows, activation))
    if not weight.k:
        x, weight = _with_a_block_of_zeros(x, weight)
    rows = rows._replace(offsets=rows.offsets.int().contiguous())
    if rows.gammas is not None:
        rows = rows._replace(gammas=rows.gammas.float().contiguous())
    terms = _bf16_terms(x)
    activates = activation is not None and len(terms) == 1 and _can_activate(activation)
    weighs = rows.gammas is not None and activation is None
    scatters = _can_scatter(rows) and activation is None
    # Round once: the package may round to bfloat16 only if nothing follows.
    alone = len(terms) == 1 and rows.scatter is None and (rows.gammas is None or weighs)
    alone &= activation is None or activates
    call = _Call(weight, rows, torch.bfloat16 if alone else torch.float32, weighs, scatters)
    if activation is not None and activates:
        call.activate(activation)
    with hardware.on(x.device):
        y = call(terms[0], None if weight.bias is None else weight.bias.float().contiguous())
        for term in terms[1:]:
            y = y + call(term, None)
    if activation is not None and not activates:
        y = activate(y, activation)
    if rows.gammas is not None and not weighs:
        y = y * rows.gammas[:, None]
    if not scatters:
        y = y.masked_fill(call.is_foreign[:, None], 0)
        if rows.scatter is not None:
            y = combine(y, rows.scatter, rows.per_token)
    return y.to(x.dtype)


def _can_activate(activation: Activation) -> bool:
    """Return whether the package has it: GPT-OSS's; its clamp is undefined for a limit below 0."""
    return (activation.kind, activation.up_offset) == ("swiglu", 1) and activation.limit >= 0


def _can_scatter(rows: Rows) -> bool:
    a = rows.per_token
    return rows.scatter is not None and a > 1 and not a & (a - 1)


def _with_a_block_of_zeros(x: Tensor, weight: Weight) -> tuple[Tensor, Weight]:
    """Return x and weight with one block of zeros in K: the package needs K > 0."""
    e, n = weight.experts, weight.n
    blocks = weight.blocks.new_zeros((e, n, 1, BYTES_PER_BLOCK))
    scales = weight.scales.new_full((e, n, 1), E8M0_BIAS)
    weight = weight._replace(blocks=blocks, scales=scales, k=BLOCK, layout=CHECKPOINT_ORDER)
    return pad(x, (0, BLOCK)), weight


def _wrapped(package: Any, weight: Weight) -> tuple[Any, Any]:
    """Return blocks and scales in the package's class; what is stored in order is not copied.

    The package wants [E, K, N] with K contiguous, two values a byte along it.
    """
    wrap, tensor = package.tensor.wrap_torch_tensor, package.tensor
    e, n, k = weight.experts, weight.n, weight.k
    blocks, scales = weight.blocks, weight.scales
    if weight.layout == CHECKPOINT_ORDER:
        blocks, scales = blocks.contiguous().view(e, n, k // 2).mT, scales.contiguous().mT
    if weight.layout == "hub_hopper":
        order = package.tensor_details.layout.HopperMXValueLayout((e, k // 2, n), mx_axis=1)
        codes = tensor.Tensor(tensor.Storage(blocks, order), dtype=tensor.FP4, shape=[e, k, n])
    else:
        codes = wrap(blocks, dtype=tensor.FP4)
        codes.shape = [e, k, n]
    return codes, wrap(scales)


class _Call:
    """A call of the package's ``matmul_ogs``, with weights and routes in the package's own classes.

    Args:
        weight, rows: the op's operands.
        dtype: the dtype of the result.
        weighs: whether the package multiplies rows with gammas.
        scatters: whether the package sums a token's rows.

    Attributes:
        is_foreign: [R] bool, the rows whose expert is not held here.
    """

    def __init__(
        self, weight: Weight, rows: Rows, dtype: torch.dtype, weighs: bool, scatters: bool
    ) -> None:
        self._package = package = hub_loader.load()
        row = torch.arange(rows.total, dtype=torch.int32, device=rows.offsets.device)
        self.is_foreign = row >= rows.offsets[-1]
        self._gammas = rows.gammas if weighs else None
        self._weight, self._scales = _wrapped(package, weight)
        self._dtype = dtype
        self._experts = weight.experts
        self._expert_data = _expert_data(package, rows.offsets, rows.total)
        self._experts_per_token = rows.per_token if scatters else 1
        self._arguments: dict[str, Any] = {}
        if rows.gather is not None:  # as slots: the package divides by the experts per token
            source = rows.gather.int() * self._experts_per_token
            self._arguments["gather_indx"] = package.routing.GatherIndx(source, source)
        if rows.scatter is not None and scatters:
            # The row of each slot, and the slot of each row; -1 for foreign rows.
            row = row.masked_fill(self.is_foreign, -1)
            row_of = torch.empty_like(row).scatter_(0, rows.scatter.long(), row)
            slot_of = rows.scatter.int().masked_fill(self.is_foreign, -1)
            self._arguments["scatter_indx"] = package.routing.ScatterIndx(row_of, slot_of)

    def activate(self, activation: Activation) -> None:
        """Let the package apply the activation."""
        ogs = self._package.matmul_ogs
        specs = ogs.FnSpecs("swiglu", self._package.swiglu.swiglu_fn, ("alpha", "limit"))
        constants = activation.alpha, activation.limit
        self._arguments["fused_activation"] = ogs.FusedActivation(specs, constants, 2)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        package, data = self._package, self._expert_data
        routing = package.routing.RoutingData(
            self._gammas, data.hist, self._experts, self._experts_per_token, data
        )
        # A new object for each call, because the package writes into it.
        precision = package.matmul_ogs.PrecisionConfig(
            weight_scale=self._scales, out_dtype=self._dtype
        )
        y: Tensor = package.matmul_ogs.matmul_ogs(
            x,
            self._weight,
            bias,
            routing,
            precision_config=precision,
            gammas=self._gammas,
            **self._arguments,
        )
        return y


def _expert_data(package: Any, expert_offsets: Tensor, rows: int) -> Any:
    """Return the package's table of tiles: for each tile height, the tile of each program.

    An entry is (tile of the expert) << 16 | expert, or -1. The package has two functions for this,
    but the one that transformers calls reads counts back from the device.
    """
    device, e = expert_offsets.device, expert_offsets.shape[0] - 1
    counts = expert_offsets.diff()
    log2 = torch.arange(_LOG2_HEIGHTS.start, _LOG2_HEIGHTS.stop, device=device)[:, None]
    ends = (-(-counts >> log2)).cumsum(1)  # [heights, E]: tiles of this expert and those before
    starts = pad(ends, (1, 0))
    # At least as many programs as the package launches: R if R <= E, else (R-E+1)/height + E - 1.
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
    """Split x into bfloat16 terms whose sum is x, the largest first."""
    terms, rest = [x.to(torch.bfloat16).contiguous()], x
    for _ in range(hardware.BF16_TERMS[x.dtype] - 1):
        # Exact in float32. An infinite or NaN element has one term only.
        rest = torch.where(terms[-1].isfinite(), rest.float() - terms[-1].float(), 0)
        terms.append(rest.to(torch.bfloat16).contiguous())
    return terms
