"""Whether a rewritten graph does what the captured one does.

Nothing here has a tolerance. Outside of a rewritten region both graphs make the same calls, so that

- with the region's result put into the captured graph in the place of its own, every output and
  every input after the call must be the same **bit for bit**;
- the region's result, the rewritten and the captured one, must be the experts' of what the region
  reads, within the running error analysis of ``oracle.py``: it holds for every evaluation in
  float32 that rounds to nearest, whatever its order, and the weights are MXFP4's exactly;
- so must the gradients that the region's ops hand back for the gradient that they are given
  (``gradients.py``);
- whose gradient is whose is seen in float64, with the region as a formula: rewritten and captured
  graph then differ by float64's rounding, for which float32's is a bound 2**29 times as large.

Autocast and casts make regions of several dtypes. What is captured may then round every step to the
coarsest one, what is rewritten only as its ops do.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from oracle import Bounded, Matrices, assert_as_accurate, assert_within
from torch import Tensor, fx

from fuzz.bases import Base, Edit, Inputs, modes_kept, new_inputs
from fuzz.gradients import FORMULAS, Tap, gradients, softmax_backwards
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.canonicalize import canonicalize
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.fuse_moe import fuse_moe
from mxfp4_fx.weights.swizzle import unswizzle_weight

_MXFP4 = torch.ops.mxfp4


class Wrong(Exception):
    """The rewritten graph does something else."""


@dataclass
class Region:
    """What one run of a rewritten region read and gave, as copies.

    Attributes:
        routing: of ``routing`` or ``routing.routes``: its arguments by name.
        operands: of the two ``matmul_ogs``, their arguments by name.
        taps: where gradients pass, by name.
    """

    routing: dict[str, Any] = field(default_factory=dict)
    operands: list[dict[str, Any]] = field(default_factory=list)
    result: Tensor | None = None
    taps: dict[str, Tap] = field(default_factory=dict)


class Recorder:
    """An inner compiler that runs a lowered graph as it is and records its regions.

    Attributes:
        runs: for each call, root's name in the captured graph -> what its region did.
    """

    def __init__(self) -> None:
        self.runs: list[dict[str, Region]] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs.append({})
            return _Recording(gm, self.runs[-1]).run(*args)

        return run


class _Recording(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, regions: dict[str, Region]) -> None:
        super().__init__(gm)
        self.regions = regions
        ours = collections.defaultdict(list)
        for node in gm.graph.nodes:
            if str(node.target).startswith(("mxfp4.routing", "mxfp4.matmul_ogs")):
                ours[node.meta.get("fuzz")].append(node)
        # A rewrite's ops are noted as made by the region's root; packed experts' own are not.
        self.ours = {
            node: name for name, nodes in ours.items() if len(nodes) == 3 for node in nodes
        }

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.ours:
            return super().run_node(n)
        region = self.regions.setdefault(self.ours[n], Region())
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target: Any = n.target
        arguments = target._schema.arguments
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given |= {**dict(zip([a.name for a in arguments], args, strict=False)), **kwargs}
        copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in given.items()}
        if "routing" in str(target):
            region.routing = copies
            key = "logits" if "logits" in given else "weights"
            tapped = [key]
        else:
            tapped = ["x"] if not region.operands else []
            region.operands.append(copies)
        for key in tapped:
            region.taps[key] = Tap()
            given[key] = region.taps[key](given[key])
        result = target(**given)
        if len(region.operands) == 2:
            region.taps["result"] = Tap()
            region.taps["result"].watch(result)
            region.result = result.detach().clone()
        return result


class _Replaced(fx.Interpreter):
    """Runs a captured graph with the results of some nodes replaced; what they were is kept."""

    def __init__(self, gm: fx.GraphModule, results: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self.results = results
        self.own: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name not in self.results:
            return result
        self.own[n.name] = result.detach().clone()
        new = self.results[n.name]
        if new.shape != result.shape:
            raise Wrong(f"{n} is {tuple(new.shape)}, not {tuple(result.shape)}")
        return new.to(result.dtype, copy=True)


@dataclass
class Outcome:
    """What a call gave and left behind."""

    outputs: list[Any]
    inputs: list[Any]
    gradients: list[Tensor | None]
    kinds: list[Any]


def call(run: Callable[..., Any], base: Base, inputs: Inputs, times: int = 2) -> list[Outcome]:
    """Call it, twice on the same inputs, with gradients of the first call if there are leaves."""
    values, found = inputs.list, []
    for at in range(times):
        with modes_kept(base.grad):
            outputs = list(run(*values))
        leaves = list(inputs.leaves.values()) if at == 0 else []
        gradients = _gradients(outputs, leaves) if leaves else []
        kinds = [_kind(value, [*values, *outputs]) for value in outputs]
        kept = [[_copy(v) for v in group] for group in (outputs, values)]
        found.append(Outcome(kept[0], kept[1], gradients, kinds))
    return found


def _gradients(outputs: list[Any], leaves: list[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    wanted = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    if not wanted:
        return [None] * len(leaves)
    # The same numbers in every dtype.
    given = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in wanted]
    return list(torch.autograd.grad(wanted, leaves, given, allow_unused=True, retain_graph=True))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _kind(value: Any, everything: list[Any]) -> Any:
    """What there is to say of an output besides its numbers: type, gradient, whose memory."""
    if not isinstance(value, Tensor):
        return type(value)
    shared = [
        at
        for at, other in enumerate(everything)
        if isinstance(other, Tensor)
        and other.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        and value.untyped_storage().nbytes()
    ]
    same = [at for at, other in enumerate(everything) if other is value]
    return value.dtype, value.shape, value.stride(), value.requires_grad, shared, same


def assert_same_bits(what: str, actual: list[Any], expected: list[Any]) -> None:
    for at, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not isinstance(e, Tensor):
            if a != e:
                raise Wrong(f"{what} {at}: {a} is not {e}")
            continue
        if a.shape != e.shape or a.dtype != e.dtype:
            raise Wrong(
                f"{what} {at}: {a.dtype} {tuple(a.shape)} is not {e.dtype} {tuple(e.shape)}"
            )
        if a.is_quantized or not bool(((a == e) | ((a != a) & (e != e))).all()):
            off = (a.double() - e.double()).abs().nan_to_num(float("inf")).max()
            raise Wrong(f"{what} {at} differs, by up to {off:.3g}")


class Judge:
    """One mutated graph against what was made of it."""

    def __init__(self, base: Base, gm: fx.GraphModule, edits: list[Edit]) -> None:
        self.base, self.gm, self.edits = base, gm, edits
        values = (n.meta.get("example_value") for n in gm.graph.nodes)
        dtypes = {v.dtype for v in values if isinstance(v, Tensor)} & {*DTYPES}
        self.coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def compare(
        self, expected: list[Outcome], actual: list[Outcome], runs: list[dict[str, Region]],
        rewrites: int,
    ) -> None:  # fmt: skip
        """Raises :class:`Wrong` where ``actual`` is not what ``expected`` and rounding allow."""
        for at, (a, e, regions) in enumerate(zip(actual, expected, runs, strict=True)):
            if a.kinds != e.kinds:
                raise Wrong(f"call {at + 1}: outputs are {a.kinds}, not {e.kinds}")
            if len(regions) != rewrites:
                raise Wrong(f"the report has {rewrites} rewrites, the graph {len(regions)}")
        values = new_inputs(self.base, self.edits, grad=False).list
        for at, (a, regions) in enumerate(zip(actual, runs, strict=True)):
            known = {name: r.result for name, r in regions.items() if r.result is not None}
            replaced = _Replaced(self.gm, known)
            with modes_kept(self.base.grad):
                outputs = list(replaced.run(*values))
            for name, region in regions.items():
                self._judge_region(f"call {at + 1}: {name}", region, replaced.own.get(name))
            assert_same_bits(f"call {at + 1}: output", a.outputs, outputs)
            assert_same_bits(f"call {at + 1}: input afterwards", a.inputs, values)
        for a, e in zip(actual[0].gradients, expected[0].gradients, strict=True):
            if (a is None) != (e is None):
                raise Wrong("a gradient is there, or is None, where it was not")

    def _judge_region(self, what: str, region: Region, own: Tensor | None) -> None:
        if own is None or region.result is None:
            raise Wrong(f"{what}: no such node in the captured graph")
        operands, activation = _operands(region), _activation(region)
        exact = oracle.experts(*operands, **activation, inner_dtype=operands[0].dtype)
        coarse = _rounded_everywhere(*operands, activation, self.coarsest)
        known = exact.value.isfinite() & exact.error.isfinite() & coarse.error.isfinite()
        # Where the captured graph overflows float32 it is no measure; NaN and infinity that come
        # from the inputs, and not from an overflow, are the same in any order of summation.
        overflow = known & ~own.isfinite()
        for text, y, error in (
            ("rewritten", region.result, exact.error),
            ("captured", own, coarse.error),
        ):
            y = torch.where(overflow, exact.value.to(y.dtype), y)
            bounded = Bounded(torch.where(known, exact.value, torch.nan), error)
            try:
                assert_within(torch.where(known, y, torch.nan), bounded)
            except AssertionError as error:
                raise Wrong(f"{what}, {text}, is not the oracle's: {error}") from None
        odd = ~known & ~exact.error.isinf() & ~coarse.error.isinf()
        if not torch.equal(region.result.isnan() & odd, own.isnan() & odd):
            raise Wrong(f"{what}: NaN in other places")
        if region.taps["result"].gradient is not None:
            _judge_gradients(what, region, region.taps["result"].gradient)

    def semantics(self) -> bool:
        """Values and gradients in float64, as above; False where float64 cannot run it."""
        exact = in_float64(self.gm)
        inputs = new_inputs(self.base, self.edits, True)
        fused, ctx = copy_graph(self.gm), Context(Options(), inputs.list)
        canonicalize(fused, ctx)
        fuse_moe(fused, ctx)
        low = call(self.gm.forward, self.base, inputs, 1)[0]
        wide = [new_inputs(self.base, self.edits, True, torch.float64) for _ in range(2)]
        try:
            exactly = call(exact.forward, self.base, wide[0], 1)[0]
        except Exception:
            return False
        new = call(in_float64(fused).forward, self.base, wide[1], 1)[0]
        for text in ("outputs", "inputs", "gradients"):
            for at, (a, e, x) in enumerate(
                zip(getattr(new, text), getattr(low, text), getattr(exactly, text), strict=True)
            ):
                if (a is None) != (x is None):
                    raise Wrong(f"in float64, {text} {at}: one is None")
                if isinstance(x, Tensor):
                    _as_near(f"in float64, {text} {at}", a, e, x)
        return True


def _as_near(what: str, actual: Tensor, low: Tensor, exact: Tensor) -> None:
    """Of float64: at most as far apart as float32 is off, and its rounding."""
    if not exact.is_floating_point():
        same = torch.equal(actual, exact)
        if not same:
            raise Wrong(f"{what} differs")
        return
    actual, low, exact = (t.double() for t in (actual, low, exact))
    numbers = exact.isfinite() & low.isfinite()
    if not torch.equal(actual.isnan(), exact.isnan()):
        raise Wrong(f"{what}: NaN in other places")
    zero = torch.zeros_like(exact)
    actual, low, exact = (torch.where(numbers, t, zero) for t in (actual, low, exact))
    try:
        assert_as_accurate(actual, low, exact)
    except AssertionError as error:
        raise Wrong(f"{what}: {error}") from None


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """The same computation in float64, for inputs of float64."""
    gm = copy_graph(gm)
    for node in gm.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda v: torch.float64 if v in DTYPES else v
        )
        if node.op == "call_method" and node.target in ("float", "bfloat16", "half"):
            node.target = "double"
        if _is_cast(node) and node.target in ("to", "double"):
            # A copy, as in the other dtypes; in float64 it would be its input itself.
            node.target, node.args, node.kwargs = (
                "to",
                (node.args[0], torch.float64),
                {"copy": True},
            )
        if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            name = str(node.target).removesuffix(".default")
            if "mxfp4.moe" in name:
                name = "mxfp4.moe"
            if name in FORMULAS:
                _spell_out(node)
                node.target = FORMULAS[name]
    gm.recompile()
    return gm


def _is_cast(node: fx.Node) -> bool:
    """Whether a call changes one of ``DTYPES`` to another one."""
    values = [n.meta.get("example_value") for n in (*node.all_input_nodes[:1], node)]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return len(dtypes) == 2 and dtypes <= {*DTYPES} and node.op == "call_method"


def _spell_out(node: fx.Node) -> None:
    """Every argument of an op by name."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default
    arguments = target._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in arguments], node.args, strict=False))
    node.args, node.kwargs = (), {**given, **node.kwargs}


def _operands(region: Region) -> tuple[Any, ...]:
    """What ``oracle.experts`` takes. Routes to experts elsewhere go to expert 0 with weight 0."""
    first, last = region.operands
    indices, weights = _routes(region)
    assert indices.shape[1] == last["experts_per_token"]
    here = _are_here(region)
    local = (indices - region.routing.get("first_expert", 0)).where(here, 0)
    return first["x"], local, _only(weights, here), *_weights(region)


def _activation(region: Region) -> dict[str, Any]:
    """The activation's kind and its constants, as float32 holds them."""
    first = region.operands[0]
    limit, up_offset = torch.tensor([first["limit"], first["up_offset"]]).tolist()
    constants = {"alpha": first["alpha"], "limit": limit, "up_offset": up_offset}
    return {"kind": first["activation"], **constants}


def _routes(region: Region) -> tuple[Tensor, Bounded]:
    """The ids and weights [T, A] of all chosen experts, wherever they are held."""
    given = region.routing
    if "logits" not in given:
        return given["indices"], Bounded.exact(given["weights"])
    chosen, indices = torch.topk(given["logits"], given["top_k"], dim=-1)
    return indices, oracle.softmax(chosen)


def _are_here(region: Region) -> Tensor:
    ids = _routes(region)[0] - region.routing.get("first_expert", 0)
    return (ids >= 0) & (ids < region.operands[0]["blocks"].shape[0])


def _only(x: Bounded, here: Tensor) -> Bounded:
    return Bounded(x.value.where(here, 0.0), x.error.where(here, 0.0))


def _rounded_everywhere(
    hidden: Tensor,
    indices: Tensor,
    weights: Bounded,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    activation: dict[str, Any],
    dtype: torch.dtype,
) -> Bounded:
    """``oracle.experts``, but every step of it may round to ``dtype`` on top of float32."""
    if dtype == torch.float32:
        return oracle.experts(
            hidden, indices, weights, gate_up, down, **activation, inner_dtype=dtype
        )
    t, a = indices.shape
    expert = indices.reshape(-1)

    def linear(rows: Bounded, weight: Tensor, bias: Tensor) -> Bounded:
        products = oracle.grouped_linear(rows, expert, weight, torch.zeros_like(bias))
        products = products.rounded(dtype)
        biased = Bounded(products.value + bias[expert], products.error)
        return biased.rounded(dtype).rounded(torch.float32)

    def times(x: Bounded, y: Bounded) -> Bounded:
        return oracle.times(x, y).rounded(dtype)

    def activate(y: Bounded, kind: str, alpha: float, limit: float, up_offset: float) -> Bounded:
        if kind == "relu2":
            positive = y.through(torch.relu)
            return times(positive, positive)
        gate, up = oracle.gate_and_up(y, limit)
        if kind == "geglu_tanh":
            factor = oracle.gelu_factor(gate)
        else:
            z = oracle.sigmoid_of(gate, alpha)[0].rounded(dtype)
            factor = oracle.sigmoid_of(z, 1.0)[1].rounded(dtype)
        return times(times(gate, factor), oracle.shifted(up, up_offset).rounded(dtype))

    rows = Bounded.exact(hidden.repeat_interleave(a, dim=0)).rounded(dtype)
    y = linear(activate(linear(rows, *gate_up), **activation), *down)
    y = y.view(t, a, hidden.shape[1])
    return oracle.combine(times(y, weights.rounded(dtype)[..., None])).rounded(dtype)


def _judge_gradients(what: str, region: Region, gradient: Tensor) -> None:
    operands, activation = _operands(region), _activation(region)
    if operands[0].dtype != torch.float32 or activation["kind"] == "geglu_tanh":
        return  # the bound is float32's, and has no GELU; test_backward.py has all
    of_hidden, of_weights = gradients(*operands, activation, gradient)
    of_weights = _only(of_weights, _are_here(region))
    name = "logits" if "logits" in region.routing else "weights"
    if name == "logits":
        indices, weights = _routes(region)
        chosen = softmax_backwards(of_weights, weights)
        zero = torch.zeros(region.routing["logits"].shape, dtype=torch.float64)
        of_weights = Bounded(
            *(zero.scatter(1, indices, part) for part in (chosen.value, chosen.error))
        )
    for key, exact in (("x", of_hidden), (name, of_weights)):
        found = region.taps[key].gradient
        if found is None or not bool((exact.value + exact.error).isfinite().all()):
            continue
        if found.dtype != torch.float32:
            exact = exact.rounded(found.dtype)
        try:
            assert_within(found, exact)
        except AssertionError as error:
            raise Wrong(f"{what}: gradient of {key}: {error}") from None


def _weights(region: Region) -> list[tuple[Tensor, Tensor]]:
    """Of both projections: the weight [E, N, K] and the bias, zeros for none, in float64."""
    found = []
    k = region.operands[0]["x"].shape[1]
    for operands in region.operands:
        e, n = operands["blocks"].shape[0], operands["n"]
        bias = torch.zeros(e, n) if operands["bias"] is None else operands["bias"]
        parts = operands["blocks"], operands["scales"]
        if operands["layout"] != "row_major":
            parts = unswizzle_weight(parts, operands["layout"], e, n, k)
        found.append(Matrices(*parts, bias).exact)
        k = n if operands["activation"] == "relu2" else n // 2
    return found
