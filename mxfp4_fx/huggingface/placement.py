"""``mxfp4_fx.place_experts``: experts that stay on one device while the model is on another.

Their weights never travel. Hidden states and routes do, in ``PackedExperts.forward``. They are a
few kilobytes a token and layer, the weights of a layer of gpt-oss-120b are 1.6 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.huggingface.packed import PackedExperts


def place_experts(model: nn.Module, device: torch.device | str | int) -> int:
    """Move the packed experts of a model to a device, where they stay.

    Afterwards ``model.to(...)``, ``model.cuda()`` and the like move everything else. Another
    call of this function moves the experts again. Experts that are not packed are left alone.

    Args:
        model: a model, or a part of one.
        device: the experts' device, such as "cpu".

    Returns:
        How many modules of packed experts there are.

    Raises:
        OptionError: the model has no packed experts, or they are offloaded by accelerate, whose
            hooks move the weights at each call.
    """
    device = torch.empty(0, device=device).device  # with an index, as tensors have it
    found = [module for module in model.modules() if isinstance(module, PackedExperts)]
    if not found:
        raise OptionError(
            f"place_experts: this {type(model).__name__} has no packed experts; load it with "
            "mxfp4_fx.from_pretrained(...), and do not skip all experts"
        )
    hooked = next((m for m in found if getattr(m, "_hf_hook", None) is not None), None)
    if hooked is not None:
        raise OptionError(
            "place_experts: a hook of accelerate moves these experts' weights at each call: load "
            "the model without device_map, or with from_pretrained(..., experts_device=...)"
        )
    for module in found:
        module.stays_on = None
        module.to(device)
        module.stays_on = device
    return len(found)


def devices(experts_device: Any, device_map: Any) -> tuple[torch.device, torch.device | None]:
    """Return the devices of ``from_pretrained(experts_device=..., device_map=...)``.

    Returns:
        The experts' device, and that of the rest, or None for no map.

    Raises:
        OptionError: torch knows no such device, or the map does not name one device.
    """
    try:
        home = torch.device(experts_device)
    except (RuntimeError, TypeError) as error:
        message = f"from_pretrained(..., experts_device={experts_device!r}): {error}"
        raise OptionError(message) from error
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    try:
        return home, None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"from_pretrained(..., device_map={device_map!r}, experts_device=...): the rest of the "
            'model needs one device beside the experts\'; name it, as in device_map="cuda:0"'
        ) from error
