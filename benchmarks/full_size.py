"""gpt-oss-20b's full sizes on two cores: memory phase by phase, tokens a second, and their floor.

    python benchmarks/full_size.py --checkpoint DIRECTORY --output build/full-size.json
    python benchmarks/full_size.py --layers 2 --vocab 512 --checkpoint DIRECTORY   # to try it out

Writes a checkpoint of random weights (13.8 GB) unless it is there; one of your own does, too. Then
processes of their own load it packed, compile it with ``free_weights`` and generate, from a cold
page cache, watched from outside. One with tiny widths and as many layers shows what Python, torch
and compiling take; one runs the packed model uncompiled. Linux only.

The limit is no cgroup's: whoever has more resident memory, mapped pages and child processes
included, is killed, and the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size_report import summarize, text
from machine import available_bytes, machine
from moe import ROUNDINGS, relative_error
from process_memory import Watch

from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK

BENCHMARKS = Path(__file__).resolve().parent
CHECKPOINT = BENCHMARKS.parent / "build" / "gpt-oss-20b-random"
TINY = {"hidden": 64, "intermediate": 96, "experts": 8, "heads": 4, "kv_heads": 2, "head_dim": 16}
SPARE_BYTES = 3 << 30  # for Python, torch, compilers and other programs
Log = Callable[[str], None]


class ProcessFailed(Exception):
    """A measured process did not end well, or computed something else; the message says how."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: this benchmark runs on Linux only")
    started = time.perf_counter()

    def log(message: str) -> None:
        if not args.silent:
            print(f"-- {time.perf_counter() - started:4.0f} s  {message}", file=sys.stderr)

    torch.set_num_threads(args.threads)
    facts = machine()
    writing = write(args, log)
    config = json.loads((args.checkpoint / "config.json").read_text("utf-8"))
    sizes = model_bytes(config)
    free = available_bytes()
    if free is not None and free < sizes["checkpoint"] + SPARE_BYTES:
        needed = (sizes["checkpoint"] + SPARE_BYTES) / 2**30
        raise SystemExit(f"{needed:.0f} GiB of memory are needed, {free / 2**30:.0f} are free")
    results: dict[str, Any] = {
        "machine": facts,
        "settings": {
            "layers": config[gpt_oss.LAYERS],
            "vocab": config["vocab_size"],
            **{name: getattr(args, name) for name in SETTINGS},
        },
        "bytes": sizes,
        "write": writing,
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        results["runs"], difference = measure_all(args, config, Path(directory), log)
    results["logits"] = difference
    results["summary"] = summarize(results)
    results["seconds"] = time.perf_counter() - started
    print(text(results))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


SETTINGS = ("threads", "limit_gib", "prompt_tokens", "new_tokens", "uncompiled_tokens", "rounds")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="written if it is absent")
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
    add("--output", type=Path, help="JSON with all results")
    add("--silent", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint.expanduser().resolve()
    for name in ("threads", "prompt_tokens", "new_tokens", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: 1 or more")
    return args


def write(args: argparse.Namespace, log: Log) -> dict[str, Any] | None:
    """Write the checkpoint if there is none; what that took.

    Raises:
        SystemExit: it cannot be written, for want of room on the disk, say.
    """
    if (args.checkpoint / "config.json").exists():
        return None
    log("writing a checkpoint of random weights")
    started = time.perf_counter()
    widths = TINY if args.tiny else {}
    try:
        shape = CheckpointShape(layers=args.layers, vocab=args.vocab, **widths)
        write_random_checkpoint(args.checkpoint, shape, progress=not args.silent)
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    return {"seconds": time.perf_counter() - started}


def model_bytes(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of a checkpoint and what is read of it, from its sizes; floats are bfloat16's.

    Returns:
        checkpoint: of all tensors.
        experts, layer: blocks and scales of all layers and of one.
        bfloat16: of all tensors, were the experts bfloat16.
        per_token: of the tensors that decoding a token must read: its experts' in every layer, one
            row of the embedding, all others whole.
        per_token_experts: the experts' part of that.
    """
    sizes = {key: config[key] for key in gpt_oss.KEYS}
    layers, experts = sizes[gpt_oss.LAYERS], config["num_local_experts"]
    active = config["num_experts_per_tok"]
    names = ("checkpoint", "experts", "layer", "bfloat16", "per_token", "per_token_experts")
    found = dict.fromkeys(names, 0)
    forms: dict[int, gpt_oss.Form] = dict.fromkeys(range(layers), "packed")
    for name, axes in gpt_oss.tensors("model.", forms, biases=True, head=True).items():
        elements = 1
        for axis in axes:
            elements *= gpt_oss.size(axis, sizes)
        is_packed = name.endswith(("_blocks", "_scales"))
        nbytes = elements * (1 if is_packed else 2)
        found["checkpoint"] += nbytes
        found["experts"] += nbytes * is_packed
        if name.endswith("_blocks"):
            found["bfloat16"] += 2 * elements * BLOCK // BYTES_PER_BLOCK
        elif not is_packed:
            found["bfloat16"] += nbytes
        if ".experts." in name:
            nbytes = nbytes * active // experts
            found["per_token_experts"] += nbytes
        elif "embed_tokens" in name:
            nbytes //= config["vocab_size"]
        found["per_token"] += nbytes
    found["layer"] = found["experts"] // layers
    return found


def measure_all(
    args: argparse.Namespace, config: dict[str, Any], scratch: Path, log: Log
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """(the phases of each process; how far compiled logits are from uncompiled ones)"""
    common = {
        "checkpoint": str(args.checkpoint),
        "cores": choose_cores(args.threads),
        "threads": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "inner": args.inner,
        "probe_mib": args.probe_mib,
        "compile": True,
        "rounds": 0,
    }
    logits = {name: scratch / f"{name}.pt" for name in ("baseline", "compiled", "uncompiled")}
    tiny = scratch / "tiny"
    shape = CheckpointShape(layers=config[gpt_oss.LAYERS], **TINY)
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
        settings = {**common, **change, "logits": str(logits[name])}
        runs[name] = {"phases": run(name, settings, limit, log)}
    runs["baseline"]["bytes"] = model_bytes(json.loads((tiny / "config.json").read_text("utf-8")))
    difference = None
    if "uncompiled" in runs:
        ours, plain = (torch.load(logits[name]) for name in ("compiled", "uncompiled"))
        difference = {
            "relative_difference": relative_error(ours, plain.double()),
            # As in end_to_end.py; from about ten layers on it says nothing.
            "bound": 2 * 2 * ROUNDINGS * config[gpt_oss.LAYERS] * 2**-9,
        }
        if not difference["relative_difference"] <= difference["bound"]:
            raise ProcessFailed(f"compiled logits are not the uncompiled ones: {difference}")
    return runs, difference


def run(name: str, settings: dict[str, Any], limit: int, log: Log) -> list[dict[str, Any]]:
    """The phases of a process of its own.

    Raises:
        ProcessFailed: it failed, or had more memory than the limit.
    """
    log(f"{name}: starts")
    forget_pages(Path(settings["checkpoint"]))
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as errors:
        threads = str(settings["threads"])
        # Compiled anew, as for the first time.
        cache = {"TORCHINDUCTOR_CACHE_DIR": directory}
        process = subprocess.Popen(
            [
                sys.executable,
                str(BENCHMARKS / "full_size_child.py"),
                json.dumps({**settings, "pipe": writer}),
            ],
            env={**os.environ, **cache, "OMP_NUM_THREADS": threads},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        watch = Watch(process.pid, limit)
        watch.start()
        phases = []
        try:
            with os.fdopen(reader, encoding="utf-8") as lines:
                for line in lines:
                    phase = json.loads(line)
                    phase["sampled_peaks"] = watch.take()
                    phases.append(phase)
                    peak = phase["memory"]["peak"]
                    size = f"{peak / 2**30:.2f} GiB"
                    log(f"{name}: {phase['phase']}: {phase['seconds']:.1f} s, peak {size}")
                    if peak > limit and watch.exceeded is None:  # between two samples
                        watch.end(peak)
            failed = process.wait() != 0
        finally:
            process.kill()
            process.wait()
            watch.join()
        errors.seek(0)
        if watch.exceeded is not None:
            raise ProcessFailed(
                f"{name}: {watch.exceeded / 2**30:.2f} GiB of resident memory after the phases "
                f"{[phase['phase'] for phase in phases]}; --limit-gib allows {limit / 2**30:.2f}"
            )
        if failed:
            raise ProcessFailed(f"{name}: the process failed:\n{errors.read()[-4000:]}")
    return phases


def choose_cores(count: int) -> list[int]:
    """So many cores that may be used; those that share a core's units with another come last."""
    seen: set[str] = set()
    first: list[int] = []
    later: list[int] = []
    for core in sorted(os.sched_getaffinity(0)):
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings = topology.read_text() if topology.exists() else str(core)
        (later if siblings in seen else first).append(core)
        seen.add(siblings)
    return (first + later)[:count]


def forget_pages(checkpoint: Path) -> None:
    """Let go of what the page cache has of the files: a run starts with reading the disk."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ProcessFailed as error:
        raise SystemExit(str(error)) from None
