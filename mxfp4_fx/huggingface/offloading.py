"""Weights that accelerate offloads to the CPU or the disk, as a ``device_map`` may say.

A hook puts new parameters with the values into a module before each call of it, and parameters on
meta after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def offloaded(top: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in ``top`` whose own parameters exist during a call alone."""
    for module in top.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
            if getattr(one, "offload", False) is True:
                yield from module.modules() if one.place_submodules else (module,)
