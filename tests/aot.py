"""Compiles the Triton kernels ahead of time and says what the machine code is like.

``python tests/aot.py TARGET DTYPE,... [TARGET DTYPE,... ...]`` compiles every tile of a target's
table, for both matmuls of an MLP of GPT-OSS's sizes, and the other kernels, and prints a JSON
object: a target's list of :class:`Fact` objects, one for each compilation. ``TARGET:REGIME,...``
compiles one tile of each of these regimes, for one of the matmuls, and of routing one kernel.
No GPU is needed. It is a program of its own because tests run with Triton's interpreter switched
on, which cannot compile.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from mxfp4_fx.core import hardware

HIDDEN = INTERMEDIATE = 2880
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {
    # name: (Triton's target, bytes of shared memory that a program may use)
    "sm_75": (("cuda", 75, 32), 64 << 10),
    "sm_80": (("cuda", 80, 32), 163 << 10),
    "sm_89": (("cuda", 89, 32), 99 << 10),
    "sm_90": (("cuda", 90, 32), 227 << 10),
    "sm_100": (("cuda", 100, 32), 227 << 10),
    "sm_120": (("cuda", 120, 32), 99 << 10),
    "gfx942": (("hip", "gfx942", 64), 64 << 10),
    "gfx950": (("hip", "gfx950", 64), 160 << 10),
}


@dataclasses.dataclass
class Fact:
    """What came out of one compilation.

    Attributes:
        shared: bytes of shared memory; stack: bytes of a thread's stack, which is where registers
            spill to; registers: of a thread.
        per_weight: instructions of the fast loop, of all threads, by weights that it decodes; on
            sm_75, where nothing is exact and slow, of the only loop.
        copies: how many threads decode the same weight.
        mma: matrix instructions in that loop; wgmma: how many are wgmma's.
        fma: float32 products that are added in one instruction there, of all threads, by weights.
        load_bytes: the widest load from global to shared memory in it, a thread.
    """

    kernel: str
    regime: str
    tile: dict[str, Any]
    shared: int
    stack: int
    registers: int
    per_weight: float | None = None
    copies: int = 0
    mma: int = 0
    wgmma: int = 0
    fma: float = 0.0
    load_bytes: int = 0
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)


def compile_kernel(
    kernel: Any, target: tuple[str, Any, int], values: dict[str, Any], options: dict[str, int]
) -> Any:
    """``values``: parameter -> a type's name, or ``(value,)`` for a constant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, tuple):
            signature[name], constants[name] = "constexpr", value[0]
        else:
            # "16": as in a launch whose pointers and sizes are divisible by 16.
            signature[name] = value.removesuffix("%16")
            if value.startswith("*") or value.endswith("%16"):
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget(*target), options=options)


def layout_of(name: str) -> str:
    layout = hardware.gpu_layout(name)
    assert layout is not None
    return layout.name


# Every activation is compiled, with one dtype.
ACTIVATIONS = {"bf16": "swiglu", "fp16": "geglu_tanh", "fp32": "relu2"}


def matmul_values(
    name: str, tile: Any, n: int, k: int, e: int, down: bool, dtype: str
) -> dict[str, Any]:
    """Parameters of ``matmul_ogs_kernel`` as ``ops.triton`` launches it on a target."""
    from mxfp4_fx.ops.triton import _products as products

    layout = layout_of(name)
    words = "*u8" if layout == "row_major" else "*u32"
    return {
        "x": f"*{dtype}", "blocks": words, "scales": words, "bias": f"*{dtype}",
        "expert_offsets": "*i32", "gather_index": (None,) if down else "*i32",
        "scatter_index": "*i32" if down else (None,), "gammas": "*fp32" if down else (None,),
        "y": "*fp32" if down else f"*{dtype}", "x_stride": "i32%16", "rows": "i32",
        "experts": "i32%16", "alpha": "fp32", "limit": "fp32", "up_offset": "fp32",
        "N": (n,), "K": (k,),
        "LAYOUT": (layout,), "ACTIVATION": ("none" if down else ACTIVATIONS[dtype],),
        "GROUPS": (1 << e.bit_length(),), "BM": (tile.block_m,), "BN": (tile.block_n,),
        "BK": (tile.block_k,), "SPLITS": (tile.splits,),
        **{key: (value,) for key, value in products(name, DTYPES[dtype]).items()},
    }  # fmt: skip


@dataclasses.dataclass
class Compilation:
    """A kernel to compile; ``regime`` and ``tile`` as :class:`Fact` has them."""

    described: str
    regime: str
    tile: dict[str, Any]
    kernel: Any
    values: dict[str, Any]
    options: dict[str, int]


def matmuls(name: str, dtype: str = "bf16", regimes: str = "") -> Iterator[Compilation]:
    from mxfp4_fx.ops import tiles
    from mxfp4_fx.ops.triton_kernels.matmul import matmul_ogs_kernel

    layout, terms = layout_of(name), hardware.gpu_terms(name, DTYPES[dtype])
    both = (False, 2 * INTERMEDIATE, HIDDEN), (True, HIDDEN, INTERMEDIATE)
    seen: set[str] = set()
    for entry in tiles.table(tiles.table_name(name, layout)):
        if regimes and (entry.regime in seen or entry.regime not in regimes.split(",")):
            continue
        seen.add(entry.regime)
        for down, n, k in both:
            # Of decode the one that splits K, of the others the one that has an activation.
            if regimes and down != (entry.regime == "decode"):
                continue
            tile = tiles.fit(entry, layout, k, terms, down)
            yield Compilation(
                f"{'down' if down else 'gate_up'} {dtype}",
                entry.regime,
                dataclasses.asdict(tile),
                matmul_ogs_kernel,
                matmul_values(name, tile, n, k, 32, down, dtype),
                tiles.compiler_options(tile, name, terms),
            )


QKV = (4096, 512, 512)


def linears_values(name: str, tile: Any, dtype: str, backward: bool = False) -> dict[str, Any]:
    """Parameters of the kernels for linears in MXFP8, for q, k and v of GPT-OSS's sizes."""
    from mxfp4_fx.ops import triton_mxfp8 as launcher

    units = launcher._units(name)
    splits = 1 if backward else launcher._splits(tile, 1, HIDDEN)
    floats = f"*{dtype}"
    tensors = {
        "codes": "*u32", "scales": "*u8", "grad": floats, "bias": floats,
        "y": "*fp32" if splits > 1 else floats, "parts": "*fp32",
    }  # fmt: skip
    return {
        **{f"{key}{at}": kind for key, kind in tensors.items() for at in ("", "2", "3")},
        **{f"N{at}": (n,) for n, at in zip(QKV, ("", "2", "3"), strict=True)},
        "x": floats, "x_stride": "i32%16", "rows": "i32", "K": (HIDDEN,),
        "TERMS": (hardware.gpu_terms(name, DTYPES[dtype]),), "SPLITS": (splits,),
        "BM": (tile.block_m,),
        "BN": (launcher._gradient_columns(name, tile) if backward else tile.block_n,),
        "BK": (tile.block_n if backward else tile.block_k,), "UNITS": (units,),
        "IS_ORDERED": (units != "none" and tile.block_m >= launcher._ORDERED_ROWS,),
        **{key: (value,) for key, value in launcher._decoding(name).items()},
    }  # fmt: skip


def linears(name: str, dtype: str = "bf16", regimes: str = "") -> Iterator[Compilation]:
    """Linears in MXFP8 with every tile of a table, and the gradient of their input with one."""
    from mxfp4_fx.ops import tiles, triton_mxfp8
    from mxfp4_fx.ops.triton_kernels import linears as kernels

    terms = hardware.gpu_terms(name, DTYPES[dtype])
    table = tiles.table(tiles.table_name(name, layout_of(name), "mxfp8_"))
    seen: set[str] = set()
    for entry in table:
        if regimes and (entry.regime in seen or entry.regime not in regimes.split(",")):
            continue
        seen.add(entry.regime)
        tile = tiles.choose_mxfp8(name, entry.rows or 1 << 20, terms)
        options = tiles.compiler_options(tile, name, terms)
        shape = dataclasses.asdict(tile)
        yield Compilation(
            f"{dtype} linears in MXFP8", entry.regime, shape, kernels.linears_mxfp8_kernel,
            linears_values(name, tile, dtype), options,
        )  # fmt: skip
        if entry is table[-1] or not regimes:
            yield Compilation(
                f"{dtype} linears' gradient", entry.regime,
                shape | {"block_k": triton_mxfp8._gradient_columns(name, tile)},
                kernels.linears_mxfp8_backward_kernel, linears_values(name, tile, dtype, True),
                options,
            )  # fmt: skip


ONE_PROGRAM = (1, ["routing"]), (512, ["routing"])
MANY_PROGRAMS = (16384, ["decide", "scan", "place"])


def others(*routings: tuple[int, list[str]]) -> Iterator[Compilation]:
    """The sums of splits and over a token's rows, and the kernels of routings of so many tokens."""
    from mxfp4_fx.ops import tiles, triton_mxfp8
    from mxfp4_fx.ops import triton as launcher
    from mxfp4_fx.ops.triton_kernels import epilogue, routing
    from mxfp4_fx.ops.triton_kernels import linears as of_linears

    pointers = {
        "source": "*bf16", "slot_expert": "*i32", "slot_weight": "*fp32", "gammas": "*fp32",
        "gather_index": "*i32", "scatter_index": "*i32", "expert_offsets": "*i32",
        "block_counts": "*i32", "blocks_before": "*i32", "counts": "*i32",
    }  # fmt: skip
    numbers = dict.fromkeys(("tokens", "choices", "experts", "first_expert", "blocks"), "i32")
    experts = 128
    bb, bg = launcher._SCAN_TILE
    bt, bn = launcher._COMBINE_TILE
    combine = {
        "parts": "*fp32", "y": "*bf16", "tokens": "i32", "N": (HIDDEN,), "A": (4,),
        "SPLITS": (3,), "BT": (bt,), "BN": (bn,),
    }  # fmt: skip

    def compilation(described: str, kernel: Any, values: dict[str, Any], warps: int) -> Compilation:
        options = {**tiles.OPTIONS, "num_warps": warps}
        return Compilation(described, "", {"warps": warps}, kernel, values, options)

    yield compilation("combine", epilogue.combine_kernel, combine, 4)
    bm, bn = triton_mxfp8._SUM_TILE
    sums = {
        **{f"parts{at}": "*fp32" for at in ("", "2", "3")},
        **{f"y{at}": "*bf16" for at in ("", "2", "3")},
        **{f"N{at}": (n,) for n, at in zip(QKV, ("", "2", "3"), strict=True)},
        "rows": "i32", "SPLITS": (8,), "BM": (bm,), "BN": (bn,),
    }  # fmt: skip
    yield compilation("sum of splits", of_linears.sum_splits_kernel, sums, 4)
    for tokens, names in routings:
        block = launcher._tokens_per_block(tokens, 4, experts)
        values = {
            **pointers, **numbers, "stride": "i32%16", "given_weights": (None,), "GIVEN": (False,),
            "A": (4,), "AP": (4,), "BT": (block,), "GROUPS": (experts,), "BB": (bb,), "BG": (bg,),
        }  # fmt: skip
        warps = launcher._warps(block * 4, experts)
        for kernel in names:
            made = getattr(routing, f"{kernel}_kernel")
            yield compilation(f"{kernel} of {tokens} tokens", made, values, warps)


def facts_of(name: str, dtypes: list[str], regimes: str) -> Iterator[Fact]:
    routings = ONE_PROGRAM[1:] if regimes else (*ONE_PROGRAM, MANY_PROGRAMS)
    wanted = [
        each
        for dtype in dtypes
        for some in (matmuls, linears)
        for each in some(name, dtype, regimes)
    ]
    target = TARGETS[name][0]
    for each in (*wanted, *others(*routings)):
        made = compile_kernel(each.kernel, target, each.values, each.options)
        yield describe(each.described, each.regime, each.tile, made, target)


def describe(
    kernel: str, regime: str, tile: dict[str, Any], made: Any, target: tuple[str, Any, int]
) -> Fact:
    if target[0] == "hip":
        text = made.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
        return Fact(kernel, regime, tile, made.metadata.shared, spilled, number("vgpr_count"))
    usage, code = disassemble(made.asm["cubin"], with_code=bool(regime))
    stack, registers = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("STACK", "REG"))
    fact = Fact(kernel, regime, tile, made.metadata.shared, stack, registers)
    for loop in loops(code):
        names = [instruction.split()[0] for instruction in loop]
        products = sum(name.startswith(("HMUL2.BF16", "HFMA2.BF16")) for name in names)
        mma = sum("MMA" in name and not name.startswith("WARP") for name in names)
        fma = names.count("FFMA")
        if not ((products and mma) or (target[1] == 75 and regime and fma)):
            continue  # the exact loop, or none of the matmul's
        threads = 32 * tile["warps"]
        weights = tile["block_n"] * tile["block_k"]
        fact.fma = fma * threads / weights
        fact.copies, rest = divmod(2 * products * threads, weights)
        assert rest == 0, (kernel, tile, products)
        fact.per_weight = len(loop) * threads / weights
        fact.mma = mma
        fact.wgmma = sum(name.startswith("HGMMA") for name in names)
        widths = [int(re.search(r"\.(\d+)$", n)[1]) if re.search(r"\.\d+$", n) else 32
                  for n in names if n.startswith("LDGSTS")]  # fmt: skip
        fact.load_bytes = max(widths, default=0) // 8
        for name in names:
            fact.instructions[name] = fact.instructions.get(name, 0) + 1
    return fact


def disassemble(cubin: bytes, with_code: bool) -> tuple[str, str]:
    """Resource usage and SASS, by the tools in Triton's package.

    The SASS is empty without ``with_code``: nvdisasm takes half a second for the smallest kernel.
    """
    from triton import knobs

    def printed(tool: str, *arguments: str) -> str:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = printed(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = printed(knobs.nvidia.nvdisasm.path, "-c", file.name) if with_code else ""
    return usage, code


def loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop: between a label and a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
            target = re.match(r"BRA.*\((\.L_\w+)\)", instruction[1])
            if target and target[1] in labels:
                found.append((labels[target[1]], len(instructions)))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [instructions[start:stop] for start, stop in inner]


def main(arguments: list[str]) -> None:
    facts: dict[str, list[dict[str, Any]]] = {}
    for asked, dtypes in zip(arguments[0::2], arguments[1::2], strict=True):
        name, _, regimes = asked.partition(":")
        made = facts_of(name, dtypes.split(","), regimes)
        facts[name] = [dataclasses.asdict(fact) for fact in made]
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
