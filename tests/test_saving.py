"""``save_pretrained`` of a model with packed experts writes a checkpoint for everybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors, write_packed
from loaded import SECOND_LAYER_ON_DISK, assert_same_tensors, dequantized

import mxfp4_fx


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


def quantization_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text()).get("quantization_config")


def saved(model: Any, path: Path, **kwargs: Any) -> Path:
    model.save_pretrained(path, **kwargs)
    return path


def test_every_tensor_is_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    again = saved(mxfp4_fx.from_pretrained(checkpoint), tmp_path)
    assert_same_tensors(read_tensors(again), read_tensors(checkpoint))


def test_several_shards(checkpoint: Path, tmp_path: Path) -> None:
    again = saved(mxfp4_fx.from_pretrained(checkpoint), tmp_path, max_shard_size="100KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    assert_same_tensors(read_tensors(again), read_tensors(checkpoint))


def test_the_config_says_what_the_checkpoints_said(checkpoint: Path, tmp_path: Path) -> None:
    again = saved(mxfp4_fx.from_pretrained(checkpoint), tmp_path)
    assert quantization_of(again) == quantization_of(checkpoint)


def test_transformers_loads_it_to_the_same_values(checkpoint: Path, tmp_path: Path) -> None:
    again = saved(mxfp4_fx.from_pretrained(checkpoint), tmp_path)
    parameters = dict(dequantized(again).named_parameters())
    assert_same_tensors(parameters, dict(dequantized(checkpoint).named_parameters()))


def test_skipped_experts_are_saved_dense(checkpoint: Path, tmp_path: Path) -> None:
    skip = "model.layers.0.mlp.experts"
    model = mxfp4_fx.from_pretrained(checkpoint, skip=skip)
    again = saved(model, tmp_path)
    assert_same_tensors(read_tensors(again), dict(model.named_parameters()))
    assert quantization_of(again)["modules_to_not_convert"][-1] == skip
    # Both programs leave alone what the config names.
    expected = dict(dequantized(checkpoint).named_parameters())
    assert_same_tensors(dict(dequantized(again).named_parameters()), expected)
    reloaded = mxfp4_fx.from_pretrained(again)
    assert_same_tensors(dict(reloaded.named_parameters()), dict(model.named_parameters()))


def test_a_layer_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, device_map=SECOND_LAYER_ON_DISK)
    assert_same_tensors(read_tensors(saved(model, tmp_path)), read_tensors(checkpoint))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_dtype_leaves_the_bytes_alone(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=dtype)
    again = saved(model, tmp_path)
    assert_same_tensors(read_tensors(again), dict(model.named_parameters()))
    reloaded = mxfp4_fx.from_pretrained(again)
    assert_same_tensors(dict(reloaded.named_parameters()), dict(model.named_parameters()))
