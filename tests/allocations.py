"""What operators allocate: watched, and refused once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OutOfMemoryOnce(TorchDispatchMode):
    """Fails the first call of an operator as a device without memory would."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator
        self.failed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.failed and func.overloadpacket.__name__ == self.operator:
            self.failed = True
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


class LargestAllocation(TorchDispatchMode):
    """Notes the largest storage that any operator brings into being, results excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return result

    def bytes_besides(self, *known: Tensor) -> int:
        own = {tensor.untyped_storage().data_ptr() for tensor in known}
        return max(s.nbytes() for address, s in self.storages.items() if address not in own)
