"""Freed weights are moved, converted, saved, overwritten and computed with uncompiled."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from freeing import BOTH, FREE, dense, packed
from loaded import assert_same_tensors
from models import Layers, compile_with, hidden, mlp, model, pack, tokens
from torch import Tensor, nn
from transformers import GptOssForCausalLM

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteWarning
from mxfp4_fx.weights.freed import FreedParameter, is_freed
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.store import STORE

pytestmark = pytest.mark.usefixtures("no_gradients")


def freed(module: Any) -> tuple[Any, Callable[..., Any]]:
    """A module whose call has freed its weights, and the compiled module."""
    compiled = compile_with(module, options=FREE)
    compiled(hidden(dtype=next(module.parameters()).dtype))
    return module, compiled


def number_freed(module: nn.Module) -> int:
    return sum(map(is_freed, module.parameters()))


def close(actual: Tensor, expected: Tensor) -> bool:
    """Float32 on both sides, same weights: apart by the rounding of sums of H and I products."""
    bound = 2 * (64 + 96) * 2**-24 * expected.abs().max()
    return bool((actual - expected).abs().max() <= bound)


NO_OPS: dict[str, Callable[[nn.Module], Any]] = {
    "to(device)": lambda m: m.to("cpu"),
    "to(dtype)": lambda m: m.to(torch.float32),
    "to(tensor)": lambda m: m.to(torch.zeros(1)),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "eval": lambda m: m.eval(),
    "zero_grad": lambda m: m.zero_grad(),
}


@BOTH
def test_what_need_not_be_done_passes(make: Callable[..., Any]) -> None:
    module, compiled = freed(make())
    before, expected = number_freed(module), compiled(hidden())[0]
    for use in NO_OPS.values():
        use(module)
        assert number_freed(module) == before
    assert torch.equal(compiled(hidden())[0], expected)


@BOTH
@pytest.mark.parametrize("how", ["to", "bfloat16"])
def test_another_dtype(make: Callable[..., Any], how: str) -> None:
    module, compiled = freed(make())
    module.to(torch.bfloat16) if how == "to" else module.bfloat16()
    plain = make().to(torch.bfloat16)
    x = hidden(dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {p.dtype for p in plain.parameters()}
    assert torch.equal(compiled(x)[0], compile_with(plain)(x)[0])
    mxfp4_fx.restore(module)
    assert_same_tensors(dict(module.named_parameters()), dict(plain.named_parameters()))


@BOTH
def test_a_device_without_memory_and_back(make: Callable[..., Any]) -> None:
    module, compiled = freed(make())
    module.to("meta")
    assert number_freed(module) == 0
    module.to_empty(device="cpu")
    module.load_state_dict(make().state_dict())
    assert close(compiled(hidden())[0], make()(hidden())[0])


@BOTH
def test_room_for_other_values(make: Callable[..., Any]) -> None:
    module, compiled = freed(make())
    module.to_empty(device="cpu")
    module.load_state_dict(make().state_dict())
    assert close(compiled(hidden())[0], make()(hidden())[0])


@BOTH
@pytest.mark.parametrize("assign", [False, True])
def test_loading_other_values(make: Callable[..., Any], assign: bool) -> None:
    module, compiled = freed(make())
    other = pack(mlp(seed=3)) if make is packed else mlp(seed=3)
    module.load_state_dict(other.state_dict(), assign=assign)
    assert close(compiled(hidden())[0], other(hidden())[0])


@BOTH
@pytest.mark.parametrize("assign", [False, True])
def test_loading_what_it_holds_itself(make: Callable[..., Any], assign: bool) -> None:
    module, compiled = freed(make())
    before, expected = number_freed(module), compiled(hidden())[0]
    module.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(compiled(hidden())[0], expected)
    assert number_freed(module) == before
    mxfp4_fx.restore(module)
    assert_same_tensors(dict(module.named_parameters()), dict(make().named_parameters()))


@BOTH
def test_new_values_are_freed_again(make: Callable[..., Any]) -> None:
    module, compiled = freed(make())
    before = number_freed(module)
    module.load_state_dict(make().state_dict())
    assert number_freed(module) == 0
    compiled(hidden())
    assert number_freed(module) == before


def test_a_load_that_fails_leaves_the_weight_as_it_was() -> None:
    module, compiled = freed(dense())
    expected = compiled(hidden())[0]
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.down_proj"):
        module.load_state_dict({"experts.down_proj": torch.zeros(6, 96, 32)}, strict=False)
    with pytest.raises(RuntimeError, match="must match"):
        module.experts.down_proj.copy_(torch.zeros(6, 96, 32))
    assert torch.equal(compiled(hidden())[0], expected)
    assert is_freed(module.experts.down_proj)


def test_new_data() -> None:
    module, compiled = freed(dense())
    other = mlp(seed=3)
    for name in ("gate_up_proj", "down_proj"):
        getattr(module.experts, name).data = getattr(other.experts, name).data
    other.router = module.router
    other.experts.gate_up_proj_bias = module.experts.gate_up_proj_bias
    other.experts.down_proj_bias = module.experts.down_proj_bias
    assert close(compiled(hidden())[0], other(hidden())[0])


@BOTH
def test_the_state_dict_has_the_values(make: Callable[..., Any]) -> None:
    module, _ = freed(make())
    assert_same_tensors(dict(module.state_dict()), dict(make().state_dict()))
    deferred = module.state_dict()
    assert all(torch.equal(deferred[n], deferred[n]) for n in deferred)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert_same_tensors(torch.load(file), dict(make().state_dict()))
    assert number_freed(module) > 0


def test_a_dense_model_is_saved(tmp_path: Path) -> None:
    whole = model(torch.bfloat16, num_hidden_layers=1)
    expected = {name: p.clone() for name, p in whole.named_parameters()}
    compile_with(whole, options=FREE)(tokens())
    whole.save_pretrained(tmp_path)
    again = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_tensors(dict(again.named_parameters()), expected)


def test_a_dense_model_is_dequantized() -> None:
    whole = model(num_hidden_layers=1)
    expected = {name: p.clone() for name, p in whole.named_parameters()}
    compile_with(whole, options=FREE)(tokens())
    assert number_freed(whole) == 2
    assert mxfp4_fx.dequantize(whole) is whole
    assert_same_tensors(dict(whole.named_parameters()), expected)
    assert type(whole.model.layers[0].mlp.experts.down_proj) is nn.Parameter


@pytest.mark.exhaustive
def test_a_model_of_both_kinds_is_dequantized() -> None:
    whole = model()
    expected = {name: p.clone() for name, p in whole.named_parameters()}
    pack(whole.model.layers[1])
    compile_with(whole, options=FREE)(tokens())
    assert number_freed(whole) == 6
    mxfp4_fx.dequantize(whole, torch.float32)
    assert_same_tensors(dict(whole.named_parameters()), expected)


def test_accelerate_prepares_a_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    whole, x = pack(Layers()), hidden()
    expected = compile_with(whole, options=FREE)(x)
    prepared = accelerate.Accelerator(cpu=True).prepare(whole)
    assert number_freed(whole) == 8
    assert torch.equal(compile_with(prepared, options=FREE)(x), expected)


@pytest.mark.parametrize("asked", ["auto", "reference", "triton"])
def test_packed_experts_compute_uncompiled(asked: str) -> None:
    module, x = packed(), hidden()
    expected = module(x)[0]
    compile_with(module, options={**FREE, "kernels": asked})(x)
    count = number_freed(module)
    assert close(module(x)[0], expected)
    assert number_freed(module) == count == (0 if asked == "reference" else 4)


def test_uncompiled_packed_experts_of_which_half_was_replaced() -> None:
    module, x = packed(), hidden()
    freed(module)
    other = packed()
    scales = nn.Parameter(other.experts.down_proj_scales.flip(0).clone(), requires_grad=False)
    module.experts.down_proj_scales = other.experts.down_proj_scales = scales
    assert close(module(x)[0], other(x)[0])
    pair = module.experts.down_proj_blocks, module.experts.down_proj_scales
    held = STORE.values(Source(pair, MXFP4))
    assert torch.equal(held[0], other.experts.down_proj_blocks)
    assert held[1] is scales


def test_uncompiled_packed_experts_have_gradients() -> None:
    module, x = packed(), hidden().requires_grad_()
    with torch.enable_grad():
        module(x)[0].sum().backward()
        expected, x.grad = x.grad, None
        freed(module)
        module(x)[0].sum().backward()
    assert close(x.grad, expected)


def test_another_layout_made_in_inference_mode_can_be_saved_for_a_backward() -> None:
    module, _ = freed(dense())
    with torch.inference_mode():
        parts = STORE.get(Source((module.experts.down_proj,), FLOATS), "row_major")
    assert not any(part.is_inference() for part in parts)


def test_beyond_the_recompile_limit() -> None:
    """What Dynamo runs uncompiled then computes from the same weights."""
    module, plain = packed(), packed()
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = compile_with(module, options=FREE, dynamic=False)
        for length in range(1, 3):
            compiled(hidden(length))
        with pytest.warns(MissedRewriteWarning, match="recompile_limit"):
            out = compiled(hidden(4))[0]
    assert close(out, plain(hidden(4))[0])
    assert number_freed(module) == 4


@BOTH
def test_copies_are_refused_before_anything_is_changed(make: Callable[..., Any]) -> None:
    module, compiled = freed(make())
    expected = compiled(hidden())[0]
    with pytest.raises(mxfp4_fx.errors.FreedWeightError, match="restore"):
        copy.deepcopy(module)
    assert torch.equal(compiled(hidden())[0], expected)
    assert isinstance(next(p for p in module.parameters() if is_freed(p)), FreedParameter)
