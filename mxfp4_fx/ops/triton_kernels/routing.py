"""Routing: top-k, softmax, and a stable counting sort of the routes by expert.

A *block* is BT tokens, or S = BT * AP slots; AP is the least power of 2 that is not below A. The
kernels decide each block's experts and count them. A slot's place is the number of slots before it:
those of smaller experts, of its own expert in earlier blocks, and of its own expert earlier in its
block. For few tokens one program does all of it (``routing_kernel``), for many there are three
launches.

Shape letters: T tokens, E experts, A experts per token, R = T A slots. GROUPS: a power of 2 that is
not below the number of groups, nor below the number of experts to choose from. The groups are the
experts that are held here, and group E for all others if there may be any.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import exponential

_TAKEN = tl.constexpr(-(1 << 63))  # below every key


@triton.jit
def _choose_experts(
    logits, stride, tokens, block, choices,
    A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Choose a block's top-k experts; return experts and softmax weights [BT, AP].

    Of equal logits the first is chosen. A key has 32 bits for the logit, as an integer of the same
    order (NaN is the largest, as in ``torch.topk``), above 32 bits for the expert. So one maximum
    finds both the largest logit and its expert.
    """
    t = block * BT + tl.arange(0, BT)
    expert = tl.arange(0, GROUPS)
    exists = (t < tokens)[:, None] & (expert < choices)[None, :]
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
    indices, weights, tokens, block,
    A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Read a block's given experts and weights [BT, AP]."""
    t = (block * BT + tl.arange(0, BT))[:, None]
    a = tl.arange(0, AP)[None, :]
    exists = (t < tokens) & (a < A)
    slot = t.to(tl.int64) * A + a
    expert = tl.load(indices + slot, mask=exists, other=0).to(tl.int64)
    return expert, tl.load(weights + slot, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _slots(block, tokens, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr):
    """Return a block's slots [S], and a mask of those that exist."""
    s = tl.arange(0, BT * AP)
    t = block * BT + s // AP
    return t * A + s % AP, (t < tokens) & (s % AP < A)


@triton.jit
def _decide(
    source, stride, given_weights, slot_expert, slot_weight, tokens, block,
    choices, experts, first_expert,
    GIVEN: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Decide a block's routes, store them by slot, and return their counts by group [GROUPS].

    Experts that are not held here become group E with weight 0.
    """
    if GIVEN:
        expert, weight = _read_routes(source, given_weights, tokens, block, A, AP, BT)
    else:
        expert, weight = _choose_experts(source, stride, tokens, block, choices, A, AP, BT, GROUPS)
    expert = expert.to(tl.int64) - first_expert
    is_here = (expert >= 0) & (expert < experts)
    expert, weight = tl.where(is_here, expert, experts).to(tl.int32), tl.where(is_here, weight, 0.0)
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
    """Write a block's routes to their places; ``before`` [GROUPS] has each group's first place.

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
    """Return each group's first place, from all counts [GROUPS], and store the expert offsets."""
    group = tl.arange(0, GROUPS)
    first = tl.cumsum(counts, 0) - counts
    if expert_offsets is not None:
        tl.store(expert_offsets + group, first, mask=group < experts)
        here = tl.sum(tl.where(group < experts, counts, 0), 0)
        tl.store(expert_offsets + experts, here)
    return first


@triton.jit(do_not_specialize=["tokens", "choices", "first_expert"])
def routing_kernel(
    source, stride, given_weights, slot_expert, slot_weight,
    gammas, gather_index, scatter_index, expert_offsets,
    tokens, choices, experts, first_expert,
    GIVEN: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Do all of routing in one program. Grid: (1,).

    Args:
        source: logits [T, choices] with rows ``stride`` apart, or expert ids [T, A] with GIVEN.
        given_weights: [T, A], or None.
        slot_expert, slot_weight: scratch memory, [R] int32 and [R] float32.
        gammas, gather_index, scatter_index, expert_offsets: the results, [R] and [E + 1].
    """
    blocks = tl.cdiv(tokens, BT)
    counts = tl.zeros((GROUPS,), tl.int32)
    for block in range(blocks):
        counts += _decide(
            source, stride, given_weights, slot_expert, slot_weight, tokens, block, choices,
            experts, first_expert, GIVEN, A, AP, BT, GROUPS,
        )  # fmt: skip
    tl.debug_barrier()  # below, threads read slot_expert and slot_weight of other threads
    before = _first_places(counts, expert_offsets, tokens, experts, A, GROUPS)
    for block in range(blocks):
        before = _place(
            slot_expert, slot_weight, gammas, gather_index, scatter_index, before, tokens, block,
            A, AP, BT, GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "choices", "first_expert"])
def decide_kernel(
    source, stride, given_weights, slot_expert, slot_weight, block_counts,
    tokens, choices, experts, first_expert,
    GIVEN: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Decide a block's routes and count them, the first of three launches.

    ``block_counts`` is [blocks, GROUPS]. Grid: (blocks,).
    """
    block = tl.program_id(0)
    counts = _decide(
        source, stride, given_weights, slot_expert, slot_weight, tokens, block, choices,
        experts, first_expert, GIVEN, A, AP, BT, GROUPS,
    )  # fmt: skip
    tl.store(block_counts + block * GROUPS + tl.arange(0, GROUPS), counts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(block_counts, counts, blocks, BB: tl.constexpr, BG: tl.constexpr,
                GROUPS: tl.constexpr):  # fmt: skip
    """Replace each block's counts by the sums over the blocks before it, the second launch.

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
    """Write a block's routes to their places, the third launch. Grid: (blocks,)."""
    block = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    # All programs store the same offsets, which is cheaper than choosing one of them.
    first = _first_places(tl.load(counts + group), expert_offsets, tokens, experts, A, GROUPS)
    before = first + tl.load(blocks_before + block * GROUPS + group)
    _place(
        slot_expert, slot_weight, gammas, gather_index, scatter_index, before, tokens, block,
        A, AP, BT, GROUPS,
    )  # fmt: skip
