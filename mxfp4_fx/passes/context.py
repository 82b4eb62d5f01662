"""The arguments of every pass besides the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import target
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights.bindings import Binding


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
        verifying: keep each original region beside its rewrite and compare their results. Such a
            graph is for one eager call.
        bindings: filled by ``lower_moe``: the weights that the graph reads swizzled.
        targets: what :meth:`target_for` has chosen so far.
    """

    options: Options
    inputs: list[Any]
    left: Mapping[int, str | None] = dataclasses.field(default_factory=dict)
    verifying: bool = False
    report: GraphReport = dataclasses.field(default_factory=GraphReport)
    bindings: list[Binding] = dataclasses.field(default_factory=list)
    targets: dict[torch.device, target.Target] = dataclasses.field(default_factory=dict)

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
