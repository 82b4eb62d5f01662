"""Names of weights in torch's profiles. Layers share code: no op knows its layer by itself.

Nothing is looked up or entered unless a profiler runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mxfp4_fx.core import torch_private

P = ParamSpec("P")
T = TypeVar("T")

is_on = torch_private.is_profiling
_named = threading.local()
# Swizzled weights -> their names. A backward op reads them when the call that named them is over.
_swizzled = WeakTensorKeyDictionary()


@contextlib.contextmanager
def naming(names: Mapping[int, str]) -> Iterator[None]:
    """Let ops in the block know a model's own tensors: ``id`` -> the module that holds it."""
    before = getattr(_named, "names", {})
    _named.names = {**before, **names}
    try:
        yield
    finally:
        _named.names = before


def name(swizzled: Tensor, shown: str) -> None:
    """Let ops know a swizzled weight, for as long as it lives."""
    _swizzled[swizzled] = shown


def within(
    context: contextlib.AbstractContextManager[Any], function: Callable[P, T]
) -> Callable[P, T]:
    """Return a function of one call that is made in a context; without one, calls cost nothing."""

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with context:
            return function(*args, **kwargs)

    return run


def shown(weight: Tensor, what: str = "") -> contextlib.AbstractContextManager[Any]:
    """Return a context whose time a profile has under a weight's name, if it has one.

    ``what`` says what the weight is to the module that holds it.
    """
    found = _name_of(weight)
    return _recorded(f"{what} of {found}" if found and what else found)


def shown_linears(weights: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Return such a context for linears, as ``q_proj, k_proj of model.layers.0.self_attn``."""
    found = [name for name in map(_name_of, weights) if name]
    holders = [name.rpartition(".") for name in found]
    parents = dict.fromkeys(parent for parent, _, _ in holders)
    inside = ", ".join(own for _, _, own in holders) if len(parents) == 1 else ", ".join(found)
    parent = next(iter(parents), "") if len(parents) == 1 else ""
    return _recorded(f"{inside} of {parent}" if parent else inside)


def _name_of(weight: Tensor) -> str:
    return _swizzled.get(weight) or getattr(_named, "names", {}).get(id(weight), "")


def _recorded(name: str) -> contextlib.AbstractContextManager[Any]:
    return torch.profiler.record_function(name) if name else contextlib.nullcontext()
