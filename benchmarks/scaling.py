"""Which way to share experts among processes: the tables of docs/scaling.md, from a model.

``--write`` puts them into that file. `scaling_model` has the formulas. One table is measured, and
shows what processes cost on one machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import scaling_model as model
from benchmarks.scaling_model import (
    DATA,
    FABRICS,
    LAYERS,
    MODELS,
    NETWORK,
    NVLINK,
    ONE,
    PCIE,
    RANKS,
    TOKENS,
    Fabric,
)

DOCUMENT = Path(__file__).parent.parent / "docs/scaling.md"
MEASURED = Path(__file__).parent / "results/distributed-epyc-2-threads.json"
SHOWN = (1, 8, 32, 128, 512, 2048, 8192)
KINDS = ("EP", "TP", "both", "all-to-all")  # the simplest first
NEAR = 1.05  # what is at most so much slower than the fastest counts as equally fast
SKEWS = (0.0, 0.5, 1.0)
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)
_TERA, _GIGA = 1e6, 1e3  # a second, in the model's microseconds


def constants() -> str:
    """What the model takes from elsewhere, and what it assumes."""
    h100, assumed = "NVIDIA's data sheet of the H100 SXM", "assumption"
    tuning = "NCCL, `src/graph/tuning.cc`"
    rows = [
        ("memory", f"{model.MEMORY / _TERA / model.MEMORY_SHARE:.2f} TB/s", h100),
        ("of which kernels reach", f"{100 * model.MEMORY_SHARE:.0f} %", assumed),
        ("bfloat16, dense", f"{model.BFLOAT16 / _TERA / model.COMPUTE_SHARE:.0f} TFLOPS", h100),
        ("of which kernels reach", f"{100 * model.COMPUTE_SHARE:.0f} %", assumed),
        ("a kernel's launch in a CUDA graph", f"{model.LAUNCH:.0f} µs", assumed),
        ("launches of a layer's experts", str(model.LAUNCHES), "architecture.md"),
        ("rows of a tile", str(model.TILE), "`ops/tiles/`"),
        ("NVLink 4, one direction", _rate(NVLINK), h100),
        ("PCIe 5.0 of 16 lanes, one direction", _rate(PCIE), h100),
        ("network, of each card", _rate(NETWORK), "400 Gb/s"),
        ("of which collectives reach", f"{100 * model.LINK_SHARE:.0f} %", assumed),
        (
            "of which is data: LL, LL128, Simple",
            ", ".join(f"{100 * d:.0f} %" for d in DATA),
            "NCCL",
        ),
        ("a collective's start, ring", _latencies(model.BASE["ring"]), tuning),
        ("a step of a ring: NVLink", _latencies(NVLINK.ring), tuning),
        ("a step of a ring: PCIe", _latencies(PCIE.ring), tuning),
        ("a step of a ring: network", _latencies(NETWORK.ring), tuning),
        ("all-to-all: each peer", f"{model.PEER} µs", assumed),
        ("all-to-all: the host reads sizes", f"{model.SYNC:.0f} µs", assumed),
        ("context of a decoded token", str(model.CONTEXT), assumed),
    ]
    return _table(("constant", "value", "from"), rows)


def wire() -> str:
    """Bytes that a rank sends for each token of the batch."""
    names = ", ".join(f"{name} ({count} layers)" for name, count in LAYERS.items())
    rows = []
    for ranks in RANKS:
        reduced, exchanged = (
            model.wire_bytes(kind, ranks) / 1e3 for kind in ("all-reduce", "all-to-all")
        )
        sums = " / ".join(f"{reduced * n:.0f}, {exchanged * n:.0f}" for n in LAYERS.values())
        rows.append((str(ranks), f"{reduced:.2f}", f"{exchanged:.2f}", sums))
    head = ("ranks", "all-reduce, kB a layer", "all-to-all, kB a layer", f"both, kB: {names}")
    return _table(head, rows)


def eight() -> str:
    """Each kind of layout on eight ranks with NVLink."""
    rows = []
    for name, experts in MODELS.items():
        for tokens in SHOWN:
            one = model.layer_time(None, experts, tokens, ONE)
            found = model.best(FABRICS[0], experts, tokens, 8)
            times = [f"{found[kind]:.0f}" for kind in KINDS]
            rows.append((name, str(tokens), f"{one:.0f}", *times))
    return _table(("model", "T", "one card", *KINDS), rows)


def times(name: str) -> Callable[[], str]:
    """A function for the fastest layout of one model everywhere, in microseconds."""

    def made() -> str:
        one = [model.layer_time(None, MODELS[name], tokens, ONE) for tokens in SHOWN]
        rows = [("one card", "1", *(f"{time:.0f}" for time in one))]
        for fabric, ranks in places():
            cells = []
            for tokens in SHOWN:
                found = model.best(fabric, MODELS[name], tokens, ranks)
                kind = simplest(found)
                cells.append(f"{found[kind]:.0f} {kind}")
            rows.append((fabric.name, str(ranks), *cells))
        return _table(("link", "W", *(f"T = {tokens}" for tokens in SHOWN)), rows)

    return made


def wins() -> str:
    """Up to how many tokens each layout is the one to take."""
    rows = []
    for fabric, ranks in places():
        cells = []
        for experts in MODELS.values():
            kinds = [simplest(model.best(fabric, experts, t, ranks)) for t in TOKENS]
            lasts = [
                f"{kind} to {tokens}"
                for kind, after, tokens in zip(kinds, kinds[1:], TOKENS, strict=False)
                if kind != after
            ]
            cells.append(", ".join([*lasts, f"then {kinds[-1]}" if lasts else kinds[-1]]))
        rows.append((fabric.name, str(ranks), *cells))
    return _table(("link", "W", *MODELS), rows)


def skewed() -> str:
    """What popular experts cost each layout: gpt-oss-120b, eight ranks, NVLink and network."""
    rows = []
    experts = MODELS["gpt-oss-120b"]
    for skew in SKEWS:
        for tokens in (8, 128, 2048, 8192):
            share = model.busiest(experts, tokens, 8, skew)
            cells = [
                f"{model.best(fabric, experts, tokens, 8, skew)[kind]:.0f}"
                for fabric in (FABRICS[0], FABRICS[2])
                for kind in ("TP", "EP", "all-to-all")
            ]
            rows.append((f"{skew:.1f}", str(tokens), f"{share:.2f}", *cells))
    head = ("skew", "T", "busiest rank", *("TP, NVLink", "EP", "all-to-all"))
    return _table((*head, "TP, 400 Gb/s", "EP", "all-to-all"), rows)


def whole_layers() -> str:
    """Attention beside the experts: for the whole batch on each rank, or for its part only."""
    rows = []
    for fabric in (FABRICS[0], FABRICS[2]):
        for ranks in (2, 8):
            for tokens in SHOWN:
                found = model.best(fabric, MODELS["gpt-oss-120b"], tokens, ranks)
                exchanged = found.pop("all-to-all")
                whole, part = (model.attention_time(t) for t in (tokens, tokens / ranks))
                reduced = min(found.values())
                cells = (reduced, whole, exchanged, part, reduced + whole, exchanged + part)
                rows.append((fabric.name, str(ranks), str(tokens), *(f"{c:.0f}" for c in cells)))
    head = ("experts, all-reduce", "attention, replicated", "experts, all-to-all")
    return _table(("link", "W", "T", *head, "attention, split", "sum", "sum, split"), rows)


def symmetric() -> str:
    """What one step on symmetric memory saves of a layer."""
    rows = []
    for ranks in (2, 4, 8):
        for tokens in (1, 8, 32, 128):
            found = model.one_shot(FABRICS[0], ranks, tokens)
            layer = min(model.best(FABRICS[0], MODELS["gpt-oss-120b"], tokens, ranks).values())
            layer += model.attention_time(tokens)
            saved, out = found.nccl - found.direct, found.copied - found.direct
            cells = (f"{time:.1f}" for time in found)
            parts = (f"{100 * saved / layer:.0f} %", f"{100 * out / layer:.0f} %")
            rows.append((str(ranks), str(tokens), *cells, f"{layer:.0f}", *parts))
    head = ("NCCL", "one step, copied", "one step, out variant", "layer")
    return _table(("W", "T", *head, "saved of it", "by the out variant alone"), rows)


def measured() -> str:
    """Two processes of one machine beside one: the stored run of ``benchmarks.distributed``."""
    rows = []
    for run in json.loads(MEASURED.read_text("utf-8"))["runs"]:
        sent, expected = (run[f"{kind}_per_token"] / 1e3 for kind in ("sent", "expected"))
        held, touched = (run[f"{kind}_bytes"] / 2**20 for kind in ("experts", "mapped"))
        speeds = ("-" if v is None else f"{v:.0f}" for v in (run["prefill"], run["decode"]))
        memory = (f"{held:.1f}", f"{touched:.1f}", f"{run['peak_bytes'] / 2**20:.0f}")
        swizzles = f"{run['swizzles']['first']}, {run['swizzles']['again']}"
        sums = (f"{sent:.2f}", f"{expected:.2f}", swizzles)
        rows.append((run["way"], str(run["ranks"]), *speeds, *sums, *memory))
    head = ("way", "ranks", "prefill, tokens/s", "decode, tokens/s", "sent a token, kB")
    more = ("by the model", "swizzles, again", "experts, MiB", "of files touched", "peak")
    return _table((*head, *more), rows)


TABLES: dict[str, Callable[[], str]] = {
    "constants": constants,
    "wins": wins,
    "times-20b": times("gpt-oss-20b"),
    "times-120b": times("gpt-oss-120b"),
    "eight": eight,
    "wire": wire,
    "skewed": skewed,
    "layers": whole_layers,
    "symmetric": symmetric,
    "measured": measured,
}


def places() -> Iterable[tuple[Fabric, int]]:
    """Where the tables look: each link with the numbers of ranks that it joins."""
    for fabric in FABRICS:
        smallest = 2 * fabric.host if fabric.host < 64 and fabric.inside != fabric.between else 2
        smallest = 2 if fabric.most == fabric.host else smallest
        yield from ((fabric, ranks) for ranks in RANKS if smallest <= ranks <= fabric.most)


def simplest(found: dict[str, float]) -> str:
    """The first of KINDS that is about as fast as the fastest."""
    limit = min(found.values()) * NEAR
    return next(kind for kind in KINDS if found.get(kind, limit + 1) <= limit)


def filled(text: str) -> str:
    """The document with every table made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


def _rate(link: model.Link) -> str:
    return f"{link.rate / model.LINK_SHARE / _GIGA:.0f} GB/s"


def _latencies(latencies: tuple[float, ...]) -> str:
    return ", ".join(map(str, latencies)) + " µs"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8")), "utf-8")
    else:
        for name, made in TABLES.items():
            print(f"{name}\n\n{made()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
