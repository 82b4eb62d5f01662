"""The choice of kernels and layout for a device, and its reason.

It depends on the machine (`core/hardware.py`) and on whether the kernels are available: `native.py`
builds those for the CPU, `hub_loader.py` loads those of the hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4_fx.core import hardware, torch_private
from mxfp4_fx.core.errors import KernelsUnavailableError, NativeBuildError, SlowKernelsWarning
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, LAYOUTS
from mxfp4_fx.ops import hub_loader, native

# The kernels that compute attention with sinks, which is lowered on CPUs only.
ATTENTION = "cpu"

_NATIVE_LAYOUT = "cpu_panels"
# Kernels -> layouts that they read besides that of their target.
_READ = {"reference": tuple(LAYOUTS), "hub": hub_loader.LAYOUTS}


@dataclasses.dataclass(frozen=True)
class Target:
    """The kernels and the layout that the experts on a device are lowered to.

    Attributes:
        kernels: the implementation that the device ops call, a key of ``ops.schemas.KERNELS``.
        layout: the layout of the swizzled weights that it reads, a key of ``layouts.LAYOUTS``.
        reason: why the device gets these, in words for ``explain`` and ``doctor``.
    """

    kernels: str
    layout: str
    reason: str

    def layout_of(self, held: tuple[str, ...]) -> str:
        """Return the layout that these kernels get a weight in.

        Args:
            held: the layouts that the weight has in the model's memory; one that the kernels read
                spares a copy.
        """
        read = _READ.get(self.kernels, ())
        return next((layout for layout in held if layout in read), self.layout)


def choose(device: torch.device, requested: str = "auto") -> Target:
    """Choose kernels and layout for a device.

    This compiles the native CPU kernels if the choice needs them and they are not built, and loads
    the hub's kernels if ``requested`` names them.

    Args:
        device: the device of the activations.
        requested: ``Options.kernels``.

    Raises:
        KernelsUnavailableError: no kernels that ``requested`` allows can run on the device. The
            message has the remedy.
    """
    if requested == "reference":
        return Target("reference", CHECKPOINT_ORDER, "plain PyTorch was asked for")
    if requested == "hub":
        return _hub(device)
    if requested == "triton" or (requested == "auto" and device.type in hardware.GPU_TYPES):
        return _triton(device, requested)
    if device.type != "cpu":
        raise KernelsUnavailableError(
            f"there are no {requested!r} kernels for device {device.type!r} in this version; "
            "kernels='reference' runs anywhere, slowly"
        )
    threads = f"on {torch.get_num_threads()} CPU threads"
    if requested == "pytorch":
        return Target("pytorch", CHECKPOINT_ORDER, f"PyTorch {threads}, as was asked for")
    path = hardware.cpu_path()
    try:
        native.load(path)
    except NativeBuildError as error:
        if requested == "cpu":
            raise KernelsUnavailableError(
                f"kernels='cpu' was asked for, and the native kernels cannot be used: {error}"
            ) from error
        _warn_slow(str(error))
        return Target("pytorch", CHECKPOINT_ORDER, f"PyTorch {threads}, for {error}")
    why = hardware.why_cpu_path(path)
    return Target("cpu", _NATIVE_LAYOUT, f"native {threads}, {path}: {why}")


def load_ahead(requested: str, device: torch.device) -> None:
    """Compile the native CPU kernels in a thread, if these will be chosen and are not compiled.

    Whoever needs them first waits for the rest. A failure comes to them, too. What swizzles weights
    is ready before the rest.
    """
    if requested not in ("auto", "cpu") or device.type != "cpu":
        return
    # A RuntimeError that is none of ours: the system gives no thread.
    with contextlib.suppress(KernelsUnavailableError, RuntimeError):
        path = hardware.cpu_path()
        if path not in native.libraries.loaded:
            native.load_in_thread(path)


def native_layout(requested: str) -> str:
    """Return the layout of the native CPU kernels that :func:`choose` will choose, or "".

    It asks for nothing to be compiled, so :func:`choose` may find that they cannot be used. Once it
    has found that, the layout is "".
    """
    if requested not in ("auto", "cpu"):
        return ""
    try:
        path = hardware.cpu_path()
    except KernelsUnavailableError:
        return ""
    return "" if native.libraries.has_failed(path) else _NATIVE_LAYOUT


def linear_rows(dtype: torch.dtype) -> int:
    """Return ``hardware.linear_rows``, or 0 if the path that was asked for is none."""
    try:
        return hardware.linear_rows(dtype)
    except KernelsUnavailableError:
        return 0


def linears_pay(weights: Sequence[Tensor]) -> bool:
    """Return whether native linears of one input are faster than torch's if they have few rows.

    Args:
        weights: the weights of one dtype that one call of the op reads.
    """
    dtype = weights[0].dtype
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return linear_rows(dtype) > 0 and size >= hardware.linear_bytes(dtype)


def has_native_linears(requested: str) -> bool:
    """Return whether the native CPU kernels can compute linears; compile them if need be.

    Where they cannot, torch's own linears are no fault, so there is no warning.

    Args:
        requested: ``Options.kernels``.
    """
    if requested not in ("auto", "cpu"):
        return False
    try:
        native.load(hardware.cpu_path())
    except (KernelsUnavailableError, NativeBuildError):
        return False
    return True


def mxfp8_kernels(chosen: Target, device: torch.device) -> str:
    """Return the kernels that compute linears with MXFP8 weights on a device.

    Args:
        chosen: the device's target.
        device: where the weights are.

    Raises:
        KernelsUnavailableError: the hub's kernels were chosen, which have none, and Triton's cannot
            run on the device.
    """
    if chosen.kernels == "hub":
        try:
            return choose(device, "triton").kernels
        except KernelsUnavailableError as error:
            raise KernelsUnavailableError(
                "options['linears']='mxfp8' needs Triton's kernels beside kernels='hub', which has "
                f"none for linears, and they cannot run here: {error}. Or leave "
                "options['linears'] out: linears stay exact"
            ) from error
    return "reference" if chosen.kernels == "pytorch" else chosen.kernels


def has_attention(requested: str) -> bool:
    """Return whether ``Options.kernels`` lets the CPU's kernels compute attention."""
    return requested in ("auto", ATTENTION)


def why_no_attention() -> str | None:
    """Return why the CPU's kernels cannot compute attention with sinks, or None if they can."""
    if torch_private.flash_attention_for_cpu is None:
        return f"torch {torch.__version__} has no flash attention for CPUs"
    return None


def kernels_for(layout: str, device: torch.device) -> str:
    """Return kernels that read a layout on a device.

    They are the device's best kernels if these read it, else the reference, which reads all
    layouts.
    """
    with contextlib.suppress(KernelsUnavailableError):
        best = choose(device)
        if best.layout == layout:
            return best.kernels
    return "reference"


def _hub(device: torch.device) -> Target:
    if device.type not in hub_loader.DEVICES:
        raise KernelsUnavailableError(
            f"kernels='hub' needs a GPU (CUDA, ROCm or XPU), and the model is on {device.type!r}; "
            "kernels='auto' takes the best for the device"
        )
    if device.type == "xpu":
        _triton_version(device, "hub")
    hub_loader.load()
    why = f"{hub_loader.REPOSITORY}, as was asked for; untried: no test has run it on a GPU"
    return Target("hub", CHECKPOINT_ORDER, why)


def _triton(device: torch.device, requested: str) -> Target:
    others = "kernels='reference' runs anywhere, slowly"
    asked = ", as was asked for" if requested == "triton" else ""
    version = _triton_version(device, requested)
    if device.type == "cpu" and not hardware.is_interpreted():
        raise KernelsUnavailableError(
            f"kernels='triton' needs a GPU, and the model is on {device.type!r}; kernels='auto' "
            "takes the best for the device (Triton's interpreter, TRITON_INTERPRET=1, runs them "
            "for tests)"
        )
    if device.type == "cpu":
        return Target("triton", "wgmma_fragments", f"Triton {version}'s interpreter{asked}")
    if device.type not in hardware.GPU_TYPES:
        raise KernelsUnavailableError(
            f"kernels='triton' runs on NVIDIA, AMD and Intel GPUs, not on {device.type!r}; {others}"
        )
    gpus = torch.get_device_module(device)
    if not gpus.is_available():
        raise KernelsUnavailableError(
            f"kernels={requested!r}: the model is on {device.type!r}, and torch "
            f"{torch.__version__} sees no GPU; {others}"
        )
    name = hardware.gpu_name(device)
    layout = hardware.gpu_layout(name)
    if layout is None:
        raise KernelsUnavailableError(
            f"{gpus.get_device_name(device)} ({name}) is older than compute capability "
            f"{'.'.join(map(str, hardware.OLDEST_CAPABILITY))}, which kernels='triton' needs; "
            f"{others}"
        )
    described = f"Triton {version} on {gpus.get_device_name(device)} ({name}){asked}"
    tried = "" if name in hardware.TRIED_GPUS else f"; untried: no test has run on {name}"
    return Target("triton", layout.name, f"{described}: {layout.reason}{tried}")


def _triton_version(device: torch.device, requested: str) -> str:
    """Return Triton's version.

    Raises:
        KernelsUnavailableError: Triton is not installed, too old to compile the kernels, or a build
            that cannot compile for Intel's GPUs, which the device is.
    """
    install = "pip install 'mxfp4_fx[triton]'"
    if device.type == "xpu":
        install = "install the one that torch's build for Intel GPUs needs (triton-xpu)"
    remedy = f"{install}; or kernels='reference', which runs anywhere, slowly"
    try:
        import triton
    except ImportError as error:
        raise KernelsUnavailableError(
            f"kernels={requested!r} needs the package 'triton', which cannot be imported "
            f"({error}): {remedy}"
        ) from error
    version: str = triton.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < hardware.OLDEST_TRITON:
        oldest = ".".join(map(str, hardware.OLDEST_TRITON))
        raise KernelsUnavailableError(
            f"kernels={requested!r} needs Triton {oldest} or newer, and this is {version}: {remedy}"
        )
    if device.type == "xpu" and "intel" not in triton.backends.backends:
        raise KernelsUnavailableError(
            f"kernels={requested!r} needs a Triton that compiles for Intel GPUs, and this one, "
            f"{version}, compiles for {', '.join(triton.backends.backends)}: {remedy}"
        )
    return version


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(
        f"the experts run in PyTorch, several times slower than natively: {reason}",
        SlowKernelsWarning,
        stacklevel=3,
    )
