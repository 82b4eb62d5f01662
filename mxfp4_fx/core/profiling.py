"""Names of weights in torch's profiles. Layers share code: no op knows its layer by itself.

Nothing is looked up or entered unless a profiler runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import torch_private

is_on = torch_private.is_profiling
_named = threading.local()


@contextlib.contextmanager
def naming(names: Mapping[int, str]) -> Iterator[None]:
    """Let :func:`shown` know the weights that ops read in the block: ``id`` of a tensor -> name."""
    before = getattr(_named, "names", {})
    _named.names = {**before, **names}
    try:
        yield
    finally:
        _named.names = before


def shown(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context whose time a profile has under a weight's name, if it has one."""
    name = getattr(_named, "names", {}).get(id(weight))
    return contextlib.nullcontext() if name is None else torch.profiler.record_function(name)


@contextlib.contextmanager
def of_op(op: str | None, weight: Tensor | None) -> Iterator[None]:
    """Show the block's time as an op's, and under a weight's name, if they are given."""
    with contextlib.ExitStack() as contexts:
        if op is not None:
            contexts.enter_context(torch.profiler.record_function(op))
        if weight is not None:
            contexts.enter_context(shown(weight))
        yield
