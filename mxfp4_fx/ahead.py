"""Packed experts are swizzled from the moment in which Dynamo begins to compile what calls them.

A graph binds its weights when Dynamo has traced it, and a model in pieces has compiled its first
piece by then. How packed experts will be bound is known before, and native kernels swizzle them
without Python's lock, so this takes nothing from who traces and compiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from mxfp4_fx.called import Called
from mxfp4_fx.checkpoints.gpt_oss import PROJECTIONS
from mxfp4_fx.core import background, torch_private_dynamo
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.torch_private_distributed import gathered_from, is_filled_by_fsdp
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.ops import target
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights import mapped
from mxfp4_fx.weights.bindings import SWIZZLING
from mxfp4_fx.weights.source import MXFP4, Source
from mxfp4_fx.weights.store import STORE


class Ahead:
    """The packed experts of a call of which Dynamo compiles something.

    Args:
        called: what is called, and the options.
        are_read: whether :func:`mapped.read_ahead` has been called for the weights.
    """

    def __init__(self, called: Called, are_read: bool) -> None:
        self._called, self._are_read = called, are_read
        self._are_freed = called.options.free_weights
        self._layout = _layout(called.options)
        self._weights = list(self._wanted()) if self._layout else []
        self._made: list[tuple[nn.Module, Source]] = []
        self._used: set[nn.Module] = set()
        self._is_over = False

    @contextlib.contextmanager
    def swizzling(self) -> Iterator[None]:
        """Swizzle their weights in a thread while the block runs.

        What no graph has needed until then is left, and the store forgets those that none has read.
        Errors are left to who binds the weights and meets them again.
        """
        if not self._are_read:
            mapped.read_ahead(t for _, source, _ in self._weights for t in source.tensors)
        try:
            with background.meanwhile(self._swizzle) if self._weights else contextlib.nullcontext():
                yield
                self._is_over = True
        finally:
            unused = [source for module, source in self._made if module not in self._used]
            STORE.forget(tensor for source in unused for tensor in source.tensors)

    def ran(self, report: GraphReport, args: Sequence[Any]) -> None:
        """Note that a graph with this report runs on these inputs."""
        if self._weights:
            owners = self._called.owners()
            ids = [id(args[at]) for rewrite in report.rewrites for at in rewrite.inputs]
            self._used.update(owners[key] for key in ids if key in owners)

    def _wanted(self) -> Iterator[tuple[nn.Module, Source, str]]:
        """Yield experts, a weight of theirs that is plain and not swizzled yet, and its name."""
        # The peak of memory must not grow: of weights that are freed, only those in a file are
        # swizzled ahead, and their pages are given back.
        files = mapped.mapped_files() if self._are_freed else []
        for module, name in self._called.experts.items():
            is_left = self._called.left(module) is not None or module in self._called.offloaded
            if is_left or not isinstance(module, PackedExperts):
                continue
            for projection in PROJECTIONS:
                tensors = [getattr(module, f"{projection}_{part}") for part in ("blocks", "scales")]
                if not all(map(_is_plain, tensors)):
                    continue
                source = Source((tensors[0], tensors[1]), MXFP4)
                is_new = not STORE.find(source.tensors, MXFP4, self._layout)
                if is_new and (not self._are_freed or self._is_paged(source, files)):
                    yield module, source, f"{projection} of {name}"

    def _is_paged(self, source: Source, files: Sequence[mapped.MappedFile]) -> bool:
        is_mapped = all(mapped.is_mapped(tensor, files) for tensor in source.tensors)
        return is_mapped and STORE.can_free(source, self._layout)

    def _swizzle(self, is_stopped: Callable[[], bool]) -> None:
        with contextlib.suppress(Exception):
            for module, source, name in tqdm(self._weights, SWIZZLING, leave=False, disable=None):
                if is_stopped() or self._is_over or not _layout(self._called.options):
                    return  # the last: native kernels cannot be compiled
                self._made.append((module, source))
                # They keep the file mapped, which a graph that frees its weights may let go.
                held = [tensor.detach() for tensor in source.tensors]
                STORE.get(source, self._layout, name)
                if self._are_freed:
                    mapped.page_out(held)


def _layout(options: Options) -> str:
    """Return the layout that native kernels will read, or "" if nothing is to be swizzled ahead."""
    if options.inner == "inductor" and torch_private_dynamo.inductor_measures(
        options.mode, options.inductor
    ):
        return ""  # nothing may run beside a compiler that measures
    return target.native_layout(options.kernels)


def _is_plain(tensor: Tensor) -> bool:
    is_own = type(tensor) is nn.Parameter and tensor.is_cpu
    return is_own and gathered_from(tensor) is None and not is_filled_by_fsdp(tensor)
