"""Dense experts of other families: quantized while they are loaded, one projection at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import test_quantize_fused as fused_files
import torch
from checkpoints import convert, copied, edit_config, edit_tensors, read_config, read_tensors
from loaded import measured
from packed_families import IDS
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxfp4_fx
from mxfp4_fx.core import version
from mxfp4_fx.core.errors import CheckpointError, NanWeightsWarning, OptionError
from mxfp4_fx.core.formats import SLAB_VALUES, quantize
from mxfp4_fx.huggingface.family_quantizing import QuantizeFamilyConfig
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.huggingface.random_family import write_random_family

SIZES = {"hidden": 64, "intermediate": 96, "experts": 16, "experts_per_token": 4, "heads": 4}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 16}  # fmt: skip
SINGLE = ("qwen3_moe", "mixtral", "deepseek_v3")
NAME = "model.layers.{}.mlp.experts.{}.{}.weight"


def write(path: Path, family: str) -> Path:
    if family in fused_files.FAMILIES:
        return fused_files.write(path, family)
    own = {} if family == "deepseek_v3" else {"kv_heads": 2, "head_dim": 16}
    others = LATENT if family == "deepseek_v3" else None
    sizes = {**SIZES, **own}
    return write_random_family(path, family, sizes, dense=True, others=others, progress=False)


def load(family: str, path: Path, **options: Any) -> Any:
    classes = fused_files.FAMILIES.get(family, (AutoModelForCausalLM,))
    return mxfp4_fx.from_pretrained(path, auto_class=classes[0], **options)


@pytest.fixture(scope="module", params=(*SINGLE, *fused_files.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dense(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense") / "dense", family)


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(dense, tmp_path_factory.mktemp("quantized") / "out")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("qwen") / "dense", "qwen3_moe")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_model_is_that_of_the_quantized_files(
    family: str, dense: Path, quantized: Path
) -> None:
    model = load(family, dense)
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    assert same(model.state_dict(), load(family, quantized).state_dict())


def test_what_is_saved_is_what_quantize_writes(
    family: str, dense: Path, quantized: Path, tmp_path: Path
) -> None:
    model = load(family, dense)
    model.save_pretrained(tmp_path)
    assert same(read_tensors(tmp_path), read_tensors(quantized))
    settings = [read_config(path)["quantization_config"] for path in (tmp_path, quantized)]
    assert settings[0] == settings[1]


def test_it_can_be_saved_when_its_weights_are_freed(qwen: Path, tmp_path: Path) -> None:
    model = load("qwen3_moe", qwen)
    model.compile(backend="mxfp4", options={"inner": "eager", "strict": True, "free_weights": True})
    with torch.no_grad():
        model(IDS)
    model.save_pretrained(tmp_path / "out")
    expected = read_tensors(convert(qwen, tmp_path / "quantized"))
    assert same(read_tensors(tmp_path / "out"), expected)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
def test_weights_are_rounded_once_from_what_is_stored(
    qwen: Path, tmp_path: Path, loaded: torch.dtype
) -> None:
    """Experts of one layer are in float32 and, but for one projection, in bfloat16."""
    path = copied(qwen, tmp_path / "dense")
    torch.manual_seed(0)
    mixed = {NAME.format(1, e, "gate_proj"): torch.randn(96, 64) for e in range(16)}
    edit_tensors(path, lambda tensors: tensors.update(mixed))
    stored = read_tensors(path)
    model = load("qwen3_moe", path, dtype=loaded)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    for expert in range(16):
        for at, name in enumerate(("gate_proj", "up_proj")):
            blocks, scales = quantize(stored[NAME.format(1, expert, name)])
            assert torch.equal(experts.gate_up_proj_blocks[expert, at::2], blocks)
            assert torch.equal(experts.gate_up_proj_scales[expert, at::2], scales)
    assert model.get_parameter("lm_head.weight").dtype is loaded


def test_the_scale_rule_is_used(qwen: Path, tmp_path: Path) -> None:
    out = convert(qwen, tmp_path / "out", scale_rule="search")
    loaded = load("qwen3_moe", qwen, scale_rule="search").state_dict()
    assert same(loaded, load("qwen3_moe", out).state_dict())
    assert not same(loaded, load("qwen3_moe", qwen).state_dict())


def test_skipped_experts_stay_dense(family: str, dense: Path, tmp_path: Path) -> None:
    model = load(family, dense, skip="layers.0")
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 1
    model.save_pretrained(tmp_path / "saved")
    expected = read_tensors(convert(dense, tmp_path / "out", skip="layers.0"))
    saved = read_tensors(tmp_path / "saved")
    if family == "Qwen3-VL":  # transformers reads its dense experts transposed, and saves them so
        saved |= {name: expected[name] for name in saved if saved[name].ndim == 3}
    assert same(saved, expected)
    again = load(family, tmp_path / "saved")
    assert same(again.state_dict(), model.state_dict())


def test_skipped_experts_stay_as_they_are_when_compiled(qwen: Path) -> None:
    model = load("qwen3_moe", qwen, skip="layers.0")
    with torch.no_grad():
        explanation = mxfp4_fx.explain(model, IDS)
    assert [rewrite.layer for rewrite in explanation.rewrites] == ["model.layers.1.mlp.experts"]


def test_by_transformers_own_from_pretrained(qwen: Path) -> None:
    settings = QuantizeFamilyConfig(skip="layers.1")
    model = AutoModelForCausalLM.from_pretrained(qwen, quantization_config=settings)
    assert same(model.state_dict(), load("qwen3_moe", qwen, skip="layers.1").state_dict())


def test_names_go_through_key_mapping(qwen: Path, tmp_path: Path) -> None:
    path = copied(qwen, tmp_path / "renamed")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    edit_tensors(path, rename)
    model = load("qwen3_moe", path, key_mapping={r"^module\.": ""})
    assert same(model.state_dict(), load("qwen3_moe", qwen).state_dict())


@pytest.mark.parametrize("stray", ["mtp.layers.0", "model.layers.2"])
def test_layers_that_the_model_has_not_are_left_out(qwen: Path, tmp_path: Path, stray: str) -> None:
    """Published files have more of them, which predict further tokens."""
    path = copied(qwen, tmp_path / "more")
    first = "model.layers.0."

    def add(tensors: dict[str, Tensor]) -> None:
        of_first = [name for name in tensors if name.startswith(first)]
        for name in of_first:
            tensors[name.replace(first, f"{stray}.")] = torch.ones_like(tensors[name])

    edit_tensors(path, add)
    model = load("qwen3_moe", path)
    assert same(model.state_dict(), load("qwen3_moe", qwen).state_dict())


def test_blocks_that_are_nan_are_told(qwen: Path, tmp_path: Path) -> None:
    path = copied(qwen, tmp_path / "nan")
    name = NAME.format(1, 3, "up_proj")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][2, 40] = torch.nan

    edit_tensors(path, spoil)
    with pytest.warns(NanWeightsWarning, match=r"1 MXFP4 blocks .*layers\.1\.mlp.*scales \(1\)"):
        load("qwen3_moe", path)


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "expert": (
        lambda t: t.pop(NAME.format(0, 3, "up_proj")),
        None,
        r"the files lack .*layers\.0\.mlp\.experts\.3\.up_proj",
    ),
    "projection": (
        lambda t: [t.pop(NAME.format(0, e, "down_proj")) for e in range(16)],
        None,
        r"wants model\.layers\.0\.mlp\.experts\.down_proj, which the files have not",
    ),
    "other": (lambda t: t.pop("model.norm.weight"), None, r"wants model\.norm\.weight"),
    "size": (
        lambda t: t.update({NAME.format(0, 3, "up_proj"): torch.zeros(64, 64)}),
        None,
        r"experts\.3\.up_proj.* holds a matrix \[64, 64\], and .* needs \[96, 64\]",
    ),
    "dtype": (
        lambda t: t.update({NAME.format(0, 3, "up_proj"): torch.zeros(96, 64, dtype=torch.int8)}),
        None,
        r"experts\.3\.up_proj\.weight in .* is torch\.int8",
    ),
    "count": (
        None,
        lambda config: config.update(num_experts=8, num_local_experts=8),
        r"the files have more than the config's experts",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_in_the_headers(qwen: Path, tmp_path: Path, fault: str) -> None:
    tensors, config, words = FAULTS[fault]
    path = copied(qwen, tmp_path / "faulty")
    if tensors:
        edit_tensors(path, tensors)
    if config:
        edit_config(path, config)
    with pytest.raises(CheckpointError, match=words):
        load("qwen3_moe", path)


def test_options_that_have_no_meaning(qwen: Path) -> None:
    with pytest.raises(OptionError, match=r"skip.*layers\.7"):
        load("qwen3_moe", qwen, skip="layers.7")
    with pytest.raises(OptionError, match=r"ignore_mismatched_sizes=.* is not for"):
        load("qwen3_moe", qwen, ignore_mismatched_sizes=True)
    with pytest.raises(OptionError, match=r"scale_rule='no'"):
        QuantizeFamilyConfig(scale_rule="no")
    with pytest.raises(CheckpointError, match=r"nothing of .* is left to quantize"):
        load("qwen3_moe", qwen, skip="*")


def test_an_older_transformers_is_named(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "transformers_version", lambda: "5.22.1")
    words = r"of other families than GPT-OSS need transformers 5\.23 or newer .*: 5\.22\.1 is"
    with pytest.raises(CheckpointError, match=f"dense experts {words}"):
        load("qwen3_moe", qwen)
    with pytest.raises(CheckpointError, match=f"checkpoints {words}"):
        write_random_family(tmp_path / "out", "qwen3_moe", {})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.exhaustive
@pytest.mark.parametrize("is_dense", [True, False])
def test_memory_holds_the_packed_model_and_a_few_slabs(tmp_path: Path, is_dense: bool) -> None:
    """Files are mapped. A layer has 25 MiB in MXFP4 and 96 in bfloat16, ten slabs have 10."""
    own = {"kv_heads": 2, "head_dim": 16, "layers": 4}
    large = {**SIZES, **own, "hidden": 1024, "intermediate": 1024}
    paths = [
        write_random_family(
            tmp_path / str(sizes["hidden"]), "qwen3_moe", sizes, dense=is_dense, progress=False
        )
        for sizes in ({**SIZES, **own}, large)
    ]
    code = f"""
import mxfp4_fx
mxfp4_fx.from_pretrained({str(paths[0])!r})  # what is imported and made once
peak = Peak()
model = mxfp4_fx.from_pretrained({str(paths[1])!r})
print(peak.bytes - peak.start_bytes, sum(p.nbytes for p in model.parameters()))
"""
    peak, packed_bytes = measured(code)
    assert peak < packed_bytes + 10 * SLAB_VALUES
