"""The arguments of every pass besides the graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import target
from mxfp4_fx.passes.effects import Modes
from mxfp4_fx.passes.memory import Around
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights.bindings import Binding
from mxfp4_fx.weights.source import Encoding


@dataclasses.dataclass
class Context:
    """The state of one run of the pipeline.

    Attributes:
        options: the user's options.
        inputs: the captured graph's example inputs; parameters are the model's own.
        left: index of an input -> why the user wants its experts left as they are, or None if they
            may be rewritten. It holds the weights of experts whose module is known. For all others
            the name in the graph decides.
        report: what the passes found: misses by ``fuse_moe``, rewrites by ``lower_moe``.
        shards: filled by ``localize``: index of an input that is a DTensor -> the shard that the
            graph reads in its place.
        no_shards: filled by ``localize``: a call of ``to_local()`` that stays -> why.
        verifying: keep each original region beside its rewrite and compare their results. Such a
            graph is for one eager call.
        around: if the graph is that of a region, what its inputs are outside of it.
        bindings: filled by ``lower_moe``: the weights that the graph reads swizzled.
        swizzled: the tensors of a weight among the graph's inputs, their encoding and a layout ->
            the inputs for its swizzled blocks and scales.
        targets: what :meth:`target_for` has chosen so far.
        numbers: numbers for the names of new bodies; the compiler takes bodies of one name for one.
    """

    options: Options
    inputs: list[Any]
    left: Mapping[int, str | None] = dataclasses.field(default_factory=dict)
    verifying: bool = False
    shards: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    no_shards: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    report: GraphReport = dataclasses.field(default_factory=GraphReport)
    around: Around | None = None
    bindings: list[Binding] = dataclasses.field(default_factory=list)
    swizzled: dict[tuple[tuple[fx.Node, ...], Encoding, str], tuple[fx.Node, fx.Node]] = (
        dataclasses.field(default_factory=dict)
    )
    targets: dict[torch.device, target.Target] = dataclasses.field(default_factory=dict)

    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    _slots: dict[fx.Node, int] = dataclasses.field(default_factory=dict)

    def slots(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """Return the captured inputs of the graph -> their positions.

        They are those that the graph has at the first call, before a pass adds or removes any.
        """
        if not self._slots:
            placeholders = graph.find_nodes(op="placeholder")
            self._slots = {node: at for at, node in enumerate(placeholders)}
        return self._slots

    def values(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """Return the captured inputs of the graph -> :meth:`value`."""
        return {node: self.value(at) for node, at in self.slots(graph).items()}

    def value(self, at: int) -> Any:
        """Return the example value of a captured input, as the graph reads it."""
        return self.shards.get(at, self.inputs[at])

    @property
    def begin(self) -> Modes | None:
        """Torch's modes where the graph is called, if it is that of a region."""
        return None if self.around is None else self.around.modes

    def within(self, inputs: list[Any], left: Mapping[int, str | None], around: Around) -> Context:
        """Return a context for the body of a region in this graph."""
        return Context(
            self.options,
            inputs,
            left,
            self.verifying,
            around=around,
            targets=self.targets,
            numbers=self.numbers,
        )

    def target_for(self, device: torch.device) -> target.Target:
        """Kernels and layout for a device: chosen once, so that all layers of a graph agree.

        Raises:
            KernelsUnavailableError: nothing serves this device under ``options.kernels``.
        """
        if device not in self.targets:
            self.targets[device] = target.choose(device, self.options.kernels)
        return self.targets[device]


# In the ``meta`` of a logical op that ``fuse_moe`` made: its ``Rewrite``, as far as it is known.
REWRITE = "mxfp4_rewrite"

Pass = Callable[[fx.GraphModule, Context], None]
