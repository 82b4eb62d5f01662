"""Benchmark of the GPU kernels: one GPT-OSS MoE MLP against other kernels and the GPU's floors.

    python benchmarks/gpu.py --output build/gpu.json --plot build/gpu.svg
    python benchmarks/gpu.py --tune
    TRITON_INTERPRET=1 python benchmarks/gpu.py --quick --device cpu

All contenders are checked against float64, then timed in CUDA graphs, with weights that rotate over
several layers so that they come from memory. What matters most is measured first, and results are
written as they come. The defaults are the sizes of gpt-oss-20b and gpt-oss-120b.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_contenders as who
import torch
from gpu_compile import Compiler, Job
from gpu_device import Device
from gpu_floor import Floors, work
from gpu_layer import ERROR_BOUND, Problem
from gpu_measure import SLOW_CALL, Measurement, measure, measure_parts
from gpu_plot import draw
from gpu_results import Results, Row, milliseconds, text
from gpu_tune import tune
from moe import Sizes
from plot import PlotUnavailable, require
from rounds import WrongResult
from samples import Clock

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import target, tiles

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
EXPERTS = (32, 128)
PEERS = ("triton_kernels", "grouped_mm", "batched_mm")
BF16_LAYERS = 3  # of which one token reads 200 MB each
MODES = ("default", "max-autotune-no-cudagraphs")
SPARE_BYTES = 4 << 30  # for activations and graphs
COMPILE_SECONDS = 120.0


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    args = parse(argv)
    if args.plot and not args.tune:
        require()  # rather than after minutes of measuring
    started = clock()

    def log(message: str) -> None:
        if not args.silent:
            print(f"-- {clock() - started:4.0f} s  {message}", file=sys.stderr)

    # Dynamo tells users that transformers caches a version check; it is nothing to act upon.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    device = Device(args.device, clock)
    with torch.no_grad(), Compiler(device, args.compilers) as compiler:
        run = Run(args, device, compiler, log, started + args.seconds)
        if args.tune:
            print(tune(args, device, compiler, run.problems, run.ours, log))
            return 0
        return run.all()


class Run:
    """One run of the benchmark."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: Device,
        compiler: Compiler,
        log: Callable[[str], None],
        deadline: float,
    ) -> None:
        self.args, self.device, self.compiler = args, device, compiler
        self.log, self.deadline = log, deadline
        self.started = device.clock()
        self.layout = args.layout or target.choose(device.torch, "triton").layout
        self.problems = {
            experts: Problem.random(
                Sizes(args.hidden, args.intermediate, experts, args.top_k),
                max(args.tokens), device.torch, args.seed,
            )
            for experts in args.experts
        }  # fmt: skip
        head = {"machine": device.facts(), "settings": self._settings()}
        self.results = Results(head, args.output)
        torch._dynamo.config.recompile_limit = 64

    def all(self) -> int:
        """Measure everyone, most important first; the exit status."""
        results, status = self.results, 1
        try:
            self._measure_everyone()
            results.complete, results.stopped, status = True, None, 0
        except WrongResult as error:
            results.stopped = f"wrong result: {error}"
        finally:  # an interrupted run leaves what it has
            results.head["seconds"] = self.device.clock() - self.started
            results.write()
        if self.args.plot:
            self.args.plot.parent.mkdir(parents=True, exist_ok=True)
            draw(results.data(), self.args.plot)
        print(text(results.data()))
        if results.stopped:
            print(results.stopped, file=sys.stderr)
        return status

    def _measure_everyone(self) -> None:
        floors = Floors(self.device)
        self.log("measuring floors")
        floors.measure()
        self.results.floors = floors.data()
        self._compile()
        for experts in self.args.experts:
            self._measure_ours(experts)
        for peer in PEERS:
            for experts in self.args.experts:
                if peer in self.args.peers:
                    self._measure_peer(peer, experts)
                self.device.release()
        self._count_launches()
        self.log("measuring floors again")
        floors.measure()
        self.results.floors = floors.data()

    def _compile(self) -> None:
        table = tiles.table(tiles.table_name(hardware.gpu_name(self.device.torch), self.layout))
        self.log("compiling")
        sizes = [problem.sizes for problem in self.problems.values()]
        jobs = [Job(tile, each, self.layout) for tile in table for each in sizes]
        jobs += [Job(None, each, tokens=t) for t in self.args.tokens for each in sizes]
        self.compiler.compile(jobs, COMPILE_SECONDS)

    def ours(self, experts: int) -> who.Ours:
        """This project's ops with as many layers as fit; at least 2.

        Raises:
            Unavailable: not even two fit.
        """
        layers = self._layers("ours", experts, self.args.layers or self._enough_layers())
        self.log(f"making {layers} layers of {experts} experts")
        return who.Ours(self.problems[experts], layers, self.layout)

    def _measure_ours(self, experts: int) -> None:
        try:
            ours = self.ours(experts)
        except (who.Unavailable, torch.OutOfMemoryError) as error:
            self._unavailable("ours", experts, error)
            return
        self._introduce("ours", ours)
        self._cells("ours", ours)
        self._introduce("ours_again", ours)
        self._cells("ours_again", ours)
        for tokens in self.args.tokens:
            row = self._row(experts, tokens)
            if "ours" not in row.ms or self.device.clock() > self.deadline:
                continue
            times = measure_parts(
                ours, self.problems[experts], tokens, self.device, self.args.cell_seconds / 4
            )
            row.parts_ms = {name: milliseconds(samples) for name, samples in times.items()}
        self.results.write()

    def _count_launches(self) -> None:
        """Of ours. Profilers leave traces in the times of what comes after them: hence last."""
        for experts, problem in self.problems.items():
            if not self.device.is_gpu or self.device.clock() > self.deadline:
                return
            ours = who.Ours(problem, 1, self.layout)
            for tokens in self.args.tokens:
                call = functools.partial(ours.run, 0, problem.hidden[:tokens])
                call()
                self._row(experts, tokens).launches["ours"] = self.device.launches(call)

    def _measure_peer(self, peer: str, experts: int) -> None:
        if self.device.clock() > self.deadline:
            for tokens in self.args.tokens:
                self.results.skip(peer, experts, tokens, "the time was up")
            return
        try:
            contenders = list(self._made(peer, experts))
        except Exception as error:  # others' code may fail in any way
            self.device.synchronize()  # raises if the device itself failed: then all is over
            self._unavailable(peer, experts, error)
            return
        for contender in contenders:
            self._introduce(contender.name, contender)
            self._cells(contender.name, contender)
        torch.compiler.reset()  # which may hold on to weights

    def _made(self, peer: str, experts: int) -> Iterator[who.Contender]:
        problem = self.problems[experts]
        if peer == "triton_kernels":
            package = who.load_triton_kernels(self.args.triton_kernels, self.device.torch)
            wanted = self.args.layers or self._enough_layers()
            layers = self._layers("mxfp4", experts, wanted)
            self.log(f"making {layers} layers of {experts} experts for {peer}")
            made = who.TritonKernels(problem, layers, package)
            yield made
            yield made.without_splits()
            return
        layers = self._layers("bf16", experts, min(self.args.layers or BF16_LAYERS, BF16_LAYERS))
        self.log(f"making {layers} layers of {experts} experts for {peer}")
        weights = who.bf16_experts(problem, layers)
        yield who.Bf16(problem, peer, weights, self.args.compiler, self.args.mode)

    def _cells(self, name: str, contender: who.Contender) -> None:
        """Measure a contender at every T; ``name`` is its key in the results."""
        experts = contender.problem.sizes.experts
        last: tuple[int, Measurement] | None = None
        for tokens in self.args.tokens:
            row = self._row(experts, tokens)
            reason = self._why_not(contender, tokens, last)
            if not reason:
                try:
                    found = measure(
                        *(contender, contender.problem, tokens, self.device),
                        self.args.cell_seconds,
                    )
                except Exception as error:
                    reason = self._forgivable(contender, error)
                self.device.release()
            if reason:
                self.results.skip(name, experts, tokens, reason)
                continue
            last = tokens, found
            row.ms[name] = milliseconds(found.samples)
            row.uncaptured_ms[name] = milliseconds(found.uncaptured)
            row.relative_error[name] = found.error
            row.captured[name] = not found.why_uncaptured and self.device.is_gpu
            if found.why_uncaptured:
                note = f"{contender.label} cannot be captured: {found.why_uncaptured}"
                if note not in self.results.notes:
                    self.results.notes.append(note)
            self.log(f"{name}, {experts} experts, T={tokens}: {1e6 * found.seconds:.1f} us")
            self.results.write()

    def _why_not(
        self, contender: who.Contender, tokens: int, last: tuple[int, Measurement] | None
    ) -> str:
        if self.device.clock() > self.deadline:
            return "the time was up"
        if contender.most_tokens is not None and tokens > contender.most_tokens:
            return f"measured up to T={contender.most_tokens} only"
        if last is not None and last[1].seconds * tokens / last[0] > SLOW_CALL:
            return "a call would take seconds"
        return ""

    def _forgivable(self, contender: who.Contender, error: Exception) -> str:
        """Why there is no time, if the run may go on without; otherwise the error is raised."""
        if isinstance(error, torch.OutOfMemoryError):
            return "out of memory"
        if contender.kind == "ours":
            raise error
        if isinstance(error, WrongResult):
            if not self.args.drop_wrong:
                raise error
            return f"wrong result: {error}"
        self.device.synchronize()  # raises if the device itself failed
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def _row(self, experts: int, tokens: int) -> Row:
        rows, problem = self.results.rows, self.problems[experts]
        if (experts, tokens) not in rows:
            hit, sizes = problem.hit(tokens), problem.sizes
            name = tiles.table_name(hardware.gpu_name(self.device.torch), self.layout)
            routed = tokens * sizes.top_k
            entry = tiles.serving(tiles.table(name), routed, experts)
            rows[experts, tokens] = Row(
                experts, tokens, hit, work(sizes, tokens, hit), dataclasses.asdict(entry)
            )
        return rows[experts, tokens]

    def _enough_layers(self) -> int:
        """So many that one token's weights are several times the L2 cache."""
        sizes = next(iter(self.problems.values())).sizes
        a_token = sizes.top_k * sizes.mxfp4_bytes
        return max(2, min(12, -(-5 * self.device.l2_bytes() // a_token)))

    def _layers(self, kind: str, experts: int, wanted: int) -> int:
        sizes, free = self.problems[experts].sizes, self.device.free_bytes()
        bytes_ = who.layer_bytes(sizes, kind)
        # While the last is made, it is there in checkpoint order and in pieces of 32 bits, too.
        fit = wanted if free is None else int((free - SPARE_BYTES) // bytes_) - 4
        layers = min(wanted, fit)
        if layers < min(wanted, 2):
            raise who.Unavailable(
                f"two layers of {bytes_ / 1e9:.1f} GB do not fit into {(free or 0) / 1e9:.0f} GB"
            )
        if layers < wanted:
            self.results.notes.append(f"{kind}, {experts} experts: {layers} layers, not {wanted}")
        return layers

    def _introduce(self, name: str, contender: who.Contender) -> None:
        kind = contender.kind if name != "ours_again" else "again"
        about: dict[str, Any] = {"label": contender.label, "kind": kind, "layers": {}}
        about = self.results.contenders.setdefault(name, about)
        about["layers"][str(contender.problem.sizes.experts)] = contender.layers

    def _unavailable(self, name: str, experts: int, error: Exception) -> None:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            reason = "out of memory"
        elif not isinstance(error, who.Unavailable):
            reason = f"{type(error).__name__}: {reason}"
        self.results.unavailable[f"{name}, {experts} experts"] = reason
        self.log(f"{name}, {experts} experts: {reason}")

    def _settings(self) -> dict[str, Any]:
        names = ("hidden", "intermediate", "top_k", "seed", "seconds", "cell_seconds", "compiler")
        return {
            **{name: getattr(self.args, name) for name in (*names, "mode")},
            "experts": list(self.args.experts),
            "tokens": list(self.args.tokens),
            "layout": self.layout,
            "error_bound": ERROR_BOUND,
        }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def numbers(value: str) -> tuple[int, ...]:
        return tuple(sorted({int(part) for part in value.split(",")}))

    def names(value: str) -> tuple[str, ...]:
        return tuple(part for part in value.split(",") if part)

    add = parser.add_argument
    add("--quick", action="store_true", help="small random sizes, little time")
    add("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1")
    add("--tokens", type=numbers, help=f"T, separated by commas; {','.join(map(str, TOKENS))}")
    add("--experts", type=numbers, help=f"E; {','.join(map(str, EXPERTS))}")
    for name in ("hidden", "intermediate", "top_k"):
        add(f"--{name.replace('_', '-')}", type=int)
    add("--layers", type=int, help="to rotate over; enough for several times the L2 cache")
    add("--layout", choices=sorted(tiles.LAYOUTS), help="the device's own")
    add("--peers", type=names, default=PEERS, help=f"of {','.join(PEERS)}; ours is always there")
    add("--triton-kernels", type=Path, metavar="FOLDER", help="where triton_kernels is")
    add("--compiler", default="inductor", help="the Dynamo backend that bfloat16 is compiled with")
    add("--mode", choices=MODES, default=MODES[0], help="of Inductor")
    add("--compilers", type=int, help="processes that compile ahead; as many as cores, up to 12")
    add("--seconds", type=float, default=420.0, help="nothing is begun afterwards")
    add("--cell-seconds", type=float, help="for the samples of one time: 0.12")
    add("--seed", type=int, help="of weights and inputs; a fresh one")
    add("--tune", action="store_true", help="find tiles and write the target's table instead")
    add("--tune-seconds", type=float, default=420.0)
    add("--table-folder", type=Path, help="where --tune writes; the package's tables")
    add("--output", type=Path, help="JSON with all results")
    add("--plot", type=Path, help="PNG or SVG; needs matplotlib")
    add("--drop-wrong", action="store_true", help="a wrong peer is left out, not the run's end")
    add("--silent", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)

    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 31)
    drawn = random.Random(args.seed)
    quick = args.quick
    full = Sizes()
    args.hidden = args.hidden or (32 * drawn.randint(1, 3) if quick else full.hidden)
    args.intermediate = args.intermediate or (32 * drawn.randint(1, 3) if quick else full.hidden)
    args.top_k = args.top_k or (2 if quick else full.top_k)
    args.tokens = args.tokens or ((1, drawn.randint(2, 6)) if quick else TOKENS)
    args.experts = args.experts or ((3, 5) if quick else EXPERTS)
    args.cell_seconds = args.cell_seconds or (0.01 if quick else 0.12)
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"--peers: {', '.join(sorted(unknown))}: not of {', '.join(PEERS)}")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            "on a CPU Triton's kernels run in its interpreter only: set TRITON_INTERPRET=1"
        )
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; --device cpu runs Triton's interpreter, to test this")
    if args.tune and args.device == "cpu" and args.table_folder is None:
        parser.error("what is tuned in the interpreter is no table: name a --table-folder")
    return args


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except PlotUnavailable as error:
        raise SystemExit(str(error)) from None
