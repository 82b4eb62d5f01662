"""Packed experts: what they compute, and that the backend takes their bytes as they are."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from models import DTYPES, Graphs, Layers, compile_with, hidden, mlp, model, pack, tokens
from near_miss import NearMisses, edited, swap_methods
from oracle import assert_as_accurate
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

import mxfp4_fx
from mxfp4_fx.core import formats
from mxfp4_fx.core.errors import WeightError
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.store import STORE, WeightStore
from mxfp4_fx.weights.swizzle import swizzle_weight, unswizzle_weight

pytestmark = pytest.mark.usefixtures("no_gradients")


def exact(dense: GptOssMLP, x: Tensor) -> Tensor:
    """The MLP [T, H] in float64, with the routes that the model's own dtype chooses."""
    experts, x = dense.experts, x[0]
    _, scores, indices = dense.router(x)
    gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    rows = []
    for token, ids, factors in zip(x.double(), indices, scores.double(), strict=True):
        total = torch.zeros_like(token)
        for expert, factor in zip(ids, factors, strict=True):
            both = token @ gate_up[expert] + experts.gate_up_proj_bias[expert].double()
            out = experts._apply_gate(both) @ down[expert] + experts.down_proj_bias[expert].double()
            total += factor * out
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uncompiled_it_computes_what_the_dense_experts_compute(dtype: torch.dtype) -> None:
    dense, x = mlp(dtype), hidden(dtype=dtype)
    expected, theirs = exact(dense, x), dense(x)[0][0]
    assert_as_accurate(pack(dense)(x)[0][0], theirs, expected)


def test_experts_that_are_hit_are_dequantized_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, made = pack(mlp()), []
    real = formats.dequantize

    def recording(blocks: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(tuple(blocks.shape))
        return real(blocks, *args, **kwargs)

    monkeypatch.setattr("mxfp4_fx.ops.reference.dequantize", recording)
    indices, factors = torch.tensor([[4, 1], [1, 4]]), torch.ones(2, 2)
    packed.experts(hidden(2)[0], indices, factors)
    assert made == [(192, 2, 16)] * 2 + [(64, 3, 16)] * 2


def test_ids_of_experts_that_are_held_elsewhere_count_nothing() -> None:
    experts, x = pack(mlp()).experts, hidden(2)[0]
    indices, factors = torch.tensor([[0, 6], [6, 6]]), torch.ones(2, 2)
    expected = experts(x[:1], torch.tensor([[0]]), torch.ones(1, 1))
    assert torch.equal(experts(x, indices, factors), torch.cat([expected, torch.zeros(1, 64)]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_is_rewritten(dtype: torch.dtype, dynamic: bool) -> None:
    packed, graphs, x = pack(Layers(dtype)), Graphs(), hidden(dtype=dtype)
    told = mxfp4_fx.explain(packed, x, dynamic=dynamic)
    assert [(r.form, r.layer) for r in told.rewrites] == [
        ("packed", f"layers.{i}.experts") for i in range(2)
    ]
    assert not told.misses
    compiled = compile_with(packed, graphs, dynamic=dynamic, options={"strict": True})
    compiled(x)
    ops = [str(node.target) for gm in graphs.seen for node in gm.graph.nodes]
    assert ops.count("mxfp4.matmul_ogs.default") == 4
    assert "mxfp4.routing.default" in ops  # its own top-k, too, is this package's


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_it_is_as_accurate_as_uncompiled(dtype: torch.dtype) -> None:
    dense, x = mlp(dtype), hidden(dtype=dtype)
    expected = exact(dense, x)
    packed = pack(dense)
    assert_as_accurate(compile_with(packed)(x)[0][0], packed(x)[0][0], expected)


def test_the_same_bits_as_a_dense_model_of_these_values() -> None:
    dense = model(torch.bfloat16, num_hidden_layers=1)
    expected = compile_with(copy.deepcopy(dense))(tokens()).logits
    assert torch.equal(compile_with(pack(dense))(tokens()).logits, expected)


def test_experts_alone_with_routes_of_the_caller() -> None:
    packed, x = pack(mlp()), hidden()[0]
    indices, factors = torch.randint(0, 6, (7, 3)), torch.rand(7, 3)
    kernels = {"kernels": "reference"}
    compiled = compile_with(packed.experts, options={"strict": True, **kernels})
    assert torch.equal(compiled(x, indices, factors), packed.experts(x, indices, factors))


def test_layer_by_layer() -> None:
    packed, graphs, x = pack(Layers()), Graphs(), hidden()
    expected = packed(x)
    for layer in packed.layers:
        layer.compile(backend="mxfp4", options={"inner": graphs, "kernels": "reference"})
    assert torch.equal(packed(x), expected)
    assert len(graphs.seen) == 1


def test_verify_compares_with_the_uncompiled_experts() -> None:
    x = hidden(dtype=torch.bfloat16)
    compile_with(pack(mlp(torch.bfloat16)), options={"verify": True})(x)


def test_gradients_pass_through_to_the_activations() -> None:
    packed, x = pack(mlp()).requires_grad_(False), hidden().requires_grad_()
    with torch.enable_grad():
        packed(x)[0].sum().backward()
        expected, x.grad = x.grad, None
        compile_with(packed, "aot_eager", options={"kernels": "reference"})(x)[0].sum().backward()
    assert expected.abs().sum() > 0
    assert torch.equal(x.grad, expected)


def test_other_compilers_capture_it_whole() -> None:
    packed, x = pack(mlp()), hidden()
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x)[0], packed(x)[0])


class TestNearMisses(NearMisses):
    """One thing is changed in the experts' own code."""

    def edit(self, changes: dict[str, str], **names: Any) -> GptOssMLP:
        module = pack(mlp())
        swap_methods(module.experts, _frozen=edited(PackedExperts._frozen, changes, **names))
        return module

    def test_no_activation(self) -> None:
        changes = {
            "activation=self.activation,": 'activation="none",',
            "inner,\n": "inner[:, ::2],\n",
        }
        self.assert_missed(
            self.edit(changes),
            """\
experts: not the packed form: expected mxfp4.matmul_ogs(blocks=gate_up,
scales=gate_up_scales, bias=gate_up_bias, n=I*2, expert_offsets=getitem(..),
gather_index=getitem(..), scatter_index=None, gammas=None, experts_per_token=1,
activation=swiglu, layout=row_major, kernels=reference, alpha=alpha, limit=limit,
up_offset=up_offset, x=hidden), found getitem(inner, index=(::, ::2))
""",
        )

    def test_the_weighted_sum_lacks_the_weights(self) -> None:
        self.assert_missed(
            self.edit({"gammas=gammas,": ""}),
            """\
experts: not the packed form: expected getitem(..), found None
""",
        )

    def test_the_weights_are_applied_twice(self) -> None:
        changes = {"gather_index=gather_index,": "gather_index=gather_index, gammas=gammas,"}
        self.assert_missed(
            self.edit(changes),
            """\
experts: not the packed form: expected mxfp4.matmul_ogs(blocks=gate_up,
scales=gate_up_scales, bias=gate_up_bias, n=I*2, expert_offsets=getitem(..),
gather_index=getitem(..), scatter_index=None, gammas=None, experts_per_token=1,
activation=swiglu, layout=row_major, kernels=reference, alpha=alpha, limit=limit,
up_offset=up_offset, x=hidden), found mxfp4.matmul_ogs(x=hidden_states,
blocks=l_self_modules_experts_parameters_gate_up_proj_blocks_,
scales=l_self_modules_experts_parameters_gate_up_proj_scales_,
bias=l_self_modules_experts_parameters_gate_up_proj_bias_, n=192, expert_offsets=offsets,
gather_index=gather_index, scatter_index=None, gammas=gammas, experts_per_token=1,
activation=swiglu, alpha=1.702, limit=7.0, up_offset=1.0, layout=row_major,
kernels=reference)
""",
        )

    def test_the_result_is_scaled_before_the_second_projection(self) -> None:
        self.assert_missed(
            self.edit({"inner,\n": "inner * 2,\n"}),
            """\
experts: not the packed form: expected mxfp4.matmul_ogs(blocks=gate_up,
scales=gate_up_scales, bias=gate_up_bias, n=I*2, expert_offsets=getitem(..),
gather_index=getitem(..), scatter_index=None, gammas=None, experts_per_token=1,
activation=swiglu, layout=row_major, kernels=reference, alpha=alpha, limit=limit,
up_offset=up_offset, x=hidden), found mul(inner, other=2)
""",
        )

    def test_another_first_expert(self) -> None:
        changes = {"self.num_experts\n": "self.num_experts, 1\n"}
        self.assert_missed(
            self.edit(changes),
            """\
experts: not the packed form: expected mxfp4.routing.routes(indices=indices, weights=scores,
num_experts=E, first_expert=0, kernels=reference), with 0 = 0 but found 1
""",
        )

    def test_other_scales(self) -> None:
        changes = {"self.down_proj_scales)": "self.down_proj_scales + 1)"}
        self.assert_missed(
            self.edit(changes),
            """\
experts: down_scales is not a parameter or buffer of the model: it is what add makes
""",
        )

    def test_both_projections_read_one_bias(self) -> None:
        changes = {"self.down_proj_bias,": "self.gate_up_proj_bias[:, :64],"}
        module = self.edit(changes)
        assert not mxfp4_fx.explain(pack(mlp()), hidden()).misses
        told = mxfp4_fx.explain(module, hidden())
        assert len(told.rewrites) == 1  # a bias may be any tensor
        compiled, x = compile_with(module, options={"kernels": "reference"}), hidden()
        assert torch.equal(compiled(x)[0], module(x)[0])

    def test_an_intermediate_is_used_elsewhere(self) -> None:
        self.assert_missed(
            self.edit({"return out": "return out + inner.sum()"}),
            """\
experts: the intermediate inner is used elsewhere, by sum_1
""",
        )

    def test_the_blocks_are_written_to(self) -> None:
        write = "self.down_proj_blocks.zero_()\n    gammas, gather_index,"
        self.assert_missed(
            self.edit({"gammas, gather_index,": write}),
            """\
experts: down is written to in the graph, by zero_
""",
        )


def pair(seed: int = 0, e: int = 3, n: int = 40, groups: int = 3) -> tuple[nn.Parameter, ...]:
    """Blocks and scales of all kinds of bytes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (e, n, groups, 16), (e, n, groups)
    return tuple(
        nn.Parameter(
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            requires_grad=False,
        )
        for shape in shapes
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swizzling_keeps_every_byte(layout: str) -> None:
    blocks, scales = pair()
    parts = swizzle_weight(Source((blocks, scales), MXFP4), layout)
    back = unswizzle_weight(parts, layout, 3, 40, 96)
    assert torch.equal(back[0], blocks)
    assert torch.equal(back[1], scales)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_weight_is_swizzled_like_the_one_that_was_quantized(layout: str) -> None:
    dense = torch.randn(3, 96, 40, generator=torch.Generator().manual_seed(0))
    blocks, scales = quantize(dense.transpose(1, 2))
    pairs = zip(
        swizzle_weight(Source((blocks, scales), MXFP4), layout),
        swizzle_weight(Source((dense,), FLOATS), layout),
        strict=True,
    )
    assert all(torch.equal(packed, quantized) for packed, quantized in pairs)


def test_checkpoint_order_is_not_copied() -> None:
    blocks, scales = pair()
    parts = WeightStore().get(Source((blocks, scales), MXFP4), "row_major")
    assert [part.data_ptr() for part in parts] == [blocks.data_ptr(), scales.data_ptr()]


@pytest.mark.parametrize("changed", ["blocks", "scales"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_change_of_either_is_noticed(layout: str, changed: str) -> None:
    blocks, scales = pair()
    store, source = WeightStore(), Source((blocks, scales), MXFP4)
    before = [part.data_ptr() for part in store.get(source, layout)]
    (blocks if changed == "blocks" else scales).copy_(pair(1)[changed == "scales"])
    parts = store.get(source, layout)
    assert [part.data_ptr() for part in parts] == before
    back = unswizzle_weight(parts, layout, 3, 40, 96)
    assert torch.equal(back[0], blocks)
    assert torch.equal(back[1], scales)


def test_refresh_counts_a_packed_weight_once() -> None:
    packed = pack(mlp())
    compile_with(packed)(hidden())
    assert mxfp4_fx.refresh(packed) == 2


def test_blocks_of_other_shapes_than_their_scales_are_named() -> None:
    blocks, scales = pair()
    with pytest.raises(WeightError, match=r"\(3, 40, 3, 16\) and \(3, 40, 2\)"):
        swizzle_weight(Source((blocks, scales[:, :, :2]), MXFP4), "row_major")


def test_a_dead_model_frees_its_swizzled_weights() -> None:
    gc.collect()  # what an earlier test left behind must not count
    packed, before = pack(mlp()), len(STORE)
    compile_with(packed, "aot_eager")(hidden())
    assert len(STORE) == before + 2
    del packed
    torch.compiler.reset()
    gc.collect()
    assert len(STORE) == before
