"""``mxfp4_fx.compile``: what it cannot compile in pieces is compiled as a whole, and said so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import FORMS, Graphs, mlp, model, tokens
from test_layerwise import compiled, expected_steps, mlps_compiled, rewritten, steps
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssDecoderLayer

import mxfp4_fx
from mxfp4_fx.core.errors import (
    NoExpertsWarning,
    OptionError,
    WholeModelWarning,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


class OtherLayer(GptOssDecoderLayer):
    pass


class OtherAttention(GptOssAttention):
    pass


def other_layer(layer: Any) -> None:
    layer.__class__ = OtherLayer


def other_attention(layer: Any) -> None:
    layer.self_attn.__class__ = OtherAttention


def replaced_forward(layer: Any) -> None:
    forward = layer.self_attn.k_proj.forward
    layer.self_attn.k_proj.forward = lambda x: forward(x)


def hook(layer: Any) -> None:
    layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 2)


CHANGES = {
    other_layer: "model.layers.1 cannot be compiled in pieces: it is a OtherLayer",
    other_attention: "model.layers.1 .*: its attention is a OtherAttention",
    replaced_forward: "model.layers.1 .*the forward of self_attn.k_proj was replaced",
    hook: "model.layers.1 .*self_attn.k_proj has a hook, hook.<locals>.<lambda>",
}


def changed(change: Callable[[Any], None], make: Callable[[], Any] = model) -> Any:
    whole = make()
    change(whole.model.layers[1])
    return whole


def some(values: Iterable[Any], *common: Any) -> list[Any]:
    """Parameters of a test, of which these alone run in ``make test``."""
    rest = [pytest.mark.exhaustive]
    return [pytest.param(v, marks=() if v in common else rest, id=v.__name__) for v in values]


@pytest.mark.parametrize("change", some(CHANGES, hook))
def test_an_unknown_layer(change: Callable[[Any], None]) -> None:
    graphs = Graphs()
    with pytest.warns(WholeModelWarning, match=CHANGES[change]) as caught:
        whole = compiled(changed(change), graphs)
    assert len(caught) == 1
    expected = changed(change, mlps_compiled)(tokens(), use_cache=True).logits
    assert torch.equal(whole(tokens(), use_cache=True).logits, expected)
    assert rewritten(graphs) == [2]


@pytest.mark.exhaustive
def test_a_hook_that_comes_later() -> None:
    """In the call that meets it, the cache is updated once; later calls are compiled as a whole."""
    whole, other, graphs, cache = model(), mlps_compiled(), Graphs(), DynamicCache()
    compiled(whole, graphs)
    whole(tokens(), past_key_values=cache)
    for one in (whole, other):
        hook(one.model.layers[1])
    with pytest.warns(WholeModelWarning, match=CHANGES[hook]) as caught:
        found = steps(whole)
    assert len(caught) == 1
    assert all(map(torch.equal, found, steps(other)))
    assert max(rewritten(graphs)) == 2


ATTENTION = GptOssAttention.forward
CACHE = "cache" if "cache" in ATTENTION.__code__.co_varnames else "past_key_values"


def asks_first(self: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get(CACHE) is not None:
        kwargs[CACHE].get_seq_length(0)
    return ATTENTION(self, *args, **kwargs)


def asks_afterwards(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = ATTENTION(self, *args, **kwargs)
    if kwargs.get(CACHE) is not None:
        output = output[0] * kwargs[CACHE].get_seq_length(0), output[1]
    return output


def updates_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = ATTENTION(self, *args, **kwargs)
    if kwargs.get(CACHE) is not None:
        output = ATTENTION(self, *args, **kwargs)
    return output


def never_updates(self: Any, *args: Any, **kwargs: Any) -> Any:
    return ATTENTION(self, *args, **{**kwargs, CACHE: None})


def breaks_after_the_update(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = ATTENTION(self, *args, **kwargs)
    torch._dynamo.graph_break()
    return output


def breaks_before_the_update(self: Any, *args: Any, **kwargs: Any) -> Any:
    torch._dynamo.graph_break()
    return ATTENTION(self, *args, **kwargs)


@pytest.mark.parametrize(
    "attention",
    some(
        (
            asks_first,
            asks_afterwards,
            updates_twice,
            never_updates,
            breaks_before_the_update,
            breaks_after_the_update,
        ),
        *(updates_twice, never_updates),
    ),
)
def test_an_attention_that_cannot_be_cut(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a mutant of the known class; the call that meets it gives the right result, too."""
    monkeypatch.setattr(GptOssAttention, "forward", attention)
    single = {"num_hidden_layers": 1}
    calls = (tokens(2), tokens(2, 1))

    def run(whole: Any) -> tuple[list[Tensor], Any]:
        cache, found = DynamicCache(), []
        for ids in calls:
            masks = dict.fromkeys(("full_attention", "sliding_attention"))
            found.append(whole(ids, past_key_values=cache, attention_mask=masks).logits)
        return found, cache.layers[0].keys if cache.layers else None

    expected, keys = run(mlps_compiled(**single))
    whole = compiled(model(**single))
    with pytest.warns(
        WholeModelWarning, match=r"model.layers.0 cannot be compiled in pieces: \w"
    ) as caught:
        ours, our_keys = run(whole)
    assert len([w for w in caught if w.category is WholeModelWarning]) == 1
    assert all(map(torch.equal, ours, expected))
    assert keys is our_keys is None or torch.equal(keys, our_keys)


class TestArguments:
    def test_an_unknown_option(self) -> None:
        with pytest.raises(OptionError, match="'stict'"):
            mxfp4_fx.compile(model(), options={"stict": True})

    def test_a_function(self) -> None:
        with pytest.raises(OptionError, match="takes a module, not a function"):
            mxfp4_fx.compile(lambda x: x)  # type: ignore[arg-type]

    def test_a_model_without_experts(self) -> None:
        whole = mxfp4_fx.compile(nn.Linear(4, 4), options={"inner": "eager"})
        with pytest.warns(NoExpertsWarning):
            whole(torch.zeros(1, 4))

    def test_an_mlp(self) -> None:
        graphs, x = Graphs(), torch.randn(1, 5, 64)
        with pytest.warns(WholeModelWarning, match="experts cannot be compiled in pieces: it is a"):
            whole = compiled(mlp(), graphs)
        whole(x)
        assert rewritten(graphs) == [1]

    def test_the_result_of_torch_compile_is_unwrapped(self) -> None:
        whole = model()
        assert mxfp4_fx.compile(torch.compile(whole)) is whole

    def test_skip(self) -> None:
        whole, graphs = model(), Graphs()
        compiled(whole, graphs, skip=["model.layers.1"])
        whole(tokens(), use_cache=False)
        assert rewritten(graphs) == [1, 0]


class TestAround:
    def test_explain(self) -> None:
        whole = compiled(model())
        whole(tokens(), use_cache=False)
        explained = mxfp4_fx.explain(whole, tokens(), use_cache=False)
        assert [r.layer for r in explained.rewrites] == [
            f"model.layers.{at}.mlp.experts" for at in range(2)
        ]
        assert not explained.misses

    def test_strict_names_the_experts(self) -> None:
        """With gradients on, experts whose weights are trained stay as they are."""
        whole = compiled(model())
        with (
            torch.enable_grad(),
            pytest.raises(Exception, match=r"model\.layers\.0\.mlp\.experts") as caught,
        ):
            whole(tokens(), use_cache=False)
        assert "MissedRewriteError" in f"{type(caught.value).__name__} {caught.value}"

    @pytest.mark.exhaustive
    def test_compiled_as_a_whole_later(self) -> None:
        whole, graphs = model(), Graphs()
        expected = compiled(whole)(tokens(), use_cache=True).logits
        options = {"inner": graphs, "strict": True, "attention": False}
        whole.compile(backend="mxfp4", options=options)
        assert torch.equal(whole(tokens(), use_cache=True).logits, expected)
        assert rewritten(graphs) == [2]

    def test_compiled_again(self) -> None:
        first, second = Graphs(), Graphs()
        whole = compiled(compiled(model(), first), second)
        whole(tokens(), use_cache=False)
        assert not first.seen
        assert rewritten(second) == [1]

    def test_a_copy_is_not_compiled(self) -> None:
        graphs = Graphs()
        copied = copy.deepcopy(compiled(model(), graphs))
        copied(tokens(), use_cache=False)
        assert not graphs.seen

    def test_freed_weights(self) -> None:
        whole = compiled(model(), free_weights=True)
        assert all(map(torch.equal, steps(whole), expected_steps(FORMS[0])))
        assert mxfp4_fx.restore(whole) == 4

    def test_verification_of_each_layer(self, caplog: pytest.LogCaptureFixture) -> None:
        whole = compiled(model(), verify=True)
        with caplog.at_level("INFO", "mxfp4_fx.backend"):
            for _ in range(2):
                whole(tokens(), use_cache=False)
        assert caplog.text.count("verified 1 rewritten layers") == 2

    def test_a_stance_without_compilation(self) -> None:
        whole = mxfp4_fx.compile(model(), options={"inner": "eager"})
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert all(map(torch.equal, steps(whole), steps(model())))


@pytest.mark.filterwarnings("ignore::mxfp4_fx.core.errors.MissedRewriteWarning")
def test_a_layer_whose_experts_run_uncompiled_keeps_its_weights() -> None:
    """The other layers' are freed when the first is compiled, if all are called alike."""
    whole = mxfp4_fx.compile(model(), options={"inner": "eager", "free_weights": True})
    experts = whole.model.layers[1].mlp.experts
    experts.forward = torch.compiler.disable(experts.forward)
    with pytest.warns(WholeModelWarning, match=r"model\.layers\.1"):
        assert whole(tokens()).logits.isfinite().all()
    assert experts.gate_up_proj.isfinite().all()
