"""Quantizing checkpoints of other families, to files that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    assert_refused,
    convert,
    read_config,
    read_tensors,
)
from packed_families import EXPERTS, split
from test_family_models import _COMMON, MODELS
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import mxfp4_fx
from mxfp4_fx.cli import main
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.packed import PackedExperts

LAYER = "model.layers.{}.mlp.experts"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in bfloat16 with values that are no MXFP4, in two shards."""
    kind, sizes = MODELS["Qwen3-MoE"]
    config = getattr(transformers, kind)(**{**_COMMON, **sizes, "num_hidden_layers": 2})
    path = tmp_path_factory.mktemp("dense") / "dense"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return split(path)


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(dense, tmp_path_factory.mktemp("quantized") / "out", max_shard_bytes=50_000)


def rounded(weight: Tensor) -> Tensor:
    return dequantize(*quantize(weight), weight.dtype)


def test_single_experts_are_packed_and_all_else_is_copied(dense: Path, quantized: Path) -> None:
    before, after = read_tensors(dense), read_tensors(quantized)
    assert len(list(quantized.glob("*.safetensors"))) > 2
    for name, tensor in before.items():
        if EXPERTS.search(name):
            stem = name.removesuffix("weight")
            blocks, scales = quantize(tensor)
            assert torch.equal(after.pop(f"{stem}weight_packed"), blocks.flatten(1))
            assert torch.equal(after.pop(f"{stem}weight_scale"), scales)
        else:
            assert torch.equal(after.pop(name), tensor)
    assert not after


def test_compressed_tensors_reads_it(dense: Path, quantized: Path) -> None:
    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(quantized, quantization_config=settings)
    expected = AutoModelForCausalLM.from_pretrained(dense)
    for name, parameter in expected.named_parameters():
        is_expert = ".experts." in name
        actual = model.get_parameter(name)
        assert torch.equal(actual, rounded(parameter.data) if is_expert else parameter), name


def test_the_command_shows_the_error_of_each_layers_rounding(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(dense), str(tmp_path / "out"), "--max-shard-bytes", "50000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    weights = read_tensors(dense)
    for layer in range(2):
        name = LAYER.format(layer)
        given = [w.double() for n, w in weights.items() if n.startswith(f"{name}.")]
        change = sum((w - rounded(w.float())).square().sum().item() for w in given)
        error = (change / sum(w.square().sum().item() for w in given)) ** 0.5
        assert f"{name}: rounding changed the weights by {error:.2%}" in lines


def test_its_config_ignores_what_is_not_quantized(quantized: Path) -> None:
    ignored = read_config(quantized)["quantization_config"]["ignore"]
    linears = [rf"re:^model\.layers\.\d+\.self_attn\.{p}_proj$" for p in "kqvo"]
    assert {*linears, r"re:^model\.layers\.\d+\.mlp\.gate$", "lm_head"} <= {*ignored}
    assert not any("experts" in entry for entry in ignored)


def test_skipped_experts_stay_dense(dense: Path, tmp_path: Path) -> None:
    out = convert(dense, tmp_path / "out", skip="layers.0")
    model = mxfp4_fx.from_pretrained(out)
    first, second = (model.get_submodule(LAYER.format(layer)) for layer in range(2))
    assert not isinstance(first, PackedExperts)
    assert isinstance(second, PackedExperts)
    expected = AutoModelForCausalLM.from_pretrained(dense).get_submodule(LAYER.format(0))
    assert torch.equal(first.gate_up_proj, expected.gate_up_proj)
    model.save_pretrained(tmp_path / "again")
    again, stored = read_tensors(tmp_path / "again"), read_tensors(out)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "quantized": (
        None,
        lambda config: config.update(quantization_config={"quant_method": "fp8"}),
        r"quant_method is 'fp8': name a checkpoint that is not quantized",
    ),
    "rows": (
        lambda t: t.update({f"{LAYER.format(0)}.1.up_proj.weight": torch.zeros(96, 40)}),
        None,
        r"layers\.0\.mlp\.experts\.1\.up_proj\.weight in .* \[96, 40\]: MXFP4 takes matrices",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_quantized(dense: Path, tmp_path: Path, fault: str) -> None:
    assert_refused(dense, tmp_path, *REFUSED[fault])
