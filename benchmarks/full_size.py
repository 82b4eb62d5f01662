"""gpt-oss-20b's full sizes on two cores: memory phase by phase, tokens a second, and their floor.

    python -m benchmarks.full_size --checkpoint DIRECTORY --output build/full-size.json
    python -m benchmarks.full_size --layers 2 --vocab 512 --checkpoint DIRECTORY   # to try it out

Writes a checkpoint of random weights (13.8 GB) unless it is there; one of your own does, too. Then
processes of their own load it packed, compile it with ``free_weights`` and generate, from a cold
page cache, watched from outside. One with tiny widths and as many layers shows what Python, torch
and compiling take; one runs the packed model uncompiled. Linux only.

The limit is no cgroup's: whoever has more resident memory, mapped pages and child processes
included, is killed, and the benchmark fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import command, end_to_end
from benchmarks.command import Log
from benchmarks.full_size_report import summarize, text
from benchmarks.machine import available_bytes, machine
from benchmarks.moe import relative_error
from benchmarks.process_memory import Watch
from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK

ROOT = Path(__file__).resolve().parent.parent
SPARE_BYTES = 3 << 30  # for Python, torch, compilers and other programs
SETTINGS = ("threads", "limit_gib", "prompt_tokens", "new_tokens", "uncompiled_tokens", "rounds")


class ProcessFailed(SystemExit):
    """A measured process did not end well, or computed something else; the message says how."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: this benchmark runs on Linux only")
    started = time.perf_counter()
    log = command.start(args)
    facts = machine(args.threads)
    writing = write(args, log)
    config = read_config(args.checkpoint)
    sizes = model_bytes(config)
    free, needed = available_bytes(), sizes["checkpoint"] + SPARE_BYTES
    if free < needed:
        raise SystemExit(
            f"{needed / 2**30:.0f} GiB of memory are needed, {free / 2**30:.0f} are free"
        )
    with tempfile.TemporaryDirectory() as directory:
        runs, difference = measure_all(args, config, Path(directory), log)
    results: dict[str, Any] = {
        "machine": facts,
        "settings": {
            "layers": config[gpt_oss.LAYERS],
            "vocab": config["vocab_size"],
            **{name: getattr(args, name) for name in SETTINGS},
        },
        "bytes": sizes,
        "write": writing,
        "runs": runs,
        "logits": difference,
    }
    results["summary"] = summarize(results)
    results["seconds"] = time.perf_counter() - started
    command.finish(args, results, text(results))
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
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint.expanduser().resolve()
    for name in ("threads", "prompt_tokens", "new_tokens", "rounds"):
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
    runs["baseline"]["bytes"] = model_bytes(read_config(tiny))
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


def run(
    name: str,
    settings: dict[str, Any],
    limit: int,
    log: Log,
    program: str = "benchmarks.full_size_child",
    caches: Path | None = None,
) -> list[dict[str, Any]]:
    """The phases of a process of its own.

    Args:
        program: the module that it runs.
        caches: a directory for all that it keeps for the next process; None: it keeps nothing of
            what Inductor made.

    Raises:
        ProcessFailed: it failed, or had more memory than the limit.
    """
    log(f"{name}: starts")
    forget_pages(Path(settings["checkpoint"]))
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        if caches is None:  # compiled anew, as for the first time
            environment["TORCHINDUCTOR_CACHE_DIR"] = directory
        else:  # Inductor keeps precompiled headers in the directory for temporary files
            environment |= {"TMPDIR": str(caches), "MXFP4_FX_CACHE_DIR": str(caches / "kernels")}
            environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        process = subprocess.Popen(
            [sys.executable, "-m", program, json.dumps({**settings, "pipe": writer})],
            cwd=ROOT,
            env={**environment, **settings.get("environment", {})},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        watch = Watch(process.pid, limit, settings.get("sample_seconds", 0.01))
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
            watch.stop()
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
    for core in sorted(psutil.Process().cpu_affinity()):
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
    raise SystemExit(main())
