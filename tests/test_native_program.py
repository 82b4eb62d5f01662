"""Native programs: graphs of a few tokens that one native call computes.

Where a program has linears, their operands are small integers, whose sums are exact in any order.
So it has the bits of the uncompiled function.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import DTYPES, model, tokens
from oracle import Matrices, assert_as_accurate
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import mxfp4_fx
from mxfp4_fx import backend
from mxfp4_fx.core import hardware, mxfp8
from mxfp4_fx.core.errors import NoExpertsWarning
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.ops import target
from mxfp4_fx.ops.program import Program
from mxfp4_fx.passes.native_program import program_of
from mxfp4_fx.passes.native_values import NoProgram

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.skipif(
        not target.has_native_linears("auto"), reason="no native kernels can be built here"
    ),
]

ops = torch.ops.mxfp4
to = torch.ops.prims.convert_element_type
# ... of matmul_ogs: activation, alpha, limit, offset of up, layout, kernels.
SWIGLU = "swiglu", 1.702, 7.0, 1.0, "cpu_panels", "cpu"
NONE = "none", 1.702, 7.0, 1.0, "cpu_panels", "cpu"


@pytest.fixture(autouse=True)
def same_on_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "linear_rows", lambda dtype: 4)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Program | None]:
    """What became of each graph that was compiled: its program, or None."""
    found: list[Program | None] = []
    decide = backend._program_of

    def noted(graph: fx.GraphModule, examples: Any) -> Program | None:
        found.append(decide(graph, examples))
        return found[-1]

    monkeypatch.setattr(backend, "_program_of", noted)
    return found


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def floats(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """An op of this package, without which a graph becomes no program."""
    return ops.linears(x, [weight], [None], "cpu")[0]


def graph(f: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    return make_fx(lambda *args: [*f(*args)], tracing_mode="fake")(*inputs)


def program(f: Callable[..., Any], *inputs: Any) -> Program:
    return program_of(graph(f, *inputs), inputs)


def assert_same(f: Callable[..., Any], *inputs: Any) -> None:
    """Assert that the program has the function's bits and strides."""
    results = program(f, *inputs)([*inputs])
    for actual, expected in zip(results, f(*inputs), strict=True):
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)


class TestNumbers:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_each_result_is_rounded_as_without_a_compiler(self, dtype: torch.dtype) -> None:
        """Of tensors that lie in other orders, or of which one element stands for several."""

        def f(x: Tensor, weight: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Any:
            heads = linear(x, weight).view(2, 1, 4, 16).permute(0, 2, 1, 3)
            first, second = to(heads * scale, dtype).split(8, -1)
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            return turned, to(turned, torch.float32) * scale[0] + 1e-5, turned.select(1, 2)

        x, weight = integers(2, 1, 32, dtype=dtype), integers(64, 32, dtype=dtype)
        cos, sin = (floats(2, 1, 8, dtype=dtype, seed=seed) for seed in (0, 1))
        assert_same(f, x, weight, floats(1).expand(16), cos, sin)

    def test_a_norms_factor(self) -> None:
        """Of x^2, their mean, eps, the root and its inverse, the first three are under the root."""

        def f(x: Tensor, weight: Tensor) -> Any:
            x = linear(x, weight)
            return [torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)]

        x, weight = integers(3, 32), integers(1100, 32)
        (actual,) = program(f, x, weight)([x, weight])
        exact = ((x @ weight.T).double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        unit = torch.finfo(torch.float32).eps / 2
        assert ((actual.double() - exact).abs() <= (3 / 2 + 2) * 1.01 * unit * exact).all()

    @pytest.mark.parametrize("seed", range(8))
    def test_memory_is_used_again_behind_its_last_reader(self, seed: int) -> None:
        """Random graphs of sums, views and joins, some of whose values are returned."""
        chosen = random.Random(seed)
        steps: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda a, b: a + b,
            lambda a, b: a * 0.5 - b,
            lambda a, b: torch.cat([a[:, :3], b[:, 3:]], 1),
            lambda a, b: a[:, 2:3] + b[:1],
        ]
        plan = [(chosen.choice(steps), chosen.random(), chosen.random()) for _ in range(40)]

        def f(x: Tensor, weight: Tensor) -> Any:
            values = [linear(x, weight)]
            for step, *picks in plan:
                a, b = (values[-1 - int(pick * min(len(values), 6))] for pick in picks)
                values.append(step(a, b))
            return values[:0:-9]

        x, weight = integers(4, 32), integers(8, 32)
        assert_same(f, x, weight)
        of_all = len(program(f, x, weight)) * x.shape[0] * weight.shape[0] * x.itemsize
        assert program(f, x, weight)._memory < of_all / 2


class TestOps:
    """Each op has the bits that it has when it is called."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linears(self, dtype: torch.dtype) -> None:
        """Small ones, which are ATen's in the graph, are computed as the others."""
        x, one, two = (floats(n, 64, dtype=dtype) for n in (2, 24, 16))
        bias, part = floats(24, dtype=dtype), floats(8, 128, dtype=dtype)[:, :64]

        def f(x: Tensor, one: Tensor, two: Tensor, bias: Tensor, part: Tensor) -> Any:
            first, second = ops.linears(x, [one, two], [bias, None], "cpu")
            return first, second, torch.mm(x, part.t()), torch.addmm(bias, x, one.t())

        given = x, one, two, bias, part
        first, second = ops.linears(x, [one, two], [bias, None], "cpu")
        expected = first, second, linear(x, part), first
        found = program(f, *given)([*given])
        assert [*map(torch.equal, found, expected)] == [True] * 4

    def test_linears_in_mxfp8(self) -> None:
        def f(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor) -> Any:
            return ops.linears_mxfp8(x, [codes, codes], [scales, scales], [bias, None], "cpu")

        assert_same(f, floats(3, 64), *mxfp8.quantize(floats(1, 40, 64)), floats(40))

    def test_experts(self) -> None:
        layout = LAYOUTS["cpu_panels"]
        matrices = Matrices.random(4, 64, 32), Matrices.random(4, 32, 32)
        weights = []
        for each in matrices:
            swizzled = [*map(layout.swizzle, each.blocks, each.scales)]
            weights.append((*map(torch.stack, zip(*swizzled, strict=True)), each.bias))

        def f(x: Tensor, logits: Tensor, *weights: Tensor) -> Any:
            gammas, gather, scatter, offsets = ops.routing(logits, 2, 0, None, "cpu")
            routes = offsets, gather, None, None, 1
            y = ops.matmul_ogs(x, *weights[:3], 64, *routes, *SWIGLU)
            routes = offsets, None, scatter, gammas, 2
            return [ops.matmul_ogs(y, *weights[3:], 32, *routes, *NONE)]

        assert_same(f, floats(3, 32), floats(3, 4), *weights[0], *weights[1])

    @pytest.mark.filterwarnings(f"ignore::{NoExpertsWarning.__module__}.NoExpertsWarning")
    @pytest.mark.parametrize("mask", [None, 1, 2])
    def test_attention_of_any_number_of_keys(
        self, mask: int | None, made: list[Program | None]
    ) -> None:
        """With one mask, or one for each prompt."""

        def f(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None) -> Any:
            return ops.attention_with_sinks(query, key, value, sinks, mask, 0.2, "cpu") * 0.5

        compiled = torch.compile(f, backend=backend.mxfp4, options={})
        for keys in (7, 9, 40):
            states = [floats(2, keys, 1, 32, seed=seed).transpose(1, 2) for seed in (1, 2)]
            for state in states:
                torch._dynamo.mark_dynamic(state, 2)
            masked = None if mask is None else floats(mask, 1, 1, keys)
            if masked is not None:
                torch._dynamo.mark_dynamic(masked, 3)
            given = floats(2, 4, 1, 32), *states, floats(4), masked
            assert torch.equal(compiled(*given), f(*given))
        assert [one is not None for one in made] == [True]


class TestPlaces:
    """Where views lie, in arguments and in what is between ops."""

    def test_of_an_argument_that_begins_inside_its_memory(self) -> None:
        def f(x: Tensor, weight: Tensor, more: Tensor) -> Any:
            return linear(x, weight), more[1:] + more[:1], more.t()[2:4] * 2

        inputs = integers(3, 32)[1:], integers(8, 32), floats(4, 8)[1:, 2:]
        assert_same(f, *inputs)

    @pytest.mark.filterwarnings(f"ignore::{NoExpertsWarning.__module__}.NoExpertsWarning")
    @pytest.mark.parametrize(
        ("copied", "is_program"),
        [
            (lambda y: y[4:].clone().view(2, 2), True),
            (lambda y: torch.cat([y[4:]]).view(2, 2), True),
            (lambda y: (y[4:] + torch.zeros(4)).view(2, 2), False),  # the zeros stay in the graph
        ],
        ids=["a clone", "a join of one", "a sum with zeros"],
    )
    def test_of_a_copy_that_inductor_leaves_out(
        self, copied: Any, is_program: bool, made: list[Program | None]
    ) -> None:
        """It hands the graph over with fake values of the copy, which is in other memory."""

        def f(x: Tensor, weight: Tensor, more: Tensor) -> Any:
            return copied(linear(x, weight)[0]) * 2, copied(more) * 2

        inputs = integers(1, 32), integers(8, 32), floats(8)
        compiled = torch.compile(f, backend=backend.mxfp4)
        for actual, expected in zip(compiled(*inputs), f(*inputs), strict=True):
            assert torch.equal(actual, expected)
        # Nobody is asked where torch's caches have Inductor's result of an earlier run.
        assert any(one is not None for one in made) == is_program


class TestCalls:
    def f(self, x: Tensor, weight: Tensor) -> Any:
        y = linear(x, weight)
        return y * 2, y.view(2, 2, 4).permute(1, 0, 2)

    def test_results_are_new_and_no_tensor_is_kept(self) -> None:
        x, weight = integers(2, 32), integers(8, 32)
        computes = program(self.f, x, weight)
        first = computes([x, weight])
        computes([x + 1, weight])
        assert torch.equal(first[0], self.f(x, weight)[0])
        kept = [weakref.ref(tensor) for tensor in (x, *first)]
        args = [x, weight]
        computes(args)
        assert args == []
        del x, first
        assert [ref() for ref in kept] == [None] * 3

    def test_in_several_threads_at_once(self) -> None:
        weight = integers(8, 32)
        computes = program(self.f, integers(2, 32), weight)

        def call(at: int) -> bool:
            x = integers(2, 32) + at
            return torch.equal(computes([x, weight])[0], self.f(x, weight)[0])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(200)))

    def test_profiles_show_its_ops(self) -> None:
        x, weight = integers(2, 32), integers(8, 32)
        computes = program(self.f, x, weight)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            results = computes([x, weight])
        assert [e.name for e in found.events() if "mxfp4" in e.name] == ["mxfp4::linears"]
        assert torch.equal(results[0], self.f(x, weight)[0])

    def test_profiles_show_ops_whose_weights_are_no_arguments(self) -> None:
        def f(query: Tensor, key: Tensor, sinks: Tensor) -> Any:
            return [ops.attention_with_sinks(query, key, key, sinks * 2, None, 1.0, "cpu")]

        given = floats(1, 2, 1, 32), floats(1, 2, 4, 32), floats(2)
        computes = program(f, *given)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            computes([*given])
        names = [event.name for event in found.events() if "mxfp4" in event.name]
        assert names == ["mxfp4::attention_with_sinks"]


X, W = integers(2, 32), integers(8, 32)
NEAR: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "nothing of this package": (lambda x, w: [x + 1], (X, W), "no op of this package"),
    "another op": (lambda x, w: [linear(x, w).exp()], (X, W), "no instruction for aten.exp"),
    "a factor": (lambda x, w: [torch.add(linear(x, w), 1.0, alpha=2)], (X, W), "factor"),
    "a cube": (lambda x, w: [linear(x, w).pow(3)], (X, W), "a power of 3"),
    "a mean of columns": (lambda x, w: [linear(x, w).mean(0, keepdim=True)], (X, W), "a mean over"),
    "a mean without its dimension": (lambda x, w: [linear(x, w).mean(-1)], (X, W), "a mean over"),
    "float64": (lambda x, w: [to(linear(x, w), torch.float64)], (X, W), "torch.float64"),
    "a number beside 16 bits": (
        lambda x, w: [linear(x, w) * 0.3],
        (X.bfloat16(), W.bfloat16()),
        "beside 16 bits",
    ),
    "a tensor as a number beside 16 bits": (
        lambda x, w, t: [linear(x, w) + t],
        (X.bfloat16(), W.bfloat16(), torch.tensor(0.3)),
        "beside 16 bits",
    ),
    "a number beyond float32": (lambda x, w: [linear(x, w) * 1e39], (X, W), "no number of float32"),
    "nothing to multiply": (
        lambda x, w, a, b: [linear(x, w), torch.mm(a, b.t())],
        (X, W, torch.ones(2, 0), torch.ones(8, 0)),
        "empty",
    ),
    "two dtypes are joined": (
        lambda x, w: [torch.cat([linear(x, w), to(x, torch.bfloat16)], 1)],
        (X, W),
        "several dtypes",
    ),
    "a bias for each row": (
        lambda x, w, b: [linear(x, w), torch.addmm(b, x, w.t())],
        (X, W, torch.ones(2, 1)),
        "no linear",
    ),
    "codes in another order": (
        lambda x, c, s: ops.linears_mxfp8(x, [c.mT], [s], [None], "cpu"),
        (X, torch.ones(1, 32, 8).byte(), torch.ones(1, 8, 1).byte()),
        "another order",
    ),
    "logits in another order": (
        lambda x, w, r: ops.routing(r.t(), 2, 0, None, "cpu"),
        (X, W, floats(4, 3)),
        "a router's logits",
    ),
    "another layout": (
        lambda x, b, s, o: [
            ops.matmul_ogs(x, b, s, None, 8, o, None, None, None, 1, *NONE[:4], "row_major", "cpu")
        ],
        (X, torch.ones(1, 8, 1, 16).byte(), torch.ones(1, 8, 1).byte(), torch.tensor([0, 2]).int()),
        "lie in another order",
    ),
    "integers": (lambda x, w, i: [linear(x, w) * i], (X, W, torch.ones(8).long()), "torch.int64"),
    "an argument is returned": (lambda x, w: [linear(x, w), x[:1]], (X, W), "returns an argument"),
    "many elements": (
        lambda x, w, y: [linear(x, w), y + 1],
        (X, W, torch.ones(1 << 17)),
        "take long",
    ),
    "five dimensions": (
        lambda x, w: [linear(x, w).view(1, 1, 1, 2, 8) + 1],
        (X, W),
        "more than four",
    ),
    "many rows": (lambda x, w: [linear(x, w)], (integers(5, 32), W), "so many rows"),
    "a transposed input": (lambda x, w: [linear(x.t(), w)], (integers(32, 2), W), "another order"),
    "a transposed weight": (lambda x, w: [linear(x, w.t())], (X, integers(32, 8)), "another order"),
    "plain PyTorch": (
        lambda x, w: ops.linears(x, [w], [None], "reference"),
        (X, W),
        "by reference kernels",
    ),
    "a product that is no linear": (
        lambda x, w, v: [linear(x, w), torch.mm(x, v)],
        (X, W, integers(32, 8)),
        "no linear",
    ),
    "several queries": (
        lambda q, k, s: [ops.attention_with_sinks(q, k, k, s, None, 1.0, "cpu")],
        (floats(1, 2, 3, 32), floats(1, 2, 4, 32), floats(2)),
        "several queries",
    ),
    "small heads": (
        lambda q, k, s: [ops.attention_with_sinks(q, k, k, s, None, 1.0, "cpu")],
        (floats(1, 2, 1, 16), floats(1, 2, 4, 16), floats(2)),
        "uncommon size",
    ),
    "keys in columns": (
        lambda q, k, s: [ops.attention_with_sinks(q, k.mT, k.mT, s, None, 1.0, "cpu")],
        (floats(1, 2, 1, 32), floats(1, 2, 32, 4), floats(2)),
        "keys or values lie",
    ),
    "one mask for all keys": (
        lambda q, k, s, m: [ops.attention_with_sinks(q, k, k, s, m, 1.0, "cpu")],
        (floats(1, 2, 1, 32), floats(1, 2, 4, 32), floats(2), floats(1, 1, 1, 1)),
        "a mask lies",
    ),
    "a negated view": (
        lambda x, w, n: [linear(x, w) + n],
        (X, W, torch.ones(8, dtype=torch.complex64).conj().imag),
        "no plain tensor",
    ),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_stay_inductors(case: str) -> None:
    f, inputs, why = NEAR[case]
    with pytest.raises(NoProgram, match=why):
        program(f, *inputs)


class TestModels:
    @staticmethod
    def decode(whole: Any, prompt: Tensor, steps: int = 3) -> Tensor:
        """The logits of a prompt's last token, and of the same tokens decoded behind it."""
        cache, ids, found = DynamicCache(config=whole.config), prompt, []
        for step in range(steps):
            logits = whole(ids, past_key_values=cache).logits[:, -1]
            found.append(logits)
            ids = tokens(len(prompt), 1, seed=step)
        return torch.stack(found)

    @pytest.mark.parametrize("free_weights", [False, True])
    def test_decoding(self, free_weights: bool, made: list[Program | None]) -> None:
        """A layer's second piece becomes a program; its first has no op of this package here."""
        kwargs = {"head_dim": 32}
        prompt = tokens(1)
        expected = self.decode(model(torch.bfloat16, **kwargs), prompt)
        exact = self.decode(model(torch.bfloat16, form="eager", **kwargs).double(), prompt)
        options = {"strict": True, "free_weights": free_weights}
        whole = mxfp4_fx.compile(model(torch.bfloat16, **kwargs), options=options)
        assert_as_accurate(self.decode(whole, prompt), expected, exact)
        assert [one is not None for one in made].count(True) == 1

    def test_switched_off(self, made: list[Program | None]) -> None:
        whole = model(torch.bfloat16, head_dim=32, num_hidden_layers=1)
        self.decode(mxfp4_fx.compile(whole, options={"programs": False}), tokens(1), 2)
        assert made == []


def test_a_node_without_its_fake_value_stays_inductors() -> None:
    """As a pass that a user has given Inductor may leave it."""
    captured = graph(lambda x, w: [linear(x, w) + 1], X, W)
    next(node for node in captured.graph.nodes if node.op == "call_function").meta.clear()
    with pytest.raises(NoProgram, match="without its fake value"):
        program_of(captured, (X, W))
