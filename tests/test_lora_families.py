"""PEFT's LoRA on packed experts of other families than GPT-OSS, beside PEFT's own on dense ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import oracle
import packed_families
import pytest
import torch
from combinations import exhaustive
from models import compile_with
from oracle import assert_as_accurate
from test_lora import WEIGHTS, adapted, factors, lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mxfp4_fx
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.activations import activation_of
from mxfp4_fx.huggingface.family_plan import packed_like
from mxfp4_fx.huggingface.packed import PackedExperts

peft = pytest.importorskip("peft")

# SiLU without limits; GELU; SwiGLU with limits.
CLASSES = ["Qwen3MoeExperts", exhaustive("Gemma4TextExperts"), exhaustive("DeepseekV4Experts")]


class Layer(nn.Module):
    """Experts for given routes."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = self.experts(x, indices, weights)
        return result


def dense(name: str, dtype: torch.dtype) -> Layer:
    return Layer(families.experts(name, "batched_mm", dtype))


def packed(name: str, dtype: torch.dtype) -> Layer:
    """The same experts, whose weights are MXFP4 values already."""
    experts: Any = families.experts(name, dtype=dtype)
    made = packed_like(copy.deepcopy(experts).to("meta"), name, activation_of(experts, name))
    gate_up = torch.stack(experts.gate_up_proj.float().chunk(2, 1), 2).flatten(1, 2)
    for part, weight in (("gate_up_proj", gate_up), ("down_proj", experts.down_proj.float())):
        blocks, scales = quantize(weight)
        assert torch.equal(dequantize(blocks, scales, torch.float32), weight)
        getattr(made, f"{part}_blocks").data = blocks
        getattr(made, f"{part}_scales").data = scales
    return Layer(made)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(7, families.H, generator=torch.Generator().manual_seed(3)).to(dtype)
    indices, weights = oracle.random_routes(7, families.E, families.A)
    return x, indices, weights.to(dtype)


def result_and_gradients(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    x, *routes = inputs(dtype)
    x.requires_grad_()
    y = layer(x, *routes)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [x, *factors(layer).values()]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), wanted)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("dtype", "targets"),
    [(torch.float32, WEIGHTS), (torch.float32, WEIGHTS[1:]), exhaustive(torch.bfloat16, WEIGHTS)],
)
def test_results_and_gradients(
    name: str, dtype: torch.dtype, targets: list[str], compiled: bool
) -> None:
    config = lora(target_parameters=targets)
    theirs, ours = adapted(dense(name, dtype), config), adapted(packed(name, dtype), config)
    exact = copy.deepcopy(theirs).double()
    assert {n: f.shape for n, f in factors(ours).items()} == {
        n: f.shape for n, f in factors(theirs).items()
    }
    called = compile_with(ours, options={"strict": True}) if compiled else ours
    every = (
        result_and_gradients(layer, d)
        for layer, d in ((called, dtype), (theirs, dtype), (exact, torch.float64))
    )
    for actual, reference, truth in zip(*every, strict=True):
        assert_as_accurate(actual, reference, truth)


def test_adapters_have_the_dtype_that_the_model_was_converted_to() -> None:
    """Packed experts without biases have no float that would be converted along."""
    name, made = "Qwen3MoeExperts", []
    for layer in (dense(name, torch.float32), packed(name, torch.float32)):
        converted = layer.to(torch.bfloat16)
        wrapped = peft.get_peft_model(converted, lora(), autocast_adapter_dtype=False)
        made.append({factor.dtype for factor in factors(wrapped).values()})
    assert made == [{torch.bfloat16}] * 2


@torch.no_grad()
def test_merging_rounds_each_expert_once() -> None:
    ours, given = adapted(packed("Qwen3MoeExperts", torch.float32)), inputs(torch.float32)
    theirs = adapted(dense("Qwen3MoeExperts", torch.float32))
    before = ours(*given)
    for merged in (ours, theirs):
        merged.merge_adapter()
    (experts,) = (module for module in ours.modules() if isinstance(module, PackedExperts))
    (exact,) = (m for m in theirs.modules() if type(m).__name__ == "Qwen3MoeExperts")
    gate_up = torch.stack(exact.gate_up_proj.chunk(2, 1), 2).flatten(1, 2)
    for part, weight in (("gate_up_proj", gate_up), ("down_proj", exact.down_proj)):
        held = getattr(experts, f"{part}_blocks"), getattr(experts, f"{part}_scales")
        rounded = quantize(weight, scale_rule="search")
        assert all(map(torch.equal, held, rounded))
    ours.unmerge_adapter()
    assert torch.equal(ours(*given), before)


@torch.no_grad()
def test_freed_weights() -> None:
    ours, given = adapted(packed("Qwen3MoeExperts", torch.float32)), inputs(torch.float32)
    exact = adapted(dense("Qwen3MoeExperts", torch.float32)).double()
    expected = ours(*given)
    compile_with(ours, options={"free_weights": True, "strict": True})(*given)
    assert_as_accurate(ours(*given), expected, exact(*inputs(torch.float64)))


def test_a_whole_model(tmp_path: Path) -> None:
    """An adapter of the dense model loads on the packed one, and stays when that becomes dense."""
    path = packed_families.write(tmp_path / "model", "Qwen3-MoE", torch.float32)
    config = lora(target_parameters=[f"mlp.{name}" for name in WEIGHTS])
    dense = AutoModelForCausalLM.from_pretrained(path / "dense", dtype=torch.float32)
    theirs = adapted(dense, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = peft.PeftModel.from_pretrained(mxfp4_fx.from_pretrained(path), tmp_path / "adapter")
    double, ids = copy.deepcopy(theirs).double(), packed_families.IDS
    double.get_base_model().set_experts_implementation("batched_mm")
    with torch.no_grad():
        expected, exact = theirs(ids).logits, double(ids).logits
        assert_as_accurate(ours(ids).logits, expected, exact)
        mxfp4_fx.dequantize(ours)
        assert_as_accurate(ours(ids).logits, expected, exact)
