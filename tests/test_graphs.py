"""What each pass makes of a captured graph, for reading.

``EXPECTTEST_ACCEPT=1`` writes the snapshots anew.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from models import Graphs, compile_with, hidden, mlp, model, tokens
from torch import Tensor, fx, nn

from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.canonicalize import canonicalize
from mxfp4_fx.passes.context import Context, Pass
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.fuse_moe import fuse_moe
from mxfp4_fx.passes.lower_moe import lower_moe
from mxfp4_fx.passes.pipeline import run_pass


def readable(gm: fx.GraphModule, only: Callable[[fx.Node], bool] = lambda _: True) -> str:
    """The nodes one by one, without what differs from machine to machine."""
    lines = (_line(node) for node in gm.graph.nodes if only(node))
    # All sizes that are not fixed are made of one, the number of tokens.
    lines = (re.sub(r"\bs\d+\b", "T", line) for line in lines)
    wrap = textwrap.TextWrapper(92, subsequent_indent="    ", break_long_words=False)
    return "".join(f"{wrap.fill(line)}\n" for line in lines)


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input {_name(node)}{_type(node)}"
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    if node.op == "get_attr":
        return f"{node.name} = graph {node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        target = str(node.target)
    elif node.op == "call_method":
        target = f".{node.target}"
    else:
        target = node.target.__name__
    arguments = [_text(value) for value in node.args]
    arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items() if k != "device"]
    return f"{_name(node)}{_type(node)} = {target}({', '.join(arguments)})"


def _name(node: fx.Node) -> str:
    """Parameters by their names in the model: Dynamo's spell out the way to them."""
    if not node.name.startswith("l_self_"):
        return node.name
    return re.sub(r"_?(modules|parameters)_", ".", node.name.removeprefix("l_self_")).strip("._")


def _type(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return ""
    dtype = str(value.dtype).removeprefix("torch.")
    return f": {dtype}[{', '.join(map(str, value.shape))}]"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return _name(value)
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ":".join("" if part is None else _text(part) for part in parts)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return "..." if value is Ellipsis else repr(value).removeprefix("torch.")


@pytest.mark.usefixtures("no_gradients")
class Snapshots(expecttest.TestCase):
    """Graphs of models that run without gradients."""


def after(passes: list[Pass], module: nn.Module, dynamic: bool = False) -> str:
    """The graph of ``module(hidden())`` after ``passes``, as text."""
    captured = Graphs()
    inputs: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs.extend(example_inputs)
        return captured(gm, example_inputs)

    torch.compile(module, backend=backend, dynamic=dynamic)(hidden())
    (gm,) = captured.seen
    gm, ctx = copy_graph(gm), Context(Options(), inputs)
    for step in passes:
        run_pass(step, gm, ctx)
    return readable(gm)


CANONICAL = [canonicalize]
FUSED = [canonicalize, fuse_moe]
LOWERED = [canonicalize, fuse_moe, lower_moe]


class TestGroupedForm(Snapshots):
    def test_canonical(self) -> None:
        self.assertExpectedInline(
            after(CANONICAL, mlp()),
            """\
input l_hidden_states_: float32[1, 7, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj: float32[6, 64, 192]
input experts.gate_up_proj_bias: float32[6, 192]
input experts.down_proj: float32[6, 96, 64]
input experts.down_proj_bias: float32[6, 64]
hidden_states: float32[7, 64] = .reshape(l_hidden_states_, -1, 64)
router_logits: float32[7, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[7, 3] = getitem(topk, 0)
router_indices: int64[7, 3] = getitem(topk, 1)
router_scores: float32[7, 3] = softmax(router_top_value, dim=1, dtype=float32)
sample_weights: float32[21] = .reshape(router_scores, -1)
expert_ids: int64[21] = .reshape(router_indices, -1)
sort = sort(expert_ids)
expert_ids_g: int64[21] = getitem(sort, 0)
perm: int64[21] = getitem(sort, 1)
floordiv: int64[21] = floordiv(perm, 3)
selected_hidden_states_g: float32[21, 64] = getitem(hidden_states, floordiv)
sample_weights_g: float32[21] = getitem(sample_weights, perm)
histc_input: float32[21] = .float(expert_ids_g)
tokens_per_expert: float32[6] = histc(histc_input, bins=6, min=0, max=5)
offsets: int32[6] = cumsum(tokens_per_expert, dim=0, dtype=int32)
selected_biases: float32[21, 192] = getitem(experts.gate_up_proj_bias, expert_ids_g)
out: float32[21, 192] = grouped_mm_fallback(selected_hidden_states_g, experts.gate_up_proj,
    offs=offsets)
add_: float32[21, 192] = .add(out, selected_biases)
gate: float32[21, 96] = getitem(add_, [..., ::2])
up: float32[21, 96] = getitem(add_, [..., 1::2])
gate_1: float32[21, 96] = .clamp(gate, min=None, max=7.0)
up_1: float32[21, 96] = .clamp(up, min=-7.0, max=7.0)
mul: float32[21, 96] = mul(gate_1, 1.702)
sigmoid: float32[21, 96] = sigmoid(mul)
glu: float32[21, 96] = mul(gate_1, sigmoid)
add: float32[21, 96] = add(up_1, 1)
gated_output: float32[21, 96] = mul(add, glu)
selected_biases_1: float32[21, 64] = getitem(experts.down_proj_bias, expert_ids_g)
out_1: float32[21, 64] = grouped_mm_fallback(gated_output, experts.down_proj, offs=offsets)
add__1: float32[21, 64] = .add(out_1, selected_biases_1)
unsqueeze: float32[21, 1] = .unsqueeze(sample_weights_g, -1)
weighted_out: float32[21, 64] = mul(add__1, unsqueeze)
inv_perm: int64[21] = empty_like(perm)
arange: int64[21] = arange(21)
index_put: int64[21] = index_put(inv_perm, [perm], arange)
weighted_out_1: float32[21, 64] = getitem(weighted_out, index_put)
view: float32[7, 3, 64] = .view(weighted_out_1, 7, 3, 64)
final_hidden_states: float32[7, 64] = .sum(view, dim=1)
hidden_states_2: float32[1, 7, 64] = .reshape(final_hidden_states, 1, 7, 64)
return [hidden_states_2, router_scores]
""",
        )

    def test_fused(self) -> None:
        self.assertExpectedInline(
            after(FUSED, mlp()),
            """\
input l_hidden_states_: float32[1, 7, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj: float32[6, 64, 192]
input experts.gate_up_proj_bias: float32[6, 192]
input experts.down_proj: float32[6, 96, 64]
input experts.down_proj_bias: float32[6, 64]
hidden_states: float32[7, 64] = .reshape(l_hidden_states_, -1, 64)
router_logits: float32[7, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[7, 3] = getitem(topk, 0)
router_scores: float32[7, 3] = softmax(router_top_value, dim=1, dtype=float32)
moe_default: float32[7, 64] = mxfp4.moe.default(hidden_states, router_logits,
    experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj,
    experts.down_proj_bias, 3, 1.702, 7.0)
hidden_states_2: float32[1, 7, 64] = .reshape(moe_default, 1, 7, 64)
return [hidden_states_2, router_scores]
""",
        )

    def test_lowered(self) -> None:
        self.assertExpectedInline(
            after(LOWERED, mlp()),
            """\
input l_hidden_states_: float32[1, 7, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input experts.gate_up_proj_scales: uint8[6, 6]
input experts.gate_up_proj_bias: float32[6, 192]
input experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input experts.down_proj_scales: uint8[6, 2]
input experts.down_proj_bias: float32[6, 64]
hidden_states: float32[7, 64] = .reshape(l_hidden_states_, -1, 64)
router_logits: float32[7, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[7, 3] = getitem(topk, 0)
router_scores: float32[7, 3] = softmax(router_top_value, dim=1, dtype=float32)
routing_default = mxfp4.routing.default(router_logits, 3, kernels='cpu')
getitem: float32[21] = getitem(routing_default, 0)
getitem_1: int32[21] = getitem(routing_default, 1)
getitem_2: int32[21] = getitem(routing_default, 2)
getitem_3: int32[7] = getitem(routing_default, 3)
matmul_ogs_default: float32[21, 96] = mxfp4.matmul_ogs.default(hidden_states,
    experts.gate_up_proj_blocks, experts.gate_up_proj_scales, experts.gate_up_proj_bias,
    192, getitem_3, gather_index=getitem_1, activation='swiglu', alpha=1.702, limit=7.0,
    up_offset=1.0, layout='cpu_panels', kernels='cpu')
matmul_ogs_default_1: float32[7, 64] = mxfp4.matmul_ogs.default(matmul_ogs_default,
    experts.down_proj_blocks, experts.down_proj_scales, experts.down_proj_bias, 64,
    getitem_3, scatter_index=getitem_2, gammas=getitem, experts_per_token=3,
    layout='cpu_panels', kernels='cpu')
hidden_states_2: float32[1, 7, 64] = .reshape(matmul_ogs_default_1, 1, 7, 64)
return [hidden_states_2, router_scores]
""",
        )

    def test_lowered_with_dynamic_shapes(self) -> None:
        self.assertExpectedInline(
            after(LOWERED, mlp(), dynamic=True),
            """\
input T
input l_hidden_states_: float32[1, T, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input experts.gate_up_proj_scales: uint8[6, 6]
input experts.gate_up_proj_bias: float32[6, 192]
input experts_limit: float64[]
input experts_alpha: float64[]
input experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input experts.down_proj_scales: uint8[6, 2]
input experts.down_proj_bias: float32[6, 64]
size = .size(l_hidden_states_)
getitem_2 = getitem(size, 2)
hidden_states: float32[T, 64] = .reshape(l_hidden_states_, -1, getitem_2)
router_logits: float32[T, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[T, 3] = getitem(topk, 0)
router_scores: float32[T, 3] = softmax(router_top_value, dim=1, dtype=float32)
item = .item(experts_limit)
neg = neg(item)
item_1 = .item(experts_alpha)
mul_4 = mul(3, T)
routing_default = mxfp4.routing.default(router_logits, 3, kernels='cpu')
getitem: float32[3*T] = getitem(routing_default, 0)
getitem_3: int32[3*T] = getitem(routing_default, 1)
getitem_4: int32[3*T] = getitem(routing_default, 2)
getitem_5: int32[7] = getitem(routing_default, 3)
matmul_ogs_default: float32[3*T, 96] = mxfp4.matmul_ogs.default(hidden_states,
    experts.gate_up_proj_blocks, experts.gate_up_proj_scales, experts.gate_up_proj_bias,
    192, getitem_5, gather_index=getitem_3, activation='swiglu', alpha=1.702, limit=7.0,
    up_offset=1.0, layout='cpu_panels', kernels='cpu')
matmul_ogs_default_1: float32[T, 64] = mxfp4.matmul_ogs.default(matmul_ogs_default,
    experts.down_proj_blocks, experts.down_proj_scales, experts.down_proj_bias, 64,
    getitem_5, scatter_index=getitem_4, gammas=getitem, experts_per_token=3,
    layout='cpu_panels', kernels='cpu')
hidden_states_2: float32[1, T, 64] = .reshape(matmul_ogs_default_1, 1, T, getitem_2)
return [hidden_states_2, router_scores]
""",
        )


class TestBatchedForm(Snapshots):
    def test_canonical(self) -> None:
        self.assertExpectedInline(
            after(CANONICAL, mlp(form="batched_mm")),
            """\
input l_hidden_states_: float32[1, 7, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj: float32[6, 64, 192]
input experts.gate_up_proj_bias: float32[6, 192]
input experts.down_proj: float32[6, 96, 64]
input experts.down_proj_bias: float32[6, 64]
hidden_states: float32[7, 64] = .reshape(l_hidden_states_, -1, 64)
router_logits: float32[7, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[7, 3] = getitem(topk, 0)
router_indices: int64[7, 3] = getitem(topk, 1)
router_scores: float32[7, 3] = softmax(router_top_value, dim=1, dtype=float32)
selected_hidden_states: float32[21, 64] = .repeat_interleave(hidden_states, 3, dim=0)
sample_weights: float32[21] = .reshape(router_scores, -1)
expert_ids: int64[21] = .reshape(router_indices, -1)
selected_weights: float32[21, 64, 192] = getitem(experts.gate_up_proj, expert_ids)
selected_biases: float32[21, 192] = getitem(experts.gate_up_proj_bias, expert_ids)
unsqueeze: float32[21, 1, 64] = .unsqueeze(selected_hidden_states, 1)
bmm: float32[21, 1, 192] = bmm(unsqueeze, selected_weights)
out: float32[21, 192] = .squeeze(bmm, 1)
add_: float32[21, 192] = .add(out, selected_biases)
gate: float32[21, 96] = getitem(add_, [..., ::2])
up: float32[21, 96] = getitem(add_, [..., 1::2])
gate_1: float32[21, 96] = .clamp(gate, min=None, max=7.0)
up_1: float32[21, 96] = .clamp(up, min=-7.0, max=7.0)
mul: float32[21, 96] = mul(gate_1, 1.702)
sigmoid: float32[21, 96] = sigmoid(mul)
glu: float32[21, 96] = mul(gate_1, sigmoid)
add: float32[21, 96] = add(up_1, 1)
gated_output: float32[21, 96] = mul(add, glu)
selected_weights_1: float32[21, 96, 64] = getitem(experts.down_proj, expert_ids)
selected_biases_1: float32[21, 64] = getitem(experts.down_proj_bias, expert_ids)
unsqueeze_1: float32[21, 1, 96] = .unsqueeze(gated_output, 1)
bmm_1: float32[21, 1, 64] = bmm(unsqueeze_1, selected_weights_1)
out_1: float32[21, 64] = .squeeze(bmm_1, 1)
add__1: float32[21, 64] = .add(out_1, selected_biases_1)
unsqueeze_2: float32[21, 1] = .unsqueeze(sample_weights, -1)
weighted_out: float32[21, 64] = mul(add__1, unsqueeze_2)
view: float32[7, 3, 64] = .view(weighted_out, 7, 3, 64)
final_hidden_states: float32[7, 64] = .sum(view, dim=1)
hidden_states_2: float32[1, 7, 64] = .reshape(final_hidden_states, 1, 7, 64)
return [hidden_states_2, router_scores]
""",
        )

    def test_fused(self) -> None:
        self.assertExpectedInline(
            after(FUSED, mlp(form="batched_mm")),
            """\
input l_hidden_states_: float32[1, 7, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj: float32[6, 64, 192]
input experts.gate_up_proj_bias: float32[6, 192]
input experts.down_proj: float32[6, 96, 64]
input experts.down_proj_bias: float32[6, 64]
hidden_states: float32[7, 64] = .reshape(l_hidden_states_, -1, 64)
router_logits: float32[7, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[7, 3] = getitem(topk, 0)
router_scores: float32[7, 3] = softmax(router_top_value, dim=1, dtype=float32)
moe_default: float32[7, 64] = mxfp4.moe.default(hidden_states, router_logits,
    experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj,
    experts.down_proj_bias, 3, 1.702, 7.0)
hidden_states_2: float32[1, 7, 64] = .reshape(moe_default, 1, 7, 64)
return [hidden_states_2, router_scores]
""",
        )

    def test_lowered(self) -> None:
        self.assertExpectedInline(
            after(LOWERED, mlp(form="batched_mm")),
            """\
input l_hidden_states_: float32[1, 7, 64]
input router.weight: float32[6, 64]
input router.bias: float32[6]
input experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input experts.gate_up_proj_scales: uint8[6, 6]
input experts.gate_up_proj_bias: float32[6, 192]
input experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input experts.down_proj_scales: uint8[6, 2]
input experts.down_proj_bias: float32[6, 64]
hidden_states: float32[7, 64] = .reshape(l_hidden_states_, -1, 64)
router_logits: float32[7, 6] = linear(hidden_states, router.weight, router.bias)
topk = topk(router_logits, 3, dim=-1)
router_top_value: float32[7, 3] = getitem(topk, 0)
router_scores: float32[7, 3] = softmax(router_top_value, dim=1, dtype=float32)
routing_default = mxfp4.routing.default(router_logits, 3, kernels='cpu')
getitem: float32[21] = getitem(routing_default, 0)
getitem_1: int32[21] = getitem(routing_default, 1)
getitem_2: int32[21] = getitem(routing_default, 2)
getitem_3: int32[7] = getitem(routing_default, 3)
matmul_ogs_default: float32[21, 96] = mxfp4.matmul_ogs.default(hidden_states,
    experts.gate_up_proj_blocks, experts.gate_up_proj_scales, experts.gate_up_proj_bias,
    192, getitem_3, gather_index=getitem_1, activation='swiglu', alpha=1.702, limit=7.0,
    up_offset=1.0, layout='cpu_panels', kernels='cpu')
matmul_ogs_default_1: float32[7, 64] = mxfp4.matmul_ogs.default(matmul_ogs_default,
    experts.down_proj_blocks, experts.down_proj_scales, experts.down_proj_bias, 64,
    getitem_3, scatter_index=getitem_2, gammas=getitem, experts_per_token=3,
    layout='cpu_panels', kernels='cpu')
hidden_states_2: float32[1, 7, 64] = .reshape(matmul_ogs_default_1, 1, 7, 64)
return [hidden_states_2, router_scores]
""",
        )


class TestEagerForm(Snapshots):
    def test_is_captured_as_the_grouped_form(self) -> None:
        graphs = Graphs()
        for form in ("grouped_mm", "eager"):
            compile_with(mlp(form=form), graphs)(hidden())
            torch.compiler.reset()
        grouped, eager = map(readable, graphs.seen)
        assert grouped == eager


class TestWholeModel(Snapshots):
    def test_what_mxfp4_has_to_do_with(self) -> None:
        """The swizzled inputs, the routers and the package's ops of a model of two layers."""
        graphs = Graphs()
        compile_with(model(torch.bfloat16), graphs, options={"regions": False})(tokens())
        (gm,) = graphs.seen
        ours = {n for n in gm.graph.nodes if str(n.target).startswith("mxfp4.")}
        ours |= {user for n in ours if "routing" in str(n.target) for user in n.users}
        ours |= {n for node in ours for n in node.all_input_nodes}
        self.assertExpectedInline(
            readable(gm, only=lambda node: node in ours),
            """\
input model.layers.0.self_attn.sinks: bfloat16[4]
input model.layers.0.mlp.experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input model.layers.0.mlp.experts.gate_up_proj_scales: uint8[6, 6]
input model.layers.0.mlp.experts.gate_up_proj_bias: bfloat16[6, 192]
input model.layers.0.mlp.experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input model.layers.0.mlp.experts.down_proj_scales: uint8[6, 2]
input model.layers.0.mlp.experts.down_proj_bias: bfloat16[6, 64]
input model.layers.1.self_attn.sinks: bfloat16[4]
input model.layers.1.mlp.experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input model.layers.1.mlp.experts.gate_up_proj_scales: uint8[6, 6]
input model.layers.1.mlp.experts.gate_up_proj_bias: bfloat16[6, 192]
input model.layers.1.mlp.experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input model.layers.1.mlp.experts.down_proj_scales: uint8[6, 2]
input model.layers.1.mlp.experts.down_proj_bias: bfloat16[6, 64]
mask: bfloat16[2, 1, 7, 7] = where(attention_mask_1, zeros, -3.3895313892515355e+38)
mask_1: bfloat16[2, 1, 7, 7] = where(attention_mask_2, zeros_1, -3.3895313892515355e+38)
q_embed: bfloat16[2, 4, 7, 16] = cat([first_, second_], dim=-1)
full_key_states: bfloat16[2, 2, 7, 16] = cat([tensor_1, k_embed], dim=-2)
full_value_states: bfloat16[2, 2, 7, 16] = cat([tensor_2, value_states], dim=-2)
attention_with_sinks_default: bfloat16[2, 7, 4, 16] =
    mxfp4.attention_with_sinks.default(q_embed, full_key_states, full_value_states,
    model.layers.0.self_attn.sinks, mask_1, 0.25, 'cpu')
hidden_states_9: bfloat16[14, 64] = .reshape(hidden_states_8, -1, 64)
router_logits: bfloat16[14, 6] = linear(hidden_states_9, model.layers.0.mlp.router.weight,
    model.layers.0.mlp.router.bias)
routing_default = mxfp4.routing.default(router_logits, 3, kernels='cpu')
getitem: float32[42] = getitem(routing_default, 0)
getitem_38: int32[42] = getitem(routing_default, 1)
getitem_39: int32[42] = getitem(routing_default, 2)
getitem_40: int32[7] = getitem(routing_default, 3)
matmul_ogs_default: bfloat16[42, 96] = mxfp4.matmul_ogs.default(hidden_states_9,
    model.layers.0.mlp.experts.gate_up_proj_blocks,
    model.layers.0.mlp.experts.gate_up_proj_scales,
    model.layers.0.mlp.experts.gate_up_proj_bias, 192, getitem_40, gather_index=getitem_38,
    activation='swiglu', alpha=1.702, limit=7.0, up_offset=1.0, layout='cpu_panels',
    kernels='cpu')
matmul_ogs_default_1: bfloat16[14, 64] = mxfp4.matmul_ogs.default(matmul_ogs_default,
    model.layers.0.mlp.experts.down_proj_blocks,
    model.layers.0.mlp.experts.down_proj_scales, model.layers.0.mlp.experts.down_proj_bias,
    64, getitem_40, scatter_index=getitem_39, gammas=getitem, experts_per_token=3,
    layout='cpu_panels', kernels='cpu')
q_embed_1: bfloat16[2, 4, 7, 16] = cat([first__2, second__2], dim=-1)
keys: bfloat16[2, 2, 7, 16] = cat([tensor_3, k_embed_1], dim=-2)
values: bfloat16[2, 2, 7, 16] = cat([tensor_4, value_states_2], dim=-2)
attention_with_sinks_default_1: bfloat16[2, 7, 4, 16] =
    mxfp4.attention_with_sinks.default(q_embed_1, keys, values,
    model.layers.1.self_attn.sinks, mask, 0.25, 'cpu')
hidden_states_22: bfloat16[14, 64] = .reshape(hidden_states_21, -1, 64)
router_logits_1: bfloat16[14, 6] = linear(hidden_states_22,
    model.layers.1.mlp.router.weight, model.layers.1.mlp.router.bias)
routing_default_1 = mxfp4.routing.default(router_logits_1, 3, kernels='cpu')
getitem_41: float32[42] = getitem(routing_default_1, 0)
getitem_42: int32[42] = getitem(routing_default_1, 1)
getitem_43: int32[42] = getitem(routing_default_1, 2)
getitem_44: int32[7] = getitem(routing_default_1, 3)
matmul_ogs_default_2: bfloat16[42, 96] = mxfp4.matmul_ogs.default(hidden_states_22,
    model.layers.1.mlp.experts.gate_up_proj_blocks,
    model.layers.1.mlp.experts.gate_up_proj_scales,
    model.layers.1.mlp.experts.gate_up_proj_bias, 192, getitem_44, gather_index=getitem_42,
    activation='swiglu', alpha=1.702, limit=7.0, up_offset=1.0, layout='cpu_panels',
    kernels='cpu')
matmul_ogs_default_3: bfloat16[14, 64] = mxfp4.matmul_ogs.default(matmul_ogs_default_2,
    model.layers.1.mlp.experts.down_proj_blocks,
    model.layers.1.mlp.experts.down_proj_scales, model.layers.1.mlp.experts.down_proj_bias,
    64, getitem_44, scatter_index=getitem_43, gammas=getitem_41, experts_per_token=3,
    layout='cpu_panels', kernels='cpu')
""",
        )
