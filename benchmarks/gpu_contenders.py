"""Who is measured on a GPU: this project's ops, OpenAI's triton_kernels, transformers in bfloat16.

Every contender computes the same MLP, from hidden states to the sum of the experts, the router's
matmul included, and holds several layers: one call computes each of them once, so that weights come
from memory as they do in a model.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import transformers_experts
from gpu_layer import Problem, Router
from moe import ALPHA, LIMIT, Projection, Sizes
from torch import Tensor
from torch.nn.functional import linear

import mxfp4_fx.ops.schemas  # noqa: F401  (declares the ops)
from mxfp4_fx.weights.swizzle import swizzle_weight

OPS = torch.ops.mxfp4
Parts = tuple[Tensor, Tensor]

# batched_mm copies an expert's weights for every routed row: 33 MB each at gpt-oss's sizes.
BATCHED_TOKENS = 16
# What triton_kernels must have; versions with other names are not known here.
TRITON_KERNELS_NAMES = {
    "matmul_ogs": ("matmul_ogs", "PrecisionConfig", "FusedActivation", "FnSpecs"),
    "routing": ("routing",),
    "swiglu": ("swiglu_fn",),
    "tensor": ("FP4", "convert_layout", "wrap_torch_tensor"),
    "tensor_details.layout": (
        "make_default_matmul_mxfp4_w_layout",
        "make_default_matmul_mxfp4_w_scale_layout",
    ),
}


class Unavailable(Exception):
    """A contender is not to be had here; the message says why."""


class Contender(ABC):
    """One of those that are measured, with its own copies of the weights.

    Attributes:
        name: its key in the results.
        label: how a reader knows it.
        kind: "ours", "mxfp4" or "bf16".
        layers: how many it holds.
        problem: what it computes.
        most_tokens: the largest T that it is measured at; None: any.
        is_compiled: by torch.compile; else its allocations can be poisoned before a check.
        is_exact: two runs give the same bits, which is checked.
    """

    name: str
    label: str
    kind: str
    layers: int
    problem: Problem
    most_tokens: int | None = None
    is_compiled = False
    is_exact = False

    @abstractmethod
    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """The MLP of a layer: [T, H] bfloat16."""

    def run_all(self, hidden: Tensor) -> Tensor:
        """All layers in turn, layer 0 last, whose result is returned."""
        for layer in range(1, self.layers):
            self.run(layer, hidden)
        return self.run(0, hidden)


class OursLayer(NamedTuple):
    router: Router
    gate_up: Parts
    gate_up_bias: Tensor
    down: Parts
    down_bias: Tensor


class Ours(Contender):
    """The device ops that the backend puts into a graph, behind the router's matmul."""

    name, kind, is_exact = "ours", "ours", True

    def __init__(self, problem: Problem, layers: int, layout: str) -> None:
        self.label, self.layout, self.layers = f"mxfp4_fx {layout}", layout, layers
        self.problem = problem
        self.top_k = problem.sizes.top_k
        self._layers = []
        for number in range(layers):
            weights = problem.weights(number)
            gate_up, down = (_swizzled(part, layout) for part in weights)
            self._layers.append(
                OursLayer(
                    _copy(problem.router), gate_up, weights.gate_up.bias, down, weights.down.bias
                )
            )

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        routes = self.routing(self.router(layer, hidden))
        return self.down(layer, self.gate_up(layer, hidden, routes), routes)

    def router(self, layer: int, hidden: Tensor) -> Tensor:
        return linear(hidden, *self._layers[layer].router)

    def routing(self, logits: Tensor) -> Any:
        return OPS.routing(logits, self.top_k, kernels="triton")

    def gate_up(self, layer: int, hidden: Tensor, routes: Any) -> Tensor:
        weights = self._layers[layer]
        return OPS.matmul_ogs(
            hidden,
            *weights.gate_up,
            weights.gate_up_bias,
            routes[3],
            gather_index=routes[1],
            activation="swiglu",
            alpha=ALPHA,
            limit=LIMIT,
            layout=self.layout,
            kernels="triton",
        )

    def down(self, layer: int, inner: Tensor, routes: Any) -> Tensor:
        weights = self._layers[layer]
        return OPS.matmul_ogs(
            inner,
            *weights.down,
            weights.down_bias,
            routes[3],
            scatter_index=routes[2],
            gammas=routes[0],
            experts_per_token=self.top_k,
            layout=self.layout,
            kernels="triton",
        )

    def parts(self, hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What a call consists of, each part for all layers in turn."""
        logits = self.router(0, hidden)
        routes = self.routing(logits)
        inner = self.gate_up(0, hidden, routes)

        def all_layers(part: Callable[[int], Tensor]) -> Callable[[], Tensor]:
            return lambda: [part(layer) for layer in range(self.layers)][-1]

        return {
            "router": all_layers(lambda layer: self.router(layer, hidden)),
            "routing": all_layers(lambda _: self.routing(logits)[0]),
            "gate_up": all_layers(lambda layer: self.gate_up(layer, hidden, routes)),
            "down": all_layers(lambda layer: self.down(layer, inner, routes)),
        }


class TritonKernels(Contender):
    """OpenAI's triton_kernels: its routing, its best layout for this GPU, its fused SwiGLU.

    It may cut K into parts to fill the device, or be told not to, as vLLM does on Hopper.
    """

    name, kind = "triton_kernels", "mxfp4"
    splits = True

    def __init__(self, problem: Problem, layers: int, package: Any) -> None:
        self.label, self.layers, self.problem = "triton_kernels", layers, problem
        self.top_k = problem.sizes.top_k
        self._package = package
        self._flags = importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags")
        self._layers = []
        for number in range(layers):
            weights = problem.weights(number)
            parts = [(*self._laid_out(part), part.bias.float()) for part in weights]
            self._layers.append((_copy(problem.router), *parts))
        ogs = package.matmul_ogs
        specs = ogs.FnSpecs("swiglu", package.swiglu.swiglu_fn, ("alpha", "limit"))
        self._swiglu = ogs.FusedActivation(specs, (ALPHA, LIMIT), 2)

    def without_splits(self) -> TritonKernels:
        """The same on the same weights, with K never cut into parts."""
        other = copy.copy(self)
        other.name, other.label = "triton_kernels_unsplit", "triton_kernels, K whole"
        other.splits = False
        return other

    def _laid_out(self, part: Projection) -> tuple[Any, Any]:
        """Weight [E, K, N] and scales [E, K/32, N] in the layouts that the package prefers."""
        tensor, layout = self._package.tensor, self._package.tensor_details.layout
        e, n = part.bias.shape
        weight = tensor.wrap_torch_tensor(
            part.blocks.view(e, n, -1).transpose(1, 2), dtype=tensor.FP4
        )
        scales = tensor.wrap_torch_tensor(part.scales.transpose(1, 2))
        to, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        weight = tensor.convert_layout(weight, to, **options)
        to, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        return weight, tensor.convert_layout(scales, to, **options)

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        ogs = self._package.matmul_ogs
        self._flags.reset_opt_flags_constraints()
        if not self.splits:
            self._flags.update_opt_flags_constraints({"split_k": 1})
        router, gate_up, down = self._layers[layer]
        logits = linear(hidden, *router)
        routing, gather, scatter = self._package.routing.routing(logits, self.top_k)

        def precision(scales: Any) -> Any:  # the package writes into it, so each call has its own
            return ogs.PrecisionConfig(weight_scale=scales)

        weight, scales, bias = gate_up
        inner = ogs.matmul_ogs(
            hidden,
            weight,
            bias,
            routing,
            gather_indx=gather,
            precision_config=precision(scales),
            fused_activation=self._swiglu,
        )
        weight, scales, bias = down
        out: Tensor = ogs.matmul_ogs(
            inner,
            weight,
            bias,
            routing,
            scatter_indx=scatter,
            precision_config=precision(scales),
            gammas=routing.gate_scal,
        )
        return out


class Bf16(Contender):
    """transformers' experts in bfloat16, compiled with torch.compile, T being dynamic."""

    kind, is_compiled = "bf16", True

    def __init__(
        self, problem: Problem, form: str, experts: list[Any], compiler: str, mode: str
    ) -> None:
        self.name, self.form, self.layers, self.problem = form, form, len(experts), problem
        self.label = f"bf16 {form} ({compiler})"
        self.top_k = problem.sizes.top_k
        self.most_tokens = BATCHED_TOKENS if form == "batched_mm" else None
        self._layers = [(_copy(problem.router), each) for each in experts]
        self._mlp = torch.compile(
            _bf16_mlp,
            backend=compiler,
            dynamic=True,
            mode=mode if compiler == "inductor" and mode != "default" else None,
        )

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        router, experts = self._layers[layer]
        experts.config._experts_implementation = self.form  # shared by all layers
        out: Tensor = self._mlp(experts, *router, hidden, self.top_k)
        return out


def _bf16_mlp(experts: Any, weight: Tensor, bias: Tensor, hidden: Tensor, top_k: int) -> Tensor:
    """``GptOssMLP.forward``."""
    chosen, indices = torch.topk(linear(hidden, weight, bias), top_k, dim=-1)
    scores = torch.nn.functional.softmax(chosen, dim=1, dtype=chosen.dtype)
    out: Tensor = experts(hidden, indices, scores)
    return out


def bf16_experts(problem: Problem, layers: int) -> list[Any]:
    """``GptOssExperts`` of the first layers, made one after the other.

    Raises:
        Unavailable: no transformers.
    """
    try:
        return transformers_experts(problem.sizes, map(problem.weights, range(layers)))
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error


def load_triton_kernels(folder: Path | None, device: torch.device) -> Any:
    """OpenAI's package: from ``folder``, as installed, or as vLLM carries it.

    Args:
        folder: the package's own, or the one that holds it.

    Raises:
        Unavailable: it is not there, or has another interface.
    """
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    if folder is not None:
        folder = folder.resolve()
        sys.path.insert(0, str(folder.parent if folder.name == "triton_kernels" else folder))
    elif importlib.util.find_spec("triton_kernels") is None:
        vllm = importlib.util.find_spec("vllm")  # found, not imported
        places = [Path(place, "third_party") for place in _folders(vllm)]
        place = next((p for p in places if (p / "triton_kernels").is_dir()), None)
        if place is None:
            raise Unavailable("not installed, neither alone nor in vllm (--triton-kernels FOLDER)")
        sys.path.append(str(place))  # its files import one another by their absolute name
    try:
        package = importlib.import_module("triton_kernels")
        for module, names in TRITON_KERNELS_NAMES.items():
            found = importlib.import_module(f"triton_kernels.{module}")
            missing = [name for name in names if not hasattr(found, name)]
            if missing:
                raise Unavailable(f"its {module} has no {', '.join(missing)}")
    except ImportError as error:
        raise Unavailable(f"cannot be imported, or is a version of other names: {error}") from error
    return package


def _folders(spec: Any) -> list[str]:
    return list(spec.submodule_search_locations or []) if spec is not None else []


def _swizzled(part: Projection, layout: str) -> Parts:
    """Blocks and scales of all experts in ``layout``, in memory of their own."""
    return swizzle_weight(part.blocks.clone(), layout, scales=part.scales.clone())


def _copy(router: Router) -> Router:
    return Router(router.weight.clone(), router.bias.clone())


def layer_bytes(sizes: Sizes, kind: str) -> int:
    """Bytes of a layer's weights, as a contender of that kind holds them."""
    return sizes.experts * (sizes.bf16_bytes if kind == "bf16" else sizes.mxfp4_bytes)
