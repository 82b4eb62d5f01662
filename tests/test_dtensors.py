"""Weights that are DTensors are weights like any other: `passes/localize.py`, and the store."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Graphs, compile_with, hidden, mlp, model, pack, tokens
from sharded import as_dtensor, sharded
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import mxfp4_fx
from mxfp4_fx.core import torch_private_distributed
from mxfp4_fx.core.errors import KeptWeightsWarning, MissedRewriteWarning
from mxfp4_fx.passes.regions import region_of
from mxfp4_fx.weights.source import FLOATS, Source
from mxfp4_fx.weights.store import STORE

STRICT = {"strict": True}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Compare results of float32 experts, of which each of 320 roundings is at most 2^-24."""
    assert (actual - expected).abs().max() <= 320 * 2**-24 * expected.abs().max()


def swizzles(run: Callable[[], Any]) -> int:
    before = STORE.swizzled
    run()
    return STORE.swizzled - before


no_gradients = pytest.mark.usefixtures("no_gradients")


@no_gradients
@pytest.mark.exhaustive
def test_inductor_computes_with_shards() -> None:
    module, x = sharded(mlp()), hidden()
    assert_near(compile_with(module, inner="inductor", options=STRICT)(x)[0], mlp()(x)[0])


@no_gradients
@pytest.mark.parametrize(
    "placement", [Shard(0), pytest.param(Replicate(), marks=pytest.mark.exhaustive)]
)
def test_experts_are_rewritten_and_swizzled_once(placement: Any) -> None:
    module, x, graphs = sharded(mlp(), placement), hidden(), Graphs()
    compiled = compile_with(module, inner=graphs, options=STRICT)
    assert [swizzles(lambda: compiled(x)) for _ in range(3)] == [2, 0, 0]
    assert_near(compiled(x)[0], mlp()(x)[0])
    (graph,) = graphs.seen
    inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    assert not any(isinstance(value, DTensor) for value in inputs)
    assert not graph.graph.find_nodes(op="call_method", target="to_local")


@no_gradients
def test_packed_experts_are_rewritten_and_swizzled_once() -> None:
    module, x = sharded(pack(mlp())), hidden()
    compiled = compile_with(module, options=STRICT)
    assert [swizzles(lambda: compiled(x)) for _ in range(2)] == [2, 0]
    assert_near(compiled(x)[0], mlp()(x)[0])


@no_gradients
def test_shards_that_no_graph_takes_from_a_dtensor_are_swizzled_once() -> None:
    module, x = sharded(mlp(), apart=True), hidden()
    compiled = compile_with(module, options=STRICT)
    assert [swizzles(lambda: compiled(x)) for _ in range(3)] == [2, 0, 0]
    with torch.inference_mode():
        assert swizzles(lambda: compiled(x)) == 0
    assert_near(compiled(x)[0], mlp()(x)[0])


@no_gradients
def test_inference_tensors_are_swizzled_once() -> None:
    with torch.inference_mode():
        module, x = sharded(mlp(), apart=True), hidden()
    compiled = compile_with(module, options=STRICT)
    with torch.inference_mode():
        assert [swizzles(lambda: compiled(x)) for _ in range(3)] == [2, 0, 0]


def stepped(whole: nn.Parameter, optimizer: Any = SGD, **kwargs: Any) -> None:
    whole.requires_grad_(True)
    whole.grad = torch.ones_like(whole)
    optimizer([whole], lr=0.5, **kwargs).step()
    whole.grad = None
    whole.requires_grad_(False)


def loaded(whole: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = whole
    module.load_state_dict({"weight": whole.detach() * 2})


NOTICED: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(w.detach() * 2),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "to_local().mul_": lambda w: w.to_local().mul_(2),
    "load_state_dict": loaded,
    "SGD": stepped,
    "foreach SGD": lambda w: stepped(w, foreach=True),
    "fused AdamW": lambda w: stepped(w, AdamW, fused=True),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, as_dtensor(w.to_local() * 2)),
}


@no_gradients
@pytest.mark.parametrize("apart", [False, True])
def test_changes_are_noticed(apart: bool) -> None:
    module, x = sharded(mlp(), apart=apart), hidden()
    compiled = compile_with(module, options=STRICT)
    compiled(x)
    for way, change in NOTICED.items():
        before = module(x)[0]
        change(module.experts.gate_up_proj)
        expected = module(x)[0]
        assert not torch.equal(before, expected), way
        assert swizzles(lambda: compiled(x)) == 1, way
        # After an optimizer's step the weights are no MXFP4 values, so those are compared.
        local = module.experts.gate_up_proj.to_local()
        assert swizzled_values(local) == swizzled_values(local.clone()), way


def swizzled_values(local: Tensor) -> list[Any]:
    return [part.tolist() for part in STORE.get(Source((local,), FLOATS), "cpu_panels")]


@no_gradients
def test_writes_through_a_dtensor_that_no_model_has_need_refresh() -> None:
    module, x = sharded(mlp()), hidden()
    compiled = compile_with(module, options=STRICT)
    compiled(x)
    as_dtensor(module.experts.gate_up_proj.to_local()).mul_(2)
    assert mxfp4_fx.refresh(module) == 2
    assert_near(compiled(x)[0], module(x)[0])


class Tied(nn.Module):
    """Two MLPs whose experts have a weight in the same memory, each by a DTensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = sharded(mlp()), sharded(mlp(seed=1))
        self.second.experts.gate_up_proj = as_dtensor(self.first.experts.gate_up_proj.to_local())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


@no_gradients
def test_a_change_through_either_of_two_dtensors_of_one_memory_is_noticed() -> None:
    module, x = Tied(), hidden()
    compiled = compile_with(module, options=STRICT)
    compiled(x)
    assert swizzles(lambda: compiled(x)) == 0
    for one in (module.first, module.second):
        one.experts.gate_up_proj.mul_(2)
        assert_near(compiled(x), module(x))


@no_gradients
@pytest.mark.parametrize(
    "form", ["batched_mm", pytest.param("grouped_mm", marks=pytest.mark.exhaustive)]
)
def test_a_partial_dtensor_is_a_miss(form: str) -> None:
    module, x = sharded(mlp(form=form), Partial()), hidden()
    with pytest.warns(MissedRewriteWarning) as told:
        result = compile_with(module)(x)[0]
    assert "experts: gate_up is a shard of a DTensor that cannot be read as it is: its" in str(
        told[0].message
    )
    assert "placement is Partial" in str(told[0].message)
    assert_near(result, module(x)[0])


@no_gradients
@pytest.mark.parametrize(
    "form", ["batched_mm", pytest.param("grouped_mm", marks=pytest.mark.exhaustive)]
)
def test_experts_that_stay_are_told_and_run_beside_what_is_rewritten(form: str) -> None:
    whole, ids = model(num_hidden_layers=1, form=form), tokens()
    sharded(whole.model.layers[0].mlp)
    options = {"skip": ["model.layers.0.mlp.experts"]}
    told = mxfp4_fx.explain(whole, ids, options=options)
    assert [miss.layer for miss in told.misses] == options["skip"]
    assert told.attention
    assert_near(compile_with(whole, options=options)(ids).logits, whole(ids).logits)


class Writes(nn.Module):
    """An MLP of DTensors, and a write through another DTensor to the memory of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = sharded(mlp())
        self.other = as_dtensor(self.mlp.experts.gate_up_proj.to_local())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x)[0]
        self.other.mul_(2)
        return result


@no_gradients
def test_a_write_in_the_graph_through_another_dtensor_is_a_miss() -> None:
    with pytest.warns(MissedRewriteWarning, match="gate_up is written to in the graph, by mul_"):
        compile_with(Writes())(hidden())


class Fills(nn.Module):
    """An MLP whose weight is written to in the second call, outside of any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.calls = sharded(mlp()), 0

    @torch.compiler.disable
    def fill(self) -> None:
        self.calls += 1
        if self.calls == 2:
            self.mlp.experts.gate_up_proj.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        self.fill()
        result: Tensor = self.mlp(x)[0]
        return result


@no_gradients
def test_a_write_in_the_call_itself_is_noticed() -> None:
    compiled, other, x = compile_with(Fills(), options=STRICT), Fills(), hidden()
    for _ in range(2):
        assert_near(compiled(x), other(x))


@no_gradients
def test_a_pending_dtensor_is_a_miss() -> None:
    module, x, mesh = sharded(mlp()), hidden(), init_device_mesh("cpu", (1,))
    pending = all_reduce(module.experts.gate_up_proj.to_local(), "sum", mesh)
    whole = DTensor.from_local(pending, mesh, [Replicate()])
    module.experts.gate_up_proj = nn.Parameter(whole, requires_grad=False)
    with pytest.warns(MissedRewriteWarning, match="is an AsyncCollectiveTensor, the result"):
        result = compile_with(module)(x)[0]
    assert_near(result, mlp()(x)[0])


def test_a_dtensor_that_wants_a_gradient_is_a_miss() -> None:
    module, x = sharded(mlp()), hidden()
    with pytest.warns(MissedRewriteWarning, match="it requires a gradient, which MXFP4 experts"):
        compile_with(module)(x)[0].sum().backward()
    gradient = module.experts.gate_up_proj.grad.to_local()
    other = sharded(mlp())
    other(x)[0].sum().backward()
    assert torch.equal(gradient, other.experts.gate_up_proj.grad.to_local())


def test_gradients_go_through_frozen_dtensors() -> None:
    module, x = sharded(mlp().requires_grad_(False)), hidden().requires_grad_()
    compile_with(module, inner="aot_eager", options=STRICT)(x)[0].sum().backward()
    (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert x.grad is not None
    assert_near(x.grad, expected)


class Returns(nn.Module):
    """An MLP of DTensors, and what is done to the local tensor of a weight besides."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.mlp, self.read = sharded(mlp()), read

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)[0], self.read(self.mlp.experts.gate_up_proj.to_local())


@no_gradients
@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda local: local, "the graph returns its local tensor"),
        (lambda local: local.transpose_(1, 2) + 1, "transpose_ changes the shape or the memory"),
    ],
)
def test_a_local_tensor_that_must_be_a_tensor_of_its_own_is_a_miss(
    read: Callable[[Tensor], Any], reason: str
) -> None:
    module, x = Returns(read), hidden()
    with pytest.warns(MissedRewriteWarning, match=reason):
        compiled = compile_with(module)(x)
    expected = module(x)
    assert torch.equal(compiled[1], expected[1])
    assert compiled[1] is not torch_private_distributed.shard_of(module.mlp.experts.gate_up_proj)


def _shard(name: str) -> Any:
    return property(lambda experts: experts._parameters[name].to_local())


class WithProperties(GptOssExperts):
    """Experts whose code changes no attribute, which it may not in a checkpoint."""

    gate_up_proj, gate_up_proj_bias = _shard("gate_up_proj"), _shard("gate_up_proj_bias")
    down_proj, down_proj_bias = _shard("down_proj"), _shard("down_proj_bias")


def in_nested_regions(layers: list[Any]) -> Callable[[Tensor], Tensor]:
    @torch.compiler.nested_compile_region
    def layer(module: Any, x: Tensor) -> Tensor:
        return x + module(x)[0]

    return lambda x: layer(layers[1], layer(layers[0], x))


def in_checkpoints(layers: list[Any]) -> Callable[[Tensor], Tensor]:
    def both(x: Tensor) -> Tensor:
        for module in layers:
            x = x + checkpoint(module, x, use_reentrant=False)[0]
        return x

    return both


@pytest.mark.parametrize("regions", [in_nested_regions, in_checkpoints])
def test_regions_get_shards(regions: Callable[[list[Any]], Callable[[Tensor], Tensor]]) -> None:
    layers = [sharded(mlp(seed=seed).requires_grad_(False)) for seed in (0, 1)]
    for layer in layers:
        layer.experts.__class__ = WithProperties
        del layer.experts.forward
    graphs, x = Graphs(), hidden()
    compiled = compile_with(regions(layers), inner=graphs, options=STRICT)
    assert [swizzles(lambda: compiled(x)) for _ in range(2)] == [4, 0]
    expected = x
    for seed in (0, 1):
        expected = expected + mlp(seed=seed)(expected)[0]
    assert_near(compiled(x), expected)
    assert any(region_of(node) for node in graphs.seen[0].graph.nodes)
    layers[1].experts._parameters["down_proj"].mul_(2)
    assert swizzles(lambda: compiled(x)) == 1


def test_a_region_inside_of_a_region_gets_no_shards() -> None:
    layer, x = sharded(mlp().requires_grad_(False)), hidden()
    layer.experts.__class__ = WithProperties
    del layer.experts.forward
    inner = in_checkpoints([layer])
    with pytest.warns(MissedRewriteWarning, match="it is given to a region inside of another one"):
        result = compile_with(lambda x: checkpoint(inner, x, use_reentrant=False))(x)
    assert_near(result, x + mlp()(x)[0])


@no_gradients
def test_verify_compares_experts_of_dtensors() -> None:
    module, x = sharded(mlp()), hidden()
    compiled = compile_with(module, options={**STRICT, "verify": True})
    assert_near(compiled(x)[0], mlp()(x)[0])
    module.double().float()  # by swap_tensors, which refuses tensors with weak references
    assert_near(compiled(x)[0], mlp()(x)[0])


@no_gradients
@pytest.mark.parametrize("apart", [False, True])
def test_a_shard_is_not_freed_which_is_told_once(apart: bool) -> None:
    module, x = sharded(mlp(), apart=apart), hidden()
    compiled = compile_with(module, options={**STRICT, "free_weights": True})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_near(compiled(x)[0], mlp()(x)[0])
    told = [str(w.message) for w in caught if issubclass(w.category, KeptWeightsWarning)]
    assert len(told) == 2
    assert "keeps the memory of down_proj of " in told[1]
    assert mxfp4_fx.restore(module) == 0
    saved, expected = module.state_dict(), mlp().state_dict()
    assert all(torch.equal(_whole(saved[name]), expected[name]) for name in expected)


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@no_gradients
def test_what_fsdp_copies_from_this_process_alone_is_swizzled_once() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("efsdp", "ep"))
    module, x = sharded(mlp(), mesh=mesh["ep"]), hidden()
    fully_shard(module.experts, mesh=mesh["efsdp"], reshard_after_forward=True)
    compiled = compile_with(module, options=STRICT)
    assert [swizzles(lambda: compiled(x)) for _ in range(3)] == [2, 0, 0]
    module.experts.reshard()
    for weight in module.experts.parameters():
        weight.mul_(2)
    assert swizzles(lambda: compiled(x)) == 2
    assert_near(compiled(x)[0], module(x)[0])


@no_gradients
@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.RepeatedSwizzleWarning")
def test_what_fsdp_has_not_copied_again_is_as_it_was() -> None:
    module, x = mlp(), hidden()
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=False)
    wholes = dict(module.named_parameters())
    compiled = compile_with(module, options=STRICT)
    compiled(x)
    wholes["experts.down_proj"].mul_(2)
    for _ in range(2):
        assert_near(compiled(x)[0], mlp()(x)[0])
    module.reshard()
    for _ in range(2):
        assert_near(compiled(x)[0], module(x)[0])


def test_without_torch_distributed_nothing_is_a_dtensor(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sharded(mlp())
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor")
    assert torch_private_distributed.dtensors_in([module.experts]) == []
    assert not torch_private_distributed.is_dtensor(module.experts.down_proj)
    assert not torch_private_distributed.is_dtensor(torch.ones(2))
