"""What machines can: the CPU's instruction-set paths, the GPUs' architectures, dtypes.

Facts only. Which kernels a device gets is `ops/target.py`'s choice.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import platform
from collections.abc import Mapping

import torch

from mxfp4_fx.core.errors import KernelsUnavailableError

# Dtypes that experts compute in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bfloat16 numbers whose sum is an activation, for matrix units that multiply bfloat16.
BF16_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


# ---- CPUs


@dataclasses.dataclass(frozen=True)
class CpuPath:
    """A set of instructions that the CPU's kernels are compiled for.

    Attributes:
        features: flag of ``/proc/cpuinfo`` -> the compiler's flag for the same instructions.
        reason: why a CPU gets it, in words for ``explain`` and ``doctor``.
        pays_on: the vendor on whose CPUs alone it is the best; None stands for all.
        for_tests: no CPU gets it unless it is named.
    """

    features: Mapping[str, str]
    reason: str
    pays_on: str | None = None
    for_tests: bool = False

    @property
    def compiler_flags(self) -> tuple[str, ...]:
        return tuple(self.features.values())


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

# The best comes first.
CPU_PATHS: dict[str, CpuPath] = {
    "amx": CpuPath(_AMX, "the CPU has AMX tiles for bfloat16"),
    "avx512_bf16": CpuPath(
        _AVX512_BF16,
        "the CPU multiplies bfloat16 at twice the rate of float32 and has no AMX",
        # Intel's vdpbf16ps has half the rate of its float32 FMAs, AMD's twice.
        pays_on="AuthenticAMD",
    ),
    "avx512": CpuPath(_AVX512, "the CPU has AVX-512 with VNNI and no fast bfloat16"),
    "avx2": CpuPath(_AVX2, "the CPU has AVX2 and no AVX-512 with VNNI"),
    "portable": CpuPath({}, f"no vector instructions of this CPU ({platform.machine()}) are known"),
    "amx_emulated": CpuPath(
        _AVX512_BF16, "AMX tiles are computed in software, for tests", for_tests=True
    ),
}

# Forces one of them, for tests and benchmarks.
CPU_PATH_VARIABLE = "MXFP4_FX_CPU"


@functools.cache
def cpu_path() -> str:
    """The instruction-set path of the CPU's native kernels, a key of :data:`CPU_PATHS`.

    The best that this CPU runs, unless the environment variable ``MXFP4_FX_CPU`` names one.

    Raises:
        KernelsUnavailableError: the variable names a path that is not there or cannot run here.
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


def why_cpu_path(path: str) -> str:
    """Why the CPU's kernels take that path, in words."""
    forced = os.environ.get(CPU_PATH_VARIABLE)
    return f"{CPU_PATH_VARIABLE} says so" if forced else CPU_PATHS[path].reason


@functools.cache
def runnable_paths() -> tuple[str, ...]:
    """The instruction-set paths that this CPU can run, the best first; not those for tests."""
    return tuple(name for name, path in CPU_PATHS.items() if not path.for_tests and _can_run(name))


def _can_run(path: str) -> bool:
    needed = CPU_PATHS[path].features.keys()
    return needed <= _cpu_facts()[1] and ("amx_tile" not in needed or _amx_is_permitted())


@functools.cache
def _cpu_facts() -> tuple[str, frozenset[str]]:
    """Vendor and instruction-set flags of an x86 CPU, as Linux tells them."""
    facts: dict[str, str] = {}
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as lines:
                for line in lines:
                    name, _, value = line.partition(":")
                    facts.setdefault(name.strip(), value.strip())
        except OSError:
            pass
    return facts.get("vendor_id", ""), frozenset(facts.get("flags", "").split())


def _amx_is_permitted() -> bool:
    """Whether Linux lets this process use AMX: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    return ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0


# ---- GPUs


@dataclasses.dataclass(frozen=True)
class GpuLayout:
    """What weights look like for a GPU.

    Attributes:
        name: a key of ``layouts.LAYOUTS``.
        reason: why a GPU gets it, in words for ``explain`` and ``doctor``.
    """

    name: str
    reason: str


_MMA = GpuLayout("mma_fragments", "weights in the order of mma.sync's registers")
_WGMMA = GpuLayout("wgmma_fragments", "weights in the order of wgmma's registers")
_PLAIN = GpuLayout("row_major", "no order of its own is known for its matrix instructions")
# The major compute capability of NVIDIA's GPUs -> the layout. Other GPUs get the plain one.
_LAYOUTS = {8: _MMA, 9: _WGMMA, 12: _MMA}
# Of NVIDIA's, those that multiply bfloat16 in matrix units.
OLDEST_CAPABILITY = 8

# The oldest version that compiles the kernels.
OLDEST_TRITON = (3, 6)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The compiler's name of a GPU's architecture, such as ``sm_90`` or ``gfx942``.

    A CPU, where Triton's interpreter runs, has the name ``interpreter``.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def gpu_layout(name: str) -> GpuLayout | None:
    """The layout for a GPU of that architecture, or None if the kernels cannot run on it.

    Args:
        name: as :func:`gpu_name` says.
    """
    if not name.startswith("sm_"):
        return _PLAIN
    major = int(name.removeprefix("sm_")) // 10
    return _LAYOUTS.get(major, _PLAIN) if major >= OLDEST_CAPABILITY else None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
