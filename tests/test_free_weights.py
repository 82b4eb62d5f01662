"""``free_weights``: memory is given back, and nothing is computed with what is not there."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from freeing import BOTH, FREE, dense, packed
from models import Graphs, Layers, compile_with, hidden, pack, swizzled
from processes import LAST_RESORT
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import mxfp4_fx
from mxfp4_fx.core.errors import KeptWeightsWarning
from mxfp4_fx.weights import freed
from mxfp4_fx.weights.entries import Entries
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.store import WeightStore
from mxfp4_fx.weights.swizzle import swizzle_weight, unswizzle_weight

pytestmark = pytest.mark.usefixtures("no_gradients")


def floats(weight: Tensor) -> Source:
    return Source((weight,), FLOATS)


def experts_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are swizzled."""
    ends = ("proj", "proj_blocks", "proj_scales")
    return {name: p for name, p in module.named_parameters() if name.endswith(ends)}


def held(module: nn.Module) -> int:
    """Bytes behind the expert weights."""
    return sum(p.untyped_storage().nbytes() for p in experts_of(module).values())


@BOTH
def test_memory_is_given_back_and_results_are_the_same(make: Callable[..., Any]) -> None:
    module, x = make(), hidden()
    expected = compile_with(copy.deepcopy(module))(x)[0]
    assert held(module) > 0
    compiled = compile_with(module, options=FREE)
    assert torch.equal(compiled(x)[0], expected)
    assert held(module) == 0
    assert torch.equal(compiled(x)[0], expected)


@BOTH
def test_other_shapes_compile_anew(make: Callable[..., Any]) -> None:
    module, graphs = make(), Graphs()
    plain = compile_with(copy.deepcopy(module), dynamic=False)
    compiled = compile_with(module, graphs, dynamic=False, options=FREE)
    for length in (7, 3, 1):
        assert torch.equal(compiled(hidden(length))[0], plain(hidden(length))[0])
    assert len(graphs.seen) == 3


def test_a_second_compile_finds_the_weights() -> None:
    module, x = packed(), hidden()
    expected = compile_with(module, options=FREE)(x)[0]
    torch.compiler.reset()
    assert torch.equal(compile_with(module)(x)[0], expected)


def test_inductor() -> None:
    module, x = packed(torch.bfloat16), hidden(dtype=torch.bfloat16)
    expected = torch.compile(copy.deepcopy(module), backend="mxfp4")(x)[0]
    compiled = torch.compile(module, backend="mxfp4", options=FREE)
    assert torch.equal(compiled(x)[0], expected)
    assert held(module) == 0


def test_kernels_of_another_layout_find_the_weights() -> None:
    module, x = packed(), hidden()
    expected = module(x)[0]
    compile_with(module, options=FREE)(x)
    torch.compiler.reset()
    assert torch.equal(compile_with(module, options={"kernels": "reference"})(x)[0], expected)


def test_layer_by_layer() -> None:
    whole, x = pack(Layers()), hidden()
    expected = compile_with(copy.deepcopy(whole))(x)
    for layer in whole.layers:
        layer.compile(backend="mxfp4", options={"inner": "eager", **FREE})
    assert torch.equal(whole(x), expected)
    assert held(whole) == 0


def test_layers_share_their_graphs() -> None:
    """Freeing changes a parameter's class, which Dynamo guards."""
    many, graphs = pack(Layers(count=12)), Graphs()
    for layer in many.layers:
        layer.compile(backend="mxfp4", options={"inner": graphs, **FREE})
    for _ in range(3):
        many(hidden())
    assert held(many) == 0
    assert len(graphs.seen) <= 2


def test_a_call_of_the_same_shape_compiles_once_more_at_most() -> None:
    whole, graphs = pack(Layers()), Graphs()
    compiled = compile_with(whole, graphs, options=FREE)
    for _ in range(4):
        compiled(hidden())
    assert len(graphs.seen) <= 2


def test_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is swizzled, those before it have given their memory back."""
    whole, still = pack(Layers()), []
    real = swizzle_weight

    def watching(*args: Any) -> Any:
        still.append(held(whole))
        return real(*args)

    monkeypatch.setattr("mxfp4_fx.weights.store.swizzle_weight", watching)
    total = held(whole)
    compile_with(whole, options=FREE)(hidden())
    sizes = [p.numel() for p in experts_of(whole.layers[0]).values()]
    layer = sum(sizes)
    down = layer - (gate_up := sizes[0] + sizes[1])
    assert sorted(still, reverse=True)[0] == total
    assert min(still) in (down, gate_up)
    assert len(set(still)) == 4


def test_tied_experts() -> None:
    tied, x = pack(Layers()), hidden()
    tied.layers[1].experts = tied.layers[0].experts
    expected = compile_with(copy.deepcopy(tied))(x)
    assert torch.equal(compile_with(tied, options=FREE)(x), expected)


def test_kernels_that_read_checkpoint_order_read_the_source_itself() -> None:
    module, x = packed(), hidden()
    expected, before = module(x)[0], held(module)
    compiled = compile_with(module, options={**FREE, "kernels": "reference"})
    assert torch.equal(compiled(x)[0], expected)
    assert held(module) == before


def test_a_weight_that_something_else_reads_is_kept() -> None:
    module, x = dense(), hidden()

    def with_norm(x: Tensor) -> tuple[Tensor, Tensor]:
        return module(x)[0], module.experts.down_proj.abs().sum()

    expected = with_norm(x)[1]
    assert torch.equal(compile_with(with_norm, options=FREE)(x)[1], expected)
    assert not isinstance(module.experts.down_proj, FreedParameter)
    assert isinstance(module.experts.gate_up_proj, FreedParameter)


def test_a_view_that_somebody_holds_keeps_its_memory() -> None:
    module, x = packed(), hidden()
    view = module.experts.down_proj_blocks.detach()[0]
    expected = view.clone()
    compile_with(module, options=FREE)(x)
    assert torch.equal(view, expected)


def test_an_inner_compiler_that_fails_leaves_the_model_as_it_was() -> None:
    module, x = packed(), hidden()
    expected = module(x)[0]

    def fail(gm: Any, inputs: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(BackendCompilerFailed):
        compile_with(module, fail, options=FREE)(x)
    assert torch.equal(module(x)[0], expected)


USES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda m: m(hidden()),
    "arithmetic": lambda m: m.experts.down_proj + 1,
    "sum": lambda m: m.experts.down_proj.sum(),
    "add_": lambda m: m.experts.down_proj.add_(1),
    "source of a copy": lambda m: torch.zeros(6, 96, 64).copy_(m.experts.down_proj),
    "clone": lambda m: m.experts.down_proj.clone(),
    "numpy": lambda m: m.experts.down_proj.numpy(),
    "data": lambda m: m.experts.down_proj.data.sum(),
    "transposed": lambda m: m.experts.down_proj.mT.sum(),
    "item": lambda m: m.experts.down_proj[0, 0, 0].item(),
    "list of weights": lambda m: torch.cat([torch.zeros(1, 96, 64), m.experts.down_proj]),
    "keyword": lambda m: torch.add(torch.zeros(1), other=m.experts.down_proj),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "another compiler": lambda m: torch.compile(m, backend="aot_eager")(hidden()),
    "another compiler's kernel": lambda m: torch.compile(
        lambda: m.experts.down_proj.sum(), backend="inductor"
    )(),
    "export": lambda m: torch.export.export(m, (hidden(),)),
}


@pytest.fixture(scope="module")
def freed_mlp() -> Any:
    """An MLP whose weights are freed: what is refused leaves it as it is."""
    module = dense()
    with torch.no_grad():
        compile_with(module, options=FREE)(hidden())
    return module


@pytest.mark.parametrize("use", USES)
def test_other_uses_of_a_freed_weight_are_an_error(use: str, freed_mlp: Any) -> None:
    # Dynamo, and load_state_dict, wrap what is raised.
    with pytest.raises(RuntimeError) as caught:
        USES[use](freed_mlp)
    told = r"FreedParameter\(\(6, .*given back.*mxfp4_fx\.restore\(model\)"
    assert re.search(told, str(caught.value))


def test_what_it_is_can_still_be_asked(freed_mlp: Any) -> None:
    weight = freed_mlp.experts.down_proj
    assert (weight.shape, weight.dtype, weight.device.type) == ((6, 96, 64), torch.float32, "cpu")
    assert (weight.numel(), weight.ndim, weight.stride()) == (6 * 96 * 64, 3, (96 * 64, 64, 1))
    assert not weight._is_view()  # torch 2.12's Dynamo asks
    assert repr(weight) == "FreedParameter((6, 96, 64), dtype=torch.float32, device='cpu')"
    assert sum(p.numel() for p in freed_mlp.parameters()) == sum(
        p.numel() for p in dense().parameters()
    )


def test_a_graph_that_needs_the_weight_itself_is_refused() -> None:
    module = dense()
    compiled = compile_with(module, options=FREE)
    compiled(hidden())
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match=r"requires a gradient"):
        compiled(hidden())


def test_explain_reads_the_weights_where_they_are() -> None:
    module = packed()
    expected = mxfp4_fx.explain(module, hidden())
    compile_with(module, options=FREE)(hidden())
    torch.compiler.reset()
    assert mxfp4_fx.explain(module, hidden()) == expected


def test_restore_gives_packed_weights_their_bytes() -> None:
    module, x = packed(), hidden()
    before = {name: p.clone() for name, p in experts_of(module).items()}
    compiled = compile_with(module, options=FREE)
    expected = compiled(x)[0]
    assert mxfp4_fx.restore(module) == 4
    for name, parameter in experts_of(module).items():
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter, before[name])
    assert torch.equal(compiled(x)[0], expected)


def test_restore_gives_other_weights_the_values_that_mxfp4_holds() -> None:
    module = dense(torch.bfloat16)  # MXFP4 values already
    before = {name: p.clone() for name, p in experts_of(module).items()}
    compile_with(module, options=FREE)(hidden(dtype=torch.bfloat16))
    assert mxfp4_fx.restore(module) == 2
    assert all(torch.equal(p, before[name]) for name, p in experts_of(module).items())


def test_what_was_restored_stays() -> None:
    module, graphs = packed(), Graphs()
    compiled = compile_with(module, graphs, options=FREE)
    for _ in range(2):
        compiled(hidden())
    mxfp4_fx.restore(module)
    before = len(graphs.seen)
    for _ in range(2):
        compiled(hidden())
    assert held(module) > 0
    assert len(graphs.seen) == before


def test_what_was_restored_and_changed_stays() -> None:
    module, x = dense(), hidden()
    compiled = compile_with(module, options=FREE)
    compiled(x)
    mxfp4_fx.restore(module)
    module.experts.down_proj.mul_(-2)
    for _ in range(3):
        compiled(x)
    assert type(module.experts.down_proj) is nn.Parameter


def test_values_that_were_swizzled_before_a_change_are_not_the_weights() -> None:
    store, new = WeightStore(), torch.randn(2, 64, 32)
    source = nn.Parameter(torch.randn(2, 64, 32), requires_grad=False)
    store.get(floats(source), "row_major")
    source.copy_(new)
    expected = [part.clone() for part in swizzle_weight(floats(new), "row_major")]
    assert store.free(floats(source), "cpu_panels")
    for part, wanted in zip(store.get(floats(source), "row_major"), expected, strict=True):
        assert torch.equal(part, wanted)


def test_values_that_were_refreshed_are_not_the_weights() -> None:
    store, new = WeightStore(), torch.randn(2, 64, 32)
    source = nn.Parameter(torch.randn(2, 64, 32), requires_grad=False)
    store.get(floats(source), "row_major")
    source.data.copy_(new)
    store.refresh([source])
    assert store.free(floats(source), "cpu_panels")
    expected = swizzle_weight(floats(new), "row_major")
    for part, wanted in zip(store.get(floats(source), "row_major"), expected, strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_half_of_a_pair_is_replaced(part: str) -> None:
    module, other, x = packed(), packed(), hidden()
    compiled = compile_with(module, options=FREE)
    compiled(x)
    name = f"down_proj_{part}"
    new = getattr(other.experts, name).flip(0).clone()
    setattr(module.experts, name, nn.Parameter(new, requires_grad=False))
    setattr(other.experts, name, nn.Parameter(new, requires_grad=False))
    expected = compile_with(other)(x)[0]
    assert torch.equal(compiled(x)[0], expected)
    assert mxfp4_fx.restore(module) >= 3
    assert torch.equal(module(x)[0], other(x)[0])


def test_layers_that_share_their_scales() -> None:
    whole, x = pack(Layers()), hidden()
    first, second = (layer.experts for layer in whole.layers)
    second.down_proj_scales = first.down_proj_scales
    expected = compile_with(copy.deepcopy(whole))(x)
    assert torch.equal(compile_with(whole, options=FREE)(x), expected)


def test_verify_needs_the_weights() -> None:
    module = packed()
    compile_with(module, options=FREE)(hidden())
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"restore\(model\)"):
        compile_with(module, options={"verify": True})(hidden())


def test_explain_of_a_graph_that_cannot_run() -> None:
    module = packed()
    compile_with(module, options=FREE)(hidden())
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"restore\(model\)"):
        mxfp4_fx.explain(module, hidden(), options={"skip": ["*"]})


def test_parameters_made_in_inference_mode_stay() -> None:
    """They have no version, by which a change of what was restored would be noticed."""
    with torch.inference_mode():
        module, x = packed(), hidden()
        compiled = compile_with(module, options=FREE)
        assert torch.equal(compiled(x)[0], compiled(x)[0])
        assert held(module) > 0


@pytest.mark.exhaustive
def test_reference_kernels_before_do_not_keep_the_memory() -> None:
    module, x = packed(), hidden()
    compile_with(module, options={"kernels": "reference"})(x)
    torch.compiler.reset()
    weight = weakref.ref(module.experts.down_proj_blocks.untyped_storage())
    compile_with(module, options=FREE)(x)
    gc.collect()
    assert weight() is None or not weight().nbytes()


def test_what_was_restored_is_not_swizzled_again() -> None:
    store = WeightStore()
    source = nn.Parameter(torch.randn(2, 64, 32), requires_grad=False)
    parts = store.get(floats(source), "cpu_panels")
    assert store.free(floats(source), "cpu_panels")
    assert store.restore([source]) == 1
    assert store.get(floats(source), "cpu_panels") is parts


def pair(seed: int = 0) -> Source:
    """Blocks and scales of all kinds of bytes."""
    generator = torch.Generator().manual_seed(seed)
    parts = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        for shape in ((2, 32, 2, 16), (2, 32, 2))
    )
    return Source(tuple(nn.Parameter(part, requires_grad=False) for part in parts), MXFP4)


def test_a_device_that_has_no_room_for_one_half_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    store, source = WeightStore(), pair()
    blocks, real = source.tensors[0].clone(), freed._no_bytes

    def full(like: Tensor) -> Tensor:
        if like.ndim == 3:
            raise torch.OutOfMemoryError
        return real(like)

    monkeypatch.setattr(freed, "_no_bytes", full)
    parts = store.get(source, "cpu_panels")
    with pytest.warns(KeptWeightsWarning):
        assert not store.free(source, "cpu_panels")
    assert not any(map(freed.is_freed, source.tensors))
    assert torch.equal(source.tensors[0], blocks)
    assert store.get(source, "cpu_panels") is parts
    assert store.forget(source.tensors) == 1


def test_freeing_that_is_interrupted_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store, source = WeightStore(), pair()
    before = [tensor.clone() for tensor in source.tensors]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Entries, "renew", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.free(source, "cpu_panels")
    monkeypatch.undo()
    assert all(map(freed.is_freed, source.tensors))
    parts = store.get(source, "cpu_panels")
    assert store.restore(source.tensors) == 2
    assert all(map(torch.equal, source.tensors, before))
    assert all(map(torch.equal, parts, swizzle_weight(source, "cpu_panels")))


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_pair_is_overwritten(half: int) -> None:
    store, source = WeightStore(), pair()
    store.free(source, "cpu_panels")
    new = pair(seed=1).tensors[half]
    source.tensors[half].copy_(new)
    held = [tensor.clone() for tensor in store.values(source)]
    assert torch.equal(held[half], new)
    expected = swizzle_weight(Source(tuple(held), MXFP4), "cpu_panels")
    assert all(map(torch.equal, store.get(source, "cpu_panels"), expected))
    assert store.restore(source.tensors) == 1
    assert all(map(torch.equal, source.tensors, held))


def test_both_halves_are_made_of_one_unswizzled_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    store, source, made = WeightStore(), pair(), []
    before = [tensor.clone() for tensor in source.tensors]
    store.free(source, "cpu_panels")

    def counting(*args: Any) -> Any:
        made.append(args)
        return unswizzle_weight(*args)

    monkeypatch.setattr("mxfp4_fx.weights.store.unswizzle_weight", counting)
    assert all(map(torch.equal, store.values(source), before))
    assert store.restore(source.tensors) == 2
    assert all(map(torch.equal, source.tensors, before))
    assert len(made) == 2


def test_a_change_after_restoring_is_noticed() -> None:
    module, x = dense(), hidden()
    compiled = compile_with(module, options={**FREE, "kernels": "reference"})
    before = compiled(x)[0]
    mxfp4_fx.restore(module)
    module.experts.down_proj.mul_(-2)
    assert not torch.equal(compiled(x)[0], before)


def test_a_plain_tensor_is_not_freed() -> None:
    weight, store = torch.randn(2, 64, 32), WeightStore()
    store.get(floats(weight), "cpu_panels")
    assert not store.free(floats(weight), "cpu_panels")
    assert weight.untyped_storage().nbytes()


def test_threads_that_compile_one_model() -> None:
    whole, x, failures = pack(Layers()), hidden(), []
    expected = compile_with(copy.deepcopy(whole))(x)

    def run() -> None:
        try:
            with torch.no_grad():
                compiled = compile_with(whole, options=FREE)
                for _ in range(3):
                    assert torch.equal(compiled(x), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_dead_model_takes_its_freed_weights_along() -> None:
    module = packed()
    compile_with(module, "aot_eager", options=FREE)(hidden())
    parts = [weakref.ref(part) for part in swizzled(module.experts)]
    del module
    torch.compiler.reset()
    gc.collect()
    assert all(part() is None for part in parts)


MAPPED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from mxfp4_fx.weights.source import MXFP4, Source
from mxfp4_fx.weights.store import STORE

def file_pages():
    status = open("/proc/self/status").read()
    return int(status.partition("RssFile:")[2].split()[0]) << 10

size = (8, 256, 64, 16)  # 2 MiB
save_file({"blocks": torch.ones(size, dtype=torch.uint8),
           "scales": torch.full(size[:3], 127, dtype=torch.uint8)}, sys.argv[1])
held = {k: torch.nn.Parameter(v, requires_grad=False) for k, v in load_file(sys.argv[1]).items()}
keep = held["scales"].data[:1]  # somebody else uses the file
bytes(held["blocks"].detach().numpy())
source = Source((held["blocks"], held["scales"]), MXFP4)
STORE.get(source, "cpu_panels")  # loads the native library, whose pages are a file's, too
before = file_pages()
STORE.free(source, "cpu_panels")
freed = before - file_pages()
assert freed > 1.5 * 2**20, freed
assert (STORE.values(source)[0] == 1).all()
assert (keep == 127).all()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.exhaustive
def test_pages_of_a_mapped_file_go(tmp_path: Path) -> None:
    """transformers maps checkpoints; a page that was read counts as the process's memory."""
    argv = [sys.executable, "-c", MAPPED, str(tmp_path / "w.safetensors")]
    subprocess.run(
        argv, check=True, timeout=LAST_RESORT, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
