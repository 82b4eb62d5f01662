"""The sizes of a MoE MLP."""

from __future__ import annotations

import dataclasses

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The defaults are gpt-oss-20b's."""

    hidden: int = 2880
    intermediate: int = 2880
    experts: int = 32
    top_k: int = 4

    @property
    def weights(self) -> int:
        """Weights of an expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def mxfp4_bytes(self) -> int:
        """Bytes of an expert in MXFP4, scales included."""
        return self.weights // BLOCK * (BYTES_PER_BLOCK + 1)

    @property
    def bf16_bytes(self) -> int:
        """Bytes of an expert as transformers holds it."""
        return 2 * self.weights

    def flops(self, tokens: int) -> float:
        """Of the experts; a multiply-add is two."""
        return 2.0 * tokens * self.top_k * self.weights
