"""Every format of packed checkpoints, beside compressed-tensors', which has the same bytes.

`test_packed_families.py` shows for compressed-tensors' that the model is right. Here a checkpoint
of another format must become the same model, and itself again.
"""

from __future__ import annotations

import re
from pathlib import Path

import packed_families as families
import pytest
import torch
from checkpoints import copied, edit_tensors, read_config, read_tensors
from loaded import assert_same_tensors
from packed_families import EXPERTS, LINEARS
from packed_layouts import DEEPSEEK, QUARK, VLLM, Layout
from torch import Tensor

import mxfp4_fx
from mxfp4_fx.core.errors import NanWeightsWarning
from mxfp4_fx.core.formats import E8M0_NAN
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.huggingface.packed_names import _patterns

FLOAT = torch.float32
LAYOUTS = {"quark": QUARK, "deepseek": DEEPSEEK, "vllm": VLLM}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def written(folder: Path, layout: Layout) -> Path:
    name = layout.settings()["quant_method"]
    return families.write(folder / name, "Qwen3-MoE", FLOAT, packed_in(layout), layout)


@pytest.fixture(scope="module")
def same(folder: Path, layout: Layout) -> Path:
    """The checkpoint in compressed-tensors' format."""
    which = packed_in(layout)
    return families.write(folder / str(layout.is_stacked), "Qwen3-MoE", FLOAT, which)


def packed_in(layout: Layout) -> re.Pattern[str]:
    return EXPERTS if layout.is_stacked else LINEARS


@pytest.mark.parametrize("dtype", [FLOAT, torch.float16])
def test_the_model_is_that_of_compressed_tensors(
    written: Path, same: Path, dtype: torch.dtype
) -> None:
    """Experts byte for byte, and attention, which becomes dense."""
    model = mxfp4_fx.from_pretrained(written, dtype=dtype)
    expected = mxfp4_fx.from_pretrained(same, dtype=dtype)
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert_same_tensors(model.state_dict(), expected.state_dict())


def test_blocks_that_are_nan_are_told(written: Path, layout: Layout, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if ".experts." in n and n.endswith(layout.scales))
        tensors[name].view(torch.uint8)[..., 0, 0] = E8M0_NAN

    path = edit_tensors(copied(written, tmp_path / "nan"), spoil)
    with pytest.warns(NanWeightsWarning, match=r"MXFP4 blocks .*experts\.\w+_proj_scales"):
        mxfp4_fx.from_pretrained(path)


def test_saving_writes_what_was_loaded(written: Path, tmp_path: Path) -> None:
    mxfp4_fx.from_pretrained(written).save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(written))
    settings = [read_config(path)["quantization_config"] for path in (tmp_path, written)]
    assert settings[0] == settings[1]


def test_one_layer_is_dense(layout: Layout, tmp_path: Path) -> None:
    """Its tensors may have the names of packed ones. What is saved goes over the files."""
    first = re.compile(rf"layers\.0\..*{packed_in(layout).pattern}")
    path = families.write(tmp_path, "Mixtral", FLOAT, first, layout, num_hidden_layers=2)
    stored = read_tensors(path)
    model = mxfp4_fx.from_pretrained(path)
    packed = [name for name, part in model.named_modules() if isinstance(part, PackedExperts)]
    assert packed == ["model.layers.0.mlp.experts"]
    assert torch.equal(
        model.get_parameter("model.layers.1.mlp.experts.down_proj")[2],
        stored["model.layers.1.block_sparse_moe.experts.2.w2.weight"],
    )
    model.save_pretrained(path)
    assert_same_tensors(read_tensors(path), stored)


def test_biases_of_packed_matrices(tmp_path: Path) -> None:
    """They lie beside the blocks, under names with the same beginning."""
    path = families.write(tmp_path, "Qwen2-MoE", FLOAT, LINEARS)
    name = "model.layers.0.self_attn.q_proj.bias"
    bias = mxfp4_fx.from_pretrained(path).get_parameter(name)
    assert torch.equal(bias, read_tensors(path)[name])


def test_patterns_match_packed_matrices_only() -> None:
    """For any numbers, one first number, or one name, as dense matrices demand it."""
    packed = {f"layers.{n}.{m}.{p}" for n in (0, 12) for m in (0, 1) for p in ("up", "q", "k")}
    packed -= {"layers.12.0.q", "layers.12.1.q", "layers.0.1.k"}
    found = _patterns(packed, {"layers.12.0.q", "layers.12.1.q", "layers.0.1.k", "lm_head", "q"})
    assert sorted(found) == [
        r"layers\.0\.0\.k",
        r"layers\.0\.\d+\.q",
        r"layers\.12\.\d+\.k",
        r"layers\.\d+\.\d+\.up",
    ]


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    """A scale of 2^16, where the values, 2^15, are no more than float16 holds."""
    path = families.write(tmp_path, "Qwen3-MoE", FLOAT, LINEARS, DEEPSEEK)
    name = "model.layers.0.self_attn.q_proj"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.weight"].fill_(0x11)  # two halves
        tensors[f"{name}.scale"].view(torch.uint8).fill_(127 + 16)

    weight = mxfp4_fx.from_pretrained(edit_tensors(path, edit), dtype=torch.float16)
    assert (weight.get_parameter(f"{name}.weight") == 2**15).all()


def test_key_mapping(written: Path, tmp_path: Path) -> None:
    """It is applied to the names of the files, under which the model is saved."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".mlp.experts.", ".moe.experts.")] = tensors.pop(name)

    path = edit_tensors(copied(written, tmp_path / "renamed"), rename)
    model = mxfp4_fx.from_pretrained(path, key_mapping={r"\.moe\.experts\.": ".mlp.experts."})
    assert_same_tensors(model.state_dict(), mxfp4_fx.from_pretrained(written).state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(path))
