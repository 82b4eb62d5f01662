"""The user's operations on a model's swizzled expert weights: refresh, forget, restore."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from mxfp4_fx.weights.store import STORE

# The end of the name under which a module of transformers has a weight's scales.
_PRECISION = "_precision_config"


def refresh(model: nn.Module) -> int:
    """Swizzle the expert weights of ``model`` again at its next call.

    This is needed only after writes that torch cannot notice, such as ``p.data.mul_()`` or writes
    through numpy.

    Returns:
        How many swizzled weights are affected.
    """
    return STORE.refresh(_tensors_of(model))


def forget(model: nn.Module) -> int:
    """Release the swizzled expert weights of ``model``; its next call swizzles them again.

    Swizzled weights that hold the values of freed weights (``free_weights``) stay.

    Returns:
        How many swizzled weights are released.
    """
    return STORE.forget(_tensors_of(model))


def restore(model: nn.Module) -> int:
    """Restore the expert weights of ``model`` that ``free_weights`` freed.

    Packed weights (``mxfp4_fx.from_pretrained``) get their bytes back. Weights of floats get the
    values that they have in MXFP4. The compiled model does not free restored weights again.

    Returns:
        How many parameters were restored.
    """
    return STORE.restore(_tensors_of(model))


def wrapped_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module of transformers has in triton_kernels' classes.

    Those are the blocks and the scales of ``Mxfp4GptOssExperts``.
    """
    held = vars(module)
    for name, precision in held.items():
        if name.endswith(_PRECISION):
            weight = held.get(name.removesuffix(_PRECISION))
            for wrapped in (weight, getattr(precision, "weight_scale", None)):
                data = getattr(getattr(wrapped, "storage", None), "data", None)
                if isinstance(data, Tensor):
                    yield data


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers and other tensors that are attributes of modules."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in held.values() if isinstance(value, Tensor))
        yield from wrapped_tensors(module)
