"""Parameters of packed experts of which each process holds a part, and what the whole is.

With expert parallelism transformers makes the parameters DTensors and reads a process's own part of
the files for each. ``PackedExperts.keep_shards`` then holds the part as a plain parameter. It has
an identity of its own, by which guards, the store of swizzled weights and ``free_weights`` go.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mxfp4_fx.weights.deferred import DeferredTensor


@dataclasses.dataclass(frozen=True)
class Shard:
    """How the processes of a mesh share a parameter.

    Attributes:
        mesh: the processes.
        placements: how each of the mesh's dimensions splits the parameter.
        shape: that of the whole parameter.
    """

    mesh: Any
    placements: Sequence[Any]
    shape: torch.Size

    @classmethod
    def of(cls, parameter: Any) -> Shard | None:
        """Return how a DTensor is shared, or None for any other tensor."""
        if not hasattr(parameter, "placements"):
            return None
        return cls(parameter.device_mesh, parameter.placements, parameter.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # process groups cannot be copied

    def distributed(self, part: Tensor) -> Tensor:
        """Return the whole parameter as a DTensor on this process's part of it."""
        from torch.distributed.tensor import DTensor

        whole = torch.empty(self.shape, device="meta")
        made: Tensor = DTensor.from_local(
            part,
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=whole.stride(),
        )
        return made

    def gathered(self, part: Tensor) -> Tensor:
        """Return the whole parameter on the mesh's first process, and an empty tensor elsewhere.

        All processes of the mesh must call this.
        """
        part = part.values() if isinstance(part, DeferredTensor) else part
        if self.mesh.ndim > 1 or not self.placements[0].is_shard(0):
            whole: Tensor = self.distributed(part).full_tensor()  # type: ignore[attr-defined]
            return whole
        group = self.mesh.get_group()
        if self.mesh.get_local_rank() > 0:
            dist.gather(part.contiguous(), None, group=group, group_dst=0)
            return part.new_empty(0)
        whole = part.new_empty(self.shape)
        dist.gather(part.contiguous(), [*whole.chunk(self.mesh.size())], group=group, group_dst=0)
        return whole

    def share(self, whole: Tensor) -> Tensor:
        """Return a plain tensor that every process has whole as a DTensor like the parameter."""
        from torch.distributed.tensor import distribute_tensor

        shared: Tensor = distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None)
        return shared

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this process's part of a parameter, which may be a DTensor or plain."""
        part: Tensor = (whole if Shard.of(whole) else self.share(whole)).to_local()  # type: ignore[attr-defined]
        return part


def gathered_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """Return a state dict for saving, or None if this model has no shards.

    The first process has every parameter whole in it. The others have empty tensors for those that
    are shared, so that no more than one of these is whole there at a time. All processes must call
    this.
    """
    places: dict[str, Shard] = {}
    for name, module in model.named_modules():
        shards: Any = getattr(module, "shards", {})
        places |= {f"{name}.{parameter}": shard for parameter, shard in shards.items()}
    if not places:
        return None
    with _as_if_whole(model):
        state = model.state_dict()  # the parts, of which freed ones are made when they are read
    return {
        name: places[name].gathered(value) if name in places else value
        for name, value in state.items()
    }


@contextlib.contextmanager
def _as_if_whole(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "shards")]
    sharing = {module: module.shards for module in modules}
    try:
        for module in sharing:
            module.shards = {}
        yield
    finally:
        for module, shards in sharing.items():
            module.shards = shards
