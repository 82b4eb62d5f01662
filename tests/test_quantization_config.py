"""``quantization_config=mxfp4_fx.Mxfp4Config()``: packed experts by transformers' own loading."""

from __future__ import annotations

import gc
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    EXPERTS,
    TINY,
    copied,
    edit_config,
    edit_tensors,
    read_config,
    read_tensors,
    write_packed,
)
from loaded import (
    SECOND_LAYER_ON_DISK,
    assert_same_tensors,
    dequantized,
    logits,
    measured,
    write_dense,
)
from test_loading import cached, is_packed
from test_quantize_on_load import LiveDense, quantized
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GptOssForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import mxfp4_fx
from mxfp4_fx.core.errors import CheckpointError, NoExpertsWarning, OptionError
from mxfp4_fx.core.formats import SLAB_VALUES

CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GptOssForCausalLM,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "dense"
    return write_dense(path, packed, torch.bfloat16)


def load(
    path: Path, auto_class: Any = AutoModelForCausalLM, given: Any = None, **kwargs: Any
) -> Any:
    """Load with transformers; `given` is the config, by default one without arguments."""
    given = given or mxfp4_fx.Mxfp4Config()
    return auto_class.from_pretrained(path, quantization_config=given, **kwargs)


def parameters(model: Any) -> dict[str, Tensor]:
    """The parameters that checkpoints have: a head for another task is random."""
    return {n: p for n, p in model.named_parameters() if not n.startswith("score.")}


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("auto_class", CLASSES, ids=lambda c: c.__name__)
def test_every_class_loads_what_from_pretrained_loads(
    packed: Path, dense: Path, kind: str, auto_class: Any
) -> None:
    path = {"packed": packed, "dense": dense}[kind]
    model = load(path, auto_class)
    assert is_packed(model) == [True, True]
    expected = mxfp4_fx.from_pretrained(path, auto_class=auto_class)
    assert_same_tensors(parameters(model), parameters(expected))
    assert model.config.to_dict() == expected.config.to_dict()


def test_a_pipeline(packed: Path) -> None:
    given = mxfp4_fx.Mxfp4Config(skip="layers.1")
    pipe = pipeline("text-generation", str(packed), model_kwargs={"quantization_config": given})
    assert is_packed(pipe.model) == [True, False]
    assert pipe("Hello", max_new_tokens=2)[0]["generated_text"].startswith("Hello")


@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_a_trainer_trains_all_but_the_experts(packed: Path, tmp_path: Path, compiled: bool) -> None:
    model = load(packed, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if compiled:
        model.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(2)]
    settings = {"max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": []}
    arguments = TrainingArguments(tmp_path, learning_rate=0.01, disable_tqdm=True, **settings)
    Trainer(model, arguments, train_dataset=rows).train()
    after = dict(model.named_parameters())
    frozen = {name for name, p in after.items() if torch.equal(p, before[name])}
    assert frozen == {name for name in after if ".experts." in name}
    # What the Trainer has saved is a checkpoint for everybody.
    saved = mxfp4_fx.from_pretrained(tmp_path / "checkpoint-1")
    assert_same_tensors(dict(saved.named_parameters()), after)


def test_a_saved_model_is_a_checkpoint_for_everybody(packed: Path, tmp_path: Path) -> None:
    load(packed).save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(packed))
    settings = (read_config(path)["quantization_config"] for path in (tmp_path, packed))
    assert next(settings) == next(settings)
    expected = parameters(dequantized(packed))
    assert_same_tensors(parameters(dequantized(tmp_path)), expected)
    assert_same_tensors(parameters(load(tmp_path).dequantize()), expected)


def test_what_was_dense_is_saved_packed(dense: Path, tmp_path: Path) -> None:
    load(dense).save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), quantized(dense))
    assert_same_tensors(parameters(load(tmp_path)), quantized(dense))


def test_experts_to_skip_in_either_way(packed: Path, tmp_path: Path) -> None:
    """By our rule, by transformers', and by that in the checkpoint's config."""
    experts = EXPERTS.format(0)
    for given in (mxfp4_fx.Mxfp4Config(skip="layers.0"), mxfp4_fx.Mxfp4Config([experts])):
        model = load(packed, given=given)
        assert is_packed(model) == [False, True]
        entries = model.config.quantization_config.modules_to_not_convert
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert entries[-1] == experts
        assert entries[:-1] == read_config(packed)["quantization_config"]["modules_to_not_convert"]
        assert is_packed(load(tmp_path)) == [False, True]
        assert_same_tensors(parameters(load(tmp_path)), parameters(model))


def test_a_config_serves_several_models(packed: Path, dense: Path) -> None:
    given = mxfp4_fx.Mxfp4Config(skip="layers.1")
    for path in (packed, dense, packed):
        model = load(path, GptOssForCausalLM, given)  # Auto classes pass a copy on
        assert is_packed(model) == [True, False]
        modules = model.config.quantization_config.modules_to_not_convert
        assert modules.count(EXPERTS.format(1)) == 1
    assert given.modules_to_not_convert is None


def test_a_config_of_a_loaded_model(packed: Path) -> None:
    config = load(packed, given=mxfp4_fx.Mxfp4Config(skip="layers.1")).config
    for again in (
        AutoModelForCausalLM.from_pretrained(packed, config=config),
        load(packed, config=config),
        mxfp4_fx.from_pretrained(packed, config=config),
    ):
        assert is_packed(again) == [True, False]
        assert again.config.to_dict() == config.to_dict()


def test_files_without_a_config_beside_them(packed: Path, dense: Path, tmp_path: Path) -> None:
    """As with a config of the user's and files on the Hub."""
    for path in (packed, dense):
        alone = shutil.copytree(path, tmp_path / path.name)
        (alone / "config.json").unlink()
        config = AutoConfig.from_pretrained(path)
        expected = parameters(mxfp4_fx.from_pretrained(path))
        assert_same_tensors(parameters(load(alone, config=config)), expected)
        config.hidden_size = 96
        with pytest.raises(CheckpointError, match="the config says that hidden_size is 96"):
            load(alone, config=config)


def test_the_scale_rule(dense: Path) -> None:
    model = load(dense, given=mxfp4_fx.Mxfp4Config(scale_rule="search"))
    expected = mxfp4_fx.from_pretrained(dense, scale_rule="search")
    assert_same_tensors(parameters(model), parameters(expected))


def test_a_name_on_the_hub(packed: Path, tmp_path: Path) -> None:
    cached(packed, tmp_path)
    here = {"cache_dir": tmp_path, "local_files_only": True, "revision": "good"}
    assert_same_tensors(parameters(load("someone/tiny", **here)), read_tensors(packed))


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_a_layer_on_disk(packed: Path, dense: Path, tmp_path: Path, kind: str) -> None:
    path = {"packed": packed, "dense": dense}[kind]
    model = load(path, device_map=SECOND_LAYER_ON_DISK, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.experts.down_proj_blocks.is_meta
    assert torch.equal(logits(model), logits(load(path)))


# ---- memory -------------------------------------------------------------------------------------


def test_dense_weights_are_read_one_after_the_other(dense: Path) -> None:
    gc.freeze()  # what is there already need not be looked through each time
    try:
        with LiveDense() as dense_weights:
            load(dense)
    finally:
        gc.unfreeze()
    assert dense_weights.most == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.exhaustive
def test_memory_is_that_of_from_pretrained(packed: Path, tmp_path: Path) -> None:
    """Packed weights are pages of their file; of dense ones, the packed model and one slab."""
    shape = replace(TINY, hidden=1024, intermediate=1024, experts=8, layers=1)
    large = write_packed(tmp_path / "packed", shape)
    paths = packed, large, write_dense(tmp_path / "dense", large, torch.bfloat16, range(1))
    code = f"""
import mxfp4_fx
from transformers import AutoModelForCausalLM
for path in {[str(path) for path in paths]!r}:
    peak, model = Peak(), None
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=mxfp4_fx.Mxfp4Config())
    print(peak.bytes - peak.start_bytes, sum(p.nbytes for p in model.parameters()))
"""
    # The first one is what is imported and made once.
    of_packed, packed_bytes, of_dense, same_bytes = measured(code)[2:]
    assert same_bytes == packed_bytes > 10 * SLAB_VALUES
    assert of_packed < 10 * SLAB_VALUES
    assert of_dense < 10 * SLAB_VALUES + packed_bytes


# ---- what cannot be loaded ----------------------------------------------------------------------


def test_the_files_are_checked(packed: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{EXPERTS.format(1)}.down_proj_scales"]

    path = edit_tensors(copied(packed, tmp_path / "copy"), spoil)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks in .* has no scales"):
        load(path)


def test_the_config_beside_the_files_is_checked(packed: Path, tmp_path: Path) -> None:
    path = edit_config(copied(packed, tmp_path / "copy"), lambda c: c.update(hidden_size=96))
    with pytest.raises(CheckpointError, match=r"config\.json says that hidden_size is 96"):
        load(path)


def test_another_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type is 'llama': name a checkpoint of GPT"):
        load(tmp_path)


def test_another_method(packed: Path, tmp_path: Path) -> None:
    path = shutil.copytree(packed, tmp_path / "copy")
    edit_config(path, lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ValueError, match="passing a Mxfp4Config"):  # transformers' own
        load(path)


def test_only_pickles(packed: Path, tmp_path: Path) -> None:
    path = shutil.copytree(packed, tmp_path / "copy")
    for file in (*path.glob("*.safetensors"), *path.glob("*.index.json")):
        file.unlink()
    torch.save(read_tensors(packed), path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load(path)


def test_a_name_to_skip_that_is_none(packed: Path) -> None:
    with pytest.raises(OptionError, match=r"'layer\.1' names no experts"):
        load(packed, given=mxfp4_fx.Mxfp4Config(skip="layer.1"))


def test_skipping_all_experts_warns(packed: Path) -> None:
    with pytest.warns(NoExpertsWarning, match="skipped by"):
        load(packed, given=mxfp4_fx.Mxfp4Config(skip="mlp.experts"))


def test_other_kernels(packed: Path) -> None:
    with pytest.raises(OptionError, match="use_kernels"):
        load(packed, use_kernels=True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dequantize": True}, r"transformers\.Mxfp4Config\(dequantize=True\)"),
        ({"scale_rule": "least"}, "scale_rule='least'"),
        ({"skip": 3}, "skip=3"),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_without_meaning(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        mxfp4_fx.Mxfp4Config(**arguments)
