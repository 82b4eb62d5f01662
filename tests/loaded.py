"""Tiny GPT-OSS checkpoints on disk, and what transformers alone makes of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from mxfp4_fx.random_checkpoint import CheckpointShape, write_random_checkpoint

SIZES: dict[str, int] = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 96,
    "experts": 4,
    "experts_per_token": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
}
WEIGHTS = ("gate_up_proj", "down_proj")
IDS = torch.arange(14).view(2, 7) * 5

# A device map of a model of two layers.
SECOND_LAYER_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu"),
    **dict.fromkeys(("model.norm", "lm_head"), "cpu"),
    "model.layers.1": "disk",
}


def write(path: Path, **changes: int) -> Path:
    """An MXFP4 checkpoint of several shards."""
    shape = CheckpointShape(**SIZES | changes)
    return write_random_checkpoint(path, shape, max_shard_bytes=100_000, progress=False)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors by name."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def write_dense(
    path: Path, packed: Path, dtype: torch.dtype, is_dense: Callable[[str], bool] = bool
) -> Path:
    """A copy of ``packed`` with dense experts of random values, where ``is_dense`` of the name.

    It has one file; if no experts are packed its config does not speak of quantization.
    """
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in read(packed).items():
        weight, _, part = name.rpartition("_")
        if not name.endswith(("_blocks", "_scales")) or not is_dense(weight):
            tensors[name] = tensor
        elif part == "scales":
            e, n, groups = tensor.shape
            values = torch.randn(e, groups * 32, n, generator=generator)
            tensors[weight] = values.to(dtype)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    if not any(name.endswith("_blocks") for name in tensors):
        del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    return path


def dequantized(path: Path, dtype: Any = "auto") -> GptOssForCausalLM:
    """The model with dense experts, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype
    )


def exact_logits(model: GptOssForCausalLM, ids: Tensor = IDS) -> Tensor:
    """[batch, tokens, vocabulary] in float64 by a model with dense experts."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("batched_mm")  # grouped_mm does not have float64
    with torch.no_grad():
        return exact(ids).logits


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
