"""Faults that any format of packed checkpoints can have: the tensor's name, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_families
import pytest
import torch
from checkpoints import copied, edit_config, edit_tensors
from packed_layouts import DEEPSEEK, QUARK, Layout
from torch import Tensor

import mxfp4_fx
from mxfp4_fx.checkpoints.packed_formats import DEEPSEEK as DEEPSEEK_FORMAT
from mxfp4_fx.checkpoints.packed_formats import format_of
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.huggingface.family_conversions import StackExperts

LAYOUTS = {"quark": QUARK, "deepseek": DEEPSEEK}
EXPERTS = "model.layers.0.mlp.experts"
UP, DOWN = f"{EXPERTS}.3.up_proj", f"{EXPERTS}.2.down_proj"

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors, Layout], object]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, layout: Layout) -> Path:
    path = tmp_path_factory.mktemp("sound") / "packed"
    return packed_families.write(path, "Qwen3-MoE", torch.bfloat16, layout=layout)


def drop(stem: str, *parts: str) -> Edit:
    return lambda t, layout: [t.pop(f"{stem}.{getattr(layout, part)}") for part in parts]


def put(**parts: Callable[[Tensor], Tensor]) -> Edit:
    """Change tensors of the matrix DOWN, which is 64 by 96."""

    def edit(tensors: Tensors, layout: Layout) -> None:
        for part, change in parts.items():
            name = f"{DOWN}.{getattr(layout, part)}"
            tensors[name] = change(tensors[name]).contiguous()

    return edit


def to_dense(tensors: Tensors, layout: Layout) -> None:
    drop(DOWN, "blocks", "scales")(tensors, layout)
    tensors[f"{DOWN}.weight"] = torch.zeros(64, 96, dtype=torch.bfloat16)


def all_dense(tensors: Tensors, layout: Layout) -> None:
    for name in [name for name in tensors if name.endswith(f".{layout.scales}")]:
        stem = name.removesuffix(f".{layout.scales}")
        drop(stem, "blocks", "scales")(tensors, layout)
        tensors[f"{stem}.weight"] = torch.zeros(64, 96, dtype=torch.bfloat16)


# BLOCKS and SCALES stand for the tensors of DOWN; OTHER for those of UP.
TENSORS: dict[str, tuple[Edit, str]] = {
    "no scales": (drop(UP, "scales"), r"OTHER_BLOCKS in .* has no OTHER_SCALES: copy or download"),
    "no blocks": (drop(UP, "blocks"), r"OTHER_SCALES in .* has no OTHER_BLOCKS: copy or download"),
    "no matrix": (drop(UP, "blocks", "scales"), r"the files lack OTHER_BLOCKS for model\."),
    "groups of 16": (
        put(scales=lambda scales: scales.repeat(1, 2)),
        r"SCALES in .* is \[64, 6\], which is a scale for 16 values; .*\[64, 3\]",
    ),
    "shape": (
        put(blocks=lambda blocks: blocks[:, :16], scales=lambda scales: scales[:, :1]),
        r"BLOCKS in .* holds a matrix \[64, 32\], and .* needs \[64, 96\]",
    ),
    "half a block": (
        put(blocks=lambda blocks: blocks[:, :24], scales=lambda scales: scales[:, :1]),
        r"SCALES in .* is \[64, 1\], which is a scale for 48 values; .* for 32 values",
    ),
    "dimensions": (
        put(blocks=lambda blocks: blocks[None]),
        r"BLOCKS in .* is torch\.u?int8 \[1, 64, 48\], and in .* a matrix of torch\.u?int8",
    ),
    "dtype of blocks": (put(blocks=lambda blocks: blocks.short()), r"BLOCKS in .* torch\.int16 "),
    "dtype of scales": (put(scales=lambda scales: scales.float()), r"SCALES in .* torch\.float32"),
    "NVFP4": (
        put(scales=lambda scales: scales.to(torch.float8_e4m3fn)),
        r"SCALES in .* is NVFP4, which is another format",
    ),
    "another format's blocks": (
        lambda t, layout: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.{layout.blocks}"].clone()}),
        rf"{DOWN}\.weight_packed in .* is compressed-tensors', in a checkpoint of",
    ),
    "one dense expert": (to_dense, rf"{DOWN}\.weight in .* is dense, and other experts of"),
    "nothing packed": (all_dense, r"is 'qwen3_moe', says that weights are .*, but none is packed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors(
    sound: Path, layout: Layout, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault is found before the first expert is read."""
    edit, words = TENSORS[fault]
    for key, stem in (("OTHER_", UP), ("", DOWN)):
        for part in ("blocks", "scales"):
            name = re.escape(f"{stem}.{getattr(layout, part)}")
            words = words.replace(f"{key}{part.upper()}", name)
    path = edit_tensors(copied(sound, tmp_path / "faulty"), lambda t: edit(t, layout))
    monkeypatch.setattr(StackExperts, "convert", lambda *_, **__: pytest.fail("it reads experts"))
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(path)


def test_scales_with_the_name_of_quarks_older_exports(tmp_path: Path) -> None:
    path = packed_families.write(tmp_path, "Qwen3-MoE", torch.bfloat16, layout=QUARK)

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            stem = name.removesuffix("weight_scale")
            tensors[f"{stem}weight_quantizer.scale"] = tensors.pop(name)

    edit_tensors(path, rename)
    words = r"\.weight_quantizer\.scale in .* are scales .*\.weight_scale: export the original"
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(path)


def test_a_file_is_cut_short(sound: Path, tmp_path: Path) -> None:
    file = copied(sound, tmp_path / "faulty") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short: it has"):
        mxfp4_fx.from_pretrained(file.parent)


def of_quark(**given: Any) -> Callable[[dict[str, Any]], object]:
    """Change how Quark quantized weights."""
    return lambda settings: settings["global_quant_config"]["weight"].update(given)


def layer(**weight: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["layer_quant_config"].update({"*attn*": {"weight": weight}})


# Each changes `quantization_config`.
CONFIGS: dict[str, tuple[Layout, Callable[[dict[str, Any]], object], str]] = {
    "group size": (
        QUARK,
        of_quark(group_size=64),
        r"global_quant_config in .* has group_size 64 and scale_format e8m0: MXFP4",
    ),
    "scales": (QUARK, of_quark(scale_format="float32"), r"scale_format float32: MXFP4 has"),
    "NVFP4": (
        QUARK,
        of_quark(group_size=16, scale_format="fp8_e4m3"),
        r"global_quant_config in .* is NVFP4, which is another format",
    ),
    "integers": (
        QUARK,
        of_quark(dtype="int4"),
        r"has another format: global_quant_config \(int4\) instead of fp4",
    ),
    "old MX": (QUARK, of_quark(dtype="mx"), r"another format: global_quant_config \(mx\)"),
    "a mix": (
        QUARK,
        layer(dtype="fp8_e4m3", qscheme="per_tensor"),
        r"a mix of formats: layer_quant_config \*attn\* \(fp8_e4m3\) instead of fp4",
    ),
    "two stages": (
        QUARK,
        lambda settings: settings["global_quant_config"].update(
            weight=[{"dtype": "fp8_e4m3"}, settings["global_quant_config"]["weight"]]
        ),
        r"a mix of formats: global_quant_config \(fp8_e4m3\) instead of fp4",
    ),
    "no weights": (
        QUARK,
        lambda settings: settings.update(global_quant_config=None),
        r"says of no weights how Quark quantized them",
    ),
    "dense weights": (
        QUARK,
        lambda settings: settings["export"].update(weight_format="fake_quantized"),
        r"weight_format 'fake_quantized', whose weights are dense: export it again",
    ),
    "rotations": (
        QUARK,
        lambda settings: settings.update(
            algo_config=[{"name": "rotation", "online_r1_rotation": True}]
        ),
        r"has the algorithm rotation in algo_config, which changes what the weights mean",
    ),
    "one algorithm": (
        QUARK,
        lambda settings: settings.update(algo_config={"name": "gptq", "online_rotation": True}),
        r"has the algorithm gptq in algo_config",
    ),
    "a matrix beside": (
        QUARK,
        lambda settings: settings.update(algo_config=[{"name": "awq"}, {"name": "svdquant"}]),
        r"has the algorithm svdquant in algo_config",
    ),
    "a type of layers": (
        QUARK,
        lambda settings: settings.update(
            layer_type_quant_config={"Linear": {"weight": {"dtype": "int8"}}}
        ),
        r"a mix of formats: layer_type_quant_config Linear \(int8\) instead of fp4",
    ),
    "no rectangles": (
        DEEPSEEK,
        lambda settings: settings.update(weight_block_size=[128]),
        r"has weight_block_size \[128\], which must be two positive integers",
    ),
    "scales in float32": (
        DEEPSEEK,
        lambda settings: settings.update(scale_fmt="float"),
        r"has scale_fmt 'float'; beside experts in MXFP4 only ue8m0 is known",
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_configs(tmp_path: Path, fault: str) -> None:
    """The config is read before the files."""
    layout, edit, words = CONFIGS[fault]
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    edit_config(tmp_path, layout.config)
    edit_config(tmp_path, lambda config: edit(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["quantization_config", "config", "text_config"])
def test_where_deepseek_says_that_experts_are_packed(place: str) -> None:
    settings: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config: dict[str, Any] = {"quantization_config": settings, "text_config": {}}
    assert format_of(config, "config.json") is None
    {"config": config, **config}[place]["expert_dtype"] = "fp4"
    assert format_of(config, "config.json") is DEEPSEEK_FORMAT
