"""The experts of a model: which modules a call uses, and which of these are experts."""

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
from mxfp4_fx.weights.upkeep import wrapped_tensors

# Classes of experts whose weights `is_stack` may not recognize.
_OF_THE_HUB = {"Mxfp4GptOssMLP", "Mxfp4GptOssExperts"}
_EXPERTS = {"GptOssExperts", "PackedExperts", *_OF_THE_HUB}
_OF_GPT_OSS, _LAYER = "transformers.models.gpt_oss.", "GptOssDecoderLayer"
_SMALLEST = 32  # side of a matrix that MXFP4 can hold
_LARGEST = 64  # entries of a container that `modules_of` searches, which it does at every call


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """The place of experts in a model. References are weak, so that they keep no model alive."""

    name: str
    module: weakref.ref[nn.Module]
    parent: weakref.ref[nn.Module]
    child: str

    def found(self) -> nn.Module | None:
        """Return the experts, or None if they are no longer there."""
        module, parent = self.module(), self.parent()
        if parent is None or (self.child and parent._modules.get(self.child) is not module):
            return None
        return module


class Model:
    """A module that is called, and the places of its experts.

    Names are those of ``named_modules``, without the parts that torch's wrappers add.
    """

    def __init__(self, top: nn.Module) -> None:
        modules = dict(top.named_modules())
        self.top = weakref.ref(top)
        self.kind = type(top).__name__
        self.names = [*map(bare, modules)]
        self.places: list[Place] = []
        self._skipped: dict[tuple[str, ...], set[str]] = {}
        inside: set[nn.Module] = set()
        for name, module in modules.items():
            if is_experts(module) and module not in inside:
                above, _, child = name.rpartition(".")
                parent = weakref.ref(modules[above])
                # transformers' MXFP4 MLP does not call its experts, so it stands for them.
                inner = module._modules.get("experts")
                if inner is not None and is_experts(inner):
                    inside.add(inner)
                    name = f"{name}.experts" if name else "experts"
                self.places.append(Place(bare(name), weakref.ref(module), parent, child))

    def experts(self) -> list[tuple[str, nn.Module]] | None:
        """Return (name, experts) pairs, or None if some experts are no longer in their place."""
        found = [(place.name, place.found()) for place in self.places]
        return None if any(module is None for _, module in found) else found  # type: ignore[return-value]

    def skipped(self, patterns: tuple[str, ...]) -> set[str]:
        """Return the names of the experts that the patterns of ``options["skip"]`` name."""
        if patterns not in self._skipped:
            skip = Skip(patterns)
            self._skipped[patterns] = {p.name for p in self.places if skip.names(p.name)}
        return self._skipped[patterns]


_models: weakref.WeakKeyDictionary[nn.Module, Model] = weakref.WeakKeyDictionary()


def look_at(top: nn.Module) -> tuple[Model, list[tuple[str, nn.Module]]]:
    """Return the :class:`Model` of a module, and its experts; search again if some have gone."""
    model = _models.get(top)
    experts = model.experts() if model is not None else None
    if model is None or experts is None:
        model = _models[top] = Model(top)
        experts = model.experts() or []
    return model, experts


def looked_at() -> list[nn.Module]:
    """Return the modules that :func:`look_at` was called with and that still live."""
    return list(_models)


def is_part(top: nn.Module) -> bool:
    """Return whether a module without experts is a part of a model whose other parts have them.

    That is so if it has modules of GPT-OSS and none of its layers, each of which has experts (the
    last stage of a pipeline may be a norm and a head), or if all its parameters are those of a
    model with experts that was called before.
    """
    kinds = {kind for module in top.modules() for kind in type(module).__mro__}
    names = {kind.__name__ for kind in kinds if kind.__module__.startswith(_OF_GPT_OSS)}
    if names:
        return _LAYER not in names
    held = {id(parameter) for parameter in top.parameters()}
    others = [other for other, model in list(_models.items()) if model.places]
    return bool(held) and any(held <= {id(p) for p in other.parameters()} for other in others)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is of a known class, or has several stacks of equal length."""
    if not _EXPERTS.isdisjoint(kind.__name__ for kind in type(module).__mro__):
        return True
    stacks = [len(t) for t in tensors_of(module) if is_stack(t)]
    return len(stacks) > 1 and len(set(stacks)) == 1 and stacks[0] > 1


def is_stack(value: object) -> bool:
    """Return whether `value` is a weight of floats with three axes, or blocks [E, N, K/32, 16]."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return False
    if value.dtype is torch.uint8:
        return value.ndim == 4
    return value.ndim == 3 and value.is_floating_point() and min(value.shape[1:]) >= _SMALLEST


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers, and what others hold for it.

    Others are parametrizations, and the hub's classes in transformers' MXFP4 modules.
    """
    found = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if type(module).__name__ in _OF_THE_HUB:
        found += wrapped_tensors(module._modules.get("experts") or module)
    inner = module._modules.get("parametrizations")
    return found + ([] if inner is None else list(inner.parameters()))


def holders_of(tops: Sequence[nn.Module]) -> dict[int, list[nn.Module]]:
    """Return the ids of all parameters of modules -> the modules inside that hold them."""
    found: dict[int, list[nn.Module]] = {}
    for module in dict.fromkeys(module for top in tops for module in top.modules()):
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(module)
    return found


def names_of_holders(tops: Sequence[nn.Module]) -> dict[int, str]:
    """Return the ids of all parameters of modules -> the name of the module that holds each.

    Of several that hold one, a linear is taken, or else the first.
    """
    found: dict[int, str] = {}
    for name, module in ((name, module) for top in tops for name, module in top.named_modules()):
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in found or isinstance(module, nn.Linear):
                found[id(parameter)] = bare(name)
    return found


def modules_of(function: Callable[..., Any], args: Sequence[Any]) -> list[nn.Module]:
    """Return the modules that a call of ``function`` uses, as far as Python objects show it.

    That is the module whose method it is, or else the modules in its closure, its globals and
    `args`.
    """
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
    """Return the values in a function, a method, an object or a small container."""
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
