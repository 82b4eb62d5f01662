"""transformers' own MXFP4 modules: captured as packed experts, and left as they are elsewhere."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_repository
import pytest
import torch
from checkpoints import read_tensors, write_packed
from combinations import exhaustive
from default_load import hub_layers, hub_mlp, load
from models import Graphs, compile_with, hidden, mlp, pack
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers.integrations import mxfp4

import mxfp4_fx
from mxfp4_fx.core.errors import (
    FreedWeightError,
    KeptWeightsWarning,
    MissedRewriteError,
    MissedRewriteWarning,
)
from mxfp4_fx.core.options import Options
from mxfp4_fx.experts import Model
from mxfp4_fx.huggingface import hub_modules
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.weights import swizzle
from mxfp4_fx.weights.store import STORE
from mxfp4_fx.weights.upkeep import wrapped_tensors

STRICT = {"strict": True}
X = hidden(dtype=torch.bfloat16)
IDS = torch.arange(14).view(2, 7) * 5

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


def expected(seed: int = 0) -> Tensor:
    """What the same experts give when this package has loaded them."""
    packed = pack(mlp(torch.bfloat16, seed=seed, num_experts_per_tok=2))
    for parameter in packed.experts.parameters():
        if parameter.dtype != torch.uint8:
            parameter.data = parameter.data.float()
    return compile_with(packed, options=STRICT)(X)[0]


def tensors(module: Any) -> list[Tensor]:
    return list(wrapped_tensors(module.experts))


# ---- captured


ONE_LAYOUT = ["hub_hopper", *map(exhaustive, ("hub_strided", "hub_blackwell"))]


@pytest.mark.parametrize("layout", ONE_LAYOUT)
def test_it_computes_what_packed_experts_compute(layout: str) -> None:
    run = compile_with(hub_mlp(layout), options=STRICT, fullgraph=True)
    assert torch.equal(run(X)[0], expected())


def test_a_default_load_runs_like_a_packed_one(files: Path) -> None:
    ours = mxfp4_fx.from_pretrained(files, dtype=torch.bfloat16).eval()
    theirs = load(files, "hub_hopper")
    logits = [
        compile_with(model, options=STRICT, fullgraph=True)(IDS).logits for model in (ours, theirs)
    ]
    assert torch.equal(*logits)
    told = mxfp4_fx.explain(theirs, IDS)
    assert [(r.layer, r.form) for r in told.rewrites] == [
        (f"model.layers.{at}.mlp.experts", "transformers_mxfp4") for at in range(2)
    ]
    assert told.misses == ()


def test_an_mlp_is_one_place_under_the_name_of_its_experts() -> None:
    places = Model(hub_layers()).places
    assert [place.name for place in places] == ["layers.0.experts", "layers.1.experts"]


@pytest.mark.exhaustive
def test_tokens_are_generated(files: Path) -> None:
    def generate(model: Any) -> Tensor:
        model.forward = compile_with(model.forward, options=STRICT)
        out: Tensor = model.generate(IDS, max_new_tokens=2, do_sample=False)
        return out

    ours = generate(mxfp4_fx.from_pretrained(files, dtype=torch.bfloat16).eval())
    assert torch.equal(generate(load(files, "hub_strided")), ours)


@pytest.mark.exhaustive
def test_shapes_may_be_dynamic() -> None:
    run = compile_with(hub_mlp(), options=STRICT, dynamic=True, fullgraph=True)
    assert torch.equal(run(X)[0], expected())


def test_its_experts_are_captured_alone() -> None:
    layer, packed = hub_mlp("hub_hopper"), pack(mlp(torch.bfloat16, num_experts_per_tok=2))
    _, scores, indices = layer.router(X[0])
    results = [
        compile_with(experts, options=STRICT, fullgraph=True)(X[0], indices, scores)
        for experts in (layer.experts, packed.experts)
    ]
    assert torch.equal(*results)


@pytest.mark.exhaustive
@pytest.mark.parametrize("by", ["pytorch", "reference"])
def test_other_kernels_give_the_same_up_to_rounding(by: str) -> None:
    options = {**STRICT, "kernels": by, "verify": True}
    compile_with(hub_mlp("hub_hopper"), options=options, fullgraph=True)(X)


@pytest.mark.exhaustive
def test_gradients_reach_the_hidden_states() -> None:
    def gradient(layer: Any) -> Tensor:
        with torch.enable_grad():
            x = X.clone().requires_grad_()
            layer.router.requires_grad_(False)
            compile_with(layer, options=STRICT, fullgraph=True)(x)[0].sum().backward()
        assert x.grad is not None
        return x.grad

    packed = pack(mlp(torch.bfloat16, num_experts_per_tok=2))
    packed.experts.requires_grad_(False)
    theirs = hub_mlp()
    theirs.experts.requires_grad_(True)  # as after a load, though their kernels give no gradient
    assert torch.equal(gradient(theirs), gradient(packed))
    assert theirs.experts.down_proj_bias.grad is None


@pytest.mark.exhaustive
def test_one_graph_serves_two_layers_with_weights_of_their_own() -> None:
    layers = hub_layers()
    graphs = Graphs()
    runs = [compile_with(layer, graphs, options=STRICT) for layer in layers.layers]
    assert torch.equal(runs[0](X)[0], expected(0))
    assert torch.equal(runs[1](X)[0], expected(1))


# ---- everything else is transformers'


def test_uncompiled_and_for_another_backend_it_is_what_it_was() -> None:
    layer = hub_mlp()
    before = layer(X)
    compile_with(layer, options=STRICT)(X)
    assert all(map(torch.equal, layer(X), before))
    assert all(map(torch.equal, torch.compile(layer, backend="eager")(X), before))


def test_it_is_saved_with_the_bytes_of_the_files(files: Path, tmp_path: Path) -> None:
    model = load(files, "hub_hopper")
    compile_with(model, options={**STRICT, "free_weights": True})(IDS)
    model.save_pretrained(tmp_path)
    saved, stored = read_tensors(tmp_path), read_tensors(files)
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[n], stored[n]) for n in stored if stored[n].dtype == torch.uint8)


# ---- identity


def test_uncompiled_calls_in_between_swizzle_nothing() -> None:
    layer = hub_mlp()
    run = compile_with(layer, options=STRICT)
    run(X)
    before = STORE.swizzled
    for _ in range(2):  # each puts new views of the scales into the module
        layer(X)
        run(X)
    assert STORE.swizzled == before


@pytest.mark.parametrize("at", [0, exhaustive(1)], ids=["blocks", "scales"])
def test_a_change_in_place_is_noticed(at: int) -> None:
    layer = hub_mlp("hub_hopper")
    run = compile_with(layer, options=STRICT)
    before = run(X)[0]
    changed = tensors(layer)[at]
    changed.copy_(changed.roll(1, 0))
    other = hub_mlp("hub_hopper")
    tensors(other)[at].copy_(changed)
    after = run(X)[0]
    assert torch.equal(after, compile_with(other, options=STRICT)(X)[0])
    assert not torch.equal(after, before)
    assert mxfp4_fx.refresh(layer) == 2


@pytest.mark.exhaustive
def test_what_was_swizzled_goes_with_the_model() -> None:
    gc.collect()
    before = len(STORE)
    layer = hub_mlp()
    compile_with(layer, options={**STRICT, "kernels": "pytorch"})(X)  # reads views of its memory
    compile_with(layer, options=STRICT)(X)
    assert len(STORE) == before + 2
    torch.compiler.reset()
    del layer
    gc.collect()
    assert len(STORE) == before


def read_bytes(layer: Any, **options: Any) -> set[int]:
    """Return the addresses of the bytes that the kernels read."""
    read = set()

    def inner(gm: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            read.update(arg.data_ptr() for arg in args if arg.dtype == torch.uint8)
            return gm.forward(*args)

        return run

    compile_with(layer, inner, options={**STRICT, **options})(X)
    return read


def test_checkpoint_order_is_a_view_of_the_strided_layout() -> None:
    layer = hub_mlp()
    assert read_bytes(layer, kernels="pytorch") == {t.data_ptr() for t in tensors(layer)}


@pytest.mark.parametrize("layout", ["hub_hopper", exhaustive("hub_strided")])
def test_the_hubs_kernels_read_its_weights_as_they_are(layout: str) -> None:
    pytest.importorskip("kernels")
    layer = hub_mlp(layout)
    with hub_repository.served(hub_repository.standard()):
        read = read_bytes(layer, kernels="hub")
        assert read == {tensor.data_ptr() for tensor in tensors(layer)}
        compile_with(layer, options={**STRICT, "kernels": "hub", "verify": True})(X)


# ---- freeing


@pytest.fixture(params=["hub_hopper", exhaustive("hub_strided")])
def freed(request: pytest.FixtureRequest) -> tuple[Any, Callable[..., Any], str]:
    layer, before = hub_mlp(request.param), STORE.swizzled
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in tensors(layer)]
    run = compile_with(layer, options={**STRICT, "free_weights": True})
    y = run(X)[0]
    assert STORE.swizzled == before + 2
    assert torch.equal(y, expected())
    gc.collect()
    assert [storage() for storage in storages] == [None] * 4
    return layer, run, request.param


def test_a_freed_layer_runs_on_compiled_and_not_uncompiled(freed: Any) -> None:
    layer, run, _ = freed
    before, wanted = STORE.swizzled, expected()
    assert torch.equal(run(X)[0], wanted)
    assert STORE.swizzled == before + 2  # those of `expected`
    with pytest.raises(FreedWeightError, match=r"mxfp4_fx\.restore"):
        layer(X)


def test_restore_gives_it_its_bytes_again(freed: Any) -> None:
    layer, run, layout = freed
    assert mxfp4_fx.restore(layer) == 4
    same, wanted = hub_mlp(layout), expected()
    for tensor, other in zip(tensors(layer), tensors(same), strict=True):
        assert type(tensor) is Tensor
        assert torch.equal(tensor, other)
        assert tensor.stride() == other.stride()
    before = STORE.swizzled
    assert torch.equal(run(X)[0], wanted)
    assert STORE.swizzled == before
    assert torch.equal(layer(X)[0], same(X)[0])


def test_weights_that_something_holds_are_kept_and_told_once() -> None:
    layer = hub_mlp()
    held = [weakref.ref(tensor) for tensor in tensors(layer)]
    run = compile_with(layer, options={**STRICT, "free_weights": True})
    with pytest.warns(KeptWeightsWarning, match=r"back: the device .* or something") as told:
        results = [run(X)[0] for _ in range(2)]
    assert len([w for w in told if w.category is KeptWeightsWarning]) == 2  # weights
    assert all(torch.equal(result, expected()) for result in results)
    assert all(type(ref()) is Tensor and ref().untyped_storage().nbytes() for ref in held)  # type: ignore[union-attr]


def test_a_full_device_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(swizzle, "_empty", no_room)
    remedies = r"DeviceFullError: cpu has no room.*'free_weights': True.*'kernels': 'hub'"
    with pytest.raises(BackendCompilerFailed, match=remedies):
        compile_with(hub_mlp(), options=STRICT)(X)


# ---- not captured


def repack(layer: Any) -> None:
    data = layer.experts.down_proj.storage
    data.data = data.data.contiguous()


REFUSALS: dict[str, tuple[Callable[[Any], object], str]] = {
    "not loaded": (
        lambda layer: setattr(layer.experts, "down_proj_precision_config", None),
        "its weights are not loaded",
    ),
    "another layout": (
        lambda layer: setattr(layer.experts.gate_up_proj.storage.layout, "name", "NEW"),
        "its weights are in layout NEW",
    ),
    "another instruction": (
        lambda layer: setattr(layer.experts.gate_up_proj.storage.layout, "mma_version", 2),
        "for another matrix instruction",
    ),
    "repacked": (repack, "do not lie as its layout says"),
    "quantized along another axis": (
        lambda layer: setattr(layer.experts.down_proj, "shape", [6, 64, 96]),
        "do not lie as its layout says",
    ),
}


def test_older_experts_that_are_spread_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = hub_mlp()
    layer.experts._is_hooked = True
    monkeypatch.delattr(mxfp4.Mxfp4GptOssExperts, "forward_routed", raising=False)  # new in 5.23
    reason = "transformers spreads its experts over processes: load the model with mxfp4_fx"
    assert reason in str(hub_modules.why_not(layer, Options()))


@pytest.mark.parametrize(("change", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_reason_is_known_for_all_that_is_not_understood(
    change: Callable[[Any], object], reason: str
) -> None:
    layer = hub_mlp("hub_hopper")
    assert hub_modules.why_not(layer, Options()) is None
    change(layer)
    assert reason in str(hub_modules.why_not(layer, Options()))


def test_what_is_not_understood_is_left_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = hub_mlp("hub_hopper")
    change, reason = REFUSALS["repacked"]
    change(layer)
    layer.experts._is_hooked = True  # so that it is called with routes
    prepare_capture()  # or it would take the forward below for transformers' own, for ever
    # In the place of a forward that asks other processes.
    monkeypatch.setattr(type(layer.experts), "forward", lambda self, x, *_: 2 * x)
    with pytest.warns(MissedRewriteWarning, match=reason):
        assert torch.equal(compile_with(layer)(X)[0], 2 * X)
    with pytest.raises(MissedRewriteError, match=reason):
        compile_with(layer, options=STRICT)(X)


def test_a_device_without_kernels_of_ours_keeps_theirs() -> None:
    layer = hub_mlp()
    before = layer(X)[0]
    with pytest.warns(MissedRewriteWarning, match="kernels='hub' needs a GPU"):
        after = compile_with(layer, options={"kernels": "hub"})(X)[0]
    assert torch.equal(after, before)


@pytest.mark.parametrize("pattern", ["layers.0.experts", *map(exhaustive, ("layers.0", "*.0"))])
def test_a_skipped_layer_keeps_theirs(pattern: str) -> None:
    layers = hub_layers()
    alone = hub_layers(count=1)
    middle = X + alone.layers[0](X)[0]
    packed = pack(mlp(torch.bfloat16, seed=1, num_experts_per_tok=2))
    wanted = middle + compile_with(packed, options=STRICT)(middle)[0]
    run = compile_with(layers, options={**STRICT, "skip": [pattern]})
    assert torch.equal(run(X), wanted)
