"""A few lives of models, of fixed seeds; ``fuzz_lives.py`` has what a life is."""

from __future__ import annotations

import fuzz_lives
import pytest

# Together they meet every step, freed weights in most, and errors of ours in some.
SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_life(seed: int) -> None:
    fuzz_lives.run(seed)


def test_a_life_that_fails_tells_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(life: fuzz_lives.Life, subject: fuzz_lives.Subject) -> None:
        subject.known["experts.down_proj_bias"] += 1

    monkeypatch.setattr(fuzz_lives.Life, "compile", forgetful)
    monkeypatch.setattr(fuzz_lives.Life, "check", fuzz_lives.Life.check)
    with pytest.raises(AssertionError, match=r"^the life with --seed 3 --steps 12:\na "):
        fuzz_lives.run(3)
