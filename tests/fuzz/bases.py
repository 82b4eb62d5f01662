"""The captured graphs that the fuzzer starts from: every form of the experts and every
kind of family, each captured once.

Weights are MXFP4 values already and everything is float32, so that a rewrite only rounds. No two
sizes are alike.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from families import Block, experts
from models import hidden, mlp, on_mxfp4_grid, pack
from one_rank import OneRank, Ways, by_fmod, by_where
from torch import Tensor, fx, nn
from torch._dynamo.source import FloatTensorSource, LocalSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.functional import linear, softmax

from mxfp4_fx.core import compilation
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.passes.copies import copy_graph

E, A, H, I = 6, 3, 64, 96  # noqa: E741


@dataclass(frozen=True)
class Base:
    """A captured graph and its inputs.

    Attributes:
        grad: whether the graph is captured, and run, with gradients on.
        wants_grad: names of the inputs, no parameters, whose gradients are compared.
    """

    name: str
    gm: fx.GraphModule
    inputs: list[Any]
    grad: bool
    wants_grad: frozenset[str]


class Plain(nn.Module):
    """GPT-OSS's MLP in few lines, the batched form."""

    alpha, limit = 1.702, 7.0

    def __init__(self, i: int = I) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int, std: float) -> Tensor:
            return torch.randn(shape, generator=generator) * std

        def frozen(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value, requires_grad=False)

        self.router = frozen(parameter(E, H, std=0.2))
        self.router_bias = frozen(parameter(E, std=0.2))
        self.gate_up = frozen(on_mxfp4_grid(parameter(E, H, 2 * i, std=0.1)))
        self.gate_up_bias = frozen(parameter(E, 2 * i, std=1.0))
        down = parameter(E, i, H, std=0.1)
        self.down = frozen(down if i % 32 else on_mxfp4_grid(down))
        self.down_bias = frozen(parameter(E, H, std=1.0))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(x, self.router, self.router_bias)
        chosen, indices = torch.topk(logits, A, dim=-1)
        return logits, softmax(chosen, dim=1), indices

    def experts(self, x: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        ids = indices.reshape(-1)
        rows = x.repeat_interleave(A, dim=0)
        y = torch.bmm(rows.unsqueeze(1), self.gate_up[ids]).squeeze(1) + self.gate_up_bias[ids]
        gate, up = y[..., ::2].clamp(max=self.limit), y[..., 1::2].clamp(-self.limit, self.limit)
        y = (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        y = torch.bmm(y.unsqueeze(1), self.down[ids]).squeeze(1) + self.down_bias[ids]
        y = y * scores.reshape(-1).unsqueeze(-1)
        return y.view(-1, A, H).sum(dim=1)

    def forward(self, x: Tensor) -> Any:
        _, scores, indices = self.route(x)
        return self.experts(x, scores, indices)


class Beside(Plain):
    """With statistics of the router, in-place code and views around the experts."""

    def forward(self, x: Tensor) -> Any:
        x = x.squeeze(0)
        first = torch.zeros_like(x)
        logits, scores, indices = self.route(x)
        load = torch.bincount(indices.flatten(), minlength=E) / x.shape[0]
        balance = (softmax(logits, dim=-1).mean(0) * load).sum()
        z = torch.logsumexp(logits, dim=-1).square().mean()
        shifted = x * 2
        flat = shifted.view(-1)
        flat.add_(1)
        first[0] = shifted[0]
        y = self.experts(x, scores, indices)
        picked = torch.empty_like(indices[:, 0])
        picked[torch.argsort(indices[:, 0])] = torch.arange(x.shape[0])
        side = (y * 0.5).add_(shifted)
        return y + first, side, balance + z, scores, logits.argmax(-1), picked


class Two(nn.Module):
    """Two layers with residual connections; the second's router reads the first's result."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mlp(form=form, seed=seed) for seed in (0, 1)])

    def forward(self, x: Tensor) -> Any:
        scores = []
        for layer in self.layers:
            y, weights = layer(x)
            x = x + y
            scores.append(weights)
        return x, scores[0], scores[1].amax(-1)


def _block(name: str, form: str, **sizes: int) -> Callable[[], nn.Module]:
    return lambda: Block(experts(name, form, **sizes))


def _mlp(form: str, parallel: bool = False) -> Any:
    module = mlp(form=form)
    module.experts._is_expert_parallel = parallel
    return module


def _rank(form: str, way: Ways) -> Any:
    # Another seed than that of the activations, or each token would have one expert of its own.
    return OneRank(mlp(form=form, num_local_experts=8, seed=1), 1, 2, way)


def _experts(form: str) -> Any:
    module = mlp(form=form)
    return pack(module).experts if form == "packed" else module.experts


def _x(tokens: int) -> tuple[Tensor, ...]:
    return (hidden(tokens) * 8,)  # enough to reach SwiGLU's limits


def _flat(tokens: int) -> tuple[Tensor, ...]:
    return (hidden(tokens)[0] * 8,)


def _routes(tokens: int, packed: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    indices = torch.rand((tokens, E), generator=generator).argsort(dim=1)[:, :A].contiguous()
    scores = torch.rand((tokens, A), generator=generator)
    return *_flat(tokens), indices, scores


@dataclass(frozen=True)
class _Spec:
    """How to capture a base: what of, on what, and in which modes."""

    module: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]] = _x
    dynamic: bool = False
    grad: bool = False
    tokens: int = 7


def _all() -> Iterator[tuple[str, _Spec]]:
    forms = {
        "grouped_mm": lambda: _mlp("grouped_mm"),
        "batched_mm": lambda: _mlp("batched_mm"),
        "eager": lambda: _mlp("eager"),
        "packed": lambda: pack(_mlp("grouped_mm")),
    }
    for name, module in forms.items():
        yield name, _Spec(module)
        yield f"{name}-grad", _Spec(module, grad=True)
    for name in ("grouped_mm", "batched_mm", "packed"):
        yield f"{name}-dynamic", _Spec(forms[name], dynamic=True)
        yield f"{name}-routes", _Spec(functools.partial(_experts, name), _routes)
    yield "grouped_mm-parallel", _Spec(lambda: _mlp("grouped_mm", True))
    yield "batched_mm-parallel", _Spec(lambda: _mlp("batched_mm", True))
    yield "grouped_mm-parallel-rank", _Spec(lambda: _rank("grouped_mm", by_where))
    yield "batched_mm-parallel-rank", _Spec(lambda: _rank("batched_mm", by_fmod))
    yield "grouped_mm-rank-grad", _Spec(lambda: _rank("grouped_mm", by_fmod), grad=True)
    yield "batched_mm-routes-dynamic", _Spec(lambda: _experts("batched_mm"), _routes, dynamic=True)
    yield "grouped_mm-routes-grad", _Spec(lambda: _experts("grouped_mm"), _routes, grad=True)
    yield "grouped_mm-one-token", _Spec(forms["grouped_mm"], tokens=1)
    yield "plain", _Spec(Plain, _flat)
    yield "plain-grad", _Spec(Plain, _flat, grad=True)
    yield "plain-dynamic-grad", _Spec(Plain, _flat, grad=True, dynamic=True)
    yield "plain-no-tokens", _Spec(Plain, _flat, tokens=0)
    yield "plain-float64", _Spec(lambda: Plain().double(), lambda t: (_flat(t)[0].double(),))
    yield "plain-odd-size", _Spec(lambda: Plain(80), _flat)
    yield "beside", _Spec(Beside)
    yield "beside-grad", _Spec(Beside, grad=True)
    yield from _families()
    yield "two", _Spec(lambda: Two("grouped_mm"))
    yield "two-batched-grad", _Spec(lambda: Two("batched_mm"), grad=True)


def _families() -> Iterator[tuple[str, _Spec]]:
    """Other families' experts. Of square weights, no size tells whether they are transposed."""
    grouped, batched = "grouped_mm", "batched_mm"
    silu, relu2, gelu = "Qwen3MoeExperts", "NemotronHExperts", "Gemma4TextExperts"
    yield "silu", _Spec(_block(silu, grouped), _flat)
    yield "silu-batched", _Spec(_block(silu, batched), _flat)
    yield "silu-grad", _Spec(_block(silu, grouped), _flat, grad=True)
    yield "silu-batched-grad", _Spec(_block(silu, batched), _flat, grad=True)
    yield "silu-dynamic", _Spec(_block(silu, batched), _flat, dynamic=True)
    yield "silu-routes", _Spec(lambda: experts(silu, batched), _routes)
    square = {"moe_intermediate_size": H // 2}
    yield "silu-square-gate_up", _Spec(_block(silu, batched, **square), _flat)
    yield "silu-grouped-square-down", _Spec(_block(silu, grouped, moe_intermediate_size=H), _flat)
    yield "silu-by-columns", _Spec(_block("AriaExperts", batched), _flat)
    yield "silu-clamped", _Spec(_block("DeepseekV4Experts", grouped, swiglu_limit=2.5), _flat)
    yield "halves-biased", _Spec(_block("OpenAIPrivacyFilterExperts", batched), _flat)
    yield "halves", _Spec(_block("MiniMaxM3VLExperts", batched), _flat)
    yield "gelu", _Spec(_block(gelu, batched), _flat)
    yield "gelu-grouped-grad", _Spec(_block(gelu, grouped), _flat, grad=True)
    yield "relu2", _Spec(_block(relu2, grouped), _flat)
    yield "relu2-grad", _Spec(_block(relu2, batched), _flat, grad=True)
    yield "relu2-square", _Spec(_block(relu2, batched, moe_intermediate_size=H), _flat)
    yield "relu2-grouped-square", _Spec(_block(relu2, grouped, moe_intermediate_size=H), _flat)


_SPECS = dict(_all())
BASES = tuple(_SPECS)


@functools.cache
def base_of(name: str) -> Base:
    """Capture it; the graph is never changed."""
    spec = _SPECS[name]
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    @compilation.ours  # so that the eager loop is captured as this backend captures it
    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.append((copy_graph(gm), inputs))
        return gm.forward

    module = spec.module()
    for key, parameter in module.named_parameters():
        # Who fine-tunes around frozen experts: the router wants gradients, and the activations do.
        parameter.requires_grad_(spec.grad and "router" in key)
    inputs = [v.clone().requires_grad_(spec.grad and v.dtype.is_floating_point) for v in
              spec.inputs(spec.tokens)]  # fmt: skip
    inputs = [v.clone() for v in inputs]  # no leaves: the graph may write to them
    torch.compiler.reset()
    prepare_capture()
    with torch.set_grad_enabled(spec.grad):
        torch.compile(module, backend=keep, dynamic=spec.dynamic, fullgraph=True)(*inputs)
    torch.compiler.reset()
    ((gm, found),) = captured
    wants = {
        node.name
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), found, strict=True)
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
    }
    return Base(name, gm, found, spec.grad, frozenset(wants))


@dataclass
class Inputs:
    """New inputs of a graph.

    Attributes:
        values: by placeholder's name, in the graph's order; parameters are parameters, sizes
            numbers. Activations that want gradients are no leaves: the graph may write to them.
        leaves: whose gradients are compared.
    """

    values: dict[str, Any]
    leaves: dict[str, Tensor]

    @property
    def list(self) -> list[Any]:
        return list(self.values.values())


Edit = Callable[[dict[str, Any]], None]


def new_inputs(
    base: Base, edits: list[Edit], grad: bool, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Copies of a base's inputs, edited; in ``dtype`` where they were float32."""
    made = Inputs({}, {})
    names = [node.name for node in base.gm.graph.find_nodes(op="placeholder")]
    for name, value in zip(names, base.inputs, strict=True):
        if not isinstance(value, Tensor):
            made.values[name] = int(value)
            continue
        copy = value.detach().clone()
        copy = copy.to(dtype) if copy.dtype == torch.float32 else copy
        if isinstance(value, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=grad and value.requires_grad)
        elif grad and name in base.wants_grad:
            made.leaves[name] = copy.requires_grad_()
            with torch.enable_grad():
                copy = copy.clone()
        made.values[name] = copy
    for edit in edits:
        edit(made.values)
    for name, value in made.values.items():
        if isinstance(value, nn.Parameter) and not grad:
            value.requires_grad_(False)
        elif isinstance(value, nn.Parameter) and value.requires_grad:
            made.leaves[name] = value
    return made


@contextmanager
def modes_kept(grad: bool) -> Iterator[None]:
    """Run something in a mode; whatever a graph leaves switched is as it was afterwards."""
    with torch.set_grad_enabled(grad):
        try:
            yield
        finally:
            while torch.is_autocast_enabled("cpu"):
                torch.set_autocast_enabled("cpu", False)
            while torch.autocast_increment_nesting() > 1 and torch.autocast_decrement_nesting():
                torch.autocast_decrement_nesting()
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()


def propagate(base: Base, gm: fx.GraphModule, inputs: dict[str, Any]) -> ShapeEnv:
    """Note a fake value on every node as Dynamo does, in a world of its own.

    As with Dynamo, a value that is changed in place has one fake tensor: all nodes that return it
    have that object, with the shape and strides that the graph ends with.

    Raises:
        whatever a call raises that is not possible.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    symbols: dict[str, Any] = {}  # of the captured graph -> of this world
    originals = {node.name: node for node in base.gm.graph.find_nodes(op="placeholder")}
    placeholders = gm.graph.find_nodes(op="placeholder")
    sizes: list[fx.Node] = []
    for node in placeholders:
        value = inputs[node.name]
        if not isinstance(value, Tensor):
            sizes.append(node)
            continue
        original = originals[node.name].meta["example_value"] if node.name in originals else value
        node.meta["example_value"] = fake = _fake_input(mode, node.name, value, original)
        for size, other in zip(original.shape, fake.shape, strict=True):
            if isinstance(size, torch.SymInt):
                symbols.setdefault(str(size), other)
    for node in sizes:
        node.meta["example_value"] = symbols[str(originals[node.name].meta["example_value"])]
    with modes_kept(base.grad), mode:
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                node.meta["example_value"] = mode.from_tensor(getattr(gm, str(node.target)))
                continue
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: n.meta["example_value"]
            )
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)
    return env


def _fake_input(mode: FakeTensorMode, name: str, value: Tensor, original: Tensor) -> Tensor:
    source: Any = LocalSource(name)
    if value.ndim == 0 and value.dtype == torch.float64:
        source = FloatTensorSource(source)  # a float of the model's, where shapes are dynamic
        return mode.from_tensor(value, source=source)
    dynamic = [
        DimDynamic.DUCK if isinstance(size, torch.SymInt) else DimDynamic.STATIC
        for size in original.shape
    ]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
    return mode.from_tensor(value, source=source, symbolic_context=context)


def unused_name(graph: fx.Graph, stem: str) -> str:
    taken = {node.name for node in graph.nodes}
    return next(n for n in (f"{stem}_{at}" for at in itertools.count()) if n not in taken)
