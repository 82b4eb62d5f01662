"""Tiny models of other families, and their MXFP4 checkpoints in each format.

compressed-tensors makes the bytes, and all formats hold the same ones. `packed_layouts.py` has
their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import edit_config, edit_tensors, read_tensors
from compressed_tensors.compressors import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from families import fill
from packed_layouts import COMPRESSED_TENSORS, Layout, scheme
from safetensors.torch import save_file
from test_family_models import _COMMON, MODELS
from torch import Tensor
from transformers import AutoModelForCausalLM

FAMILIES = ("Qwen3-MoE", "Mixtral", "DeepSeek-V3")
IDS = torch.arange(14).view(2, 7) * 4
# What llm-compressor's own example quantizes: all linears but the head and the routers.
LINEARS = re.compile(r"(?<!lm_head)(?<!gate)\.weight$")
EXPERTS = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def compressed(weight: Tensor, made: QuantizationScheme | None = None) -> dict[str, Tensor]:
    """Return what compressed-tensors stores of a matrix, under the last parts of names."""
    made = made or scheme()
    groups = weight.float().unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), made.weights)
    state = {"weight": weight.float(), "weight_scale": scale}
    return dict(MXFP4PackedCompressor.compress(state, made))


def decompressed(parts: dict[str, Tensor]) -> Tensor:
    """Return the matrix, float32 [N, K], that compressed-tensors reads from it."""
    found: Tensor = MXFP4PackedCompressor.decompress(dict(parts), scheme())["weight"]
    return found.float()


def write(
    path: Path,
    name: str,
    dtype: torch.dtype,
    which: re.Pattern[str] = EXPERTS,
    layout: Layout = COMPRESSED_TENSORS,
    **sizes: Any,
) -> Path:
    """Write the checkpoint of a random model whose matrices of some names are MXFP4.

    Beside it, ``path / "dense"`` is the checkpoint with the values that compressed-tensors reads.
    """
    kind, given = MODELS[name]
    config = getattr(transformers, kind)(**{**_COMMON, **given, **sizes})
    whole = fill(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    whole.save_pretrained(path)
    whole.save_pretrained(path / "dense")
    values: dict[str, Tensor] = {}

    def compress(tensors: dict[str, Tensor]) -> None:
        for weight in [w for w in tensors if which.search(w) and tensors[w].ndim == 2]:
            if "embed" in weight:
                continue
            parts = compressed(tensors.pop(weight))
            values[weight] = decompressed(parts)
            tensors |= layout.tensors(weight.removesuffix(".weight"), parts)
        layout.whole(tensors)

    edit_tensors(path, compress)
    edit_tensors(
        path / "dense", lambda t: t.update({n: v.to(t[n].dtype) for n, v in values.items()})
    )
    return edit_config(path, layout.config)


def split(path: Path, edit: Callable[[dict[str, Any]], object] = lambda index: None) -> Path:
    """Cut the one file of a checkpoint into two shards with an index."""
    tensors = read_tensors(path)
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{i}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    edit(index)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
