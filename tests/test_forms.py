"""Every form of GPT-OSS's experts is rewritten, whole, and computes what the model computes."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import DTYPES, FORMS, Graphs, compile_with, hidden, mlp, model, tokens
from oracle import assert_as_accurate
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

from mxfp4_fx.core.errors import NoExpertsWarning
from mxfp4_fx.passes.graph import op_name

# What the experts are made of; none of it may be left behind.
EXPERT_OPS = {"grouped_mm", "bmm", "sort", "histc", "index_put", "clamp", "sigmoid", "empty_like"}

pytestmark = pytest.mark.usefixtures("no_gradients")


class InFloat64(TorchFunctionMode):
    """What the model's code asks to have in float32 is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda v: torch.float64 if v is torch.float32 else v, (args, kwargs or {})
        )
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def routes(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """The result of ``run()``, and the experts that the routers of ``module`` choose meanwhile."""
    chosen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
        for router in module.modules()
        if isinstance(router, GptOssTopKRouter)
    ]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, chosen


def in_float64(module: Any) -> Any:
    """A copy of a model or of a part; runs exactly under :class:`InFloat64`."""
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if isinstance(part, GptOssExperts):
            part.config._experts_implementation = "batched_mm"  # the others have no float64
    return exact


def check(actual: Tensor, module: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """``actual`` is about as accurate as ``call(module, *inputs)`` is in eager."""
    exact = in_float64(module)
    reference, chosen = routes(module, lambda: call(module, *inputs))
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with InFloat64():
        ideal, ideally_chosen = routes(exact, lambda: call(exact, *wide))
    for a, b in zip(chosen, ideally_chosen, strict=True):
        assert torch.equal(a, b), "rounding changes a route, so errors say nothing: take other data"
    assert_as_accurate(actual, reference, ideal)


# How Dynamo takes lengths -> lengths to call with, and how many graphs these take. With None, the
# second length makes Dynamo compile for every length.
LENGTHS: dict[bool | None, tuple[list[int], int]] = {
    False: ([7], 1),
    True: ([7, 5], 1),
    None: ([7, 5, 9], 2),
}


def mxfp4_ops(gm: fx.GraphModule) -> list[str]:
    names = (str(node.target) for node in gm.graph.nodes)
    return [name.removesuffix(".default") for name in names if name.startswith("mxfp4.")]


LAYER = ["mxfp4.routing", "mxfp4.matmul_ogs", "mxfp4.matmul_ogs"]
ROUTES_LAYER = ["mxfp4.expert_ids", "mxfp4.routing.routes", *LAYER[1:]]  # where routes are given


def check_graphs(graphs: Graphs, count: int, layers: int = 1, layer: list[str] = LAYER) -> None:
    assert len(graphs.seen) == count
    for gm in graphs.seen:
        assert mxfp4_ops(gm) == layer * layers
        assert EXPERT_OPS.isdisjoint(op_name(node) for node in gm.graph.nodes)


def logits(whole: nn.Module, ids: Tensor) -> Tensor:
    return whole(ids).logits


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def itself(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


# The eager loop is captured as grouped_mm: what is shown of that is shown of it.
CAPTURED = ["grouped_mm", "batched_mm", pytest.param("eager", marks=pytest.mark.exhaustive)]


def every_form(*few: tuple[torch.dtype, bool | None], pairs: bool = False) -> pytest.MarkDecorator:
    """Every form with ``few`` dtypes and lengths; with the others it is exhaustive.

    With ``pairs`` it is so with just as many that any two of a form, a dtype and a length meet.
    """
    cases = []
    for (i, form), (j, dtype), (k, dynamic) in itertools.product(
        *map(enumerate, (FORMS, DTYPES, LENGTHS))
    ):
        if (dtype, dynamic) in few:
            cases.append(pytest.param(form, dtype, dynamic))
        elif not pairs or (i + j + k) % 3 == 0:
            cases.append(pytest.param(form, dtype, dynamic, marks=pytest.mark.exhaustive))
    return pytest.mark.parametrize(("form", "dtype", "dynamic"), cases)


F32, BF16, F16 = DTYPES


class TestForms:
    @every_form((F32, None), (BF16, False), (F16, True))
    def test_an_mlp(self, form: str, dtype: torch.dtype, dynamic: bool | None) -> None:
        module, graphs = mlp(dtype, form), Graphs()
        run = compile_with(module, graphs, dynamic=dynamic)
        lengths, count = LENGTHS[dynamic]
        for length in lengths:
            x = hidden(length, dtype=dtype)
            check(run(x)[0], module, first, x)
        check_graphs(graphs, count)

    @every_form((BF16, True), pairs=True)
    def test_layer_by_layer(self, form: str, dtype: torch.dtype, dynamic: bool | None) -> None:
        whole, graphs = model(dtype, form, seed=3), Graphs()
        compiled = copy.deepcopy(whole)
        for layer in compiled.model.layers:
            layer.mlp = compile_with(layer.mlp, graphs, dynamic=dynamic)
        lengths, count = LENGTHS[dynamic]
        for length in lengths:
            ids = tokens(2, length)
            check(compiled(ids).logits, whole, logits, ids)
        check_graphs(graphs, count)  # one graph serves both layers

    @every_form((F32, True), (BF16, None))
    def test_experts_with_routes_as_inputs(
        self, form: str, dtype: torch.dtype, dynamic: bool | None
    ) -> None:
        experts, graphs = mlp(dtype, form).experts, Graphs()
        run = compile_with(experts, graphs, dynamic=dynamic)
        lengths, count = LENGTHS[dynamic]
        for length in lengths:
            x = hidden(length, dtype=dtype)[0]
            indices = torch.arange(3 * length).view(length, 3) * 5 % 6
            weights = torch.linspace(-1, 2, 3 * length).view(length, 3).to(dtype)
            check(run(x, indices, weights), experts, itself, x, indices, weights)
        check_graphs(graphs, count, layer=ROUTES_LAYER)


@pytest.mark.parametrize(
    ("form", "dtype", "dynamic"),
    [
        ("grouped_mm", BF16, True),
        *(
            pytest.param(form, dtype, False, marks=pytest.mark.exhaustive)
            for form, dtype in zip(FORMS, DTYPES, strict=True)
        ),
    ],
)
def test_a_whole_model(form: str, dtype: torch.dtype, dynamic: bool | None) -> None:
    whole, graphs = model(dtype, form, seed=3), Graphs()
    options = {"regions": False, "attention": False}
    run = compile_with(whole, graphs, dynamic=dynamic, options=options)
    lengths, count = LENGTHS[dynamic]
    for length in lengths:
        ids = tokens(2, length)
        check(run(ids).logits, whole, logits, ids)
    check_graphs(graphs, count, layers=2)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (3, 5)])
@pytest.mark.parametrize("form", CAPTURED)
def test_batches_and_single_tokens(form: str, batch: int, length: int) -> None:
    module, graphs = mlp(form=form), Graphs()
    x = hidden(batch * length).view(batch, length, 64)
    check(compile_with(module, graphs)(x)[0], module, first, x)
    check_graphs(graphs, 1)


@pytest.mark.parametrize("form", CAPTURED)
def test_as_many_tokens_as_experts_a_token(form: str) -> None:
    """Sizes that are equal by chance must not be taken for one another."""
    module, graphs, x = mlp(form=form), Graphs(), hidden(3)
    check(compile_with(module, graphs)(x)[0], module, first, x)
    check_graphs(graphs, 1)


@pytest.mark.parametrize("form", CAPTURED)
def test_what_is_left_of_an_mlp(form: str) -> None:
    """Reshape, linear, topk and its values, softmax (the scores are returned); routing and its four
    parts; two matmuls; reshape."""
    graphs = Graphs()
    compile_with(mlp(form=form), graphs, dynamic=False)(hidden())
    (gm,) = graphs.seen
    assert sum(node.op.startswith("call_") for node in gm.graph.nodes) == 13


@pytest.mark.parametrize("form", CAPTURED)
def test_other_numbers_of_experts_a_token_in_routes_that_are_inputs(form: str) -> None:
    experts, graphs = mlp(form=form).experts, Graphs()
    run = compile_with(experts, graphs, dynamic=True)
    for t, a in ((7, 3), (5, 2), (4, 4), (3, 3)):
        routes = torch.arange(t * a).view(t, a) % 6, torch.rand(t, a)
        check(run(hidden(t)[0], *routes), experts, itself, hidden(t)[0], *routes)
    for gm in graphs.seen:
        assert mxfp4_ops(gm) == ROUTES_LAYER


class Packed(nn.Module):
    """Only the tokens of a mask reach the MLP: how many these are, no shape tells."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.mlp = mlp(form=form)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mlp(x[:, mask])[0]


@pytest.mark.parametrize("form", CAPTURED)
def test_a_number_of_tokens_that_depends_on_data(form: str) -> None:
    packed, graphs, x = Packed(form), Graphs(), hidden()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compile_with(packed, graphs)
        for mask in (torch.arange(7) % 2 == 0, torch.arange(7) > 4):
            check(run(x, mask), packed, itself, x, mask)
    check_graphs(graphs, 1)


@pytest.mark.parametrize("form", CAPTURED)
def test_inference_mode(form: str) -> None:
    with torch.inference_mode():
        module, graphs, x = mlp(form=form), Graphs(), hidden()
        check(compile_with(module, graphs)(x)[0], module, first, x)
    check_graphs(graphs, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_gradients_through_frozen_experts(form: str, dtype: torch.dtype) -> None:
    """Of the input and of the router, whose scores are returned and read by the experts."""

    def gradients(module: nn.Module, run: Callable[..., Any], x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y, scores = run(x)
        wanted = [x, *module.router.parameters()]
        return list(torch.autograd.grad(y.square().mean() + scores.square().mean(), wanted))

    module, graphs, x = mlp(dtype, form), Graphs(), hidden(dtype=dtype)
    module.experts.requires_grad_(False)
    exact = in_float64(module)
    exact.experts.config._experts_implementation = "eager"  # batched_mm of 5.8 has no gradients
    with torch.enable_grad():
        actual = gradients(module, compile_with(module, graphs), x)
        expected = gradients(module, module, x)
        ideal = gradients(exact, exact, x.double())
    for a, e, i in zip(actual, expected, ideal, strict=True):
        assert_as_accurate(a, e, i)
    check_graphs(graphs, 1)


CONSTANTS: dict[str, dict[str, Any]] = {
    "alpha": {"swiglu_alpha": 1.5},
    "limit": {"swiglu_limit": 5.0},
    "top 2": {"num_experts_per_tok": 2},
    "top 1": {"num_experts_per_tok": 1},
    "5 experts": {"num_local_experts": 5},
    "7 experts": {"num_local_experts": 7},
    "all of 5 experts": {"num_local_experts": 5, "num_experts_per_tok": 5},
    "1 expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "other sizes": {"hidden_size": 96, "intermediate_size": 32},
}


def check_constants(gm: fx.GraphModule, module: Any) -> None:
    """The graph has the model's numbers."""
    routing, gate_up, down = (n for n in gm.graph.nodes if str(n.target).startswith("mxfp4."))
    assert routing.args[1] == down.kwargs["experts_per_token"] == module.router.top_k
    assert gate_up.kwargs["alpha"] == module.experts.alpha
    assert gate_up.kwargs["limit"] == module.experts.limit


# Sizes that a form meets in its own way; other numbers are bound by what all forms share.
SIZES = {"top 1", "all of 5 experts", "1 expert", "other sizes"}


@pytest.mark.parametrize(
    ("changes", "form", "dynamic"),
    [
        pytest.param(
            *(changes, form, dynamic),
            id=f"{name}-{form}-{dynamic}",
            marks=[]
            if dynamic and (form == "grouped_mm" or (form == "batched_mm" and name in SIZES))
            else pytest.mark.exhaustive,
        )
        for (name, changes), form, dynamic in itertools.product(
            CONSTANTS.items(), FORMS, (False, True)
        )
    ],
)
def test_other_constants(changes: dict[str, Any], form: str, dynamic: bool) -> None:
    module, graphs = mlp(form=form, **changes), Graphs()
    x = hidden(size=changes.get("hidden_size", 64)) * 8  # reaches the limits
    check(compile_with(module, graphs, dynamic=dynamic)(x)[0], module, first, x)
    check_graphs(graphs, 1)
    check_constants(graphs.seen[0], module)


@pytest.mark.parametrize(
    "dynamic", [None, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (False, True))]
)
@pytest.mark.parametrize("name", ["alpha", "limit"])
@pytest.mark.parametrize("form", CAPTURED)
def test_a_constant_changed_after_compiling(form: str, name: str, dynamic: bool | None) -> None:
    module, graphs, x = mlp(form=form), Graphs(), hidden() * 8
    run = compile_with(module, graphs, dynamic=dynamic)
    for count, value in enumerate((1.75, 3.5, 2), start=1):  # the last one is an int
        setattr(module.experts, name, value)
        check(run(x)[0], module, first, x)
        assert len(graphs.seen) == count
        check_constants(graphs.seen[-1], module)


@pytest.mark.parametrize("form", FORMS)
def test_an_mlp_returns_its_scores(form: str) -> None:
    module, x = mlp(form=form), hidden()
    assert torch.equal(compile_with(module)(x)[1], module(x)[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_a_model_returns_its_router_logits(form: str) -> None:
    whole, graphs, ids = model(form=form), Graphs(), tokens()
    run = compile_with(whole, graphs, options={"attention": False})
    with warnings.catch_warnings():
        # transformers breaks the graph before it collects anything: the first part has no experts
        warnings.simplefilter("ignore", NoExpertsWarning)
        actual = run(ids, output_router_logits=True).router_logits
    expected = whole(ids, output_router_logits=True).router_logits
    assert torch.equal(actual[0], expected[0])  # in front of the first experts
    check(actual[1], whole, second_router_logits, ids)
    assert [op for gm in graphs.seen for op in mxfp4_ops(gm)] == LAYER * 2


def second_router_logits(whole: nn.Module, ids: Tensor) -> Tensor:
    return whole(ids, output_router_logits=True).router_logits[1]


EAGER_MLP = """
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

torch.set_grad_enabled(False)
torch.manual_seed(0)
config = GptOssConfig(num_local_experts=4, num_experts_per_tok=2, hidden_size=64,
                      intermediate_size=64)
config._experts_implementation = "eager"
mlp, x = GptOssMLP(config), torch.randn(1, 7, 64)
for parameter in mlp.parameters():
    torch.nn.init.normal_(parameter, std=0.1)

def graphs(backend, **options):
    seen = []
    def keep(gm, inputs):
        seen.append(gm)
        return gm.forward
    torch.compiler.reset()
    if backend == "mxfp4":
        torch.compile(mlp, backend=backend, options={"inner": keep})(x)
    else:
        assert torch.equal(torch.compile(mlp, backend=keep)(x)[0], mlp(x)[0])
    return len(seen)
"""


def printed_by(code: str) -> list[str]:
    """What a fresh process prints, in words."""
    done = subprocess.run(
        [sys.executable, "-c", EAGER_MLP + code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.exhaustive
def test_the_eager_loop_is_one_graph_and_other_backends_see_it_as_before() -> None:
    before, ours, after = printed_by('print(graphs("eager"), graphs("mxfp4"), graphs("eager"))')
    assert ours == "1"
    assert ours != before == after
