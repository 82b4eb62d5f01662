"""How far MXFP4, under each scale rule, and MXFP8 move weights of known distributions.

python -m benchmarks.weight_error
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.report import table
from mxfp4_fx.core import mxfp8
from mxfp4_fx.core.formats import SCALE_RULES, dequantize, quantize

Errors = dict[str, dict[str, dict[str, float]]]  # distribution -> rule -> measure


def distributions(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Name -> ``count`` float32 samples, a multiple of 32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "normal": normal(count),
        # That of x y + z w for normal x, y, z and w.
        "Laplace": normal(2, count).prod(0) + normal(2, count).prod(0),
        "Student's t, 5 degrees": normal(count) / normal(5, count).square().mean(0).sqrt(),
    }


def errors(weights: Mapping[str, Tensor]) -> Errors:
    """For weights [..., K] of each name: their squared error over their squares, and the SNR."""
    return {
        name: {rule: _error(values, rule) for rule in SCALE_RULES}
        for name, values in weights.items()
    }


def in_mxfp8(weights: Mapping[str, Tensor]) -> Errors:
    """Return the same for MXFP8, which has one rule."""
    return {
        name: {"MXFP8": _apart(mxfp8.dequantize(*mxfp8.quantize(values), torch.float32), values)}
        for name, values in weights.items()
    }


def _error(weights: Tensor, rule: str) -> dict[str, float]:
    return _apart(dequantize(*quantize(weights, scale_rule=rule), torch.float32), weights)


def _apart(rounded: Tensor, weights: Tensor) -> dict[str, float]:
    exact = weights.double()
    error = ((rounded.double() - exact).square().sum() / exact.square().sum()).item()
    return {"relative_squared_error": error, "snr_db": -10 * math.log10(error)}


def text(found: Errors) -> str:
    """A table of them."""
    rows = [
        [name, rule, f"{error['relative_squared_error']:.6f}", f"{error['snr_db']:.2f} dB"]
        for name, rules in found.items()
        for rule, error in rules.items()
    ]
    return table(["weights", "rule", "squared error / squared weights", "SNR"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1 << 22, help="of each (%(default)s)")
    args = parser.parse_args(argv)
    samples = distributions(args.samples)
    of_8_bits = in_mxfp8(samples)
    print(text({name: found | of_8_bits[name] for name, found in errors(samples).items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
