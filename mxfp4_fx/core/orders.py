"""Orders: how a model's tensors hold the matrices of its experts.

Kernels read a matrix as rows [N, K], in which gate and up alternate. A model may hold it transposed
and with all rows of the gate before those of up. Swizzling undoes that.

Shape letters: E experts, N output rows, K contraction, I intermediate (N = 2 I).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Order(NamedTuple):
    """The order of a weight. The names are those of transformers' experts interface.

    Attributes:
        is_transposed: floats are [E, K, N], not [E, N, K]. Packed weights are always [E, N, ...].
        is_concatenated: the rows are the I of gate, then the I of up; they alternate if not.
    """

    is_transposed: bool = True
    is_concatenated: bool = False

    def rows_of(self, matrix: Tensor) -> Tensor:
        """View one expert's floats as rows in the order of the kernels.

        Args:
            matrix: [K, N] or [N, K].

        Returns:
            [N, K], or [I, 2, K] if the weight is concatenated.
        """
        return self.alternating(matrix.T if self.is_transposed else matrix)

    def alternating(self, rows: Tensor) -> Tensor:
        """View rows [N, ...] in the order of the kernels: as they are, or [I, 2, ...]."""
        return rows.unflatten(0, (2, -1)).transpose(0, 1) if self.is_concatenated else rows


GPT_OSS = Order()


def alternate(bias: Tensor) -> Tensor:
    """Copy biases [E, 2I] of a concatenated weight into the order of the kernels."""
    return bias.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
