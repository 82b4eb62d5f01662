"""The arguments of every pass besides the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.report import GraphReport


@dataclasses.dataclass(frozen=True)
class Binding:
    """A graph input that each call binds to one part of a swizzled weight.

    Attributes:
        sources: the captured graph's inputs that the weight is made from, as indices: a dense
            weight, or blocks and scales.
        layout: the layout of the swizzled weight.
        part: 0 for blocks, 1 for scales.
        name: the weight's name in the model that was captured. Other models may use the same graph.
    """

    sources: tuple[int, ...]
    layout: str
    part: int
    name: str


@dataclasses.dataclass
class Context:
    """The state of one run of the pipeline.

    Attributes:
        options: the user's options.
        inputs: the captured graph's example inputs; parameters are the model's own.
        left: index of an input -> why the user wants its experts left as they are, or None if they
            may be rewritten. It holds the weights of experts whose module is known. For all others
            the name in the graph decides.
        report: the rewrites and misses so far.
        verifying: keep each original region beside its rewrite and compare their results. Such a
            graph is for one eager call.
        bindings: name of a new placeholder -> its binding; filled by ``lower_moe``.
    """

    options: Options
    inputs: list[Any]
    left: Mapping[int, str | None] = dataclasses.field(default_factory=dict)
    verifying: bool = False
    report: GraphReport = dataclasses.field(default_factory=GraphReport)
    bindings: dict[str, Binding] = dataclasses.field(default_factory=dict)


# The key in ``node.meta`` under which ``fuse_moe`` keeps the ``Rewrite`` of a logical op.
REWRITE = "mxfp4_rewrite"

Pass = Callable[[fx.GraphModule, Context], None]
