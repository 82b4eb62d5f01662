"""``options["linears"] = "mxfp8"``: which linears read MXFP8, what is told of others, and freeing.

Where weights are small integers, MXFP8 holds them, and results are equal, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import DTYPES, Graphs, compile_with, model, tokens
from oracle import assert_as_accurate
from test_lower_linears import Attention, Held, inputs, of_integers
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from transformers import GptOssForCausalLM

import mxfp4_fx
from mxfp4_fx.core import mxfp8
from mxfp4_fx.core.errors import (
    MissedRewriteError,
    MissedRewriteWarning,
    NanWeightsWarning,
    NoExpertsWarning,
    OptionError,
    VerificationError,
)
from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import cpu_mxfp8
from mxfp4_fx.passes import linear_verification
from mxfp4_fx.passes.pipeline import run_pipeline
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights import swizzle
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.source import LINEAR, Source
from mxfp4_fx.weights.store import STORE

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings(f"ignore::{NoExpertsWarning.__module__}.NoExpertsWarning"),
]
ON: dict[str, Any] = {"linears": "mxfp8"}
OP = "mxfp4.linears_mxfp8.default"
X = inputs()


def compiled(module: Any, inner: Any = None, **options: Any) -> Any:
    return compile_with(module, *([inner] if inner else []), options={**ON, **options})


def calls(graphs: Graphs) -> list[list[int]]:
    """For each graph, how many linears each of its calls of the op computes."""
    return [
        [len(node.args[1]) for node in gm.graph.nodes if str(node.target) == OP]
        for gm in graphs.seen
    ]


def rounded(module: Any, *exact: str) -> Any:
    """A copy of a model whose linears have MXFP8's values, but for those that are named."""
    made = copy.deepcopy(module)
    for name, one in made.named_modules():
        if isinstance(one, nn.Linear) and name not in exact:
            values = mxfp8.dequantize(*mxfp8.quantize(one.weight), one.weight.dtype)
            one.weight = nn.Parameter(values, requires_grad=False)
    return made


def report_of(run: Callable[..., Any], *args: Any, **options: Any) -> GraphReport:
    found: list[GraphReport] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(run_pipeline(gm, inputs, Options(**{**ON, **options}))[1].report)
        return gm.forward

    torch.compile(run, backend=backend)(*args)
    (report,) = found
    return report


@pytest.mark.parametrize(
    ("inner", "dtype"),
    list(zip(("eager", "aot_eager", "inductor"), DTYPES, strict=True)),
)
def test_any_number_of_rows_by_one_graph(inner: str, dtype: torch.dtype) -> None:
    module, graphs = Attention(dtype), 0

    def counted(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(inner)(gm, inputs)

    run = compile_with(module, counted, dynamic=True, options=ON)
    for rows in (64, 2, 5):
        assert torch.equal(run(inputs(rows, dtype)), module(inputs(rows, dtype)))
    assert graphs == 1


def test_linears_of_one_input_are_one_call() -> None:
    graphs = Graphs()
    module = Attention()
    assert torch.equal(compiled(module, graphs)(X), module(X))
    assert calls(graphs) == [[3, 1]]


def test_a_linear_that_nobody_reads_is_in_no_call_with_others() -> None:
    """Compilers drop its call: of a layer's first piece, the queries."""

    class Keys(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.q(x)
            return self.k(x) + self.v(x)

    graphs, module = Graphs(), Keys()
    assert torch.equal(compiled(module, graphs)(X), module(X))
    assert calls(graphs) == [[1, 2]]


def test_weights_are_rounded_to_mxfp8() -> None:
    module = nn.Linear(64, 40).requires_grad_(False)
    x = torch.randn(3, 64)
    y, exact = compiled(module)(x), rounded(module).double()(x.double())
    assert not torch.equal(rounded(module).weight, module.weight)
    assert_as_accurate(y, rounded(module)(x), exact)


# ---- which linears


def written(weight: Tensor, x: Tensor) -> Tensor:
    weight.mul_(2)
    return F.linear(x, weight)


def in_autocast(weight: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, weight)


def plain(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def then_transposed(weight: Tensor, x: Tensor) -> Tensor:
    y = F.linear(x, weight)
    return y.t_()


def of_an_input_transposed(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear((x + 1).t_().t_(), weight)


def in_vmap(weight: Tensor, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: F.linear(row, weight))(x[0])


STAYS: dict[str, tuple[Any, Tensor]] = {
    "a multiple of 32 input features": (of_integers(nn.Linear(33, 8)), torch.ones(2, 33)),
    "they are float64": (Held(plain).double(), X.double()),
    "they are bfloat16, float32": (Held(in_autocast), X),
    "may write to its weight": (Held(written), X),
    "its result is not contiguous": (Held(then_transposed), X[0]),
    "reshaped in place": (Held(of_an_input_transposed), X[0]),
    "function transform": (Held(in_vmap), X),
}


@pytest.mark.parametrize("reason", STAYS)
def test_what_stays_is_told_and_computed_as_before(reason: str) -> None:
    module, x = STAYS[reason]
    other = copy.deepcopy(module)
    (miss,) = report_of(module, x).linear_misses
    assert reason in miss.reason
    module = copy.deepcopy(other)
    with pytest.warns(MissedRewriteWarning, match="stay exact"):
        result = compiled(module)(x)
    assert torch.equal(result, other(x))
    with pytest.raises(BackendCompilerFailed, match=r"strict=True, and 1 linear\(s\)") as raised:
        compiled(copy.deepcopy(other), strict=True)(x)
    assert isinstance(raised.value.inner_exception, MissedRewriteError)


@pytest.mark.filterwarnings("error")
def test_what_is_no_linear_of_a_parameter_is_not_told() -> None:
    matmul, computed, part = (
        lambda w, x: x @ w.T,
        lambda w, x: F.linear(x, w * 2),
        lambda w, x: F.linear(x, w[:4]),
    )
    for run in (matmul, computed, part):
        report = report_of(Held(run), X)
        assert not report.linear_misses
        assert not report.mxfp8


def test_weights_that_want_gradients_stay() -> None:
    module = nn.Linear(32, 8)
    with torch.enable_grad():
        (miss,) = report_of(module, X).linear_misses
        assert "requires_grad_(False)" in miss.reason
        for part in (module.weight, module.bias):
            module.requires_grad_(False)
            part.requires_grad_()
            assert len(report_of(module, X).linear_misses) == 1
        module.requires_grad_(False)
        assert len(report_of(module, X).mxfp8) == 1


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_gradients_of_activations(inner: str) -> None:
    module = Attention()
    found = []
    with torch.enable_grad():
        for run in (compiled(module, inner), module):
            x = X.clone().requires_grad_()
            run(x).sum().backward()
            found.append(x.grad)
    assert torch.equal(*found)


def test_off_by_default() -> None:
    assert not report_of(Attention(), X, linears=True).mxfp8
    for bad in ("mxfp7", 1.5, None):
        with pytest.raises(OptionError, match="True, False or 'mxfp8'"):
            Options.parse({"linears": bad})


def test_kernels() -> None:
    module = Attention()
    for kernels in ("reference", "pytorch", "cpu", "triton"):
        assert torch.equal(compiled(module, kernels=kernels)(X), module(X))
        torch.compiler.reset()


# ---- whole models

LAYER = [*(f"self_attn.{part}_proj" for part in "qkvo")]
ALL = {*(f"model.layers.{at}.{name}" for at in range(2) for name in LAYER), "lm_head"}


def small(**changes: Any) -> GptOssForCausalLM:
    return model(torch.bfloat16, **changes).requires_grad_(False)


def compile_it(whole: Any, how: str, **options: Any) -> Any:
    options = {"inner": "eager", **ON, **options}
    if how == "whole":
        whole.compile(backend="mxfp4", options=options)
        return whole
    return mxfp4_fx.compile(whole, options=options)


WAYS = pytest.mark.parametrize("how", ["whole", "layers"])


def explained(whole: Any, **options: Any) -> mxfp4_fx.explanation.Explanation:
    return mxfp4_fx.explain(whole, tokens(1, 5), options={**ON, **options})


def test_explain() -> None:
    found = explained(small())
    assert {linear.layer for linear in found.mxfp8} == ALL  # and no router
    assert not found.linear_misses
    sizes = [(64, 64), (32, 64), (32, 64), (64, 64)] * 2 + [(128, 64)]
    assert sorted((one.n, one.k) for one in found.mxfp8) == sorted(sizes)
    values = sum(n * k for n, k in sizes)
    assert sum(one.bytes_before for one in found.mxfp8) == 2 * values
    assert sum(one.bytes_after for one in found.mxfp8) == values + values // 32
    assert "9 linears in MXFP8 (cpu kernels): 64.0 KiB -> 33.0 KiB" in str(found)
    assert "9 linears in MXFP8" in found._repr_html_()
    assert found.to_dict()["mxfp8"][0]["kernels"] == "cpu"


def test_explain_names_what_stays() -> None:
    whole = small(hidden_size=64, head_dim=12, num_hidden_layers=1)  # o_proj has 48 input features
    found = explained(whole)
    assert [miss.layer for miss in found.linear_misses] == ["model.layers.0.self_attn.o_proj"]
    assert "not in MXFP8: model.layers.0.self_attn.o_proj" in str(found)
    assert "not in MXFP8: " in found._repr_html_()


@pytest.mark.parametrize(
    ("how", "regions"), [("whole", True), ("layers", False), exhaustive("whole", False)]
)
def test_skip(how: str, regions: bool) -> None:
    """What is skipped has exact weights, all else those of MXFP8."""
    skip = ["layers.1.self_attn.q_proj", "lm_head"]
    whole, ids = model(form="batched_mm").requires_grad_(False), tokens(1, 5)
    found = explained(whole, skip=skip, regions=regions)
    named = {"model.layers.1.self_attn.q_proj", "lm_head"}
    assert {linear.layer for linear in found.mxfp8} == ALL - named
    assert {miss.layer for miss in found.linear_misses} == named
    other = rounded(whole, *named)
    reference, exact = other(ids).logits, copy.deepcopy(other).double()(ids).logits
    result = compile_it(whole, how, skip=skip, regions=regions, strict=True)(ids).logits
    assert_as_accurate(result, reference, exact)
    for name, parameter in whole.named_parameters():
        is_read = STORE.find((parameter,), LINEAR, "mxfp8_rows") is not None
        module = name.removesuffix(".weight")
        assert is_read == (module in ALL - named and name.endswith(".weight"))


def test_a_skip_that_names_nothing() -> None:
    with pytest.raises(BackendCompilerFailed, match="names no module"):
        compile_it(small(num_hidden_layers=1), "whole", skip=["q_prj"])(tokens(1, 5))


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("layers", "lm_head"),
        ("whole", "model.layers.1.self_attn.v_proj"),
        exhaustive("whole", "lm_head"),
        exhaustive("layers", "model.layers.1.self_attn.v_proj"),
    ],
)
def test_verification_finds_wrong_codes(
    how: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small()
    weight, right = whole.get_submodule(part).weight, cpu_mxfp8.quantize

    def quantize(source: Tensor, codes: Tensor, scales: Tensor) -> None:
        right(source, codes, scales)
        if source.data_ptr() == weight.data_ptr():
            codes ^= 8  # the exponent's last bit

    monkeypatch.setattr("mxfp4_fx.ops.cpu_mxfp8.quantize", quantize)
    swizzle._native.cache_clear()
    try:
        with pytest.raises(VerificationError, match=f"linear .*{part.rpartition('.')[2]}"):
            compile_it(whole, how, verify=True)(tokens(1, 5))
    finally:
        monkeypatch.undo()
        swizzle._native.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_of_verification_holds(dtype: torch.dtype) -> None:
    """Of weights of all sizes in a block, so that some round to codes' subnormals."""
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.randint(-14, 3, (50, 96), generator=generator)
    weight = (torch.randn(50, 96, generator=generator) * sizes).to(dtype)
    x = torch.randn(20, 96, generator=generator).to(dtype)
    bias = torch.randn(50, generator=generator).to(dtype)
    codes, scales = mxfp8.quantize(weight)
    (y,) = torch.ops.mxfp4.linears_mxfp8(x, [codes[None]], [scales[None]], [bias], "cpu")
    linear_verification.compare("it", F.linear(x, weight, bias), y, x, weight, bias)


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [(1.0, 0.06, 0.07), (0.001, 0.0015, 0.003)],  # half a unit of 2^-3; of 2^-9 times the scale, 2
)
def test_the_bound_of_verification_is_tight(value: float, right: float, wrong: float) -> None:
    weight, x = torch.zeros(1, 32), torch.zeros(1, 32)
    weight[0, :2], x[0, 1] = torch.tensor([448.0, value]), 1
    y = F.linear(x, weight)
    for off, is_right in ((right, True), (wrong, False)):
        for sign in (1, -1):
            with contextlib.nullcontext() if is_right else pytest.raises(VerificationError):
                linear_verification.compare("it", y, y + sign * off, x, weight, None)


@pytest.mark.parametrize(
    ("of_weight", "of_x"),
    [(-60, -67), (-127, 0), (10, -127)],
    ids=["product underflows", "weight is subnormal", "input is subnormal"],
)
def test_the_bound_of_verification_knows_units_without_subnormals(
    of_weight: int, of_x: int
) -> None:
    weight, x = torch.zeros(1, 32), torch.zeros(1, 32)
    weight[0, 0], x[0, 0] = 2.0**of_weight, 2.0**of_x
    y = F.linear(x, weight)
    assert y.any()
    linear_verification.compare("it", y, torch.zeros_like(y), x, weight, None)


def test_changed_weights_are_noticed() -> None:
    module, graphs = Attention(), Graphs()
    run = compiled(module, graphs)
    run(X)
    module.q.weight.mul_(2)
    module.v.weight.data = torch.ones(16, 32)
    module.o.weight = nn.Parameter(torch.ones(32, 64), requires_grad=False)
    assert torch.equal(run(X), module(X))
    module.k.weight.data.mul_(2)  # leaves no trace
    assert mxfp4_fx.refresh(module)
    assert torch.equal(run(X), module(X))
    assert len(graphs.seen) == 1


def test_graphs_share_a_weight() -> None:
    module = Attention()
    compile_with(module, "eager", dynamic=False, options=ON)(X)
    before = STORE.swizzled
    compile_with(module, "eager", dynamic=False, options=ON)(inputs(5))
    torch.compiler.reset()
    compiled(module)(X)
    assert STORE.swizzled == before


def test_weights_that_are_not_finite() -> None:
    module = nn.Linear(64, 8).requires_grad_(False)
    module.weight[3, 40] = torch.inf
    with pytest.warns(NanWeightsWarning, match="MXFP8 makes NaN"):
        y = compiled(module)(torch.ones(2, 64))
    assert y.isnan().any(0).nonzero().flatten().tolist() == [3]


# ---- free_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.middle = nn.Linear(32, 32)
        of_integers(self)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(ids)))


def held(*modules: nn.Linear) -> int:
    return sum(module.weight.untyped_storage().nbytes() for module in modules)


def test_memory_is_given_back_and_restored() -> None:
    module = Attention()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    all_ = (module.q, module.k, module.v, module.o)
    expected = module(X)
    run = compiled(module, free_weights=True)
    for rows in (3, 3, 40):
        run(inputs(rows))
        assert held(*all_) == 0
    assert torch.equal(run(X), expected)
    for name, value in module.state_dict().items():  # small integers are MXFP8 values
        assert torch.equal(value.clone(), before[name])
    assert mxfp4_fx.restore(module) == 4
    assert torch.equal(module(X), expected)
    assert torch.equal(run(X), expected)


def test_tritons_kernels_are_told_verified_and_serve_freed_weights() -> None:
    module = Attention(torch.bfloat16)
    x = inputs(3, torch.bfloat16)
    expected = module(x)
    options = {**ON, "kernels": "triton"}
    assert {one.kernels for one in mxfp4_fx.explain(module, x, options=options).mxfp8} == {"triton"}
    assert torch.equal(compiled(module, kernels="triton", verify=True)(x), expected)
    torch.compiler.reset()
    run = compiled(module, kernels="triton", free_weights=True)
    for _ in range(2):
        assert torch.equal(run(x), expected)
    assert held(module.q, module.k, module.v, module.o) == 0
    assert mxfp4_fx.restore(module) == 4
    assert torch.equal(module(x), expected)


def test_restored_weights_have_the_values_of_mxfp8() -> None:
    module = nn.Linear(64, 40).requires_grad_(False).to(torch.bfloat16)
    expected = rounded(module).weight
    compiled(module, free_weights=True)(torch.ones(2, 64, dtype=torch.bfloat16))
    assert type(module.weight) is FreedParameter
    assert torch.equal(module.weight.to(torch.float32), expected.float())
    module.float()  # gives new memory
    assert torch.equal(module.weight, expected.float())


def test_a_tied_weight_is_served_and_never_freed() -> None:
    module, ids = Tied(), torch.arange(3)[None]
    expected = module(ids)
    run = compiled(module, free_weights=True)
    for _ in range(2):
        assert torch.equal(run(ids), expected)
    assert len(report_of(Tied(), ids).mxfp8) == 2
    assert held(module.middle) == 0
    assert held(module.head) == 50 * 32 * 4
    module.embedding.weight.mul_(-2)
    mxfp4_fx.restore(module)
    assert torch.equal(run(ids), module(ids))


@pytest.mark.parametrize(
    ("how", "tied"),
    [("layers", True), ("whole", False), exhaustive("layers", False), exhaustive("whole", True)],
)
def test_a_whole_model_is_freed_and_saved(how: str, tied: bool, tmp_path: Path) -> None:
    """Layers that are alike share a region of the whole, and one shows what all pieces do."""
    changes = {"tie_word_embeddings": tied, "num_hidden_layers": 2 if how == "whole" else 1}
    whole, ids = small(**changes), tokens(1, 5)
    expected = compile_it(copy.deepcopy(whole), how)(ids).logits
    compile_it(whole, how, free_weights=True, strict=True)
    for _ in range(2):
        assert torch.equal(whole(ids).logits, expected)
    freed = {name for name, p in whole.named_parameters() if type(p) is FreedParameter}
    linears = {name for name, _ in whole.named_modules()} & ALL
    names = {f"{name}.weight" for name in linears - ({"lm_head"} if tied else set())}
    assert {name for name in freed if "experts" not in name} == names
    whole.save_pretrained(tmp_path)
    again = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in rounded(small(**changes)).named_parameters():
        if name in names:
            assert torch.equal(again.get_parameter(name), value)
    whole.generate(ids, max_new_tokens=2, do_sample=False)
    assert mxfp4_fx.restore(whole) == len(freed)
    assert torch.equal(whole(ids).logits, expected)


def test_one_weight_of_two_linears_is_kept() -> None:
    """Dynamo gives the graph one input, which both read; each is in MXFP8."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            of_integers(self)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).clamp(-2, 2))

    module = Two()
    expected = module(X)
    assert torch.equal(compiled(module, free_weights=True)(X), expected)
    assert held(module.a) > 0


def test_a_function_frees_what_it_knows_only() -> None:
    """A weight that comes as an argument may have other readers."""
    weight = nn.Parameter(torch.ones(8, 32), requires_grad=False)
    run = compile_with(plain, "eager", options={**ON, "free_weights": True})
    assert torch.equal(run(weight, X), plain(weight, X))
    assert type(weight) is nn.Parameter


def test_sources_of_other_shapes_are_refused() -> None:
    with pytest.raises(mxfp4_fx.errors.WeightError, match=r"\[N, K\]"):
        STORE.get(Source((nn.Parameter(torch.ones(8, 33)),), LINEAR), "mxfp8_rows")


# ---- the head that ``mxfp4_fx.compile`` computes uncompiled


def test_a_head_with_a_hook_is_told() -> None:
    whole = small(num_hidden_layers=1)
    compile_it(whole, "layers")
    whole(tokens(1, 1), use_cache=False)
    whole.lm_head.register_forward_hook(lambda _module, _args, output: output + 1)
    hidden = whole.model(tokens(1, 1), use_cache=False).last_hidden_state
    with pytest.warns(MissedRewriteWarning, match="lm_head: it has hooks"):
        logits = whole(tokens(1, 1), use_cache=False).logits
    assert torch.equal(logits, F.linear(hidden, whole.lm_head.weight) + 1)


def test_a_changed_head_is_noticed() -> None:
    whole = small(num_hidden_layers=1)
    compile_it(whole, "layers")
    whole(tokens(1, 1), use_cache=False)
    whole.lm_head.weight.zero_()
    assert not whole(tokens(1, 1), use_cache=False).logits.any()
