"""The report on one graph: rewrites, misses with their reasons, attention, linears. Plain data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One MoE MLP that became MXFP4 ops.

    Attributes:
        layer: the module's name, such as ``model.layers.0.mlp.experts``.
        form: the name of the pattern that matched.
        experts, top_k, hidden, intermediate: E, A, H, I.
        activation, alpha, limit, up_offset: the activation and its constants, read from the graph;
            see ``operands.Activation``.
        kernels, layout, reason: the ``target.Target`` that it was lowered to.
        bytes_before, bytes_after: bytes of the two expert weights without their biases, as the
            model holds them and as swizzled MXFP4.
        inputs: the captured graph's inputs that are its weights, as indices.
        travel: between which devices the hidden states travel, in words, or "".
        first_expert: the id of the first of the E experts, if a router of more was proven.
        router: where the routes come from, in words, or "" if the router chooses among these E
            experts.
        why_own_router: why the model's router stays in the graph, or "" if it does not.
    """

    layer: str
    form: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str
    alpha: float
    limit: float
    up_offset: float
    kernels: str = ""
    layout: str = ""
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    inputs: tuple[int, ...] = ()
    travel: str = ""
    first_expert: int = 0
    router: str = ""
    why_own_router: str = ""


@dataclasses.dataclass(frozen=True)
class Miss:
    """A layer that looks like experts, or attention that looks like one with sinks, and stays.

    Attributes:
        layer: the module's name.
        reason: why, in words.
        where: the line of model code that differs, as ``file:line: code``, or "".
        skipped: the user excluded the layer (``options["skip"]``): no warning and no error.
        inputs: the captured graph's inputs that are its weights, as indices, as far as known.
    """

    layer: str
    reason: str
    where: str = ""
    skipped: bool = False
    inputs: tuple[int, ...] = ()

    def __str__(self) -> str:
        at = f" (at {self.where})" if self.where else ""
        return f"{self.layer}: {self.reason}{at}"


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention with sinks that became one op.

    Attributes:
        layer: the module's name, such as ``model.layers.0.self_attn``.
        inputs: the captured graph's input that is its sinks, as an index; empty if none is.
    """

    layer: str
    inputs: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """One linear that reads its weight in MXFP8.

    Attributes:
        layer: the module's name, such as ``model.layers.0.self_attn.q_proj``.
        n, k: the weight's N and K.
        kernels: who computes it.
        bytes_before, bytes_after: bytes of the weight as the model holds it, and in MXFP8.
        inputs: the captured graph's input that is its weight, as an index.
    """

    layer: str
    n: int
    k: int
    kernels: str
    bytes_before: int
    bytes_after: int
    inputs: tuple[int, ...] = ()


@dataclasses.dataclass
class GraphReport:
    """All rewrites and misses of one graph, in the order of the graph.

    Attributes:
        rewrites, misses: the layers that are, or look like, experts.
        linears: how many linears are computed by this package's op.
        mxfp8, linear_misses: the linears that read their weights in MXFP8, and those that should
            and stay as they are, under ``options["linears"] = "mxfp8"``.
        attention, attention_misses: what is, or looks like, attention with sinks.
        notes: what else the user should know.
    """

    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    misses: list[Miss] = dataclasses.field(default_factory=list)
    linears: int = 0
    mxfp8: list[QuantizedLinear] = dataclasses.field(default_factory=list)
    linear_misses: list[Miss] = dataclasses.field(default_factory=list)
    attention: list[Attention] = dataclasses.field(default_factory=list)
    attention_misses: list[Miss] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def changes_graph(self) -> bool:
        return bool(self.rewrites or self.linears or self.mxfp8 or self.attention)
