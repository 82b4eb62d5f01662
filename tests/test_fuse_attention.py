"""Which attention becomes ``mxfp4::attention_with_sinks``, and that the graph computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from combinations import exhaustive
from implementations import randn
from models import DTYPES, Graphs, compile_with, model, tokens
from near_miss import edited
from oracle import assert_as_accurate
from test_graphs import Snapshots, readable
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import mxfp4_fx
from mxfp4_fx.core import torch_private
from mxfp4_fx.core.errors import NoExpertsWarning, VerificationError
from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import cpu_attention, schemas
from mxfp4_fx.passes import attention_verification
from mxfp4_fx.passes.fuse_attention import fuse_attention
from mxfp4_fx.passes.pipeline import run_pipeline
from mxfp4_fx.passes.report import GraphReport

pytestmark = pytest.mark.filterwarnings(f"ignore::{NoExpertsWarning.__module__}.NoExpertsWarning")

OP = "mxfp4.attention_with_sinks.default"
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Attention(nn.Module):
    """transformers' eager attention, or an edited copy, of query, key, value and mask."""

    def __init__(
        self,
        changes: dict[str, str] | None = None,
        heads: int = 6,
        groups: int = 3,
        scaling: float = 0.25,
        dtype: torch.dtype = torch.float32,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.sinks = nn.Parameter(randn(heads, dtype=dtype, seed=9), requires_grad=False)
        self.num_key_value_groups = groups
        self.scaling, self.arguments = scaling, arguments
        self.run = edited(eager_attention_forward, changes or {}, F=F)
        self.eval()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        return self.run(self, query, key, value, mask, self.scaling, **self.arguments)[0]


def operands(
    queries: int = 5,
    keys: int = 7,
    heads: tuple[int, int] = (6, 2),
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
) -> Operands:
    """Draw query [B, H, Q, 8], key and value [B, KV, T, 8], and a causal mask [B, 1, Q, T]."""
    mask = torch.full((batch, 1, queries, keys), torch.finfo(dtype).min, dtype=dtype)
    return (
        randn(batch, heads[0], queries, 8, dtype=dtype, seed=1),
        randn(batch, heads[1], keys, 8, dtype=dtype, seed=2),
        randn(batch, heads[1], keys, 8, dtype=dtype, seed=3),
        mask.triu(keys - queries + 1),
    )


def run_once(run: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, GraphReport]:
    """Compile, without gradients' and swizzled weights' part of the backend, and call."""
    found: list[GraphReport] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        rewritten, ctx = run_pipeline(gm, inputs, Options(**options))
        found.append(ctx.report)
        return rewritten.forward

    torch.compiler.reset()
    result = torch.compile(run, backend=backend)(*args)
    (one,) = found
    return result, one


def report(run: Callable[..., Any], *args: Any, **options: Any) -> GraphReport:
    return run_once(run, *args, **options)[1]


def count(graphs: Graphs) -> list[int]:
    """For each graph, how many calls of the op it has, those in regions too."""
    return [
        sum(
            str(node.target) == OP
            for part in gm.modules()
            if isinstance(part, fx.GraphModule)
            for node in part.graph.nodes
        )
        for gm in graphs.seen
    ]


class TestGraph(Snapshots):
    def test_grouped_heads_and_a_mask(self) -> None:
        graphs = Graphs()
        compile_with(Attention(), graphs)(*operands())
        self.assertExpectedInline(
            readable(graphs.seen[0]),
            """\
input l_key_: float32[2, 2, 7, 8]
input l_value_: float32[2, 2, 7, 8]
input l_query_: float32[2, 6, 5, 8]
input l_mask_: float32[2, 1, 5, 7]
input sinks: float32[6]
attention_with_sinks_default: float32[2, 5, 6, 8] =
    mxfp4.attention_with_sinks.default(l_query_, l_key_, l_value_, sinks, l_mask_, 0.25,
    'cpu')
return [attention_with_sinks_default]
""",
        )


# ---- what is rewritten


def exactly(module: Attention, given: Operands) -> Tensor:
    """The result in float64 by the original code."""
    dtype = module.sinks.dtype
    module.sinks.data = module.sinks.data.double()
    result: Tensor = module(*(None if tensor is None else tensor.double() for tensor in given))
    module.sinks.data = module.sinks.data.to(dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_sizes_by_one_graph(dtype: torch.dtype) -> None:
    module, graphs = Attention(dtype=dtype), Graphs()
    run = compile_with(module, graphs, dynamic=True)
    for queries, keys, batch in ((5, 7, 3), (9, 9, 4), (4, 40, 3)):
        given = operands(queries, keys, dtype=dtype, batch=batch)
        assert_as_accurate(run(*given), module(*given), exactly(module, given))
    assert count(graphs) == [1]


def without_mask(given: Operands) -> Operands:
    return (*given[:3], None)


def by_row(given: Operands) -> Operands:
    """With a mask [1, 1, 1, T], as that of one token is."""
    return (*given[:3], randn(1, 1, 1, given[1].shape[2]))


LINE = "attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling"
MASKED = "attn_weights = attn_weights + attention_mask"
CAT = "combined_logits = torch.cat([attn_weights, sinks], dim=-1)"
MAXIMUM = "combined_logits - combined_logits.max(dim=-1, keepdim=True).values"
SOFTMAX = "F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)"
SCORES = "scores = probs[..., :-1]"
DROPOUT = "nn.functional.dropout(scores, p=dropout, training=module.training)"
VALUES = "attn_output = torch.matmul(attn_weights, value_states)"
RESULT = "attn_output.transpose(1, 2).contiguous()"
SINKS = "module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)"

MATCHES: dict[str, tuple[Attention, Operands]] = {
    "grouped heads": (Attention(), operands()),
    "as many heads of keys": (Attention(groups=1), operands(heads=(6, 6))),
    "one head of keys": (Attention(groups=6), operands(heads=(6, 1))),
    "one query": (Attention(), operands(1)),
    "one sequence": (Attention(), operands(batch=1)),
    "one query, key and sequence": (Attention(), operands(1, 1, batch=1)),
    "no mask": (Attention(), without_mask(operands())),
    "a mask of one row": (Attention(), by_row(operands())),
    "another scale": (Attention(scaling=-3.0), operands()),
    "a dropout in evaluation": (Attention(dropout=0.5), operands()),
    "a dropout of zero in training": (Attention().train(), operands()),
    "a mask first": (
        Attention({MASKED: "attn_weights = attention_mask + attn_weights"}),
        operands(),
    ),
    "other spellings": (
        Attention({LINE: "attn_weights = scaling * (query @ key_states.transpose(-1, -2))"}),
        operands(),
    ),
    "a mask that is cut": (
        Attention({MASKED: "attn_weights = attn_weights + attention_mask[:, :, :, :7]"}),
        (*operands()[:3], randn(2, 1, 5, 9)),
    ),
    "values that are computed from the repeated ones": (
        Attention({VALUES: VALUES.replace("value_states", "value_states.abs()")}),
        operands(),
    ),
    "keys repeated in another order": (
        Attention({LINE: LINE.replace("key_states", "key.repeat(1, 3, 1, 1)")}),
        operands(),
    ),
    "written to afterwards": (
        Attention({RESULT: "attn_output.transpose(1, 2).contiguous().add_(1)"}),
        operands(),
    ),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", MATCHES)
def test_matches(name: str) -> None:
    module, given = MATCHES[name]
    result, found = run_once(module, *clones(given))
    assert (len(found.attention), found.attention_misses) == (1, [])
    assert result.stride() == module(*given).stride() or 1 in result.shape
    assert_as_accurate(result, module(*given), exactly(module, given))


# ---- what stays


def writing(line: str, before: str) -> Attention:
    return Attention({before: f"{line}\n    {before}"})


LOW = operands(dtype=torch.bfloat16)
NEAR_MISSES: dict[str, tuple[Attention, tuple[Any, ...], str]] = {
    "a scale of the head": (
        Attention({LINE: LINE.replace("scaling", "module.sinks[:, None, None]")}),
        operands(),
        "expected mul",
    ),
    "queries scaled before": (
        Attention({LINE: "attn_weights = torch.matmul(query * scaling, key_states.mT)"}),
        operands(),
        "expected mul",
    ),
    "keys not transposed": (
        Attention({LINE: LINE.replace("transpose(2, 3)", "transpose(2, 3).flip(3)")}),
        operands(),
        "expected transpose",
    ),
    "a mask that multiplies": (
        Attention({MASKED: "attn_weights = attn_weights * attention_mask"}),
        operands(),
        "expected",
    ),
    "a mask of booleans": (Attention(), (*operands()[:3], operands()[3] == 0), "torch.bool"),
    "a mask of more precision": (
        Attention(dtype=torch.bfloat16),
        (*LOW[:3], operands()[3]),
        "the mask is torch.float32, and the query torch.bfloat16",
    ),
    "a mask with a factor": (
        Attention({MASKED: "attn_weights = torch.add(attn_weights, attention_mask, alpha=2)"}),
        operands(),
        "alpha",
    ),
    "a soft cap": (
        Attention({MASKED: "attn_weights = torch.tanh(attn_weights) + attention_mask"}),
        operands(),
        "expected mul",
    ),
    "sinks of tokens": (
        Attention({SINKS: "query[..., :1]"}),
        operands(),
        "expected expand",
    ),
    "sinks of the batch": (
        Attention({SINKS: "module.sinks[:2].reshape(-1, 1, 1, 1).expand(-1, 6, 5, -1)"}),
        operands(),
        "",
    ),
    "sinks in front": (
        Attention({CAT: CAT.replace("[attn_weights, sinks]", "[sinks, attn_weights]")}),
        operands(),
        "expected",
    ),
    "another maximum": (
        Attention({MAXIMUM: MAXIMUM.replace(".max(", ".min(")}),
        operands(),
        "expected",
    ),
    "the maximum of the queries": (
        Attention({MAXIMUM: MAXIMUM.replace("dim=-1", "dim=-2")}),
        operands(),
        "dim",
    ),
    "the place of the maximum": (
        Attention({MAXIMUM: MAXIMUM.replace(".values", ".indices")}),
        operands(),
        "expected",
    ),
    "a softmax over queries": (
        Attention({SOFTMAX: SOFTMAX.replace("dim=-1", "dim=-2")}),
        operands(),
        "dim",
    ),
    "a softmax of more precision": (
        Attention(
            {SOFTMAX: SOFTMAX.replace("combined_logits.dtype", "torch.float32")},
            dtype=torch.bfloat16,
        ),
        LOW,
        "dtype=torch.float32",
    ),
    "a sink that keeps its place": (
        Attention(
            {
                SCORES: "scores = probs[..., :-2]",
                VALUES: "attn_output = torch.matmul(attn_weights, value_states[:, :, :-1])",
            }
        ),
        operands(),
        "expected getitem",
    ),
    "another key dropped": (
        Attention({SCORES: "scores = probs[..., 1:]"}),
        operands(),
        "expected getitem",
    ),
    "a dropout": (Attention(dropout=0.5).train(), operands(), "a dropout of 0.5"),
    "not transposed": (
        Attention({RESULT: "attn_output.contiguous()"}),
        operands(),
        "expected transpose",
    ),
    "transposed otherwise": (
        Attention({RESULT: "attn_output.transpose(1, 3).contiguous()"}),
        operands(),
        "dim1",
    ),
    "channels last": (
        Attention(
            {RESULT: "attn_output.transpose(1, 2).contiguous(memory_format=torch.channels_last)"},
            torch=torch,
        ),
        operands(),
        "expected contiguous",
    ),
    "never contiguous": (
        Attention({RESULT: "attn_output.transpose(1, 2).exp()"}),
        operands(),
        "no values follow",
    ),
    "weights that are returned": (
        Attention({"return attn_output, attn_weights": "return (attn_output, attn_weights),"}),
        operands(),
        "is used elsewhere, by output",
    ),
    "logits that are used elsewhere": (
        Attention({RESULT: f"{RESULT} + combined_logits.sum()"}),
        operands(),
        "is used elsewhere",
    ),
    "a key that is written to": (
        writing("key.mul_(2)", SCORES),
        operands(),
        "may be written to meanwhile",
    ),
    "sinks that are written to": (
        writing("module.sinks.mul_(2)", VALUES),
        operands(),
        "may be written to meanwhile",
    ),
    "weights that are written to": (
        writing("scores.mul_(2)", "attn_weights = nn.functional"),
        operands(),
        "",
    ),
    "a query that is transposed in place": (
        Attention({LINE: f"query = (query + 0).transpose_(2, 3).transpose_(2, 3)\n    {LINE}"}),
        operands(),
        "in place",
    ),
    "float64": (
        Attention(dtype=torch.float64),
        operands(dtype=torch.float64),
        "float64",
    ),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    module, given, reason = NEAR_MISSES[name]
    sinks = module.sinks.clone()
    torch.manual_seed(0)
    result, found = run_once(module, *clones(given))
    assert found.attention == []
    (miss,) = found.attention_misses
    assert reason in miss.reason
    module.sinks.copy_(sinks)
    torch.manual_seed(0)
    torch.testing.assert_close(result, module(*clones(given)), rtol=0, atol=0, equal_nan=True)


def clones(given: tuple[Any, ...]) -> list[Any]:
    return [None if tensor is None else tensor.clone() for tensor in given]


def test_autocast() -> None:
    """Its logits are rounded to bfloat16 and its softmax is not, which the op could not do."""

    def run(*given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(*given)

    module = Attention()
    with torch.no_grad():
        result, found = run_once(run, *operands())
        assert found.attention == []
        assert len(found.attention_misses) == 1
        assert torch.equal(result, run(*operands()))


@pytest.mark.usefixtures("no_gradients")
def test_vmap() -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return torch.vmap(module, in_dims=(0, None, None, None))(query, key, value, mask)

    module, (query, key, value, mask) = Attention(), operands()
    given = (torch.stack([query, query]), key, value, mask)
    found = report(run, *given)
    assert found.attention == []
    assert [miss.reason for miss in found.attention_misses] == [
        "it is inside a function transform, such as vmap"
    ]


def test_another_device() -> None:
    """Attention on other devices is none of this pass's business."""
    module = Attention().to("meta")
    found = report(module, *(tensor.to("meta") for tensor in operands() if tensor is not None))
    assert (found.attention, found.attention_misses) == ([], [])


def test_other_softmaxes_are_not_reported() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.softmax(torch.cat([x @ x, x], dim=-1), dim=-1) + torch.softmax(x @ x, -1).sum()

    found = report(run, randn(4, 4))
    assert (found.attention, found.attention_misses) == ([], [])


class TestOptions:
    def test_off(self) -> None:
        found = report(Attention(), *operands(), attention=False)
        assert (found.attention, found.attention_misses) == ([], [])

    @pytest.mark.parametrize("other", ["pytorch", "reference"])
    def test_other_kernels(self, other: str) -> None:
        found = report(Attention(), *operands(), kernels=other)
        assert (found.attention, found.attention_misses) == ([], [])

    def test_a_torch_without_flash_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_private, "flash_attention_for_cpu", None)
        found = report(Attention(), *operands())
        (miss,) = found.attention_misses
        assert found.attention == []
        assert "has no flash attention for CPUs" in miss.reason


# ---- gradients


@pytest.mark.parametrize("wanted", ["query", "key", "value", "mask", "sinks"])
def test_attention_that_needs_gradients_stays(wanted: str) -> None:
    module, graphs = Attention(), Graphs()
    names = ("query", "key", "value", "mask")
    run, results = compile_with(module, graphs), []
    module.sinks.requires_grad_(wanted == "sinks")
    for call in (module, run):
        given = {
            name: tensor.clone().requires_grad_(name == wanted)
            for name, tensor in zip(names, operands(), strict=True)
            if tensor is not None
        }
        y = call(*given.values())
        y.sum().backward()
        grad = {**given, "sinks": module.sinks}[wanted].grad
        assert grad is not None
        results.append((y.detach(), grad.clone()))
        module.sinks.grad = None
    assert count(graphs) == [0]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    found = report(module, *given.values())
    (miss,) = found.attention_misses
    assert "run under torch.no_grad() or inference_mode()" in miss.reason
    with torch.no_grad():
        assert len(report(module, *given.values()).attention) == 1


def test_gradients_of_others() -> None:
    """Where nothing that it reads needs a gradient, it is rewritten in training too."""

    def run(x: Tensor, *given: Any) -> Tensor:
        result: Tensor = x.sum() * module(*given)
        return result

    module, x = Attention(), torch.ones(3, requires_grad=True)
    assert len(report(run, x, *operands()).attention) == 1


# ---- verification


VERIFY = {"verify": True}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda y: y * 1.25,
    "heads moved": lambda y: y.roll(1, 2),
    "tokens moved": lambda y: y.roll(1, 1),
    "a column lost": lambda y: y.index_fill(3, torch.tensor([3]), 0.0),
    "NaN": lambda y: y.index_fill(1, torch.tensor([2]), torch.nan),
}


def break_op(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    real = cpu_attention.attention_with_sinks
    monkeypatch.setattr(cpu_attention, "attention_with_sinks", lambda *args: change(real(*args)))
    schemas.kernel.cache_clear()
    monkeypatch.setattr(schemas, "kernel", schemas.kernel.__wrapped__)


@pytest.mark.usefixtures("no_gradients")
class TestVerification:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_right_rewrites_pass(self, dtype: torch.dtype) -> None:
        for lowest in (torch.finfo(dtype).min, -torch.inf):
            query, key, value, mask = operands(40, 60, dtype=dtype)
            assert mask is not None
            mask = mask.masked_fill(mask < 0, lowest)
            mask[0, :, :, :30] = lowest  # the first rows see nothing
            for given in ((query, key, value, mask), (query * 20, key, value, None)):
                torch.compiler.reset()
                compile_with(Attention(dtype=dtype), options=VERIFY)(*given)

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_wrong_result_is_found(
        self, dtype: torch.dtype, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_op(monkeypatch, CHANGES[change])
        with pytest.raises(
            VerificationError, match=r"the attention of .* differs from its original"
        ):
            compile_with(Attention(dtype=dtype), options=VERIFY)(*operands(dtype=dtype))

    def test_sinks_that_are_left_out_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = cpu_attention.attention_with_sinks

        def without(given: Any) -> Tensor:
            return real(given._replace(sinks=given.sinks - 30))

        monkeypatch.setattr(cpu_attention, "attention_with_sinks", without)
        schemas.kernel.cache_clear()
        monkeypatch.setattr(schemas, "kernel", schemas.kernel.__wrapped__)
        with pytest.raises(VerificationError):
            compile_with(Attention(), options=VERIFY)(*operands())

    @pytest.mark.parametrize("regions", [False, exhaustive(True)])
    def test_each_layer_is_verified_once(
        self, regions: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layers: list[str] = []
        real = attention_verification.compare

        def counting(layer: str, *args: Any) -> None:
            layers.append(layer)
            real(layer, *args)

        monkeypatch.setattr(attention_verification, "compare", counting)
        run = compile_with(model(), options=VERIFY | {"regions": regions})
        for _ in range(2):
            run(tokens())
        assert len(layers) == 2
        if not regions:
            assert layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


# ---- models


PROMPT = torch.tensor([[0, 0, *range(3, 25)], [*range(7, 31)]])  # the first begins with padding


def generated(whole: Any, **settings: Any) -> Tensor:
    result: Tensor = whole.generate(
        PROMPT,
        attention_mask=(PROMPT > 0).long(),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        disable_compile=True,
        **settings,
    )
    return result


DOORS: dict[str, Callable[[Any, Graphs], Any]] = {
    "whole": lambda whole, graphs: whole.compile(
        backend="mxfp4", options={"inner": graphs, "regions": False}
    ),
    "regions": lambda whole, graphs: whole.compile(backend="mxfp4", options={"inner": graphs}),
    "pieces": lambda whole, graphs: mxfp4_fx.compile(whole, options={"inner": graphs}),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    ("door", "cache"),
    [
        ("pieces", "dynamic"),
        *(exhaustive(*case) for case in (("whole", "dynamic"), ("regions", "static"))),
    ],
)
def test_generate(door: str, cache: str) -> None:
    """A sliding and a full layer, a batch with padding, a prompt and single tokens."""
    whole, graphs = model(), Graphs()
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    expected = generated(whole, **settings)
    DOORS[door](whole, graphs)
    assert torch.equal(generated(whole, **settings), expected)
    ops = count(graphs)
    assert sum(ops) > 0
    left = [
        node
        for gm in graphs.seen
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if node.target is F.softmax and node.meta["example_value"].ndim == 4
    ]
    assert left == []


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, exhaustive(torch.float32), exhaustive(torch.float16)]
)
def test_logits(dtype: torch.dtype) -> None:
    whole = model(dtype)
    exact = model(dtype, "batched_mm").double()(PROMPT).logits
    result = compile_with(whole)(PROMPT).logits
    assert_as_accurate(result, whole(PROMPT).logits, exact)


@pytest.mark.usefixtures("no_gradients")
def test_weights_that_the_user_wants_stay() -> None:
    found = mxfp4_fx.explain(model(num_hidden_layers=1), PROMPT, output_attentions=True)
    assert found.attention == ()
    (miss,) = found.attention_misses
    assert miss.layer == "layers.0.self_attn"
    assert "is used elsewhere, by output" in miss.reason


@pytest.mark.usefixtures("no_gradients")
def test_explain() -> None:
    found = mxfp4_fx.explain(model(), PROMPT)
    assert [one.layer for one in found.attention] == [
        f"model.layers.{at}.self_attn" for at in (0, 1)
    ]
    assert "2 attentions with sinks: memory linear in the prompt's length" in str(found)
    assert found.to_dict()["attention"] == [{"layer": one.layer} for one in found.attention]


def test_explain_of_what_stays() -> None:
    found = mxfp4_fx.explain(model(num_hidden_layers=1), PROMPT)  # outside of no_grad
    assert len(found.attention_misses) == 1
    lines = str(found).splitlines()
    at = lines.index("attention with sinks as it was: model.layers.0.self_attn")
    assert "gradients are recorded" in lines[at + 1]
    assert lines[at + 2].startswith("  at modeling_gpt_oss.py:")


@pytest.mark.usefixtures("no_gradients")
def test_attention_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "mxfp4_fx")
    compile_with(Attention())(*operands())
    assert f"{fuse_attention.__name__}: " in caplog.text
    assert "attention with sinks -> memory linear in its length" in caplog.text
    compile_with(Attention({SCORES: "scores = probs[..., 1:]"}))(*operands())
    assert "attention with sinks stays as it is: (top level): expected getitem" in caplog.text
