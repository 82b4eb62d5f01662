"""Which decoder layers compute alike: those whose nested compile regions may share a graph.

Dynamo reuses a region's graph for another module if the guards of its first trace hold for it.
These do not see everything (that one tensor is two parameters, a hook that is added later), so
layers share a graph here only if all that their code can read is equal.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from mxfp4_fx.core import torch_private, torch_private_capture
from mxfp4_fx.huggingface.packed import PackedExperts

# Attributes in which layers differ although eager attention does not read them while it computes.
_OWN = {"GptOssAttention": {"layer_idx", "layer_type", "sliding_window"}}
# transformers' implementations of experts; None where a module or a config has none.
_FORMS = {None, "eager", "grouped_mm", "batched_mm"}
_LARGEST = 64  # entries of a container that is compared
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)


class Known:
    """The code of a layer with which regions were tried: nothing else is put into one.

    What cannot be captured whole would be a graph break outside of a region, and is an error in it.
    """

    def __init__(self, layer: nn.Module, modeling: types.ModuleType) -> None:
        kinds = {type(module) for module in layer.modules()} | {PackedExperts}
        self._forwards: dict[type, Any] = {kind: kind.forward for kind in kinds}
        self._modeling = modeling
        self._functions = {
            name: value
            for name, value in vars(modeling).items()
            if isinstance(value, types.FunctionType)
        }

    def stranger_in(self, layer: nn.Module) -> str | None:
        """Return what else than this code a layer runs, in words, or None."""
        for name, module in layer.named_modules():
            if self._forwards.get(type(module)) is not type(module).forward:
                return f"{name} is a {type(module).__name__}, not what transformers puts there"
            form = getattr(getattr(module, "config", None), "_experts_implementation", None)
            if form not in _FORMS:
                return f"regions are not known to take experts_implementation={form!r}"
        for name, function in self._functions.items():
            if getattr(self._modeling, name, None) is not function:
                return f"transformers' {name} was replaced"
        return None


def likeness(layer: nn.Module) -> Hashable | None:
    """Return a value that is equal for layers which compute alike, on weights of their own.

    The result is None if a layer may share its graph with no other: a module of it has hooks or a
    forward of its own, two of its parameters are one tensor, or it draws random numbers.
    """
    parts: list[Hashable] = []
    tensors: set[int] = set()
    for name, module in layer.named_modules(remove_duplicate=False):
        if not _is_plain(module) or _is_random(module):
            return None
        own = _OWN.get(type(module).__name__, ())
        parts.append((name, type(module)))
        for key, value in vars(module).items():
            if key in torch_private_capture.MODULE_PARTS or key in own:
                continue
            parts.append((key, _value(value)))
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) in tensors:
                    return None
                tensors.add(id(tensor))
                like = None if tensor is None else _tensor(tensor)
                if tensor is not None and like is None:
                    return None
                parts.append((key, like))
    return tuple(parts)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call of a module is a call of its class's forward, and of nothing else."""
    if "forward" in vars(module) or torch_private_capture.is_compiled_module(module):
        return False
    hooks = torch_private_capture.hooks_of(module)
    return all(getattr(hook, "__module__", "").startswith("mxfp4_fx.") for hook in hooks)


def _is_random(module: nn.Module) -> bool:
    if not module.training:
        return False
    if "Dropout" in type(module).__name__ or isinstance(module, nn.RReLU):
        return True
    return any("dropout" in key and value != 0 for key, value in vars(module).items())


def _tensor(tensor: Tensor) -> Hashable | None:
    """Return what a graph of the tensor depends on, without its values; None: on too much."""
    if torch_private.is_wrapper(tensor) or torch_private_capture.has_hooks(tensor):
        return None
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    about = (type(tensor), tensor.dtype, tensor.device, tensor.layout, tuple(tensor.shape), strides)
    marks = tuple(sorted(vars(tensor)))
    return *about, tensor.requires_grad, tensor.is_leaf, tensor.is_inference(), marks


def _value(value: Any) -> Hashable:
    """Return what is equal for equal values; of an unknown class, only an object equals itself."""
    kind = type(value)
    if isinstance(value, _PLAIN):
        return kind, value
    if kind in (tuple, list, set, frozenset, dict) and len(value) <= _LARGEST:
        if kind is dict:
            return kind, tuple((_value(k), _value(v)) for k, v in value.items())
        return kind, tuple(map(_value, value))
    return "object", id(value)


class SeenFloats:
    """The floats that layers had when they were captured.

    From the second value on, Dynamo makes a float an input, which a region cannot take.
    """

    def __init__(self) -> None:
        self._epoch: Any = None
        self._values: dict[str, set[float]] = {}

    def have_changed(self, layer: nn.Module, source: Any) -> bool:
        """Note a layer's floats; return whether one was another before, at the same place."""
        epoch = torch_private_capture.scalars_seen()
        if epoch is not self._epoch:
            self._epoch, self._values = epoch, {}
        changed = False
        for name, module in layer.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, float):
                    values = self._values.setdefault(
                        f"{torch_private_capture.path(source)} {name} {key}", set()
                    )
                    values.add(value)
                    changed = changed or len(values) > 1
        return changed
