"""vLLM's names: a layer's experts are one tensor of the files, gates before ups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import packed_families as families
import pytest
import torch
from checkpoints import copied, edit_config, edit_tensors, read_tensors
from loaded import assert_same_tensors
from models import compile_with
from oracle import assert_as_accurate
from packed_families import EXPERTS, IDS
from packed_layouts import VLLM
from test_forms import InFloat64
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxfp4_fx
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.huggingface.family_conversions import InterleaveExperts

FLOAT = torch.float32
NAME = "model.layers.0.mlp.experts"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "packed"
    return families.write(path, "Qwen3-MoE", FLOAT, EXPERTS, VLLM)


def test_rows_of_gate_and_up_alternate(sound: Path) -> None:
    model, stored = mxfp4_fx.from_pretrained(sound), read_tensors(sound)
    experts = model.get_submodule(NAME)
    for part, end in (("blocks", "weight"), ("scales", "weight_scale")):
        both = getattr(experts, f"gate_up_proj_{part}").flatten(2)
        gate, up = stored[f"{NAME}.w13_{end}"].chunk(2, 1)
        assert torch.equal(both[:, 0::2].flatten(2), gate.reshape(gate.shape))
        assert torch.equal(both[:, 1::2].flatten(2), up.reshape(up.shape))
        down = getattr(experts, f"down_proj_{part}").flatten(2)
        assert torch.equal(down, stored[f"{NAME}.w2_{end}"])


def change(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda t: t.update({f"{NAME}.{name}": edit(t[f"{NAME}.{name}"]).contiguous()})


def drop(*names: str) -> Callable[[Tensors], object]:
    return lambda t: [t.pop(f"{NAME}.{name}") for name in names]


def to_eight(tensors: Tensors) -> None:
    for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
        tensors[f"{NAME}.{name}"] = tensors[f"{NAME}.{name}"][:7].contiguous()


FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (
        drop("w13_weight_scale"),
        rf"{NAME}\.w13_weight in .* has no {NAME}\.w13_weight_scale: ",
    ),
    "no blocks": (drop("w2_weight"), rf"{NAME}\.w2_weight_scale in .* has no {NAME}\.w2_weight: "),
    "no down": (
        drop("w2_weight", "w2_weight_scale"),
        rf"config\.json wants {NAME}\.down_proj, which the files have not",
    ),
    "groups of 16": (
        change("w2_weight_scale", lambda scales: scales.repeat(1, 1, 2)),
        rf"{NAME}\.w2_weight_scale in .* \[8, 64, 6\], which is a scale for 16 .*\[8, 64, 3\]",
    ),
    "scales of other experts": (
        change("w2_weight_scale", lambda scales: scales[:7]),
        rf"{NAME}\.w2_weight_scale in .* is \[7, 64, 3\]; for weight \[8, 64, 48\]",
    ),
    "experts": (to_eight, rf"{NAME}\.w13_weight in .* has 7 experts, and the config 8"),
    "shape": (
        lambda t: [
            change("w2_weight", lambda blocks: blocks[:, :32])(t),
            change("w2_weight_scale", lambda scales: scales[:, :32])(t),
        ],
        rf"{NAME}\.w2_weight in .* holds a matrix \[32, 96\], and .* needs \[64, 96\]",
    ),
    "dimensions": (
        change("w2_weight", lambda blocks: blocks[0]),
        rf"{NAME}\.w2_weight in .* \[64, 48\], and in vLLM's mxfp4 a matrix for each expert",
    ),
    "dtype": (
        change("w2_weight", lambda blocks: blocks.short()),
        rf"{NAME}\.w2_weight in .* is torch\.int16 \[8, 64, 48\]",
    ),
    "NVFP4": (
        change("w2_weight_scale", lambda scales: scales.to(torch.float8_e4m3fn)),
        rf"{NAME}\.w2_weight_scale in .* is NVFP4",
    ),
    "a dense expert": (
        lambda t: t.update({f"{NAME}.3.down_proj.weight": torch.zeros(64, 96)}),
        rf"{NAME}\.3\.down_proj\.weight in .* is dense, and other experts of {NAME}\.down_proj",
    ),
    "a packed expert": (
        lambda t: t.update({f"{NAME}.3.down_proj.weight": torch.zeros(64, 48).byte()}),
        rf"{NAME}\.3\.down_proj\.weight in .* is torch\.uint8, and what is not packed as in vLLM's",
    ),
    "compressed-tensors": (
        lambda t: t.update({f"{NAME}.3.up_proj.weight_packed": torch.zeros(96, 32).byte()}),
        rf"{NAME}\.3\.up_proj\.weight_packed in .* is compressed-tensors'",
    ),
    "nothing packed": (
        drop("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"),
        r"none is packed, with a name that ends in w13_weight or w2_weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(sound: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault is found before the first expert is read."""
    edit, words = FAULTS[fault]
    path = edit_tensors(copied(sound, tmp_path / "faulty"), edit)
    never = lambda *_, **__: pytest.fail("it reads experts")  # noqa: E731
    monkeypatch.setattr(InterleaveExperts, "convert", never)
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(path)


def test_another_group_size(sound: Path, tmp_path: Path) -> None:
    path = edit_config(
        copied(sound, tmp_path / "faulty"), lambda c: c["quantization_config"].update(group_size=16)
    )
    with pytest.raises(CheckpointError, match=r"has group_size 16: MXFP4 has groups of 32"):
        mxfp4_fx.from_pretrained(path)


def pack_stacked(tensors: Tensors) -> None:
    """Pack experts whose values are MXFP4's, and which the dense files have stacked, too."""
    for stacked, parameter in (("w13", "gate_up_proj"), ("w2", "down_proj")):
        for name in [name for name in tensors if name.endswith(f"experts.{parameter}")]:
            blocks, scales = quantize(tensors.pop(name))
            path = f"{name.rpartition('.')[0]}.{stacked}_weight"
            tensors |= {path: blocks.flatten(2), f"{path}_scale": scales}


def test_gemma_4(tmp_path: Path, no_gradients: None) -> None:
    """The one family that is known to be published so. Its experts are GELU's."""
    path = families.write(tmp_path, "Gemma 4", FLOAT, EXPERTS, VLLM)  # no experts one by one
    edit_tensors(path, pack_stacked)
    stored = read_tensors(path)
    model = mxfp4_fx.from_pretrained(path)
    dense = AutoModelForCausalLM.from_pretrained(path / "dense", dtype=FLOAT)
    dense.set_experts_implementation("batched_mm")  # torch's grouped matmul has no float64
    own = dense(IDS).logits
    with InFloat64():
        ideal = dense.double()(IDS).logits
    run = compile_with(model, options={"strict": True})
    assert_as_accurate(run(IDS).logits, own, ideal)
    model.save_pretrained(path)
    assert_same_tensors(read_tensors(path), stored)
