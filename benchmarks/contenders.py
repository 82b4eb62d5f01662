"""Who is measured: this project's ops and transformers' experts, on a CPU and on a GPU.

Every contender computes the same MLP on the same weights, and is checked against float64 first. It
holds several layers, of which every call takes the next, or one call takes all: weights then come
from memory, as they do in a model.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, softmax

from benchmarks import device_ops
from benchmarks.families import GPT_OSS, Family
from benchmarks.moe import Inputs, Problem, Router, Weights
from benchmarks.sizes import Sizes


class Unavailable(Exception):
    """A contender is not to be had here; the message says why."""


class WrongResult(Exception):
    """A contender does not compute the MLP, so that its times mean nothing."""


class Contender(ABC):
    """One of those that are measured, with its own copies of the weights.

    Attributes:
        name: its key in the results.
        label: how a reader knows it.
        kind: whose it is, in the results.
        layers: how many it holds.
        problem: what it computes.
        most_tokens: the largest T that it is measured at; None: any.
        is_compiled: by torch.compile; else its allocations are poisoned before a check.
        is_exact: two runs give the same bits, which is checked.
    """

    most_tokens: int | None = None
    is_compiled = False
    is_exact = False

    def __init__(self, problem: Problem, name: str, label: str, kind: str) -> None:
        self.problem, self.name, self.label, self.kind = problem, name, label, kind
        self.top_k = problem.sizes.top_k
        self.layers = 0
        self._next = 0
        self._routers: list[Router | None] = []

    def add_layer(self) -> None:
        """One more, with its copy of the router if there is one."""
        router = self.problem.router
        self._routers.append(router and Router(*(part.clone() for part in router)))
        self.layers += 1

    def logits(self, layer: int, inputs: Inputs) -> Tensor:
        """As they were given, or by the layer's router."""
        router = self._routers[layer]
        if router is not None:
            return linear(inputs.hidden, *router)
        assert inputs.logits is not None
        return inputs.logits

    def prepare(self) -> None:  # noqa: B027 (most need none)
        """Called before each sample, outside its time."""

    @abstractmethod
    def run(self, layer: int, inputs: Inputs) -> Tensor:
        """The MLP of a layer: [T, H] bfloat16."""

    def run_next(self, inputs: Inputs) -> Tensor:
        """The MLP of one layer after the other."""
        layer = self._next
        self._next = (layer + 1) % self.layers
        return self.run(layer, inputs)

    def run_all(self, inputs: Inputs) -> Tensor:
        """All layers in turn, layer 0 last, whose result is returned."""
        for layer in range(1, self.layers):
            self.run(layer, inputs)
        return self.run(0, inputs)

    def where(self, tokens: int) -> str:
        """For messages."""
        return f"{self.label} at E={self.problem.sizes.experts}, T={tokens}"

    def why_not(self, tokens: int, last: tuple[int, float] | None, slow: float) -> str:
        """Why it is not measured at T; empty if it is.

        Args:
            last: a smaller T and the seconds of a call there.
            slow: seconds of a call that are too many.
        """
        if self.most_tokens is not None and tokens > self.most_tokens:
            return f"measured up to T={self.most_tokens} only"
        # At most, for up to a few tokens an expert a call takes the same time whatever T is.
        if last and last[1] > slow / 4 and (expected := last[1] * tokens / last[0]) > slow:
            return f"a call would take up to {expected:.0f} s"
        return ""


def check(contender: Contender, inputs: Inputs) -> float:
    """The relative error of layer 0 against float64.

    Raises:
        WrongResult: it is beyond what rounding explains, or not the same twice where it should be.
    """
    contender.prepare()
    with poisoned(not contender.is_compiled):
        out = contender.run(0, inputs)
        again = contender.run(0, inputs) if contender.is_exact else out
    error = check_result(contender, out)
    if not torch.equal(out, again):
        raise WrongResult(f"{contender.where(len(out))}: two runs differ")
    return error


def check_result(contender: Contender, out: Tensor, how: str = "") -> float:
    """The relative error of a result of layer 0; raises as :func:`check` does."""
    error, bound = contender.problem.error(out), contender.problem.error_bound
    if not error <= bound:
        raise WrongResult(
            f"{contender.where(len(out))}{how}: relative error {error:.2e}; rounding explains "
            f"{bound:.2e}"
        )
    return error


@contextmanager
def poisoned(is_wanted: bool) -> Iterator[None]:
    """What is allocated within holds NaN or the largest integer until it is written."""
    if not is_wanted:
        yield
        return
    memory: Any = torch.utils.deterministic  # a module of properties
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of algorithms that are not deterministic
        torch.set_deterministic_debug_mode("warn")
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before[0])
            memory.fill_uninitialized_memory = before[1]


class Ours(Contender):
    """The device ops that the backend puts into a graph, called as it calls them.

    Args:
        kernels: the implementation of the ops.
        path: the CPU's instruction-set path to force.
    """

    is_exact = True

    def __init__(
        self,
        problem: Problem,
        weights: Iterable[Weights],
        name: str,
        label: str,
        kind: str,
        *,
        kernels: str,
        layout: str,
        path: str | None = None,
    ) -> None:
        super().__init__(problem, name, label, kind)
        self.kernels, self.layout, self.path = kernels, layout, path
        self._weights: list[tuple[device_ops.Packed, device_ops.Packed]] = []
        for layer in weights:
            self._weights.append(
                (
                    device_ops.swizzled(layer.gate_up, layout),
                    device_ops.swizzled(layer.down, layout),
                )
            )
            self.add_layer()

    def on_path(self, path: str, label: str) -> Ours:
        """The same weights, computed by another path of the CPU's."""
        other = copy.copy(self)
        other.name, other.label, other.path = path, label, path
        return other

    def prepare(self) -> None:
        if self.path is not None:
            device_ops.force_path(self.path)

    def routing(self, logits: Tensor) -> Any:
        return device_ops.routing(logits, self.top_k, self.kernels)

    def gate_up(self, layer: int, hidden: Tensor, routes: Any) -> Tensor:
        weight, activation = self._weights[layer][0], self.problem.family.activation
        return device_ops.gate_up(hidden, weight, routes, self.kernels, activation)

    def down(self, layer: int, inner: Tensor, routes: Any) -> Tensor:
        return device_ops.down(inner, self._weights[layer][1], routes, self.top_k, self.kernels)

    def run(self, layer: int, inputs: Inputs) -> Tensor:
        routes = self.routing(self.logits(layer, inputs))
        return self.down(layer, self.gate_up(layer, inputs.hidden, routes), routes)

    def parts(self, inputs: Inputs) -> dict[str, Callable[[int], Tensor]]:
        """What the MLP of a layer consists of."""
        logits = self.logits(0, inputs)
        routes = self.routing(logits)
        inner = self.gate_up(0, inputs.hidden, routes)
        return {
            "router": lambda layer: self.logits(layer, inputs),
            "routing": lambda layer: self.routing(logits)[0],
            "gate_up": lambda layer: self.gate_up(layer, inputs.hidden, routes),
            "down": lambda layer: self.down(layer, inner, routes),
        }


class Transformers(Contender):
    """Transformers' experts in bfloat16 behind the router's top-k and softmax.

    Args:
        form: ``experts_implementation``.
        compile: arguments of torch.compile; None: not compiled.
    """

    def __init__(
        self,
        problem: Problem,
        experts: Iterable[Any],
        name: str,
        label: str,
        kind: str,
        *,
        form: str,
        compile: dict[str, Any] | None,
    ) -> None:
        super().__init__(problem, name, label, kind)
        self.form, self.is_compiled = form, compile is not None
        self._mlp = _mlp if compile is None else torch.compile(_mlp, **compile)
        self._experts: list[Any] = []
        for each in experts:
            self._experts.append(each)
            self.add_layer()

    def prepare(self) -> None:
        self._experts[0].config._experts_implementation = self.form  # shared by all layers

    def run(self, layer: int, inputs: Inputs) -> Tensor:
        out: Tensor = self._mlp(self._experts[layer], self._routers[layer], *inputs, self.top_k)
        return out


def _mlp(
    experts: Any, router: Router | None, hidden: Tensor, logits: Tensor | None, top_k: int
) -> Tensor:
    """``GptOssMLP.forward``; without a router, what comes behind its matmul."""
    if router is not None:
        logits = linear(hidden, *router)
    assert logits is not None
    chosen, indices = torch.topk(logits, top_k, dim=-1)
    scores = softmax(chosen, dim=1, dtype=chosen.dtype)
    out: Tensor = experts(hidden, indices, scores)
    return out


def transformers_experts(
    sizes: Sizes, weights: Iterable[Weights], family: Family = GPT_OSS
) -> list[Any]:
    """The family's experts in bfloat16, one for each of the weights, that share one configuration.

    Raises:
        Unavailable: no transformers.
    """
    made: list[Any] = []
    for layer in weights:
        try:
            with torch.device("meta"):
                experts = family.experts(sizes).bfloat16().requires_grad_(False).eval()
        except ImportError as error:
            raise Unavailable(f"transformers cannot be imported ({error})") from error
        experts = experts.to_empty(device=layer.gate_up.blocks.device)
        for name, part in zip(("gate_up_proj", "down_proj"), layer, strict=True):
            family.fill(getattr(experts, name), part, name == "gate_up_proj")
            if part.bias is not None:
                getattr(experts, f"{name}_bias").copy_(part.bias)
        if made:
            experts.config = made[0].config
        made.append(experts)
    return made
