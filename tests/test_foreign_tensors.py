"""Checkpoints of other programs and of training: what they are is told, and what would help."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    PROJECTIONS,
    copied,
    edit_config,
    edit_tensors,
    write_dense,
    write_packed,
)
from checkpoints import read_tensors as read
from loaded import assert_same_tensors
from torch import Tensor

import mxfp4_fx
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning, OptionError

Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_packed(tmp_path_factory.mktemp("packed") / "in")
    return edit_tensors(path, lambda tensors: None)  # in one file


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return copied(packed, tmp_path / "copy")


def renamed(rename: Callable[[str], str]) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return edit


def refuse(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        mxfp4_fx.from_pretrained(path)
    return str(caught.value)


# ---- names that wrappers have changed -----------------------------------------------------------


def inside_layers(name: str) -> str:
    return re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name)


# What changes the names -> what the message says of them, and the key_mapping that it offers.
WRAPPED: dict[str, tuple[Callable[[str], str], str, str]] = {
    "torch.compile": (
        lambda n: f"_orig_mod.{n}",
        "'_orig_mod.' (from torch.compile)",
        r'{r"^_orig_mod\.": ""}',
    ),
    "DDP": (
        lambda n: f"module.{n}",
        "'module.' (from DistributedDataParallel)",
        r'{r"^module\.": ""}',
    ),
    "both": (
        lambda n: f"module._orig_mod.{n}",
        "'module._orig_mod.' (from torch.compile and DistributedDataParallel)",
        r'{r"^module\._orig_mod\.": ""}',
    ),
    "PEFT": (
        lambda n: f"base_model.model.{n}",
        "'base_model.model.' (from PEFT)",
        r'{r"^base_model\.model\.": ""}',
    ),
    "compiled layers": (
        inside_layers,
        "'_orig_mod.' (from torch.compile)",
        r'{r"_orig_mod\.": ""}',
    ),
    "another attribute": (lambda n: f"net.{n}", "'net.'", r'{r"^net\.": ""}'),
}


@pytest.mark.parametrize("what", WRAPPED)
def test_wrapped_names_are_told_and_the_key_mapping_that_is_offered_serves(
    packed: Path, copy: Path, what: str
) -> None:
    rename, parts, mapping = WRAPPED[what]
    edit_tensors(copy, renamed(rename))
    message = refuse(copy, r"\d+ of 4\d tensors are not in model\.safetensors: ")
    assert f"the names in the files have the extra part {parts}: save the model" in message
    assert f"key_mapping={mapping} to mxfp4_fx.from_pretrained" in message
    key_mapping = eval(mapping)  # what a user copies from the message
    model = mxfp4_fx.from_pretrained(copy, key_mapping=key_mapping)
    assert_same_tensors(dict(model.named_parameters()), read(packed))


def test_dense_experts_with_a_key_mapping(dense: Path, tmp_path: Path) -> None:
    """They are quantized, or dense if they are skipped, and saved under the model's own names."""
    path = edit_tensors(copied(dense, tmp_path / "copy"), renamed(lambda n: f"module.{n}"))
    options: dict[str, Any] = {"skip": "layers.1", "key_mapping": {r"^module\.": ""}}
    model = mxfp4_fx.from_pretrained(path, **options)
    expected = mxfp4_fx.from_pretrained(dense, skip="layers.1")
    assert_same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))
    model.save_pretrained(tmp_path / "out")
    assert_same_tensors(read(tmp_path / "out"), dict(expected.named_parameters()))


@pytest.mark.parametrize("key_mapping", ["module.", {"(": ""}, {"module.": 5}])
def test_a_key_mapping_that_is_none(packed: Path, key_mapping: Any) -> None:
    with pytest.raises(OptionError, match=r"key_mapping=.*regular expressions for parts of names"):
        mxfp4_fx.from_pretrained(packed, key_mapping=key_mapping)


def test_a_key_mapping_that_makes_two_names_one(packed: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"key_mapping gives model.* and model.* the same name"
    ):
        mxfp4_fx.from_pretrained(packed, key_mapping={r"layers\.1\.": "layers.0."})


# ---- other layouts ------------------------------------------------------------------------------


def one_by_one(tensors: dict[str, Tensor]) -> None:
    for layer in range(2):
        for projection in PROJECTIONS:
            name = EXPERTS.format(layer)
            for i, expert in enumerate(tensors.pop(f"{name}.{projection}").unbind()):
                tensors[f"{name}.{i}.{projection}.weight"] = expert.T.contiguous()


def unmerged(tensors: dict[str, Tensor]) -> None:
    renamed(lambda n: n.replace("q_proj.", "q_proj.base_layer."))(tensors)
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 64)


def without(*ends: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ends)]:
            del tensors[name]

    return edit


LAYOUTS: dict[str, tuple[Edit, str]] = {
    "experts one by one": (
        one_by_one,
        r"; the files hold experts one by one \(model\.layers\.0\.mlp\.experts\.0\.down_proj\."
        r"weight\): save them in the layout of transformers, .* gate in the even columns",
    ),
    "experts in a list": (
        renamed(lambda n: re.sub(r"experts\.(\w+)$", r"experts.\1s.0.weight", n)),
        r"the files hold experts one by one",
    ),
    "an adapter beside its base": (unmerged, r"adapter is not merged: .* merge_and_unload\(\)"),
    "OpenAI's own": (
        renamed(lambda n: n.replace("model.layers.", "block.").replace("self_attn", "attn")),
        r"OpenAI's own layout, .* in the folder above",
    ),
    "flat parameters": (
        lambda t: (t.clear(), t.update({"model._flat_param": torch.zeros(9)})),
        "FSDP's flat ones: save a full state dict",
    ),
    "no head": (without("lm_head.weight"), r'"tie_word_embeddings": true; else save the model'),
    "no biases": (without("_proj.bias"), r'config\.json ought to say "attention_bias": false'),
    "just incomplete": (without("norm.weight"), "; copy or download the checkpoint again$"),
}


@pytest.mark.parametrize(("edit", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_another_layout_is_told_with_a_remedy(
    dense: Path, tmp_path: Path, edit: Edit, message: str
) -> None:
    refuse(edit_tensors(copied(dense, tmp_path / "copy"), edit), message)


def test_a_head_that_is_the_embedding_as_the_message_says(copy: Path) -> None:
    edit_tensors(copy, without("lm_head.weight"))
    edit_config(copy, lambda config: config.update(tie_word_embeddings=True))
    model = mxfp4_fx.from_pretrained(copy)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_strays_do_not_keep_a_model_from_loading(packed: Path, copy: Path) -> None:
    strays = ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.q_proj.lora_A.weight")
    edit_tensors(copy, lambda t: t.update({name: torch.zeros(4) for name in strays}))
    with pytest.warns(CheckpointWarning) as caught:
        model = mxfp4_fx.from_pretrained(copy)
    (warning,) = [w for w in caught if issubclass(w.category, CheckpointWarning)]
    assert all(name in str(warning.message) for name in strays)
    assert_same_tensors(dict(model.named_parameters()), read(packed))


# ---- sizes --------------------------------------------------------------------------------------


def test_other_sizes_are_ignored_on_request(packed: Path, copy: Path) -> None:
    """transformers makes new weights where the sizes differ, and takes all others."""
    edit_config(copy, lambda config: config.update(vocab_size=600))
    refuse(copy, "vocab_size is 600, but 512 in the tensors")
    model = mxfp4_fx.from_pretrained(copy, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (600, 64)
    expected = read(packed)
    for name, parameter in model.named_parameters():
        if parameter.shape[0] != 600:
            assert torch.equal(parameter, expected[name]), name


def test_experts_of_other_sizes_are_not(copy: Path) -> None:
    edit_config(copy, lambda config: config.update(intermediate_size=64))
    with pytest.raises(CheckpointError, match="intermediate_size is 128, but 192 in the tensors"):
        mxfp4_fx.from_pretrained(copy, ignore_mismatched_sizes=True)


# ---- directories that are something else --------------------------------------------------------


def empty_of_weights(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        file.unlink()


def make_adapter(path: Path) -> None:
    empty_of_weights(path)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (path / "adapter_model.safetensors").write_bytes(b"")


def make_adapter_without_config(path: Path) -> None:
    make_adapter(path)
    (path / "config.json").unlink()


def leave_of_training(*names: str) -> Callable[[Path], None]:
    def leave(path: Path) -> None:
        empty_of_weights(path)
        for name in names:
            (path / name).write_bytes(b"\x80")

    return leave


def make_output_of_training(path: Path) -> None:
    leave_of_training("training_args.bin")(path)
    (path / "checkpoint-5").mkdir()
    (path / "checkpoint-5" / "config.json").write_text("{}")


ADAPTER = r"copy is a PEFT adapter, no model: load its base \(some/base\) with .*PeftModel"
DIRECTORIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an adapter": (make_adapter, ADAPTER),
    "an adapter without config": (make_adapter_without_config, ADAPTER),
    "an optimizer's state": (
        leave_of_training("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"),
        r"copy has no weights, but neither model\.safetensors nor",
    ),
    "training's output": (make_output_of_training, r"again \(.*/checkpoint-5 has one\)$"),
    "GGUF": (leave_of_training("model-Q4.gguf"), r"has only model-Q4\.gguf, which is GGUF: name"),
    "pickles": (leave_of_training("optimizer.pt", "pytorch_model.bin"), r"_model\.bin is a pickle"),
}


@pytest.mark.parametrize(("make", "message"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_directory_that_is_something_else(copy: Path, make: Any, message: str) -> None:
    make(copy)
    refuse(copy, message)
