"""Attention with sinks on a CPU: seconds and memory of one layer, as it is and in three ways.

    python -m benchmarks.attention --output build/attention.json
    python -m benchmarks.attention --tokens 64 --context 64 --rounds 1    # in seconds

The ways are transformers' eager attention, the same compiled without this package's op, and with
it. The layer has gpt-oss-20b's heads. A prompt's keys are its own; a token meets those of its
context, in caches that rotate, because other layers' weights and caches come between two calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import mxfp4_fx  # noqa: F401  (registers the backend)
from benchmarks import command, process_memory
from benchmarks.contenders import WrongResult
from benchmarks.machine import machine
from benchmarks.moe import relative_error
from benchmarks.timing import Clock, milliseconds, summary
from mxfp4_fx.core.errors import NoExpertsWarning

EAGER, COMPILED, OURS = WAYS = ("eager", "compiled", "ours")
HEADS, KEY_HEADS, SIZE, WINDOW = 64, 8, 64, 128
DTYPE = torch.bfloat16
_ROTATING = 256 << 20  # bytes of keys and values, more than any cache holds
_CHECKED = 16  # queries
# Logits of bfloat16 are rounded to 2^-9 of their size, and so are the weights.
_MOST_ERROR = 0.02

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A number of queries and of keys, and the kind of mask."""

    kind: str
    queries: int
    keys: int

    def mask(self) -> Tensor:
        """What transformers' masks add to the logits: [1, 1, Q, T]."""
        at = torch.arange(self.keys - self.queries, self.keys)[:, None]
        keys = torch.arange(self.keys)
        window = WINDOW if self.kind == "sliding" else self.keys
        is_seen = (keys <= at) & (keys > at - window)
        lowest = torch.tensor(torch.finfo(DTYPE).min, dtype=DTYPE)
        return torch.where(is_seen, torch.zeros((), dtype=DTYPE), lowest)[None, None]


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=command.numbers, default=(1024, 4096), help="of prompts (1024,4096)")
    add("--context", type=command.numbers, default=(4096,), help="of single tokens (4096)")
    add("--ways", type=command.names, default=WAYS, help=f"({','.join(WAYS)})")
    add("--rounds", type=int, default=3, help="that are measured (%(default)s)")
    add("--threads", type=int, default=2, help="(%(default)s)")
    add("--inner", default="inductor", help="what compiles graphs (%(default)s)")
    args = parser.parse_args(argv)
    log = command.start(args, clock)
    warnings.simplefilter("ignore", NoExpertsWarning)  # a layer's attention has none
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": machine(args.threads),
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "silent")},
        "attention": [],
    }
    cases = [Case("token", 1, keys) for keys in args.context]
    cases += [Case(kind, n, n) for n in args.tokens for kind in ("full", "sliding")]
    layers = {way: layer(way, args.inner) for way in args.ways}
    with torch.no_grad():
        for case in cases:
            log(f"{case.kind}: {case.queries} queries, {case.keys} keys")
            results["attention"].append(measure(case, layers, args, clock))
            command.write(args.output, results)
    command.finish(args, results, "\n".join(map(text, results["attention"])))
    return 0


def layer(way: str, inner: str) -> Layer:
    """Return one way to compute the attention of a layer, of query, key, value and mask."""
    module = types.SimpleNamespace(
        num_key_value_groups=HEADS // KEY_HEADS, sinks=sinks(), training=False
    )

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = eager_attention_forward(module, query, key, value, mask, SIZE**-0.5)[0]
        return result

    if way == EAGER:
        return attention
    options: dict[str, Any] = {"inner": inner, "attention": way == OURS}
    compiled: Layer = torch.compile(attention, backend="mxfp4", options=options, dynamic=False)
    return compiled


def measure(
    case: Case, layers: dict[str, Layer], args: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    """Milliseconds and peak memory of a call in each way, and the ratios to the last way.

    Raises:
        WrongResult: rounding does not explain how far a result is from float64's.
    """
    mask, query = case.mask(), _random(HEADS, case.queries)
    caches = list(_caches(case))
    turns = itertools.cycle(caches)
    errors = {way: _error(run, query, *caches[0], mask) for way, run in layers.items()}
    for way, error in errors.items():
        if not error <= _MOST_ERROR:
            raise WrongResult(f"{way}: off by {error:.3g} of the result, for {case}")
    seconds: dict[str, list[float]] = {way: [] for way in layers}
    peaks: dict[str, int] = {}
    order, calls = random.Random(0), 20 if case.queries == 1 else 1
    for _ in range(args.rounds):
        for way in order.sample(list(layers), len(layers)):
            for _ in range(calls):
                key, value = next(turns)
                process_memory.reset_peak()
                before = int(psutil.Process().memory_info().rss)
                started = clock()
                layers[way](query, key, value, mask)
                seconds[way].append(clock() - started)
                peaks[way] = max(peaks.get(way, 0), process_memory.peak() - before)
    last = list(layers)[-1]
    pairs = {way: zip(seconds[way], seconds[last], strict=True) for way in layers}
    return {
        **dataclasses.asdict(case),
        "error": errors,
        "milliseconds": {way: milliseconds(samples) for way, samples in seconds.items()},
        "ratio": {way: summary([a / b for a, b in each]) for way, each in pairs.items()},
        "peak_bytes": peaks,
        "key_and_value_bytes": sum(tensor.nbytes for tensor in caches[0]),
    }


def _random(heads: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, heads, tokens, SIZE), generator=generator).to(DTYPE)


def _caches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield keys and values: of a token's layers, more than caches hold; of a prompt, once."""
    key, value = (_random(KEY_HEADS, case.keys, seed) for seed in (1, 2))
    yield key, value
    if case.queries == 1:
        for _ in range(_ROTATING // (key.nbytes + value.nbytes)):
            yield key.clone(), value.clone()


def _error(run: Layer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> float:
    """Return the relative error of the last queries' results; the call compiles."""
    result = run(query, key, value, mask)[:, -_CHECKED:]
    last = [query[:, :, -_CHECKED:], key, value, mask[:, :, -_CHECKED:]]
    exact = torch.ops.mxfp4.attention_with_sinks(
        *(tensor.float() for tensor in last[:3]),
        sinks().float(),
        last[3].float(),
        SIZE**-0.5,
    )
    return relative_error(result, exact.double())


def sinks() -> Tensor:
    """Return the sinks of every layer here."""
    return torch.randn(HEADS, generator=torch.Generator().manual_seed(0)).to(DTYPE)


def text(result: dict[str, Any]) -> str:
    each = "; ".join(
        f"{way} {times['median']:.1f} ms, {result['ratio'][way]['median']:.2f} x, "
        f"{result['peak_bytes'][way] / 2**20:.0f} MiB more"
        for way, times in result["milliseconds"].items()
    )
    return f"{result['kind']}, {result['queries']} queries, {result['keys']} keys: {each}"


if __name__ == "__main__":
    raise SystemExit(main())
