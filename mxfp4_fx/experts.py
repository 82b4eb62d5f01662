"""Where the experts of a model are: which modules a call uses, and which of them hold experts."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mxfp4_fx.core.skip import Skip, bare
from mxfp4_fx.core.torch_private import unwrapped

# Experts whose weights are not stacks of matrices that could be seen.
_EXPERTS = {"GptOssExperts", "PackedExperts", "Mxfp4GptOssMLP", "Mxfp4GptOssExperts"}
_SMALLEST = 32  # sides of a matrix that MXFP4 could hold
_LARGEST = 64  # of containers that are looked into, at every call


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a model holds experts. References are weak, for what is known outlives no model."""

    name: str
    module: weakref.ref[nn.Module]
    parent: weakref.ref[nn.Module]
    child: str

    def found(self) -> nn.Module | None:
        """The experts; None if they are no longer there."""
        module, parent = self.module(), self.parent()
        if parent is None or (self.child and parent._modules.get(self.child) is not module):
            return None
        return module


class Model:
    """A module that is called, and where its experts are, by names as in ``named_modules``.

    But for what wrappers of torch add to these.
    """

    def __init__(self, top: nn.Module) -> None:
        modules = dict(top.named_modules())
        self.top = weakref.ref(top)
        self.kind = type(top).__name__
        self.names = [*map(bare, modules)]
        self.places: list[Place] = []
        self._skipped: dict[tuple[str, ...], set[str]] = {}
        for name, module in modules.items():
            if is_experts(module):
                above, _, child = name.rpartition(".")
                parent = weakref.ref(modules[above])
                self.places.append(Place(bare(name), weakref.ref(module), parent, child))

    def experts(self) -> list[tuple[str, nn.Module]] | None:
        """Names and experts; None if some are no longer where they were."""
        found = [(place.name, place.found()) for place in self.places]
        return None if any(module is None for _, module in found) else found  # type: ignore[return-value]

    def skipped(self, patterns: tuple[str, ...]) -> set[str]:
        """The names of the experts that ``options["skip"]`` names."""
        if patterns not in self._skipped:
            skip = Skip(patterns)
            self._skipped[patterns] = {p.name for p in self.places if skip.names(p.name)}
        return self._skipped[patterns]


_models: weakref.WeakKeyDictionary[nn.Module, Model] = weakref.WeakKeyDictionary()


def look_at(top: nn.Module) -> tuple[Model, list[tuple[str, nn.Module]]]:
    """What is known of a module, and its experts; looked for anew where some have gone."""
    model = _models.get(top)
    experts = model.experts() if model is not None else None
    if model is None or experts is None:
        model = _models[top] = Model(top)
        experts = model.experts() or []
    return model, experts


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds several stacks of matrices, as many in each: one for each expert."""
    if not _EXPERTS.isdisjoint(kind.__name__ for kind in type(module).__mro__):
        return True
    stacks = [len(t) for t in tensors_of(module) if is_stack(t)]
    return len(stacks) > 1 and len(set(stacks)) == 1 and stacks[0] > 1


def is_stack(value: object) -> bool:
    """A weight [E, K, N] of floats, or blocks [E, N, K/32, 16] of bytes."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return False
    if value.dtype is torch.uint8:
        return value.ndim == 4
    return value.ndim == 3 and value.is_floating_point() and min(value.shape[1:]) >= _SMALLEST


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module, those that a parametrization holds for it too."""
    found = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    inner = module._modules.get("parametrizations")
    return found + ([] if inner is None else list(inner.parameters()))


def modules_of(function: Callable[..., Any], args: Sequence[Any]) -> list[nn.Module]:
    """The modules that a call of ``function`` can be seen to use."""
    top = getattr(function, "__self__", None)
    if isinstance(top, nn.Module):
        return [unwrapped(top)]
    found: dict[int, nn.Module] = {}
    todo: list[tuple[Any, int]] = [(function, 0), *((value, 1) for value in args)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, nn.Module):
            value = unwrapped(value)
            found[id(value)] = value
        elif depth < 3:
            todo += [(part, depth + 1) for part in _parts(value)]
    return list(found.values())


def _parts(value: Any) -> list[Any]:
    """What a function, a method, an object or a small container holds."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        names = value.__code__.co_names
        return cells + [value.__globals__[name] for name in names if name in value.__globals__]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, Tensor | type | types.ModuleType):
        return []
    held = value if isinstance(value, dict | list | tuple) else getattr(value, "__dict__", ())
    if len(held) > _LARGEST:
        return []
    return list(held.values()) if isinstance(held, dict) else list(held)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
