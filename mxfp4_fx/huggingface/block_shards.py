"""Parameters of experts that tensor parallelism cuts, and which part of the whole a rank has.

Ranges are whole MXFP4 blocks of I, as equal as they can be: 2880 channels are 90 blocks, of which 4
ranks have 23, 23, 22 and 22. No placement of a DTensor is like that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.weights.deferred import DeferredTensor

# Parameter -> the dimension that is cut, and its elements for each block of I.
DENSE = {
    "gate_up_proj": (2, 2 * BLOCK),
    "gate_up_proj_bias": (1, 2 * BLOCK),
    "down_proj": (1, BLOCK),
}
PACKED = {
    "gate_up_proj_blocks": (1, 2 * BLOCK),
    "gate_up_proj_scales": (1, 2 * BLOCK),
    "gate_up_proj_bias": (1, 2 * BLOCK),
    "down_proj_blocks": (2, 1),
    "down_proj_scales": (2, 1),
}
ONCE = "down_proj_bias"


def block_range(blocks: int, rank: int, size: int) -> tuple[int, int]:
    """Return a rank's range [first, end) of blocks; the first ranks have one more if need be."""
    each, rest = divmod(blocks, size)
    first = rank * each + min(rank, rest)
    return first, first + each + (rank < rest)


@dataclasses.dataclass(frozen=True)
class BlockShard:
    """How the ranks of a mesh share a parameter.

    Attributes:
        mesh: the ranks.
        shape: that of the whole parameter.
        dim: the dimension that is cut, or None: the first rank has the parameter, the others zeros.
        unit: elements of that dimension for each block.
    """

    mesh: Any
    shape: torch.Size
    dim: int | None
    unit: int = 1

    @classmethod
    def of(cls, name: str, shape: torch.Size, mesh: Any) -> BlockShard:
        """Return how a parameter of this name and shape, packed or dense, is shared."""
        dim, unit = (PACKED | DENSE).get(name, (None, 1))
        return cls(mesh, shape, dim, unit)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockShard:
        return self  # process groups cannot be copied

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """Return a rank's part of the whole parameter, as a view where it is one."""
        if self.dim is None:
            return whole if rank == 0 else torch.zeros_like(whole)
        blocks = self.shape[self.dim] // self.unit
        first, end = block_range(blocks, rank, self.mesh.size())
        return whole.narrow(self.dim, first * self.unit, (end - first) * self.unit)

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of the whole parameter, in memory of its own."""
        return self.part(whole, self.mesh.get_local_rank()).clone(
            memory_format=torch.contiguous_format
        )

    def gathered(self, part: Tensor) -> Tensor:
        """Return the whole parameter, on the CPU of the first rank, and an empty tensor elsewhere.

        All ranks of the mesh must call this.
        """
        part = part.values() if isinstance(part, DeferredTensor) else part
        group, rank = self.mesh.get_group(), self.mesh.get_local_rank()
        if rank > 0:
            if self.dim is not None:
                dist.send(part.contiguous(), dist.get_global_rank(group, 0), group)
            return part.new_empty(0)
        if self.dim is None:
            return part.cpu()
        whole = torch.empty(self.shape, dtype=part.dtype)
        self.part(whole, 0).copy_(part)
        for other in range(1, self.mesh.size()):
            place = self.part(whole, other)
            room = torch.empty(place.shape, dtype=part.dtype, device=part.device)
            dist.recv(room, dist.get_global_rank(group, other), group)
            place.copy_(room)
        return whole

    def distributed(self, part: Tensor) -> Tensor:
        """Raise a CheckpointError: no tensor says that it is this part of the whole."""
        raise CheckpointError(
            "the state dict of experts under tensor parallelism would have this rank's part of "
            "them and no word of it: save with model.save_pretrained(...) on all ranks, which "
            "gathers"
        )


def dense_part(shard: BlockShard, projection: str, whole: Tensor) -> Tensor:
    """Return this rank's part, a view, of the dense weight whose blocks are shared in this way."""
    dense = BlockShard.of(projection, whole.shape, shard.mesh)
    return dense.part(whole, shard.mesh.get_local_rank())
