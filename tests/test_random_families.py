"""Random checkpoints of other families: the files of transformers' models, in MXFP4 or dense."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_config, read_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import mxfp4_fx
from mxfp4_fx.cli import main
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import dequantize
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.huggingface.random_family import FAMILIES, family_config, write_random_family

SIZES = {"hidden": 64, "intermediate": 96, "experts": 16, "experts_per_token": 4, "heads": 4}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 16}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT,
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
}


def write(path: Path, family: str, **options: Any) -> Path:
    sizes = {**SIZES, **({} if family == "deepseek_v3" else {"kv_heads": 2})}
    sizes |= {"head_dim": 16} if FAMILIES[family].keys_of("head_dim") else {}
    others = OTHERS.get(family)
    return write_random_family(path, family, sizes, others=others, progress=False, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("random") / "packed", request.param)


def test_its_experts_are_loaded_packed_and_its_logits_are_finite(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    with torch.no_grad():
        logits = model(tokenizer("every token", return_tensors="pt").input_ids).logits[0]
    assert logits.isfinite().all()
    assert len(logits.unique(dim=0)) == len(logits)


def test_transformers_finds_every_tensor_and_no_other(checkpoint: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not any(report.values()), report
    stored = read_tensors(checkpoint)
    down = re.compile(r"layers\.1\..*\.experts\.3\.(down_proj|w2)\.weight_packed$")
    (found,) = filter(down.search, stored)
    stem = found.rpartition(".")[0]
    weight = dequantize(
        stored[f"{stem}.weight_packed"].unflatten(1, (-1, 16)),
        stored[f"{stem}.weight_scale"],
        torch.bfloat16,
    )
    experts = model.get_submodule("model.layers.1.mlp.experts").down_proj
    assert torch.equal(experts[3], weight)
    # Scaled by the fan-in; one exponent too many or too few is a factor of 2.
    assert 2**-0.5 < experts.double().std().item() * experts.shape[-1] ** 0.5 < 2**0.5


def test_dense_experts_are_bfloat16_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "dense", "qwen3_moe", dense=True)
    assert "quantization_config" not in read_config(path)
    tensors = read_tensors(path)
    up = tensors["model.layers.1.mlp.experts.15.up_proj.weight"]
    assert (up.dtype, up.shape) == (torch.bfloat16, (96, 64))
    assert abs(up.float().std().item() / 64**-0.5 - 1) < 5 * (2 * up.numel()) ** -0.5
    _, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (
        read_tensors(write(tmp_path / name, "mixtral", seed=seed, max_shard_bytes=size))
        for name, seed, size in (("a", 1, 10**5), ("b", 1, 10**7), ("c", 2, 10**7))
    )
    assert all(torch.equal(first[name], again[name]) for name in first | again)
    same = [name for name in first if torch.equal(first[name], other[name])]
    assert not same


PUBLISHED = {  # of a layer's experts: count, hidden, intermediate
    "deepseek_v3": (256, 7168, 2048),
    "glm4_moe": (128, 4096, 1408),
    "minimax_m2": (256, 3072, 1536),
    "mixtral": (8, 4096, 14336),
    "olmoe": (64, 2048, 1024),
    "qwen2_moe": (60, 2048, 1408),
    "qwen3_moe": (128, 2048, 768),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_are_those_of_the_familys_model(family: str) -> None:
    config = family_config(family, {}, {})
    known = FAMILIES[family]
    sizes = ("experts", "hidden", "intermediate")
    assert tuple(getattr(config, known.keys_of(s)[0]) for s in sizes) == PUBLISHED[family]
    assert (config.num_hidden_layers, config.vocab_size) == (2, 512)


IMPOSSIBLE: dict[str, tuple[str, dict[str, int], str]] = {
    "family": ("llama", {}, r"llama is no family .*: gpt_oss, deepseek_v3, .*, qwen3_moe can"),
    "hidden": ("qwen3_moe", {"hidden": 100}, r"hidden is 100: it must be a multiple of 32"),
    "vocab": ("qwen3_moe", {"vocab": 4}, r"vocab is 4: it must be 265 or more"),
    "experts": ("mixtral", {"experts": 1}, r"experts_per_token is 2: it must be 1 or less"),
    "heads": ("mixtral", {"heads": 0}, r"heads is 0: it must be 1 or more"),
    "width": ("qwen2_moe", {"hidden": 32, "heads": 32}, r"heads is 32: qwen2_moe divides hidden"),
    "window": ("mixtral", {"sliding_window": 8}, r"mixtral has no sliding_window of its own"),
    "kv_heads": ("deepseek_v3", {"kv_heads": 8}, r"deepseek_v3 has no kv_heads of its own"),
    "groups": ("deepseek_v3", {"experts": 12}, r"experts is 12: deepseek_v3 has 8 groups"),
    "few": ("deepseek_v3", {"experts": 8}, r"experts is 8: deepseek_v3 has 8 groups"),
}


def test_deepseeks_heads_have_a_width_of_their_own() -> None:
    config = family_config("deepseek_v3", {"hidden": 64}, {})
    assert (config.hidden_size, config.num_attention_heads) == (64, 128)


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_what_a_family_cannot_have(tmp_path: Path, fault: str) -> None:
    family, sizes, words = IMPOSSIBLE[fault]
    with pytest.raises(CheckpointError, match=words):
        write_random_family(tmp_path / "out", family, sizes)
    assert not any(tmp_path.iterdir())


def test_the_command_writes_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [part for size in SIZES for part in (f"--{size.replace('_', '-')}", str(SIZES[size]))]
    options = [*sizes, "--kv-heads", "2", "--head-dim", "16", "--seed", "3", "--layers", "1"]
    for dense in ([], ["--dense"]):
        out = tmp_path / f"out{len(dense)}"
        assert main(["checkpoint", str(out), "--family", "qwen3_moe", *options, *dense]) == 0
        assert f"wrote {out}" in capsys.readouterr().out
        assert ("quantization_config" in read_config(out)) is (not dense)
        assert read_config(out)["num_hidden_layers"] == 1
    assert main(["checkpoint", str(tmp_path / "x"), "--dense"]) == 1
    assert "--dense is for other families than GPT-OSS" in capsys.readouterr().err


def test_without_transformers_the_command_says_what_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; from mxfp4_fx.cli import main; "
        f"sys.exit(main(['checkpoint', {str(tmp_path / 'x')!r}, '--family', 'qwen3_moe']))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 1
    assert "error: --family needs transformers 5.23 or newer" in done.stderr
