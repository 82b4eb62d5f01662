"""gpt-oss-20b's full sizes on two cores: memory phase by phase, tokens a second, and their floor.

    python -m benchmarks.full_size --checkpoint DIRECTORY --output build/full-size.json
    python -m benchmarks.full_size --layers 2 --vocab 512 --checkpoint DIRECTORY   # to try it out

Writes a checkpoint of random weights (13.8 GB) unless it is there; one of your own does, too. Then
it measures two things, of which ``--only`` chooses one. Linux only.

Memory: processes of their own load the checkpoint packed, compile it with ``free_weights`` and
generate, from a cold page cache, watched from outside. One with tiny widths and as many layers
shows what Python, torch and compiling take; one runs the packed model uncompiled. The limit is no
cgroup's: whoever has more resident memory, mapped pages and child processes included, is killed,
and the benchmark fails.

Turns (``full_size_turns.py``): prompts and decoded tokens, beside the uncompiled model and
llama.cpp, if ``python -m benchmarks.llama_cpp`` has built it. They take hours at full size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, end_to_end, full_size_turns, full_size_turns_report, model_bytes
from benchmarks.command import Log
from benchmarks.full_size_report import summarize, text
from benchmarks.machine import available_bytes, machine
from benchmarks.measured_process import ROOT, ProcessFailed, choose_cores, run
from benchmarks.moe import relative_error
from benchmarks.report import paragraphs
from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.core.errors import CheckpointError

SPARE_BYTES = 3 << 30  # for Python, torch, compilers and other programs
SETTINGS = ("threads", "limit_gib", "prompt_tokens", "new_tokens", "uncompiled_tokens", "rounds")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: this benchmark runs on Linux only")
    started = time.perf_counter()
    log = command.start(args)
    facts = machine(args.threads)
    writing = write(args, log)
    config = read_config(args.checkpoint)
    sizes = model_bytes.of_model(config)
    free, needed = available_bytes(), sizes["checkpoint"] + SPARE_BYTES
    if free < needed:
        raise SystemExit(
            f"{needed / 2**30:.0f} GiB of memory are needed, {free / 2**30:.0f} are free"
        )
    results: dict[str, Any] = {
        "machine": facts,
        "settings": {
            "layers": config[gpt_oss.LAYERS],
            "vocab": config["vocab_size"],
            **{name: getattr(args, name) for name in SETTINGS},
        },
        "bytes": sizes,
        "write": writing,
    }
    told = []
    with tempfile.TemporaryDirectory() as directory:
        if args.only != "turns":
            results["runs"], results["logits"] = measure_all(args, config, Path(directory), log)
            results["summary"] = summarize(results)
            command.write(args.output, results)
            told.append(text(results))
        if args.only != "memory":
            full_size_turns.measure(args, config, Path(directory), results, log)
            told.append(full_size_turns_report.text(results["turns"]))
    results["seconds"] = time.perf_counter() - started
    command.finish(args, results, paragraphs(*told))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add, checkpoint = parser.add_argument, ROOT / "build" / "gpt-oss-20b-random"
    add("--checkpoint", type=Path, default=checkpoint, help="written if it is absent")
    add("--layers", type=int, default=24, help="of what is written (%(default)s)")
    add("--vocab", type=int, default=201088, help="of what is written (%(default)s)")
    add("--tiny", action="store_true", help="write it with tiny widths, for tests")
    add("--threads", type=int, default=2, help="and cores (%(default)s)")
    add("--limit-gib", type=float, default=22.0, help="of resident memory (%(default)s)")
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=32, help="after the first one (%(default)s)")
    add("--uncompiled-tokens", type=int, default=2, help="the same, uncompiled; 0: not at all")
    add("--rounds", type=int, default=5, help="of decoding (%(default)s)")
    add("--probe-mib", type=int, default=1024, help="memory that is read to measure its rate")
    add("--inner", default="inductor", help="what compiles the rewritten graph (%(default)s)")
    add("--plot", type=Path, help="a picture of the turns, .svg or .png")
    add("--only", choices=("memory", "turns"), help="leave out the other half")
    full_size_turns.add_arguments(parser)
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint.expanduser().resolve()
    if args.plot and args.only == "memory":
        parser.error("--plot: the picture is of the turns")
    if unknown := set(args.ways) - set(full_size_turns.WAYS):
        known = ", ".join(full_size_turns.WAYS)
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none of {known}")
    for name in ("threads", "prompt_tokens", "new_tokens", "rounds", "turns", "decode_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: 1 or more")
    return args


def read_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text("utf-8"))
    return config


def write(args: argparse.Namespace, log: Log) -> dict[str, Any] | None:
    """Write the checkpoint if there is none; what that took.

    Raises:
        SystemExit: it cannot be written, for want of room on the disk, say.
    """
    if (args.checkpoint / "config.json").exists():
        return None
    log("writing a checkpoint of random weights")
    started = time.perf_counter()
    widths = end_to_end.TINY if args.tiny else CheckpointShape()
    shape = dataclasses.replace(widths, layers=args.layers, vocab=args.vocab)
    try:
        write_random_checkpoint(args.checkpoint, shape, progress=not args.silent)
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    return {"seconds": time.perf_counter() - started}


def measure_all(
    args: argparse.Namespace, config: dict[str, Any], scratch: Path, log: Log
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """(the phases of each process; how far compiled logits are from uncompiled ones)"""
    layers = config[gpt_oss.LAYERS]
    names = ("threads", "prompt_tokens", "new_tokens", "inner", "probe_mib")
    common = {
        **{name: getattr(args, name) for name in names},
        "checkpoint": str(args.checkpoint),
        "cores": choose_cores(args.threads),
        "compile": True,
        "rounds": 0,
    }
    tiny = scratch / "tiny"
    shape = dataclasses.replace(end_to_end.TINY, layers=layers)
    write_random_checkpoint(tiny, shape, progress=False)
    changes: dict[str, dict[str, Any]] = {
        "baseline": {"checkpoint": str(tiny)},
        "compiled": {"rounds": args.rounds},
    }
    if args.uncompiled_tokens:
        changes["uncompiled"] = {"compile": False, "new_tokens": args.uncompiled_tokens}
    limit = int(args.limit_gib * 2**30)
    runs: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        settings = {**common, **change, "logits": str(scratch / f"{name}.pt")}
        runs[name] = {"phases": run(name, settings, limit, log)}
    runs["baseline"]["bytes"] = model_bytes.of_model(read_config(tiny))
    if "uncompiled" not in runs:
        return runs, None
    ours, plain = (torch.load(scratch / f"{name}.pt") for name in ("compiled", "uncompiled"))
    difference = relative_error(ours, plain.double())
    bound = end_to_end.logits_bound(layers)
    if not difference <= bound:
        raise ProcessFailed(
            f"compiled logits are not the uncompiled ones: they differ by {difference:.2e} of "
            f"themselves, rounding explains {bound:.2e}"
        )
    return runs, {"relative_difference": difference, "bound": bound}


if __name__ == "__main__":
    raise SystemExit(main())
