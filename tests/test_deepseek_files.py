"""DeepSeek-V4's own files: experts in MXFP4, other linears in FP8, names that are its own."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import packed_families as families
import pytest
import torch
from checkpoints import copied, edit_config, edit_tensors, read_config, read_tensors
from loaded import assert_same_tensors
from models import Graphs, compile_with
from oracle import assert_as_accurate
from packed_families import EXPERTS, IDS
from packed_layouts import DEEPSEEK
from test_forms import InFloat64
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

import mxfp4_fx
from mxfp4_fx.checkpoints.encodings import Fp8
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.huggingface.packed import PackedExperts

FLOAT = torch.float32
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "head_dim": 32,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "layer_types": ["sliding_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe", "moe"],
}
# As deepseek-ai/DeepSeek-V4-Flash: its compressors, routers, embeddings and head are bfloat16.
IN_FP8 = re.compile(r"(attn\.w(q_a|q_b|kv|o_a|o_b)|indexer\.wq_b|shared_experts\.w[123])\.weight$")
WQ_B = "model.layers.1.attn.wq_b"
# transformers writes its own names where the original has others.
NATIVE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def fp8() -> Fp8Quantize:
    settings = SimpleNamespace(weight_block_size=(32, 32), scale_fmt="ue8m0")
    return Fp8Quantize(SimpleNamespace(quantization_config=settings))


def to_fp8(tensors: dict[str, Tensor]) -> None:
    """Make linears FP8, as transformers does."""
    for name in [name for name in tensors if IN_FP8.search(name)]:
        made = fp8().convert({name: tensors.pop(name)})
        scales = made.pop(name.replace("weight", "weight_scale_inv"))
        tensors |= {**made, name.replace("weight", "scale"): scales}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deepseek") / "packed"
    families.write(path, "DeepSeek-V4", FLOAT, EXPERTS, DEEPSEEK, **SIZES)
    return edit_tensors(path, to_fp8)


def native(tensors: dict[str, Tensor]) -> None:
    """Give tensors the original names, and add a layer of the multi-token prediction."""
    for name in list(tensors):
        tensors[NATIVE.get(name, name.removeprefix("model."))] = tensors.pop(name)
    for name in [name for name in tensors if name.startswith("layers.1.ffn.")]:
        tensors[name.replace("layers.1", "mtp.0")] = tensors[name].clone()


def test_the_model_is_that_of_transformers(written: Path, tmp_path: Path) -> None:
    """Under the original names, too. transformers makes all of it dense."""
    expected = AutoModelForCausalLM.from_pretrained(written, dtype=FLOAT).state_dict()
    loaded = mxfp4_fx.from_pretrained(written)
    renamed = mxfp4_fx.from_pretrained(edit_tensors(copied(written, tmp_path / "native"), native))
    assert_same_tensors(renamed.state_dict(), loaded.state_dict())
    renamed.save_pretrained(tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(written))
    packed = [part for part in loaded.modules() if isinstance(part, PackedExperts)]
    assert [part.limit for part in packed] == [10, 10]
    dense = mxfp4_fx.dequantize(loaded).state_dict()
    assert dense.keys() == expected.keys()
    for name, value in dense.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_results_are_those_of_the_dense_model(written: Path, no_gradients: None) -> None:
    model, graphs = mxfp4_fx.from_pretrained(written), Graphs()
    dense = mxfp4_fx.dequantize(mxfp4_fx.from_pretrained(written))
    dense.set_experts_implementation("batched_mm")
    own = dense(IDS).logits
    with InFloat64():
        ideal = dense.double()(IDS).logits
    run = compile_with(model, graphs, options={"strict": True})
    assert_as_accurate(run(IDS).logits, own, ideal)


def test_saving_writes_what_was_loaded(written: Path, tmp_path: Path) -> None:
    mxfp4_fx.from_pretrained(written).save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(written))
    settings = [read_config(path)["quantization_config"] for path in (tmp_path, written)]
    assert settings[0] == settings[1]
    mxfp4_fx.from_pretrained(tmp_path)


def test_a_changed_matrix_is_rounded_to_fp8_again(written: Path, tmp_path: Path) -> None:
    model = mxfp4_fx.from_pretrained(written, requantize=True)
    name = "model.layers.1.self_attn.q_b_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 3
    model.save_pretrained(tmp_path)
    saved = read_tensors(tmp_path)
    expected = fp8().convert({f"{WQ_B}.weight": model.get_parameter(name)})
    assert torch.equal(saved[f"{WQ_B}.weight"].float(), expected[f"{WQ_B}.weight"].float())
    assert torch.equal(saved[f"{WQ_B}.scale"], expected[f"{WQ_B}.weight_scale_inv"])


@pytest.mark.parametrize("rectangle", [(32, 32), (16, 64)])
def test_fp8(rectangle: tuple[int, int]) -> None:
    """Against transformers' own. Scales are the least powers of two by which nothing saturates."""
    matrix = torch.randn(64, 128) * torch.logspace(-30, 30, 64)[:, None]
    matrix[:32, :64] = 0
    matrix[32:, 64:] = 1
    matrix[40, 70] = 448 * 2.0**7  # the scale 2^7 just holds it
    encoding = Fp8(rectangle)
    values, scales = encoding.from_dense(matrix)
    assert scales.shape == encoding.scales_shape(64, 128)
    dense = encoding.to_dense(values, scales, FLOAT)
    assert torch.equal(dense, Fp8Dequantize(None)._dequantize_one(values, scales, FLOAT))
    grid = matrix.unflatten(1, (-1, rectangle[1])).unflatten(0, (-1, rectangle[0]))
    largest = grid.abs().amax((1, 3)) / scales.float()
    assert ((largest > 224) & (largest <= 448) | (largest == 0)).all()
    assert (matrix - dense).abs().le(matrix.abs() / 16 + grid_step(scales, rectangle)).all()


def grid_step(scales: Tensor, rectangle: tuple[int, int]) -> Tensor:
    """Return half of the distance of subnormal numbers, 2^-9, at each element."""
    rows, columns = rectangle
    return scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1) * 2**-10


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_fp8_has_no_infinities(value: float) -> None:
    """The values beside one keep theirs."""
    matrix = torch.full((32, 64), 1000.0)
    matrix[3, 5] = value
    encoding = Fp8((32, 32))
    dense = encoding.to_dense(*encoding.from_dense(matrix), FLOAT)
    matrix[3, 5], rounded = torch.nan, torch.full_like(matrix, 1024.0)
    assert torch.equal(dense.isnan(), matrix.isnan())
    assert torch.equal(dense.nan_to_num(1024), rounded)


def test_fp8_with_smaller_rectangles_at_the_edges() -> None:
    encoding = Fp8((32, 32))
    matrix = torch.randn(40, 72)
    values, scales = encoding.from_dense(matrix)
    assert (values.shape, scales.shape) == ((40, 72), (2, 3))
    inner = encoding.from_dense(matrix[32:, 64:])
    assert torch.equal(values[32:, 64:].float(), inner[0].float())
    assert torch.equal(scales[1:, 2:], inner[1])
    assert torch.equal(
        encoding.to_dense(values, scales, FLOAT)[32:, 64:], encoding.to_dense(*inner, FLOAT)
    )


FAULTS: dict[str, tuple[str, Any, str]] = {
    "no scales": ("scale", None, rf"{WQ_B}\.weight in .* has no {WQ_B}\.scale"),
    "other rectangles": (
        "scale",
        torch.ones(1, 1).to(torch.float8_e8m0fnu),
        rf"{WQ_B}\.scale in .* is \[1, 1\]; for weight .* and weight_block_size \[32, 32\] FP8",
    ),
    "scales of another dtype": (
        "scale",
        torch.ones(4, 1),
        rf"{WQ_B}\.scale in .* is torch\.float32 \[4, 1\]",
    ),
    "another FP8": (
        "weight",
        torch.ones(128, 32).to(torch.float8_e5m2),
        rf"{WQ_B}\.weight in .* is torch\.float8_e5m2",
    ),
    "another size": (
        "weight",
        torch.ones(128, 16).to(torch.float8_e4m3fn),
        rf"{WQ_B}\.weight in .* holds a matrix \[128, 16\], and .* needs \[128, 32\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(written: Path, tmp_path: Path, fault: str) -> None:
    part, value, words = FAULTS[fault]

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{WQ_B}.{part}"]
        if value is not None:
            tensors[f"{WQ_B}.{part}"] = value

    path = edit_tensors(copied(written, tmp_path / "faulty"), edit)
    with pytest.raises(CheckpointError, match=words):
        mxfp4_fx.from_pretrained(path)


def test_all_experts_in_fp8(written: Path, tmp_path: Path) -> None:
    path = edit_config(copied(written, tmp_path / "v3"), lambda config: config.pop("expert_dtype"))
    with pytest.raises(CheckpointError, match=r"or one of another family in a format"):
        mxfp4_fx.from_pretrained(path)


def test_an_expert_in_fp8(written: Path, tmp_path: Path) -> None:
    name = "model.layers.1.ffn.experts.3.w2"

    def edit(tensors: dict[str, Tensor]) -> None:
        made = fp8().convert({"a.weight": torch.randn(64, 96)})
        tensors[f"{name}.weight"] = made["a.weight"]
        tensors[f"{name}.scale"] = made["a.weight_scale_inv"]

    path = edit_tensors(copied(written, tmp_path / "faulty"), edit)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight in .*float8_e4m3fn, and exp"):
        mxfp4_fx.from_pretrained(path)
