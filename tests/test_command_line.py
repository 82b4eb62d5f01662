"""``python -m mxfp4_fx`` with what it cannot use: one line on stderr and exit status 1."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  (its log keeps the stderr that it finds when it is imported)
from checkpoints import TINY, read_config, write_dense, write_packed

import mxfp4_fx
from mxfp4_fx.cli import main

LONG = "x" * 300  # longer than any file system's names


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line that the command prints, beside transformers' log, before it fails."""
    assert main([str(arg) for arg in argv]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = [line for line in told.err.splitlines() if not line.startswith("[transformers]")]
    assert line.startswith("error: ")
    return line


TEXTS = {
    "{": r"config\.json cannot be read \(Expecting property name .*copy or download",
    "": r"config\.json cannot be read \(Expecting value",
    "[1]": r"config\.json holds no JSON object",
    "\0": r"config\.json cannot be read",
    "{}": r"config\.json says that model_type is None: name a checkpoint of GPT-OSS",
    '{"model_type": "gpt_oss"}': r"config\.json has no num_hidden_layers: use the config\.json",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_config_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert re.search(TEXTS[text], fails(capsys, "explain", tmp_path))


QUANTIZED = {"quant_method": "mxfp4"}
# What is changed in a right config -> the message.
CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "llama"},
        "model_type is 'llama' in .*, a model without experts, .*: use the config",
    ),
    ({"hidden_size": "64"}, "hidden_size is '64': use the config"),
    ({"hidden_size": [64]}, r"hidden_size is \[64\]: use the config"),
    ({"hidden_size": -64}, "hidden_size is -64: use the config"),
    ({"hidden_size": 65}, "its size 65 is no multiple of 32"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0: use the config"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4, not a multiple of num_key_value_heads"),
    ({"head_dim": 15}, "head_dim is 15, not even"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, not 4 or less"),
    ({"num_experts_per_tok": "2"}, "num_experts_per_tok is '2': use the config"),
    ({"layer_types": ["full_attention"]}, "transformers rejects the config.json .*layer_types"),
    ({"layer_types": 5}, "transformers rejects the config.json"),
    ({"rms_norm_eps": "x"}, "transformers rejects the config.json .*rms_norm_eps"),
    ({"rope_scaling": "yes"}, "transformers rejects the config.json .*rope"),
    ({"rope_scaling": {"rope_type": "no"}}, r"transformers cannot make the model .*KeyError: 'no'"),
    ({"quantization_config": "mxfp4"}, "quantization_config is 'mxfp4' in .*, not an object"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8': name a checkpoint"),
    (
        {"quantization_config": {**QUANTIZED, "modules_to_not_convert": 5}},
        "modules_to_not_convert is 5 in .*, not a list",
    ),
    (
        {"quantization_config": {**QUANTIZED, "modules_to_not_convert": ["("]}},
        r"'\(' is no regular expression \(.* at position 0\)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[str(c) for c, _ in CONFIGS])
def test_a_config_of_wrong_values(
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(read_config(packed) | changes))
    assert re.search(message, fails(capsys, "explain", tmp_path))


def test_experts_that_transformers_cannot_run(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = fails(capsys, "explain", packed, "--experts", "foo")
    assert "transformers has no experts implementation 'foo': it has eager, " in told


@pytest.mark.parametrize("options", [["--json"], ["--dtype", "float32"], []], ids=str)
def test_a_failure_is_told_whatever_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert "/no does not exist: name a" in fails(capsys, "explain", tmp_path / "no", *options)


INPUTS = {
    "nothing": ("no", r"/no does not exist: name a checkpoint's directory on this machine"),
    "a file": ("file", "/file is a file: name a checkpoint's directory"),
    "a directory of other things": (".", r"has no config\.json: name a checkpoint's directory"),
    "a name too long": (LONG, "cannot be read (File name too long): check the path and its perm"),
    "nobody's home": ("~nosuchuser/x", "~nosuchuser/x does not exist"),
    "a link to itself": ("loop", "/loop does not exist"),
}


@pytest.mark.parametrize("command", ["explain", "quantize"])
@pytest.mark.parametrize(("path", "message"), INPUTS.values(), ids=INPUTS)
def test_an_input_that_is_no_checkpoint(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    source = path if path.startswith("~") else tmp_path / path
    out = [tmp_path.parent / "out"] if command == "quantize" else []
    told = fails(capsys, command, source, *out)
    assert re.search(message if "\\" in message else re.escape(message), told)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
@pytest.mark.parametrize("command", ["explain", "quantize"])
def test_an_input_that_may_not_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "in").mkdir(mode=0)
    out = [tmp_path / "out"] if command == "quantize" else []
    told = fails(capsys, command, tmp_path / "in", *out)
    assert "cannot be read (Permission denied): check the path and its permissions" in told


@pytest.mark.parametrize("command", ["checkpoint", "quantize"])
@pytest.mark.parametrize(
    ("path", "message"),
    [("file/out", "Not a directory"), (LONG, "File name too long"), ("taken", "exists already")],
    ids=["below a file", "a name too long", "taken"],
)
def test_an_output_that_cannot_be_written(
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thing").write_text("")
    before = sorted(tmp_path.rglob("*"))
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in vars(TINY).items()]
    argv = [dense, tmp_path / path] if command == "quantize" else [tmp_path / path, *sizes]
    assert message in fails(capsys, command, *argv)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--skip", "layers.0", "layer.1"], "skip='layer.1' names no experts"),
        (["--skip", "("], "'(' is no regular expression"),
        (["--max-shard-bytes", "0"], "max_shard_bytes is 0"),
    ],
    ids=str,
)
def test_options_of_quantize_that_make_no_sense(
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert message in fails(capsys, "quantize", dense, tmp_path / "out", *options)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mxfp4_fx {mxfp4_fx.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_has_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["doctor"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_output_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["doctor"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
