"""Small GPT-OSS checkpoints, and edits that damage them, written with the safetensors library."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4_fx import quantize_checkpoint
from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import dequantize

TINY = CheckpointShape(
    layers=2,
    hidden=64,
    intermediate=96,
    experts=4,
    experts_per_token=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
)
EXPERTS = "model.layers.{}.mlp.experts"
PROJECTIONS = ("gate_up_proj", "down_proj")
Edit = Callable[[dict[str, Any]], object]  # changes tensors, or a config, in place


def write_packed(path: Path, shape: CheckpointShape = TINY) -> Path:
    """Write a whole checkpoint in MXFP4, in several shards."""
    return write_random_checkpoint(path, shape, max_shard_bytes=200_000, progress=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    config = read_config(path)
    edit(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edit the tensors, and save them in one file without an index."""
    tensors = read_tensors(path)
    edit(tensors)
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def without_prefix(tensors: dict[str, Tensor]) -> None:
    """Make the tensors those of a base model that was saved alone: no head, no "model." prefix."""
    del tensors["lm_head.weight"]
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def unpack_layers(tensors: dict[str, Tensor], *layers: int, dtype: torch.dtype) -> None:
    """Make the experts of `layers` dense: [E, K, N] in `dtype`."""
    for layer in layers:
        for projection in PROJECTIONS:
            name = f"{EXPERTS.format(layer)}.{projection}"
            blocks, scales = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
            values = dequantize(blocks, scales, torch.float32).to(dtype)
            tensors[name] = values.transpose(1, 2).contiguous()


def write_dense(
    path: Path, shape: CheckpointShape = TINY, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a whole checkpoint with dense experts, in one file."""
    write_packed(path, shape)
    edit_tensors(path, lambda tensors: unpack_layers(tensors, *range(shape.layers), dtype=dtype))
    return edit_config(path, lambda config: config.pop("quantization_config"))


def write_sparse(path: Path, sizes: dict[str, int], **config: Any) -> Path:
    """Write a dense checkpoint of any size: all zeros, in a sparse file, which needs no disk space.

    Args:
        path: a directory that does not exist.
        sizes: a number for each of `gpt_oss.KEYS`.
        config: further entries of ``config.json``.
    """
    config |= {"model_type": "gpt_oss", **sizes}
    forms: dict[int, gpt_oss.Form] = dict.fromkeys(range(sizes[gpt_oss.LAYERS]), "dense")
    header: dict[str, Any] = {}
    end = 0
    for name, axes in gpt_oss.tensors("model.", forms, biases=True, head=True).items():
        shape = [gpt_oss.size(axis, sizes) for axis in axes]
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return path


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def randomize(tensors: dict[str, Tensor]) -> None:
    """Give dense experts random values, which MXFP4 cannot represent."""
    torch.manual_seed(0)
    for name in tensors:
        if name.endswith(PROJECTIONS):
            tensors[name] = torch.randn(tensors[name].shape).to(tensors[name].dtype)


def convert(source: Path, out: Path, **options: Any) -> Path:
    return quantize_checkpoint(source, out, progress=False, **options)


def assert_refused(
    source: Path, folder: Path, tensors: Edit | None, config: Edit | None, words: str
) -> None:
    """Assert that a copy with these edits is not quantized, and nothing is written."""
    path = copied(source, folder / "faulty")
    if tensors:
        edit_tensors(path, tensors)
    if config:
        edit_config(path, config)
    with pytest.raises(CheckpointError, match=words):
        convert(path, folder / "out")
    assert not (folder / "out").exists()
    shutil.rmtree(path)


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
