"""Small experts of the installed transformers: every class on its experts interface.

Shape letters: E experts, H hidden, I intermediate, A experts a token, T tokens.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from models import on_mxfp4_grid
from torch import Tensor, nn

E, A, H, I = 6, 3, 64, 96  # noqa: E741

# What the configs call these sizes.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = {
    **dict.fromkeys(_EXPERTS, E),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), A),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), H),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size"), I),
    **dict.fromkeys(("ffn_hidden_size",), 2 * I),
    "moe_latent_size": None,
}
_DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)\(", re.MULTILINE)


@functools.cache
def classes() -> dict[str, str]:
    """Return every experts class on the interface -> its module, without importing any."""
    found = {}
    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        for name in _DECORATED.findall(file.read_text(encoding="utf-8")):
            found[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


@functools.cache
def written_alike() -> list[list[str]]:
    """Return the names of all experts classes, those of one source together.

    transformers copies a class from family to family. What may differ in copies is the name of the
    class, and what its config calls the sizes.
    """
    found: dict[str, list[str]] = {}
    for name, module in classes().items():
        file = Path(transformers.__file__).parents[1] / f"{module.replace('.', '/')}.py"
        text = file.read_text(encoding="utf-8")
        (source,) = re.findall(
            rf"^@use_experts_implementation.*\nclass {name}\(.*\n(?:(?: .*|#.*)?\n)*", text, re.M
        )
        for named in (r'"""(?:.|\n)*?"""', "#.*", name, r": \w+Config", *_SIZES):
            source = re.sub(rf"(?<=config\.){named}\b" if named in _SIZES else named, "", source)
        found.setdefault(re.sub(r"\s+", " ", source), []).append(name)
    return [*found.values()]


def experts_class(name: str) -> type[nn.Module]:
    return getattr(importlib.import_module(classes()[name]), name)


def experts(
    name: str, form: str = "grouped_mm", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Make experts of a class with frozen random weights that are MXFP4 values already."""
    config = _config(name)
    for key, value in _SIZES.items():
        if hasattr(config, key):
            several = isinstance(getattr(config, key), list)
            setattr(config, key, [value, value] if several else value)
    for key, value in changes.items():
        setattr(config, key, value)
    config._experts_implementation = form
    kind = experts_class(name)
    takes_size = "intermediate_size" in inspect.signature(kind).parameters
    given = {"intermediate_size": I} if takes_size else {}
    made = kind(config, **given).to(dtype).eval()
    return fill(made)


def _config(name: str) -> Any:
    """Return the family's own text config, with its own constants and activation."""
    module = classes()[name].replace(".modeling_", ".configuration_")
    for config in _configs(module):
        if hasattr(config, "hidden_size") and any(hasattr(config, key) for key in _EXPERTS):
            return config
    raise AssertionError(f"no config for {name}")


def _configs(module: str) -> Iterator[Any]:
    for _, kind in inspect.getmembers(importlib.import_module(module), inspect.isclass):
        if issubclass(kind, transformers.PreTrainedConfig) and kind.__module__ == module:
            yield kind()


def fill(module: Any, seed: int = 0) -> Any:
    """Give a module small random parameters; those of experts are MXFP4 values, and frozen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        std = 0.2 if "router" in name or "gate.weight" in name else 0.1
        values = torch.randn(parameter.shape, generator=generator) * std
        parameter.data.copy_(values + 1 if "norm" in name else values)
    for part in module.modules():
        if hasattr(part, "is_transposed") and hasattr(part, "has_gate"):
            part.requires_grad_(False)
            for name in ("gate_up_proj", "up_proj", "down_proj"):
                weight = getattr(part, name, None)
                if weight is not None:
                    weight.data = on_grid(weight.data.float(), part.is_transposed).to(weight.dtype)
    return module


def on_grid(weight: Tensor, is_transposed: bool) -> Tensor:
    """Quantize weights [E, K, N], or [E, N, K], to MXFP4 and back."""
    if is_transposed:
        return on_mxfp4_grid(weight)
    return on_mxfp4_grid(weight.transpose(1, 2)).transpose(1, 2).contiguous()


class Block(nn.Module):
    """Experts behind a router: softmax over all logits, the A largest, normalized.

    Attributes:
        wide: whether routing weights are float32, as 39 families have them in every dtype.
    """

    def __init__(self, experts: Any, wide: bool = False, top_k: int = A) -> None:
        super().__init__()
        self.experts, self.wide, self.top_k = experts, wide, top_k
        weight = next(experts.parameters())
        generator = torch.Generator().manual_seed(7)
        router = torch.randn((E, H), generator=generator) * 0.2
        self.router = nn.Parameter(router.to(weight.dtype), requires_grad=False)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = torch.topk(logits.float().softmax(dim=-1), self.top_k, dim=-1)
        scores = scores / scores.sum(dim=-1, keepdim=True)
        return ids, scores if self.wide else scores.to(logits.dtype)

    def forward(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """Map [T, H] to [T, H]; logits [T, E], if given, stand for the router's."""
        if logits is None:
            logits = nn.functional.linear(x, self.router)
        return self.experts(x, *self.route(logits))
