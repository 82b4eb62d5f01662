"""Facts about machines: the CPU's instruction-set paths, the GPUs' architectures, dtypes.

`ops/target.py` chooses which kernels a device gets.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER

# Dtypes that experts compute in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Activation dtype -> number of bfloat16 terms whose sum it is, for bfloat16 matrix units.
BF16_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


# ---- CPUs


@dataclasses.dataclass(frozen=True)
class CpuPath:
    """An instruction set that the native CPU kernels are compiled for.

    Attributes:
        features: flag of ``/proc/cpuinfo`` -> the compiler's flag for the same instructions. On ARM
            that is an extension of ``-march``, such as ``"+dotprod"``.
        reason: why a CPU gets this path, in words for ``explain`` and ``doctor``.
        pays_on: the path is the best only on this vendor's CPUs; None stands for all vendors.
        for_tests: a CPU gets this path only if ``MXFP4_FX_CPU`` names it.
        linear_rows: dtype -> see :func:`linear_rows`. Measured with weights of 3 MB and more
            (``python -m benchmarks.linears``): ``avx512_bf16`` on an EPYC (Zen 4), ``avx2`` on an
            EPYC (Zen 3), the others on a Xeon with AMX, with oneDNN, MKL and torch limited to the
            same instructions. ARM's are no measurement: so many rows take at most one instruction
            for a byte of weights (``python -m benchmarks.arm``), so that reading should be what
            takes the time. Other dtypes, and paths that were not measured, are left to torch.
        linear_rows_of: a vendor -> what differs on its CPUs.
        mxfp8_rows: dtype -> see :func:`mxfp8_rows`. Measured on an EPYC (Zen 5), ``avx2`` on an
            EPYC (Zen 3); that float32 and float16 take any number of rows where there is AVX-512
            is a guess, and so is all of ``amx``, of ARM's paths and of ``portable``.
    """

    features: Mapping[str, str]
    reason: str
    pays_on: str | None = None
    for_tests: bool = False
    linear_rows: Mapping[torch.dtype, int] = dataclasses.field(default_factory=dict)
    linear_rows_of: Mapping[str, Mapping[torch.dtype, int]] = dataclasses.field(
        default_factory=dict
    )
    mxfp8_rows: Mapping[torch.dtype, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(DTYPES, 8)
    )

    @property
    def compiler_flags(self) -> tuple[str, ...]:
        flags = tuple(self.features.values())
        return (_ARM + "".join(flags),) if self.is_for_arm else flags

    @property
    def is_for_arm(self) -> bool:
        return any(flag.startswith("+") for flag in self.features.values())


_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c", "bmi2": "-mbmi2"}
_AVX512 = {
    **_AVX2,
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
}
_AVX512_BF16 = {**_AVX512, "avx512vbmi": "-mavx512vbmi", "avx512_bf16": "-mavx512bf16"}
_AMX = {**_AVX512_BF16, "amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"}

_ARM = "-march=armv8.2-a"
_DOTPROD = {"asimddp": "+dotprod"}
# Armv8.6 has both of the latter; no CPU is known to have one without the other.
_MATRICES = {**_DOTPROD, "i8mm": "+i8mm", "bf16": "+bf16"}

_AMD = "AuthenticAMD"
_ANY_NUMBER = 1 << 30  # of rows
_ALL_BUT_BF16 = {torch.float32: _ANY_NUMBER, torch.float16: _ANY_NUMBER}

# The best comes first.
CPU_PATHS: dict[str, CpuPath] = {
    "amx": CpuPath(
        _AMX,
        "the CPU has AMX tiles for bfloat16",
        linear_rows={torch.bfloat16: 5, torch.float16: 12, torch.float32: 12},
        mxfp8_rows={torch.bfloat16: 8, **_ALL_BUT_BF16},
    ),
    "avx512_bf16": CpuPath(
        _AVX512_BF16,
        "the CPU multiplies bfloat16 at twice the rate of float32 and has no AMX",
        # Intel's vdpbf16ps has half the rate of its float32 FMAs, AMD's twice.
        pays_on=_AMD,
        # With 64 rows torch needs three times as long in float16, 1.1 to 1.9 times in float32.
        linear_rows={torch.bfloat16: 10, torch.float16: 96, torch.float32: 64},
        mxfp8_rows={torch.bfloat16: 16, **_ALL_BUT_BF16},
    ),
    "avx512": CpuPath(
        _AVX512,
        "the CPU has AVX-512 with VNNI and no fast bfloat16",
        linear_rows={torch.bfloat16: 16, torch.float16: 12, torch.float32: 12},
        mxfp8_rows={torch.bfloat16: 8, **_ALL_BUT_BF16},
    ),
    "avx2": CpuPath(
        _AVX2,
        "the CPU has AVX2 and no AVX-512 with VNNI",
        # Without AVX-512 torch has no fast linear of 16 bits: from one row to 512 it takes 1.6 to 7
        # times as long.
        linear_rows={torch.bfloat16: _ANY_NUMBER, torch.float16: _ANY_NUMBER, torch.float32: 8},
        linear_rows_of={_AMD: {torch.float32: 48}},
        mxfp8_rows=dict.fromkeys(DTYPES, _ANY_NUMBER),
    ),
    "neon_bf16": CpuPath(
        _MATRICES,
        "the CPU is an ARM with matrix products of bytes and of bfloat16",
        linear_rows={torch.bfloat16: 3, torch.float16: 1, torch.float32: 6},
        mxfp8_rows=dict.fromkeys(DTYPES, 4),
    ),
    "neon_dotprod": CpuPath(
        _DOTPROD,
        "the CPU is an ARM with dot products of bytes, and no matrix products",
        linear_rows={torch.bfloat16: 2, torch.float16: 1, torch.float32: 6},
        mxfp8_rows=dict.fromkeys(DTYPES, 4),
    ),
    "portable": CpuPath({}, f"no vector instructions of this CPU ({platform.machine()}) are known"),
    "amx_emulated": CpuPath(
        _AVX512_BF16, "AMX tiles are computed in software, for tests", for_tests=True
    ),
}

# The bytes of weights from which the native linear of one row is faster than torch's. A call of it
# takes longer than torch's, whose linears of small float32 matrices are fast.
LINEAR_BYTES = {torch.bfloat16: 128 << 10, torch.float16: 1 << 20, torch.float32: 16 << 20}
LINEAR_BYTES_OF = {_AMD: {torch.float32: 2 << 20}}  # vendor -> where it is less

# The environment variable that forces a path, for tests and benchmarks.
CPU_PATH_VARIABLE = "MXFP4_FX_CPU"


@functools.cache
def cpu_path() -> str:
    """Return the instruction-set path of the native CPU kernels, a key of :data:`CPU_PATHS`.

    It is the best path that this CPU runs, unless the environment variable ``MXFP4_FX_CPU`` names
    one.

    Raises:
        KernelsUnavailableError: the variable names an unknown path, or one that this CPU cannot
            run.
    """
    forced = os.environ.get(CPU_PATH_VARIABLE)
    if not forced:
        vendor, _ = _cpu_facts()
        return next(p for p in runnable_paths() if CPU_PATHS[p].pays_on in (None, vendor))
    if forced not in CPU_PATHS:
        raise KernelsUnavailableError(
            f"{CPU_PATH_VARIABLE}={forced!r} is not one of {', '.join(CPU_PATHS)}"
        )
    if not _can_run(forced):
        missing = sorted(CPU_PATHS[forced].features.keys() - _cpu_facts()[1])
        raise KernelsUnavailableError(
            f"{CPU_PATH_VARIABLE}={forced!r}, but this CPU lacks {', '.join(missing) or 'it'}; "
            f"it runs {', '.join(runnable_paths())}"
        )
    return forced


def linear_rows(dtype: torch.dtype) -> int:
    """Return up to how many rows of activations the native linear is faster than torch's."""
    return _linear_rows_on(cpu_path()).get(dtype, 0)


def mxfp8_rows(dtype: torch.dtype) -> int:
    """Return up to how many rows linears in MXFP8 are native; torch multiplies values for more."""
    return CPU_PATHS[cpu_path()].mxfp8_rows[dtype]


@functools.cache
def _linear_rows_on(path: str) -> dict[torch.dtype, int]:
    vendor, _ = _cpu_facts()
    return {**CPU_PATHS[path].linear_rows, **CPU_PATHS[path].linear_rows_of.get(vendor, {})}


def linear_bytes(dtype: torch.dtype) -> int:
    """Return from how many bytes of weights on a native linear of few rows is worth its call."""
    vendor, _ = _cpu_facts()
    return min(LINEAR_BYTES[dtype], LINEAR_BYTES_OF.get(vendor, {}).get(dtype, 1 << 62))


def why_cpu_path(path: str) -> str:
    """Return why the native CPU kernels take ``path``, in words."""
    forced = os.environ.get(CPU_PATH_VARIABLE)
    return f"{CPU_PATH_VARIABLE} says so" if forced else CPU_PATHS[path].reason


@functools.cache
def runnable_paths() -> tuple[str, ...]:
    """Return the instruction-set paths that this CPU can run, best first, without test paths."""
    return tuple(name for name, path in CPU_PATHS.items() if not path.for_tests and _can_run(name))


# Flags of /proc/cpuinfo for instructions that a compiler uses by itself on the CPU it runs on.
_COMPILED_FOR = re.compile(
    r"(sse|ssse|avx|fma|f16c|amx|bmi|abm$|popcnt|movbe|adx|xop|tbm|gfni|sha_ni|v?aes|v?pclmul)"
)


def instruction_sets() -> frozenset[str]:
    """Return this x86 CPU's instructions that code compiled on it for itself may have."""
    return frozenset(flag for flag in _cpu_facts()[1] if _COMPILED_FOR.match(flag))


def _can_run(path: str) -> bool:
    needed = CPU_PATHS[path].features.keys()
    return needed <= _cpu_facts()[1] and ("amx_tile" not in needed or _amx_is_permitted())


@functools.cache
def _cpu_facts() -> tuple[str, frozenset[str]]:
    """Return the CPU's vendor, which ARM's have in no words, and its instruction-set flags."""
    facts = _cpu_info()
    flags = facts.get("flags") or facts.get("Features", "")  # of x86, of an ARM
    return facts.get("vendor_id", ""), frozenset(flags.split())


def cpu_name() -> str:
    """Return an x86 CPU's name, for users; "unknown" for other CPUs."""
    return _cpu_info().get("model name", "unknown")


def _cpu_info() -> dict[str, str]:
    """Return what ``/proc/cpuinfo`` says of the first core of an x86 CPU, or of an ARM."""
    facts: dict[str, str] = {}
    if platform.machine() in ("x86_64", "AMD64", "aarch64"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as lines:
                for line in lines:
                    name, _, value = line.partition(":")
                    facts.setdefault(name.strip(), value.strip())
        except OSError:
            pass
    return facts


def _amx_is_permitted() -> bool:
    """Ask Linux for the use of AMX and return whether it permits it.

    The call is arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
    """
    return ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0


# ---- GPUs


# Device types of GPUs in torch: NVIDIA's and AMD's, and Intel's.
GPU_TYPES = ("cuda", "xpu")


@dataclasses.dataclass(frozen=True)
class GpuLayout:
    """The layout of the weights for a GPU.

    Attributes:
        name: a key of ``layouts.LAYOUTS``.
        reason: why a GPU gets this layout, in words for ``explain`` and ``doctor``.
    """

    name: str
    reason: str


_MMA = GpuLayout("mma_fragments", "weights in the order of mma.sync's registers")
_WGMMA = GpuLayout("wgmma_fragments", "weights in the order of wgmma's registers")
_PLAIN = GpuLayout(CHECKPOINT_ORDER, "no order of its own is known for its matrix instructions")
_FLOAT32 = GpuLayout(
    CHECKPOINT_ORDER, "float32 products, because Triton uses no matrix units before sm_80"
)
# Major compute capability of an NVIDIA GPU -> layout. Other GPUs get the plain one.
_LAYOUTS = {7: _FLOAT32, 8: _MMA, 9: _WGMMA, 12: _MMA}
# The oldest NVIDIA GPU that the kernels are compiled for in tests, and that transformers' own MXFP4
# kernels serve. Triton itself promises nothing before 8.0.
OLDEST_CAPABILITY = (7, 5)
# Architectures on which float32 numbers are multiplied instead of bfloat16 terms. Before sm_80
# Triton multiplies no dtype in matrix units (triton#5066), and float32 takes the fewest steps.
_FLOAT32_GPUS = ("sm_75",)
# Architectures on which the tests (``tests/test_on_gpu.py``) have passed on a GPU.
TRIED_GPUS: tuple[str, ...] = ()

# The oldest Triton that compiles the kernels.
OLDEST_TRITON = (3, 6)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Return the compiler's name of a GPU's architecture, such as ``sm_90`` or ``gfx942``.

    For all of Intel's GPUs the name is ``xpu``, and for a CPU, on which Triton's interpreter runs,
    it is ``interpreter``.
    """
    if device.type == "cpu":
        return "interpreter"
    if device.type == "xpu":
        return "xpu"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def gpu_layout(name: str) -> GpuLayout | None:
    """Return the layout for a GPU architecture, or None if the kernels cannot run on it.

    Args:
        name: what :func:`gpu_name` returns.
    """
    if not name.startswith("sm_"):
        return _PLAIN
    capability = divmod(int(name.removeprefix("sm_")), 10)
    return _LAYOUTS.get(capability[0], _PLAIN) if capability >= OLDEST_CAPABILITY else None


def multiplies_float32(name: str) -> bool:
    """Return whether the kernels multiply float32 numbers on an architecture.

    On all others they multiply bfloat16 terms (:data:`BF16_TERMS`).
    """
    return name in _FLOAT32_GPUS


def gpu_terms(name: str, dtype: torch.dtype) -> int:
    """Return the number of terms whose sum an activation is on an architecture."""
    return 1 if multiplies_float32(name) else BF16_TERMS[dtype]


def on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on ``device``: it uses the current device."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


def is_interpreted() -> bool:
    """Return whether Triton runs its kernels in its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
