"""``explain DIRECTORY``: what the headers of files say, and what ``quantize`` recorded of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import convert, copied, edit_tensors, read_tensors, write_dense
from packed_families import IDS
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import mxfp4_fx
from mxfp4_fx.cli import main
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.explanation import Explanation
from mxfp4_fx.huggingface.loading import empty_model
from mxfp4_fx.huggingface.random_family import write_random_family

SIZES = {"hidden": 64, "intermediate": 96, "experts": 8, "experts_per_token": 2, "heads": 4,
         "kv_heads": 2, "head_dim": 16}  # fmt: skip
LAYER = "model.layers.{}.mlp.experts"
RECORD = "mxfp4_rounding.json"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense"
    return write_random_family(path, "qwen3_moe", SIZES, dense=True, progress=False)


@pytest.fixture(scope="module")
def half(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose first layer is dense, though nothing in the config says so of experts."""
    return convert(dense, tmp_path_factory.mktemp("half") / "half", skip="layers.0")


def explained(path: Path) -> Explanation:
    with empty_model(str(path), torch.bfloat16) as model, torch.no_grad():
        return mxfp4_fx.explain(model, torch.zeros((1, 8), dtype=torch.long))


@pytest.mark.parametrize("of", ["qwen3_moe", "gpt_oss"])
def test_the_command_shows_what_quantize_measured(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], of: str
) -> None:
    source = dense if of == "qwen3_moe" else write_dense(tmp_path / "dense")
    torch.manual_seed(0)
    if of == "gpt_oss":  # values that are no MXFP4
        edit_tensors(
            source,
            lambda t: t.update(
                {n: v + torch.randn(v.shape).to(v) * 0.1 for n, v in t.items() if ".experts." in n}
            ),
        )
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "rounding changed" in line]
    assert [line.partition(":")[0] for line in told] == [LAYER.format(0), LAYER.format(1)]
    page = tmp_path / "page.html"
    assert main(["explain", str(out), "--html", str(page)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "rounding changed" in line] == told
    assert all(line.replace("rounding changed the weights by ", "") in page.read_text()
               for line in told)  # fmt: skip
    assert main(["explain", str(out), "--json"]) == 0
    recorded = json.loads((out / RECORD).read_text())
    data = json.loads(capsys.readouterr().out)
    assert data["rounding_errors"] == recorded["rounding_errors"]
    assert recorded["scale_rule"] == "max"
    assert all(0.01 < error < 0.3 for error in data["rounding_errors"].values())


def test_other_readers_are_not_disturbed(dense: Path, tmp_path: Path) -> None:
    out = convert(dense, tmp_path / "out", report=lambda errors: None)
    assert (out / RECORD).is_file()
    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=settings)
    assert isinstance(model, transformers.Qwen3MoeForCausalLM)
    assert transformers.AutoTokenizer.from_pretrained(out)("x").input_ids == [ord("x")]
    mxfp4_fx.from_pretrained(out).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / RECORD).exists()


def test_a_record_of_other_weights_is_not_copied(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path / "dense")
    (source / RECORD).write_text("{}")
    assert not (convert(source, tmp_path / "out") / RECORD).exists()


def test_a_damaged_record_is_named(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(half, tmp_path / "half")
    (path / RECORD).write_text('{"rounding_errors": {"a": "b"}}')
    assert main(["explain", str(path)]) == 1
    assert f"error: {path / RECORD} has no rounding_errors that are numbers" in (
        capsys.readouterr().err
    )


def test_it_explains_what_from_pretrained_loads(half: Path) -> None:
    with torch.no_grad():
        loaded = mxfp4_fx.explain(mxfp4_fx.from_pretrained(half), IDS)
    found = explained(half)
    assert {rewrite.form for rewrite in found.rewrites} == {"grouped_mm", "mxfp4_fx"}
    for one, other in zip(found.rewrites, loaded.rewrites, strict=True):
        assert (one.layer, one.form, one.bytes_before) == (
            other.layer,
            other.form,
            other.bytes_before,
        )


def test_dense_experts_are_those_that_loading_quantizes(dense: Path) -> None:
    assert {rewrite.form for rewrite in explained(dense).rewrites} == {"mxfp4_fx"}


def test_a_config_alone_is_enough(half: Path, dense: Path, tmp_path: Path) -> None:
    for source in (half, dense):
        path = tmp_path / source.name
        path.mkdir()
        (path / "config.json").write_bytes((source / "config.json").read_bytes())
        assert [rewrite.form for rewrite in explained(path).rewrites] == ["mxfp4_fx"] * 2


FAULTS = {
    "half": ("experts.3.up_proj.weight_scale", r"3\.up_proj\.weight_packed in .* has no .*_scale"),
    "dense": ("experts.3.up_proj.weight", r"the files lack .*experts\.3\.up_proj"),
    "gpt_oss": ("experts.down_proj", r"not in model\.safetensors: .*layers\.1\..*down_proj"),
}


@pytest.mark.parametrize("of", FAULTS)
def test_faults_of_the_files_are_found(half: Path, dense: Path, tmp_path: Path, of: str) -> None:
    ending, words = FAULTS[of]
    sources = {"half": half, "dense": dense}
    path = copied(sources[of], tmp_path / of) if of in sources else write_dense(tmp_path / of)
    (name, *_) = [n for n in read_tensors(path) if "layers.1." in n and n.endswith(ending)]
    edit_tensors(path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=words), empty_model(str(path), torch.bfloat16):
        pass


@pytest.fixture(scope="module")
def unpackable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense files in which nothing is named as experts are that can be quantized."""
    config = transformers.GraniteMoeConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("unpackable")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_files_without_experts_that_could_be_packed_are_named(unpackable: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json hold no experts .*--experts"):
        explained(unpackable)


def test_files_that_stay_dense_may_hold_experts_in_any_way(
    unpackable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(unpackable), "--experts", "grouped_mm"]) == 0
    assert "1 of 1 MoE layers rewritten" in capsys.readouterr().out
