"""The private names of ``torch.distributed``: like ``torch_private.py``.

A torch may be built without it, and it takes long to import. So its classes are looked up in
modules that are imported already: where these are not, nothing can be an object of theirs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage, nn

from mxfp4_fx.core.torch_private import look_up, storage_key


def is_dtensor(value: object) -> bool:
    """Return whether a value is a DTensor, a parameter or not, and of no subclass."""
    return type(value) is _imported("torch.distributed.tensor", "DTensor")


def dtensors_in(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the modules' own parameters that are DTensors, of three dimensions or more.

    It takes about a microsecond for each module.
    """
    kind = _imported("torch.distributed.tensor", "DTensor")
    if kind is None:
        return []
    held = (p for module in modules for p in module._parameters.values())
    return [p for p in held if p is not None and type(p) is kind and p.ndim > 2]


def shard_of(whole: Any) -> Tensor:
    """Return the local tensor that a DTensor wraps: the same object at every call.

    ``to_local()`` gives a view of it; it also waits for a tensor that is not there yet.
    """
    shard: Tensor = whole._local_tensor
    return whole.to_local() if is_pending(shard) else shard


def is_pending(value: object) -> bool:
    """Return whether a tensor is the result of a collective that may still run."""
    kind = _imported("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    return kind is not None and isinstance(value, kind)


def why_no_shard(whole: Any) -> str:
    """Return why a DTensor's local tensor is no part of its values, or "" if it is one."""
    if any(placement.is_partial() for placement in whole.placements):
        return (
            "its placement is Partial, so the values of all ranks must be added up to get the "
            "weight: redistribute it to Shard or Replicate"
        )
    if is_pending(whole._local_tensor):
        return (
            "its local tensor is an AsyncCollectiveTensor, the result of a collective that may "
            "still run: make the parameter of what its wait() returns"
        )
    return ""


def is_filled_by_fsdp(tensor: Tensor) -> bool:
    """Return whether FSDP2 fills the tensor's memory anew for each forward.

    Its storage and its version stay the same then, and maybe the address.
    """
    return _fsdp_parameter(tensor) is not None


def gathered_from(tensor: Tensor) -> Tensor | None:
    """Return the DTensor of which FSDP2 makes a tensor by a copy, or None.

    FSDP2 copies where this process alone has the parameter (a group of one, as that of experts may
    be under expert parallelism). The copy is not asked for if it has other values: a cast to
    another dtype, or what an extension makes of it.
    """
    parameter = _fsdp_parameter(tensor)
    if parameter is None or getattr(parameter.mesh_info, "shard_mesh_size", 0) != 1:
        return None
    whole: Tensor = parameter.sharded_param
    shard = shard_of(whole)
    is_copied = (
        (shard.dtype, shard.device, shard.shape, shard.stride(), 0)
        == (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset())
        and not tensor.is_inference()
        and tensor._version == 0  # nobody has written to the copy
        and not hasattr(shard, "fsdp_pre_all_gather")
        and storage_key(parameter._sharded_param_data) == storage_key(shard)
    )
    return whole if is_copied else None


# The storages that FSDP2 fills -> its records. To search all records takes a millisecond.
_known: weakref.WeakKeyDictionary[UntypedStorage, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def _fsdp_parameter(tensor: Tensor) -> Any:
    """Return FSDP2's record of the parameter whose gathered values have a tensor's memory."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    known = _known.get(tensor.untyped_storage(), lambda: None)()
    if known is not None:
        return known
    mapping = look_up("torch.distributed._composable_state", "_module_state_mapping")
    key = storage_key(tensor)
    for state in [reference() for reference in list(mapping.values())]:
        for group in getattr(state, "_fsdp_param_groups", ()):
            for parameter in group.fsdp_params:
                gathered = getattr(parameter, "_unsharded_param", None)
                if gathered is not None and storage_key(_plain(gathered)) == key:
                    _known[tensor.untyped_storage()] = weakref.ref(parameter)
                    return parameter
    return None


def _plain(tensor: Tensor) -> Tensor:
    return shard_of(tensor) if is_dtensor(tensor) else tensor


def _imported(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
