"""transformers older than 5.8: what is left uncompiled says so, and which version is needed."""

from __future__ import annotations

import functools
import logging
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import compile_with, hidden, mlp
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import mxfp4_fx
from mxfp4_fx.cli import main
from mxfp4_fx.core import version
from mxfp4_fx.core.errors import CheckpointError, MissedRewriteWarning
from mxfp4_fx.huggingface import capture

WORDS = "transformers 4.57.6 writes its experts in another form: 5.8 or newer is needed"


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "transformers_version", lambda: "4.57.6")


@pytest.mark.parametrize(
    ("found", "too_old"),
    [
        *((older, True) for older in ("4.57.6", "5.0.0", "5.7.0", "5.7.1.dev0")),
        *((newer, False) for newer in ("5.8.0", "5.8", "5.10.4", "5.24.0.dev0", "6.0.0")),
    ],
)
def test_versions_are_compared_by_their_numbers(
    monkeypatch: pytest.MonkeyPatch, found: str, too_old: bool
) -> None:
    monkeypatch.setattr(version, "transformers_version", lambda: found)
    assert version.too_old_transformers() == (found if too_old else None)


def miss(module: Any) -> str:
    """Return what is said of a model whose experts are not rewritten."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MissedRewriteWarning)
        compile_with(module)(hidden())
    (warning,) = (w for w in caught if w.category is MissedRewriteWarning)
    return str(warning.message)


def other_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.sigmoid() * up


def test_another_form_names_the_version(older: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GptOssExperts, "_apply_gate", other_gate)
    assert f"experts: {WORDS} (not the grouped_mm form: " in miss(mlp())


def test_a_part_of_the_form_names_the_version(older: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def first_projection(self: Any, x: Tensor, *_: Any) -> Tensor:
        return torch.bmm(x.expand(self.num_experts, -1, -1), self.gate_up_proj)[0]

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", first_projection)
    assert f"{WORDS} (no weighted sum over the chosen experts" in miss(mlp().experts)


def test_the_form_of_this_version_is_not_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GptOssExperts, "_apply_gate", other_gate)
    assert "experts: not the grouped_mm form: " in miss(mlp())


class OwnForm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.weight)


def test_a_form_of_another_package_is_not_blamed_on_it(older: None) -> None:
    assert "(top level): no weighted sum over the chosen experts" in miss(OwnForm())


def test_experts_in_no_graph_name_the_version(older: None) -> None:
    module = mlp()
    module.experts.forward = torch.compiler.disable(module.experts.forward)
    assert f"experts: it ran uncompiled: {WORDS}" in miss(module)


class OwnExperts(GptOssExperts):
    pass


def test_experts_of_another_package_have_their_own_reason(older: None) -> None:
    module = mlp()
    module.experts.__class__ = OwnExperts
    module.experts.forward = torch.compiler.disable(module.experts.forward)
    assert "experts: it ran uncompiled: a graph break or a hook" in miss(module)


def test_its_loop_is_not_captured_as_its_grouped_form(
    older: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: set[str] = set()
    monkeypatch.setattr(capture, "_prepared", prepared)
    monkeypatch.setattr(capture, "_seen", 0)
    monkeypatch.setattr(capture, "_substitute", lambda *_: pytest.fail("was captured"))
    capture.prepare_capture()
    assert not prepared


def test_loading_names_the_version(
    older: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = r"this needs transformers 5\.8 or newer \(.*\): 4\.57\.6 is installed"
    with pytest.raises(CheckpointError, match=needed):
        mxfp4_fx.from_pretrained(tmp_path)
    assert main(["explain", str(tmp_path)]) == 1
    assert "error: this needs transformers 5.8 or newer" in capsys.readouterr().err


def test_questions_for_a_version_do_not_break_the_graph() -> None:
    """As transformers asks, up to 5.14: the mark that keeps Dynamo out is on a cache."""

    @functools.lru_cache
    def is_torch_less_or_equal(version: str) -> bool:
        logging.getLogger("asked").debug(version)
        return torch.__version__ <= version

    asking = types.ModuleType("asking")
    asking.is_torch_less_or_equal = torch.compiler.assume_constant_result(is_torch_less_or_equal)

    def run(x: Tensor) -> Tensor:
        return x + 1 if asking.is_torch_less_or_equal("1.0") else x + 2

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="Logger"):
        compiled(torch.zeros(2))
    capture._take_as_constants(asking)
    torch.compiler.reset()
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 2.0))
