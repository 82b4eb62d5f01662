"""Checkpoints of other families in compressed-tensors' MXFP4: loaded packed, run and compiled."""

from __future__ import annotations

from pathlib import Path
from shutil import copy
from typing import Any

import packed_families as families
import pytest
import torch
from checkpoints import read_config, read_tensors
from loaded import assert_same_tensors
from models import Graphs, compile_with
from oracle import assert_as_accurate
from packed_families import FAMILIES, IDS, LINEARS
from test_forms import InFloat64
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import CompressedTensorsConfig as CompressedTensorsOfTransformers

import mxfp4_fx
from mxfp4_fx.cli import main
from mxfp4_fx.core import version
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.family_quantizer import CompressedTensorsConfig
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.weights.freed import is_freed

FLOAT = torch.float32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> checkpoint, of which all linears are MXFP4."""
    folder = tmp_path_factory.mktemp("families")
    return {name: families.write(folder / name, name, FLOAT, LINEARS) for name in FAMILIES}


def experts_of(model: Any) -> dict[str, PackedExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedExperts)}


def dense_model(path: Path) -> Any:
    """Load the dense model with the values that compressed-tensors reads from the checkpoint."""
    dense = AutoModelForCausalLM.from_pretrained(path / "dense", dtype=FLOAT)
    dense.set_experts_implementation("batched_mm")
    return dense


@pytest.mark.parametrize("folder", ["", "dense"])
def test_a_layer_on_disk(
    written: dict[str, Path], tmp_path: Path, no_gradients: None, folder: str
) -> None:
    """Packed experts, and dense ones that are quantized while loading, may be offloaded."""
    path = written["Mixtral"] / folder
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.0": "disk"}
    model = mxfp4_fx.from_pretrained(path, device_map=places, offload_folder=tmp_path)
    assert model.model.layers[0].mlp.experts.down_proj_blocks.is_meta
    assert torch.equal(model(IDS).logits, mxfp4_fx.from_pretrained(path)(IDS).logits)


# Two families with other names and other routers run what a third one shows.
MORE = pytest.mark.exhaustive
ONE_AND_MORE = [FAMILIES[0], *(pytest.param(name, marks=MORE) for name in FAMILIES[1:])]


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_have_the_bytes_of_the_files(written: dict[str, Path], name: str) -> None:
    """Gate and up alternate; single experts' names are what the family calls them."""
    model = mxfp4_fx.from_pretrained(written[name])
    stored = read_tensors(written[name])
    ((path, experts),) = experts_of(model).items()
    path = path if name != "Mixtral" else path.replace(".mlp.", ".block_sparse_moe.")
    usual = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = ("w1", "w3", "w2") if name == "Mixtral" else usual
    for expert in range(experts.num_experts):
        for part, end in (("blocks", "weight_packed"), ("scales", "weight_scale")):
            of = {p: stored[f"{path}.{expert}.{p}.{end}"] for p in (gate, up, down)}
            both = getattr(experts, f"gate_up_proj_{part}")[expert].flatten(1)
            assert torch.equal(both[0::2], of[gate])
            assert torch.equal(both[1::2], of[up])
            assert torch.equal(getattr(experts, f"down_proj_{part}")[expert].flatten(1), of[down])
    assert all(p.dtype == FLOAT for n, p in model.named_parameters() if ".experts." not in n)


@pytest.mark.parametrize("name", ONE_AND_MORE)
def test_results_are_those_of_the_dense_model(
    written: dict[str, Path], no_gradients: None, name: str
) -> None:
    model, graphs = mxfp4_fx.from_pretrained(written[name]), Graphs()
    dense = dense_model(written[name])
    own = dense(IDS).logits
    with InFloat64():
        ideal = dense.double()(IDS).logits
    assert_as_accurate(model(IDS).logits, own, ideal)
    run = compile_with(model, graphs, options={"strict": True})
    assert_as_accurate(run(IDS).logits, own, ideal)
    matmuls = [
        node.kwargs["kernels"] for gm in graphs.seen for node in gm.graph.nodes
        if str(node.target).startswith("mxfp4.matmul_ogs")
    ]  # fmt: skip
    assert matmuls == ["cpu", "cpu"]


@MORE
def test_explain(written: dict[str, Path], no_gradients: None) -> None:
    found = mxfp4_fx.explain(mxfp4_fx.from_pretrained(written["Qwen3-MoE"]), IDS)
    (rewrite,) = found.rewrites
    assert (rewrite.layer, rewrite.experts, rewrite.kernels) == (
        "model.layers.0.mlp.experts",
        8,
        "cpu",
    )
    assert not found.misses
    assert "activation: silu(gate) * up\n" in str(found)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=MORE)])
def test_gradients_of_the_activations(written: dict[str, Path], compiled: bool) -> None:
    dense, model = (load(written["Mixtral"]) for load in (dense_model, mxfp4_fx.from_pretrained))
    start = model.get_input_embeddings()(IDS).detach()

    def gradient(run: Any, given: Tensor) -> Tensor:
        given.requires_grad_()
        return torch.autograd.grad(run(inputs_embeds=given).logits.square().sum(), given)[0]

    own = gradient(dense, start.clone())
    with InFloat64():
        ideal = gradient(dense.double(), start.double())
    run = compile_with(model, "aot_eager", options={"strict": True}) if compiled else model
    assert_as_accurate(gradient(run, start.clone()), own, ideal)


def test_by_transformers_own_from_pretrained(written: dict[str, Path], no_gradients: None) -> None:
    path = written["Qwen3-MoE"]
    own = AutoModelForCausalLM.from_pretrained(path, quantization_config=CompressedTensorsConfig())
    assert experts_of(own)
    assert torch.equal(own(IDS).logits, mxfp4_fx.from_pretrained(path)(IDS).logits)


def test_another_head_is_new(written: dict[str, Path]) -> None:
    kind = AutoModelForSequenceClassification
    model = mxfp4_fx.from_pretrained(written["Qwen3-MoE"], auto_class=kind)
    assert experts_of(model)
    assert model.score.weight.shape == (2, 64)


def test_older_transformers(written: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "transformers_version", lambda: "5.22.0")
    with pytest.raises(CheckpointError, match=r"need transformers 5\.23 or newer.*5\.22\.0 is"):
        mxfp4_fx.from_pretrained(written["Mixtral"])


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("freed", [False, True])
def test_saving_writes_what_was_loaded(
    written: dict[str, Path], tmp_path: Path, no_gradients: None, name: str, freed: bool
) -> None:
    """Experts under the names of the files, and other matrices from the files themselves."""
    model = mxfp4_fx.from_pretrained(written[name])
    if freed:
        (experts,) = experts_of(model).values()
        x, ids = torch.randn(3, 64), torch.tensor([[0, 5], [7, 1], [2, 2]])
        run = compile_with(experts, options={"free_weights": True, "strict": True})
        run(x, ids, torch.ones(3, 2) / 2)
        assert is_freed(experts.down_proj_blocks)
    again = saved(model, tmp_path)
    assert_same_tensors(read_tensors(again), read_tensors(written[name]))
    stored = [read_config(path)["quantization_config"] for path in (again, written[name])]
    assert stored[0] == stored[1]


def test_what_was_saved_is_loaded_by_compressed_tensors(
    written: dict[str, Path], tmp_path: Path, no_gradients: None
) -> None:
    again = saved(mxfp4_fx.from_pretrained(written["Qwen3-MoE"]), tmp_path)
    settings = CompressedTensorsOfTransformers(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(again, quantization_config=settings)
    expected = dense_model(written["Qwen3-MoE"]).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), expected[name]), name


def test_a_changed_matrix_is_not_saved_as_it_was(written: dict[str, Path], tmp_path: Path) -> None:
    path, name = written["Qwen3-MoE"], "model.layers.0.self_attn.q_proj.weight"
    for requantize in (False, True):
        model = mxfp4_fx.from_pretrained(path, requantize=requantize)
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter[0, :32] *= 3
        if not requantize:
            with pytest.raises(CheckpointError, match=rf"{name} was packed in .* requantize=True"):
                model.save_pretrained(tmp_path / "refused")
            assert not list(tmp_path.glob("refused/*"))
            continue
        again = mxfp4_fx.from_pretrained(saved(model, tmp_path / "again"))
        expected = dequantize(*quantize(parameter.detach()), parameter.dtype)
        assert torch.equal(again.get_parameter(name), expected)


def test_dequantize(written: dict[str, Path], no_gradients: None) -> None:
    model = mxfp4_fx.dequantize(mxfp4_fx.from_pretrained(written["Qwen3-MoE"]))
    expected = dense_model(written["Qwen3-MoE"])
    assert_same_tensors(model.state_dict(), expected.state_dict())
    model.set_experts_implementation("batched_mm")
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_explain_a_directory(
    written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.json is enough."""
    copy(written["Qwen3-MoE"] / "config.json", tmp_path)
    assert main(["explain", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "1 of 1 MoE layers rewritten" in told
    assert "activation: silu(gate) * up\n" in told
