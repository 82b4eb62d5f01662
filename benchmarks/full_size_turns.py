"""Ours and its peers in turn: prompts and decoded tokens of one checkpoint, a process at a time.

In each round every way has a process of its own, in an order that changes, and the rate at which
the machine reads memory is measured before each of them. What a process told is kept as it comes,
whatever becomes of it or of the next. What cannot be had is named with its reason.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import command, device_ops, llama_cpp, model_bytes
from benchmarks.command import Log
from benchmarks.contenders import Unavailable
from benchmarks.full_size_turns_report import LABELS, summarize
from benchmarks.measured_process import ProcessFailed, Program, choose_cores, run
from benchmarks.probes import Probes

WAYS = tuple(LABELS)
OURS, OURS_MXFP8, UNCOMPILED, LLAMA, LLAMA_Q8, VLLM = WAYS
READS = 5  # of the read rate, before each process
CELLS = "benchmarks.full_size_cells"
SETTINGS = ("prefill", "contexts", "batches", "decode_tokens", "most_each_round", "turns")

Cell = tuple[Any, ...]  # what is measured, and its numbers


class Way(NamedTuple):
    """A process that can be measured.

    Attributes:
        settings, limit: as for :func:`measured_process.run`.
        program: the same, for what it is to measure.
        cells: what it measures in the first round, then in all others.
    """

    settings: dict[str, Any]
    program: Callable[[list[Cell]], str | Program]
    limit: int
    cells: tuple[list[Cell], list[Cell]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    numbers, names = command.numbers, command.names
    add("--ways", type=names, default=WAYS, help=f"some of {', '.join(WAYS)} (all)")
    add("--prefill", type=numbers, default=(128, 512, 2048, 8192), help="prompts (to 8192)")
    add("--contexts", type=numbers, default=(128, 4096), help="of decoded tokens (128,4096)")
    add("--batches", type=numbers, default=(1, 8), help="sequences that are decoded (1,8)")
    add("--turns", type=int, default=3, help="rounds of a process of every way (%(default)s)")
    add("--decode-tokens", type=int, default=16, help="for each context and batch (%(default)s)")
    add("--most-each-round", type=int, default=2048, metavar="TOKENS", help="longer prompts are "
        "measured in the first round only (%(default)s)")  # fmt: skip
    add("--most-uncompiled", type=int, default=128, metavar="TOKENS", help="of a prompt, "
        "in one round (%(default)s)")  # fmt: skip
    add("--llama", type=Path, default=llama_cpp.FOLDER, help="folder that "
        "benchmarks.llama_cpp has filled (%(default)s)")  # fmt: skip


def measure(
    args: argparse.Namespace,
    config: dict[str, Any],
    scratch: Path,
    results: dict[str, Any],
    log: Log,
) -> None:
    """Add ``results["turns"]``, which is written after every process."""
    ids = scratch / "ids"
    longest, vocabulary = max(*args.prefill, *args.contexts), config["vocab_size"]
    np.random.default_rng(0).integers(vocabulary, size=longest, dtype=np.int32).tofile(ids)
    turns: dict[str, Any] = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "bytes": {
            "parts": model_bytes.of_parts(config),
            "cache": {str(each): model_bytes.of_cache(config, each) for each in args.contexts},
        },
        "unavailable": {},
        "runs": [],
    }
    results["turns"] = turns
    ways: dict[str, Way] = {}
    for name in (name for name in WAYS if name in args.ways):
        try:
            ways[name] = prepare(name, args, ids, scratch, log)
        except Unavailable as error:
            turns["unavailable"][name] = reason(str(error))
            log(f"{LABELS[name]} cannot be had: {error}")
    if not ways:
        raise SystemExit("none of the ways can be had, so nothing was measured")
    with Probes(args.threads, args.probe_mib << 20, seconds=0.01) as probes:
        for turn in range(args.turns):
            due = [name for name, way in ways.items() if way.cells[turn > 0]]
            for name in random.Random(turn).sample(due, len(due)):
                for _ in range(READS):
                    probes.measure(tokens=1)
                turns["runs"].append(one(name, ways[name], turn, log))
                turns["runs"][-1]["read_rates"] = [each.read for each in probes.rates[-READS:]]
                turns["summary"] = summarize(turns)
                command.write(args.output, results)


def one(name: str, way: Way, turn: int, log: Log) -> dict[str, Any]:
    """What a process told, and why it failed, if it did."""
    cells = way.cells[turn > 0]
    told: dict[str, Any] = {"way": name, "round": turn, "failed": None}
    settings, title = {**way.settings, "cells": cells}, f"round {turn + 1}: {LABELS[name]}"
    try:
        told["phases"] = run(title, settings, way.limit, log, way.program(cells))
    except ProcessFailed as error:
        log(str(error))
        told |= {"failed": reason(str(error)), "phases": error.phases}
    return told


def reason(message: str) -> str:
    """A line of it without folders: the last one that names an error, or else the last one."""
    lines = message.strip().splitlines()
    line = next((line for line in reversed(lines) if "Error" in line), lines[-1])
    return re.sub("[^\\s'\"]*/", "", line)


def prepare(name: str, args: argparse.Namespace, ids: Path, scratch: Path, log: Log) -> Way:
    """The process of a way.

    Raises:
        Unavailable: it cannot be had here.
    """
    if name == VLLM:
        raise Unavailable(why_no_vllm())
    cores = choose_cores(args.threads)
    settings = {"threads": args.threads, "cores": cores, "sample_seconds": 0.05}
    cells = cells_of(name, args, first=True), cells_of(name, args, first=False)
    if name in (OURS, OURS_MXFP8, UNCOMPILED):
        settings |= {
            "checkpoint": str(args.checkpoint),
            "compile": name != UNCOMPILED,
            "linears": "mxfp8" if name == OURS_MXFP8 else True,
            "inner": args.inner,
            "ids": str(ids),
            # What the first round compiles serves all rounds.
            "environment": {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")},
        }
        return Way(settings, lambda _: CELLS, int(args.limit_gib * 2**30), cells)
    kind = "bf16" if name == LLAMA else "q8_0"
    model = llama_cpp.model(args.llama, args.checkpoint, kind, log)
    settings["checkpoint"] = str(model)

    def program(cells: list[Cell]) -> Program:
        orders = [llama_cpp.order(cell, scratch / kind) for cell in cells]
        return lambda pipe: llama_cpp.driver_command(args.llama, pipe, model, ids, cores, orders)

    # Its file is mapped: pages that others need are dropped, which is no reason to end it.
    return Way(settings, program, sys.maxsize, cells)


def why_no_vllm() -> str:
    if not device_ops.has_amx():
        return "its MXFP4 experts need a CPU with AMX that the system lets programs use"
    return "only its experts are measured, by benchmarks.cpu --vllm"


def cells_of(name: str, args: argparse.Namespace, *, first: bool) -> list[Cell]:
    """What a way measures in the first round, or in each other one; the uncompiled model, which is
    slow by a factor, has one round.

    The first cell comes twice: it reads the weights, and the last of its name is the one that
    counts.
    """
    plain = name == UNCOMPILED
    if plain and not first:
        return []
    most = min(
        max(args.prefill) if first else args.most_each_round,
        args.most_uncompiled if plain else max(args.prefill),
    )
    prompts = [count for count in args.prefill if count <= most]
    tokens = 2 if plain else args.decode_tokens
    cells: list[Cell] = [("prefill", count) for count in (*prompts[:1], *prompts)]
    cells += [("decode", c, b, tokens) for b in args.batches for c in args.contexts]
    if name == OURS:
        cells += [("parts", context, tokens) for context in args.contexts]
    return cells
