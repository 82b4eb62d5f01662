"""Swizzled weights at run time: whose they are, when they are made again, when they go."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from combinations import covering
from implementations import Kernels
from kept import in_order, sources
from models import Graphs, Layers, compile_with, hidden, mlp, on_mxfp4_grid, swizzled
from processes import LAST_RESORT
from torch import Tensor, nn

import mxfp4_fx
from mxfp4_fx.core import mxfp8
from mxfp4_fx.core.errors import WeightError
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.core.layouts import LAYOUTS, MXFP8_ROWS
from mxfp4_fx.core.orders import Order
from mxfp4_fx.weights import source as source_module
from mxfp4_fx.weights import store as store_module
from mxfp4_fx.weights import swizzle
from mxfp4_fx.weights.source import FLOATS, LINEAR, MXFP4, Source, encoding_of
from mxfp4_fx.weights.store import STORE, WeightStore
from mxfp4_fx.weights.swizzle import swizzle_weight

pytestmark = pytest.mark.usefixtures("no_gradients")


def floats(weight: Tensor) -> Source:
    return Source((weight,), FLOATS)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Float32 on both sides, same weights: apart by the rounding of sums of H and I products."""
    bound = 2 * (64 + 96) * 2**-24 * expected.abs().max()
    return bool((actual - expected).abs().max() <= bound)


def new_weight(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return on_mxfp4_grid(torch.randn(like.shape, generator=generator) * 0.1)


def test_one_graph_serves_two_modules() -> None:
    first, second, x = mlp(seed=1), mlp(seed=2), hidden()
    graphs = Graphs()
    for module in (first, second):
        out, _ = compile_with(module, graphs)(x)
        assert close(out, module(x)[0])
    assert len(graphs.seen) == 1


def test_layers_of_one_model_compiled_one_by_one() -> None:
    whole, x = Layers(), hidden()
    expected = whole(x)
    graphs = Graphs()
    for layer in whole.layers:
        layer.compile(backend="mxfp4", options={"inner": graphs})
    assert close(whole(x), expected)
    assert len(graphs.seen) == 1


def test_tied_experts_are_swizzled_once() -> None:
    tied, x = Layers(), hidden()
    tied.layers[1].experts = tied.layers[0].experts
    assert close(compile_with(tied)(x), tied(x))
    assert mxfp4_fx.refresh(tied) == 2


def test_prefill_and_decode_share_swizzled_weights() -> None:
    shared = Layers()
    graphs = Graphs()
    compiled = compile_with(shared, graphs, dynamic=False)
    compiled(hidden(7))
    made = [swizzled(layer.experts) for layer in shared.layers]
    compiled(hidden(1))
    assert len(graphs.seen) == 2
    for layer, parts in zip(shared.layers, made, strict=True):
        assert list(map(id, swizzled(layer.experts))) == list(map(id, parts))
    assert mxfp4_fx.refresh(shared) == 4


def test_load_state_dict_after_compiling() -> None:
    module, other, x = mlp(seed=1), mlp(seed=2), hidden()
    compiled = compile_with(module)
    compiled(x)
    module.load_state_dict(other.state_dict())
    assert close(compiled(x)[0], other(x)[0])


def test_load_state_dict_that_assigns_new_parameters() -> None:
    module, other, x = mlp(seed=1), mlp(seed=2), hidden()
    compiled = compile_with(module)
    compiled(x)
    module.load_state_dict(other.state_dict(), assign=True)
    assert close(compiled(x)[0], other(x)[0])


@pytest.mark.parametrize(
    ("how", "name"),
    covering(["copy_", "mul_", "data", "new parameter"], ["gate_up_proj", "down_proj"], strength=1),
)
def test_a_changed_weight_is_noticed(name: str, how: str) -> None:
    module, x = mlp(), hidden()
    compiled = compile_with(module)
    stale = compiled(x)[0]
    weight = getattr(module.experts, name)
    if how == "copy_":
        weight.copy_(new_weight(weight, 5))
    elif how == "mul_":
        weight.mul_(-2.0)
    elif how == "data":
        weight.data = new_weight(weight, 5)
    else:
        setattr(module.experts, name, nn.Parameter(new_weight(weight, 5)))
    assert close(compiled(x)[0], module(x)[0])
    assert not close(stale, module(x)[0])


def test_a_write_that_leaves_no_trace_is_seen_after_refresh() -> None:
    module, x = mlp(), hidden()
    compiled = compile_with(module)
    compiled(x)
    module.experts.down_proj.data.mul_(-2.0)
    assert not close(compiled(x)[0], module(x)[0])
    assert mxfp4_fx.refresh(module) == 2
    assert close(compiled(x)[0], module(x)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_weight_keeps_its_address(layout: str) -> None:
    """CUDA graphs record addresses, so a weight is swizzled again into the same memory."""
    source = nn.Parameter(new_weight(torch.empty(3, 32, 8), 0))
    store = WeightStore()
    first = [part.data_ptr() for part in store.get(floats(source), layout)]
    source.mul_(2.0)
    parts = store.get(floats(source), layout)
    assert [part.data_ptr() for part in parts] == first
    for blocks, scales, weight in zip(*parts, source, strict=True):
        order = LAYOUTS[layout].unswizzle(blocks, scales, n=8, k=32)
        assert torch.equal(dequantize(*order, torch.float32), weight.T)


@pytest.mark.parametrize("shape", [(3, 64, 40), (2, 32, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_parameter_of_another_shape_gets_new_memory(
    layout: str, shape: tuple[int, int, int]
) -> None:
    source = nn.Parameter(new_weight(torch.empty(3, 32, 8), 0))
    store = WeightStore()
    store.get(floats(source), layout)
    source.data = new_weight(torch.empty(shape), 1)
    for part, fresh in zip(
        store.get(floats(source), layout), swizzle_weight(floats(source), layout), strict=True
    ):
        assert torch.equal(part, fresh)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autograd_notices_that_a_weight_is_made_again(layout: str) -> None:
    source = nn.Parameter(new_weight(torch.empty(3, 32, 8), 0))
    store = WeightStore()
    before = [part._version for part in store.get(floats(source), layout)]
    source.mul_(2.0)
    assert all(
        p._version > v for p, v in zip(store.get(floats(source), layout), before, strict=True)
    )


@pytest.mark.filterwarnings("ignore::mxfp4_fx.core.errors.NanWeightsWarning")
def test_a_weight_that_is_made_again_of_the_same_values_serves_meanwhile() -> None:
    """Its panels' flags must not be down for a moment: here they hold NaN scales."""
    source = nn.Parameter(torch.zeros(1, 4096, 512))
    source[:, -1] = torch.inf
    kernels, offsets = Kernels("cpu"), torch.tensor([0, 40], dtype=torch.int32)
    x, bias = torch.ones(40, 4096, dtype=torch.bfloat16), torch.zeros(1, 512)
    done = threading.Event()

    def make_again() -> None:
        while not done.is_set():
            STORE.refresh([source])
            STORE.get(floats(source), kernels.layout)

    thread = threading.Thread(target=make_again)
    parts = STORE.get(floats(source), kernels.layout)
    thread.start()
    try:
        for _ in range(10):
            y = torch.ops.mxfp4.matmul_ogs(
                x, *parts, bias, 512, offsets, layout=kernels.layout, kernels=kernels.name
            )
            assert y.isnan().all()
    finally:
        done.set()
        thread.join()


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module, x = mlp(), hidden()
        compiled = compile_with(module)
        assert close(compiled(x)[0], module(x)[0])
        assert close(compiled(x)[0], module(x)[0])


def test_weights_swizzled_in_inference_mode_serve_a_backward() -> None:
    module, x = mlp().requires_grad_(False), hidden()
    compiled = compile_with(module, "aot_eager")
    with torch.inference_mode():
        compiled(x)
    with torch.enable_grad():
        x.requires_grad_()
        compiled(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_dead_model_frees_its_swizzled_weights() -> None:
    module = mlp()
    compiled = compile_with(module, "aot_eager")
    compiled(hidden())
    parts = [weakref.ref(part) for part in swizzled(module.experts)]
    del module, compiled
    gc.collect()
    assert all(part() is None for part in parts)


LOCKED_AT_THE_FORK = """
import os, signal, sys, threading
import torch
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.store import STORE

locked, done = threading.Event(), threading.Event()

def hold():
    with STORE._lock:
        locked.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
locked.wait()
child = os.fork()
if not child:
    signal.alarm(int(sys.argv[1]))
    STORE.get(Source((torch.zeros(1, 32, 8),), FLOATS), "row_major")
    os._exit(0)
status = os.waitpid(child, 0)[1]
done.set()
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.exhaustive
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    argv = [sys.executable, "-c", LOCKED_AT_THE_FORK, f"{LAST_RESORT:.0f}"]
    subprocess.run(argv, check=True)


def test_an_id_that_is_used_again_is_another_weight() -> None:
    store = WeightStore()
    for seed in range(20):  # Python hands out the same addresses soon
        source = new_weight(torch.empty(1, 32, 4), seed)
        parts = store.get(floats(source), "row_major")
        assert torch.equal(dequantize(*parts, torch.float32), source.transpose(1, 2))
        del source, parts
    assert len(store) == 0


def test_two_threads_swizzle_a_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Source] = []
    real = store_module.swizzle_weight

    def counting(source: Source, *args: Any) -> Any:
        made.append(source)
        return real(source, *args)

    monkeypatch.setattr(store_module, "swizzle_weight", counting)
    store, source = WeightStore(), nn.Parameter(new_weight(torch.empty(8, 256, 64), 0))
    start, found = threading.Barrier(4), []

    def ask() -> None:
        start.wait()
        found.append(store.get(floats(source), "row_major"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len({id(parts) for parts in found}) == 1


def test_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    real = source_module.quantize

    def recording(values: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(values.shape))
        return real(values)

    monkeypatch.setattr(source_module, "quantize", recording)
    swizzle_weight(floats(new_weight(torch.empty(5, 64, 8), 0)), "row_major")
    assert shapes == [(8, 64)] * 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [40, 6])
def test_weights_in_every_order_are_swizzled_to_the_same_parts(layout: str, n: int) -> None:
    rows = torch.randn((2, n, 96), generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = quantize(rows)
    each = [LAYOUTS[layout].swizzle(*expert) for expert in zip(*packed, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    for source in sources(rows):
        parts = swizzle_weight(source, layout)
        assert all(map(torch.equal, parts, expected)), (source.encoding.name, layout)
    back = swizzle.unswizzle_weight(parts, layout, 2, n, 96)
    assert all(map(torch.equal, back, packed))


def test_every_encoding_is_filled_natively() -> None:
    assert swizzle.is_native(LINEAR, MXFP8_ROWS, "cpu")
    for (layout, device), tasks in swizzle.NATIVE.items():
        if layout == MXFP8_ROWS:  # of linears, whose layout is the only order
            continue
        for source in sources(torch.zeros(1, 2, 32)):
            assert swizzle.is_native(source.encoding, layout, device)
        assert {"unswizzle", "empty"} < tasks.keys()


def test_a_linear_is_filled_natively_as_it_is_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a transposed weight, and back into its strides."""
    for weight in (torch.randn(5, 96), torch.randn(96, 5).T):
        source = Source((weight,), LINEAR)
        native = swizzle_weight(source, MXFP8_ROWS)
        monkeypatch.setattr(swizzle, "_native", lambda *_: None)
        in_torch = swizzle_weight(source, MXFP8_ROWS)
        monkeypatch.undo()
        assert [part.shape for part in native] == [(1, 5, 96), (1, 5, 3)]
        assert all(map(torch.equal, native, in_torch))
        (back,) = LINEAR.from_mxfp4(native, weight)
        assert back.stride() == weight.stride()
        assert torch.equal(back, mxfp8.dequantize(native[0][0], native[1][0], torch.float32))


def test_pairs_that_are_not_one_block_of_memory() -> None:
    rows = torch.randn((4, 32, 64), generator=torch.Generator().manual_seed(0))
    order = Order(False, is_concatenated=True)
    held = in_order(quantize(rows), order)
    source = Source(tuple(part[::2] for part in held), encoding_of(order, "row_major"))
    expected = swizzle_weight(Source(quantize(rows[::2]), MXFP4), "cpu_panels")
    assert all(map(torch.equal, swizzle_weight(source, "cpu_panels"), expected))


def test_a_weight_of_an_odd_number_of_gates_and_ups_is_an_error() -> None:
    encoding = encoding_of(Order(False, is_concatenated=True))
    with pytest.raises(WeightError, match="even number of rows; N is 7"):
        swizzle_weight(Source((torch.zeros(2, 7, 32),), encoding), "row_major")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_of_another_dtype_is_an_error(layout: str) -> None:
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, not torch\.float64"):
        swizzle_weight(floats(torch.zeros(2, 32, 8, dtype=torch.float64)), layout)


def test_a_weight_that_cannot_be_mxfp4_names_its_shape() -> None:
    with pytest.raises(WeightError, match=r"multiple of 32.*\(2, 48, 8\)"):
        swizzle_weight(floats(torch.zeros(2, 48, 8)), "row_major")
