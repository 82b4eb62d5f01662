"""``mxfp4_fx.dequantize``: a model with packed experts becomes the one that transformers loads."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from allocations import OutOfMemoryOnce
from checkpoints import TINY, read_tensors, write_packed
from loaded import SECOND_LAYER_ON_DISK, assert_same_tensors, dequantized, logits, measured
from models import Graphs, swizzled
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import mxfp4_fx
from mxfp4_fx.core.errors import DequantizeError, DeviceFullWarning
from mxfp4_fx.core.formats import SLAB_VALUES
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.source import FLOATS, Source
from mxfp4_fx.weights.store import STORE, WeightStore

WAYS: dict[str, Callable[[Any], Any]] = {
    "function": mxfp4_fx.dequantize,
    "method": lambda model: model.dequantize(),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_model_that_transformers_loads(
    checkpoint: Path, dtype: torch.dtype, way: Callable[[Any], Any]
) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=dtype)
    assert way(model) is model
    expected = dequantized(checkpoint, dtype)
    assert_same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_says_that_it_was_quantized(
    checkpoint: Path, tmp_path: Path, way: Callable[[Any], Any]
) -> None:
    model = way(mxfp4_fx.from_pretrained(checkpoint))
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "_is_quantized")
    expected = dequantized(checkpoint).config.to_dict()
    assert model.config.to_dict() == expected | {"_name_or_path": str(checkpoint)}
    model.save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), dict(model.named_parameters()))


def test_to_another_dtype(checkpoint: Path) -> None:
    model = mxfp4_fx.dequantize(mxfp4_fx.from_pretrained(checkpoint), torch.float32)
    expected = dequantized(checkpoint, torch.float32)
    assert_same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert_same_tensors(dict(model.named_buffers()), dict(expected.named_buffers()))
    assert model.dtype == model.config.dtype == torch.float32


def test_it_can_be_trained_where_the_rest_can(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    model.model.layers[0].requires_grad_(False)
    model = mxfp4_fx.dequantize(model)
    for layer, expected in zip(model.model.layers, (False, True), strict=True):
        assert {p.requires_grad for p in layer.mlp.experts.parameters()} == {expected}


def test_constants_and_mode_are_kept(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    packed = model.model.layers[0].mlp.experts
    packed.alpha, packed.limit = 1.5, 3.0
    experts = mxfp4_fx.dequantize(model).model.layers[0].mlp.experts
    assert (experts.alpha, experts.limit, experts.training) == (1.5, 3.0, False)


def test_experts_follow_the_models_implementation(checkpoint: Path) -> None:
    model = mxfp4_fx.dequantize(mxfp4_fx.from_pretrained(checkpoint))
    model.set_experts_implementation("batched_mm")
    expected = dequantized(checkpoint)
    expected.set_experts_implementation("batched_mm")
    assert torch.equal(logits(model), logits(expected))
    assert model.model.layers[0].mlp.experts.config is model.config


def test_hooks_stay_on_the_experts(checkpoint: Path) -> None:
    """accelerate's, which bring inputs to the device of a layer."""
    model = mxfp4_fx.from_pretrained(checkpoint)
    hook = ModelHook()
    add_hook_to_module(model.model.layers[1].mlp.experts, hook)
    experts = mxfp4_fx.dequantize(model).model.layers[1].mlp.experts
    assert experts._hf_hook is hook
    assert torch.equal(logits(model), logits(dequantized(checkpoint)))


def test_a_weight_that_the_device_has_no_room_for_is_on_the_cpu(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    with (
        OutOfMemoryOnce("new_empty") as device,
        pytest.warns(DeviceFullWarning, match=r"\[4, 64, 192\] stays on the CPU"),
    ):
        mxfp4_fx.dequantize(model)
    assert device.failed
    expected = dict(dequantized(checkpoint).named_parameters())
    assert_same_tensors(dict(model.named_parameters()), expected)


def test_tied_experts_stay_tied(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    layers = model.model.layers
    layers[1].mlp.experts = layers[0].mlp.experts
    mxfp4_fx.dequantize(model)
    assert isinstance(layers[0].mlp.experts, GptOssExperts)
    assert layers[1].mlp.experts is layers[0].mlp.experts


def test_freed_weights_that_the_device_has_no_room_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.compile(backend="mxfp4", options={"inner": "eager", "free_weights": True})
    logits(model)
    devices: list[Any] = []
    real = WeightStore.values

    def full(store: WeightStore, source: Source, device: Any = None) -> tuple[torch.Tensor, ...]:
        devices.append(device)
        if device is None:
            raise torch.OutOfMemoryError
        return real(store, source, device)

    monkeypatch.setattr(WeightStore, "values", full)
    mxfp4_fx.dequantize(model)
    assert torch.device("cpu") in devices
    expected = dict(dequantized(checkpoint).named_parameters())
    assert_same_tensors(dict(model.named_parameters()), expected)


def test_skipped_layers_that_were_freed_get_their_memory_again(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, skip="model.layers.0.mlp.experts")
    experts = model.model.layers[0].mlp.experts
    before = {name: experts.get_parameter(name).clone() for name in ("gate_up_proj", "down_proj")}
    for name in before:
        STORE.free(Source((experts.get_parameter(name),), FLOATS), "cpu_panels")
    mxfp4_fx.dequantize(model, torch.float32)
    for name, value in before.items():  # MXFP4 values already
        assert torch.equal(experts.get_parameter(name), value.float())


def test_a_model_inside_another_module(checkpoint: Path) -> None:
    holder = nn.Sequential(mxfp4_fx.from_pretrained(checkpoint))
    model = mxfp4_fx.dequantize(holder)[0]
    assert isinstance(model.model.layers[1].mlp.experts, GptOssExperts)
    assert not model.is_quantized


@pytest.mark.filterwarnings("ignore:backend .mxfp4.")  # older transformers break the graph
@pytest.mark.exhaustive
def test_a_model_that_was_compiled_in_place(checkpoint: Path) -> None:
    model, graphs = mxfp4_fx.from_pretrained(checkpoint), Graphs()
    model.compile(backend="mxfp4", options={"inner": graphs})
    logits(model)
    mxfp4_fx.dequantize(model)
    compiled = len(graphs.seen)
    # The dense experts, whose values MXFP4 holds exactly, are rewritten in their turn.
    actual = logits(model)
    assert len(graphs.seen) > compiled
    dense = dequantized(checkpoint)
    dense.compile(backend="mxfp4", options={"inner": Graphs()})
    assert torch.equal(actual, logits(dense))


def test_a_model_whose_weights_were_freed(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    model.compile(backend="mxfp4", options={"inner": "eager", "free_weights": True})
    logits(model)
    assert is_freed(model.model.layers[0].mlp.experts.down_proj_blocks)
    parts = [weakref.ref(p) for layer in model.model.layers for p in swizzled(layer.mlp.experts)]
    expected = dict(dequantized(checkpoint).named_parameters())
    assert_same_tensors(dict(mxfp4_fx.dequantize(model).named_parameters()), expected)
    gc.collect()
    assert all(part() is None for part in parts)


def test_offloaded_layers_are_refused(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, device_map=SECOND_LAYER_ON_DISK)
    for way in WAYS.values():
        with pytest.raises(DequantizeError, match=r"layers\.1\..* is offloaded"):
            way(model)
    assert all(isinstance(layer.mlp.experts, PackedExperts) for layer in model.model.layers)


def test_a_model_without_packed_experts_is_refused(checkpoint: Path) -> None:
    with pytest.raises(DequantizeError, match="GptOssForCausalLM has no packed experts"):
        mxfp4_fx.dequantize(dequantized(checkpoint))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.exhaustive
def test_the_bytes_of_a_layer_are_freed_before_the_next_one(tmp_path: Path) -> None:
    shape = replace(TINY, hidden=1024, intermediate=512, experts=8, layers=6)
    path = write_packed(tmp_path / "packed", shape)
    code = f"""
import mxfp4_fx
def nbytes(): return sum(p.nbytes for p in model.parameters())
model = mxfp4_fx.from_pretrained({str(path)!r})
for p in model.parameters():
    p.data = p.data.clone()  # until now it was pages of a file
packed = nbytes()
peak = Peak()
mxfp4_fx.dequantize(model)
print(peak.bytes - peak.start_bytes, packed, nbytes())
"""
    peak, packed, dense = measured(code)
    assert peak < dense - packed + packed // 6 + 10 * SLAB_VALUES
