"""``mxfp4_fx.from_pretrained``: packed experts, loaded by transformers' own loader."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    copied,
    edit_config,
    edit_tensors,
    read_config,
    read_tensors,
    write_packed,
)
from loaded import (
    IDS,
    SECOND_LAYER_ON_DISK,
    assert_same_tensors,
    dequantized,
    exact_logits,
    logits,
)
from oracle import assert_as_accurate
from test_imports import HIDE
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import mxfp4_fx
from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.core.errors import CheckpointError, NanWeightsWarning, NoExpertsWarning, OptionError
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.weights import mapped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


def is_packed(model: Any) -> list[bool]:
    layers = getattr(model, "model", model).layers
    return [isinstance(layer.mlp.experts, PackedExperts) for layer in layers]


def test_parameters_are_the_tensors_of_the_files(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint)
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    assert_same_tensors(dict(model.named_parameters()), read_tensors(checkpoint))
    assert is_packed(model) == [True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uncompiled_logits(checkpoint: Path, dtype: torch.dtype) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=dtype)
    reference = dequantized(checkpoint, dtype)
    assert_as_accurate(logits(model), logits(reference), exact_logits(reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_but_bytes_come_in_the_dtype_that_transformers_gives_them(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=dtype)
    reference = dequantized(checkpoint, dtype)
    expected = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    actual = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if not name.endswith(("_blocks", "_scales"))
    }
    assert actual == {name: expected[name] for name in actual}
    assert model.dtype == model.config.dtype == dtype


def test_the_dtype_of_the_files_is_the_default(checkpoint: Path) -> None:
    for kwargs in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}):
        assert mxfp4_fx.from_pretrained(checkpoint, **kwargs).config.dtype == torch.bfloat16


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_of_a_padded_batch(checkpoint: Path, cache: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    prompts = tokenizer(["What is a mixture of experts?", "Hi"], return_tensors="pt", padding=True)
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32)
    reference = dequantized(checkpoint, torch.float32)
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    expected = reference.generate(**prompts, **settings)
    assert torch.equal(model.generate(**prompts, **settings), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")], ids=repr)
def test_device_maps_of_one_device(checkpoint: Path, device_map: Any) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, device_map=device_map)
    assert_same_tensors(dict(model.named_parameters()), read_tensors(checkpoint))


def test_a_layer_on_disk(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, device_map=SECOND_LAYER_ON_DISK)
    experts = model.model.layers[1].mlp.experts
    assert experts.down_proj_blocks.is_meta
    assert experts.down_proj_blocks.dtype == torch.uint8
    assert torch.equal(logits(model), logits(mxfp4_fx.from_pretrained(checkpoint)))


def test_a_device_map_is_planned_with_the_bytes_that_will_be_there(checkpoint: Path) -> None:
    """Room for the packed model and its largest layer once more, which the planner keeps free."""
    model = mxfp4_fx.from_pretrained(checkpoint)
    sizes = [sum(p.nbytes for p in part.parameters()) for part in (model, model.model.layers[0])]
    room = {"cpu": sum(sizes) + 4096}  # and the rotary frequencies
    planned = mxfp4_fx.from_pretrained(checkpoint, device_map="auto", max_memory=room)
    assert not any(parameter.is_meta for parameter in planned.parameters())


def test_experts_to_skip_are_dense(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, skip="model.layers.1.mlp", dtype=torch.float32)
    assert is_packed(model) == [True, False]
    expected = dict(dequantized(checkpoint, torch.float32).model.layers[1].named_parameters())
    assert_same_tensors(dict(model.model.layers[1].named_parameters()), expected)


def test_skipping_all_experts_warns(checkpoint: Path) -> None:
    with pytest.warns(NoExpertsWarning, match=r"skipped by .*'model\.layers\.1\.mlp\.experts'"):
        model = mxfp4_fx.from_pretrained(checkpoint, skip=["model.layers.*.mlp"])
    expected = dequantized(checkpoint)
    assert_same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))


@pytest.mark.parametrize("skip", ["*.layers.1.*", "layers.1", "model.layers.(1|7)"])
def test_patterns_to_skip_are_those_of_the_backend(checkpoint: Path, skip: str) -> None:
    assert is_packed(mxfp4_fx.from_pretrained(checkpoint, skip=skip)) == [True, False]


def test_a_skipped_layer_is_saved_by_its_name(checkpoint: Path, tmp_path: Path) -> None:
    """transformers, which reads it, has another idea of patterns."""
    mxfp4_fx.from_pretrained(checkpoint, skip="*.layers.1.*").save_pretrained(tmp_path)
    entries = read_config(tmp_path)["quantization_config"]["modules_to_not_convert"]
    before = read_config(checkpoint)["quantization_config"]["modules_to_not_convert"]
    assert entries == [*before, "model.layers.1.mlp.experts"]
    expected = dict(dequantized(checkpoint).named_parameters())
    assert_same_tensors(dict(dequantized(tmp_path).named_parameters()), expected)


def marked(model: Any) -> list[bool]:
    return [getattr(m.mlp.experts, "_mxfp4_fx_keep_dense", False) for m in model.model.layers]


def test_skipped_experts_are_marked_for_the_backend_whatever_weights_they_get(
    checkpoint: Path,
) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, skip="model.layers.1")
    assert marked(model) == [False, True]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    assert marked(model) == [False, True]
    assert marked(copy.deepcopy(model)) == [False, True]
    assert marked(mxfp4_fx.from_pretrained(checkpoint)) == [False, False]


def test_a_name_to_skip_that_is_none(checkpoint: Path) -> None:
    with pytest.raises(
        OptionError, match=r"'model.layer.1' names no experts.*mean 'model.layers.1'"
    ):
        mxfp4_fx.from_pretrained(checkpoint, skip=["model.layers.1", "model.layer.1"])


def test_a_model_without_head(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, auto_class=AutoModel, skip="model.layers.0.mlp")
    assert is_packed(model) == [False, True]
    tensors = read_tensors(checkpoint)
    for name, parameter in model.layers[1].named_parameters():
        assert torch.equal(parameter, tensors[f"model.layers.1.{name}"]), name


def test_a_config_of_ones_own(checkpoint: Path) -> None:
    config = mxfp4_fx.from_pretrained(checkpoint).config
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    model = mxfp4_fx.from_pretrained(checkpoint, config=config)
    assert is_packed(model) == [True]
    assert config.quantization_config.quant_method == "mxfp4_fx"  # as it was


def test_options_of_the_config(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, attn_implementation="eager", rms_norm_eps=1e-3)
    assert model.config._attn_implementation == "eager"
    assert model.config.rms_norm_eps == 1e-3


def test_constants_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """Which reads them from the config or not, as its version is."""
    changed = copied(checkpoint, tmp_path / "copy")
    edit_config(changed, lambda config: config.update(swiglu_limit=3.0, swiglu_alpha=1.5))
    packed, dense = (
        model.model.layers[0].mlp.experts
        for model in (mxfp4_fx.from_pretrained(changed), dequantized(changed))
    )
    assert (packed.alpha, packed.limit) == (dense.alpha, dense.limit)


def test_gradients_reach_all_but_the_experts(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32)
    model(IDS).logits.square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if ".experts." in name}
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in without)
    assert model.hf_quantizer.is_trainable


def cached(checkpoint: Path, cache: Path) -> Path:
    """Puts a checkpoint into a cache of the Hub as someone/tiny; returns where its files lie."""
    repository = cache / "models--someone--tiny"
    files = shutil.copytree(checkpoint, repository / "snapshots" / ("a" * 40))
    (repository / "snapshots" / ("b" * 40)).mkdir()  # of a revision that was not downloaded
    (repository / "refs").mkdir()
    for name, revision in (("main", "b" * 40), ("good", "a" * 40)):
        (repository / "refs" / name).write_text(revision)
    return files


def from_cache(cache: Path, revision: str = "good", **kwargs: Any) -> Any:
    here = {"cache_dir": cache, "local_files_only": True, "revision": revision}
    return mxfp4_fx.from_pretrained("someone/tiny", **here, **kwargs)


def test_a_revision_in_the_cache_of_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    cached(checkpoint, tmp_path)
    parameters = dict(from_cache(tmp_path).named_parameters())
    assert_same_tensors(parameters, read_tensors(checkpoint))
    with pytest.raises(CheckpointError, match=r"someone/tiny has no config.json"):
        from_cache(tmp_path, "main")


def test_nan_blocks_are_reported(checkpoint: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5] = 255

    path = edit_tensors(copied(checkpoint, tmp_path / "copy"), spoil)
    with pytest.warns(NanWeightsWarning, match=r"3 MXFP4 .*layers.1.*down_proj_scales \(3\)"):
        mxfp4_fx.from_pretrained(path)
    with pytest.warns(NanWeightsWarning, match=r"3 MXFP4"):  # dense, or offloaded, they are NaN too
        mxfp4_fx.from_pretrained(path, skip="model.layers.1.mlp.experts")


def test_nan_blocks_are_counted_beside_the_loader(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong there goes wrong in the load."""

    def fail(self: Checkpoint, is_stopped: Callable[[], bool]) -> dict[str, int]:
        raise CheckpointError(f"counted in {threading.current_thread().name}")

    monkeypatch.setattr(Checkpoint, "nan_blocks", fail)
    with pytest.raises(CheckpointError, match=r"counted in mxfp4_fx$"):
        mxfp4_fx.from_pretrained(checkpoint)


def test_a_loaded_model_is_read_ahead(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(mapped, "read_ahead", lambda *given: seen.append((*map(list, given),)))
    model = mxfp4_fx.from_pretrained(checkpoint)
    ((experts, others),) = seen
    files = mapped.mapped_files()
    assert all(mapped.is_mapped(tensor, files) for tensor in [*experts, *others])
    assert {*map(id, experts)} == {
        id(p) for layer in model.model.layers for p in layer.mlp.experts.parameters()
    }


def test_the_name_of_a_config(checkpoint: Path) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, config=str(checkpoint))
    assert isinstance(model.model.layers[0].mlp.experts, PackedExperts)


# ---- what cannot be loaded ----------------------------------------------------------------------


def only_pickles(path: Path) -> None:
    for shard in path.glob("*.safetensors"):
        shard.rename(path / "pytorch_model.bin")
    (path / "model.safetensors.index.json").unlink()


def of_config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: edit_config(path, lambda config: config.update(changes))


def cut_shard(path: Path) -> None:
    shard = max(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def scribble(path: Path) -> None:
    min(path.glob("*.safetensors")).write_bytes(b"no safetensors file" * 10)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "half a config": (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read"),
    "only pickles": (only_pickles, "is a pickle"),
    "another model": (of_config(model_type="llama"), "model_type is 'llama'"),
    "a model nobody knows": (of_config(model_type="x"), "model_type is 'x'"),
    "another method": (
        of_config(quantization_config={"quant_method": "fp8"}),
        "quant_method is 'fp8'",
    ),
    "no safetensors": (scribble, "model-00000"),
    "damaged shard": (cut_shard, "is cut short"),
    "another size": (of_config(hidden_size=96), "hidden_size is 96, but 64"),
    "no size": (of_config(hidden_size=None), "hidden_size is None"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_loaded(checkpoint: Path, tmp_path: Path, spoil: Any, reason: str) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    spoil(path)
    with pytest.raises(CheckpointError, match=reason):
        mxfp4_fx.from_pretrained(path)


CACHED = {
    "another model": "model_type is 'llama', says that weights are vLLM's mxfp4",
    "another method": "someone/tiny says that quant_method is 'fp8'",
    "only pickles": "someone/tiny cannot be loaded",  # and were not downloaded
    "no safetensors": "someone/tiny cannot be loaded",
    "damaged shard": "is cut short",
    "no size": "transformers rejects the config.json of someone/tiny",
}


@pytest.mark.parametrize("what", CACHED)
def test_what_cannot_be_loaded_from_the_cache(checkpoint: Path, tmp_path: Path, what: str) -> None:
    """Where the files are is known only to transformers."""
    BAD[what][0](cached(checkpoint, tmp_path))
    with pytest.raises(CheckpointError, match=CACHED[what]):
        from_cache(tmp_path)


PATHS = {
    "/nowhere/at/all": "is no directory",
    "./nowhere": "is no directory",
    "nowhere/at/all": "is no directory",
    "nowhere": "has no config.json",
    "nobody/nothing": "has no config.json",
}


@pytest.mark.parametrize(("path", "reason"), PATHS.items(), ids=PATHS)
def test_a_path_that_leads_nowhere(path: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"{path} {reason}"):
        mxfp4_fx.from_pretrained(path, local_files_only=True)


def test_a_directory_without_config_whose_files_have_a_variant(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        mxfp4_fx.from_pretrained(tmp_path, variant="fp16")


def test_a_path_at_home(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert is_packed(mxfp4_fx.from_pretrained("~/packed")) == [True, True]


@pytest.mark.parametrize(
    "option",
    [
        *("quantization_config", "tp_plan", "tp_size", "use_kernels", "gguf_file"),
        *("load_in_4bit", "device_mesh"),
    ],
)
def test_options_that_make_no_sense(checkpoint: Path, option: str) -> None:
    with pytest.raises(OptionError, match=option):
        mxfp4_fx.from_pretrained(checkpoint, **{option: "auto"})


def test_a_scale_rule_that_there_is_not(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="scale_rule='least'"):
        mxfp4_fx.from_pretrained(checkpoint, scale_rule="least")


def test_pickles_cannot_be_asked_for(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="use_safetensors"):
        mxfp4_fx.from_pretrained(checkpoint, use_safetensors=False)


def test_without_transformers(checkpoint: Path) -> None:
    code = f"""{HIDE}
hide(["transformers"])
import mxfp4_fx
mxfp4_fx.from_pretrained({str(checkpoint)!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CheckpointError: loading needs transformers" in ended.stderr
