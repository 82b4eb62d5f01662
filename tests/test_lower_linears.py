"""Which linears become ``mxfp4::linears``, and that the graph computes the same.

Numbers here are small integers, whose sums are exact in any order. So results are equal, bit for
bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import DTYPES, Graphs, compile_with, model, tokens
from test_graphs import Snapshots, readable
from torch import Tensor, fx, nn
from torch.nn import functional as F

import mxfp4_fx
from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import NoExpertsWarning
from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import cpu_linear, native
from mxfp4_fx.passes.lower_linears import lower_linears
from mxfp4_fx.passes.pipeline import run_pipeline

ROWS = 4  # of x; more are left to torch

pytestmark = pytest.mark.filterwarnings(f"ignore::{NoExpertsWarning.__module__}.NoExpertsWarning")


@pytest.fixture(autouse=True)
def same_on_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op pays for weights of any size, up to four rows."""
    monkeypatch.setattr(hardware, "LINEAR_BYTES", dict.fromkeys(DTYPES, 0))
    monkeypatch.setattr(hardware, "linear_rows", lambda dtype: ROWS)


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were computed natively."""
    found: list[int] = []
    compute = cpu_linear._natively

    def noted(x: Tensor, *args: Any) -> Any:
        results = compute(x, *args)
        if results is not None:
            found.append(math.prod(x.shape[:-1]))
        return results

    monkeypatch.setattr(cpu_linear, "_natively", noted)
    return found


def of_integers(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    return module


class Attention(nn.Module):
    """The linears of an attention: q, k and v of one input, and o."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 16), nn.Linear(32, 16, bias=False)
        self.o = nn.Linear(64, 32)
        of_integers(self).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).clamp(-2, 2) for one in (self.q, self.k, self.v))
        return x + self.o(q * k.repeat(1, 1, 4).relu() + v.repeat(1, 1, 4))


def inputs(rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(-2, 3, (1, rows, 32), generator=generator).to(dtype)


def calls(graphs: Graphs) -> list[list[int]]:
    """For each graph, how many linears each of its calls of the op computes."""
    return [
        [
            len(node.args[1])
            for node in gm.graph.nodes
            if str(node.target) == "mxfp4.linears.default"
        ]
        for gm in graphs.seen
    ]


class TestGraph(Snapshots):
    def test_attention(self) -> None:
        graphs = Graphs()
        compile_with(Attention(), graphs)(inputs())
        self.assertExpectedInline(
            readable(graphs.seen[0]),
            """\
input l_x_: float32[1, 3, 32]
input q.weight: float32[64, 32]
input q.bias: float32[64]
input k.weight: float32[16, 32]
input k.bias: float32[16]
input v.weight: float32[16, 32]
input o.weight: float32[32, 64]
input o.bias: float32[32]
linears_default = mxfp4.linears.default(l_x_, [q.weight, k.weight, v.weight], [q.bias,
    k.bias, None], 'cpu')
getitem: float32[1, 3, 64] = getitem(linears_default, 0)
getitem_1: float32[1, 3, 16] = getitem(linears_default, 1)
getitem_2: float32[1, 3, 16] = getitem(linears_default, 2)
q: float32[1, 3, 64] = .clamp(getitem, -2, 2)
k: float32[1, 3, 16] = .clamp(getitem_1, -2, 2)
v: float32[1, 3, 16] = .clamp(getitem_2, -2, 2)
repeat: float32[1, 3, 64] = .repeat(k, 1, 1, 4)
relu: float32[1, 3, 64] = .relu(repeat)
mul: float32[1, 3, 64] = mul(q, relu)
repeat_1: float32[1, 3, 64] = .repeat(v, 1, 1, 4)
add: float32[1, 3, 64] = add(mul, repeat_1)
linears_default_1 = mxfp4.linears.default(add, [o.weight], [o.bias], 'cpu')
getitem_3: float32[1, 3, 32] = getitem(linears_default_1, 0)
add_1: float32[1, 3, 32] = add(l_x_, getitem_3)
return [add_1]
""",
        )


@pytest.mark.parametrize(
    ("inner", "dtype"),
    list(zip(("eager", "aot_eager", "inductor"), DTYPES, strict=True)),
)
def test_any_number_of_rows_by_one_graph(
    inner: str, dtype: torch.dtype, natively: list[int]
) -> None:
    module, graphs = Attention(dtype), 0

    def counted(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(inner)(gm, inputs)

    run = compile_with(module, counted, dynamic=True)
    for rows in (64, 2, ROWS, ROWS + 1):
        x = inputs(rows, dtype)
        assert torch.equal(run(x), module(x))
    assert graphs == 1
    assert natively == [2, 2, ROWS, ROWS]


def test_one_row(natively: list[int]) -> None:
    run, module = compile_with(Attention()), Attention()
    assert torch.equal(run(inputs(1)), module(inputs(1)))
    assert natively == [1, 1]


def test_many_rows_have_the_bits_of_the_uncompiled_model() -> None:
    module, x = Attention(torch.bfloat16), inputs(64, torch.bfloat16) / 3  # with rounding
    run = compile_with(module, dynamic=True)
    assert torch.equal(run(x), module(x))


def count(run: Callable[..., Any], *args: Any, **options: Any) -> int:
    """How many linears of the graph become the op's, as the passes report."""
    found: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(run_pipeline(gm, inputs, Options(**options))[1].report.linears)
        return gm.forward

    torch.compile(run, backend=backend)(*args)
    (linears,) = found
    return linears


class Held(nn.Module):
    """A function of a weight [8, 32], which is a parameter, and x."""

    def __init__(self, run: Callable[[Tensor, Tensor], Any], weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.run = nn.Parameter(torch.empty(8, 32)), run
        of_integers(self)
        if weight is not None:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return self.run(self.weight, x)


def plain(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def in_autocast(weight: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, weight)


def then_transposed(weight: Tensor, x: Tensor) -> Tensor:
    y = F.linear(x, weight)
    return y.t_()


def of_an_input_transposed(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear((x + 1).t_().t_(), weight)


X = inputs()
MATCHES = {
    "linear": Held(plain),
    "a module": of_integers(nn.Linear(32, 8)),
    "arguments by name": Held(lambda w, x: F.linear(weight=w, input=x)),
    "a slice of the input": Held(lambda w, x: F.linear(x[:, 1:], w)),
    "written to afterwards": Held(lambda w, x: F.linear(x, w).add_(1)),
    "autocast of the same dtype": Held(in_autocast, torch.ones(8, 32).bfloat16()),
    "in inference mode": Held(torch.inference_mode()(plain)),
}


@pytest.mark.parametrize("name", MATCHES)
def test_matches(name: str) -> None:
    module = MATCHES[name]
    x = X.to(next(module.parameters()).dtype)
    assert count(module, x) == 1
    assert torch.equal(compile_with(module)(x), module(x))


NEAR_MISSES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "autocast": (Held(in_autocast), X),
    "float64": (Held(plain).double(), X.double()),
    "another device": (Held(plain).to("meta"), X.to("meta")),
    "a matmul": (Held(lambda w, x: x @ w.T), X),
    "a computed weight": (Held(lambda w, x: F.linear(x, w * 2)), X),
    "a part of a weight": (Held(lambda w, x: F.linear(x, w[:4])), X),
    "a computed bias": (Held(lambda w, x: F.linear(x, w, w[:, 0] * 2)), X),
    "a transposed weight": (Held(plain, torch.ones(32, 8).T), X),
    "more rows": (Held(plain), inputs(ROWS + 1)),
    "no rows": (Held(plain), inputs(0)),
    "a result that is transposed in place": (Held(then_transposed), X[0]),
    "an input that is transposed in place": (Held(of_an_input_transposed), X[0]),
    "a result that nobody reads": (Held(lambda w, x: (F.linear(x, w), x + 1)[1]), X),
    "vmap": (Held(lambda w, x: torch.vmap(lambda row: F.linear(row, w))(x[0])), X),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    module, x = NEAR_MISSES[name]
    assert count(module, x) == 0
    result, expected = compile_with(module)(x), module(x)
    assert result.device.type == "meta" or torch.equal(result, expected)


@pytest.mark.usefixtures("no_gradients")
def test_a_weight_that_is_an_argument() -> None:
    assert count(plain, torch.ones(8, 32), X) == 0
    assert count(plain, nn.Parameter(torch.ones(8, 32)), X) == 1


class TestOptions:
    def test_off(self) -> None:
        assert count(Attention(), X, linears=False) == 0

    def test_other_kernels(self) -> None:
        for kernels in ("pytorch", "reference"):
            assert count(Attention(), X, kernels=kernels) == 0

    def test_freezing(self) -> None:
        assert count(Attention(), X, inductor={"freezing": True}) == 0

    def test_a_path_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setenv(hardware.CPU_PATH_VARIABLE, "avx3")
        hardware.cpu_path.cache_clear()
        try:
            assert count(Attention(), X) == 0
        finally:
            monkeypatch.undo()
            hardware.cpu_path.cache_clear()

    @pytest.mark.filterwarnings("error")
    def test_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(path: str) -> None:
            raise native.NativeBuildError("there is no C++ compiler")

        monkeypatch.setattr(native, "load", load)
        assert count(Attention(), X) == 0


def test_the_sizes_of_a_group_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v have 12 KiB, o has 8."""
    monkeypatch.setattr(hardware, "LINEAR_BYTES", dict.fromkeys(DTYPES, 12 << 10))
    assert count(Attention(), X) == 3


# ---- gradients


def gradients(run: Callable[..., Tensor], module: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.detach().clone().requires_grad_(x.requires_grad)
    run(x).sum().backward()
    found = [x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return found


@pytest.mark.parametrize("wanted", ["x", "q.weight", "k.bias"])
def test_linears_that_need_gradients_stay(wanted: str) -> None:
    module, graphs, x = Attention(), Graphs(), X.clone()
    x.requires_grad_(wanted == "x")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == wanted)
    run = compile_with(module, graphs)
    found, expected = gradients(run, module, x), gradients(module, module, x)
    # Without a gradient of x, q, k and v that need none are one call.
    others = {"x": [], "q.weight": [2], "k.bias": [2]}[wanted]
    assert calls(graphs) == [others]
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(run(x), module(x))
    assert calls(graphs) == [others, [3, 1]]


# ---- linears of one input, and what is written between them


def between(write: Callable[[Attention, Tensor], Any]) -> Callable[..., Any]:
    class Writing(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q = self.q(x)
            write(self, x)
            return q, self.k(x)

    return Writing()


WRITES = {
    "nothing": (lambda self, x: None, [2]),
    "another weight": (lambda self, x: self.o.weight.mul_(2), [2]),
    "the first weight": (lambda self, x: self.q.weight.mul_(2), [2]),
    "the second weight": (lambda self, x: self.k.weight.mul_(2), [1, 1]),
    "the second bias": (lambda self, x: self.k.bias.mul_(2), [1, 1]),
    "the input": (lambda self, x: x.mul_(2), [1, 1]),
    "a part of the input": (lambda self, x: x[:, 1:].mul_(2), [1, 1]),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", WRITES)
def test_writes_between_two_linears(name: str) -> None:
    write, expected = WRITES[name]
    module, other, graphs = between(write), between(write), Graphs()
    results = compile_with(module, graphs)(inputs())
    assert calls(graphs) == [expected]
    for a, b in zip(results, other(inputs()), strict=True):
        assert torch.equal(a, b)


def test_other_modes_between() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        q = module.q(x)
        with torch.no_grad():
            return q, module.k(x)

    module, graphs = Attention(), Graphs()
    compile_with(run, graphs)(X)
    assert calls(graphs) == [[1, 1]]


@pytest.mark.usefixtures("no_gradients")
def test_low_rank_adapters() -> None:
    """Of q: a linear of q's input, and one of its result."""

    class Adapted(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + 2 * self.up(self.down(x))

    module, graphs = Adapted(), Graphs()
    for adapter in (module.down, module.up):
        nn.init.constant_(adapter.weight, 1)
    assert torch.equal(compile_with(module, graphs)(X), module(X))
    assert calls(graphs) == [[2, 1]]


# ---- weights


@pytest.mark.usefixtures("no_gradients")
def test_weights_that_change_after_compiling() -> None:
    module, graphs = Attention(), Graphs()
    run = compile_with(module, graphs)
    run(X)
    module.q.weight.mul_(2)
    module.k.weight.data.mul_(2)
    module.v.weight.data = torch.ones(16, 32)
    module.o.weight = nn.Parameter(torch.ones(32, 64), requires_grad=False)
    assert torch.equal(run(X), module(X))
    assert len(graphs.seen) == 1


@pytest.mark.usefixtures("no_gradients")
def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.embedding.weight
            self.embedding.weight.copy_(torch.arange(50)[:, None] % torch.arange(1, 33))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    module, ids = Tied(), torch.arange(3)[None]
    run = compile_with(module)
    assert count(module, ids) == 1
    for _ in range(2):
        assert torch.equal(run(ids), module(ids))
        module.embedding.weight.mul_(-2)


# ---- models


@pytest.mark.usefixtures("no_gradients")
def test_regions() -> None:
    def step(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).clamp(-2, 2)

    region = torch.compiler.nested_compile_region(step)
    layers, graphs = [Attention() for _ in range(3)], Graphs()
    layers[1].q.weight.mul_(3)

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = region(layer, x)
        return x

    assert count(run, X) == 3 * 4
    result = compile_with(run, graphs)(X)
    bodies = Graphs()
    bodies.seen = [m for m in graphs.seen[0].modules() if isinstance(m, fx.GraphModule)][1:]
    assert calls(bodies) == [[3, 1]]
    expected = X
    for layer in layers:
        expected = step(layer, expected)
    assert torch.equal(result, expected)


@pytest.mark.usefixtures("no_gradients")
class TestGptOss:
    """Of a layer: q, k and v, o, the router; and the head."""

    def test_whole(self) -> None:
        whole, graphs = model(), Graphs()
        compile_with(whole, graphs, options={"regions": False})(tokens(1, 2))
        assert calls(graphs) == [[3, 1, 1, 3, 1, 1, 1]]

    def test_layer_by_layer(self) -> None:
        whole, graphs = model(), Graphs()
        mxfp4_fx.compile(whole, options={"inner": graphs, "strict": True})
        whole(tokens(1, 1), use_cache=True)
        assert calls(graphs) == [[2], [1, 1, 1]]  # the head is in no graph

    def test_verification_leaves_linears(self) -> None:
        compile_with(model(num_hidden_layers=1), options={"verify": True})(tokens(1, 2))


def test_the_pass_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "mxfp4_fx.passes")
    compile_with(Attention())(X)
    assert f"{lower_linears.__name__}: " in caplog.text
    assert "linear -4, linears.default +2" in caplog.text
