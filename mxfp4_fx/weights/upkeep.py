"""What can be asked of a model's expert weights, besides computing with them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from mxfp4_fx.weights.store import STORE


def refresh(model: nn.Module) -> int:
    """Swizzle the expert weights of ``model`` again at its next call.

    Needed only after writes that torch cannot notice, such as ``p.data.mul_()`` or through numpy.

    Returns:
        How many swizzled weights are affected.
    """
    return STORE.refresh(_tensors_of(model))


def forget(model: nn.Module) -> int:
    """Let go of the swizzled expert weights of ``model``; its next call would make them again.

    Those that hold the values of weights that were freed (``free_weights``) stay.

    Returns:
        How many swizzled weights are let go of.
    """
    return STORE.forget(_tensors_of(model))


def restore(model: nn.Module) -> int:
    """Give the expert weights of ``model`` that ``free_weights`` freed their memory again.

    Packed weights (``mxfp4_fx.from_pretrained``) get back their bytes, weights of floats the values
    that MXFP4 holds of them. The compiled model does not free them again.

    Returns:
        How many parameters were freed.
    """
    return STORE.restore(model.parameters())


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and other tensors that are attributes of modules."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in held.values() if isinstance(value, Tensor))
