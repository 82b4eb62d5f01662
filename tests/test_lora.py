"""PEFT's LoRA on the weights of packed experts, beside PEFT's own on dense ones."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import Graphs, compile_with, hidden, mlp, model, pack, tokens
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import mxfp4_fx
from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.weights.store import STORE

peft = pytest.importorskip("peft")

WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]


def lora(**changes: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": WEIGHTS}
    return peft.LoraConfig(**{**given, **changes})


def adapted(module: nn.Module, config: Any = None) -> Any:
    """Give a module adapters whose factors are random, both of them."""
    return filled(peft.get_peft_model(module, config or lora()))


def filled(wrapped: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, factor in factors(wrapped).items():
        values = torch.randn(factor.shape, generator=generator) * 0.1
        factor.data = values.to(factor.dtype)
        assert "lora_" in name
    return wrapped


def factors(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in wrapped.named_parameters() if "lora_" in name}


def result_and_gradients(wrapped: Any, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of ``x`` and of every factor."""
    x = x.detach().requires_grad_()
    y = wrapped(x)[0]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [x, *factors(wrapped).values()]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), wanted)]


def in_float64(wrapped: Any) -> Any:
    """A copy of a model whose experts are dense and have the values of the packed ones."""
    dense = copy.deepcopy(wrapped)
    mxfp4_fx.dequantize(dense)
    dense.get_base_model().set_experts_implementation("batched_mm")  # grouped_mm has no float64
    return dense.double()


def experts_of(wrapped: nn.Module) -> PackedExperts:
    return next(m for m in wrapped.modules() if isinstance(m, PackedExperts))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {"use_rslora": True}),
        (torch.bfloat16, {}),
        exhaustive(torch.float32, {"target_parameters": WEIGHTS[:1]}),
        (torch.float32, {"target_parameters": WEIGHTS[1:]}),
    ],
)
def test_results_and_gradients(dtype: torch.dtype, changes: Any, compiled: bool) -> None:
    x = hidden(dtype=dtype)
    packed = adapted(pack(mlp(dtype)), lora(**changes))
    dense = adapted(mlp(dtype), lora(**changes))
    exact = copy.deepcopy(dense).double()
    exact.base_model.model.experts.get_base_layer().config._experts_implementation = "batched_mm"
    assert factors(packed).keys() == factors(dense).keys()
    ours = compile_with(packed, options={"strict": True}) if compiled else packed
    every = (
        result_and_gradients(m, x.to(d))
        for m, d in ((ours, dtype), (dense, dtype), (exact, torch.float64))
    )
    for actual, reference, truth in zip(*every, strict=True):
        assert_as_accurate(actual, reference, truth)


def test_the_graph_reads_native_weights_in_one_layer_as_in_many() -> None:
    packed, graphs = adapted(pack(mlp())), Graphs()
    told = mxfp4_fx.explain(packed, hidden())
    (rewrite,) = told.rewrites
    assert (rewrite.form, rewrite.experts, rewrite.top_k) == ("packed_lora", 6, 3)
    assert not told.misses
    compile_with(packed, graphs, options={"strict": True})(hidden())
    (gm,) = graphs.seen
    (call,) = (n for n in gm.graph.nodes if str(n.target) == "mxfp4.moe.adapted")
    assert call.args[-2:] == (rewrite.layout, rewrite.kernels)
    assert rewrite.kernels != "reference"
    read = {node.target for node in gm.graph.find_nodes(op="placeholder")}
    assert not any(node.endswith("_scales_") for node in read)  # the captured ones are gone


def test_adapters_travel_between_packed_and_dense_experts(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1}
    theirs, ours = tmp_path / "dense", tmp_path / "packed"
    dense, packed = adapted(model(**small)), adapted(pack(model(**small)))
    dense.save_pretrained(theirs)
    packed.save_pretrained(ours)
    with torch.no_grad():
        for saved, fresh, expected in (
            (theirs, pack(model(**small)), packed),
            (ours, model(**small), dense),
        ):
            loaded = peft.PeftModel.from_pretrained(fresh, saved)
            assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)


@torch.no_grad()
def test_switching_compiles_a_graph_for_each_state_and_no_more() -> None:
    packed, x = adapted(pack(mlp())), hidden()
    packed.add_adapter("second", lora())
    filled(packed, seed=1)
    plain = pack(mlp())(x)[0]
    states = {"default": packed(x)[0]}
    packed.set_adapter("second")
    states["second"] = packed(x)[0]
    assert not torch.equal(*states.values())
    compiled = compile_with(packed, options={"kernels": "reference", "strict": True})
    for _ in range(2):
        for name, expected in states.items():
            packed.set_adapter(name)
            assert torch.equal(compiled(x)[0], expected)
        with packed.disable_adapter():
            assert torch.equal(compiled(x)[0], plain)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@torch.no_grad()
def test_merging_rounds_and_says_so_and_unmerging_undoes_it() -> None:
    packed, x = adapted(pack(mlp())), hidden()
    experts, compiled = experts_of(packed), compile_with(packed)
    before, expected = copy.deepcopy(experts.state_dict()), compiled(x)[0]
    wrapper = packed.base_model.model.experts
    assert wrapper.parameter_name == "down_proj"
    a, b, scaling = wrapper.low_rank("default")
    old = dequantize(experts.down_proj_blocks, experts.down_proj_scales, torch.float32)
    exact = old + b @ a * scaling
    packed.merge_adapter()
    blocks, scales = experts.down_proj_blocks, experts.down_proj_scales
    assert torch.equal(blocks, quantize(exact, scale_rule="search")[0])
    error = (dequantize(blocks, scales, torch.float32) - exact).double().norm().item()
    (rounding,) = wrapper.roundings
    assert rounding.weight == "experts.down_proj"
    assert rounding.of_weight == pytest.approx(error / exact.double().norm().item())
    assert rounding.of_adapter == pytest.approx(error / (exact - old).double().norm().item())
    merged = compiled(x)[0]
    assert not torch.equal(merged, expected)
    assert torch.equal(compile_with(pack_of(experts))(x)[0], merged)
    packed.unmerge_adapter()
    assert torch.equal(compiled(x)[0], expected)
    after = experts.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def pack_of(experts: PackedExperts) -> Any:
    whole = pack(mlp())
    whole.experts = experts
    return whole


def two_adapters() -> Any:
    """Packed experts with adapters "default" and "second", of which the first is active."""
    packed = adapted(pack(mlp()))
    packed.add_adapter("second", lora())
    return filled(packed, seed=1)


@torch.no_grad()
def test_two_adapters_at_once_add_up() -> None:
    packed, dense = two_adapters(), adapted(mlp(form="batched_mm"))
    dense.add_adapter("second", lora())
    filled(dense, seed=1)
    both, exact = ["default", "second"], copy.deepcopy(dense).double()
    for wrapped in (packed, dense, exact):
        wrapped.base_model.set_adapter(both)
    assert_as_accurate(packed(hidden())[0], dense(hidden())[0], exact(hidden().double())[0])
    # One merge of two adapters rounds their sum.
    wrapper = packed.base_model.model.experts
    parts = [wrapper.low_rank(name) for name in both]
    experts = experts_of(packed)
    weight = dequantize(experts.down_proj_blocks, experts.down_proj_scales, torch.float32)
    weight = weight + sum(b @ a * scaling for a, b, scaling in parts)
    packed.merge_adapter()
    assert torch.equal(experts.down_proj_blocks, quantize(weight, scale_rule="search")[0])
    assert len(wrapper.roundings) == 1


@torch.no_grad()
def test_merges_one_after_the_other_are_undone_together() -> None:
    packed, x = two_adapters(), hidden()
    with packed.disable_adapter():
        plain = packed(x)[0]
    for name in ("default", "second"):
        packed.merge_adapter([name])
    wrapper = packed.base_model.model.experts
    assert wrapper.merged_adapters == ["default", "second"]
    assert len(wrapper.roundings) == 2
    with packed.disable_adapter():  # which unmerges, as PEFT does for dense experts
        assert torch.equal(packed(x)[0], plain)
    assert (wrapper.merged_adapters, wrapper.roundings) == ([], [])
    experts = experts_of(packed)
    changed = torch.zeros_like(experts.down_proj_blocks)
    experts.down_proj_blocks.data = changed
    with pytest.warns(UserWarning, match="Already unmerged"):
        packed.unmerge_adapter()
    assert experts.down_proj_blocks.data_ptr() == changed.data_ptr()


@torch.no_grad()
def test_an_adapter_that_adds_nothing_loses_nothing() -> None:
    packed = peft.get_peft_model(pack(mlp()), lora())
    packed.merge_adapter()
    (_, of_weight, of_adapter), *_ = packed.base_model.model.experts.roundings
    assert (of_weight, of_adapter) == (0, 0)


@torch.no_grad()
def test_a_broken_adapter_is_refused_where_it_is_asked_for() -> None:
    packed = adapted(pack(mlp()))
    before = experts_of(packed).gate_up_proj_blocks
    factors(packed)["base_model.model.experts.lora_A.default.weight"][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"experts\.down_proj is not finite"):
        packed.merge_adapter(safe_merge=True)
    assert experts_of(packed).gate_up_proj_blocks is before


@torch.no_grad()
def test_an_adapter_of_other_modules_leaves_experts_alone() -> None:
    whole = model(num_hidden_layers=1)
    packed = adapted(pack(whole), lora(target_parameters=[f"mlp.{name}" for name in WEIGHTS]))
    other = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    packed.add_adapter("other", other)
    packed.set_adapter("other")
    blocks = experts_of(packed).down_proj_blocks
    expected, exact = packed(tokens()).logits, in_float64(packed)(tokens()).logits
    packed.merge_adapter()
    assert experts_of(packed).down_proj_blocks is blocks
    assert_as_accurate(packed(tokens()).logits, expected, exact)


class TestOps:
    OFFSETS = torch.tensor([0, 2, 2, 3], dtype=torch.int32)  # of 3 experts, and a row of none

    @staticmethod
    def whole(*shape: int) -> Tensor:
        """Return whole numbers, whose sums of products are exact."""
        return torch.randint(-3, 4, shape).float()

    def test_a_row_of_no_expert_and_an_expert_without_rows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where new memory holds NaN, too."""
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        x, weight = self.whole(4, 8), self.whole(3, 5, 8)
        torch.use_deterministic_algorithms(True)
        try:
            y = torch.ops.mxfp4.grouped_linear(x, weight, self.OFFSETS)
            outer = torch.ops.mxfp4.grouped_outer(y, x, self.OFFSETS)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not y[3].any()
        assert not outer[1].any()
        assert torch.equal(y[:2], x[:2] @ weight[0].T)
        assert torch.equal(outer[2], y[2:3].T @ x[2:3])

    @pytest.mark.parametrize("at", [0, 1])
    def test_a_gradient_of_one_operand(self, at: int) -> None:
        operands = [self.whole(4, 8), self.whole(3, 5, 8)]
        operands[at].requires_grad_()
        y = torch.ops.mxfp4.grouped_linear(*operands, self.OFFSETS)
        (gradient,) = torch.autograd.grad(y.sum(), operands[at])
        x, weight = (operand.detach() for operand in operands)
        if at == 0:
            assert torch.equal(gradient[:3], weight.sum(1)[[0, 0, 2]])
        else:
            rows = torch.stack([x[:2].sum(0), x[:0].sum(0), x[2]])
            assert torch.equal(gradient, rows[:, None].expand(3, 5, 8))

    @pytest.mark.parametrize(
        "changes",
        [
            {"x": torch.zeros(4, 7)},
            {"x": torch.zeros(4, 8, dtype=torch.bfloat16)},
            {"weight": torch.zeros(2, 5, 8)},
            {"weight": torch.zeros(5, 8)},
        ],
    )
    def test_operands_that_do_not_fit(self, changes: Any) -> None:
        given = {"x": torch.zeros(4, 8), "weight": torch.zeros(3, 5, 8), **changes}
        with pytest.raises(ValueError, match=r"x must be \[R, K\], weight \[E, N, K\]"):
            torch.ops.mxfp4.grouped_linear(*given.values(), self.OFFSETS)

    def test_all_parts_run_in_the_kernels_that_are_named(self) -> None:
        packed = pack(mlp()).experts
        given = [
            getattr(packed, f"{name}_{part}")
            for name in ("gate_up_proj", "down_proj")
            for part in ("blocks", "bias")
        ]
        scales = packed.gate_up_proj_scales, packed.down_proj_scales
        a, b = torch.zeros(6, 4, 64), torch.zeros(6, 192, 4)

        def call(x: Tensor, factors: list[Tensor]) -> Tensor:
            routes = torch.zeros(7, 2, dtype=torch.long), torch.ones(7, 2)
            result: Tensor = torch.ops.mxfp4.moe.adapted(
                x, *routes, *given, 96, 1.7, 7.0, *scales, factors, [1.0], [], [], kernels="pytorch"
            )
            return result

        graph = make_fx(lambda x, a, b: call(x, [a, b]))(hidden()[0], a, b).graph
        calls = [n for n in graph.nodes if re.search("matmul_ogs|routing", str(n.target))]
        assert len(calls) == 3
        assert all("pytorch" in (*n.args, *n.kwargs.values()) for n in calls)
        with pytest.raises(ValueError, match="1 scalings need two factors each, and there are 1"):
            call(hidden()[0], [a])


@torch.no_grad()
def test_merge_and_unload_leaves_packed_experts() -> None:
    whole = pack(mlp())
    held = whole.experts
    packed = adapted(whole)
    packed.merge_adapter()
    expected = packed(hidden())[0]
    packed.unmerge_adapter()
    merged = packed.merge_and_unload()
    assert merged.experts is held
    assert torch.equal(merged(hidden())[0], expected)


@torch.no_grad()
def test_freed_weights() -> None:
    """Uncompiled calls take the layout that the store has; merging and unmerging work as well."""
    packed, x = adapted(pack(mlp())), hidden()
    exact = adapted(mlp(form="batched_mm")).double()(x.double())[0]
    before, expected = experts_of(packed).down_proj_blocks.clone(), packed(x)[0]
    freeing = compile_with(packed, options={"free_weights": True})
    compiled = freeing(x)[0]
    experts = experts_of(packed)
    assert not experts.down_proj_blocks.untyped_storage().nbytes()
    assert_as_accurate(packed(x)[0], expected, exact)
    packed.merge_adapter()
    assert not torch.equal(freeing(x)[0], compiled)
    packed.unmerge_adapter()
    assert torch.equal(freeing(x)[0], compiled)
    assert torch.equal(STORE.values_of(experts.down_proj_blocks), before)


@torch.no_grad()
def test_ids_of_experts_that_are_held_elsewhere_count_nothing() -> None:
    experts, x = adapted(pack(mlp())).base_model.model.experts, hidden(2)[0]
    indices, weights = torch.tensor([[0, 6], [6, 6]]), torch.ones(2, 2)
    alone = experts(x[:1], torch.tensor([[0]]), torch.ones(1, 1))
    assert torch.equal(experts(x, indices, weights), torch.cat([alone, torch.zeros(1, 64)]))


@torch.no_grad()
def test_an_adapter_stays_when_the_experts_become_dense() -> None:
    packed = adapted(pack(model(num_hidden_layers=1)))
    expected, exact = packed(tokens()).logits, in_float64(packed)(tokens()).logits
    mxfp4_fx.dequantize(packed)
    assert_as_accurate(packed(tokens()).logits, expected, exact)
    packed.merge_adapter()
    packed.unmerge_adapter()
    merged = packed.merge_and_unload()
    assert_as_accurate(merged(tokens()).logits, expected, exact)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_parameters": ["experts.gate_up_proj_bias"]},
        {"target_parameters": ["experts.down_proj_blocks"]},
        {"target_parameters": WEIGHTS, "target_modules": ["experts"]},
    ],
)
def test_other_targets_are_refused(changes: Any) -> None:
    with pytest.raises((OptionError, ValueError), match=r"experts|PackedExperts"):
        adapted(pack(mlp()), lora(**changes))


@pytest.mark.parametrize("kind", ["shards", "cuts"])
def test_shards_are_refused(kind: str) -> None:
    whole = pack(mlp())
    getattr(whole.experts, kind)["down_proj_bias"] = None
    with pytest.raises(OptionError, match="spread over processes take no adapters"):
        adapted(whole)


def test_nothing_is_left_of_what_peft_was_shown() -> None:
    whole = pack(mlp())
    before = [*dict(whole.named_parameters())]
    adapted(whole).unload()
    assert [*dict(whole.named_parameters())] == before


def test_verify_says_what_it_does_not_compare() -> None:
    told = mxfp4_fx.explain(adapted(pack(mlp())), hidden(), options={"verify": True})
    assert "verify=True compares no experts with adapters" in str(told)
