"""Faults of packed checkpoints of other families: the tensor's name, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import packed_families
import pytest
import torch
from checkpoints import copied, edit_config, edit_tensors
from compressed_tensors.compressors import NVFP4PackedCompressor
from torch import Tensor
from transformers.distributed import DistributedConfig

import mxfp4_fx
from mxfp4_fx.core.errors import CheckpointError, OptionError
from mxfp4_fx.huggingface.activations import activation_of
from mxfp4_fx.huggingface.family_conversions import StackExperts
from mxfp4_fx.huggingface.family_quantizer import CompressedTensorsConfig, FamilyQuantizer
from mxfp4_fx.huggingface.family_quantizing import DenseFamilyQuantizer, QuantizeFamilyConfig
from mxfp4_fx.ops.operands import Activation

LAYER = "model.layers.0.mlp.experts"
UP = f"{LAYER}.3.up_proj"
DOWN = f"{LAYER}.2.down_proj"
INF = float("inf")

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "packed"
    return packed_families.write(path, "Qwen3-MoE", torch.bfloat16)


def drop(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(**parts: Callable[[Tensors], Tensor]) -> Callable[[Tensors], object]:
    """Put tensors of the matrix DOWN, which are made of all others."""
    return lambda t: t.update({f"{DOWN}.{part}": make(t) for part, make in parts.items()})


def to_nvfp4(tensors: Tensors) -> None:
    """Make a matrix NVFP4, as compressed-tensors does."""
    made = packed_families.scheme("NVFP4A16")
    weight = torch.randn(64, 96)
    scale = weight.unflatten(1, (-1, 16)).abs().amax(2) / 6
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": torch.ones(1)}
    parts = NVFP4PackedCompressor.compress(state, made)
    del parts["weight_global_scale"]  # what its config may leave out
    tensors |= {f"{DOWN}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def to_dense(*names: str) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        for name in names or [n.rpartition(".")[0] for n in tensors if "down_proj.weight_p" in n]:
            packed = tensors.pop(f"{name}.weight_packed")
            del tensors[f"{name}.weight_scale"]
            n, k = packed.shape
            tensors[f"{name}.weight"] = torch.zeros(n, 2 * k, dtype=torch.bfloat16)

    return edit


def more_experts(tensors: Tensors) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        for end in ("weight_packed", "weight_scale"):
            tensors[f"{LAYER}.8.{part}.{end}"] = tensors[f"{LAYER}.7.{part}.{end}"].clone()


TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (drop(f"{UP}.weight_scale"), f"{UP}.weight_packed in .* has no {UP}.weight_scale"),
    "no blocks": (drop(f"{UP}.weight_packed"), f"{UP}.weight_scale in .* has no {UP}.weight_pack"),
    "no matrix": (
        drop(f"{UP}.weight_packed", f"{UP}.weight_scale"),
        rf"the files lack {UP}\.weight_packed for {LAYER}\.gate_up_proj",
    ),
    "too many experts": (
        more_experts,
        rf"more than the config's experts: {LAYER}\.8\.\w+_proj\.weight_packed",
    ),
    "no norm": (drop("model.norm.weight"), r"wants model\.norm\.weight, which the files have not"),
    "shape": (
        put(
            weight_packed=lambda t: t[f"{DOWN}.weight_packed"][:, :16].contiguous(),
            weight_scale=lambda t: t[f"{DOWN}.weight_scale"][:, :1].contiguous(),
        ),
        rf"{DOWN}\.weight_packed in .* holds a matrix \[64, 32\], and .* needs \[64, 96\]",
    ),
    "groups of 16": (
        put(weight_scale=lambda t: torch.zeros(64, 6, dtype=torch.uint8)),
        rf"{DOWN}\.weight_scale in .* is \[64, 6\], which is a scale for 16 values; .*\[64, 3\]",
    ),
    "dtype": (
        put(weight_packed=lambda t: torch.zeros(64, 48)),
        rf"{DOWN}\.weight_packed in .* is torch\.float32 \[64, 48\], and in mxfp4-pack-quantized",
    ),
    "NVFP4": (to_nvfp4, rf"{DOWN}\.weight_scale in .* is NVFP4, which is another format"),
    "NVFP4's global scale": (
        put(weight_global_scale=lambda t: torch.ones(1)),
        rf"{DOWN}\.weight_global_scale in .* is NVFP4",
    ),
    "integers": (
        put(weight_shape=lambda t: torch.tensor([64, 96])),
        rf"{DOWN}\.weight_shape in .* belongs to packed integers",
    ),
    "twice": (
        put(weight=lambda t: torch.zeros(64, 96)),
        rf"{DOWN}\.weight in .* has the same weight in another format",
    ),
    "one dense expert": (
        to_dense(DOWN),
        rf"{DOWN}\.weight in .* is dense, and other experts of {LAYER}\.down_proj are packed",
    ),
    "one dense projection": (to_dense(), rf"{LAYER}\.down_proj is not packed in the files"),
    "nothing packed": (
        lambda t: [t.pop(name) for name in list(t) if ".weight_" in name],
        r"says that weights are mxfp4-pack-quantized, but none is packed, with a name that ends",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors(sound: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault is found before the first expert is read."""
    edit, words = TENSORS[fault]
    path = edit_tensors(copied(sound, tmp_path / "faulty"), edit)
    monkeypatch.setattr(StackExperts, "convert", lambda *_, **__: pytest.fail("it reads experts"))
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(path)


def group(**weights: Any) -> Callable[[dict[str, Any]], object]:
    def edit(config: dict[str, Any]) -> None:
        settings = config["quantization_config"]["config_groups"]["group_0"]
        settings["weights"] |= weights

    return edit


def second_group(config: dict[str, Any]) -> None:
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["format"] = "mxfp4-pack-quantized"
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    groups["group_1"] = {
        "targets": ["re:.*attn.*"],
        "format": "float-quantized",
        "weights": weights,
    }


def setting(**given: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(given)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "group size": (group(group_size=64), r"group_0 in .* has group_size 64.*groups of 32"),
    "asymmetric": (group(symmetric=False), r"symmetric False: MXFP4 has groups of 32, symmetric"),
    "NVFP4": (group(group_size=16), r"group_0 in .* is NVFP4, which is another format"),
    "NVFP4's name": (setting(format="nvfp4-pack-quantized"), r"group_0 in .* is NVFP4"),
    "integers": (
        group(type="int"),
        r"has another format: group_0 \(mxfp4-pack-quantized\) instead of mxfp4-pack",
    ),
    "a mix": (second_group, r"a mix of formats: group_1 \(float-quantized\) instead of mxfp4-pack"),
    "no groups": (setting(config_groups={}), r"has no config_groups"),
    "rotations": (
        setting(transform_config={"config_groups": {"u": {}}}),
        r"has a transform_config, which changes what the weights mean",
    ),
    "sparsity": (
        setting(sparsity_config={"format": "sparse-24-bitmask"}),
        r"has a sparsity_config, which changes what the weights mean",
    ),
    "sizes": (
        lambda config: config.update(moe_intermediate_size=64),
        r"proj\.weight_packed in .* holds a matrix \[.*96.*\], and .* needs \[.*64.*\]",
    ),
    "another method": (
        setting(quant_method="awq"),
        r"name a checkpoint of GPT-OSS, .* or one of another family in a format",
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_configs(sound: Path, tmp_path: Path, fault: str) -> None:
    edit, words = CONFIGS[fault]
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(edit_config(copied(sound, tmp_path / "faulty"), edit))


def test_a_file_is_cut_short(sound: Path, tmp_path: Path) -> None:
    file = copied(sound, tmp_path / "faulty") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short: it has"):
        mxfp4_fx.from_pretrained(file.parent)


def test_a_shard_is_missing(sound: Path, tmp_path: Path) -> None:
    path = packed_families.split(copied(sound, tmp_path / "faulty"))
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00001-of-00002\.safetensors, which is"):
        mxfp4_fx.from_pretrained(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"skip": "layers.0"}, r"skip=.* stay packed: quantize the dense original with skip="),
        ({"ignore_mismatched_sizes": True}, r"ignore_mismatched_sizes=.*: leave it out"),
    ],
)
def test_arguments_for_gpt_oss_only(sound: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        mxfp4_fx.from_pretrained(sound, **given)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("MixtralExperts", Activation("swiglu", 1.0, INF, 0.0)),
        ("DeepseekV4Experts", Activation("swiglu", 1.0, 10.0, 0.0)),
        ("MiniMaxM3VLExperts", Activation("swiglu", 1.702, 7.0, 1.0)),
        ("Gemma4TextExperts", Activation("geglu_tanh", 1.0, INF, 0.0)),
        ("NemotronHExperts", Activation("relu2", 1.0, INF, 0.0)),
    ],
)
def test_activations_are_found_by_computing_them(kind: str, expected: Activation) -> None:
    assert activation_of(families.experts(kind), "experts") == expected


def test_an_activation_that_kernels_do_not_compute() -> None:
    experts = families.experts("MixtralExperts")
    experts.act_fn = torch.nn.GELU()  # exact, where kernels have the tanh form
    with pytest.raises(CheckpointError, match=re.escape("layers.0 is MixtralExperts, whose acti")):
        activation_of(experts, "layers.0")


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (FamilyQuantizer, CompressedTensorsConfig),
        (DenseFamilyQuantizer, QuantizeFamilyConfig),
    ],
)
def test_what_only_gpt_oss_has(made: Callable[[Any], Any], config: Callable[[], Any]) -> None:
    quantizer = made(config())

    class Spread(torch.nn.Module):
        config = SimpleNamespace(distributed_config=DistributedConfig(tp_size=2))

    with pytest.raises(OptionError, match="cannot spread experts of other families"):
        quantizer._process_model_before_weight_loading(Spread())
    with pytest.raises(OptionError, match="use_kernels"):
        quantizer._process_model_before_weight_loading(Spread(), use_kernels=True)
