"""Quantizing dense files that hold all experts of a layer in one tensor."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    assert_refused,
    convert,
    edit_tensors,
    files,
    read_tensors,
)
from families import fill
from safetensors.torch import load_file
from test_family_models import _COMMON, MODELS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import mxfp4_fx
from mxfp4_fx.checkpoints.fused_experts import NAMES
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.packed import PackedExperts

_QWEN = {**_COMMON, **MODELS["Qwen3-MoE"][1], "intermediate_size": 96, "num_hidden_layers": 2}
_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
           "out_hidden_size": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
_ROPE = {"mrope_section": [2, 3, 3], "rope_type": "default"}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "Qwen3.5": (
        AutoModelForCausalLM,
        transformers.Qwen3_5MoeTextConfig(**_QWEN, layer_types=["full_attention"] * 2),
    ),
    "Mixtral": (
        AutoModelForCausalLM,
        transformers.MixtralConfig(**{**_COMMON, **MODELS["Mixtral"][1], "num_hidden_layers": 2}),
    ),
    "Qwen3-VL": (
        AutoModelForImageTextToText,
        transformers.Qwen3VLMoeConfig(
            text_config={**_QWEN, "rope_parameters": {**_ROPE, "rope_theta": 1e4}},
            vision_config=_VISION,
        ),
    ),
}


def transpose(tensors: dict[str, Tensor]) -> None:
    """Hold experts as [E, K, N], as Qwen3-VL's published files do."""
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()


def write(path: Path, family: str) -> Path:
    auto_class, config = FAMILIES[family]
    model = fill(auto_class.from_config(config, dtype=torch.bfloat16))
    for module in model.modules():
        if hasattr(module, "has_gate"):  # values that are no MXFP4
            torch.nn.init.normal_(module.gate_up_proj.data)
            torch.nn.init.normal_(module.down_proj.data)
    model.save_pretrained(path, save_original_format=False)
    assert any(name.endswith(".experts.gate_up_proj") for name in read_tensors(path))
    return edit_tensors(path, transpose) if family == "Qwen3-VL" else path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dense(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense") / "dense", family)


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(dense, tmp_path_factory.mktemp("quantized") / "out", max_shard_bytes=40_000)


def rounded(weight: Tensor) -> Tensor:
    return dequantize(*quantize(weight), weight.dtype)


def experts_of(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "has_gate")}


def test_it_is_loaded_packed_with_the_rounded_values(
    family: str, dense: Path, quantized: Path
) -> None:
    auto_class = FAMILIES[family][0]
    model = mxfp4_fx.from_pretrained(quantized, auto_class=auto_class)
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    mxfp4_fx.dequantize(model)
    expected = auto_class.from_pretrained(dense)
    assert len(experts_of(model)) == 2
    for name, experts in experts_of(model).items():
        original = expected.get_submodule(name)
        for part in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(experts, part), rounded(getattr(original, part).data)), name


def test_what_is_no_expert_is_copied(dense: Path, quantized: Path) -> None:
    before, after = read_tensors(dense), read_tensors(quantized)
    others = {name for name in before if ".experts." not in name}
    assert others == {name for name in after if ".experts." not in name}
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_saving_writes_every_byte_again(family: str, quantized: Path, tmp_path: Path) -> None:
    model = mxfp4_fx.from_pretrained(quantized, auto_class=FAMILIES[family][0])
    model.save_pretrained(tmp_path)
    stored, again = read_tensors(quantized), read_tensors(tmp_path)
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_skipped_experts_stay_in_one_tensor(family: str, dense: Path, tmp_path: Path) -> None:
    out = convert(dense, tmp_path / "out", skip="layers.0")
    before, after = read_tensors(dense), read_tensors(out)
    kept = {name for name in before if "layers.0." in name and ".experts." in name}
    assert len(kept) == 2
    assert all(torch.equal(before[name], after[name]) for name in kept)
    model = mxfp4_fx.from_pretrained(out, auto_class=FAMILIES[family][0])
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 1


def test_one_tensors_experts_lie_in_several_shards(quantized: Path) -> None:
    shards = [list(load_file(file)) for file in sorted(quantized.glob("*.safetensors"))]
    ups = re.compile(r"layers\.0\.mlp\.experts\.\d+\.(up_proj|w3)\.weight_packed$")
    assert sum(any(map(ups.search, names)) for names in shards) > 1


def test_compressed_tensors_reads_it(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", "Qwen3.5")
    settings = CompressedTensorsConfig(dequantize=True)
    out = convert(dense, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=settings)
    for name, parameter in AutoModelForCausalLM.from_pretrained(dense).named_parameters():
        is_expert = ".experts." in name
        expected = rounded(parameter.data) if is_expert else parameter
        assert torch.equal(model.get_parameter(name), expected), name


def test_a_run_whose_disk_failed_goes_on(tmp_path: Path) -> None:
    dense = write(tmp_path / "in", "Mixtral")
    code = f"""
import resource
from mxfp4_fx.checkpoints.quantize import quantize_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
quantize_checkpoint({str(dense)!r}, {str(tmp_path / "out")!r}, max_shard_bytes=7000, progress=False)
"""
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert re.search(r"CheckpointError: .*the same command goes on from", ended.stderr)
    partial = tmp_path / "out.partial"
    done = json.loads((partial / "journal.json").read_text())["shards"]
    assert done
    times = {name: (partial / "checkpoint" / name).stat().st_mtime_ns for name in done}
    out = convert(dense, tmp_path / "out", max_shard_bytes=7000)
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert files(out) == files(convert(dense, tmp_path / "whole", max_shard_bytes=7000))


@pytest.mark.parametrize("family", NAMES)
def test_transformers_merges_the_names_that_are_written(family: str) -> None:
    gate, up, down = NAMES[family]
    merged = [
        [*one.source_patterns]
        for one in get_checkpoint_conversion_mapping(family) or []
        if any(target.endswith("experts.gate_up_proj") for target in one.target_patterns)
    ]
    if family == "qwen3_vl_moe_text":  # `family_plan.with_single_experts` does it
        assert (gate, up, down) == ("gate_proj", "up_proj", "down_proj")
        assert not merged
    else:
        ((first, second),) = merged
        assert first.endswith(f"experts.*.{gate}.weight")
        assert second.endswith(f"experts.*.{up}.weight")


UP, DOWN = (f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj"))
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "family": (
        None,
        lambda config: config.update(model_type="llama4_text"),
        r"of llama4_text it is not known under which names .* known are deepseek_v2, ",
    ),
    "bias": (
        lambda t: t.update({f"{UP}_bias": torch.zeros(8, 192)}),
        None,
        r"gate_up_proj_bias in .*: mixtral has no biases",
    ),
    "down": (lambda t: t.pop(DOWN), None, r"gate_up_proj in .* has no .*\.experts\.down_proj"),
    "sizes": (
        lambda t: t.update({DOWN: torch.zeros(8, 64, 64)}),
        None,
        r"experts\.\w+ in .* is torch\.\w+ \[8, \d+, \d+\]: MXFP4 takes experts",
    ),
    "width": (
        lambda t: t.update({UP: torch.zeros(8, 96, 64), DOWN: torch.zeros(8, 64, 48)}),
        None,
        r"multiples of 32; skip its experts",
    ),
    "dtype": (
        lambda t: t.update({UP: torch.zeros(8, 192, 64, dtype=torch.int8)}),
        None,
        r"gate_up_proj in .* is torch\.int8 \[8, 192, 64\]: MXFP4 takes",
    ),
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixtral") / "dense", "Mixtral")


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_quantized(mixtral: Path, tmp_path: Path, fault: str) -> None:
    assert_refused(mixtral, tmp_path, *REFUSED[fault])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.exhaustive
def test_memory_is_bounded_by_experts_not_by_tensors(tmp_path: Path) -> None:
    """The largest tensor has 128 MiB, 2 of them an expert; the process grows by less than that."""
    auto_class, given = FAMILIES["Mixtral"]
    config = type(given)(**{**given.to_dict(), "num_hidden_layers": 1, "num_local_experts": 64,
                            "hidden_size": 256, "intermediate_size": 2048})  # fmt: skip
    with torch.no_grad():
        auto_class.from_config(config, dtype=torch.bfloat16).save_pretrained(
            tmp_path / "in", save_original_format=False
        )
    code = f"""
import re, torch
from pathlib import Path
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.checkpoints.quantize import quantize_checkpoint
# Not getrusage's, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
quantize(torch.zeros(32, 32))
before = peak()
quantize_checkpoint({str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}, progress=False)
print(peak() - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 128
