"""Small GPT-OSS models of transformers, and an inner compiler that keeps their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssMLP

from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.ops import target
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.store import STORE

FORMS = ("grouped_mm", "batched_mm", "eager")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config(form: str = "grouped_mm", **changes: Any) -> GptOssConfig:
    """Return a config in which all sizes differ, so that a mix-up of two sizes shows."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 16,
    }
    made = GptOssConfig(**{**sizes, **changes})
    made._experts_implementation = form
    return made


def model(
    dtype: torch.dtype = torch.float32, form: str = "grouped_mm", seed: int = 0, **changes: Any
) -> GptOssForCausalLM:
    """Make a whole model whose expert weights are MXFP4 values: rewriting changes only rounding."""
    return _fill(GptOssForCausalLM(config(form, **changes)), dtype, seed)


def mlp(
    dtype: torch.dtype = torch.float32, form: str = "grouped_mm", seed: int = 0, **changes: Any
) -> GptOssMLP:
    """Make one MoE MLP with weights like those of :func:`model`; inputs [batch, tokens, hidden]."""
    return _fill(GptOssMLP(config(form, **changes)), dtype, seed)


class Layers(nn.Module):
    """MoE MLPs one after the other, as a model has them, without what is between: quick to capture.

    Called with [1, tokens, hidden].
    """

    def __init__(self, dtype: torch.dtype = torch.float32, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp(dtype, seed=at) for at in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def _fill(module: Any, dtype: torch.dtype, seed: int) -> Any:
    module = module.to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = 0.2 if "router" in name else 0.1
            values = torch.randn(parameter.shape, generator=generator) * std
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                values = on_mxfp4_grid(values)
            parameter.copy_(values)
    return module


def pack(module: Any) -> Any:
    """Replace the experts of a model or MLP, in place, with packed ones; return it."""
    for parent in list(module.modules()):
        experts = getattr(parent, "experts", None)
        if isinstance(experts, GptOssExperts):
            parent.experts = _packed(experts)
    return module


def _packed(experts: GptOssExperts) -> PackedExperts:
    sizes = experts.num_experts, experts.hidden_size, experts.intermediate_size
    packed = PackedExperts(*sizes, experts.alpha, experts.limit)
    for name in PROJECTIONS:
        held = (*quantize(getattr(experts, name).transpose(1, 2)), getattr(experts, f"{name}_bias"))
        for part, value in zip(("blocks", "scales", "bias"), held, strict=True):
            setattr(packed, f"{name}_{part}", nn.Parameter(value.detach(), requires_grad=False))
    return packed


def swizzled(experts: Any) -> list[Tensor]:
    """Return blocks and scales of both expert weights, in the layout that compiled graphs read."""
    layout, parts = target.choose(torch.device("cpu")).layout, []
    for name in PROJECTIONS:
        if isinstance(experts, PackedExperts):
            held = getattr(experts, f"{name}_blocks"), getattr(experts, f"{name}_scales")
            source = Source(held, MXFP4)
        else:
            source = Source((getattr(experts, name),), FLOATS)
        parts += STORE.get(source, layout)
    return parts


def on_mxfp4_grid(weight: Tensor) -> Tensor:
    """Quantize weights [E, K, N] to MXFP4 and back."""
    blocks, scales = quantize(weight.transpose(1, 2))
    return dequantize(blocks, scales, weight.dtype).transpose(1, 2)


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (batch, length), generator=generator)


def hidden(
    tokens: int = 7, size: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Return random hidden states [1, tokens, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, tokens, size), generator=generator).to(dtype)


class Graphs:
    """An inner compiler that keeps its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.seen: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.seen.append(gm)
        return gm.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # transformers deep-copies the compile options of ``generate``


def compile_with(
    module: nn.Module | Callable[..., Any], inner: Any = "eager", **kwargs: Any
) -> Callable[..., Any]:
    """Compile with backend="mxfp4" and an inner compiler that runs graphs as they are."""
    options = {"inner": inner, **kwargs.pop("options", {})}
    return torch.compile(module, backend="mxfp4", options=options, **kwargs)
