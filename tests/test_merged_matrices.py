"""Packed matrices that are no experts': a family may merge several, or split one, as it loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import copied, edit_config, edit_tensors, read_tensors
from families import fill
from loaded import assert_same_tensors
from packed_families import compressed, decompressed
from packed_layouts import COMPRESSED_TENSORS, QUARK, Layout
from test_family_models import _COMMON
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter

import mxfp4_fx
from mxfp4_fx.checkpoints.encodings import Mxfp4
from mxfp4_fx.core.errors import CheckpointError, NoExpertsWarning
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.dense_matrices import DenseMatrices, parameters_of, parts_of
from mxfp4_fx.huggingface.family_conversions import ConvertDequantized
from mxfp4_fx.huggingface.packed_names import names_of

FLOAT, MXFP4 = torch.float32, Mxfp4((torch.uint8, torch.uint8))
_HEADS = {**_COMMON, "head_dim": 16, "num_key_value_heads": 4}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2}  # fmt: skip
_M3 = {
    **_HEADS,
    "num_hidden_layers": 2,
    "num_local_experts": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention"] * 2,
    "shared_intermediate_size": 64,
    "dense_intermediate_size": 96,
}


def minimax_m3() -> Any:
    """Gate and up of shared experts and of dense layers are one parameter."""
    config = transformers.MiniMaxM3VLConfig(text_config=_M3, vision_config=_VISION)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=FLOAT)


def hrm() -> Any:
    """Gate and up, and gate, query, key and value, are one matrix each in the files."""
    config = transformers.HrmTextConfig(**_HEADS)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=FLOAT)


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "MiniMax-M3": (minimax_m3, transformers.AutoModelForImageTextToText),
    "HRM": (hrm, transformers.AutoModelForCausalLM),
}
# All linears, also those of vision towers.
LINEARS = re.compile(r"(?<!lm_head)(?<!embed_tokens)(?<!moe\.gate)\.weight$")
SHARED = "language_model.model.layers.1.block_sparse_moe.shared_experts"


def write(path: Path, family: str, layout: Layout = COMPRESSED_TENSORS) -> Path:
    """Write a checkpoint whose linears are MXFP4; ``path / "dense"`` has the same values."""
    model = fill(MODELS[family][0]().eval())
    for place in (path, path / "dense"):
        model.save_pretrained(place)
    values: dict[str, Tensor] = {}

    def compress(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if LINEARS.search(n) and tensors[n].ndim == 2]:
            parts = compressed(tensors.pop(name))
            values[name] = decompressed(parts)
            tensors |= layout.tensors(name.removesuffix(".weight"), parts)

    edit_config(edit_tensors(path, compress), layout.config)
    edit_tensors(path / "dense", lambda t: t.update(values))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merged")
    return {family: write(folder / family, family) for family in MODELS}


def load(path: Path, family: str, **options: Any) -> Any:
    return mxfp4_fx.from_pretrained(path, auto_class=MODELS[family][1], **options)


def assert_loaded_and_saved(path: Path, family: str, again: Path) -> None:
    expected = MODELS[family][1].from_pretrained(path / "dense", dtype=FLOAT)
    model = load(path, family)
    model.save_pretrained(again)
    assert_same_tensors(read_tensors(again), read_tensors(path))
    if family == "MiniMax-M3":
        model = mxfp4_fx.dequantize(model)
    assert_same_tensors(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, QUARK])
def test_merged(tmp_path: Path, layout: Layout) -> None:
    """The model has transformers' values, and saving writes all bytes of the files again."""
    path = write(tmp_path / "packed", "MiniMax-M3", layout)
    assert_loaded_and_saved(path, "MiniMax-M3", tmp_path / "again")


def test_split(written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.warns(NoExpertsWarning):
        assert_loaded_and_saved(written["HRM"], "HRM", tmp_path / "again")


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
@pytest.mark.parametrize("is_base", [False, True])
def test_the_prefix_of_the_base_model(
    written: dict[str, Path], tmp_path: Path, is_base: bool
) -> None:
    """Files may lack it, and a base model has none; saving writes the model's names."""
    path, whole = copied(written["HRM"], tmp_path / "packed"), read_tensors(written["HRM"])
    if is_base:
        without_prefix(whole)
        del whole["lm_head.weight"]
    else:
        edit_tensors(path, without_prefix)
    kind = transformers.AutoModel if is_base else transformers.AutoModelForCausalLM
    mxfp4_fx.from_pretrained(path, auto_class=kind).save_pretrained(tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), whole)


CHANGES: dict[str, tuple[str, Any, str]] = {
    "MiniMax-M3": (  # a row of up: the gate of the files is written again
        "model.language_model.layers.1.mlp.shared_experts.gate_up_proj.weight",
        -1,
        f"{SHARED}.up_proj",
    ),
    "HRM": (
        "model.H_module.layers.0.self_attn.k_proj.weight",
        0,
        "model.H_module.layers.0.attn.gqkv_proj",
    ),
}


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
@pytest.mark.parametrize("family", MODELS)
def test_one_that_has_changed(written: dict[str, Path], tmp_path: Path, family: str) -> None:
    """It is refused, or rounded again; the matrices beside it keep their bytes."""
    name, row, stem = CHANGES[family]
    for requantize in (False, True):
        model = load(written[family], family, requantize=requantize)
        with torch.no_grad():
            model.get_parameter(name)[row] *= 3
        if not requantize:
            with pytest.raises(CheckpointError, match=rf"{name}.* was packed .* requantize=True"):
                model.save_pretrained(tmp_path / "refused")
            continue
        model.save_pretrained(tmp_path / "again")
        before, after = read_tensors(written[family]), read_tensors(tmp_path / "again")
        parts = {f"{stem}.weight_packed", f"{stem}.weight_scale"}
        assert before.keys() == after.keys()
        assert {n for n in before if not torch.equal(before[n], after[n])} <= parts
        again = load(tmp_path / "again", family)
        changed = model.get_parameter(name).detach()
        assert torch.equal(again.get_parameter(name), dequantize(*quantize(changed), FLOAT))


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "one is dense": (
        lambda t: t.update({f"{SHARED}.up_proj.weight": dense(t, f"{SHARED}.up_proj")}),
        rf"{SHARED}\.gate_proj\.weight_packed in .* is packed, and what else model\..*"
        r"gate_up_proj\.weight is made of is not \(up_proj\.weight\): load .*, or all of these",
    ),
    "other sizes": (
        lambda t: [
            t.update({name: t[name][:32].clone()}) for name in t if f"{SHARED}.up_proj" in name
        ],
        r"has .*gate_proj\.weight_packed \[64, 64\], .*up_proj\.weight_packed \[32, 64\], which do "
        r"not become model\..*\.gate_up_proj\.weight \[128, 64\]: copy or download",
    ),
    "widths that differ": (
        lambda t: [
            t.update({name: t[name][:, : t[name].shape[1] // 2].clone()})
            for name in t
            if f"{SHARED}.up_proj" in name
        ],
        r"gate_proj\.weight_packed, .* cannot become model\..*gate_up_proj.* \(.*ize.*\): load",
    ),
    "uneven parts": (
        lambda t: [
            t.update({name: value[: 32 if "gate" in name else 96]})
            for name, value in {
                f"{SHARED}.{of}_proj.{part}": torch.cat([t[f"{SHARED}.{of}_proj.{part}"]] * 2)
                for of in ("gate", "up")
                for part in ("weight_packed", "weight_scale")
            }.items()
        ],
        r"gate_up_proj\.weight could not be saved: transformers does not make .*gate_proj",
    ),
}


def dense(tensors: dict[str, Tensor], stem: str) -> Tensor:
    parts = {part: tensors.pop(f"{stem}.{part}") for part in ("weight_packed", "weight_scale")}
    return decompressed(parts)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(written: dict[str, Path], tmp_path: Path, fault: str) -> None:
    edit, words = FAULTS[fault]
    path = edit_tensors(copied(written["MiniMax-M3"], tmp_path / "faulty"), edit)
    with pytest.raises(CheckpointError, match=words):
        load(path, "MiniMax-M3")


def conversions() -> dict[str, WeightConverter]:
    """Return those of transformers' conversions that make matrices of matrices, no experts."""
    found = {}
    for family, steps in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for step in steps:
            if isinstance(step, WeightConverter) and "expert" not in str(step.target_patterns):
                found[f"{family}: {step.source_patterns}"] = step
    return found


# Their operations ask a whole model for sizes.
OF_MODELS = ("Molmo2TextModel: ['self_attn.att_proj']", "qwen4_exp_text: ['ngram_embedding.")


def test_every_conversion_of_transformers_can_be_undone() -> None:
    """Names of packed matrices are found, and each matrix is had again, in every mapping."""
    config = SimpleNamespace(num_attention_heads=2)
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config)
    for named, converter in conversions().items():
        if named.startswith(OF_MODELS):
            continue
        names = [f"layers.0.{plain(source)}" for source in converter.source_patterns]
        first = converter.rename_source_key(names[0])[0]
        made = DenseMatrices(parameters_of(first, converter), converter)
        step = ConvertDequantized(MXFP4, names_of(MXFP4), {}, converter)
        sources, targets = parts_of(converter, MXFP4)
        packed = converter.copy(sources, targets, operations=[step])
        for at, name in enumerate(names):
            renamed, pattern = converter.rename_source_key(name)
            assert renamed == first, named
            made.add(name, pattern, weight_called(name))
            stem = name.removesuffix("weight")
            for part, suffix in enumerate(names_of(MXFP4)):
                expected = first, packed.source_patterns[2 * at + part]
                assert packed.rename_source_key(stem + suffix) == expected, named
        given = {name: torch.randn(48, 64) for name in names}
        values = made.to_parameters(model, given)
        assert values.keys() == {*made.parameters}, named
        assert_same_tensors(made.to_matrices(model, values), given)


def weight_called(name: str) -> Any:
    return SimpleNamespace(blocks=SimpleNamespace(name=name, file="file"))


def plain(pattern: str) -> str:
    """Return the name of a matrix that a conversion takes."""
    name = pattern.replace("\\", "").removeprefix(".").removesuffix("$")
    return name if name.endswith("weight") else f"{name.removesuffix('.')}.weight"
