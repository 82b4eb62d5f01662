"""Dynamo's limits hold for each module, so that many graphs keep no layer from being rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from default_load import hub_layers
from models import Graphs, Layers, compile_with, hidden, mlp, model, pack, tokens
from torch import Tensor, fx, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

import mxfp4_fx
from mxfp4_fx.core import compilation
from mxfp4_fx.core.errors import MissedRewriteError, MissedRewriteWarning
from mxfp4_fx.huggingface.packed import PackedExperts

LIMIT, LAYERS = 1, 2  # Dynamo's limit, which is 8 unless it is set, and more layers than that

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=256):
        yield


class Ran:
    """An inner compiler that counts the experts that run in its graphs."""

    def __init__(self) -> None:
        self.experts = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        calls = [n for n in gm.graph.nodes if n.target is torch.ops.mxfp4.matmul_ogs.default]

        def run(*args: Any) -> Any:
            self.experts += len(calls) // 2
            return gm.forward(*args)

        return run


def assert_all_run(run: Callable[..., Tensor], x: Tensor, expected: Tensor, count: int) -> None:
    """All experts run in MXFP4, with the same bits, and explain says what really ran."""
    ran = Ran()
    compiled = compile_with(run, ran, options={"strict": True})
    for _ in range(2):
        ran.experts = 0
        assert torch.equal(compiled(x), expected)
        assert ran.experts == count
    explained = mxfp4_fx.explain(run, x)
    assert len({rewrite.layer for rewrite in explained.rewrites}) == count
    assert not explained.misses


def by_layers(
    run: Callable[..., Tensor], x: Tensor, whole: nn.Module, kind: type[nn.Module] = GptOssMLP
) -> Tensor:
    """The result if each module of a kind is compiled alone."""
    modules = [module for module in whole.modules() if isinstance(module, kind)]
    for module in modules:
        module.compile(backend="mxfp4", options={"inner": "eager", "strict": True}, fullgraph=True)
    expected = run(x)
    for module in modules:
        module._compiled_call_impl = None
    torch.compiler.reset()
    return expected


class Layer(nn.Module):
    """An MLP; Dynamo guards the layer's number, so that each needs a compilation."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.mlp, self.number = mlp(seed=number), number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)[0] if self.number >= 0 else x


class Breaking(Layer):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def breaking() -> nn.Module:
    return nn.Sequential(*map(Breaking, range(LAYERS)))


class TestGraphBreaks:
    def test_in_each_layer(self) -> None:
        whole = breaking()
        assert_all_run(whole, hidden(), by_layers(whole, hidden(), whole), LAYERS)

    @pytest.mark.exhaustive
    def test_in_a_loop_over_the_layers(self) -> None:
        layers = nn.ModuleList(map(Layer, range(LAYERS)))

        def run(x: Tensor) -> Tensor:
            for layer in layers:
                print(end="")
                x = layer(x)
            return x

        assert_all_run(run, hidden(), by_layers(run, hidden(), layers), LAYERS)

    @pytest.mark.exhaustive
    def test_in_a_function_that_is_no_module(self) -> None:
        layers = nn.ModuleList(map(Layer, range(LAYERS)))

        def step(number: int, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return layers[number].mlp(x)[0]

        def run(x: Tensor) -> Tensor:
            for number in range(LAYERS):
                x = step(number, x)
            return x

        assert_all_run(run, hidden(), by_layers(run, hidden(), layers), LAYERS)

    def test_layers_that_are_compiled_one_by_one(self) -> None:
        """Each is a model of its own, and all share one forward."""
        whole = breaking()
        for layer in whole:
            layer.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
        whole(hidden())  # strict raises an error

    @pytest.mark.exhaustive
    def test_in_each_layer_of_a_whole_model(self) -> None:
        whole = model(num_hidden_layers=4)
        for layer in whole.model.layers:
            layer.self_attn.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        ran = Ran()
        with torch._dynamo.config.patch(recompile_limit=3):
            compile_with(whole, ran, options={"strict": True})(tokens())
            explained = mxfp4_fx.explain(whole, tokens())
        assert ran.experts == len(explained.rewrites) == 4


def hooked(module: Any) -> Any:
    attach_execution_device_hook(module, "cpu")
    return module


class TestHooks:
    """accelerate's, which a ``device_map`` of several devices puts on every module."""

    def test_every_layer_is_rewritten(self) -> None:
        whole = pack(Layers())
        expected = by_layers(whole, hidden(), whole, PackedExperts)
        assert_all_run(hooked(whole), hidden(), expected, 2)

    @pytest.mark.exhaustive
    def test_every_layer_of_transformers_own_modules(self) -> None:
        whole, x = hub_layers(), hidden().bfloat16()
        expected = compile_with(whole, options={"strict": True}, fullgraph=True)(x)
        torch.compiler.reset()
        assert_all_run(hooked(whole), x, expected, 2)

    @pytest.mark.exhaustive
    def test_every_layer_of_a_whole_model(self) -> None:
        whole = hooked(pack(model(num_hidden_layers=4)))
        ran = Ran()
        with torch._dynamo.config.patch(recompile_limit=3):
            compile_with(whole, ran, options={"strict": True})(tokens())
            explained = mxfp4_fx.explain(whole, tokens())
        assert ran.experts == len(explained.rewrites) == 4

    @pytest.mark.exhaustive
    def test_a_limit_that_is_reached_all_the_same(self) -> None:
        """Each module has Dynamo's limit for itself, and here each needs more."""
        module = hooked(mlp())
        run = compile_with(module, dynamic=False, options={"strict": True})
        with torch._dynamo.config.patch(recompile_limit=1):
            with pytest.raises(MissedRewriteError, match=r"experts: it ran un.*recompile_limit"):
                _ = [run(hidden(length)) for length in range(3, 30)]
            assert len(mxfp4_fx.explain(module, hidden(40)).rewrites) == 1


class TestOtherBackends:
    def test_keep_their_limit(self) -> None:
        """Neither uses up the other's."""
        whole, graphs, others = breaking(), Graphs(), Graphs()
        compile_with(whole, graphs)(hidden())
        torch.compile(whole, backend=others)(hidden())
        assert (len(graphs.seen), len(others.seen)) == (LAYERS, LIMIT)

    @pytest.mark.exhaustive
    def test_first(self) -> None:
        whole, graphs, others = breaking(), Graphs(), Graphs()
        torch.compile(whole, backend=others)(hidden())
        compile_with(whole, graphs)(hidden())
        assert (len(graphs.seen), len(others.seen)) == (LAYERS, LIMIT)


class TestOneModule:
    """Dynamo's limit holds for it: other lengths at each call are not compiled for ever."""

    @pytest.mark.parametrize(
        "in_function", [pytest.param(False, marks=pytest.mark.exhaustive), True]
    )
    def test_has_no_more_compilations(self, in_function: bool) -> None:
        whole, graphs = Layers(), Graphs()
        run = compile_with((lambda x: whole(x)) if in_function else whole, graphs, dynamic=False)
        with pytest.warns(MissedRewriteWarning, match="recompile_limit"):
            _ = [run(hidden(length)) for length in range(3, 6)]
        assert len(graphs.seen) == LIMIT


# ---- before each frame


DTYPES = torch.float32, torch.float64, torch.int32, torch.int64, torch.bool
OURS = pytest.mark.filterwarnings("ignore::mxfp4_fx.core.errors.NoExpertsWarning")
LIMITS = pytest.mark.parametrize("limit", ["recompile_limit", "accumulated_recompile_limit"])


@LIMITS
def test_a_limit_that_is_reached_has_a_name(limit: str) -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    with torch._dynamo.config.patch({limit: 2}):
        for dtype in DTYPES[:3]:
            assert compilation.reached_limit(function.__code__) is None
            torch.compile(function, backend="eager")(torch.ones(2, dtype=dtype))
        assert compilation.reached_limit(function.__code__) == limit
    torch.compiler.reset()
    assert compilation.reached_limit(function.__code__) is None


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each frame that Dynamo traces for us; two share the code of ``shared``."""
    seen: list[str] = []
    frames, limits = torch._dynamo.convert_frame, torch._dynamo.cache_size
    monkeypatch.setattr(frames, "exceeds_recompile_limit", limits.exceeds_recompile_limit)
    compilation.on_frames(
        lambda is_part: seen.append("frame"), lambda code: 2 if code.co_name == "shared" else 1
    )
    return seen


def ours() -> Graphs:
    backend: Graphs = compilation.ours(Graphs())
    return backend


@OURS
@LIMITS
def test_a_limit_holds_for_each_that_shares_code(begun: list[str], limit: str) -> None:
    def shared(x: Tensor) -> Tensor:
        return x + 1

    def alone(x: Tensor) -> Tensor:
        return x + 1

    for function, graphs, count in ((shared, ours(), 4), (alone, ours(), 2), (shared, Graphs(), 2)):
        torch.compiler.reset()
        with torch._dynamo.config.patch({limit: 2}):
            for dtype in DTYPES:
                torch.compile(function, backend=graphs)(torch.ones(2, dtype=dtype))
        assert len(graphs.seen) == count


@OURS
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_frame_is_announced_before_it_is_traced(begun: list[str], fullgraph: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return x + len(begun)

    torch.compiler.reset()  # which removes Dynamo's own callbacks
    run = torch.compile(function, backend=ours(), fullgraph=fullgraph)
    assert run(torch.zeros(1)) == 1
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    assert begun == ["frame"]


@OURS
def test_dynamo_still_sees_who_called_a_frame(begun: list[str]) -> None:
    """It looks for a disabled caller on the stack, where a wrapper must not stand."""
    graphs = ours()

    def inner(x: Tensor) -> Tensor:
        return x * 2

    @torch.compiler.disable(recursive=False)
    def outer(x: Tensor) -> Tensor:
        return inner(x) + 1

    torch.compile(lambda x: outer(x), backend=graphs)(torch.ones(2))
    assert len(graphs.seen) == 1
    assert begun == ["frame"] * 2
