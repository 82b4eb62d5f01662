"""``mxfp4_fx.dequantize``: packed experts back to transformers' dense ones."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from mxfp4_fx.core.errors import DequantizeError, DeviceFullWarning
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.formats import dequantize as dequantize_values
from mxfp4_fx.huggingface.inflated import UNPACKED
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.source import MXFP4, Source
from mxfp4_fx.weights.store import STORE

Model = TypeVar("Model", bound=nn.Module)


def dequantize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace a model's packed experts with dense ones, in place, and drop its quantization config.

    The layers follow one another, and the bytes of a layer are freed before the next one begins. A
    weight that does not fit on its device stays on the CPU, with a ``DeviceFullWarning``. A
    compiled model is compiled again at its next call.

    Args:
        model: what ``from_pretrained`` returned, or a module that contains it.
        dtype: float32, bfloat16 or float16, for all parameters; None means the model's own.

    Returns:
        The model.

    Raises:
        DequantizeError: the model has neither packed experts nor dense ones that ``free_weights``
            freed, or a part of it is offloaded. The model is unchanged.
    """
    unpack_experts(model, dtype)
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")  # PEFT's wrappers show their model's as theirs
        if quantizer is not None:
            quantizer.remove_quantization_config(module)
    return model


def unpack_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the packed experts and cast the other parameters; see :func:`dequantize`."""
    places: dict[int, list[str]] = {}  # id of a module -> its names; tied ones have several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedExperts):
            places.setdefault(id(module), []).append(name)
    owner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    others = [
        held
        for module in model.modules()
        if not isinstance(module, PackedExperts)
        for held in module.parameters(recurse=False)
        if is_freed(held)
    ]
    if owner is None or not (places or others):
        raise DequantizeError(
            f"{type(model).__name__} has no packed experts: pass a model that "
            f"mxfp4_fx.from_pretrained returned"
        )
    for names in places.values():
        if cast(PackedExperts, model.get_submodule(names[0])).shards:
            raise DequantizeError(
                f"{names[0]} is spread over processes, for which dense experts are loaded in "
                f"another way: load the checkpoint with transformers, the same distributed_config "
                f"and Mxfp4Config(dequantize=True) instead"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise DequantizeError(
                f"{name} is offloaded, where dense weights have no place: load the checkpoint with "
                f"transformers and Mxfp4Config(dequantize=True) instead"
            )
    STORE.restore(others)  # dense weights, whose values the store has in MXFP4
    for names in tqdm(places.values(), "mxfp4: dequantizing experts", leave=False, disable=None):
        parents = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        # Packed experts are never trainable. Dense ones become so if the router beside them is.
        trainable = any(parameter.requires_grad for parameter in parents[0].parameters())
        packed = cast(PackedExperts, model.get_submodule(names[0]))
        if packed.replaced:
            experts = _dense_of_family(packed, dtype or owner.dtype)
        else:
            experts = _dense(packed, owner.config.get_text_config(), dtype)
        del packed
        for parent, name in zip(parents, names, strict=True):
            setattr(parent, name.rpartition(".")[2], experts.requires_grad_(trainable))
    if dtype not in (None, owner.config.dtype):  # else float32 norms stay so
        # Not model.to(dtype), which casts buffers, too: rotary frequencies must stay float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        owner.config.dtype = dtype


def dense_weight(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize blocks [E, N, K/32, 16] and scales [E, N, K/32] to a weight [E, K, N].

    This goes expert by expert. The weight is on the device of the blocks, or on the CPU if that
    device is full.
    """
    experts, n, groups = scales.shape
    shape = (experts, groups * BLOCK, n)
    try:
        weight = blocks.new_empty(shape, dtype=dtype)
    except torch.OutOfMemoryError:
        warnings.warn(
            f"{blocks.device} is full: a dense weight {list(shape)} stays on the CPU. Move the "
            f"model to one device before it is run, with model.cpu() say",
            DeviceFullWarning,
            stacklevel=2,
        )
        weight = torch.empty(shape, dtype=dtype, device="cpu")
    for expert in range(experts):
        dequantize_values(blocks[expert], scales[expert], dtype, out=weight[expert].T)
    return weight


def _dense(packed: PackedExperts, config: Any, dtype: torch.dtype | None) -> Any:
    """Return transformers' experts with the values, the constants and the hook of packed ones."""
    with torch.device("meta"):
        experts = GptOssExperts(config)
    for name in PROJECTIONS:
        bias = packed.get_parameter(f"{name}_bias")
        weight = _values(packed, name, dtype or bias.dtype)
        experts.register_parameter(name, nn.Parameter(weight))
        experts.register_parameter(f"{name}_bias", bias)
    experts.alpha, experts.limit = packed.alpha, packed.limit
    return _in_its_place(packed, experts)


def _dense_of_family(packed: PackedExperts, dtype: torch.dtype) -> Any:
    """Return the same for experts of another family, which are [E, N, K], gate before up."""
    (replaced,) = cast(Any, packed.replaced)
    # The config stays the model's, which chooses the implementation of its experts.
    experts = copy.deepcopy(replaced, {id(replaced.config): replaced.config})
    for name in PROJECTIONS:
        weight = _values(packed, name, dtype).transpose(1, 2)
        if name == PROJECTIONS[0]:
            weight = weight.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        experts.register_parameter(name, nn.Parameter(weight.contiguous()))
    return _in_its_place(packed, experts)


def _values(packed: PackedExperts, name: str, dtype: torch.dtype) -> Tensor:
    """Return a projection's weight [E, K, N]."""
    # After free_weights, only the store has the weight, in a kernel's layout.
    held = tuple(packed.get_parameter(f"{name}_{part}") for part in ("blocks", "scales"))
    source = Source(held, MXFP4)
    try:
        blocks, scales = STORE.values(source)
    except torch.OutOfMemoryError:
        blocks, scales = STORE.values(source, torch.device("cpu"))
    with torch.no_grad():
        return dense_weight(blocks, scales, dtype)


def _in_its_place(packed: PackedExperts, experts: Any) -> Any:
    """Return dense experts with the hook and the mode of packed ones."""
    setattr(experts, UNPACKED, True)
    hook = getattr(packed, "_hf_hook", None)
    if hook is not None:  # the model's layers are on several devices
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(experts, hook)
    return experts.train(packed.training)
