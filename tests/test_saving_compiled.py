"""Models compiled with ``free_weights``: saved, dequantized and generating, nothing is lost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors, write_packed
from loaded import IDS, assert_same_tensors, dequantized, logits
from safetensors.torch import load_file, save_file

import mxfp4_fx
from mxfp4_fx.weights.deferred import DeferredTensor
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.store import WeightStore

FREE = {"free_weights": True, "strict": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed") / "checkpoint")


def compile_layers(model: Any, **options: Any) -> None:
    """Each MoE MLP by itself: one small graph for all of them."""
    for layer in model.model.layers:
        layer.mlp.compile(backend="mxfp4", options={"inner": "eager", **options})


@pytest.fixture
def freed(checkpoint: Path) -> Any:
    """A model whose packed bytes are in the kernels' layout only."""
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16)
    compile_layers(model, **FREE)
    logits(model)
    assert isinstance(model.model.layers[1].mlp.experts.down_proj_scales, FreedParameter)
    return model


def test_the_checkpoint_is_saved_byte_for_byte(
    freed: Any, checkpoint: Path, tmp_path: Path
) -> None:
    freed.save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(checkpoint))


def test_a_shard_at_a_time(
    freed: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = WeightStore.values_of

    def recording(store: WeightStore, parameter: Any) -> torch.Tensor:
        made.append(f"{len(list(tmp_path.glob('*.safetensors')))} shards")
        return real(store, parameter)

    monkeypatch.setattr(WeightStore, "values_of", recording)
    freed.save_pretrained(tmp_path, max_shard_size="30KB")
    assert_same_tensors(read_tensors(tmp_path), read_tensors(checkpoint))
    assert len(made) == 8
    assert made[0] != made[-1]  # not all before the first is written


@pytest.mark.exhaustive
def test_saving_a_whole_model_leaves_it_compiled(checkpoint: Path, tmp_path: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.compile(backend="mxfp4", options={"inner": "eager", **FREE})
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(checkpoint))
    assert isinstance(model.model.layers[1].mlp.experts.down_proj_scales, FreedParameter)
    assert torch.equal(logits(model), before)


def test_transformers_loads_what_was_saved(freed: Any, checkpoint: Path, tmp_path: Path) -> None:
    freed.save_pretrained(tmp_path)
    assert torch.equal(logits(dequantized(tmp_path)), logits(dequantized(checkpoint)))


def test_the_state_dict_has_the_bytes_when_they_are_asked_for(freed: Any, checkpoint: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    tensor, expected = freed.state_dict()[name], read_tensors(checkpoint)[name]
    assert isinstance(tensor, DeferredTensor)
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(tensor, expected)
    assert type(tensor[0]) is torch.Tensor


def test_torch_save(freed: Any, checkpoint: Path) -> None:
    file = io.BytesIO()
    torch.save(freed.state_dict(), file)
    file.seek(0)
    back = torch.load(file)
    plain = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16)
    plain.load_state_dict(back)
    assert torch.equal(logits(plain), logits(mxfp4_fx.from_pretrained(checkpoint)))


def test_safetensors(freed: Any, checkpoint: Path, tmp_path: Path) -> None:
    """It reads the memory of tensors by their address."""
    save_file(freed.state_dict(), tmp_path / "model.safetensors")
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), read_tensors(checkpoint))


def test_skipped_experts_stay_dense_when_the_rest_is_compiled(
    checkpoint: Path, tmp_path: Path
) -> None:
    skipped = "model.layers.0.mlp.experts"
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16, skip=skipped)
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    with torch.no_grad():
        told = mxfp4_fx.explain(model, IDS)
    assert [(miss.layer, miss.skipped) for miss in told.misses] == [(skipped, True)]
    assert [rewrite.layer for rewrite in told.rewrites] == ["model.layers.1.mlp.experts"]
    compile_layers(model, free_weights=True)
    logits(model)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)
    model.save_pretrained(tmp_path)


def test_another_model_takes_its_state(freed: Any, checkpoint: Path, tmp_path: Path) -> None:
    other = mxfp4_fx.from_pretrained(write_packed(tmp_path / "other"), dtype=torch.bfloat16)
    for tensor in other.parameters():
        tensor.data.zero_()
    other.load_state_dict(freed.state_dict())
    assert torch.equal(logits(other), logits(mxfp4_fx.from_pretrained(checkpoint)))


def test_dequantizing(freed: Any, checkpoint: Path) -> None:
    expected = dequantized(checkpoint)
    mxfp4_fx.dequantize(freed)
    assert_same_tensors(dict(freed.state_dict()), dict(expected.state_dict()))


def test_restoring(freed: Any, checkpoint: Path) -> None:
    assert mxfp4_fx.restore(freed) == 8
    expected = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert_same_tensors(dict(freed.state_dict()), dict(expected.state_dict()))
    for layer in freed.model.layers:
        layer.mlp._compiled_call_impl = None  # uncompiled again
    assert torch.equal(logits(freed), logits(expected))


def test_packed_bytes_are_swizzled_where_they_were_loaded(checkpoint: Path) -> None:
    """The same bits as the checkpoint that transformers dequantizes and the backend quantizes."""
    dense = dequantized(checkpoint)
    packed = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for model in (dense, packed):
        compile_layers(model, strict=True)
    assert torch.equal(logits(packed), logits(dense))
