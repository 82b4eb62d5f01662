"""The command line of ``benchmarks.gpu``."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.sizes import Sizes
from mxfp4_fx.ops import tiles

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
EXPERTS = (32, 128)
PEERS = ("triton_kernels", "grouped_mm", "batched_mm")
MODES = ("default", "max-autotune-no-cudagraphs")
# Of the arguments, what stands in the results.
SETTINGS = (
    *("hidden", "intermediate", "top_k", "seed"),
    *("seconds", "cell_seconds", "compiler", "mode"),
)


def parse(argv: list[str] | None, about: str | None) -> argparse.Namespace:
    parser = command.parser(about)
    numbers, names = command.numbers, command.names
    add = parser.add_argument
    add("--plot", type=Path, help="PNG or SVG; needs matplotlib")
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
    add("--drop-wrong", action="store_true", help="a wrong peer is left out, not the run's end")
    args = parser.parse_args(argv)

    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 31)
    drawn, quick, full = random.Random(args.seed), args.quick, Sizes()
    args.hidden = args.hidden or (32 * drawn.randint(1, 3) if quick else full.hidden)
    args.intermediate = args.intermediate or (32 * drawn.randint(1, 3) if quick else full.hidden)
    args.top_k = args.top_k or (2 if quick else full.top_k)
    args.tokens = args.tokens or ((1, drawn.randint(2, 6)) if quick else TOKENS)
    args.experts = args.experts or ((3, 5) if quick else EXPERTS)
    args.cell_seconds = args.cell_seconds or (0.01 if quick else 0.12)
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: not of {', '.join(PEERS)}")
    args.peers = [peer for peer in PEERS if peer in args.peers]
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            "on a CPU Triton's kernels run in its interpreter only: set TRITON_INTERPRET=1"
        )
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; --device cpu runs Triton's interpreter, to test this")
    if args.tune and args.device == "cpu" and args.table_folder is None:
        parser.error("what is tuned in the interpreter is no table: name a --table-folder")
    return args
