"""Which changes of a weight are noticed, by whichever way they came; and which are not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Graphs, compile_with, hidden, mlp, pack
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD, Adagrad, AdamW

import mxfp4_fx
from mxfp4_fx.core.errors import NanWeightsWarning, RepeatedSwizzleWarning
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.store import STORE, WeightStore
from mxfp4_fx.weights.swizzle import swizzle_weight

LAYOUT = "cpu_panels"
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def values(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 64, 64), generator=torch.Generator().manual_seed(seed))


def parameter(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(values(seed))


def source(*tensors: Tensor) -> Source:
    """Of floats, or of blocks and scales."""
    return Source(tensors, FLOATS if len(tensors) == 1 else MXFP4)


def is_right(*tensors: Tensor) -> bool:
    """Whether what the store has of a source is what swizzling it now gives, bit for bit."""
    held = STORE.get(source(*tensors), LAYOUT)
    fresh = swizzle_weight(source(*(tensor.clone() for tensor in tensors)), LAYOUT)
    return all(torch.equal(a, b) for a, b in zip(held, fresh, strict=True))


def step(cls: Any, **kwargs: Any) -> Callable[[nn.Parameter], Any]:
    def run(weight: nn.Parameter) -> None:
        weight.grad = values(7)
        cls([weight], lr=0.5, **kwargs).step()

    return run


def compiled_step(weight: nn.Parameter) -> None:
    weight.grad = values(7)
    optimizer = SGD([weight], lr=0.5)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()


def data(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], Any]:
    return lambda weight: setattr(weight, "data", make(weight.data))


NOTICED: dict[str, Callable[[nn.Parameter], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "a view's mul_": lambda w: w[0].mul_(2),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "out=": lambda w: torch.ones(w.shape, out=w),
    "set_": lambda w: w.set_(values(1)),
    "init": lambda w: nn.init.normal_(w, mean=1.0),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(values(1).flatten(), [w]),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, parameter(1)),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w], 2.0),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [values(1)]),
    "for-loop SGD": step(SGD, foreach=False),
    "foreach SGD": step(SGD, foreach=True),
    "fused SGD": step(SGD, fused=True),
    "fused AdamW": step(AdamW, fused=True),
    "fused Adagrad": step(Adagrad, fused=True),
    "compiled SGD": compiled_step,
    "data": data(lambda t: values(1)),
    "data, expanded": data(lambda t: t[:1].expand_as(t)),
    "data, transposed": data(lambda t: t.transpose(1, 2)),
    "data, another place in its memory": data(lambda t: torch.cat([t, t * 2])[2:]),
    "data, negative by a bit": data(torch._neg_view),
}


@pytest.mark.parametrize("way", NOTICED)
def test_noticed(way: str) -> None:
    weight = parameter()
    assert is_right(weight)
    before = weight.clone()
    NOTICED[way](weight)
    assert not torch.equal(weight, before)
    assert is_right(weight)


@pytest.mark.parametrize("scales_too", [False, True])
def test_packed_bytes(scales_too: bool) -> None:
    module = pack(mlp()).experts
    pair = module.down_proj_blocks, module.down_proj_scales
    assert is_right(*pair)
    pair[scales_too].copy_(pair[scales_too].flip(0))
    assert is_right(*pair)


def test_new_memory_at_the_old_address() -> None:
    """As an offloader assigns it; the allocator hands out the same address sooner or later."""
    weight = parameter()
    for seed in range(20):
        assert is_right(weight)
        weight.data = torch.empty(0)
        weight.data = values(seed + 1)
    assert is_right(weight)


# Nothing of torch counts these. README names them, and `refresh` is for them.
UNNOTICED: dict[str, Callable[[nn.Parameter], Any]] = {
    "data.mul_": lambda w: w.data.mul_(2),
    "numpy": lambda w: w.detach().numpy().__imul__(2),
    "DLPack": lambda w: torch.from_dlpack(w.detach()).mul_(2),
    "untyped_storage().copy_": lambda w: w.untyped_storage().copy_(values(1).untyped_storage()),
    "a fused kernel without its optimizer": lambda w: torch._fused_sgd_(
        *([w], [values(7)], []),
        weight_decay=0.0,
        momentum=0.0,
        lr=1.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "a collective": lambda w: dist.scatter(w, [values(1)], 0),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("way", UNNOTICED)
def test_noticed_after_refresh(way: str) -> None:
    module = nn.ParameterList([parameter()])
    assert is_right(module[0])
    UNNOTICED[way](module[0])
    assert not is_right(module[0])
    assert mxfp4_fx.refresh(module) == 1
    assert is_right(module[0])


@pytest.mark.usefixtures("process_group")
def test_a_collective_that_copies_is_noticed() -> None:
    weight = parameter()
    assert is_right(weight)
    dist.all_gather([weight], values(1))
    assert is_right(weight)


def test_an_optimizer_that_is_interrupted() -> None:
    class Interrupted(SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            raise KeyboardInterrupt

    weight = parameter()
    assert is_right(weight)
    weight.grad = values(7)
    with pytest.raises(KeyboardInterrupt):
        Interrupted([weight], lr=0.5, fused=True).step()
    assert is_right(weight)


def test_a_fused_step_while_another_thread_compiles() -> None:
    """``torch.compiler.is_compiling()`` is true in all threads then."""
    weight, compiling, stepped = parameter(), threading.Event(), threading.Event()
    weight.grad = torch.ones_like(weight)
    STORE.get(source(weight), LAYOUT)

    def wait(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiling.set()
        stepped.wait()
        return gm.forward

    thread = threading.Thread(target=torch.compile(lambda x: x + 1, backend=wait), args=(weight,))
    thread.start()
    compiling.wait()
    SGD([weight], lr=0.5, fused=True).step()
    stepped.set()
    thread.join()
    assert is_right(weight)


def test_frozen_weights_of_an_optimizer_are_not_swizzled_again() -> None:
    frozen, trained = parameter().requires_grad_(False), nn.Parameter(torch.ones(2))
    parts, before = STORE.get(source(frozen), LAYOUT), STORE.swizzled
    trained.grad = torch.ones(2)
    AdamW([frozen, trained], fused=True).step()
    assert STORE.get(source(frozen), LAYOUT) is parts
    assert STORE.swizzled == before


def test_buffers_and_other_attributes_are_refreshed() -> None:
    module = nn.Module()
    module.register_buffer("buffer", values(1))
    module.attribute = values(2)
    for weight in (module.buffer, module.attribute):
        assert is_right(weight)
        weight.data.mul_(2)
    assert mxfp4_fx.refresh(module) == 2
    assert is_right(module.buffer)
    assert is_right(module.attribute)


def test_a_write_through_a_weight_that_shares_the_memory() -> None:
    """Two parameters, tied by .data, have one memory and two counters of versions."""
    first, second, x = mlp(seed=1), mlp(seed=2), hidden()
    second.experts.down_proj.data = first.experts.down_proj.data

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return second(x)[0], first(x)[0]

    compiled = compile_with(both)
    compiled(x)
    first.experts.down_proj.mul_(-2)
    for actual, expected in zip(compiled(x), both(x), strict=True):
        assert (actual - expected).abs().max() <= 320 * 2**-24 * expected.abs().max()


def test_weights_in_one_memory_that_do_not_overlap_are_separate() -> None:
    flat = values(0, 4, 64, 64)
    first, second = nn.Parameter(flat[:2].detach()), nn.Parameter(flat[2:].detach())
    parts = STORE.get(source(second), LAYOUT)
    STORE.get(source(first), LAYOUT)
    first.data.copy_(values(1))
    STORE.refresh([first])
    assert is_right(first)
    assert STORE.get(source(second), LAYOUT) is parts


def test_another_place_in_the_same_memory() -> None:
    flat = values(0, 4, 64, 64)
    weight = nn.Parameter(flat[:2].detach())
    assert is_right(weight)
    weight.data = flat[2:]
    assert is_right(weight)


def test_views_that_are_made_anew_are_swizzled_once() -> None:
    flat, before = values(0, 4, 64, 64), STORE.swizzled
    for part in (flat[:2], flat[2:], flat[:2], flat[2:]):
        assert is_right(part)
    assert STORE.swizzled == before + 2
    flat[3].mul_(2)
    assert is_right(flat[:2])
    assert is_right(flat[2:])


@pytest.mark.usefixtures("process_group")
def test_local_parts_of_a_dtensor_are_swizzled_once() -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = nn.Parameter(DTensor.from_local(values(), mesh, [Shard(0)]))
    before = STORE.swizzled
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            assert is_right(whole.to_local())
    assert STORE.swizzled == before + 1
    whole.to_local().mul_(2)
    assert is_right(whole.to_local())


@pytest.mark.usefixtures("process_group")
def test_weights_that_fsdp_gathers_are_right_and_told() -> None:
    module, plain, x = mlp(), mlp(), hidden()
    sharded = fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    sharded.compile(backend="mxfp4", options={"inner": "eager"})
    sharded(x)
    # A root keeps what FSDP made, which differs from its origin as soon as it is written to.
    for weight in sharded.experts.parameters():
        weight.mul_(1)
    with pytest.warns(RepeatedSwizzleWarning, match=r"down_proj of .* as FSDP does"):
        sharded(x)
    for _ in range(4):
        for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
            one.mul_(-1), other.mul_(-1)
        expected = plain(x)[0]
        assert (sharded(x)[0] - expected).abs().max() <= 320 * 2**-24 * expected.abs().max()


def test_weights_that_are_new_at_each_call_are_told_once() -> None:
    module, x = mlp().requires_grad_(False), hidden()
    compiled = compile_with(module)
    told = []
    for _ in range(6):
        for name in ("gate_up_proj", "down_proj"):
            weight = nn.Parameter(getattr(module.experts, name).clone(), requires_grad=False)
            setattr(module.experts, name, weight)
            del weight
        try:
            compiled(x)
        except RepeatedSwizzleWarning as warning:
            told.append(str(warning))
    assert len(told) == 1
    assert "_proj of experts is swizzled" in told[0]


def repeats(run: Callable[[], Any]) -> list[str]:
    """What is told of weights that are swizzled at each call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, RepeatedSwizzleWarning)]


@pytest.mark.parametrize("calls", [1, 2])
def test_models_that_share_a_graph_one_after_the_other_are_not_told(calls: int) -> None:
    def run() -> None:
        for seed in range(5):
            module, x = mlp(seed=seed), hidden()
            compiled = compile_with(module)
            for _ in range(calls):
                compiled(x)
            del module, compiled
            gc.collect()

    assert not repeats(run)


def test_a_model_that_gets_other_weights_before_some_calls_is_not_told() -> None:
    """As a server does that loads new weights, then reads a prompt and writes an answer."""
    module, prompt = mlp().requires_grad_(False), hidden()
    token = prompt[:, :1].contiguous()
    graphs = Graphs()  # two: that for prompts never finds a weight that is swizzled
    compiled = compile_with(module, graphs, dynamic=False)

    def run() -> None:
        for seed in range(5):
            module.load_state_dict(mlp(seed=seed).state_dict(), assign=True)
            for x in (prompt, token, token):
                compiled(x)

    assert not repeats(run)
    assert len(graphs.seen) == 2


def test_a_storage_that_moves_once_is_not_told() -> None:
    module, x = mlp().requires_grad_(False), hidden()
    compiled = compile_with(module)
    compiled(x)
    module.share_memory()
    assert not repeats(lambda: [compiled(x) for _ in range(3)])


def test_a_storage_that_moves_before_each_call_is_told_once() -> None:
    module, x = mlp().requires_grad_(False), hidden()
    compiled = compile_with(module)

    def run() -> None:
        for _ in range(5):
            compiled(x)
            storage = module.experts.down_proj.untyped_storage()
            storage.resize_(2 * storage.nbytes())

    assert ["down_proj" in told for told in repeats(run)] == [True]


def test_swapping_tensors_after_compiling() -> None:
    module, other, x = mlp(seed=1), mlp(seed=2), hidden()
    compiled = compile_with(module)
    compiled(x)
    gc.collect()  # see the next test
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(one, two)
    expected = module(x)[0]
    assert (compiled(x)[0] - expected).abs().max() <= 320 * 2**-24 * expected.abs().max()


def test_swapping_freed_tensors() -> None:
    first, second = pack(mlp(seed=1)), pack(mlp(seed=2))
    x = hidden()
    expected = compile_with(second)(x)[0]
    compiled = compile_with(first, options={"free_weights": True})
    compiled(x)
    gc.collect()  # torch swaps no tensor that its own garbage still refers to weakly
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.utils.swap_tensors(one, two)
    assert torch.equal(compiled(x)[0], expected)


def test_an_interrupted_swizzle_leaves_nothing_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mxfp4_fx.weights import source as source_module

    weight, store = parameter(), WeightStore()
    old = weight.data
    store.get(source(weight), "row_major")
    real, calls = source_module.quantize, []

    def interrupted(expert: Tensor) -> Any:
        calls.append(expert)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(expert)

    monkeypatch.setattr(source_module, "quantize", interrupted)
    weight.data = values(1)
    with pytest.raises(KeyboardInterrupt):
        store.get(source(weight), "row_major")
    weight.data = old
    expected = swizzle_weight(source(old), "row_major")
    for part, wanted in zip(store.get(source(weight), "row_major"), expected, strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinite_weights_are_told(layout: str, value: float) -> None:
    weight = parameter()
    weight[1, 3, 5] = value
    with pytest.warns(NanWeightsWarning, match=r"down_proj of it has .* \(experts 1\)"):
        WeightStore().get(source(weight), layout, "down_proj of it")


def test_layers_that_share_blocks_and_not_scales() -> None:
    first, second = pack(mlp(seed=1)), pack(mlp(seed=2))
    second.experts.gate_up_proj_blocks = first.experts.gate_up_proj_blocks
    x = hidden()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return first(x)[0], second(x)[0]

    graphs = Graphs()
    compiled = compile_with(both, graphs)
    expected = both(x)
    for free in (False, True):
        before = STORE.swizzled
        if free:
            compiled = compile_with(both, options={"free_weights": True})
        for actual, wanted in zip(compiled(x), expected, strict=True):
            assert (actual - wanted).abs().max() <= 320 * 2**-24 * wanted.abs().max()
        assert free or STORE.swizzled == before + 4
        again = STORE.swizzled
        compiled(x)
        assert free or STORE.swizzled == again
    assert mxfp4_fx.restore(first) + mxfp4_fx.restore(second) == 7
    for actual, wanted in zip(both(x), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_forgetting_gives_memory_back_and_nothing_is_lost() -> None:
    module, freed, x = mlp(seed=1), pack(mlp(seed=2)), hidden()
    compiled = compile_with(module)
    expected = compiled(x)[0]
    freeing = compile_with(freed, options={"free_weights": True})
    expected_of_freed = freeing(x)[0]
    part = weakref.ref(STORE.get(source(module.experts.down_proj), LAYOUT)[0])
    gc.collect()  # what an earlier test left behind must not count
    before = len(STORE)
    assert mxfp4_fx.forget(nn.ModuleList([module, freed])) == 2
    gc.collect()
    assert (len(STORE), part()) == (before - 2, None)
    assert torch.equal(compiled(x)[0], expected)
    assert torch.equal(freeing(x)[0], expected_of_freed)


def test_what_is_restored_stays_when_it_is_forgotten() -> None:
    module = pack(mlp())
    compiled = compile_with(module, options={"free_weights": True})
    compiled(hidden())
    assert mxfp4_fx.restore(module) == 4
    assert mxfp4_fx.forget(module) == 2
    compiled(hidden())
    assert type(module.experts.down_proj_blocks) is nn.Parameter


def test_copies_of_a_weight_are_other_weights() -> None:
    for weight in (parameter(), values()):
        assert is_right(weight)
        for other in (copy.copy(weight), copy.deepcopy(weight)):
            weight.mul_(2)
            assert is_right(other)
            assert is_right(weight)


def test_a_saved_weight_takes_nothing_along() -> None:
    for weight in (parameter(), values()):
        STORE.get(source(weight), LAYOUT)
        file = io.BytesIO()
        torch.save(weight, file)
        file.seek(0)
        back = torch.load(file, weights_only=True)
        assert torch.equal(back, weight)
        assert is_right(back)
        assert is_right(pickle.loads(pickle.dumps(weight)))
