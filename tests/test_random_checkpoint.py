"""Random GPT-OSS checkpoints: loaded by transformers, reproducible, written whole or not at all."""

import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import processes
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

from mxfp4_fx.checkpoints.random_weights import (
    CheckpointShape,
    checkpoint_bytes,
    write_random_checkpoint,
)
from mxfp4_fx.cli import main
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import dequantize

SIZES = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 96,
    "experts": 4,
    "experts_per_token": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
}
TINY = CheckpointShape(**SIZES)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def read_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def load_dequantized(path: Path):
    return AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )


def start_writing(out: Path, first: str) -> subprocess.Popen[str]:
    """Write a checkpoint, a file for each tensor, in a new interpreter that runs `first` first."""
    code = f"""
{first}
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
write_random_checkpoint({str(out)!r}, CheckpointShape(**{SIZES}), max_shard_bytes=1)
"""
    return subprocess.Popen([sys.executable, "-c", code], text=True, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), TINY, progress=False)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_dequantized(checkpoint)


# ---- what transformers makes of it --------------------------------------------------------------


def test_transformers_finds_every_tensor_and_no_other(loaded):
    _, report = loaded
    assert not any(report.values()), report


def test_expert_parameters_are_the_dequantized_blocks(checkpoint, loaded):
    tensors = read_tensors(checkpoint)
    for i, layer in enumerate(loaded[0].model.layers):
        for proj in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{i}.mlp.experts.{proj}"
            blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
            weight = dequantize(blocks, scales, torch.bfloat16)
            assert torch.equal(getattr(layer.mlp.experts, proj), weight.transpose(-1, -2)), name


def test_other_parameters_are_the_checkpoints(checkpoint, loaded):
    tensors = read_tensors(checkpoint)
    parameters = dict(loaded[0].named_parameters())
    plain = tensors.keys() & parameters.keys()
    assert tensors.keys() - plain == {n for n in tensors if n.endswith(("_blocks", "_scales"))}
    for name in plain:
        assert torch.equal(parameters[name], tensors[name]), name


def test_expert_tensors_are_packed_and_the_others_bf16(checkpoint):
    layouts = {name: (t.dtype, tuple(t.shape)) for name, t in read_tensors(checkpoint).items()}
    experts = "model.layers.1.mlp.experts"
    assert layouts[f"{experts}.gate_up_proj_blocks"] == (torch.uint8, (4, 192, 2, 16))
    assert layouts[f"{experts}.gate_up_proj_scales"] == (torch.uint8, (4, 192, 2))
    assert layouts[f"{experts}.down_proj_blocks"] == (torch.uint8, (4, 64, 3, 16))
    assert layouts[f"{experts}.down_proj_scales"] == (torch.uint8, (4, 64, 3))
    packed = {name for name, (dtype, _) in layouts.items() if dtype != torch.bfloat16}
    assert packed == {name for name in layouts if name.endswith(("_blocks", "_scales"))}


def test_every_token_gets_its_own_finite_logits(loaded):
    tokens = torch.arange(256)
    with torch.no_grad():
        logits = loaded[0](tokens[None]).logits[0]
    assert logits.isfinite().all()
    assert len(logits.unique(dim=0)) == len(tokens)


def test_tokens_spread_over_all_experts(loaded):
    with torch.no_grad():
        output = loaded[0](torch.arange(256)[None], output_router_logits=True)
    for logits in output.router_logits:
        chosen = logits.topk(TINY.experts_per_token).indices
        assert len(chosen.unique()) == TINY.experts
        assert len(chosen.sort().values.unique(dim=0)) > 1


def test_hidden_states_of_24_layers_stay_in_range(tmp_path):
    shape = CheckpointShape(**SIZES | {"layers": 24})
    model, _ = load_dequantized(write_random_checkpoint(tmp_path, shape, progress=False))
    streams = []
    model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        model(torch.arange(256)[None])
    # The residual stream is the sum of an embedding of RMS 1 and 48 outputs of RMS 1 or less, in
    # unrelated directions: mean squares add up.
    assert streams[0].double().square().mean() <= 1 + 48


def test_configs_tell_the_sizes_and_the_originals_constants(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.architectures == ["GptOssForCausalLM"]
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 150000,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    assert (config.sliding_window, config.swiglu_limit, config.rms_norm_eps) == (128, 7.0, 1e-5)
    assert config.num_experts_per_tok == TINY.experts_per_token
    assert config.quantization_config == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }


# ---- tokenizer ----------------------------------------------------------------------------------


def test_tokenizer_ids_are_utf8_bytes_and_round_trip(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    surrogates = range(0xD800, 0xE000)
    every = "".join(chr(c) for c in range(0, 0x110000, 89) if c not in surrogates)
    for text in (every, "", " a  b\r\n\tdon't , stop .", "e\u0301 \u00e9 \ufb01"):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_wired_into_the_configs(checkpoint, loaded):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generation = loaded[0].generation_config
    assert tokenizer.bos_token_id == generation.bos_token_id
    assert tokenizer.pad_token_id == generation.pad_token_id == loaded[0].config.pad_token_id
    assert tokenizer.eos_token_id == generation.eos_token_id[0] == loaded[0].config.eos_token_id
    stops = ["<|return|>", "<|endoftext|>", "<|call|>"]
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(stops)
    assert tokenizer("a<|call|>").input_ids == [97, generation.eos_token_id[2]]
    assert len(tokenizer) <= TINY.vocab


# ---- bytes --------------------------------------------------------------------------------------


def test_gpt_oss_20b_has_its_published_size():
    # total_size in the index of openai/gpt-oss-20b
    assert checkpoint_bytes(CheckpointShape(layers=24, vocab=201088)) == 13_761_264_768


def test_same_seed_gives_the_same_files(checkpoint, tmp_path):
    again = write_random_checkpoint(tmp_path, TINY, progress=False)
    assert read_files(again) == read_files(checkpoint)


def test_shard_size_changes_no_tensor(checkpoint, tmp_path):
    cut = write_random_checkpoint(tmp_path, TINY, max_shard_bytes=50_000, progress=False)
    assert len(list(cut.glob("*.safetensors"))) > 1
    whole, parts = read_tensors(checkpoint), read_tensors(cut)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_another_seed_changes_every_tensor(checkpoint, tmp_path):
    other = read_tensors(write_random_checkpoint(tmp_path, TINY, seed=1, progress=False))
    same = [name for name, t in read_tensors(checkpoint).items() if torch.equal(t, other[name])]
    assert not same


def test_no_two_tensors_are_equal(checkpoint):
    contents = [t.view(torch.uint8).numpy().tobytes() for t in read_tensors(checkpoint).values()]
    assert len(set(contents)) == len(contents)


def test_a_tensor_of_several_chunks_is_one_stream(checkpoint, tmp_path):
    # 8 MiB are drawn at a time: 65536 rows of 64 bf16 values.
    shape = CheckpointShape(**SIZES | {"layers": 1, "vocab": 65536 + 512})
    large = write_random_checkpoint(tmp_path, shape, progress=False)
    rows = read_tensors(large)["model.embed_tokens.weight"]
    assert torch.equal(rows[:512], read_tensors(checkpoint)["model.embed_tokens.weight"])
    assert not torch.equal(rows[65536:], rows[:512])


@pytest.mark.parametrize("max_shard_bytes", [1, 50_000, 10**9])
def test_index_agrees_with_the_shards(tmp_path, max_shard_bytes):
    path = write_random_checkpoint(tmp_path, TINY, max_shard_bytes=max_shard_bytes, progress=False)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found, shards = {}, []
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            names = file.offset_keys()
            shards.append([file.get_tensor(name).nbytes for name in names])
        found |= dict.fromkeys(names, shard.name)
    assert index == {"metadata": {"total_size": sum(map(sum, shards))}, "weight_map": found}
    last = len(shards) - 1
    assert [*dict.fromkeys(found.values())] == [
        f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(last + 1)
    ]
    assert all(sum(shard) <= max_shard_bytes or len(shard) == 1 for shard in shards)
    # No shard is left before it is full.
    assert all(sum(a) + b[0] > max_shard_bytes for a, b in pairwise(shards))


def test_scales_vary_around_the_fan_in(checkpoint):
    tensors = read_tensors(checkpoint)
    for proj, k in (("gate_up_proj", TINY.hidden), ("down_proj", TINY.intermediate)):
        name = f"model.layers.0.mlp.experts.{proj}"
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        assert len(scales.unique()) >= 4
        std = dequantize(blocks, scales, torch.float32).double().std().item()
        # One exponent too many or too few is a factor of 2.
        assert 2**-0.5 < std * k**0.5 < 2**0.5, (proj, std)


def test_all_sixteen_codes_occur_in_both_nibbles(checkpoint):
    blocks = read_tensors(checkpoint)["model.layers.0.mlp.experts.down_proj_blocks"]
    assert len(blocks.unique()) == 256


# ---- all or nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, stop):
    second_file = processes.stopping("open", ".safetensors", times=2)
    process = start_writing(tmp_path / "out", second_file)
    processes.wait_until_stopped(process)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    stderr = processes.end(process, stop)
    assert process.returncode != 0, stderr
    left = list(tmp_path.iterdir())
    if stop == signal.SIGINT:
        assert left == []
    else:  # no handler runs, so the rest stays, under a name and without the files of a checkpoint
        assert [path.name.startswith("out.partial-") for path in left] == [True]
        assert not list(left[0].glob("*.json"))


def test_an_empty_directory_is_filled(tmp_path):
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    assert write_random_checkpoint(out, TINY, progress=False) == out
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_full_directory_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already: remove it"):
        write_random_checkpoint(tmp_path, TINY, progress=False)
    assert read_files(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already: remove it"):
        write_random_checkpoint(out, TINY, progress=False)
    assert read_files(tmp_path) == {"out": b"mine"}


def test_too_little_disk_is_told_before_anything_is_written(tmp_path):
    shape = CheckpointShape(vocab=10**12)  # 5.8 PB of embedding, and as much again of lm_head
    with pytest.raises(CheckpointError, match=r"has 1152000\d\.\d GB, but .* GB free: make room"):
        write_random_checkpoint(tmp_path / "a" / "out", shape, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 100}, "hidden is 100: it must be a multiple of 32"),
        ({"intermediate": 48}, "intermediate is 48: it must be a multiple of 32"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token is 3: it must be 2 or less"),
        ({"heads": 6, "kv_heads": 4}, "heads is 6: it must be a multiple of 4"),
        ({"kv_heads": 0}, "kv_heads is 0: it must be 1 or more"),
        ({"head_dim": 15}, "head_dim is 15: it must be even"),
        ({"vocab": 264}, "vocab is 264: it must be 265 or more"),
        ({"layers": 0}, "layers is 0: it must be 1 or more"),
    ],
)
def test_impossible_sizes_are_named(sizes, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointShape(**sizes)


# ---- command line and imports -------------------------------------------------------------------


def test_command_writes_what_the_function_writes(checkpoint, tmp_path, capsys):
    flags = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    out = tmp_path / "out"
    assert main(["checkpoint", str(out), *flags, "--seed=0"]) == 0
    assert str(out) in capsys.readouterr().out
    assert read_files(out) == read_files(checkpoint)


def test_command_reports_an_error_in_one_line(tmp_path, capsys):
    assert main(["checkpoint", str(tmp_path / "out"), "--hidden=100"]) == 1
    assert capsys.readouterr().err.startswith("error: hidden is 100")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_without_tokenizers_it_imports_and_says_what_to_install(tmp_path):
    blocked = ["transformers", "safetensors", "tokenizers"]
    process = start_writing(
        tmp_path / "out", f"import sys; sys.modules |= dict.fromkeys({blocked})"
    )
    _, stderr = process.communicate()
    assert stderr.rstrip().endswith("pip install tokenizers")
    assert list(tmp_path.iterdir()) == []
