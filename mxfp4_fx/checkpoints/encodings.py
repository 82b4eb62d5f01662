"""How files encode a matrix in two tensors: MXFP4, and the FP8 that lies beside it in some.

Shape letters: N output rows, K contraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, dequantize, quantize

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Mxfp4:
    """Blocks [N, K/2] and scales [N, K/32], or one for each expert, whose bits are those of uint8.

    Attributes:
        dtypes: those that the files declare for blocks and scales.
    """

    dtypes: tuple[torch.dtype, torch.dtype]

    def shape(self, blocks: tuple[int, ...]) -> tuple[int, int]:
        """Return (N, K) of a matrix whose blocks have a shape."""
        return blocks[-2], 2 * blocks[-1]

    def scales_shape(self, n: int, k: int) -> tuple[int, int]:
        return n, k // BLOCK

    def is_whole(self, n: int, k: int) -> bool:
        """Return whether a matrix [n, k] has no incomplete blocks, which the format has not."""
        return k % BLOCK == 0

    def to_dense(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantize blocks and scales to [N, K]. Their dtypes may be any that hold the values."""
        blocks, scales = (
            part.to(stored).view(torch.uint8)
            for part, stored in zip((blocks, scales), self.dtypes, strict=True)
        )
        return dequantize(blocks.unflatten(1, (-1, BYTES_PER_BLOCK)), scales, dtype)

    def from_dense(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize [N, K]; return blocks and scales as in the files."""
        blocks, scales = quantize(matrix)
        return blocks.flatten(1).view(self.dtypes[0]), scales.view(self.dtypes[1])


@dataclass(frozen=True)
class Fp8:
    """E4M3 values [N, K], and an E8M0 scale for each rectangle of them.

    Attributes:
        rectangle: its rows and columns; those at the right and lower edges may be smaller.
    """

    rectangle: tuple[int, int]
    dtypes = (torch.float8_e4m3fn, torch.float8_e8m0fnu)

    def shape(self, blocks: tuple[int, ...]) -> tuple[int, int]:
        return blocks[-2], blocks[-1]

    def scales_shape(self, n: int, k: int) -> tuple[int, int]:
        rows, columns = self.rectangle
        return -(-n // rows), -(-k // columns)

    def is_whole(self, n: int, k: int) -> bool:
        return True

    def to_dense(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantize values and scales to [N, K]. Their dtypes may be any that hold the values."""
        return (blocks.float() * self._spread(scales.float(), blocks.shape)).to(dtype)

    def from_dense(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize [N, K] with the least scales that hold all values; infinities become NaN."""
        (n, k), (rows, columns) = matrix.shape, self.rectangle
        counts = self.scales_shape(n, k)
        values = matrix.float()
        values = values.where(values.isfinite(), torch.nan)
        largest = values.new_zeros([counts[0] * rows, counts[1] * columns])
        largest[:n, :k] = values.abs().nan_to_num(0)
        largest = largest.view(counts[0], rows, counts[1], columns).amax((1, 3))
        mantissa, exponent = torch.frexp(largest / E4M3_MAX)  # mantissa in [0.5, 1), or 0
        exponent = (exponent - (mantissa == 0.5).int()).clamp(-127, 127)
        scales = torch.ldexp(torch.ones_like(largest), exponent).to(self.dtypes[1])
        return (values / self._spread(scales.float(), matrix.shape)).to(self.dtypes[0]), scales

    def _spread(self, scales: Tensor, shape: torch.Size) -> Tensor:
        for dim, size in enumerate(self.rectangle):
            scales = scales.repeat_interleave(size, dim)
        return scales[: shape[0], : shape[1]]


Encoding = Mxfp4 | Fp8
