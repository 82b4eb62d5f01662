"""Who is measured: this project's ops on each instruction-set path, its PyTorch path, transformers.

Every contender computes the same MLP, from router logits to the sum of the experts, on the same
weights. Each has copies of them, its layers, and takes the next layer at every call, so that
weights come from memory as they do in a model.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from moe import ALPHA, LIMIT, Inputs, Projection, Sizes, Weights
from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.core.formats import dequantize
from mxfp4_fx.ops.schemas import KERNELS
from mxfp4_fx.weights.swizzle import swizzle_weight

PATH_VARIABLE = "MXFP4_FX_CPU"
OPS = torch.ops.mxfp4

# Forms of transformers' experts: name -> (label, `_experts_implementation`, compiled, largest T).
# batched_mm copies an expert's weights for every routed row.
PEERS: dict[str, tuple[str, str, bool, int | None]] = {
    "grouped_mm": ("transformers grouped_mm", "grouped_mm", False, None),
    "grouped_mm_compiled": ("transformers grouped_mm + compiler", "grouped_mm", True, None),
    "batched_mm": ("transformers batched_mm", "batched_mm", False, 4),
    "loop": ("transformers eager loop", "eager", False, None),
}
DEFAULT_PEERS = ("grouped_mm", "grouped_mm_compiled")
PYTORCH_TOKENS = 16  # above, one call takes seconds

Parts = tuple[Tensor, Tensor]
Layer = tuple[Parts, Tensor, Parts, Tensor]  # gate_up, its bias, down, its bias


class Contender(ABC):
    """One of those that are measured.

    Attributes:
        name: its key in the results.
        label: how a reader knows it.
        kind: "native", "pytorch" or "transformers".
        layers: copies of the weights that it takes in turn.
        expert_bytes: bytes of an expert's weights in its form.
        most_tokens: the largest T that it is measured at; None: any.
    """

    name: str
    label: str
    kind: str
    layers: int
    expert_bytes: int
    most_tokens: int | None = None
    _next = 0

    @abstractmethod
    def prepare(self) -> None:
        """Called before each sample, outside its time."""

    @abstractmethod
    def run(self, layer: int, inputs: Inputs) -> Tensor:
        """The MLP of a layer: [T, H] bfloat16."""

    def __call__(self, inputs: Inputs) -> Tensor:
        layer = self._next
        self._next = (layer + 1) % self.layers
        return self.run(layer, inputs)


class Ours(Contender):
    """The device ops that the backend puts into a graph, called as it calls them."""

    def __init__(
        self,
        name: str,
        label: str,
        sizes: Sizes,
        path: str | None,
        layers: Sequence[Layer],
    ) -> None:
        self.name, self.label, self.path = name, label, path
        self.kind = "pytorch" if path is None else "native"
        self.layers, self.expert_bytes = len(layers), sizes.mxfp4_bytes
        self.kernels, self.layout = kernels_of(path)
        self.top_k = sizes.top_k
        self._layers = layers
        if path is None:
            self.most_tokens = PYTORCH_TOKENS

    def prepare(self) -> None:
        if self.path is not None:
            force_path(self.path)

    def routing(self, inputs: Inputs) -> Any:
        return OPS.routing(inputs.logits, self.top_k, kernels=self.kernels)

    def gate_up(self, layer: int, hidden: Tensor, routes: Any) -> Tensor:
        parts, bias, _, _ = self._layers[layer]
        return OPS.matmul_ogs(
            hidden,
            *parts,
            bias,
            routes[3],
            gather_index=routes[1],
            activation="swiglu",
            alpha=ALPHA,
            limit=LIMIT,
            layout=self.layout,
            kernels=self.kernels,
        )

    def down(self, layer: int, inner: Tensor, routes: Any) -> Tensor:
        _, _, parts, bias = self._layers[layer]
        return OPS.matmul_ogs(
            inner,
            *parts,
            bias,
            routes[3],
            scatter_index=routes[2],
            gammas=routes[0],
            experts_per_token=self.top_k,
            layout=self.layout,
            kernels=self.kernels,
        )

    def run(self, layer: int, inputs: Inputs) -> Tensor:
        routes = self.routing(inputs)
        return self.down(layer, self.gate_up(layer, inputs.hidden, routes), routes)


class Transformers(Contender):
    """``GptOssExperts`` in bfloat16 behind the router's top-k and softmax."""

    kind = "transformers"

    def __init__(self, name: str, sizes: Sizes, experts: Sequence[Any], compiler: str) -> None:
        label, self.form, compiled, self.most_tokens = PEERS[name]
        self.name = name
        self.label = label.replace("compiler", compiler)
        self.layers, self.expert_bytes = len(experts), sizes.bf16_bytes
        self.top_k = sizes.top_k
        self._experts = experts
        # Static shapes: the compiler may then fit its code to each T.
        self._mlp = (
            torch.compile(_transformers_mlp, backend=compiler, dynamic=False)
            if compiled
            else _transformers_mlp
        )

    def prepare(self) -> None:
        self._experts[0].config._experts_implementation = self.form  # shared by all layers

    def run(self, layer: int, inputs: Inputs) -> Tensor:
        out: Tensor = self._mlp(self._experts[layer], *inputs, self.top_k)
        return out


def _transformers_mlp(experts: Any, hidden: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """``GptOssMLP.forward`` without the router's own matmul."""
    chosen, indices = torch.topk(logits, top_k, dim=-1)
    scores = torch.nn.functional.softmax(chosen, dim=1, dtype=chosen.dtype)
    out: Tensor = experts(hidden, indices, scores)
    return out


def transformers_experts(sizes: Sizes, weights: Iterable[Weights]) -> list[Any]:
    """``GptOssExperts`` in bfloat16, one for each of the weights, that share one configuration."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
    )

    def fill(parameter: Tensor, bias: Tensor, part: Projection) -> None:
        for expert in range(sizes.experts):
            values = parameter[expert].T  # [N, K], strided: as a checkpoint is loaded
            dequantize(part.blocks[expert], part.scales[expert], values.dtype, out=values)
        bias.copy_(part.bias)

    made = []
    for layer in weights:
        device = layer.gate_up.blocks.device
        with torch.device("meta"):
            experts = GptOssExperts(config)
        experts = experts.bfloat16().to_empty(device=device).requires_grad_(False).eval()
        fill(experts.gate_up_proj, experts.gate_up_proj_bias, layer.gate_up)
        fill(experts.down_proj, experts.down_proj_bias, layer.down)
        made.append(experts)
    return made


def swizzled_layers(experts: Sequence[Any], layout: str, count: int) -> list[Layer]:
    """``count`` layers in memory of their own, made as the backend makes them.

    Beyond the number of experts their values repeat, which no cache can know.
    """
    layers = []
    for index in range(count):
        source = experts[index % len(experts)]
        layers.append(
            (
                swizzle_weight(source.gate_up_proj, layout),
                source.gate_up_proj_bias.detach(),
                swizzle_weight(source.down_proj, layout),
                source.down_proj_bias.detach(),
            )
        )
    return layers


def kernels_of(path: str | None) -> tuple[str, str]:
    """(kernels, layout) of the ops for an instruction-set path, or for plain PyTorch (None)."""
    if path is not None:
        return "cpu", "cpu_panels"
    # Until the native kernels came, plain PyTorch was called "cpu".
    return ("pytorch" if "pytorch" in KERNELS else "cpu"), "row_major"


def native_paths() -> tuple[tuple[str, ...], dict[str, str]]:
    """(instruction-set paths that work here, the chosen one first; the others with the reason).

    Each is compiled and called once, for what cannot be built must not fall back in silence.
    """
    from mxfp4_fx.core.layouts import LAYOUTS

    if "cpu_panels" not in LAYOUTS or not hasattr(hardware, "runnable_paths"):
        return (), {"native": "this version of mxfp4_fx has no native CPU kernels"}
    best = hardware.cpu_path()
    works, reasons = [], {}
    for path in (best, *(path for path in hardware.runnable_paths() if path != best)):
        try:
            with restored_path():
                force_path(path)
                OPS.routing(torch.zeros(1, 4), 2, kernels="cpu")
        except Exception as error:  # whatever it is, it is reported with the path
            line = str(error).partition("\n")[0].replace(str(Path.home()), "~")
            reasons[path] = f"{type(error).__name__}: {line}"
        else:
            works.append(path)
    return tuple(works), reasons


def force_path(path: str) -> None:
    """Let the native kernels use this path from now on; see :func:`restored_path`."""
    if os.environ.get(PATH_VARIABLE) != path:
        os.environ[PATH_VARIABLE] = path
        hardware.cpu_path.cache_clear()
    if hardware.cpu_path() != path:
        used = hardware.cpu_path()
        raise RuntimeError(f"{PATH_VARIABLE}={path} was not followed: {used} is used")


@contextmanager
def restored_path() -> Iterator[None]:
    """Afterwards the path is again what it was."""
    before = os.environ.get(PATH_VARIABLE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(PATH_VARIABLE, None)
        else:
            os.environ[PATH_VARIABLE] = before
        if hasattr(hardware, "cpu_path"):
            hardware.cpu_path.cache_clear()
