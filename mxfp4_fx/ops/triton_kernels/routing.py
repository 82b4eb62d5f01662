"""Routing: top-k, softmax, and a stable counting sort of the routes by expert.

A *block* is BT tokens, or S = BT * AP slots with AP the power of 2 from A up. Each block's experts
are decided and counted; a slot's place is then the number of slots before it: those of smaller
experts, of its own expert in earlier blocks, and of its own expert earlier in its block. Few
tokens are one program's work (``routing_kernel``), many take three launches.

Shape letters: T tokens, E experts, A experts per token, R = T A slots. GROUPS: a power of 2 from
the number of groups up: the experts, and with GIVEN routes group E, whose rows belong to others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import exponential

_TAKEN = tl.constexpr(-(1 << 63))  # below every key


@triton.jit
def _choose_experts(
    logits, stride, tokens, block, experts,
    A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Top-k of a block: experts and softmax weights [BT, AP]. Of equal logits the first is taken.

    Logits become integers in the same order, NaN the largest as in ``torch.topk``, above 32 bits
    for the expert: one maximum then finds the value and where it is.
    """
    t = block * BT + tl.arange(0, BT)
    expert = tl.arange(0, GROUPS)
    exists = (t < tokens)[:, None] & (expert < experts)[None, :]
    row = logits + t.to(tl.int64)[:, None] * stride
    value = tl.load(row + expert[None, :], mask=exists, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = (order.to(tl.int64) << 32) | (GROUPS - 1 - expert).to(tl.int64)[None, :]
    key = tl.where(exists, key, _TAKEN)
    choice = tl.arange(0, AP)[None, :]
    best = tl.full((BT, AP), _TAKEN, tl.int64)
    for a in range(A):
        largest = tl.max(key, 1)[:, None]
        best = tl.where(choice == a, largest, best)
        key = tl.where(key == largest, _TAKEN, key)
    order = (best >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where(choice < A, value, float("-inf"))
    largest = tl.sum(tl.where(choice == 0, value, 0.0), 1)[:, None]
    power = tl.where(choice < A, exponential(value - largest), 0.0)
    weight = tl.div_rn(power, tl.broadcast_to(tl.sum(power, 1)[:, None], (BT, AP)))
    return GROUPS - 1 - (best & 0xFFFFFFFF).to(tl.int32), weight


@triton.jit
def _read_routes(
    indices, weights, tokens, block, experts, first_expert,
    A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Given experts and weights [BT, AP] of a block; group E and weight 0 for those of others."""
    t = (block * BT + tl.arange(0, BT))[:, None]
    a = tl.arange(0, AP)[None, :]
    exists = (t < tokens) & (a < A)
    slot = t.to(tl.int64) * A + a
    expert = tl.load(indices + slot, mask=exists, other=0).to(tl.int64) - first_expert
    weight = tl.load(weights + slot, mask=exists, other=0.0).to(tl.float32)
    is_here = (expert >= 0) & (expert < experts)
    return tl.where(is_here, expert, experts).to(tl.int32), tl.where(is_here, weight, 0.0)


@triton.jit
def _slots(block, tokens, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr):
    """A block's slots [S], and which of them exist."""
    s = tl.arange(0, BT * AP)
    t = block * BT + s // AP
    return t * A + s % AP, (t < tokens) & (s % AP < A)


@triton.jit
def _decide(
    source, stride, given_weights, slot_expert, slot_weight, tokens, block, experts, first_expert,
    GIVEN: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Decide a block's routes, note them by slot, and count them by group: [GROUPS]."""
    if GIVEN:
        expert, weight = _read_routes(
            source, given_weights, tokens, block, experts, first_expert, A, AP, BT
        )
    else:
        expert, weight = _choose_experts(source, stride, tokens, block, experts, A, AP, BT, GROUPS)
    slot, exists = _slots(block, tokens, A, AP, BT)
    expert, weight = expert.reshape(BT * AP), weight.reshape(BT * AP)
    tl.store(slot_expert + slot, expert, mask=exists)
    tl.store(slot_weight + slot, weight, mask=exists)
    is_group = (expert[:, None] == tl.arange(0, GROUPS)[None, :]) & exists[:, None]
    return tl.sum(is_group.to(tl.int32), 0)


@triton.jit
def _place(
    slot_expert, slot_weight, gammas, gather_index, scatter_index, before, tokens, block,
    A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write a block's routes to their places, ``before`` [GROUPS] being the first of each group.

    Returns the first places for the next block.
    """
    slot, exists = _slots(block, tokens, A, AP, BT)
    expert = tl.load(slot_expert + slot, mask=exists, other=GROUPS)
    weight = tl.load(slot_weight + slot, mask=exists, other=0.0)
    is_group = (expert[:, None] == tl.arange(0, GROUPS)[None, :]).to(tl.int32)
    up_to_here = tl.cumsum(is_group, 0)
    place = tl.sum(is_group * (before[None, :] + up_to_here - 1), 1)
    tl.store(gammas + place, weight, mask=exists)
    tl.store(gather_index + place, slot // A, mask=exists)
    tl.store(scatter_index + place, slot, mask=exists)
    return before + tl.sum(is_group, 0)


@triton.jit
def _first_places(counts, expert_offsets, tokens, experts, A: tl.constexpr, GROUPS: tl.constexpr):
    """The first place of each group, from all counts [GROUPS]; stored too, as the offsets."""
    group = tl.arange(0, GROUPS)
    first = tl.cumsum(counts, 0) - counts
    if expert_offsets is not None:
        tl.store(expert_offsets + group, first, mask=group < experts)
        here = tl.sum(tl.where(group < experts, counts, 0), 0)
        tl.store(expert_offsets + experts, here)
    return first


@triton.jit(do_not_specialize=["tokens", "first_expert"])
def routing_kernel(
    source, stride, given_weights, slot_expert, slot_weight,
    gammas, gather_index, scatter_index, expert_offsets,
    tokens, experts, first_expert,
    GIVEN: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """All of routing in one program. Grid: (1,).

    Args:
        source: logits [T, E], rows ``stride`` apart; or with GIVEN expert ids [T, A].
        given_weights: [T, A], or None.
        slot_expert, slot_weight: room for [R] int32 and [R] float32.
        gammas, gather_index, scatter_index, expert_offsets: results; [R] and [E + 1].
    """
    blocks = tl.cdiv(tokens, BT)
    counts = tl.zeros((GROUPS,), tl.int32)
    for block in range(blocks):
        counts += _decide(
            source, stride, given_weights, slot_expert, slot_weight, tokens, block, experts,
            first_expert, GIVEN, A, AP, BT, GROUPS,
        )  # fmt: skip
    tl.debug_barrier()  # notes of other threads are read from here on
    before = _first_places(counts, expert_offsets, tokens, experts, A, GROUPS)
    for block in range(blocks):
        before = _place(
            slot_expert, slot_weight, gammas, gather_index, scatter_index, before, tokens, block,
            A, AP, BT, GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "first_expert"])
def decide_kernel(
    source, stride, given_weights, slot_expert, slot_weight, block_counts,
    tokens, experts, first_expert,
    GIVEN: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """First of three launches: decide and count a block. ``block_counts``: [blocks, GROUPS]."""
    block = tl.program_id(0)
    counts = _decide(
        source, stride, given_weights, slot_expert, slot_weight, tokens, block, experts,
        first_expert, GIVEN, A, AP, BT, GROUPS,
    )  # fmt: skip
    tl.store(block_counts + block * GROUPS + tl.arange(0, GROUPS), counts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(block_counts, counts, blocks, BB: tl.constexpr, BG: tl.constexpr,
                GROUPS: tl.constexpr):  # fmt: skip
    """Second: in place, counts of each block become those of the blocks before it.

    ``counts`` [GROUPS] receives the sums over all blocks. Grid: (GROUPS / BG,).
    """
    group = (tl.program_id(0) * BG + tl.arange(0, BG))[None, :]
    running = tl.zeros((BG,), tl.int32)
    for start in range(0, blocks, BB):
        block = (start + tl.arange(0, BB))[:, None]
        at = block_counts + block * GROUPS + group
        tile = tl.load(at, mask=block < blocks, other=0)
        tl.store(at, running[None, :] + tl.cumsum(tile, 0) - tile, mask=block < blocks)
        running += tl.sum(tile, 0)
    tl.store(counts + tl.program_id(0) * BG + tl.arange(0, BG), running)


@triton.jit(do_not_specialize=["tokens"])
def place_kernel(
    slot_expert, slot_weight, blocks_before, counts,
    gammas, gather_index, scatter_index, expert_offsets, tokens, experts,
    A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Third: write a block's routes to their places."""
    block = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    # Every program writes the same offsets, which is cheaper than asking who should.
    first = _first_places(tl.load(counts + group), expert_offsets, tokens, experts, A, GROUPS)
    before = first + tl.load(blocks_before + block * GROUPS + group)
    _place(
        slot_expert, slot_weight, gammas, gather_index, scatter_index, before, tokens, block,
        A, AP, BT, GROUPS,
    )  # fmt: skip
