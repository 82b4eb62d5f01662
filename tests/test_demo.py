"""``make demo`` at tiny sizes: examples/compile_model.py from an absent checkpoint to the end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from examples import compile_model

ARGS = ["--tiny", "--inner", "eager", "--new-tokens", "2", "--checkpoint"]


@pytest.fixture
def output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert compile_model.main([*ARGS, str(tmp_path / "checkpoint")]) == 0
    return capsys.readouterr().out


def test_says_what_it_promises(output: str) -> None:
    assert "1 of 1 MoE layers rewritten" in output
    assert re.search(r"total +76\.5 KiB +85\.1 KiB", output)
    assert re.search(r"difference of the logits, .*: 0\.\d+; bound 3\*0\.\d+ \+ ", output)
    assert re.search(r"tokens a second, .*: [\d.]+ uncompiled, [\d.]+ mxfp4", output)
    assert "generated: " in output


OTHER_FAMILIES = ("deepseek_v3", "glm4_moe", "minimax_m2", "mixtral", "olmoe", "qwen2_moe")


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in OTHER_FAMILIES)],
)
def test_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    assert compile_model.main([*ARGS, str(tmp_path / "checkpoint"), "--family", family]) == 0
    output = capsys.readouterr().out
    assert "1 layers of width 64, with 16 of the " in output
    assert "1 of 1 MoE layers rewritten" in output
    assert re.search(r"difference of the logits, .*: 0\.\d+; bound 3\*0\.\d+ \+ ", output)
    assert "generated: " in output


def test_a_difference_beyond_the_bound_stops_it() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(SystemExit, match="exceeds its bound"):
        compile_model.report_error(exact, exact + 0.01, exact + 0.1)
    compile_model.report_error(exact, exact + 0.01, exact - 0.01)
