"""Nested compile regions around the repeated layer: how many, and that nothing else changes.

Most tests compile for a backend of their own that is marked as this package's: it runs the captured
graph, whose results must have the very bits of the uncompiled model.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from combinations import exhaustive
from torch import Tensor, fx, nn
from transformers import DynamicCache
from transformers.models.gpt_oss import modeling_gpt_oss

from mxfp4_fx.core import compilation
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.torch_private_capture import can_capture_regions
from mxfp4_fx.errors import OptionError
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.huggingface.decoder_layers import cache_name

# The backend of these tests rewrites nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nothing in what it called:UserWarning"),
    pytest.mark.skipif(not can_capture_regions(), reason="needs torch 2.13"),
]

IDS = torch.arange(8)[None] + 3
CACHE = cache_name()  # of a model's argument, too


class Regions:
    """Counts the calls of each region's graph, in each captured graph; runs what it gets."""

    def __init__(self) -> None:
        self.graphs: list[list[int]] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        names = [str(n.args[1]) for n in gm.graph.nodes if "invoke_subgraph" in str(n.target)]
        self.graphs.append(sorted(collections.Counter(names).values()))
        return gm.forward


def captured(module: nn.Module) -> tuple[Any, Regions]:
    """Compile a module for a backend that is marked as ours and counts regions."""
    regions = Regions()
    compiled = torch.compile(module, backend=compilation.ours(regions), fullgraph=True)
    return compiled, regions


def layers(count: int = 3, **changes: Any) -> Any:
    """Make a model of full-attention layers, which are alike."""
    kinds = ["full_attention"] * count
    return models.model(num_hidden_layers=count, layer_types=kinds, **changes)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS, use_cache=False).logits
    return out


@pytest.fixture(autouse=True)
def afresh() -> None:
    prepare_capture()
    torch._dynamo.reset()


# ---- how many


# A sliding layer and a full one, by turns.
COUNTS = [2, exhaustive(4)]


@pytest.mark.parametrize("count", COUNTS)
def test_layers_without_a_cache_share_one_graph(count: int) -> None:
    model = models.model(num_hidden_layers=count)
    compiled, regions = captured(model)
    assert torch.equal(logits(compiled), logits(model))
    assert regions.graphs == [[count]]


@pytest.mark.parametrize("count", COUNTS)
def test_layers_with_a_cache_share_two_graphs(count: int) -> None:
    model = models.model(num_hidden_layers=count)
    compiled, regions = captured(model)
    for tokens in (IDS, IDS[:, :1]):
        found, expected = (DynamicCache(config=model.config) for _ in range(2))
        with torch.no_grad():
            got = compiled(tokens, **{CACHE: found}).logits
            want = model(tokens, **{CACHE: expected}).logits
        assert torch.equal(got, want)
        for mine, its in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(mine.keys, its.keys)
            assert torch.equal(mine.values, its.values)
    assert regions.graphs == [[count, count]] * 2


class Reading(DynamicCache):
    """Its values depend on all that attention hands it: nothing before transformers 5.24."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        handed = kwargs.get("kwargs", {})
        value_states = value_states + handed.get("another", 0) + len(handed)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx)
        return found


def test_layers_with_a_cache_that_reads_its_arguments() -> None:
    model = layers(2)
    compiled, regions = captured(model)
    with torch.no_grad():
        got, want = (
            m(IDS, another=torch.ones(()), **{CACHE: Reading(config=model.config)}).logits
            for m in (compiled, model)
        )
    assert torch.equal(got, want)
    assert regions.graphs == [[2, 2]]


WAYS: dict[str, list[dict[str, Any]]] = {
    "dynamic": [{}, {"do_sample": True}, {"num_beams": 2}],
    "static": [{"cache_implementation": "static", "disable_compile": True}],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("cache", WAYS)
def test_generate_gives_the_same_tokens(cache: str) -> None:
    """Greedily, by sampling and by beams, which one compilation serves."""
    model = layers(2, eos_token_id=None)
    found: list[list[Any]] = [[], []]
    for regions, outputs in enumerate(found):
        options = {"regions": bool(regions), "inner": "eager"}
        torch._dynamo.reset()  # its limits are for one compilation
        model.compile(backend="mxfp4", fullgraph=True, options=options)
        for way in WAYS[cache]:
            torch.manual_seed(0)
            out = model.generate(
                IDS, max_new_tokens=5, output_logits=True, return_dict_in_generate=True, **way
            )
            outputs.append(out)
    for off, on in zip(*found, strict=True):
        assert torch.equal(off.sequences, on.sequences)
        for one, other in zip(off.logits, on.logits, strict=True):
            assert torch.equal(one, other)


def test_decoding_shares_graphs_at_symbolic_lengths() -> None:
    model = models.model(num_hidden_layers=4, eos_token_id=None)
    want = model.generate(IDS, max_new_tokens=5)
    regions = Regions()
    model.compile(backend=compilation.ours(regions), fullgraph=True)
    assert torch.equal(model.generate(IDS, max_new_tokens=5), want)
    prompt, *decoding = regions.graphs
    assert prompt == [4, 4]
    # One head for all layers, and a rest for each of two symbols: of sliding and of full lengths.
    assert decoding == [[2, 2, 4]] * len(decoding)
    assert decoding


@pytest.mark.exhaustive
def test_inductor_takes_symbolic_lengths() -> None:
    model = models.model(num_hidden_layers=4, eos_token_id=None)
    want = model.generate(IDS, max_new_tokens=4)
    model.compile(backend="mxfp4", fullgraph=True)
    assert torch.equal(model.generate(IDS, max_new_tokens=4), want)


@pytest.mark.exhaustive
def test_inductor_gives_the_same_bits() -> None:
    found = []
    for regions in (False, True):
        model = layers(2, eos_token_id=None)
        model.compile(backend="mxfp4", dynamic=True, options={"regions": regions})
        kwargs = {"output_logits": True, "return_dict_in_generate": True}
        found.append(model.generate(IDS, max_new_tokens=3, **kwargs))
    off, on = found
    assert torch.equal(off.sequences, on.sequences)
    assert all(map(torch.equal, off.logits, on.logits))


# ---- where there are none


def test_the_option_switches_them_off() -> None:
    regions = Regions()
    options = {"regions": False, "inner": regions}
    compiled = torch.compile(layers(2), backend="mxfp4", options=options)
    logits(compiled)
    assert regions.graphs == [[]]
    with pytest.raises(OptionError, match=r"options\['regions'\] must be True or False"):
        Options.parse({"regions": 1})


def test_none_where_gradients_are_recorded() -> None:
    compiled, regions = captured(layers(2))
    with torch.enable_grad():
        compiled(IDS, use_cache=False)
    assert regions.graphs == [[]]


def test_none_for_code_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It might break the graph, or update its cache twice."""
    own = modeling_gpt_oss.eager_attention_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return own(*args, **kwargs)

    model, regions = layers(2), Regions()
    with monkeypatch.context() as patch:
        patch.setattr(modeling_gpt_oss, "eager_attention_forward", other)
        compiled = torch.compile(model, backend=compilation.ours(regions))
        assert torch.equal(logits(compiled), logits(model))
    assert not any(regions.graphs)


def test_other_backends_see_none() -> None:
    regions = Regions()
    logits(torch.compile(layers(2), backend=regions))
    assert regions.graphs == [[]]


# ---- layers that differ


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * 2
        return out


def _hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def _tie(layer: Any) -> None:
    layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight


def _narrow(layer: Any) -> None:
    layer.self_attn.sinks = nn.Parameter(layer.self_attn.sinks.double(), requires_grad=False)


CHANGES: dict[str, Callable[[Any], object]] = {
    "alpha": lambda layer: setattr(layer.mlp.experts, "alpha", 1.0),
    "top_k": lambda layer: setattr(layer.mlp.router, "top_k", 1),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 1.0),
    "no bias": lambda layer: setattr(layer.self_attn.q_proj, "bias", None),
    "hook": lambda layer: layer.self_attn.q_proj.register_forward_hook(_hook),
    "hook on the layer": lambda layer: layer.register_forward_hook(_hook),
    "forward": lambda layer: setattr(layer.input_layernorm, "forward", torch.sin),
    "class": lambda layer: setattr(layer.self_attn, "q_proj", Doubled(layer.self_attn.q_proj)),
    "one tensor": _tie,
    "dtype": _narrow,
    "requires_grad": lambda layer: layer.self_attn.sinks.requires_grad_(True),
}


@pytest.mark.parametrize("is_first", [False, exhaustive(True)])
def test_layers_that_differ_share_no_graph(is_first: bool) -> None:
    model = layers(len(CHANGES) + 2).requires_grad_(False)
    changed = model.model.layers[:-2] if is_first else model.model.layers[2:]
    for layer, change in zip(changed, CHANGES.values(), strict=True):
        change(layer)
    compiled, regions = captured(model)
    assert torch.equal(logits(compiled), logits(model))
    assert regions.graphs == [[2]]


def test_a_parameter_of_two_layers_is_shared() -> None:
    model = layers(3)
    first, second, third = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    compiled, regions = captured(model)
    assert torch.equal(logits(compiled), logits(model))
    third.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    second.self_attn.q_proj.weight = nn.Parameter(first.self_attn.q_proj.weight + 1)
    assert torch.equal(logits(compiled), logits(model))
    assert all(graph == [3] for graph in regions.graphs)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ("top_k", 2),
        exhaustive("top_k", 3),  # two that are alike around the one that is not
        *(exhaustive(change, 2) for change in ("alpha", "no bias", "class")),
    ],
)
def test_a_later_change_of_any_layer_compiles_anew(change: str, count: int) -> None:
    model = layers(count).requires_grad_(False)
    compiled, regions = captured(model)
    before = logits(compiled)
    CHANGES[change](model.model.layers[1])
    after = logits(compiled)
    assert torch.equal(after, logits(model))
    assert not torch.equal(after, before)
    assert regions.graphs == [[count], [2] if count == 3 else []]


@pytest.mark.exhaustive
def test_a_number_that_changes_twice() -> None:
    # Dynamo then makes it an input, which regions cannot take.
    model = layers(2)
    compiled, regions = captured(model)
    for alpha in (1.0, 2.0, 3.0):
        for layer in model.model.layers:
            layer.mlp.experts.alpha = alpha
        assert torch.equal(logits(compiled), logits(model))
    assert regions.graphs[0] == [2]
    assert not any(regions.graphs[1:])


def test_dropout_draws_for_each_layer() -> None:
    model = layers(2).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    compiled, regions = captured(model)
    torch.manual_seed(0)
    got = logits(compiled)
    torch.manual_seed(0)
    assert torch.equal(got, logits(model))
    assert regions.graphs == [[]]


def test_recorded_outputs_are_complete() -> None:
    model = layers(2)
    kinds = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    compiled, _ = captured(model)
    with torch.no_grad():
        want, got = (m(IDS, use_cache=False, **kinds) for m in (model, compiled))
    for name in ("hidden_states", "attentions", "router_logits"):
        assert len(got[name]) == len(want[name])
        assert all(torch.equal(a, b) for a, b in zip(got[name], want[name], strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dynamic", [None, True])
def test_symbolic_sizes(dynamic: bool | None) -> None:
    model = layers(2)
    regions = Regions()
    backend = compilation.ours(regions)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in ((2, 5), (3, 7), (4, 9)):
        ids = torch.arange(size[0] * size[1]).reshape(size)
        with torch.no_grad():
            got, want = (m(ids, use_cache=False).logits for m in (compiled, model))
        assert torch.equal(got, want)
    # With dynamic=True, Dynamo makes inputs of all floats, which regions cannot take.
    assert regions.graphs == ([[]] if dynamic else [[2], [2]])


@pytest.mark.exhaustive
def test_skipped_layers_stay_as_they_are() -> None:
    found = []
    for on in (False, True):
        model = layers(3)
        options = {"skip": ["model.layers.1"], "inner": "eager", "regions": on}
        model.compile(backend="mxfp4", fullgraph=True, options=options)
        found.append(logits(model))
    assert torch.equal(*found)
