"""Checkpoints: what is wrong with one is told, by name and with a remedy, before it is loaded."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    TINY,
    copied,
    edit_config,
    edit_tensors,
    read_config,
    read_tensors,
    unpack_layers,
    without_prefix,
    write_dense,
    write_packed,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.quantizers.quantizers_utils import should_convert_module

from mxfp4_fx.checkpoints import consistency, safetensors_file
from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.checkpoints.random_weights import CheckpointShape
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning, NanWeightsWarning

Edit = Callable[[dict[str, Any]], object]

BLOCKS = f"{EXPERTS.format(1)}.down_proj_blocks"
SCALES = f"{EXPERTS.format(1)}.down_proj_scales"
SINKS = "model.layers.0.self_attn.sinks"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return copied(packed, tmp_path / "copy")


def setter(**entries: Any) -> Edit:
    return lambda target: target.update(entries)


def skip(*patterns: str) -> Edit:
    """Append to the config's modules_to_not_convert."""
    return lambda config: config["quantization_config"]["modules_to_not_convert"].extend(patterns)


# ---- what is right ------------------------------------------------------------------------------


def test_a_packed_checkpoint_is_right(packed: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    consistency.check(checkpoint)
    assert checkpoint.forms == {0: "packed", 1: "packed"}
    assert checkpoint.config == read_config(packed)
    assert len(checkpoint.files) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_dense_checkpoint_is_right(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(write_dense(tmp_path, dtype=dtype))
    consistency.check(checkpoint)
    assert checkpoint.forms == {0: "dense", 1: "dense"}


def test_layers_may_differ_if_the_config_says_so(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: unpack_layers(tensors, 1, dtype=torch.bfloat16))
    edit_config(copy, skip(EXPERTS.format(1)))
    checkpoint = Checkpoint.open(copy)
    consistency.check(checkpoint)
    assert checkpoint.forms == {0: "packed", 1: "dense"}


def test_a_base_models_checkpoint_is_right(copy: Path) -> None:
    checkpoint = Checkpoint.open(edit_tensors(copy, without_prefix))
    consistency.check(checkpoint)
    assert (checkpoint.prefix, checkpoint.experts(1)) == ("", "layers.1.mlp.experts")
    assert checkpoint.forms == {0: "packed", 1: "packed"}


def test_tied_embeddings_need_no_head(copy: Path) -> None:
    edit_config(copy, setter(tie_word_embeddings=True))
    edit_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    consistency.check(Checkpoint.open(copy))


def test_another_head_is_right(copy: Path) -> None:
    def replace_head(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.zeros(3, TINY.hidden)

    edit_config(copy, setter(architectures=["GptOssForSequenceClassification"]))
    consistency.check(Checkpoint.open(edit_tensors(copy, replace_head)))


def test_attention_without_biases_is_right(copy: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.bias")]:
            del tensors[name]

    edit_config(copy, setter(attention_bias=False))
    consistency.check(Checkpoint.open(edit_tensors(copy, drop)))


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )


def test_what_transformers_saved_is_right(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="200KB", save_original_format=False)
    checkpoint = Checkpoint.open(tmp_path)
    consistency.check(checkpoint)
    assert len(checkpoint.files) > 1
    assert checkpoint.forms == {0: "dense", 1: "dense"}


def test_transformers_files_and_config_make_a_checkpoint(packed: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config = Mxfp4Config(**config.quantization_config)
    files = [str(file) for file in packed.glob("*.safetensors")]
    checkpoint = Checkpoint(files, config.to_dict())
    consistency.check(checkpoint)
    assert checkpoint.tensors == Checkpoint.open(packed).tensors


def test_files_that_transformers_leaves_alone_are_left_alone(copy: Path) -> None:
    (copy / "training_args.bin").write_bytes(b"a pickle")
    (copy / "adapter_model.safetensors").write_bytes(b"something else")
    consistency.check(Checkpoint.open(copy))


def test_a_tensor_is_read_expert_by_expert(packed: Path) -> None:
    stored = Checkpoint.open(packed).tensors[BLOCKS]
    experts = torch.stack([stored.read(expert) for expert in range(TINY.experts)])
    assert torch.equal(experts, read_tensors(packed)[BLOCKS])


def test_gpt_oss_20b_is_checked_by_its_headers(tmp_path: Path) -> None:
    """13 GB that exist in the file system's books only."""
    write_packed(tmp_path, CheckpointShape(**{**vars(TINY), "layers": 24}))
    edit_config(tmp_path, setter(**_REAL_SIZES))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in read_tensors(tmp_path).items():
        sizes = _REAL[name.split(".", 3)[-1] if ".layers." in name else name]
        nbytes = tensor.itemsize * torch.Size(sizes).numel()
        dtype = "U8" if tensor.dtype == torch.uint8 else "BF16"
        header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end := end + nbytes]}
    assert end == 13_761_264_768  # total_size in the index of openai/gpt-oss-20b
    encoded = json.dumps(header).encode()
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with (tmp_path / "model.safetensors").open("wb") as sparse:
        sparse.write(len(encoded).to_bytes(8, "little") + encoded)
        sparse.truncate(8 + len(encoded) + end)
    consistency.check(Checkpoint.open(tmp_path))


_REAL_SIZES = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
}
_REAL = {
    "model.embed_tokens.weight": [201088, 2880],
    "model.norm.weight": [2880],
    "lm_head.weight": [201088, 2880],
    "input_layernorm.weight": [2880],
    "self_attn.q_proj.weight": [4096, 2880],
    "self_attn.q_proj.bias": [4096],
    "self_attn.k_proj.weight": [512, 2880],
    "self_attn.k_proj.bias": [512],
    "self_attn.v_proj.weight": [512, 2880],
    "self_attn.v_proj.bias": [512],
    "self_attn.o_proj.weight": [2880, 4096],
    "self_attn.o_proj.bias": [2880],
    "self_attn.sinks": [64],
    "mlp.router.weight": [32, 2880],
    "mlp.router.bias": [32],
    "mlp.experts.gate_up_proj_blocks": [32, 5760, 90, 16],
    "mlp.experts.gate_up_proj_scales": [32, 5760, 90],
    "mlp.experts.gate_up_proj_bias": [32, 5760],
    "mlp.experts.down_proj_blocks": [32, 2880, 90, 16],
    "mlp.experts.down_proj_scales": [32, 2880, 90],
    "mlp.experts.down_proj_bias": [32, 2880],
    "post_attention_layernorm.weight": [2880],
}


# ---- the directory ------------------------------------------------------------------------------


def refuse(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        consistency.check(Checkpoint.open(path))
    return str(caught.value)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    refuse(tmp_path / "no", r"/no does not exist: name a checkpoint's directory on this machine")


def test_a_file_instead_of_a_directory(packed: Path) -> None:
    refuse(packed / "config.json", r"config\.json is a file: name a checkpoint's directory")


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    refuse(copy, r"/copy has no config\.json: name a checkpoint's directory, or copy or download")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json_object(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text, errors="surrogateescape")
    refuse(copy, r"config\.json (cannot be read|holds no JSON object).*: copy or download")


def test_no_weights(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    refuse(copy, r"has no weights, but neither model\.safetensors nor .*: copy or download")


def test_shards_without_an_index(copy: Path) -> None:
    (copy / "model.safetensors.index.json").unlink()
    refuse(copy, r"only model-00000-of-\d+\.safetensors, .* nor model\.safetensors\.index\.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused(copy: Path, name: str) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / name).write_bytes(b"\x80\x02}q\x00.")
    message = refuse(copy, rf"{name} is a pickle, which may run any code")
    assert message.endswith("with transformers' model.save_pretrained")


def test_files_that_are_named_are_safetensors(packed: Path) -> None:
    config = read_config(packed)
    for name, message in (("a.bin", "is a pickle"), ("a.gguf", r"is no \.safetensors file")):
        with pytest.raises(CheckpointError, match=rf"{name} {message}"):
            Checkpoint([packed / name], config)
    with pytest.raises(CheckpointError, match="there are no weights: name"):
        Checkpoint([], config)


def test_a_truncated_shard(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse(copy, rf"{shard.name} is cut short: it has \d+ bytes, .*: copy or download the file")


def test_a_tensor_in_two_shards(copy: Path) -> None:
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    refuse(copy, rf"lies both in .*{first.name} and in .*{second.name}: remove the file")


# ---- the index ----------------------------------------------------------------------------------


def edit_index(path: Path, edit: Edit) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_without_a_map(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refuse(copy, r"index\.json has no weight_map: copy or download")


def test_a_shard_of_the_index_is_absent(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(copy, rf"index\.json names {shard.name}, which is not there: copy or download it")


def test_a_shard_of_the_index_is_elsewhere(copy: Path) -> None:
    edit_index(copy, setter(**{SINKS: "../model.safetensors"}))
    refuse(copy, r"index\.json names '\.\./model\.safetensors', no file beside it")


STALE: dict[str, tuple[str, Edit]] = {
    "a tensor is not in it": (SINKS, lambda index: index.pop(SINKS)),
    "it has another": ("model.x", lambda index: index.update({"model.x": index[SINKS]})),
    "a tensor is in another shard": (
        SINKS,
        lambda index: index.update({SINKS: index["lm_head.weight"]}),
    ),
}


@pytest.mark.parametrize(("name", "edit"), STALE.values(), ids=STALE)
def test_an_index_that_is_not_the_shards_own_is_named(copy: Path, name: str, edit: Edit) -> None:
    """Of an index, transformers reads which files there are, and takes all that lies in them."""
    edit_index(copy, edit)
    with pytest.warns(CheckpointWarning, match=rf"index\.json does not match .*: {name} is in "):
        consistency.check(Checkpoint.open(copy))


def test_an_index_that_promises_a_tensor_that_is_missing(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    del tensors[SINKS]
    save_file(tensors, shard)
    with pytest.warns(CheckpointWarning):
        refuse(copy, rf"1 of \d+ tensors are not in .*: {SINKS}; copy or download")


# ---- tensors ------------------------------------------------------------------------------------


def test_a_missing_tensor(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(SINKS))
    refuse(copy, rf"1 of \d+ tensors are not in model\.safetensors: {SINKS}; copy or download")


def test_a_missing_head(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    refuse(copy, r"1 of \d+ tensors are not in model\.safetensors: lm_head\.weight;")


def test_only_some_of_many_missing_tensors_are_listed(copy: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".0." in name]:
            del tensors[name]

    edit_tensors(copy, drop)
    refuse(copy, r"19 of 41 tensors .*: model\.layers\.0\.input_layernorm.* and 15 more; copy")


# What training and other programs leave in files: transformers leaves it out, too.
STRAYS = {
    "model.rotary_emb.inv_freq": "as transformers does it",
    "model.layers.1.self_attn.rotary_emb.inv_freq": "as transformers does it",
    "model.layers.0.mlp._extra_state": "as transformers does it",
    "model.layers.0.mlp.gate.weight": "as transformers does it",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "adapter's among them: .* peft.PeftModel",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight": "adapter's among",
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_tensor_that_no_model_has_is_named_and_left_out(copy: Path, name: str) -> None:
    edit_tensors(copy, setter(**{name: torch.zeros(4)}))
    checkpoint = Checkpoint.open(copy)
    consistency.check(checkpoint)
    assert consistency.strays(checkpoint) == [name]
    with pytest.warns(CheckpointWarning, match=rf"1 tensors do .*{name} in .*; .*{STRAYS[name]}"):
        consistency.warn_of_strays(checkpoint)


def test_without_strays_nothing_is_said(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        consistency.warn_of_strays(Checkpoint.open(packed))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        f"{EXPERTS.format(1)}.gate_up_proj",
        f"{EXPERTS.format(1)}.down_proj",
    ],
)
def test_a_tensor_that_the_config_says_is_not_there(copy: Path, name: str) -> None:
    """Left out, it would make another model: attention without its biases."""
    edit_config(copy, setter(attention_bias=False))

    def edit(tensors: dict[str, Tensor]) -> None:
        for other in [other for other in tensors if other.endswith("_proj.bias")]:
            del tensors[other]
        tensors[name] = torch.zeros(64)

    edit_tensors(copy, edit)
    remedy = "use the config" if name.endswith("bias") else "copy or download all files from one"
    refuse(copy, rf"1 tensors do not belong to the model .*: {name} in .*; {remedy}")


def test_a_wrong_shape(copy: Path) -> None:
    edit_tensors(copy, setter(**{SINKS: torch.zeros(5)}))
    refuse(copy, rf"{SINKS} in .*model\.safetensors has shape \[5\] and should have \[4\]: copy")


def test_transposed_dense_experts(dense: Path, tmp_path: Path) -> None:
    path, name = copied(dense, tmp_path / "copy"), f"{EXPERTS.format(0)}.gate_up_proj"
    edit_tensors(path, lambda t: t.update({name: t[name].transpose(1, 2).contiguous()}))
    refuse(path, rf"{name} in .* has shape \[4, 192, 64\] .* \[4, 64, 192\]: transpose it$")


def test_a_wrong_dtype(copy: Path) -> None:
    edit_tensors(copy, setter(**{SINKS: torch.zeros(4, dtype=torch.int64)}))
    refuse(copy, rf"{SINKS} in .* is int64: save it in one of bfloat16, float16, float32")


def test_blocks_of_a_wrong_dtype(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS].to(torch.int8)}))
    refuse(copy, rf"{BLOCKS} in .* is int8: save it in one of uint8")


@pytest.mark.parametrize(("name", "other"), [(BLOCKS, "blocks"), (SCALES, "scales")])
def test_blocks_and_scales_need_each_other(copy: Path, name: str, other: str) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    left = SCALES if name == BLOCKS else BLOCKS
    refuse(copy, rf"{left} in .*model\.safetensors has no {other}: copy or download")


def test_dense_experts_that_are_called_blocks(model: Any, tmp_path: Path) -> None:
    """transformers saves a model so that it has dequantized, and then cannot load it itself."""
    model.save_pretrained(tmp_path)
    refuse(
        tmp_path, r"_blocks in .* dense experts under an MXFP4 name: .*_original_format=False\)$"
    )


# ---- the config against the tensors -------------------------------------------------------------

WRONG_SIZES = {
    "num_local_experts": (32, r"num_local_experts is 32, but 4 in the tensors \(.* is \[4, "),
    "hidden_size": (128, r"hidden_size is 128, but 64 in the tensors \(model\.embed_tokens"),
    "intermediate_size": (64, r"2 \* intermediate_size is 128, but 192 in the tensors"),
    "num_attention_heads": (8, "num_attention_heads is 8, but 4 in the tensors"),
    "num_key_value_heads": (4, r"num_key_value_heads \* head_dim is 64, but 32 in the tensors"),
    "head_dim": (32, r"num_attention_heads \* head_dim is 128, but 64 in the tensors"),
    "vocab_size": (500, r"vocab_size is 500, but 512 in the tensors \(model\.embed_tokens"),
    "num_hidden_layers": (3, "num_hidden_layers is 3, but the tensors are those of 2"),
}


@pytest.mark.parametrize("key", WRONG_SIZES)
def test_a_size_that_is_not_the_tensors(copy: Path, key: str) -> None:
    value, message = WRONG_SIZES[key]
    edit_config(copy, setter(**{key: value}))
    text = refuse(copy, message)
    assert text.startswith(f"{copy / 'config.json'} says that ")
    assert "use the config.json that belongs to these weights" in text


def test_more_layers_than_the_config_says(copy: Path) -> None:
    edit_config(copy, setter(num_hidden_layers=1))
    refuse(copy, "num_hidden_layers is 1, but the tensors are those of 2")


@pytest.mark.parametrize("value", [0, -1, "64", None, 64.0, True])
def test_a_size_that_is_none(copy: Path, value: object) -> None:
    edit_config(copy, setter(hidden_size=value))
    refuse(copy, rf"config\.json says that hidden_size is {value!r}: use the config\.json")


def test_a_size_that_is_absent(copy: Path) -> None:
    edit_config(copy, lambda config: config.pop("head_dim"))
    refuse(copy, r"config\.json has no head_dim: use the config\.json")


def test_a_size_that_makes_no_blocks(copy: Path) -> None:
    edit_config(copy, setter(hidden_size=65))
    refuse(copy, "hidden_size is 65, but MXFP4 needs a multiple of 32")


def test_another_models_config(copy: Path) -> None:
    edit_config(copy, setter(model_type="mixtral"))
    refuse(copy, "model_type is 'mixtral': name a checkpoint of GPT-OSS")


def test_packed_experts_that_the_config_does_not_know_of(copy: Path) -> None:
    edit_config(copy, lambda config: config.pop("quantization_config"))
    experts = ", ".join(map(EXPERTS.format, range(2)))
    refuse(copy, rf"{experts} are packed, but .*config\.json does not say .* mxfp4: use the config")


def test_dense_experts_that_the_config_calls_packed(dense: Path, tmp_path: Path) -> None:
    path = copied(dense, tmp_path / "copy")
    edit_config(path, setter(quantization_config={"quant_method": "mxfp4"}))
    message = refuse(path, rf"{EXPERTS.format(0)}, .* are dense, but .*quant_method is mxfp4")
    assert "pack them with python -m mxfp4_fx quantize, or use the config.json" in message


def test_a_packed_layer_that_the_config_leaves_out(copy: Path) -> None:
    edit_config(copy, skip("model.layers.1"))
    refuse(copy, rf"^{EXPERTS.format(1)} is packed, but modules_to_not_convert in .*config\.json")


def test_another_quantization(copy: Path) -> None:
    edit_config(copy, setter(quantization_config={"quant_method": "fp8"}))
    refuse(copy, "quant_method is 'fp8': name a checkpoint in mxfp4, or one that is not quantized")


# ---- modules_to_not_convert ---------------------------------------------------------------------

PATTERNS = [
    *("model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.experts", "model.layers.*"),
    *("model.layers.*.self_attn", "experts", "mlp.experts", "1.mlp.experts", "layers.1", "model"),
    *("lm_head", "model.layers.1.m", "model.layers.(1|7)", "model.layers.[02].mlp", "erts", ""),
    *(
        "model.layers.1|lm_head",
        ".*",
        r"model\.layers\.1\.",
        "model.layers.1.mlp.experts.down_proj",
    ),
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    shape = CheckpointShape(**{**vars(TINY), "layers": 12})
    return Checkpoint.open(write_packed(tmp_path_factory.mktemp("deep"), shape))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_transformers(deep: Checkpoint, pattern: str) -> None:
    layers = {i for i in range(12) if not should_convert_module(EXPERTS.format(i), [pattern])}
    assert deep.matching(pattern) == layers


def test_a_pattern_that_is_no_expression(deep: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"'\(1' is no regular expression .*: name a module"):
        deep.matching("(1")


@pytest.mark.parametrize("pattern", ["layers.1", "model.layers.1"])
def test_a_base_models_experts_have_both_names(copy: Path, pattern: str) -> None:
    assert Checkpoint.open(edit_tensors(copy, without_prefix)).matching(pattern) == {1}


# ---- NaN ----------------------------------------------------------------------------------------


def test_nan_blocks_are_counted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 7)  # of a tensor, at a time

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[SCALES][0, 0, 0] = 255
        tensors[SCALES][3, -1, 1:] = 255

    edit_tensors(copy, damage)
    checkpoint = Checkpoint.open(copy)
    consistency.check(checkpoint)
    assert checkpoint.nan_blocks() == {SCALES: 3}


def test_nan_blocks_are_reported(packed: Path) -> None:
    with pytest.warns(NanWeightsWarning, match=rf"3 MXFP4 blocks are NaN .*, in {SCALES} \(3\):"):
        warn_of_nan_blocks({SCALES: 3})


def test_without_nan_nothing_is_said(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_nan_blocks(Checkpoint.open(packed).nan_blocks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("mxfp4", "quantization_config is 'mxfp4' in .*config.json, not an object"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": "lm_head"}, "not a list of names"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": [5]}, "not a list of names"),
    ],
)
def test_a_quantization_config_of_other_types(
    packed: Path, tmp_path: Path, settings: Any, message: str
) -> None:
    path = copied(packed, tmp_path / "copy")
    edit_config(path, lambda config: config.update(quantization_config=settings))
    with pytest.raises(CheckpointError, match=message):
        consistency.check(Checkpoint.open(path))
