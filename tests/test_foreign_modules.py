"""A model that transformers loaded with MXFP4 modules of its own: nothing is missed in silence."""

from __future__ import annotations

from typing import Any

import hub_package
import pytest
import torch
from models import compile_with, hidden, model, tokens
from torch._dynamo.exc import BackendCompilerFailed
from transformers import GptOssForCausalLM
from transformers.integrations import mxfp4

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteWarning
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.huggingface.packed import PROJECTIONS

REMEDY = r"transformers holds its weights in MXFP4.*load the model with mxfp4_fx\.from_pretr"

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> GptOssForCausalLM:
    """As transformers puts it together where its version of ``kernels`` is installed."""
    monkeypatch.setattr(mxfp4, "triton_kernels_hub", hub_package, raising=False)
    whole = model(torch.bfloat16, num_experts_per_tok=2)
    for layer in whole.model.layers:
        held, experts = layer.mlp.experts, mxfp4.Mxfp4GptOssExperts(whole.config)
        for name in PROJECTIONS:
            bias = getattr(held, f"{name}_bias")
            getattr(experts, f"{name}_bias").copy_(bias)
            packed = quantize(getattr(held, name).transpose(1, 2))
            mxfp4.swizzle_mxfp4_convertops(*packed, experts, name, "cpu", hub_package)
        layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, experts)
    return whole


def test_a_miss_names_the_remedy(loaded: Any) -> None:
    mlp, x = loaded.model.layers[0].mlp, hidden(dtype=torch.bfloat16)
    expected = mlp(x)[0]
    with pytest.warns(MissedRewriteWarning, match=REMEDY):
        assert torch.equal(compile_with(mlp)(x)[0], expected)


def test_strict_makes_it_an_error(loaded: Any) -> None:
    mlp = loaded.model.layers[0].mlp
    with pytest.raises(BackendCompilerFailed, match=REMEDY):
        compile_with(mlp, options={"strict": True})(hidden(dtype=torch.bfloat16))


@pytest.mark.exhaustive
def test_explain_lists_each_layer(loaded: Any) -> None:
    told = mxfp4_fx.explain(loaded, tokens())
    assert [m.layer for m in told.misses] == [f"model.layers.{i}.mlp" for i in range(2)]
    assert all("Mxfp4GptOssMLP" in miss.reason for miss in told.misses)
