"""What every pass is given besides the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import target
from mxfp4_fx.passes.report import GraphReport


@dataclasses.dataclass(frozen=True)
class Binding:
    """A graph input that is bound at call time to part of a swizzled weight.

    Attributes:
        sources: the indices, among the captured graph's inputs, of what it is made from: a weight,
            or blocks and scales.
        layout: the layout it is swizzled to.
        part: 0 for blocks, 1 for scales.
        name: the weight's, in the model that was captured; others may share the graph.
    """

    sources: tuple[int, ...]
    layout: str
    part: int
    name: str


@dataclasses.dataclass
class Context:
    """The state of one run of the pipeline.

    Attributes:
        options: what the user asked for.
        inputs: the captured graph's example inputs; parameters are the model's own.
        left: for inputs that are weights of experts whose module is known: why the user wants them
            left as they are, or None. Of other experts only the name in the graph is known.
        report: what the passes found.
        verifying: keep each original region beside its rewrite and compare the two; the graph is
            then for one eager call.
        bindings: filled by ``lower_moe``: new placeholder's name -> what it is bound to.
        targets: what :meth:`target_for` has chosen so far.
    """

    options: Options
    inputs: list[Any]
    left: Mapping[int, str | None] = dataclasses.field(default_factory=dict)
    verifying: bool = False
    report: GraphReport = dataclasses.field(default_factory=GraphReport)
    bindings: dict[str, Binding] = dataclasses.field(default_factory=dict)
    targets: dict[torch.device, target.Target] = dataclasses.field(default_factory=dict)

    def target_for(self, device: torch.device) -> target.Target:
        """Kernels and layout for a device: chosen once, so that all layers of a graph agree.

        Raises:
            KernelsUnavailableError: nothing serves this device under ``options.kernels``.
        """
        if device not in self.targets:
            self.targets[device] = target.choose(device, self.options.kernels)
        return self.targets[device]


# Where a logical op that ``fuse_moe`` made has its ``Rewrite``, in the node's ``meta``.
REWRITE = "mxfp4_rewrite"

Pass = Callable[[fx.GraphModule, Context], None]
