"""A checkpoint's directory: find its config and its weights, or say what it holds instead."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxfp4_fx.core.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ROUNDING = "mxfp4_rounding.json"  # of `rounding.py`
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
AGAIN = "copy or download the checkpoint again"

# What `other_files` leaves out: weights of any format, and their indexes.
_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_SHOWN = 4  # how many names a message lists
_ADAPTER = "adapter_config.json"
# Prefixes of the pickles that training writes and that hold no weights.
_OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args")


def directory_of(path: str | os.PathLike[str]) -> Path:
    """Return the directory at `path`, with ``~`` expanded.

    Raises:
        CheckpointError: it does not exist, is a file or cannot be read.
    """
    found = Path(os.path.expanduser(path))
    try:
        if found.is_dir():
            os.scandir(found).close()
            return found
        what = "is a file" if found.exists() else "does not exist"
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{found} cannot be read ({_short(error)}): check the path and its permissions"
        ) from error
    raise CheckpointError(f"{found} {what}: name a checkpoint's directory on this machine")


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` in a checkpoint's directory.

    Raises:
        CheckpointError: the file is missing or cannot be read, or the directory is a PEFT adapter.
    """
    if (path / CONFIG).is_file():
        return read_json(path / CONFIG)
    if (path / _ADAPTER).is_file():
        raise _is_adapter(path)
    raise CheckpointError(
        f"{path} has no {CONFIG}: name a checkpoint's directory, or {AGAIN}{_below(path)}"
    )


def weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files with a checkpoint's weights, and the index's map of tensors to shards.

    Without an index, the map is empty.

    Raises:
        CheckpointError: there are no weights, the index is damaged, or a shard is missing.
    """
    if (path / WEIGHTS).is_file():  # transformers prefers it to an index, too
        return [path / WEIGHTS], {}
    index = path / INDEX
    if not index.is_file():
        raise _no_weights(path)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: {AGAIN}")
    files = list(dict.fromkeys(map(str, weight_map.values())))
    if elsewhere := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{index} names {elsewhere[0]!r}, no file beside it: {AGAIN}")
    if absent := [file for file in files if not (path / file).is_file()]:
        raise CheckpointError(
            f"{index} names {few(absent)}, which is not there: copy or download it as well"
        )
    return [path / file for file in files], {name: str(file) for name, file in weight_map.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({_short(error)}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object: {AGAIN}")
    return content


def require_safetensors(file: Path) -> None:
    """Raise CheckpointError unless the file's suffix is ``.safetensors``."""
    if file.suffix in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which may run any code when it is read: only safetensors are; "
            "convert it where you trust it, with transformers' model.save_pretrained"
        )
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no .safetensors file: name the checkpoint's own")


def other_files(directory: Path) -> list[Path]:
    """Return all files except weights, what is said of them, and files in folders such as .git."""
    files = (file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
    return sorted(
        file
        for file in files
        if not (
            file.suffix in _WEIGHTS
            or file.name.endswith(_INDEXES)
            or file in (Path(CONFIG), Path(ROUNDING))
            or any(folder.startswith(".") for folder in file.parts[:-1])
        )
    )


def few(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are, as text."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _no_weights(path: Path) -> CheckpointError:
    if (path / _ADAPTER).is_file():
        return _is_adapter(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    try:
        for file in files:
            if file.suffix in PICKLES and not file.name.startswith(_OF_TRAINING):
                require_safetensors(file)
    except CheckpointError as error:
        return error
    if gguf := [file.name for file in files if file.suffix == ".gguf"]:
        return CheckpointError(
            f"{path} has only {few(gguf)}, which is GGUF: name the safetensors checkpoint that it "
            "was made of"
        )
    shards = [file.name for file in files if file.suffix == ".safetensors"]
    has = f"only {few(shards)}" if shards else "no weights"
    return CheckpointError(
        f"{path} has {has}, but neither {WEIGHTS} nor {INDEX}: {AGAIN}{_below(path)}"
    )


def _is_adapter(path: Path) -> CheckpointError:
    base = read_json(path / _ADAPTER).get("base_model_name_or_path")
    return CheckpointError(
        f"{path} is a PEFT adapter, no model: load its base ({base or 'see ' + _ADAPTER}) with "
        f"mxfp4_fx.from_pretrained, then the adapter with peft.PeftModel.from_pretrained"
    )


def _below(path: Path) -> str:
    """Return a hint at the newest checkpoint in a folder of `path`, where training saves them."""
    found = sorted(
        (file.parent for file in path.glob(f"*/{CONFIG}")), key=lambda f: f.stat().st_mtime
    )
    return f" ({found[-1]} has one)" if found else ""


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
