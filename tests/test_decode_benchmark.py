"""``python -m benchmarks.decode`` at toy sizes. How fast is not asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_clock import CountedClock

from benchmarks import decode
from benchmarks.contenders import WrongResult
from benchmarks.start_child import PIECES, WHOLE

TOY = "--tiny --layers 1 --new-tokens 2 --rounds 2 --inner eager --silent --output"


@pytest.mark.exhaustive
def test_both_ways_decode_the_same_tokens_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "decode.json"
    threads = str(torch.get_num_threads())
    argv = [*TOY.split(), str(output), "--threads", threads]
    assert decode.main(argv, clock=CountedClock(0.001)) == 0
    (result,) = json.loads(output.read_text("utf-8"))["decode"]
    samples = [result["milliseconds"][way]["samples"] for way in (WHOLE, PIECES)]
    assert [len(each) for each in samples] == [4, 4]  # the compiling round is none of them
    ratios = [pieces / whole for whole, pieces in zip(*samples, strict=True)]
    assert result["ratio"]["samples"] == ratios
    assert f"pieces / whole {result['ratio']['median']:.3f}" in capsys.readouterr().out


def test_other_logits_stop_the_run(no_gradients: None) -> None:
    class Model:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __call__(self, ids: Any, **_: Any) -> Any:
            out = type("Out", (), {})()
            out.past_key_values, out.logits = None, self.scale * torch.ones(1, 1, 8)
            return out

    ids = torch.zeros(1, 1, dtype=torch.long)
    for scale, is_wrong in ((1.0, False), (2.0, True)):
        models = {WHOLE: Model(1.0), PIECES: Model(scale)}
        if is_wrong:
            with pytest.raises(WrongResult, match="pieces: the logits differ"):
                decode.decode(models, ids, 1, 1, CountedClock(0.001))
        else:
            assert len(decode.decode(models, ids, 1, 1, CountedClock(0.001))[PIECES]) == 1
