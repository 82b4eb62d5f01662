"""What a decoded token costs by ``mxfp4_fx.compile``, beside ``model.compile(backend="mxfp4")``.

    python -m benchmarks.decode --output build/decode.json
    python -m benchmarks.decode --layers 4,24 --tiny    # where overhead is all

The models share their weights, which are random and have gpt-oss-20b's sizes, or tiny ones. They
decode the same tokens in turn, one at a time, each with a dynamic cache of its own. The first round
compiles and is not measured.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mxfp4_fx
from benchmarks import command, end_to_end
from benchmarks.command import Log
from benchmarks.generation import prompt
from benchmarks.machine import machine
from benchmarks.moe import relative_error
from benchmarks.start_child import PIECES, WHOLE
from benchmarks.timing import Clock, milliseconds, summary
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint

WAYS = (WHOLE, PIECES)


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="next to nothing to compute, many calls")
    add("--layers", type=command.numbers, default=(4,), help="(4)")
    add("--prompt-tokens", type=int, default=32, help="(%(default)s)")
    add("--new-tokens", type=int, default=64, help="in each round (%(default)s)")
    add("--rounds", type=int, default=3, help="that are measured (%(default)s)")
    add("--threads", type=int, default=2, help="(%(default)s)")
    add("--inner", default="inductor", help="what compiles graphs (%(default)s)")
    args = parser.parse_args(argv)
    log = command.start(args, clock)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": machine(args.threads),
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "silent")},
        "decode": [],
    }
    for layers in args.layers:
        results["decode"].append(measure(args, layers, log, clock))
        command.write(args.output, results)
    command.finish(args, results, "\n".join(map(text, results["decode"])))
    return 0


def measure(args: argparse.Namespace, layers: int, log: Log, clock: Clock) -> dict[str, Any]:
    """Milliseconds a token by each way, and the ratios of tokens that followed one another.

    Raises:
        WrongResult: rounding does not explain how far the logits are from one another.
    """
    shape = end_to_end.TINY if args.tiny else CheckpointShape()
    with tempfile.TemporaryDirectory() as directory:
        log(f"{layers} layers: making weights")
        path = Path(directory) / "checkpoint"
        write_random_checkpoint(path, dataclasses.replace(shape, layers=layers), progress=False)
        models = compiled_ways(path, args.inner)
        ids = prompt(models[WHOLE], args.prompt_tokens)
        samples: dict[str, list[float]] = {way: [] for way in WAYS}
        # A dynamic cache takes several graphs of a whole model.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            for turn in range(1 + args.rounds):
                log(f"{layers} layers: " + (f"round {turn}" if turn else "compiling"))
                decoded = decode(models, ids, args.new_tokens, layers, clock)
                for way in WAYS if turn else ():
                    samples[way] += decoded[way]
        del models
        gc.collect()
    ratios = [pieces / whole for whole, pieces in zip(*samples.values(), strict=True)]
    return {
        "layers": layers,
        "milliseconds": {way: milliseconds(samples[way]) for way in WAYS},
        "ratio": summary(ratios),
    }


def compiled_ways(path: Path, inner: str) -> dict[str, Any]:
    """The model, compiled in each way. They have the same parameters, and so one swizzled copy."""
    model = mxfp4_fx.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    models = {way: copy.deepcopy(model, dict(shared)) for way in WAYS}
    options = {"strict": True, "inner": inner}
    models[WHOLE].compile(backend="mxfp4", options=options)
    mxfp4_fx.compile(models[PIECES], options=options)
    return models


def decode(
    models: dict[str, Any], ids: Tensor, new_tokens: int, layers: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of each token by each way; which comes first changes from token to token."""
    seconds: dict[str, list[float]] = {way: [] for way in models}
    caches = {way: model(ids, use_cache=True).past_key_values for way, model in models.items()}
    order, token = random.Random(0), ids[:, -1:]
    logits: dict[str, Tensor] = {}
    for _ in range(new_tokens):
        for way in order.sample(list(models), len(models)):
            started = clock()
            out = models[way](token, past_key_values=caches[way], use_cache=True)
            seconds[way].append(clock() - started)
            logits[way] = out.logits[0, -1].double()
        difference = relative_error(logits[PIECES], logits[WHOLE])
        end_to_end.check_logits(PIECES, difference, layers)
        token = logits[WHOLE].argmax().reshape(1, 1)
    return seconds


def text(result: dict[str, Any]) -> str:
    each = ", ".join(
        f"{way} {times['median']:.2f} ms" for way, times in result["milliseconds"].items()
    )
    ratio = result["ratio"]
    return (
        f"{result['layers']} layers: {each} a token; {PIECES} / {WHOLE} "
        f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
