"""From a new process to tokens: where the time of a start goes, with cold and with warm caches.

    python -m benchmarks.start --output build/start.json --plot build/start.svg
    python -m benchmarks.start --layers 4 --ways whole,inductor        # a few minutes
    python -m benchmarks.start --full-size --output build/start-full-size.json

Every measurement is a process of its own that imports, loads a GPT-OSS checkpoint of random
weights, compiles it, and generates a few tokens, across the end of the sliding window. The first
process has empty caches (cold), the second one those of the first (warm), the system's page cache
included.

Without ``--full-size`` the models have many layers of tiny width and the times are CPU seconds,
child processes included: compiling a layer takes as long whatever its width. With it, sizes are
gpt-oss-20b's and times are wall time; a checkpoint of 13.8 GB is written unless it is there. The
host of a virtual machine may have given it less memory than it seems to have, and give the rest
slowly: ``--touch`` has it given before.

llama.cpp is measured, on the same weights, if ``python -m benchmarks.llama_cpp`` has built it. A
way that takes longer than ``--limit-seconds`` is ended, and not run with more layers. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import mxfp4_fx
from benchmarks import command, end_to_end, full_size, llama_cpp, measured_process, model_bytes
from benchmarks.command import Log
from benchmarks.contenders import Unavailable
from benchmarks.machine import available_bytes, fresh_memory_rate, machine
from benchmarks.measured_process import TookTooLong
from benchmarks.start_child import INDUCTOR, LLAMA, PIECES, WAYS
from benchmarks.start_report import summarize, text
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint

SETTINGS = ("full_size", "threads", "prompt_tokens", "new_tokens", "inner", "limit_gib")
# What the models of tiny width run with. CPU seconds of torch's worker processes would be found out
# too late, and a thread that spins while it waits for another would count as work.
TINY_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
CACHES = ("cold", "warm")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: this benchmark runs on Linux only")
    started = time.perf_counter()
    log = command.start(args)
    results: dict[str, Any] = {
        "machine": machine(args.threads),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "notes": [],
        "unavailable": {},
        "starts": [],
    }
    if args.full_size:
        if args.touch:
            size = min(available_bytes(), int(args.limit_gib * 2**30)) - full_size.SPARE_BYTES
            results["machine"]["untouched_memory_rate"] = fresh_memory_rate(size)
        results["machine"]["fresh_memory_rate"] = fresh_memory_rate()
        results["notes"].append("torch's worker processes compile C++ files that are not counted")
    with tempfile.TemporaryDirectory() as directory:
        for layers in args.layers:
            measure(args, layers, Path(directory), results, log)
    results["seconds"] = time.perf_counter() - started
    command.finish(args, results, text(results))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--plot", type=Path, help="a picture of where the time goes, .svg or .png")
    add("--full-size", action="store_true", help="gpt-oss-20b's sizes, in wall time")
    add("--layers", type=command.numbers, help="(4,8,24,36; with --full-size 24)")
    add("--ways", type=command.names, default=WAYS, help=f"some of {','.join(WAYS)} (all)")
    add("--checkpoint", type=Path, help="with --full-size: written if it is absent (in build)")
    add("--vocab", type=int, default=201088, help="of what is written there (%(default)s)")
    add("--llama", type=Path, default=llama_cpp.FOLDER, help="folder that benchmarks.llama_cpp "
        "has filled (%(default)s)")  # fmt: skip
    add("--threads", type=int, default=2, help="and cores (%(default)s)")
    add("--limit-gib", type=float, default=22.0, help="of resident memory (%(default)s)")
    add("--limit-seconds", type=float, default=3600.0, help="of a process (%(default)s)")
    add("--touch", action="store_true", help="with --full-size: all memory is used once before")
    add("--prompt-tokens", type=int, help="(8; with --full-size 112)")
    add("--new-tokens", type=int, help="after the first one (13; with --full-size 24)")
    add("--inner", default="inductor", help="what compiles graphs (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    for name, tiny, full in (
        ("layers", (4, 8, 24, 36), (24,)),
        ("prompt_tokens", 8, 112),  # the sliding window ends among the new tokens
        ("new_tokens", 13, 24),
    ):
        if getattr(args, name) is None:
            setattr(args, name, full if args.full_size else tiny)
    return args


def measure(
    args: argparse.Namespace, layers: int, scratch: Path, results: dict[str, Any], log: Log
) -> None:
    """Start a model of so many layers in all ways, and add to ``results`` what that took."""
    checkpoint = write(args, layers, scratch, log)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {
        "checkpoint": str(checkpoint),
        "cores": measured_process.choose_cores(args.threads),
        "clock": "wall" if args.full_size else "cpu",
        "sample_seconds": 0.1,
    }
    if not args.full_size:
        settings["environment"] = TINY_ENVIRONMENT
    for way in (way for way in WAYS if way in args.ways and way not in results["unavailable"]):
        if why := unavailable(way, checkpoint, args):
            results["unavailable"][way] = why
            log(f"{way}: {why}")
            continue
        program: str | measured_process.Program = "benchmarks.start_child"
        limit, own = int(args.limit_gib * 2**30), {**settings, "way": way}
        if way == LLAMA:
            model = llama_cpp.model(args.llama, checkpoint, "bf16", log)
            program = llama_program(args, model, scratch, settings["cores"])
            own["checkpoint"], limit = str(model), sys.maxsize  # mapped pages can be dropped
        with tempfile.TemporaryDirectory(dir=scratch) as caches:
            for cache in CACHES:
                name = f"{layers} layers, {way}, {cache}"
                try:
                    stages = measured_process.run(
                        name,
                        own,
                        limit,
                        log,
                        program,
                        Path(caches),
                        warm_pages=cache == "warm",
                        seconds=args.limit_seconds,
                    )
                except TookTooLong as error:
                    results["unavailable"][way] = f"{error}; not run with more layers"
                    log(str(error))
                    break
                start = {"layers": layers, "way": way, "cache": cache, "stages": stages}
                start["summary"] = summarize(start, settings["clock"])
                results["starts"].append(start)
                command.write(args.output, results)  # what there is, should the next one fail


def write(args: argparse.Namespace, layers: int, scratch: Path, log: Log) -> Path:
    """The checkpoint with so many layers, which is written unless it is there."""
    if args.full_size:
        default = "gpt-oss-20b-random" + (f"-{layers}-layers" if layers != 24 else "")
        path: Path = (args.checkpoint or full_size.ROOT / "build" / default).expanduser().resolve()
        known = {"checkpoint": path, "tiny": False, "layers": layers, "vocab": args.vocab}
        full_size.write(argparse.Namespace(**known, silent=args.silent), log)
        return path
    shape: CheckpointShape = dataclasses.replace(end_to_end.TINY, layers=layers, sliding_window=16)
    return write_random_checkpoint(scratch / f"{layers}-layers", shape, progress=False)


def llama_program(
    args: argparse.Namespace, model: Path, scratch: Path, cores: list[int]
) -> measured_process.Program:
    """llama.cpp, with the same stages."""
    ids = scratch / "ids"
    np.arange(args.prompt_tokens, dtype=np.int32).tofile(ids)
    orders = [f"generate:{args.prompt_tokens}:{args.new_tokens}"]
    return lambda pipe: llama_cpp.driver_command(args.llama, pipe, model, ids, cores, orders)


def unavailable(way: str, checkpoint: Path, args: argparse.Namespace) -> str | None:
    """Why a way cannot be measured here, if it cannot."""
    if way == LLAMA:
        try:
            llama_cpp.driver(args.llama)
        except Unavailable as error:
            return str(error)
        return None
    if way == PIECES and not hasattr(mxfp4_fx, "compile"):
        return "this mxfp4_fx has no function compile"
    sizes = model_bytes.of_model(full_size.read_config(checkpoint))
    size = sizes["bfloat16" if way == INDUCTOR else "checkpoint"]
    needed = size + full_size.SPARE_BYTES
    if needed > min(available_bytes(), args.limit_gib * 2**30):
        return f"{needed / 2**30:.0f} GiB of memory are needed"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
