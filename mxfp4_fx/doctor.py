"""``doctor``: what this machine will use and why, and whether it works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mxfp4_fx.core import hardware
from mxfp4_fx.core.console import announced
from mxfp4_fx.core.errors import KernelsUnavailableError, Mxfp4Error, VerificationError
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.core.version import __version__
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.ops import target

# Of the self-check's experts. The sizes differ, so that a mix-up of two shows.
_TOKENS, _EXPERTS, _PER_TOKEN, _HIDDEN, _INTERMEDIATE = 5, 4, 2, 64, 96


def examine(only: Sequence[torch.device] = ()) -> int:
    """Print versions and what each device will use, then compile and run experts on each.

    Args:
        only: the devices to look at; by default the CPU and every GPU.

    Returns:
        The exit status: 0 if experts run in MXFP4 on each of these devices, else 1.
    """
    print(f"mxfp4_fx {__version__}")
    print(f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    for package in ("torch", "transformers", "triton", "kernels"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    served = []
    devices = list(only) or _devices()
    for device in devices:
        try:
            chosen = target.choose(device)
        except KernelsUnavailableError as error:
            print(f"{device}: experts stay as they are: {error}")
            continue
        print(f"{device}: {chosen.kernels} kernels, layout {chosen.layout}: {chosen.reason}")
        served.append(device)
    if sys.stdout is not None:
        sys.stdout.flush()  # before what takes seconds
    usable = [device for device in served if _is_right(device)]
    for answer, found in (
        ("usable", usable),
        ("not usable", [device for device in devices if device not in usable]),
    ):
        if found:
            print(f"{answer}: {', '.join(map(str, found))}")
    return 0 if len(usable) == len(devices) else 1


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    for kind in hardware.GPU_TYPES:
        count = torch.get_device_module(kind).device_count()
        devices += [torch.device(kind, at) for at in range(count)]
    return devices


def _is_right(device: torch.device) -> bool:
    """Print how the self-check ends on a device, and return whether it passes.

    Whatever it meets is the answer, and no reason to stop: other devices follow.
    """
    try:
        with announced(f"self-check on {device}: compiling and running experts"):
            self_check(device)
    except Exception as error:
        # Torch wraps what a compiler says; a long text has its gist in the first line.
        inner = getattr(error, "inner_exception", None) or error
        first = next(iter(str(inner).strip().splitlines()), "")
        print(f"{device}: self-check failed: {type(inner).__name__}: {first}")
        return False
    print(f"{device}: self-check passed: compiled experts agree with their definition")
    return True


class _Layer(nn.Module):
    """Experts with a sum around them, which the inner compiler must compile itself."""

    def __init__(self, experts: PackedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        added: Tensor = hidden + self.experts(hidden, indices, weights)
        return added


def self_check(device: torch.device, inner: str = "inductor") -> None:
    """Compile small packed experts, run them, and compare them with the uncompiled ones.

    The first call, ``verify=True``, compares within a bound that is derived from rounding. The
    second one runs the compiled code, which calls the same kernels and adds once: its result must
    be the same.

    Args:
        device: where they run.
        inner: the Dynamo backend that compiles the rewritten graph.

    Raises:
        Mxfp4Error: experts are not rewritten, or their result is wrong.
        Exception: what a compiler or a kernel raises.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    experts = PackedExperts(_EXPERTS, _HIDDEN, _INTERMEDIATE)
    shapes = ((2 * _INTERMEDIATE, _HIDDEN), (_HIDDEN, _INTERMEDIATE))
    for name, (n, k) in zip(PROJECTIONS, shapes, strict=True):
        held = (*quantize(random(_EXPERTS, n, k) / 8), random(_EXPERTS, n))
        for part, value in zip(("blocks", "scales", "bias"), held, strict=True):
            parameter = nn.Parameter(value, requires_grad=False)
            experts.register_parameter(f"{name}_{part}", parameter)
    hidden = random(_TOKENS, _HIDDEN).to(device)
    routes = random(_TOKENS, _EXPERTS).softmax(dim=1).topk(_PER_TOKEN)
    given = routes.indices.to(device), routes.values.to(device)
    options: dict[str, Any] = {"strict": True, "verify": True, "inner": inner}
    layer = _Layer(experts).to(device)
    compiled = torch.compile(layer, backend="mxfp4", dynamic=False, options=options)
    with torch.no_grad():
        verified, result = compiled(hidden, *given), compiled(hidden, *given)
    if not torch.isfinite(verified).all():
        raise VerificationError("the experts' result is not finite")
    if not torch.equal(verified, result):
        raise Mxfp4Error("the compiled experts give another result when they are called again")
