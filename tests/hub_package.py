"""A kernel package with the interface of the hub's ``gpt-oss-triton-kernels``, in plain float64.

It stands for the real one where there is no GPU. ``hub_repository.py`` copies this file into a
kernel repository, which the kernels library then loads. It is as fussy as the real package and has
its peculiarities, so that a caller who relies on something else gets wrong numbers: rows that are
nobody's hold NaN, gammas come before the activation, a token's rows are summed before it too, and
each row is rounded to the result's dtype before that sum, and a call puts a new view of the scales
into their storage. The bytes of its layouts are those of ``core/layouts.py``, which
``test_layouts.py`` compares with the real package.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from mxfp4_fx.core.layouts import LAYOUTS

FP4 = object()
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Layout:
    """Of a tensor whose data have this shape in checkpoint order, transposed: [E, K/2, N]."""

    name: str | None = None
    ours: str

    def __init__(self, shape: Any, mx_axis: int = 1, mma_version: int = 3) -> None:
        self.shape, self.mx_axis, self.mma_version = tuple(shape), mx_axis, mma_version

    def swizzle_data(self, data: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._of(one).mT for one in data]).mT

    def unswizzle_data(self, data: torch.Tensor) -> torch.Tensor:
        _, rows, n = self.shape
        scales = torch.zeros((rows // 16, n), dtype=torch.uint8)
        parts = (LAYOUTS[self.ours].unswizzle(one.mT, scales, n, rows * 2)[0] for one in data.mT)
        return torch.stack([part.flatten(1) for part in parts]).mT

    def _of(self, codes: torch.Tensor) -> torch.Tensor:
        blocks = codes.mT.unflatten(1, (-1, 16))
        return LAYOUTS[self.ours].swizzle(blocks, blocks[..., 0])[0]


class StridedLayout(Layout):
    ours = "hub_strided"

    def swizzle_data(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def unswizzle_data(self, data: torch.Tensor) -> torch.Tensor:
        return data


class HopperMXValueLayout(Layout):
    name, ours = "HOPPER_VALUE", "hub_hopper"


class BlackwellMXValueLayout(Layout):
    name, ours = "BLACKWELL_VALUE", "hub_blackwell"


@dataclass
class Storage:
    data: torch.Tensor
    layout: Layout


@dataclass
class Tensor:
    storage: Storage
    dtype: Any
    shape: list[int]

    @property
    def data(self) -> torch.Tensor:
        return self.storage.data


def wrap_torch_tensor(data: torch.Tensor, dtype: Any = None) -> Tensor:
    shape = list(data.shape)
    if dtype is FP4:
        assert data.dtype == torch.uint8
        shape[data.stride().index(1)] *= 2
    return Tensor(Storage(data, StridedLayout(data.shape)), dtype or data.dtype, shape)


def convert_layout(tensor: Tensor, layout: type[Layout], **options: Any) -> Tensor:
    order = layout(tensor.data.shape, **options)
    return Tensor(Storage(order.swizzle_data(tensor.data), order), tensor.dtype, tensor.shape)


@dataclass
class GatherIndx:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor


@dataclass
class ScatterIndx:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor


@dataclass
class ExptData:
    hist: torch.Tensor
    token_offs_raw: torch.Tensor
    token_offs_pad: dict[int, torch.Tensor]
    block_pid_map: dict[int, torch.Tensor]


@dataclass
class RoutingData:
    gate_scal: torch.Tensor | None
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: ExptData


@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: Any
    fn_arg_names: tuple[str, ...]


@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple[Any, ...]
    reduction_n: int


@dataclass
class InFlexData:
    pass


@dataclass
class FlexCtx:
    rhs_data: InFlexData


@dataclass
class PrecisionConfig:
    weight_scale: Tensor
    flex_ctx: FlexCtx | None = None
    out_dtype: torch.dtype | None = None


def swiglu_fn(y: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    pairs = y.unflatten(-1, (-1, 2))
    gate, up = pairs[..., 0].clamp(max=limit), pairs[..., 1].clamp(-limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)


@torch.compiler.disable  # Dynamo cannot trace the real one
def matmul_ogs(
    x: torch.Tensor,
    w: Tensor,
    bias: torch.Tensor | None,
    routing_data: RoutingData,
    gather_indx: GatherIndx | None = None,
    scatter_indx: ScatterIndx | None = None,
    precision_config: PrecisionConfig | None = None,
    betas: torch.Tensor | None = None,
    gammas: torch.Tensor | None = None,
    out_alpha: float | None = None,
    y: torch.Tensor | None = None,
    fused_activation: FusedActivation | None = None,
    epilogue: Any = None,
) -> torch.Tensor:
    assert precision_config is not None
    dtype = precision_config.out_dtype or x.dtype
    scales = precision_config.weight_scale.storage
    scales.data = scales.data.view(torch.uint8)
    rows = _products(x, w, bias, routing_data, gather_indx, precision_config, gammas)
    if scatter_indx is not None:
        rows = _sums(rows.to(dtype).double(), scatter_indx, routing_data.n_expts_act)
    if fused_activation is not None:
        names = fused_activation.specs.fn_arg_names
        arguments = dict(zip(names, fused_activation.fn_args, strict=True))
        columns = rows.shape[1]
        rows = fused_activation.specs.fn(rows, **arguments)
        assert rows.shape[1] * fused_activation.reduction_n == columns
    return rows.to(dtype)


def _products(
    x: torch.Tensor,
    w: Tensor,
    bias: torch.Tensor | None,
    routing_data: RoutingData,
    gather_indx: GatherIndx | None,
    precision_config: PrecisionConfig,
    gammas: torch.Tensor | None,
) -> torch.Tensor:
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert x.stride(-1) == 1
    weight = _dequantized(w, precision_config.weight_scale)
    (e, k, n), a = weight.shape, routing_data.n_expts_act
    assert k == x.shape[1] > 0
    assert e == routing_data.n_expts_tot
    assert bias is None or (bias.dtype == torch.float32 and bias.stride() == (n, 1))
    assert gammas is None or (gammas.dtype == torch.float32 and gammas.is_contiguous())
    source = torch.arange(x.shape[0])
    if gather_indx is not None:
        assert gather_indx.src_indx.dtype == torch.int32
        source = gather_indx.src_indx // a
    m = source.shape[0]
    height = 16
    while height < min(m // e, 128):
        height *= 2

    data = routing_data.expt_data
    tiles, starts = data.block_pid_map[height], data.token_offs_pad[height]
    tables = (tiles, starts, data.hist, data.token_offs_raw)
    assert all(table.dtype == torch.int32 and table.stride() == (1,) for table in tables)
    assert torch.equal(routing_data.expt_hist, data.hist)
    launched = m if m <= e else -(-(m - e + 1) // height) + e - 1
    assert int(starts[-1]) == int((tiles[:launched] != -1).sum())

    y = torch.full((m, n), torch.nan, dtype=torch.float64)
    done = torch.zeros(m, dtype=torch.bool)
    for entry in tiles[:launched].tolist():
        if entry == -1:
            continue
        expert, tile = entry & 0xFFFF, entry >> 16
        first = int(data.token_offs_raw[expert])
        stop = first + min((tile + 1) * height, int(data.hist[expert]))
        here = slice(first + tile * height, stop)
        assert here.start < stop
        assert not done[here].any()
        done[here] = True
        y[here] = x[source[here]].double() @ weight[expert]
        if bias is not None:
            y[here] += bias[expert].double()
        if gammas is not None:
            y[here] *= gammas[here, None].double()
    assert int(done.sum()) == int(data.hist.sum())
    return y


def _dequantized(w: Tensor, scale: Tensor) -> torch.Tensor:
    """[E, K, N] float64"""
    assert w.dtype is FP4
    assert w.data.stride(-2) == 1  # K is contiguous
    data = w.storage.layout.unswizzle_data(w.data)
    codes = torch.stack((data % 16, data // 16), dim=2).flatten(1, 2).long()
    assert list(codes.shape) == list(w.shape)
    factor = torch.exp2(scale.data.double() - 127)
    factor = torch.where(scale.data == 255, torch.nan, factor).repeat_interleave(32, dim=1)
    magnitude = torch.tensor(VALUES, dtype=torch.float64)[codes % 8]
    return torch.where(codes < 8, magnitude, -magnitude) * factor


def _sums(rows: torch.Tensor, scatter_indx: ScatterIndx, a: int) -> torch.Tensor:
    """The sum of each token's rows; -1 is a slot, or a row, that takes no part."""
    assert a.bit_count() == 1, "tl.arange wants a power of two"
    m = rows.shape[0]
    row_of, slot_of = scatter_indx.src_indx, scatter_indx.dst_indx
    assert row_of.dtype == slot_of.dtype == torch.int32
    assert row_of.shape == slot_of.shape == (m,)
    sums = torch.zeros((m // a, rows.shape[1]), dtype=torch.float64)
    for slot, row in enumerate(row_of.tolist()):
        if row != -1:
            assert slot_of[row] == slot
            sums[slot // a] += rows[row]
    assert int((row_of != -1).sum()) == int((slot_of != -1).sum())
    return sums


@torch.compiler.disable
def routes(logits: torch.Tensor, n_expts_act: int) -> tuple[RoutingData, GatherIndx, ScatterIndx]:
    """What transformers' own modules ask for; mxfp4_fx has its own routing."""
    e, slots = logits.shape[1], logits.shape[0] * n_expts_act
    chosen, experts = logits.topk(n_expts_act, dim=1)
    order = experts.flatten().argsort(stable=True).int()
    inverse = order.argsort().int()
    hist = experts.flatten().bincount(minlength=e).int()
    offsets = torch.cat([torch.zeros(1), hist.cumsum(0)]).int()
    starts, tiles = {}, {}
    for height in (16, 32, 64, 128):
        counts = -(-hist // height)
        starts[height] = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
        pairs = [tile << 16 | expert for expert in range(e) for tile in range(int(counts[expert]))]
        tiles[height] = torch.tensor(pairs + [-1] * slots).int()
    gammas = torch.softmax(chosen.float(), dim=1).flatten()[order]
    data = RoutingData(gammas, hist, e, n_expts_act, ExptData(hist, offsets, starts, tiles))
    return data, GatherIndx(order, inverse), ScatterIndx(inverse, order)


tensor = SimpleNamespace(
    FP4=FP4,
    Storage=Storage,
    Tensor=Tensor,
    wrap_torch_tensor=wrap_torch_tensor,
    convert_layout=convert_layout,
)
tensor_details = SimpleNamespace(
    layout=SimpleNamespace(
        StridedLayout=StridedLayout,
        HopperMXValueLayout=HopperMXValueLayout,
        BlackwellMXValueLayout=BlackwellMXValueLayout,
        # What the real package chooses on most GPUs; tests put another in its place.
        make_default_matmul_mxfp4_w_layout=lambda mx_axis: (StridedLayout, {}),
    )
)
routing = SimpleNamespace(
    GatherIndx=GatherIndx,
    ScatterIndx=ScatterIndx,
    ExptData=ExptData,
    RoutingData=RoutingData,
    routing=routes,
)
swiglu = SimpleNamespace(swiglu_fn=swiglu_fn)
matmul_ogs = SimpleNamespace(
    matmul_ogs=matmul_ogs,
    FnSpecs=FnSpecs,
    FusedActivation=FusedActivation,
    PrecisionConfig=PrecisionConfig,
    FlexCtx=FlexCtx,
    InFlexData=InFlexData,
)
