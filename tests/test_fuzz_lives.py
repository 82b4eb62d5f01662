"""A few lives of models, of fixed seeds; ``fuzz/lives.py`` has what a life is."""

from __future__ import annotations

import pytest
from fuzz import lives

from mxfp4_fx.weights.state import TensorState

# Without its look at versions, geometry or optimizers the store fails some of them.
MORE = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 12)]


@pytest.mark.parametrize("seed", [0, *MORE])
def test_a_life(seed: int) -> None:
    lives.run(seed)


def test_a_life_that_fails_tells_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorState, "is_current", lambda *_: True)
    with pytest.raises(AssertionError, match=r"^the life with --seed 5 --steps 12:\na "):
        lives.run(5)
