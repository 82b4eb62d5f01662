"""Models that transformers loads from tiny checkpoints, and checkpoints with dense experts."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    PROJECTIONS,
    copied,
    edit_config,
    edit_tensors,
    read_tensors,
    unpack_layers,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

IDS = torch.arange(14).view(2, 7) * 5

# A device map for a model of two layers.
SECOND_LAYER_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu"),
    **dict.fromkeys(("model.norm", "lm_head"), "cpu"),
    "model.layers.1": "disk",
}


def write_dense(
    path: Path, packed: Path, dtype: torch.dtype, layers: Iterable[int] = (0, 1)
) -> Path:
    """Write a copy of ``packed`` in which the experts of ``layers`` are dense, with random values.

    If no packed experts are left, the config has no ``quantization_config``.
    """

    def make_dense(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        unpack_layers(tensors, *layers, dtype=dtype)
        for name in tensors:
            if name.endswith(PROJECTIONS):
                values = torch.randn(tensors[name].shape, generator=generator)
                tensors[name] = values.to(dtype)

    edit_tensors(copied(packed, path), make_dense)
    if not any(name.endswith("_blocks") for name in read_tensors(path)):
        edit_config(path, lambda config: config.pop("quantization_config"))
    return path


def dequantized(path: Path, dtype: Any = "auto") -> GptOssForCausalLM:
    """Load the model with dense experts, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype
    )
    for module in model.modules():
        if isinstance(module, GptOssExperts):  # older versions make them bfloat16
            module.to(module.gate_up_proj_bias.dtype)
    return model


def exact_logits(model: GptOssForCausalLM, ids: Tensor = IDS) -> Tensor:
    """Return logits [batch, tokens, vocabulary] of a model with dense experts, run in float64."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("batched_mm")  # grouped_mm does not support float64
    with torch.no_grad():
        return exact(ids).logits


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# `Peak` samples the anonymous memory of the process; pages of mapped files do not count.
MEMORY = """
import sys, threading, time
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.bytes = anonymous()
        self.start()
    def run(self):
        while True:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.0005)
"""


def measured(code: str) -> list[int]:
    """Run ``code``, which may use `Peak`, in a fresh interpreter; return the numbers it prints."""
    # A fixed threshold makes malloc return freed memory to the system at once.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY + code], capture_output=True, text=True, env=env
    )
    assert ended.returncode == 0, ended.stderr
    return [int(number) for number in ended.stdout.split()]
