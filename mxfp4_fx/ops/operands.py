"""The operands of ``matmul_ogs``, made from a call's flat arguments, and the checks of routing's.

Torch needs flat schemas. ``operands_of`` makes operands from the flat arguments once a call, for
every implementation, the backward and the fake impl. They are tuples, because no other immutable
class is as cheap to build. Shape letters as in ``reference.py``; N' is N, or N/2 with a
gated activation.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, LAYOUTS

# The constants of GPT-OSS's SwiGLU.
ALPHA, LIMIT, UP_OFFSET = 1.702, 7.0, 1.0
# Activation -> whether it makes one column of two: of gate and up.
ACTIVATIONS = {"swiglu": True, "geglu_tanh": True, "relu2": False}


class Weight(NamedTuple):
    """The MXFP4 matrices [N, K] of E experts, and their biases.

    Attributes:
        blocks, scales: uint8, of ``LAYOUTS[layout].shapes(n, k)`` behind an axis of E.
        bias: [E, N] float, or None for no bias.
        n, k, experts: N, K and E. Layouts may pad N, so it does not follow from the blocks.
        layout: a key of ``layouts.LAYOUTS``.
    """

    blocks: Tensor
    scales: Tensor
    bias: Tensor | None
    n: int
    k: int
    experts: int
    layout: str


class Rows(NamedTuple):
    """The R routed rows: their experts, their inputs and the places of their results.

    Attributes:
        offsets: [E+1] int32; expert e has the rows ``offsets[e]:offsets[e+1]``. Rows from
            ``offsets[E]`` on belong to experts that are not held here, and their results are zero.
        gather: [R] int32, the row of x that each row reads, or None: row r reads ``x[r]``.
        scatter: [R] int32, the slot of each result, or None: results stay in the rows' order. With
            it the A slots of a token are summed.
        gammas: [R] float32, the factor of each result, or None.
        per_token: A; it matters only with ``scatter``.
        total: R.
    """

    offsets: Tensor
    gather: Tensor | None
    scatter: Tensor | None
    gammas: Tensor | None
    per_token: int
    total: int


class Activation(NamedTuple):
    """The activation after the bias; ``reference.activate`` defines it.

    Attributes:
        kind: a key of :data:`ACTIVATIONS`. Of a gated one, the gate is in the even columns and up
            in the odd.
        alpha: the gate's factor in the sigmoid of ``"swiglu"``.
        limit: gate is at most this, and up between minus this and this; of a gated activation.
        up_offset: what is added to up; of a gated activation.
    """

    kind: str
    alpha: float = ALPHA
    limit: float = LIMIT
    up_offset: float = UP_OFFSET

    @property
    def is_gated(self) -> bool:
        return ACTIVATIONS[self.kind]


def columns(n: int, activation: Activation | None) -> int:
    """Return N': the columns that an activation makes of N."""
    return n // 2 if activation is not None and activation.is_gated else n


def result_shape(weight: Weight, rows: Rows, activation: Activation | None) -> tuple[int, int]:
    """Return the shape of the op's result: [T, N'] with a scatter, otherwise [R, N']."""
    height = rows.total if rows.scatter is None else rows.total // rows.per_token
    return height, columns(weight.n, activation)


def rows_and_k(x: Tensor) -> tuple[int, int]:
    """Return the shape of x.

    Raises:
        TypeError: the dtype of x is none of ``hardware.DTYPES``.
        ValueError: x is not [rows, K] with K a multiple of the block.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"mxfp4::matmul_ogs: x must be float32, bfloat16 or float16, not {x.dtype}")
    shape = x.shape
    if len(shape) != 2 or shape[1] % BLOCK:
        raise ValueError(
            f"mxfp4::matmul_ogs: x must be [rows, K] with K a multiple of {BLOCK}; it is "
            f"{tuple(shape)}"
        )
    return shape[0], shape[1]


def make_weight(
    blocks: Tensor, scales: Tensor, bias: Tensor | None, n: int, k: int, layout: str
) -> Weight:
    """Return a weight for rows of K values; E is the length of ``blocks``.

    Raises:
        ValueError: there is no such layout, or blocks, scales or bias do not have the shapes that
            follow from E, N and K.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"mxfp4::matmul_ogs: layout={layout!r} is not one of {list(LAYOUTS)}")
    shape, scales_shape = blocks.shape, scales.shape
    experts = shape[0] if shape else 0
    one_blocks, one_scales = LAYOUTS[layout].shapes(n, k)
    wanted, scales_wanted = (experts, *one_blocks), (experts, *one_scales)
    if n < 0 or shape != wanted or scales_shape != scales_wanted:
        raise ValueError(
            f"mxfp4::matmul_ogs: for E={experts}, n={n} and K={k}, layout {layout!r} wants blocks "
            f"{wanted} and scales {scales_wanted}; they are {tuple(shape)} and "
            f"{tuple(scales_shape)}"
        )
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(
            f"mxfp4::matmul_ogs: bias must be None or [E, N] = {(experts, n)}; it is "
            f"{tuple(bias.shape)}"
        )
    return Weight(blocks, scales, bias, n, k, experts, layout)


def make_rows(
    offsets: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    gammas: Tensor | None,
    per_token: int,
    x_rows: int,
    experts: int,
) -> Rows:
    """Return the rows of an x with ``x_rows`` rows. The values of indices are not checked.

    Raises:
        ValueError: offsets, scatter or gammas do not have the lengths that follow from E and R, or
            A does not divide R.
    """
    if offsets.shape != (experts + 1,):
        raise ValueError(
            f"mxfp4::matmul_ogs: expert_offsets must be [E+1] = ({experts + 1},); it is "
            f"{tuple(offsets.shape)}"
        )
    total = x_rows if gather is None else gather.shape[0]
    if scatter is not None:
        _check_length("scatter_index", scatter, total)
        if per_token < 1 or total % per_token:
            raise ValueError(
                f"mxfp4::matmul_ogs: experts_per_token={per_token} does not divide R={total}"
            )
    if gammas is not None:
        _check_length("gammas", gammas, total)
    return Rows(offsets, gather, scatter, gammas, per_token, total)


def make_activation(
    kind: str, alpha: float, limit: float, up_offset: float, n: int
) -> Activation | None:
    """Return the activation of that name; None for ``"none"``.

    Raises:
        ValueError: there is no such activation, or it is gated and N is odd.
    """
    if kind == "none":
        return None
    if kind not in ACTIVATIONS:
        raise ValueError(
            f"mxfp4::matmul_ogs: activation={kind!r} is not one of {['none', *ACTIVATIONS]}"
        )
    if ACTIVATIONS[kind] and n % 2:
        raise ValueError(
            f"mxfp4::matmul_ogs: activation={kind!r} wants an even N, for gate and up alternate; "
            f"N is {n}"
        )
    return Activation(kind, alpha, limit, up_offset)


def _check_length(name: str, rows: Tensor, total: int) -> None:
    if rows.shape != (total,):
        raise ValueError(
            f"mxfp4::matmul_ogs: {name} must be [R] = ({total},); it is {tuple(rows.shape)}"
        )


def operands_of(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    expert_offsets: Tensor,
    gather_index: Tensor | None = None,
    scatter_index: Tensor | None = None,
    gammas: Tensor | None = None,
    experts_per_token: int = 1,
    activation: str = "none",
    alpha: float = ALPHA,
    limit: float = LIMIT,
    up_offset: float = UP_OFFSET,
    layout: str = CHECKPOINT_ORDER,
    kernels: str = "reference",
) -> tuple[Tensor, Weight, Rows, Activation | None, str]:
    """Make the operands of ``matmul_ogs`` from the op's arguments, and check them.

    Args:
        x: [T, K] with ``gather_index``, else [R, K]; float32, bfloat16 or float16.
        blocks, scales, bias, n, layout: see :class:`Weight`. ``n`` is the weight's N, before
            a gated activation halves it. It is an argument because layouts may pad N and a bias may
            be absent.
        expert_offsets, gather_index, scatter_index, gammas, experts_per_token: see
            :class:`Rows`.
        activation, alpha, limit, up_offset: see :class:`Activation`; ``"none"`` for none.
        kernels: a key of ``schemas.KERNELS``.

    Returns:
        The arguments of an implementation of ``matmul_ogs``, and ``kernels``.

    Raises:
        TypeError, ValueError: an operand has a wrong dtype, shape or value; the message names it.
    """
    x_rows, k = rows_and_k(x)
    weight = make_weight(blocks, scales, bias, n, k, layout)
    rows = make_rows(
        expert_offsets,
        gather_index,
        scatter_index,
        gammas,
        experts_per_token,
        x_rows,
        weight.experts,
    )
    act = make_activation(activation, alpha, limit, up_offset, n)
    return x, weight, rows, act, kernels


def check_routing(logits: Tensor, top_k: int, num_experts: int | None) -> int:
    """Check the operands of ``routing``; return how many experts are held here.

    Raises:
        ValueError: shapes or numbers do not fit.
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"mxfp4::routing: logits must be [T, E] with 1 <= top_k <= E; "
            f"they are {tuple(logits.shape)} with top_k={top_k}"
        )
    held = logits.shape[1] if num_experts is None else num_experts
    if held < 0:
        raise ValueError(f"mxfp4::routing: num_experts is negative: {held}")
    return held


def check_routes(indices: Tensor, weights: Tensor, num_experts: int) -> None:
    """Check the operands of ``routing.routes``; see ``reference.routing_from_routes``.

    Raises:
        ValueError: shapes do not fit.
    """
    if num_experts < 0:
        raise ValueError(f"mxfp4::routing.routes: num_experts is negative: {num_experts}")
    if indices.ndim != 2 or indices.shape != weights.shape:
        raise ValueError(
            "mxfp4::routing.routes: indices and weights must both be [T, A]; "
            f"they are {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
