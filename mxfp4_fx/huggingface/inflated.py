"""Experts that transformers inflated: MXFP4 in the checkpoint, but dense in the model.

transformers dequantizes the experts of an MXFP4 checkpoint on a CPU, without asking, unless it is
told how to load them. Such a model keeps one trace of that: the attribute ``is_quantized``, which
is False. (It is the same if the user asked for dense experts, with ``dequantize=True``.) That the
experts have not changed since, only their values can tell.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mxfp4_fx.checkpoints.gpt_oss import PROJECTIONS
from mxfp4_fx.core.console import size_in_words
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, dequantize, quantize

# A mark on experts that `mxfp4_fx.dequantize` made, on purpose.
UNPACKED = "_mxfp4_fx_unpacked"


def note_of_inflated(model: nn.Module, experts: Iterable[nn.Module]) -> str | None:
    """Return what a user should know whose model was inflated while it was loaded, or None.

    Args:
        model: a model of transformers, or a module that contains one.
        experts: those of its experts that are quantized again.
    """
    if not any(vars(module).get("is_quantized") is False for module in model.modules()):
        return None
    weights = [
        weight
        for module in experts
        if not getattr(module, UNPACKED, False)
        for name in PROJECTIONS
        if (weight := module._parameters.get(name)) is not None and _holds_mxfp4(weight)
    ]
    if not weights:
        return None
    dense = sum(weight.nbytes for weight in weights)
    packed = sum(weight.numel() // BLOCK * (BYTES_PER_BLOCK + 1) for weight in weights)
    return (
        f"transformers inflated the experts of this {type(model).__name__} while it loaded them, "
        f"from {size_in_words(packed)} of MXFP4 to {size_in_words(dense)}, and the backend "
        "quantizes them again, to the same values: load it with "
        "quantization_config=mxfp4_fx.Mxfp4Config(), and they stay packed"
    )


@torch.no_grad()
def _holds_mxfp4(weight: Tensor) -> bool:
    """Return whether a weight [E, K, N] has MXFP4 values, as one column of each expert shows."""
    is_plain = type(weight) is nn.Parameter and weight.ndim == 3 and weight.is_floating_point()
    if not is_plain or weight.is_meta or weight.shape[1] % BLOCK:
        return False
    column = weight.detach()[:, :, 0]
    return torch.equal(dequantize(*quantize(column), column.dtype), column)
