"""``from_pretrained`` of dense experts: quantized while they are loaded, one tensor at a time."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROJECTIONS, TINY, copied, edit_tensors, read_tensors, write_packed
from loaded import (
    SECOND_LAYER_ON_DISK,
    assert_same_tensors,
    dequantized,
    logits,
    measured,
    write_dense,
)
from models import config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, GptOssForCausalLM

import mxfp4_fx
from mxfp4_fx.core.errors import CheckpointError, NanWeightsWarning
from mxfp4_fx.core.formats import SLAB_VALUES, quantize
from mxfp4_fx.huggingface.packed import PackedExperts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "dense"
    return write_dense(path, packed, torch.bfloat16)


def quantized(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, each dense expert weight in MXFP4."""
    tensors = {}
    for name, tensor in read_tensors(path).items():
        if name.endswith(PROJECTIONS):
            blocks, scales = quantize(tensor.transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_weights_are_rounded_once_from_what_is_stored(
    packed: Path, tmp_path: Path, stored: torch.dtype, loaded: torch.dtype
) -> None:
    path = write_dense(tmp_path / "dense", packed, stored)
    parameters = dict(mxfp4_fx.from_pretrained(path, dtype=loaded).named_parameters())
    expected = quantized(path)
    assert parameters.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor if tensor.dtype == torch.uint8 else tensor.to(parameters[name].dtype)
        assert parameters[name].dtype == wanted.dtype, name
        assert torch.equal(parameters[name], wanted), name


@pytest.mark.parametrize("layer", [0, 1])
def test_one_dense_layer(packed: Path, tmp_path: Path, layer: int) -> None:
    path = write_dense(tmp_path / "d", packed, torch.float32, [layer])
    parameters = dict(mxfp4_fx.from_pretrained(path, dtype=torch.bfloat16).named_parameters())
    assert_same_tensors(parameters, quantized(path))


def test_the_scale_rule_is_the_one_asked_for(dense: Path) -> None:
    model = mxfp4_fx.from_pretrained(dense, scale_rule="search")
    weight = read_tensors(dense)["model.layers.1.mlp.experts.down_proj"].transpose(1, 2)
    blocks, scales = quantize(weight, scale_rule="search")
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(experts.down_proj_blocks, blocks)
    assert torch.equal(experts.down_proj_scales, scales)
    assert not torch.equal(scales, quantize(weight)[1])


def test_blocks_that_become_nan_are_reported(dense: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"][2, :, 5] = torch.inf

    path = edit_tensors(copied(dense, tmp_path / "copy"), spoil)
    with pytest.warns(NanWeightsWarning, match=r"3 MXFP4 .*layers.1.*down_proj_scales \(3\)"):
        mxfp4_fx.from_pretrained(path)


def test_experts_are_frozen(dense: Path) -> None:
    model = mxfp4_fx.from_pretrained(dense)
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert not any(p.requires_grad for module in experts for p in module.parameters())


def test_skipped_experts_stay_as_stored(dense: Path) -> None:
    model = mxfp4_fx.from_pretrained(dense, skip="model.layers.0.mlp")
    tensors = read_tensors(dense)
    for weight in PROJECTIONS:
        kept = getattr(model.model.layers[0].mlp.experts, weight)
        assert torch.equal(kept, tensors[f"model.layers.0.mlp.experts.{weight}"])
    assert isinstance(model.model.layers[1].mlp.experts, PackedExperts)


def test_skipped_experts_that_are_packed_beside_dense_ones(packed: Path, tmp_path: Path) -> None:
    """The loader reads bytes as floats then: the dtype of the weight that they are for."""
    path = write_dense(tmp_path / "d", packed, torch.bfloat16, [0])
    model = mxfp4_fx.from_pretrained(path, skip="model.layers.1.mlp")
    expected = dict(dequantized(packed).model.layers[1].named_parameters())
    assert_same_tensors(dict(model.model.layers[1].named_parameters()), expected)


def test_saved_it_is_an_mxfp4_checkpoint(dense: Path, tmp_path: Path) -> None:
    mxfp4_fx.from_pretrained(dense).save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), quantized(dense))
    reloaded = mxfp4_fx.from_pretrained(tmp_path)
    assert_same_tensors(dict(reloaded.named_parameters()), quantized(dense))
    assert_same_tensors(
        dict(dequantized(tmp_path).named_parameters()),
        dict(reloaded.dequantize().named_parameters()),
    )


def test_a_layer_on_disk(dense: Path, tmp_path: Path) -> None:
    model = mxfp4_fx.from_pretrained(
        dense, device_map=SECOND_LAYER_ON_DISK, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.experts.down_proj_blocks.is_meta
    assert torch.equal(logits(model), logits(mxfp4_fx.from_pretrained(dense)))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), quantized(dense))


def test_a_device_map_is_planned_with_the_bytes_that_will_be_there(dense: Path) -> None:
    model = mxfp4_fx.from_pretrained(dense)
    sizes = [sum(p.nbytes for p in part.parameters()) for part in (model, model.model.layers[0])]
    room = {"cpu": sum(sizes) + 4096}  # a layer once more is kept free; and rotary frequencies
    planned = mxfp4_fx.from_pretrained(dense, device_map="auto", max_memory=room)
    assert not any(parameter.is_meta for parameter in planned.parameters())


def test_files_and_model_without_head(dense: Path, tmp_path: Path) -> None:
    """Its tensors have shorter names."""
    base = AutoModel.from_pretrained(dense)
    base.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("model.") for name in read_tensors(tmp_path / "base"))
    expected = {k: v for k, v in quantized(dense).items() if k != "lm_head.weight"}
    for path in (dense, tmp_path / "base"):
        model = mxfp4_fx.from_pretrained(path, auto_class=AutoModel)
        assert_same_tensors(
            {f"model.{name}": parameter for name, parameter in model.named_parameters()}, expected
        )


def test_a_dtype_that_mxfp4_cannot_be_made_of(packed: Path, tmp_path: Path) -> None:
    path = write_dense(tmp_path / "d", packed, torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"gate_up_proj in .* is float8_e4m3fn"):
        mxfp4_fx.from_pretrained(path)


def test_a_size_that_mxfp4_cannot_have(tmp_path: Path) -> None:
    GptOssForCausalLM(config(intermediate_size=80)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.experts cannot be MXFP4.* 80"):
        mxfp4_fx.from_pretrained(tmp_path)


class LiveDense(TorchDispatchMode):
    """Counts the dense expert weights that are in memory, at each op on a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.permute.default:  # weight[expert].T
            shapes = {(4, 64, 192), (4, 96, 64)}
            live = [
                t
                for t in gc.get_objects()
                if type(t) is torch.Tensor and tuple(t.shape) in shapes and not t.is_meta
            ]
            self.most = max(self.most, len({t.data_ptr() for t in live}))
        return func(*args, **kwargs or {})


def test_dense_weights_are_read_one_after_the_other(dense: Path) -> None:
    gc.freeze()  # what is there already need not be looked through each time
    try:
        with LiveDense() as dense_weights:
            mxfp4_fx.from_pretrained(dense)
    finally:
        gc.unfreeze()
    assert dense_weights.most == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.exhaustive
def test_memory_holds_the_packed_model_and_one_slab(dense: Path, tmp_path: Path) -> None:
    """Dense weights, 3.8 times as large, are pages of their file and copied nowhere."""
    shape = replace(TINY, hidden=1024, intermediate=1024, experts=8, layers=2)
    path = write_dense(
        tmp_path / "d", write_packed(tmp_path / "packed", shape), torch.bfloat16, range(2)
    )
    code = f"""
import mxfp4_fx
mxfp4_fx.from_pretrained({str(dense)!r})  # what is imported and made once
peak = Peak()
model = mxfp4_fx.from_pretrained({str(path)!r})
print(peak.bytes - peak.start_bytes, sum(p.nbytes for p in model.parameters()))
"""
    peak, packed_bytes = measured(code)
    assert peak < packed_bytes + 10 * SLAB_VALUES
