"""``mxfp4_fx.compile``: few compilations for any number of layers, and the uncompiled results."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import FORMS, Graphs, model, pack, tokens
from near_miss import edited
from oracle import assert_as_accurate
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

import mxfp4_fx
from mxfp4_fx.core.errors import (
    WholeModelWarning,
)
from mxfp4_fx.huggingface.decoder_layers import cache_name
from mxfp4_fx.weights.freed import is_freed

PIECES = 2  # head and rest
LENGTH = 24  # prompt and new tokens together cross the sliding window of 16

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Falling back is a failure, except where a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WholeModelWarning)
        yield


def compiled(whole: Any, graphs: Any = "eager", **options: Any) -> Any:
    """Compile layer by layer; attention stays transformers' own, so that bits can be compared."""
    options = {"inner": graphs, "strict": True, "attention": False, **options}
    return mxfp4_fx.compile(whole, options=options)


def generate(whole: Any, prompt: Tensor, **kwargs: Any) -> Tensor:
    new = LENGTH - prompt.shape[1]
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return whole.generate(prompt, attention_mask=(prompt > 0).long(), **settings | kwargs)


def rewritten(graphs: Graphs) -> list[int]:
    """The numbers of rewritten experts in the graphs."""
    named = [[str(n.target) for n in gm.graph.nodes] for gm in graphs.seen]
    return [names.count("mxfp4.matmul_ogs.default") // 2 for names in named]


def mlps_compiled(**changes: Any) -> GptOssForCausalLM:
    """A model whose MLPs alone are compiled."""
    whole = model(**changes)
    for layer in whole.model.layers:
        layer.mlp.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
    return whole


class TestCompilations:
    @pytest.mark.parametrize(
        "cache",
        [
            "static",
            *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ("dynamic", "sliding_window")),
        ],
    )
    def test_one_for_prompts_and_one_for_decoding(self, cache: str) -> None:
        """Of prompts within the sliding window and longer than it, for layers of both kinds."""
        whole, plain, graphs = model(), model(), Graphs()
        compiled(whole, graphs)
        kwargs = {"cache_implementation": cache}
        for length in (7, 20):
            prompt = tokens(1, length) + 1
            assert torch.equal(generate(whole, prompt, **kwargs), generate(plain, prompt, **kwargs))
            assert len(graphs.seen) == 2 * PIECES
        assert rewritten(graphs) == [0, 1, 0, 1]
        assert mxfp4_fx.refresh(whole) == 2 * 2

    def test_none_more_for_more_layers(self) -> None:
        """Twelve are more than Dynamo's limit of eight compilations of one function."""
        whole, graphs = model(num_hidden_layers=12), Graphs()
        compiled(whole, graphs)
        whole(tokens(1), use_cache=True)
        assert rewritten(graphs) == [0, 1]

    @pytest.mark.parametrize("linears", [True, "mxfp8"])
    def test_none_more_for_a_prompt_after_weights_were_freed(self, linears: Any) -> None:
        """Freeing changes the class of a weight, which Dynamo guards."""
        whole, graphs = pack(model()), Graphs()
        compiled(whole, graphs, free_weights=True, linears=linears)
        for length in (7, 9):
            whole(tokens(1, length), use_cache=True)
            assert rewritten(graphs) == [0, 1]
        linears_freed = 2 * 4 + 1  # q, k, v, o; the head
        assert mxfp4_fx.restore(whole) == 2 * 4 + (linears_freed if linears == "mxfp8" else 0)

    def test_skipped_layers_keep_their_weights_beside_freed_ones(self) -> None:
        whole = pack(model())
        compiled(whole, free_weights=True, skip=["model.layers.0"])
        logits = whole(tokens(1), use_cache=True).logits
        assert torch.equal(logits, whole(tokens(1), use_cache=True).logits)
        assert not is_freed(whole.model.layers[0].mlp.experts.down_proj_blocks)
        assert mxfp4_fx.restore(whole) == 4

    def test_a_layer_that_is_compiled_anew_leaves_the_others(self) -> None:
        """Its weights are not freed by what it shared with them before."""
        whole = compiled(pack(model()), free_weights=True)
        compiled(whole.model.layers[1])
        whole(tokens())
        blocks = [layer.mlp.experts.down_proj_blocks for layer in whole.model.layers]
        assert [*map(is_freed, blocks)] == [True, False]

    def test_traces_keep_no_results_of_fake_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compilers do, and so does what is compiled as a whole: it has many layers."""
        traced, compiled_with = [], []
        make = FakeTensorMode.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            traced.append(self.cache_enabled)

        def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            compiled_with.append(TracingContext.get().fake_mode.cache_enabled)
            return gm.forward

        monkeypatch.setattr(FakeTensorMode, "__init__", noted)
        whole = compiled(model(num_hidden_layers=1), inner)
        whole(tokens(1), use_cache=True)
        assert traced
        assert not any(traced)
        assert compiled_with == [True] * PIECES
        assert torch._dynamo.config.fake_tensor_cache_enabled
        traced.clear()
        whole.model.layers[0].mlp.compile(backend="mxfp4", options={"inner": inner})
        whole.model.layers[0].mlp(torch.ones(1, 2, 64))
        assert traced
        assert all(traced)

    def test_one_without_a_cache(self) -> None:
        whole, graphs = model(), Graphs()
        compiled(whole, graphs)
        for length in (7, 9):
            whole(tokens(1, length), use_cache=False)
        assert rewritten(graphs) == [1]

    @pytest.mark.exhaustive
    def test_models_do_not_share_limits(self) -> None:
        with torch._dynamo.config.patch(recompile_limit=1):
            for seed in range(2):
                compiled(model(seed=seed, num_hidden_layers=1))(tokens(), use_cache=False)

    @pytest.mark.exhaustive
    def test_a_limit_holds_for_each_layer(self) -> None:
        whole, graphs = model(), Graphs()
        compiled(whole, graphs)
        with torch._dynamo.config.patch(recompile_limit=1):
            for batch in (1, 2):
                whole(tokens(batch), use_cache=False)
        assert len(graphs.seen) == 2

    def test_static_shapes(self) -> None:
        whole, graphs = model(), Graphs()
        mxfp4_fx.compile(whole, dynamic=False, options={"inner": graphs})
        for length in (7, 9):
            whole(tokens(1, length), use_cache=False)
        sizes = [
            n.meta["example_value"].shape
            for gm in graphs.seen
            for n in gm.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta["example_value"], Tensor)
        ]
        assert len(graphs.seen) == 2
        assert all(isinstance(size, int) for shape in sizes for size in shape)


def steps(whole: Any, cache: Any = None) -> list[Tensor]:
    """Logits of a prompt, of tokens after it, and of a second prompt behind them."""
    found = []
    for ids in (tokens(2), tokens(2, 1), tokens(2, 1, seed=1), tokens(2, 5)):
        out = whole(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return found


@functools.cache
def expected_steps(form: str) -> list[Tensor]:
    """The steps of a model whose MLPs alone are compiled: several tests ask for these bits."""
    return steps(mlps_compiled(form=form))


class Loud(DynamicCache):
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        kwargs["kwargs"]["loud"] = torch.tensor(2.0 + layer_idx)
        return super().update(key_states, value_states, layer_idx)


class TestResults:
    @pytest.mark.parametrize(
        "form", [FORMS[0], *(pytest.param(f, marks=pytest.mark.exhaustive) for f in FORMS[1:])]
    )
    def test_same_bits_as_with_compiled_mlps(self, form: str) -> None:
        found = steps(compiled(model(form=form)))
        assert all(map(torch.equal, found, expected_steps(form)))

    def test_a_cache_that_changes_what_it_is_handed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a paged one does, to which attention hands its arguments from transformers 5.24 on."""
        loud = {"self.o_proj(attn_output)": "self.o_proj(attn_output * kwargs.get('loud', 1))"}
        if "kwargs=kwargs" not in inspect.getsource(GptOssAttention.forward):
            loud["self.layer_idx"] = "self.layer_idx, kwargs=kwargs"
        monkeypatch.setattr(GptOssAttention, "forward", edited(GptOssAttention.forward, loud))

        def output(whole: Any) -> Tensor:
            return whole(tokens(), **{cache_name(): Loud(config=whole.config)}).logits

        whole = compiled(model(num_hidden_layers=1))
        got = output(whole)
        assert torch.equal(got, output(mlps_compiled(num_hidden_layers=1)))
        assert not torch.equal(got, whole(tokens()).logits)  # which another cache does not change

    @pytest.mark.exhaustive
    def test_packed_experts(self) -> None:
        expected = generate(pack(model()), tokens(1) + 1)
        assert torch.equal(generate(compiled(pack(model())), tokens(1) + 1), expected)

    @pytest.mark.exhaustive
    def test_inductor(self) -> None:
        whole, expected = model(), generate(model(), tokens(1) + 1)
        mxfp4_fx.compile(whole, options={"strict": True})
        assert torch.equal(generate(whole, tokens(1) + 1), expected)

    @pytest.mark.parametrize(
        "later",
        [False, pytest.param(True, marks=pytest.mark.exhaustive)],
        ids=["from the first call", "later"],
    )
    def test_recorded_outputs(self, later: bool) -> None:
        wanted = {"output_attentions": True, "output_hidden_states": True}
        wanted |= {"output_router_logits": True}
        whole, other = compiled(model()), model()
        other.compile(backend="mxfp4", options={"inner": "eager"})
        if later:
            whole(tokens(), use_cache=True)
        ours, expected = (m(tokens(), use_cache=True, **wanted) for m in (whole, other))
        for name, count in (("attentions", 2), ("hidden_states", 3), ("router_logits", 2)):
            assert len(ours[name]) == count
            assert all(map(torch.equal, ours[name], expected[name]))
        assert torch.equal(ours.logits, expected.logits)
        assert "attentions" not in whole(tokens(), use_cache=True)  # and no later call records

    def test_a_layer_called_by_itself(self) -> None:
        """With its arguments by position, too."""
        whole, graphs = model(), Graphs()
        layer, plain = compiled(whole, graphs).model.layers[0], mlps_compiled().model.layers[0]
        x, at = torch.randn(1, 5, 64), torch.arange(5)[None]
        args = x, None, at
        rope = {"position_embeddings": whole.model.rotary_emb(x, at)}
        assert torch.equal(layer(*args, **rope), plain(*args, **rope))
        cache, other = DynamicCache(), DynamicCache()
        assert torch.equal(
            layer(*args, cache, use_cache=True, **rope), plain(*args, other, use_cache=True, **rope)
        )
        assert torch.equal(cache.layers[0].keys, other.layers[0].keys)
        assert rewritten(graphs) == [1, 0, 1]

    @pytest.mark.exhaustive
    def test_the_inner_model_called_by_itself(self) -> None:
        whole, graphs = model(), Graphs()
        compiled(whole, graphs)
        expected = mlps_compiled().model(tokens(), use_cache=True).last_hidden_state
        assert torch.equal(whole.model(tokens(), use_cache=True).last_hidden_state, expected)
        assert rewritten(graphs) == [0, 1]

    def test_only_the_inner_model(self) -> None:
        whole, graphs = model(), Graphs()
        compiled(whole.model, graphs)
        assert torch.equal(
            whole(tokens(), use_cache=False).logits,
            mlps_compiled()(tokens(), use_cache=False).logits,
        )
        assert rewritten(graphs) == [1]

    def test_two_threads(self) -> None:
        whole, found = compiled(model()), {}

        def run(at: int) -> None:
            with torch.no_grad():
                found[at] = steps(whole)

        threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for at in range(2):
            assert all(map(torch.equal, found[at], expected_steps(FORMS[0])))


class TestTraining:
    @pytest.mark.parametrize(
        "checkpointing", [False, pytest.param(True, marks=pytest.mark.exhaustive)]
    )
    def test_gradients_through_frozen_experts(self, checkpointing: bool) -> None:
        def gradients(whole: Any, cache: bool) -> list[Tensor]:
            for module in whole.modules():
                if type(module).__name__ == "GptOssExperts":
                    module.requires_grad_(False)
            with torch.enable_grad():
                out = whole(tokens(), use_cache=cache)
                out.logits.square().sum().backward()
            return [p.grad for p in whole.parameters() if p.grad is not None]

        exact = gradients(model(form="eager").double(), False)
        for cache in (False, True):
            ours, reference = gradients(compiled(model()), cache), gradients(model(), cache)
            assert len(ours) == len(exact) > 10
            for gradient, own, best in zip(ours, reference, exact, strict=True):
                assert_as_accurate(gradient, own, best)
