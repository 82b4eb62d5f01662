"""``mxfp4_fx.compile`` and a model's last linear, which a native kernel computes, uncompiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import Graphs, model, tokens
from oracle import Bounded, assert_within, linear
from torch import Tensor, nn
from transformers import GptOssForCausalLM

import mxfp4_fx
from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import WholeModelWarning
from mxfp4_fx.ops import target

VOCABULARY = 1100  # times 64 bfloat16 numbers: more than a native linear needs

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.skipif(
        not (target.has_native_linears("auto") and hardware.linear_rows(torch.bfloat16)),
        reason="this CPU has no native linears",
    ),
]


def bfloat16(**changes: Any) -> GptOssForCausalLM:
    return model(torch.bfloat16, vocab_size=VOCABULARY, num_hidden_layers=1, **changes)


def compiled(whole: GptOssForCausalLM, **options: Any) -> Graphs:
    graphs = Graphs()
    mxfp4_fx.compile(whole, options={"inner": graphs, **options})
    return graphs


def native_linears(whole: GptOssForCausalLM, ids: Tensor) -> int:
    """How many linears a call of the model computes natively; only the head is large enough."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        whole(ids, use_cache=False)
    return sum(event.name == "mxfp4::linears" for event in profile.events())


def logits_of(head: nn.Linear, hidden: Tensor) -> Bounded:
    exact = linear(Bounded.exact(hidden), head.weight.double(), torch.zeros(VOCABULARY))
    return exact.rounded(torch.bfloat16)


def test_logits_are_those_of_the_head() -> None:
    """Of one token, and of more than the native kernel is for."""
    whole = bfloat16()
    graphs = compiled(whole)
    for length in (1, 33):
        ids = tokens(1, length)
        hidden = whole.model(ids, use_cache=False).last_hidden_state
        logits = whole(ids, use_cache=False).logits
        assert_within(logits[0], logits_of(whole.lm_head, hidden[0]))
    assert native_linears(whole, ids) == 1
    assert all("mxfp4.routing" in str(gm.graph) for gm in graphs.seen)  # a layer's, all of them


def test_a_changed_head_is_used() -> None:
    whole = bfloat16()
    compiled(whole)
    whole(tokens(1, 1), use_cache=False)
    whole.lm_head.weight.data.zero_()
    assert not whole(tokens(1, 1), use_cache=False).logits.any()


def test_a_later_hook_runs() -> None:
    whole = bfloat16()
    compiled(whole)
    whole(tokens(1, 1), use_cache=False)
    whole.lm_head.register_forward_hook(lambda _module, _args, output: output + 1)
    hidden = whole.model(tokens(1, 1), use_cache=False).last_hidden_state
    plain = nn.functional.linear(hidden, whole.lm_head.weight) + 1
    assert torch.equal(whole(tokens(1, 1), use_cache=False).logits, plain)


@pytest.mark.parametrize("why", ["option", "small", exhaustive("dtype")])
def test_a_head_that_stays(why: str) -> None:
    options, vocabulary = {}, VOCABULARY
    dtype = torch.float32 if why == "dtype" else torch.bfloat16
    if why == "option":
        options["linears"] = False
    elif why == "small":
        vocabulary = 128
    whole = model(dtype, vocab_size=vocabulary, num_hidden_layers=1)
    compiled(whole, **options)
    assert native_linears(whole, tokens(1, 1)) == 0


def head_alone() -> nn.Linear:
    """The head of a compiled model."""
    whole = bfloat16()
    compiled(whole)
    return whole.lm_head


def test_a_head_whose_gradients_are_wanted_stays() -> None:
    head = head_alone()
    with torch.enable_grad():
        head(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    assert head.weight.grad.any()


def test_autocast_casts_the_heads_input() -> None:
    with torch.autocast("cpu", torch.float16):
        assert head_alone()(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.float16


def test_a_transformed_head_stays() -> None:
    head, x = head_alone(), torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(torch.func.vmap(head)(x), nn.functional.linear(x, head.weight))


def test_the_linears_own_error_for_another_dtype() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        head_alone()(torch.ones(1, 64))


def test_a_model_that_is_compiled_as_a_whole_has_it_too() -> None:
    whole = bfloat16()
    graphs = compiled(whole)
    whole.model.layers[0].register_forward_hook(lambda _module, _args, output: output)
    with pytest.warns(WholeModelWarning):
        whole(tokens(1, 1), use_cache=False)
    whole(tokens(1, 1), use_cache=False)
    weights = [
        node.args[1]
        for node in graphs.seen[-1].graph.nodes
        if node.target is torch.ops.mxfp4.linears.default
    ]
    assert [w[0].meta["example_value"].shape[0] for w in weights].count(VOCABULARY) == 1


def test_compiled_again() -> None:
    whole = bfloat16()
    compiled(whole)
    compiled(whole)
    assert native_linears(whole, tokens(1, 1)) == 1
