"""Benchmark of the GPU kernels: one GPT-OSS MoE MLP against other kernels and the GPU's floors.

    python -m benchmarks.gpu --output build/gpu.json --plot build/gpu.svg
    python -m benchmarks.gpu --tune
    TRITON_INTERPRET=1 python -m benchmarks.gpu --quick --device cpu

All contenders are checked against float64, then timed in CUDA graphs, with weights that rotate over
several layers so that they come from memory. What matters most is measured first, and results are
written as they come. The defaults are the sizes of gpt-oss-20b and gpt-oss-120b.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import command, device_ops, openai
from benchmarks.command import Log
from benchmarks.contenders import (
    Contender,
    Ours,
    Transformers,
    Unavailable,
    WrongResult,
    transformers_experts,
)
from benchmarks.gpu_compile import Compiler, Job
from benchmarks.gpu_device import Device
from benchmarks.gpu_measure import measure, measure_parts
from benchmarks.gpu_options import SETTINGS, parse
from benchmarks.gpu_report import text, with_ratios
from benchmarks.gpu_tune import tune
from benchmarks.moe import Problem
from benchmarks.sizes import Sizes
from benchmarks.timing import Clock, milliseconds
from mxfp4_fx.ops import tiles

BATCHED_TOKENS = 16  # batched_mm copies an expert's weights for every routed row: 33 MB each
BF16_LAYERS = 3  # of which one token reads 200 MB
KERNELS = "triton"
SPARE_BYTES = 4 << 30  # for activations and graphs
COMPILE_SECONDS = 120.0
SLOW_CALL = 1.0  # seconds of one MLP; what may take longer is not measured


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    args = parse(argv, __doc__)
    log = command.start(args, clock)
    device = Device(args.device, clock)
    limit = torch._dynamo.config.patch(recompile_limit=64)
    with torch.no_grad(), limit, Compiler(device, args.compilers) as compiler:
        run = Run(args, device, compiler, log)
        if args.tune:
            print(tune(args, device, compiler, run.problems, run.ours, log))
            return 0
        return run.all()


class Run:
    """One run of the benchmark."""

    def __init__(
        self, args: argparse.Namespace, device: Device, compiler: Compiler, log: Log
    ) -> None:
        self.args, self.device, self.compiler, self.log = args, device, compiler, log
        self.started = device.clock()
        self.layout = args.layout or device_ops.gpu_layout(device.torch)
        self.tiles = device_ops.gpu_tiles(device.torch, self.layout)
        self.problems: dict[int, Problem] = {}
        for experts in args.experts:
            sizes = Sizes(args.hidden, args.intermediate, experts, args.top_k)
            self.problems[experts] = Problem.random(
                sizes, max(args.tokens), device.torch, args.seed, has_router=True
            )
        settings = {
            **{name: getattr(args, name) for name in SETTINGS},
            "experts": list(args.experts),
            "tokens": list(args.tokens),
            "layout": self.layout,
            "error_bound": next(iter(self.problems.values())).error_bound,
        }
        self.results: dict[str, Any] = {
            "complete": False,
            "stopped": "interrupted",
            "machine": device.facts(),
            "settings": settings,
            **{name: {} for name in ("floors", "contenders", "unavailable")},
            **{name: [] for name in ("rows", "skipped", "notes")},
        }

    def all(self) -> int:
        """Measure everyone, most important first; the exit status."""
        results = self.results
        try:
            self._measure_everyone()
            results |= {"complete": True, "stopped": None}
        except WrongResult as error:
            results["stopped"] = _first_line(error)
        finally:  # an interrupted run leaves what it has
            results["seconds"] = self.device.clock() - self.started
            self._write()
        found = with_ratios(results)
        command.finish(self.args, found, text(found))
        if results["stopped"]:
            print(results["stopped"], file=sys.stderr)
        return 0 if results["complete"] else 1

    def _write(self) -> None:
        """What there is by now; a run that is cut off leaves it, marked as incomplete."""
        command.write(self.args.output, with_ratios(self.results))

    def _measure_everyone(self) -> None:
        self._measure_floors()
        self.log("compiling")
        sizes = [problem.sizes for problem in self.problems.values()]
        jobs = [Job(tile, each, self.layout) for tile in self.tiles for each in sizes]
        jobs += [Job(None, each, tokens=t) for t in self.args.tokens for each in sizes]
        self.compiler.compile(jobs, COMPILE_SECONDS)
        for experts in self.args.experts:
            self._measure_ours(experts)
            self.device.release()
        for peer in self.args.peers:
            for experts in self.args.experts:
                self._measure_peer(peer, experts)
                self.device.release()
        self._count_launches()
        self._measure_floors()

    def _measure_floors(self) -> None:
        self.log("measuring floors")
        self.device.measure_floors()
        self.device.release()
        self.results["floors"] = self.device.floors()

    def _measure_ours(self, experts: int) -> None:
        try:
            ours = self.ours(experts)
        except (Unavailable, torch.OutOfMemoryError) as error:
            self._unavailable("ours", experts, error)
            return
        for name in ("ours", "ours_again"):
            self._cells(name, ours)
        for tokens in self.args.tokens:
            row = self._row(experts, tokens)
            if "ours" in row["ms"] and not self._is_late():
                times = measure_parts(ours, tokens, self.device, self.args.cell_seconds / 4)
                row["parts_ms"] = {name: milliseconds(samples) for name, samples in times.items()}
        self._write()

    def _count_launches(self) -> None:
        """Of ours. Profilers leave traces in the times of what comes after them: hence last."""
        for experts, problem in self.problems.items():
            if not self.device.is_gpu or self._is_late():
                return
            ours = self._made_ours(problem, 1)
            for tokens in self.args.tokens:
                call = partial(ours.run, 0, problem.inputs(tokens))
                call()
                self._row(experts, tokens)["launches"]["ours"] = self.device.launches(call)

    def _measure_peer(self, peer: str, experts: int) -> None:
        if self._is_late():
            for tokens in self.args.tokens:
                self._skip(peer, experts, tokens, "the time was up")
            return
        try:
            contenders = list(self._made(peer, experts))
        except Exception as error:  # others' code may fail in any way
            self.device.synchronize()  # raises if the device itself failed: then all is over
            self._unavailable(peer, experts, error)
            return
        for contender in contenders:
            self._cells(contender.name, contender)
        torch.compiler.reset()  # which may hold on to weights

    # ---- who is measured

    def ours(self, experts: int) -> Ours:
        """This project's ops with as many layers as fit; at least 2.

        Raises:
            Unavailable: not even two fit.
        """
        problem = self.problems[experts]
        layers = self._layers("ours", problem.sizes, problem.sizes.mxfp4_bytes)
        return self._made_ours(problem, layers)

    def _made_ours(self, problem: Problem, layers: int) -> Ours:
        return Ours(
            *(problem, map(problem.weights, range(layers))),
            *("ours", f"mxfp4_fx {self.layout}", "ours"),
            kernels=KERNELS,
            layout=self.layout,
        )

    def _made(self, peer: str, experts: int) -> Iterator[Contender]:
        problem, args = self.problems[experts], self.args
        sizes = problem.sizes
        if peer == "triton_kernels":
            package = openai.load(args.triton_kernels, self.device.torch)
            layers = self._layers("mxfp4", sizes, sizes.mxfp4_bytes)
            made = openai.TritonKernels(problem, map(problem.weights, range(layers)), package)
            yield made
            yield made.without_splits()
            return
        layers = self._layers("bf16", sizes, sizes.bf16_bytes, BF16_LAYERS)
        options = {"backend": args.compiler, "dynamic": True}
        if args.compiler == "inductor":
            options["mode"] = args.mode
        bf16 = Transformers(
            *(problem, transformers_experts(sizes, map(problem.weights, range(layers)))),
            *(peer, f"bf16 {peer} ({args.compiler})", "bf16"),
            form=peer,
            compile=options,
        )
        bf16.most_tokens = BATCHED_TOKENS if peer == "batched_mm" else None
        yield bf16

    def _layers(self, kind: str, sizes: Sizes, expert_bytes: int, most: int = 1 << 10) -> int:
        """As many as were asked for, or so many that one token's weights are several times the L2
        cache; if they fit.
        """
        a_token = sizes.top_k * sizes.mxfp4_bytes
        enough = max(2, min(12, -(-5 * self.device.l2_bytes() // a_token)))
        wanted = min(self.args.layers or enough, most)
        bytes_, free = sizes.experts * expert_bytes, self.device.free_bytes()
        # While the last is made, it is there in checkpoint order and in pieces of 32 bits, too.
        fit = wanted if free is None else int((free - SPARE_BYTES) // bytes_) - 4
        if fit < min(wanted, 2):
            raise Unavailable(
                f"two layers of {bytes_ / 1e9:.1f} GB do not fit into {(free or 0) / 1e9:.0f} GB"
            )
        if fit < wanted:
            self.results["notes"].append(
                f"{kind}, {sizes.experts} experts: {fit} layers, not {wanted}"
            )
        self.log(f"making {min(wanted, fit)} layers of {sizes.experts} experts for {kind}")
        return min(wanted, fit)

    # ---- the times of one of them

    def _cells(self, name: str, contender: Contender) -> None:
        """Measure a contender at every T; ``name`` is its key in the results."""
        experts = contender.problem.sizes.experts
        self._introduce(name, contender)
        last: tuple[int, float] | None = None
        for tokens in self.args.tokens:
            reason = "the time was up" if self._is_late() else ""
            reason = reason or contender.why_not(tokens, last, SLOW_CALL)
            if not reason:
                try:
                    last = tokens, self._measure(name, contender, tokens)
                except Exception as error:
                    reason = self._forgivable(contender, error)
                self.device.release()
            if reason:
                self._skip(name, experts, tokens, reason)
            self._write()

    def _measure(self, name: str, contender: Contender, tokens: int) -> float:
        """Seconds of one MLP, once all that was found out stands in the results."""
        found = measure(contender, tokens, self.device, self.args.cell_seconds)
        row = self._row(contender.problem.sizes.experts, tokens)
        row["ms"][name] = milliseconds(found.samples)
        row["uncaptured_ms"][name] = milliseconds(found.uncaptured)
        row["relative_error"][name] = found.error
        row["captured"][name] = self.device.is_gpu and not found.why_uncaptured
        if found.why_uncaptured:
            where = contender.where(tokens)
            self.results["notes"].append(f"{where} cannot be captured: {found.why_uncaptured}")
        least = min(found.samples)
        self.log(f"{name}, {row['experts']} experts, T={tokens}: {1e6 * least:.1f} us")
        return least

    def _forgivable(self, contender: Contender, error: Exception) -> str:
        """Why there is no time, if the run may go on without; otherwise the error is raised."""
        if isinstance(error, torch.OutOfMemoryError):
            return _first_line(error)
        if isinstance(contender, Ours):
            raise error
        if isinstance(error, WrongResult) and not self.args.drop_wrong:
            raise error
        self.device.synchronize()  # raises if the device itself failed
        return _first_line(error)

    def _is_late(self) -> bool:
        return self.device.clock() > self.started + self.args.seconds

    def _row(self, experts: int, tokens: int) -> dict[str, Any]:
        """One number of experts and of tokens. Times are milliseconds of one MLP, by contender:
        ms of replayed CUDA graphs unless ``captured`` says otherwise, uncaptured_ms launched one by
        one; parts_ms of ours, each part in a graph of its own.
        """
        rows: list[dict[str, Any]] = self.results["rows"]
        problem = self.problems[experts]
        for row in rows:
            if (row["experts"], row["tokens"]) == (experts, tokens):
                return row
        tile = tiles.serving(self.tiles, tokens * problem.sizes.top_k, experts)
        by_contender = ("ms", "uncaptured_ms", "parts_ms", "relative_error", "captured", "launches")
        row = {
            "experts": experts,
            "tokens": tokens,
            "experts_hit": problem.hit(tokens),
            **problem.work(tokens),
            "tiles": dataclasses.asdict(tile),
            **{name: {} for name in by_contender},
        }
        rows.append(row)
        return row

    def _skip(self, name: str, experts: int, tokens: int, reason: str) -> None:
        where = {"contender": name, "experts": experts, "tokens": tokens}
        self.results["skipped"].append({**where, "reason": reason})

    def _introduce(self, name: str, contender: Contender) -> None:
        kind = contender.kind if name != "ours_again" else "again"
        about: dict[str, Any] = {"label": contender.label, "kind": kind, "layers": {}}
        about = self.results["contenders"].setdefault(name, about)
        about["layers"][str(contender.problem.sizes.experts)] = contender.layers

    def _unavailable(self, name: str, experts: int, error: Exception) -> None:
        reason = str(error) if isinstance(error, Unavailable) else _first_line(error)
        self.results["unavailable"][f"{name}, {experts} experts"] = reason
        self.log(f"{name}, {experts} experts: {reason}")


def _first_line(error: Exception) -> str:
    """What a reader needs of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, WrongResult):
        return f"wrong result: {error}"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


if __name__ == "__main__":
    raise SystemExit(main())
