"""The steps of optimizers, whose fused kernels write without raising a tensor's version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Store(Protocol):
    """What is told of steps: ``WeightStore``."""

    def __len__(self) -> int: ...

    def refresh(self, tensors: Iterable[Tensor]) -> int: ...


def tell(store: Store) -> None:
    """Let a store know, from now on, that an optimizer writes to its parameters."""

    def is_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if len(store) and not torch.compiler.is_dynamo_compiling():
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            store.refresh(p for p in parameters if p.requires_grad or p.grad is not None)

    # The hook also runs before a step, because a step may be interrupted.
    register_optimizer_step_pre_hook(is_stepped)
    register_optimizer_step_post_hook(is_stepped)
