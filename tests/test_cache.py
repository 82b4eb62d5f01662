"""Inductor's caches: no weight is in a key or in a cached artifact."""

from __future__ import annotations

import pytest
import torch
from models import hidden, mlp
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache


@pytest.mark.usefixtures("no_gradients")
def test_other_weights_hit_the_cache_and_are_right() -> None:
    x = hidden()
    with fresh_cache():
        for seed, found in ((1, "autograd_cache_miss"), (2, "autograd_cache_hit")):
            torch.compiler.reset()
            counters.clear()
            module = mlp(seed=seed)
            out, expected = torch.compile(module, backend="mxfp4")(x)[0], module(x)[0]
            assert counters["aot_autograd"][found] == 1
            # both sides sum H and then I products in float32
            bound = 2 * (64 + 96) * 2**-24 * expected.abs().max()
            assert (out - expected).abs().max() <= bound
