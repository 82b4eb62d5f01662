"""OpenAI's triton_kernels as a contender: its routing, its layouts, its fused SwiGLU."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Unavailable
from benchmarks.moe import Inputs, Problem, Projection, Weights
from mxfp4_fx.ops.operands import ALPHA, LIMIT

# What the package must have; versions with other names are not known here.
NAMES = {
    "matmul_ogs": ("matmul_ogs", "PrecisionConfig", "FusedActivation", "FnSpecs"),
    "matmul_ogs_details.opt_flags": ("reset_opt_flags_constraints",),
    "routing": ("routing",),
    "swiglu": ("swiglu_fn",),
    "tensor": ("FP4", "convert_layout", "wrap_torch_tensor"),
    "tensor_details.layout": (
        "make_default_matmul_mxfp4_w_layout",
        "make_default_matmul_mxfp4_w_scale_layout",
    ),
}


class TritonKernels(Contender):
    """It may cut K into parts to fill the device, or be told not to, as vLLM does on Hopper."""

    splits = True

    def __init__(self, problem: Problem, weights: Iterable[Weights], package: Any) -> None:
        super().__init__(problem, "triton_kernels", "triton_kernels", "mxfp4")
        self._package = package
        self._weights = []
        for layer in weights:
            self._weights.append([(*self._laid_out(part), part.float_bias) for part in layer])
            self.add_layer()
        ogs = package.matmul_ogs
        specs = ogs.FnSpecs("swiglu", package.swiglu.swiglu_fn, ("alpha", "limit"))
        self._swiglu = ogs.FusedActivation(specs, (ALPHA, LIMIT), 2)

    def without_splits(self) -> TritonKernels:
        """The same on the same weights, with K never cut into parts."""
        other = copy.copy(self)
        other.name, other.label = "triton_kernels_unsplit", "triton_kernels, K whole"
        other.splits = False
        return other

    def _laid_out(self, part: Projection) -> tuple[Any, Any]:
        """Weight [E, K, N] and scales [E, K/32, N] in the layouts that the package prefers."""
        tensor, layout = self._package.tensor, self._package.tensor_details.layout
        values = part.blocks.flatten(2).transpose(1, 2)
        weight = tensor.wrap_torch_tensor(values, dtype=tensor.FP4)
        scales = tensor.wrap_torch_tensor(part.scales.transpose(1, 2))
        to, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        weight = tensor.convert_layout(weight, to, **options)
        to, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        return weight, tensor.convert_layout(scales, to, **options)

    def run(self, layer: int, inputs: Inputs) -> Tensor:
        ogs = self._package.matmul_ogs
        flags = self._package.matmul_ogs_details.opt_flags
        flags.reset_opt_flags_constraints()
        if not self.splits:
            flags.update_opt_flags_constraints({"split_k": 1})
        logits = self.logits(layer, inputs)
        routing, gather, scatter = self._package.routing.routing(logits, self.top_k)

        def matmul(x: Tensor, part: tuple[Any, Any, Tensor], **kwargs: Any) -> Tensor:
            weight, scales, bias = part
            # The package writes into it, so each call has its own.
            precision = ogs.PrecisionConfig(weight_scale=scales)
            out: Tensor = ogs.matmul_ogs(
                x, weight, bias, routing, precision_config=precision, **kwargs
            )
            return out

        gate_up, down = self._weights[layer]
        inner = matmul(inputs.hidden, gate_up, gather_indx=gather, fused_activation=self._swiglu)
        return matmul(inner, down, scatter_indx=scatter, gammas=routing.gate_scal)


def load(folder: Path | None, device: torch.device) -> Any:
    """The package: from ``folder``, as installed, or as vLLM carries it.

    Args:
        folder: the package's own, or the one that holds it.

    Raises:
        Unavailable: it is not there, or has another interface.
    """
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    if folder is not None:
        folder = folder.resolve()
        sys.path.insert(0, str(folder.parent if folder.name == "triton_kernels" else folder))
    elif importlib.util.find_spec("triton_kernels") is None:
        vllm = importlib.util.find_spec("vllm")  # found, not imported
        places = vllm.submodule_search_locations or [] if vllm else []
        found = [place for place in places if Path(place, "third_party/triton_kernels").is_dir()]
        if not found:
            raise Unavailable("not installed, neither alone nor in vllm (--triton-kernels FOLDER)")
        # Its files import one another by their absolute name.
        sys.path.append(str(Path(found[0], "third_party")))
    try:
        package = importlib.import_module("triton_kernels")
        for module, names in NAMES.items():
            there = importlib.import_module(f"triton_kernels.{module}")
            missing = [name for name in names if not hasattr(there, name)]
            if missing:
                raise Unavailable(f"its {module} has no {', '.join(missing)}")
    except ImportError as error:
        raise Unavailable(f"cannot be imported, or is a version of other names: {error}") from error
    return package
