"""A few lives of models, of fixed seeds; ``fuzz_lives.py`` has what a life is."""

from __future__ import annotations

import fuzz_lives
import pytest

from mxfp4_fx.weights.state import TensorState


# Without its look at versions, geometry or optimizers the store fails some of them.
@pytest.mark.parametrize("seed", range(12))
def test_a_life(seed: int) -> None:
    fuzz_lives.run(seed)


def test_a_life_that_fails_tells_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorState, "is_current", lambda *_: True)
    with pytest.raises(AssertionError, match=r"^the life with --seed 5 --steps 12:\na "):
        fuzz_lives.run(5)
