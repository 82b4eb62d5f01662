"""A model whose experts transformers made dense while loading: told when it is compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import write_packed
from loaded import IDS, dequantized
from models import compile_with
from torch import nn
from transformers import AutoModelForCausalLM

import mxfp4_fx
from mxfp4_fx.core.errors import InflatedExpertsWarning, MissedRewriteWarning
from mxfp4_fx.experts import look_at
from mxfp4_fx.huggingface.inflated import note_of_inflated

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


def plain(path: Path, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **changes)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def note(model: Any) -> str | None:
    return note_of_inflated(model, [experts for _, experts in look_at(model)[1]])


# In a layer, 4 experts of 64 x 192 and 96 x 64 weights, of 2 bytes and of 17 / 32.
TOLD = (
    r"the experts of this GptOssForCausalLM .* from 38\.2 KiB of MXFP4 to 144\.0 KiB"
    r".*quantization_config=mxfp4_fx\.Mxfp4Config\(\)"
)


def test_a_compiled_model_is_told_once(packed: Path) -> None:
    compiled = compile_with(plain(packed, num_hidden_layers=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", InflatedExpertsWarning)
        with pytest.raises(InflatedExpertsWarning):  # as an error it is told again
            compiled(IDS)
    with pytest.warns(InflatedExpertsWarning, match=TOLD) as seen:
        compiled(IDS)
    compiled(IDS)  # warnings of this package are errors
    assert [w.category for w in seen].count(InflatedExpertsWarning) == 1


def test_explain_shows_it(packed: Path) -> None:
    found = mxfp4_fx.explain(plain(packed), IDS, options={"skip": "layers.1"})
    (shown,) = found.notes
    assert "to 144.0 KiB" in shown  # only experts that are quantized again count
    assert f"note: {shown}" in str(found)
    assert found.to_dict()["notes"] == [shown]


@pytest.mark.exhaustive
def test_experts_that_are_being_trained_are_not_quantized_again(packed: Path) -> None:
    with torch.enable_grad(), pytest.warns(MissedRewriteWarning) as seen:
        compile_with(plain(packed))(IDS)
    assert not [w for w in seen if w.category is InflatedExpertsWarning]


@pytest.mark.parametrize(
    "load",
    [plain, dequantized, lambda path: Wrapper(plain(path)), lambda path: plain(path).float()],
    ids=["plain", "asked for", "wrapped", "cast"],
)
def test_inflated_models(packed: Path, load: Callable[[Path], Any]) -> None:
    """transformers leaves the same traces if the user asked for dense experts."""
    assert "from 76.5 KiB of MXFP4" in (note(load(packed)) or "")


def trained(path: Path, *experts: int) -> Any:
    model = plain(path)
    for name, weight in model.named_parameters():
        if name.endswith(checkpoints.PROJECTIONS):
            weight[list(experts)] *= 1.1
    return model


def of_a_dense_checkpoint(path: Path) -> Any:
    """Though its values are MXFP4's."""
    return plain(checkpoints.write_dense(path.parent / "dense"))


OTHERS = {
    "packed": mxfp4_fx.from_pretrained,
    "dequantized by us": lambda path: mxfp4_fx.dequantize(mxfp4_fx.from_pretrained(path)),
    "skipped when loaded": lambda path: mxfp4_fx.from_pretrained(path, skip="layers.1"),
    "trained": lambda path: trained(path, 0, 1, 2, 3),
    "an expert trained": lambda path: trained(path, 2),
    "a dense checkpoint": of_a_dense_checkpoint,
}


@pytest.mark.parametrize("load", OTHERS.values(), ids=OTHERS)
def test_other_models(packed: Path, load: Callable[[Path], Any]) -> None:
    assert note(load(packed)) is None
