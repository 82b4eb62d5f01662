"""Benchmark of the CPU kernels: one GPT-OSS MoE MLP against transformers and the machine's floors.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json --plot build/cpu.png
    python benchmarks/cpu.py --quick

All contenders are checked against float64 first, then measured in turn, round after round, beside
the rates at which the machine reads memory and multiplies. Weights rotate over several layers, so
that they come from memory. The defaults are gpt-oss-20b's sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import contenders as who
import moe
import torch
from end_to_end import end_to_end
from machine import available_bytes, caches, machine
from plot import PlotUnavailable, draw, require
from probes import Probes, ProbesUnavailable
from report import text
from results import collect
from rounds import check_all, run_rounds
from samples import Clock
from small import alternating, overhead

from mxfp4_fx.ops import target

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "build" / "gpt-oss-2-layers"  # the one that `make demo` writes
TOKENS = (1, 4, 16, 64, 128, 512, 2048)
QUICK_TOKENS = (1, 16, 128)
BF16_LAYERS = 2  # 1.6 GB each, of which one token reads 200 MB
HUB_ONLY = "its CPU kernels are downloaded from a hub (use_kernels=True), not installed"
SPARE_BYTES = 2 << 30  # for activations, compilers and other programs


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    args = parse(argv)
    if args.plot:
        require()  # rather than after minutes of measuring
    started = clock()

    def log(message: str) -> None:
        if not args.silent:
            print(f"-- {clock() - started:4.0f} s  {message}", file=sys.stderr)

    # Dynamo tells users that transformers caches a version check; it is nothing to act upon.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.no_grad(), who.restored_path():
        results = layer_results(args, log, clock)
        gc.collect()
        results["end_to_end"] = model_results(args, log) if args.end_to_end else None
    results["seconds"] = clock() - started
    print(text(results))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(results, args.plot)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = moe.Sizes()

    def numbers(value: str) -> tuple[int, ...]:
        return tuple(sorted({int(part) for part in value.split(",")}))

    def names(value: str) -> tuple[str, ...]:
        return tuple(part for part in value.split(",") if part)

    add = parser.add_argument
    add("--quick", action="store_true", help="fewer tokens and rounds, no whole model")
    add("--tokens", type=numbers, help=f"T, separated by commas; {','.join(map(str, TOKENS))}")
    add("--rounds", type=int, help="15, or 5 with --quick")
    add("--seconds", type=float, help="at most, for the rounds: 180, or 30 with --quick")
    add("--threads", type=int, help="torch's own choice")
    add("--paths", type=names, default=("all",), help="all, best, none, or names with commas")
    add("--peers", type=names, default=who.DEFAULT_PEERS, help=f"of {','.join(who.PEERS)}")
    add("--compiler", default="inductor", help="the Dynamo backend that peers are compiled with")
    add("--layers", type=int, help="MXFP4 weights to rotate over: 12, or 6 with --quick")
    for name in ("hidden", "intermediate", "experts", "top_k"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(sizes, name))
    add("--probe-mib", type=int, default=1024, help="memory that is read to measure its rate")
    add("--end-to-end", action=argparse.BooleanOptionalAction, help="a whole model too; on")
    add("--checkpoint", type=Path, default=CHECKPOINT, help="of the model; written if absent")
    add("--tiny", action="store_true", help="a model of tiny sizes, in a temporary directory")
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=32)
    add("--model-rounds", type=int, default=5)
    add("--output", type=Path, help="JSON with all results")
    add("--plot", type=Path, help="PNG or SVG; needs matplotlib")
    add("--silent", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)

    quick = args.quick
    args.tokens = args.tokens or (QUICK_TOKENS if quick else TOKENS)
    args.rounds = args.rounds or (5 if quick else 15)
    args.seconds = args.seconds or (30.0 if quick else 180.0)
    args.layers = args.layers or (6 if quick else 12)
    args.end_to_end = not quick if args.end_to_end is None else args.end_to_end
    unknown = set(args.peers) - who.PEERS.keys()
    if unknown:
        parser.error(f"--peers: {', '.join(sorted(unknown))}: not of {', '.join(who.PEERS)}")
    return args


def layer_results(args: argparse.Namespace, log: Any, clock: Clock) -> dict[str, Any]:
    """Everything but the whole model."""
    sizes = moe.Sizes(args.hidden, args.intermediate, args.experts, args.top_k)
    facts = machine()
    paths, unavailable = choose_paths(args.paths, log)
    chosen = target.choose(torch.device("cpu"))
    require_memory(sizes, args.layers, native=bool(paths), probe_bytes=args.probe_mib << 20)

    log(f"making {BF16_LAYERS} layers of random weights")
    weights = [moe.random_weights(sizes, seed) for seed in range(BF16_LAYERS)]
    inputs = moe.random_inputs(sizes, max(args.tokens), seed=0)
    by_tokens = {tokens: inputs.first(tokens) for tokens in args.tokens}
    checked = moe.checked_tokens(args.tokens, count=0 if args.quick else 24)
    log(f"computing {len(checked)} tokens in float64")
    some = moe.Inputs(inputs.hidden[checked], inputs.logits[checked])
    truth = moe.exact(weights[0], some, sizes)
    experts = who.transformers_experts(sizes, weights)
    del weights

    log(f"swizzling {args.layers} layers")
    ours = [(path, f"mxfp4 {path}", path) for path in paths]
    plain = ("pytorch", "mxfp4 plain PyTorch", None)
    everyone: list[who.Contender] = []
    if paths:
        panels = who.swizzled_layers(experts, "cpu_panels", args.layers)
        everyone += [who.Ours(*each[:2], sizes, each[2], panels) for each in ours]
    rows = who.swizzled_layers(experts, who.kernels_of(None)[1], BF16_LAYERS)
    everyone.append(who.Ours(*plain[:2], sizes, None, rows))
    everyone += [who.Transformers(peer, sizes, experts, args.compiler) for peer in args.peers]

    torch._dynamo.config.recompile_limit = max(64, len(args.tokens))
    unavailable["transformers mxfp4"] = HUB_ONLY
    cells, skipped = check_all(everyone, by_tokens, checked, truth, log, clock)
    notes = [] if args.end_to_end else ["the whole model was left out (--end-to-end)"]
    best = everyone[0]
    assert isinstance(best, who.Ours)
    try:
        log("measuring floors")
        with Probes(torch.get_num_threads(), args.probe_mib << 20) as probes:
            done = run_rounds(cells, by_tokens, probes, args.rounds, args.seconds, log, clock)
    except ProbesUnavailable as error:
        unavailable["floors"] = str(error)
        probes = None
        done = run_rounds(cells, by_tokens, None, args.rounds, args.seconds, log, clock)
    log("measuring calls")
    small = {
        "overhead": overhead([*ours, plain], rounds=max(3, args.rounds // 2)),
        "alternating": alternating(best, by_tokens[min(args.tokens)], max(3, args.rounds // 2)),
    }
    return collect(
        args=args,
        sizes=sizes,
        machine=facts,
        path={
            "contender": best.name,
            "kernels": best.kernels,
            "chosen_by_backend": f"{chosen.kernels} ({chosen.layout})",
            "reason": chosen.reason,
        },
        contenders=everyone,
        cells=cells,
        hits={tokens: moe.experts_hit(x.logits, sizes.top_k) for tokens, x in by_tokens.items()},
        probes=probes,
        rounds=done,
        unavailable=unavailable,
        skipped=skipped,
        notes=notes + rotation_notes(everyone, sizes, min(args.tokens)),
        **small,
    )


def choose_paths(wanted: tuple[str, ...], log: Any) -> tuple[list[str], dict[str, str]]:
    """(instruction-set paths to measure, the chosen one first; the others with the reason)."""
    if wanted == ("none",):
        return [], {"native": "--paths none"}
    log("compiling the native kernels")
    works, reasons = who.native_paths()
    if wanted == ("best",):
        return list(works[:1]), {name: why for name, why in reasons.items() if not works}
    if wanted == ("all",):
        return list(works), reasons
    missing = {name: "cannot run here" for name in wanted if name not in works}
    return [path for path in works if path in wanted], {**missing, **reasons}


def rotation_notes(everyone: list[who.Contender], sizes: moe.Sizes, tokens: int) -> list[str]:
    """Whose weights may have stayed in the last cache at the smallest T."""
    cache = max(caches().values(), default=0)
    near = []
    for contender in everyone:
        hit = min(sizes.top_k * tokens, sizes.experts)
        rotated = contender.layers * hit * contender.expert_bytes
        if rotated < 2 * cache:
            near.append(f"{contender.label} ({rotated / 2**20:.0f} MiB)")
    if not near:
        return []
    return [
        f"at T={tokens} weights may have stayed in the last cache ({cache / 2**20:.0f} MiB), for "
        f"few are rotated over: {', '.join(near)}"
    ]


def require_memory(sizes: moe.Sizes, layers: int, native: bool, probe_bytes: int) -> None:
    """Stop before the system does.

    Raises:
        SystemExit: the weights do not fit; the message says what to pass.
    """
    free = available_bytes()
    packed = (layers * native + 2 * BF16_LAYERS) * sizes.mxfp4_bytes
    needed = sizes.experts * (packed + BF16_LAYERS * sizes.bf16_bytes) + probe_bytes + SPARE_BYTES
    if free is not None and needed > free:
        raise SystemExit(
            f"about {needed / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB are free: "
            "pass a smaller --layers, --experts or --probe-mib"
        )


def model_results(args: argparse.Namespace, log: Any) -> dict[str, Any]:
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
    try:
        raise SystemExit(main())
    except PlotUnavailable as error:
        raise SystemExit(str(error)) from None
