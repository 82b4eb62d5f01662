"""The only place that asks what a device can do: which kernels, and in which layout."""

from __future__ import annotations

import dataclasses

import torch

from mxfp4_fx.errors import KernelsUnavailableError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    Args:
        device: where the activations live.
        requested: ``Options.kernels``.

    Raises:
        KernelsUnavailableError: nothing serves this device under that request; the message says
            what would.
    """
    if requested == "reference":
        return Target("reference", "row_major", "plain PyTorch was asked for")
    if device.type == "cpu":
        return Target("cpu", "row_major", f"PyTorch on {torch.get_num_threads()} CPU threads")
    raise KernelsUnavailableError(
        f"there are no {requested!r} kernels for device {device.type!r} in this version; "
        "kernels='reference' runs anywhere, slowly"
    )
