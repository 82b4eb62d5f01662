"""Experts whose parameters are DTensors, in one process: its mesh is this process alone.

Their forward computes with the local tensors, as transformers' has it under expert parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard


def as_dtensor(
    local: Tensor, placement: Placement | None = None, mesh: DeviceMesh | None = None
) -> nn.Parameter:
    """Return a parameter that is a DTensor, in the memory of ``local``."""
    mesh = mesh or init_device_mesh("cpu", (1,))
    whole = DTensor.from_local(local.detach(), mesh, [placement or Shard(0)])
    return nn.Parameter(whole, requires_grad=False)


def sharded(
    module: nn.Module,
    placement: Placement | None = None,
    *,
    mesh: DeviceMesh | None = None,
    apart: bool = False,
) -> Any:
    """Make DTensors of the parameters of an MLP's experts, in place; return the MLP.

    Args:
        apart: no graph has ``to_local()``, as under all-to-all: graphs get its results.
    """
    experts: Any = module.experts
    for name, parameter in experts.named_parameters():
        whole = as_dtensor(parameter, placement, mesh)
        setattr(experts, name, whole.requires_grad_(parameter.requires_grad))
    experts.forward = _with_shards_made_apart(experts) if apart else _with_shards(experts)
    return module


def _with_shards(experts: nn.Module) -> Callable[..., Any]:
    forward = experts.forward

    def with_shards(*args: Any) -> Any:
        with _shards(experts):
            return forward(*args)

    return with_shards


@contextlib.contextmanager
def _shards(experts: nn.Module) -> Iterator[None]:
    wholes = dict(experts.named_parameters(recurse=False))
    experts._parameters.update({name: whole.to_local() for name, whole in wholes.items()})
    try:
        yield
    finally:
        experts._parameters.update(wholes)


def _with_shards_made_apart(experts: nn.Module) -> Callable[..., Any]:
    forward = experts.forward
    shards = [_shards(experts)]

    @torch.compiler.disable
    def enter() -> None:
        shards[0] = _shards(experts)
        shards[0].__enter__()

    @torch.compiler.disable
    def leave() -> None:
        shards[0].__exit__(None, None, None)

    def with_shards(*args: Any) -> Any:
        enter()
        result = forward(*args)
        leave()
        return result

    return with_shards
