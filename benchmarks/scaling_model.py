"""Expert and tensor parallelism on machines that are not here: a model, no measurement.

``benchmarks/scaling.py`` makes the tables of docs/scaling.md from it.

Shape letters: T tokens of all ranks together, E experts, A experts per token, R = T*A routed rows,
H hidden, I intermediate, W ranks. Times are microseconds for the experts of one layer.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK

H = I = 2880  # noqa: E741
A = 4
MODELS = {"gpt-oss-20b": 32, "gpt-oss-120b": 128}  # experts: the models' config.json
LAYERS = {"gpt-oss-20b": 24, "gpt-oss-120b": 36}
TOKENS = tuple(2**power for power in range(14))
RANKS = (2, 4, 8, 16, 32, 64)
FLOAT = 2  # bytes of bfloat16
BLOCKS = I // BLOCK
EXPERT_BYTES = 3 * H * I * (BYTES_PER_BLOCK + 1) // BLOCK

# One card, the same for every link. Peaks: NVIDIA's data sheet of the H100 SXM.
MEMORY_SHARE, COMPUTE_SHARE, LINK_SHARE = 0.8, 0.6, 0.8  # what programs reach: assumptions
MEMORY = 3.35e6 * MEMORY_SHARE  # bytes a microsecond
BFLOAT16 = 989e6 * COMPUTE_SHARE  # operations a microsecond, dense
TILE = 16  # rows of a tile, to which an expert's rows are rounded up: this program's narrowest
LAUNCH = 2.0  # of a kernel in a CUDA graph: an assumption
LAUNCHES = 4  # routing, two matmuls, the sum over a token's rows: docs/architecture.md
SYNC = 20.0  # the host reads sizes from the card: an assumption
PEER = 0.5  # of all-to-all, for each peer: an assumption

# Attention beside the experts: GPT-OSS's config.json.
ATTENTION_BYTES = FLOAT * H * (2 * 64 * 64 + 2 * 8 * 64)  # q and o of 64 heads, k and v of 8
CONTEXT, WINDOW = 1024, 128  # tokens behind each decoded one (an assumption); every other layer
KEY_VALUE_BYTES = FLOAT * 2 * 8 * 64

PROTOCOLS = ("LL", "LL128", "Simple")
# Of what a link carries, the part that is data: LL has 4 bytes of flags for 4 of data, LL128 8 of
# 128. Latencies (baseLat, hwLat) and formulas are those of NCCL's src/graph/tuning.cc.
DATA = (1 / 2, 120 / 128, 1.0)
BASE = {"tree": (6.8, 14.0, 8.4), "ring": (6.6, 14.0, 8.4)}


class Link(NamedTuple):
    """One direction of a rank's connection: bytes a microsecond, and latencies by protocol."""

    rate: float
    ring: tuple[float, float, float]
    tree: tuple[float, float, float]


# Half of the data sheet's rates, which add both directions.
NVLINK = Link(450e3 * LINK_SHARE, ring=(0.6, 1.9, 3.4), tree=(0.6, 1.25, 4.0))
PCIE = Link(64e3 * LINK_SHARE, ring=(1.0, 2.5, 5.7), tree=(1.0, 1.9, 4.0))  # 5.0, 16 lanes
NETWORK = Link(50e3 * LINK_SHARE, ring=(2.7, 4.0, 14.0), tree=(5.0, 8.5, 14.0))  # 400 Gb/s a card


class Fabric(NamedTuple):
    """What joins the ranks: ``inside`` a host of at most ``host`` ranks, and ``between`` hosts."""

    name: str
    inside: Link
    between: Link
    host: int
    most: int = max(RANKS)


FABRICS = (
    Fabric("NVLink", NVLINK, NETWORK, host=64),
    Fabric("PCIe 5.0", PCIE, NETWORK, host=8, most=8),
    Fabric("400 Gb/s", NETWORK, NETWORK, host=1),
    Fabric("NVLink in eights, 400 Gb/s between", NVLINK, NETWORK, host=8),
)


class Layout(NamedTuple):
    """How W ranks share the experts: in ``groups``, which hold other ones, each cut in ``cuts``."""

    groups: int
    cuts: int
    disjoint: bool = False  # each rank has its own part of the batch: all-to-all

    @property
    def ranks(self) -> int:
        return self.groups * self.cuts


ONE = Layout(1, 1)


def layouts(ranks: int, experts: int) -> dict[str, list[Layout]]:
    """The layouts of each kind that there are for so many ranks."""
    both = [Layout(ranks // cuts, cuts) for cuts in RANKS if cuts < ranks]
    found = {
        "TP": [Layout(1, ranks)],
        "EP": [Layout(ranks, 1)],
        "both": [layout for layout in both if layout.groups <= experts],
        "all-to-all": [Layout(ranks, 1, disjoint=True)],
    }
    if ranks > experts:
        del found["EP"], found["all-to-all"]
    return {kind: some for kind, some in found.items() if some}


@functools.cache
def rows_of(experts: int, tokens: int, skew: float = 0.0) -> Any:
    """Rows of each expert, [samples, E], where routers choose A of E experts for each token.

    Expert number k of a random order is chosen in proportion to (k + 1) ** -skew.
    """
    # RandomState, because its numbers never change: the tables are compared with docs/scaling.md.
    random = np.random.RandomState(experts + tokens)
    samples = max(2, min(256, 4096 // tokens))
    weight = -skew * np.log(np.arange(1, experts + 1))
    found = np.zeros((samples, experts), dtype=np.int64)
    for sample in found:
        order = random.permutation(experts)
        uniform = random.random_sample((tokens, experts))
        keys = weight[order] - np.log(-np.log(uniform + 1e-300))  # Gumbel: choice without repeats
        chosen = np.argpartition(keys, experts - A, axis=1)[:, experts - A :]
        sample += np.bincount(chosen.reshape(-1), minlength=experts)
    return found


def busiest(experts: int, tokens: int, ranks: int, skew: float = 0.0) -> float:
    """Rows of the rank that has most, divided by the mean of the ranks."""
    held = _by_group(rows_of(experts, tokens, skew), Layout(ranks, 1)).sum(-1)
    return float((held.max(-1) / held.mean(-1)).mean())


def experts_time(rows: Any, tokens: int, layout: Layout) -> Any:
    """Of each group of ranks, [samples, groups]: its slowest rank's time for its experts.

    The larger of two: for reading weights and activations, and for multiplying.
    """
    held = _by_group(rows, layout)
    cut = math.ceil(BLOCKS / layout.cuts) / BLOCKS  # the rank with most blocks
    mine = held.sum(-1)
    weights = (held > 0).sum(-1) * EXPERT_BYTES * cut
    # Gathered, written by SwiGLU, read again, written; then summed.
    moved = mine * (2 * H + 2 * I * cut) * FLOAT
    if layout.disjoint:
        moved = moved + tokens / layout.ranks * (A + 1) * H * FLOAT
    else:  # rows of others are stored as zeros, twice, and the sum reads all
        moved = moved + (tokens * A - mine) * (I * cut + H) * FLOAT
        moved = moved + tokens * (A + 1) * H * FLOAT
    tiles = np.ceil(held / TILE).sum(-1) * TILE
    multiplied = 2 * 3 * H * I * cut * tiles
    return np.maximum((weights + moved) / MEMORY, multiplied / BFLOAT16) + LAUNCHES * LAUNCH


def _by_group(rows: Any, layout: Layout) -> Any:
    """[samples, groups, experts of a group]; groups hold equally many, or some one fewer."""
    groups = np.array_split(np.arange(rows.shape[1]), layout.groups)
    held = np.zeros((len(rows), layout.groups, len(groups[0])), dtype=rows.dtype)
    for at, group in enumerate(groups):
        held[:, at, : len(group)] = rows[:, group]
    return held


def all_reduce(fabric: Fabric, ranks: int, size: float) -> float:
    """NCCL's own estimate: the fastest of its trees and rings, in each of three protocols."""
    hosts = math.ceil(ranks / fabric.host)
    links = min(fabric.host, ranks)
    rate = fabric.inside.rate if hosts == 1 else fabric.between.rate * links
    rate = min(rate, fabric.inside.rate) if links > 1 else rate
    steps, outer = 2 * (ranks - 1), 2 * (hosts - 1)
    times = []
    for at in range(len(PROTOCOLS)):
        ring = BASE["ring"][at] + (steps - outer) * fabric.inside.ring[at]
        ring += outer * fabric.between.ring[at]
        tree = BASE["tree"][at] + 2 * (links - 1) * fabric.inside.tree[at]
        tree += 2 * math.log2(hosts) * fabric.between.tree[at]
        moving = size / (rate * DATA[at])
        times += [ring + moving * steps / ranks, tree + moving * 2]
    return min(times)


def all_to_all(fabric: Fabric, ranks: int, size: float) -> float:
    """One exchange: the busiest rank sends or receives ``size`` bytes, its own rows included."""
    links = min(fabric.host, ranks)
    parts = [(links - 1, fabric.inside), (ranks - links, fabric.between)]
    parts = [(peers, link) for peers, link in parts if peers]
    times = []
    for at in range(len(PROTOCOLS)):
        hop = max(link.ring[at] for _, link in parts)
        moving = max(size * peers / ranks / (link.rate * DATA[at]) for peers, link in parts)
        times.append(BASE["ring"][at] + hop + moving)
    return min(times) + (ranks - 1) * PEER


def wire_bytes(kind: str, ranks: int) -> float:
    """Bytes that a rank sends for a token of the batch, in one layer: all-reduce or all-to-all."""
    if kind == "all-to-all":
        return 2 * A * (ranks - 1) / ranks**2 * H * FLOAT
    return 2 * (ranks - 1) / ranks * H * FLOAT


def layer_time(
    fabric: Fabric | None, experts: int, tokens: int, layout: Layout, skew: float = 0.0
) -> float:
    """One layer's experts, with the collectives; the mean over samples of the slowest rank."""
    rows = rows_of(experts, tokens, skew)
    computing = experts_time(rows, tokens, layout)
    if fabric is None or layout.ranks == 1:
        return float(computing.max(-1).mean())
    ranks = layout.ranks
    if not layout.disjoint:
        return float(computing.max(-1).mean()) + all_reduce(fabric, ranks, tokens * H * FLOAT)
    received = _by_group(rows, layout).sum(-1).max(-1)
    sent = math.ceil(tokens / ranks) * A
    sizes = np.maximum(received, sent) * H * FLOAT
    moving = np.mean([all_to_all(fabric, ranks, size) for size in sizes])
    counting = all_to_all(fabric, ranks, 8 * ranks) + SYNC  # how many rows each is to get
    return float(computing.max(-1).mean() + 2 * moving + counting)


def best(
    fabric: Fabric, experts: int, tokens: int, ranks: int, skew: float = 0.0
) -> dict[str, float]:
    """The time of each kind of layout; of ``both``, that of the best cut."""
    return {
        kind: min(layer_time(fabric, experts, tokens, layout, skew) for layout in some)
        for kind, some in layouts(ranks, experts).items()
    }


def attention_time(tokens: float) -> float:
    """Reading a layer's attention weights, and the keys and values of so many sequences."""
    context = (CONTEXT + min(CONTEXT, WINDOW)) / 2
    read = ATTENTION_BYTES + tokens * context * KEY_VALUE_BYTES
    return max(read / MEMORY, tokens * ATTENTION_BYTES / BFLOAT16)  # 2 operations for 2 bytes


class OneShot(NamedTuple):
    """A layer's all-reduce of T tokens: by NCCL, and in one step on symmetric memory."""

    nccl: float
    copied: float  # the result is copied to symmetric memory first
    direct: float  # matmul_ogs has written it there


def one_shot(fabric: Fabric, ranks: int, tokens: int) -> OneShot:
    """Each rank reads all ranks' results and adds them: one kernel between two barriers."""
    size = tokens * H * FLOAT
    barriers = 2 * fabric.inside.ring[0]
    direct = LAUNCH + barriers + (ranks - 1) * size / fabric.inside.rate
    copied = direct + LAUNCH + 2 * size / MEMORY
    return OneShot(all_reduce(fabric, ranks, size), copied, direct)
