"""Quantizing a checkpoint: the right bytes in bounded memory, or an error with a remedy."""

import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    PROJECTIONS,
    convert,
    copied,
    edit_config,
    edit_tensors,
    files,
    randomize,
    read_config,
    read_tensors,
    unpack_layers,
    without_prefix,
    write_dense,
    write_packed,
    write_sparse,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Mxfp4Config

from mxfp4_fx.checkpoints import consistency
from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.quantized_item import Item
from mxfp4_fx.checkpoints.safetensors_file import TensorSpec, read_header, write_safetensors
from mxfp4_fx.checkpoints.single_experts import packed_specs
from mxfp4_fx.cli import main
from mxfp4_fx.core.errors import CheckpointError, NanWeightsWarning, OptionError
from mxfp4_fx.core.formats import SLAB_VALUES, dequantize, quantize

GATE_UP = f"{EXPERTS.format(0)}.gate_up_proj"
OPENAI = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values that are no MXFP4, in bfloat16."""
    path = write_dense(tmp_path_factory.mktemp("dense"))
    return edit_tensors(path, randomize)


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(dense, tmp_path_factory.mktemp("quantized"))


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_are_quantized_and_all_else_is_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    source = edit_tensors(write_dense(tmp_path / "in", dtype=dtype), randomize)
    before = read_tensors(source)
    after = read_tensors(convert(source, tmp_path / "out"))
    for name in [name for name in before if name.endswith(PROJECTIONS)]:
        values = before.pop(name)
        assert values.dtype == dtype
        blocks, scales = quantize(values.transpose(1, 2).contiguous())
        assert torch.equal(after.pop(f"{name}_blocks"), blocks), name
        assert torch.equal(after.pop(f"{name}_scales"), scales), name
    assert before.keys() == after.keys()
    assert all(raw(before[name]) == raw(after[name]) for name in before)


def test_the_scale_rule_is_obeyed(tmp_path: Path) -> None:
    source = edit_tensors(write_dense(tmp_path / "in"), randomize)
    before = read_tensors(source)
    after = read_tensors(convert(source, tmp_path / "out", scale_rule="search"))
    differ = False
    for name in [name for name in before if name.endswith(PROJECTIONS)]:
        values = before[name].transpose(1, 2).contiguous()
        blocks, scales = quantize(values, scale_rule="search")
        assert torch.equal(after[f"{name}_blocks"], blocks), name
        assert torch.equal(after[f"{name}_scales"], scales), name
        differ |= not torch.equal(scales, quantize(values)[1])
    assert differ


def test_the_result_is_a_right_checkpoint(quantized: Path) -> None:
    checkpoint = Checkpoint.open(quantized)
    consistency.check(checkpoint)
    assert checkpoint.forms == {0: "packed", 1: "packed"}


def test_what_was_mxfp4_before_has_the_same_values(tmp_path: Path) -> None:
    packed = read_tensors(write_packed(tmp_path / "packed"))
    again = read_tensors(convert(write_dense(tmp_path / "dense"), tmp_path / "out"))
    for name in [n.removesuffix("_blocks") for n in packed if n.endswith("_blocks")]:
        before, after = (
            dequantize(t[f"{name}_blocks"], t[f"{name}_scales"]) for t in (packed, again)
        )
        assert torch.equal(before, after), name


def test_transformers_loads_it_with_the_values_of_dequantize(quantized: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        quantized,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    tensors, parameters = read_tensors(quantized), dict(model.named_parameters())
    for name in [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]:
        values = dequantize(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
        assert torch.equal(parameters[name], values.transpose(1, 2)), name
    assert all(torch.equal(parameters[name], tensors[name]) for name in tensors)


def test_the_config_says_what_was_done_and_keeps_the_rest(dense: Path, quantized: Path) -> None:
    config = read_config(quantized)
    expected = {"quant_method": "mxfp4", "modules_to_not_convert": OPENAI}
    assert config.pop("quantization_config") == expected
    assert config == read_config(dense)


def test_other_files_are_copied_and_stale_weights_are_not(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path / "in")
    kept = {"chat_template.jinja", "notes/README.md", ".gitattributes", "vocabulary.bin.txt"}
    left = {"pytorch_model.bin", "old/model.safetensors", "pytorch_model.bin.index.json"}
    left |= {"model.safetensors.index.json", "x.gguf", ".git/config", "training_args.bin"}
    for name in kept | left:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    before, after = files(source), files(convert(source, tmp_path / "out"))
    written = {"config.json", "model.safetensors.index.json", "model-00000-of-00000.safetensors"}
    assert after.keys() - written == before.keys() - left - {"config.json", "model.safetensors"}
    assert all(after[name] == before[name] for name in after.keys() - written)
    assert kept <= after.keys()


@pytest.mark.parametrize("max_shard_bytes", [1, 30_000, 10**9])
def test_shards_are_cut_as_asked(dense: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    out = convert(dense, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    consistency.check(Checkpoint.open(out))  # the index, too
    shards = []  # of each, the bytes that belong together
    for file in sorted(out.glob("*.safetensors")):
        sizes: dict[str, int] = defaultdict(int)
        for name, tensor in read_header(file).items():
            sizes[name.removesuffix("_scales").removesuffix("_blocks")] += tensor.nbytes
        shards.append([*sizes.values()])
    assert all(sum(shard) <= max_shard_bytes or len(shard) == 1 for shard in shards)
    # No shard is left before it is full.
    assert all(sum(a) + b[0] > max_shard_bytes for a, b in pairwise(shards))
    whole = read_tensors(convert(dense, tmp_path / "whole"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in read_tensors(out).items())


def test_a_base_model_keeps_its_names(dense: Path, tmp_path: Path) -> None:
    source = edit_tensors(copied(dense, tmp_path / "in"), without_prefix)
    out = convert(source, tmp_path / "out", skip=["layers.1"])
    consistency.check(Checkpoint.open(out))
    modules = [*(name.removeprefix("model.") for name in OPENAI), "layers.1.mlp.experts"]
    assert read_config(out)["quantization_config"]["modules_to_not_convert"] == modules


def test_nan_and_infinity_are_reported(dense: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[GATE_UP][1, 3, 5] = torch.nan
        tensors[GATE_UP][2, 40, 5:7] = torch.inf

    source = edit_tensors(copied(dense, tmp_path / "in"), damage)
    with pytest.warns(NanWeightsWarning, match=rf"3 MXFP4 blocks .* {GATE_UP}_scales \(3\)"):
        out = convert(source, tmp_path / "out")
    assert Checkpoint.open(out).nan_blocks() == {f"{GATE_UP}_scales": 3}


# ---- skip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "skip", [["model.layers.1"], ["1.mlp.experts"], ["model.layers.[1-9]"], ["*.1.*"]]
)
def test_skipped_experts_stay_dense(dense: Path, tmp_path: Path, skip: list[str]) -> None:
    out = convert(dense, tmp_path / "out", skip=skip)
    checkpoint = Checkpoint.open(out)
    consistency.check(checkpoint)
    assert checkpoint.forms == {0: "packed", 1: "dense"}
    before, after = read_tensors(dense), read_tensors(out)
    for name in (f"{EXPERTS.format(1)}.{projection}" for projection in PROJECTIONS):
        assert raw(before[name]) == raw(after[name])
    modules = read_config(out)["quantization_config"]["modules_to_not_convert"]
    assert modules == [*OPENAI, EXPERTS.format(1)]


def test_transformers_loads_a_checkpoint_with_skipped_experts(dense: Path, tmp_path: Path) -> None:
    out = convert(dense, tmp_path / "out", skip=["model.layers.1"])
    model, report = AutoModelForCausalLM.from_pretrained(
        out,
        quantization_config=Mxfp4Config(dequantize=True),
        local_files_only=True,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    before = read_tensors(dense)[f"{EXPERTS.format(1)}.down_proj"]
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, before)


def test_the_inputs_config_may_name_modules_already(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path / "in")
    modules = ["lm_head", "model.layers.0.mlp"]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": modules}
    edit_config(source, lambda config: config.update(quantization_config=said))
    out = convert(source, tmp_path / "out", skip=["model.layers.0"])
    assert Checkpoint.open(out).forms == {0: "dense", 1: "packed"}
    assert read_config(out)["quantization_config"]["modules_to_not_convert"] == modules


# ---- what is refused, before anything is written ------------------------------------------------


def refuse(
    source: Path, out: Path, message: str, error: type[Exception] = CheckpointError, **options: Any
) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=message):
        convert(source, out, **options)
    assert sorted(out.parent.iterdir()) == before


def test_a_pattern_that_matches_nothing(dense: Path, tmp_path: Path) -> None:
    message = r"skip='layers\.7' names no experts: theirs are names like model\.layers\.0\."
    skip = ["model.layers.1", "layers.7"]
    refuse(dense, tmp_path / "out", message, OptionError, skip=skip)


def test_nothing_is_left_to_quantize(dense: Path, tmp_path: Path) -> None:
    refuse(
        dense, tmp_path / "out", "nothing of .* is left to quantize: skip fewer", skip=["experts"]
    )


def test_an_input_that_is_packed(tmp_path: Path) -> None:
    message = rf"{EXPERTS.format(0)} in .*/in is in MXFP4 already: name a checkpoint that is not"
    refuse(write_packed(tmp_path / "in"), tmp_path / "out", message)


def test_an_input_that_is_packed_in_part(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "in")
    edit_tensors(source, lambda tensors: unpack_layers(tensors, 0, dtype=torch.bfloat16))
    modules = [EXPERTS.format(0)]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": modules}
    edit_config(source, lambda config: config.update(quantization_config=said))
    refuse(source, tmp_path / "out", rf"{EXPERTS.format(1)} in .* is in MXFP4 already")


def test_an_input_with_another_quantization(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path / "in")
    edit_config(source, lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    refuse(source, tmp_path / "out", "quant_method is 'fp8': name a checkpoint")


def test_an_input_that_is_incomplete(dense: Path, tmp_path: Path) -> None:
    source = edit_tensors(copied(dense, tmp_path / "in"), lambda tensors: tensors.pop(GATE_UP))
    refuse(source, tmp_path / "out", rf"1 of \d+ tensors are not in model\.safetensors: {GATE_UP}")


def test_sizes_that_make_no_blocks(tmp_path: Path) -> None:
    source = write_sparse(tmp_path / "in", {**SMALL, "intermediate_size": 48})
    message = "intermediate_size is 48, which MXFP4 cannot have: it must be a multiple of 32"
    refuse(source, tmp_path / "out", message)


def test_an_output_that_exists(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refuse(dense, tmp_path, "exists already: remove it, or name another directory")
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_an_output_inside_the_input(dense: Path) -> None:
    refuse(dense, dense / "out", "/out lies in .*: name a directory elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rule": "min"}, r"scale_rule is 'min': it must be in \('max', 'search'\)"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0: it must be 1 or more"),
        ({"skip": ["("]}, r"'\(' is no regular expression"),
    ],
)
def test_impossible_options(dense: Path, tmp_path: Path, options: Any, message: str) -> None:
    refuse(dense, tmp_path / "out", message, OptionError, **options)


SMALL = {
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def test_too_little_disk(tmp_path: Path) -> None:
    source = write_sparse(tmp_path / "in", {**SMALL, "vocab_size": 40 * 10**9})  # 10 TB
    message = r"has 10240\.0 GB, but .* GB free: make room there, or name a directory"
    refuse(source, tmp_path / "out", message)


def test_too_little_disk_for_other_files(tmp_path: Path) -> None:
    source = write_sparse(tmp_path / "in", SMALL)
    with (source / "notes.txt").open("wb") as file:
        file.truncate(10**13)  # which the file system notes, and stores nothing
    refuse(source, tmp_path / "out", r"has 10000\.0 GB, but .* GB free: make room there")


# ---- memory and the command line ----------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Keeps the number of bytes of the largest result of an op."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_no_step_of_an_expert_takes_more_memory_than_a_slab_in_float64(tmp_path: Path) -> None:
    file, n, k = tmp_path / "file.safetensors", 3072, 1024
    assert n * k > 2 * SLAB_VALUES
    weight = TensorSpec("layer.experts.0.gate_proj.weight", torch.bfloat16, (n, k))
    write_safetensors(file, [weight], [(weight.name, memoryview(bytes(weight.nbytes)))])
    item = Item(read_header(file)[weight.name], tuple(packed_specs(weight)))
    with Largest() as largest:
        assert sum(part.nbytes for _, part in item.parts("search", {})) == item.nbytes
    assert largest.nbytes == 8 * SLAB_VALUES


@pytest.mark.exhaustive
def test_memory_is_bounded_by_experts_not_by_tensors(tmp_path: Path) -> None:
    """The largest tensor has 128 MiB, 2 of them an expert; the process grows by 48 at most."""
    sizes = {"num_local_experts": 64, "hidden_size": 256, "intermediate_size": 2048}
    source = write_sparse(tmp_path / "in", {**SMALL, **sizes})
    code = f"""
import re, torch
from pathlib import Path
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.checkpoints.quantize import quantize_checkpoint
# Not getrusage's, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
quantize(torch.zeros(32, 32))
before = peak()
quantize_checkpoint({str(source)!r}, {str(tmp_path / "out")!r}, progress=False)
print(peak() - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) <= 48


def test_command_writes_what_the_function_writes(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--skip", "model.layers.1", "--max-shard-bytes=50000", "--scale-rule=max"]
    assert main(["quantize", str(dense), str(tmp_path / "out"), *flags]) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    again = convert(dense, tmp_path / "b", skip="model.layers.1", max_shard_bytes=50000)
    written = files(tmp_path / "out")
    assert written.pop("mxfp4_rounding.json")  # the function was not asked for it
    assert written == files(again)


def test_command_reports_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tmp_path / "no"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no'} does not exist: name")
