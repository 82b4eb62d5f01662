"""The only place that asks what a device can do: which kernels, and in which layout."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import warnings

import torch

from mxfp4_fx.core.errors import KernelsUnavailableError, NativeBuildError, SlowKernelsWarning
from mxfp4_fx.ops import hub_loader, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bfloat16 numbers whose sum is an activation, for matrix units that multiply bfloat16.
BF16_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

OLDEST_TRITON = (3, 6)

# Forces an instruction-set path of the CPU's kernels, for tests and benchmarks.
CPU_PATH_VARIABLE = "MXFP4_FX_CPU"

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_AVX512_BF16 = _AVX512 | {"avx512vbmi", "avx512_bf16"}
# Instruction-set path -> the flags of /proc/cpuinfo that it needs; the best comes first.
_NEEDS: dict[str, frozenset[str]] = {
    "amx": _AVX512_BF16 | {"amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": frozenset(),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What the experts of one device are lowered to.

    Attributes:
        kernels: the implementation that the device ops call, a key of ``ops.schemas.KERNELS``.
        layout: the layout of the swizzled weights that it reads, a key of ``layouts.LAYOUTS``.
        reason: why these, in words for ``explain`` and ``doctor``.
    """

    kernels: str
    layout: str
    reason: str


def choose(device: torch.device, requested: str = "auto") -> Target:
    """Choose kernels and layout for a device.

    The CPU's kernels are compiled now if need be, the hub's loaded if they were asked for.

    Args:
        device: where the activations live.
        requested: ``Options.kernels``.

    Raises:
        KernelsUnavailableError: nothing serves this device under that request; the message says
            what would.
    """
    if requested == "reference":
        return Target("reference", "row_major", "plain PyTorch was asked for")
    if requested == "hub":
        return _hub(device)
    if requested == "triton" or (requested == "auto" and device.type == "cuda"):
        return _triton(device, requested)
    if device.type != "cpu":
        raise KernelsUnavailableError(
            f"there are no {requested!r} kernels for device {device.type!r} in this version; "
            "kernels='reference' runs anywhere, slowly"
        )
    threads = f"on {torch.get_num_threads()} CPU threads"
    if requested == "pytorch":
        return Target("pytorch", "row_major", f"PyTorch {threads}, as was asked for")
    try:
        native.load(cpu_path())
    except NativeBuildError as error:
        if requested == "cpu":
            raise KernelsUnavailableError(
                f"kernels='cpu' was asked for, and the native kernels cannot be used: {error}"
            ) from error
        _warn_slow(str(error))
        return Target("pytorch", "row_major", f"PyTorch {threads}, for {error}")
    return Target("cpu", "cpu_panels", f"native {threads}, {cpu_path()}: {_why(cpu_path())}")


def kernels_for(layout: str, device: torch.device) -> str:
    """Kernels that read a layout on a device: the best, or the reference, which reads them all."""
    with contextlib.suppress(KernelsUnavailableError):
        best = choose(device)
        if best.layout == layout:
            return best.kernels
    return "reference"


def _hub(device: torch.device) -> Target:
    if device.type not in hub_loader.DEVICES:
        raise KernelsUnavailableError(
            f"kernels='hub' needs a GPU (CUDA or ROCm), and the model is on {device.type!r}; "
            "kernels='auto' takes the best for the device"
        )
    hub_loader.load()
    return Target("hub", "row_major", f"{hub_loader.REPOSITORY}, as was asked for")


def _triton(device: torch.device, requested: str) -> Target:
    others = "kernels='reference' runs anywhere, slowly"
    asked = ", as was asked for" if requested == "triton" else ""
    version = _triton_version(requested)
    if device.type == "cpu" and not is_interpreted():
        raise KernelsUnavailableError(
            f"kernels='triton' needs a GPU, and the model is on {device.type!r}; kernels='auto' "
            "takes the best for the device (Triton's interpreter, TRITON_INTERPRET=1, runs them "
            "for tests)"
        )
    if device.type == "cpu":
        return Target("triton", "wgmma_fragments", f"Triton {version}'s interpreter{asked}")
    if device.type != "cuda":
        raise KernelsUnavailableError(
            f"kernels='triton' runs on NVIDIA and AMD GPUs, not on {device.type!r}; {others}"
        )
    if not torch.cuda.is_available():
        raise KernelsUnavailableError(
            f"kernels={requested!r}: the model is on {device.type!r}, and torch "
            f"{torch.__version__} sees no GPU; {others}"
        )
    name = gpu_name(device)
    layout = gpu_layout(name)
    if layout is None:
        raise KernelsUnavailableError(
            f"{torch.cuda.get_device_name(device)} ({name}) has no matrix instructions for "
            f"bfloat16, which kernels='triton' needs (compute capability 8.0); {others}"
        )
    described = f"Triton {version} on {torch.cuda.get_device_name(device)} ({name}){asked}"
    return Target("triton", layout, f"{described}: {_GPU_LAYOUTS[layout]}")


# Layout -> why a GPU gets it.
_GPU_LAYOUTS = {
    "wgmma_fragments": "weights in the order of wgmma's registers",
    "mma_fragments": "weights in the order of mma.sync's registers",
    "row_major": "no order of its own is known for its matrix instructions",
}


def gpu_layout(name: str) -> str | None:
    """The layout for a GPU of that architecture, or None if the kernels cannot run on it.

    Args:
        name: as :func:`gpu_name` says.
    """
    if not name.startswith("sm_"):
        return "row_major"
    major = int(name.removeprefix("sm_")) // 10
    if major < 8:
        return None
    return {8: "mma_fragments", 9: "wgmma_fragments", 12: "mma_fragments"}.get(major, "row_major")


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


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _triton_version(requested: str) -> str:
    """Triton's version, if it is one that the kernels compile with."""
    remedy = "pip install 'mxfp4_fx[triton]'; or kernels='reference', which runs anywhere, slowly"
    try:
        import triton
    except ImportError as error:
        raise KernelsUnavailableError(
            f"kernels={requested!r} needs the package 'triton', which cannot be imported "
            f"({error}): {remedy}"
        ) from error
    version: str = triton.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TRITON:
        raise KernelsUnavailableError(
            f"kernels={requested!r} needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, and "
            f"this is {version}: {remedy}"
        )
    return version


@functools.cache
def cpu_path() -> str:
    """The instruction-set path of the CPU's native kernels, a key of ``native.PATHS``.

    The best that this CPU runs, unless the environment variable ``MXFP4_FX_CPU`` names one.

    Raises:
        KernelsUnavailableError: the variable names a path that is not there or cannot run here.
    """
    forced = os.environ.get(CPU_PATH_VARIABLE)
    if not forced:
        return next(path for path in runnable_paths() if path != "avx512_bf16" or _is_amd())
    if forced not in native.PATHS:
        raise KernelsUnavailableError(
            f"{CPU_PATH_VARIABLE}={forced!r} is not one of {', '.join(native.PATHS)}"
        )
    needed = "avx512_bf16" if forced == "amx_emulated" else forced
    if needed not in runnable_paths():
        missing = sorted(_NEEDS[needed] - _cpu_facts()[1])
        raise KernelsUnavailableError(
            f"{CPU_PATH_VARIABLE}={forced!r}, but this CPU lacks {', '.join(missing) or 'it'}; "
            f"it runs {', '.join(runnable_paths())}"
        )
    return forced


@functools.cache
def runnable_paths() -> tuple[str, ...]:
    """The instruction-set paths that this CPU can run, the best first."""
    flags = _cpu_facts()[1]
    paths = [path for path, needed in _NEEDS.items() if needed <= flags]
    if "amx" in paths and not _amx_is_permitted():
        paths.remove("amx")
    return tuple(paths)


def _why(path: str) -> str:
    if os.environ.get(CPU_PATH_VARIABLE):
        return f"{CPU_PATH_VARIABLE} says so"
    return {
        "amx": "the CPU has AMX tiles for bfloat16",
        "avx512_bf16": "the CPU multiplies bfloat16 at twice the rate of float32 and has no AMX",
        "avx512": "the CPU has AVX-512 with VNNI and no fast bfloat16",
        "avx2": "the CPU has AVX2 and no AVX-512 with VNNI",
    }.get(path, f"no vector instructions of this CPU ({platform.machine()}) are known")


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


def _is_amd() -> bool:
    # Intel's vdpbf16ps has half the rate of its float32 FMAs, AMD's twice.
    return _cpu_facts()[0] == "AuthenticAMD"


def _amx_is_permitted() -> bool:
    """Whether Linux lets this process use AMX: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    return ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(
        f"the experts run in PyTorch, several times slower than natively: {reason}",
        SlowKernelsWarning,
        stacklevel=3,
    )
