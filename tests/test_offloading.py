"""Experts whose weights accelerate offloads: they run in MXFP4, and nothing stays behind."""

from __future__ import annotations

import gc
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from loaded import SECOND_LAYER_ON_DISK, logits
from models import Layers, compile_with, hidden, mlp, pack
from test_freed_uses import freed
from torch import Tensor, nn

import mxfp4_fx
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.core.errors import RepeatedSwizzleWarning
from mxfp4_fx.huggingface.offloading import offloaded
from mxfp4_fx.weights import freed as freed_weights
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.store import STORE

CPU = torch.device("cpu")
EXHAUSTIVE = (pytest.mark.exhaustive,)

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore::mxfp4_fx.core.errors.RepeatedSwizzleWarning"),
]


def in_parts(module: nn.Module, x: Tensor) -> Tensor:
    """The result if the experts are compiled alone, as hooks leave them."""
    module.experts.compile(backend="mxfp4", options={"inner": "eager"}, fullgraph=True)
    result: Tensor = module(x)[0]
    module.experts._compiled_call_impl = None
    torch.compiler.reset()
    return result


CASES = [
    pytest.param(packed, free, to_disk, marks=() if free == packed != to_disk else EXHAUSTIVE)
    for packed, free, to_disk in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize(("packed", "free", "to_disk"), CASES)
def test_results_are_those_of_the_model_in_memory(
    packed: bool, free: bool, to_disk: bool, tmp_path: Path
) -> None:
    module = pack(mlp()) if packed else mlp()
    uncompiled, expected = module(hidden())[0], in_parts(module, hidden())
    mxfp4_fx.forget(module)
    if to_disk:
        disk_offload(module.experts, tmp_path, execution_device=CPU)
    else:
        cpu_offload(module.experts, execution_device=CPU)
    run = compile_with(module, options={"strict": True, "free_weights": free})
    run(hidden())
    gc.collect()  # while it compiles, Dynamo makes cycles that hold tensors
    before = len(STORE)
    for _ in range(2):
        assert torch.equal(run(hidden())[0], expected)
        assert len(STORE) == before
        assert all(p.is_meta and type(p) is nn.Parameter for p in module.experts.parameters())
    assert torch.equal(module(hidden())[0], uncompiled)
    explained = mxfp4_fx.explain(module, hidden())
    assert [rewrite.layer for rewrite in explained.rewrites] == ["experts"]
    assert not explained.misses
    remove_hook_from_submodules(module)  # the weights come back
    assert torch.equal(module(hidden())[0], uncompiled)


def test_a_change_of_an_offloaded_weight_is_noticed() -> None:
    module = mlp()
    cpu_offload(module.experts, execution_device=CPU)
    run = compile_with(module)
    run(hidden())
    (weights,) = (h.weights_map for h in module.experts._hf_hook.hooks if h.offload)
    for name in ("down_proj", "down_proj_bias"):
        weights[name].zero_()
    assert not run(hidden())[0].any()


def test_an_offloaded_weight_is_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be for nothing, and would give back pages of the file that the next call reads."""

    def free(_: object) -> None:
        raise AssertionError("a weight is freed")

    module = mlp()
    cpu_offload(module.experts, execution_device=CPU)
    monkeypatch.setattr(freed_weights, "free", free)
    compile_with(module, options={"free_weights": True})(hidden())
    with pytest.raises(AssertionError, match="is freed"):
        compile_with(mlp(), options={"free_weights": True})(hidden())


def routed() -> tuple[Tensor, Tensor, Tensor]:
    return hidden()[0], torch.arange(21).view(7, 3) % 6, torch.rand(7, 3)


def told(run: Any, *args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*args)
    return [str(w.message) for w in caught if issubclass(w.category, RepeatedSwizzleWarning)]


class TestTheWarning:
    def test_names_the_layers_once(self) -> None:
        whole = Layers(count=3)
        for layer in whole.layers[1:]:
            cpu_offload(layer.experts, execution_device=CPU)
        run = compile_with(whole)
        (message,) = [message for _ in range(4) for message in told(run, hidden())]
        assert message.endswith("device_map offloads them:\n  layers.1.experts\n  layers.2.experts")

    def test_is_given_for_layers_that_take_turns(self) -> None:
        """So do layers that are compiled one by one: one graph, another caller at each call."""
        runs = []
        for seed in range(2):
            module = mlp(seed=seed)
            cpu_offload(module.experts, execution_device=CPU)
            runs.append(compile_with(module))
        assert sum(len(told(run, hidden())) for _ in range(5) for run in runs) == 2

    def test_is_given_for_a_graph_of_another_model(self) -> None:
        compile_with(mlp().experts)(*routed())
        module = mlp().experts
        cpu_offload(module, execution_device=CPU)
        run = compile_with(module)
        assert sum(len(told(run, *routed())) for _ in range(4)) == 1

    @pytest.mark.parametrize(
        "options", [pytest.param({"skip": ["experts"]}, marks=EXHAUSTIVE), {"kernels": "reference"}]
    )
    def test_is_not_given_where_nothing_is_swizzled(self, options: dict[str, Any]) -> None:
        module = pack(mlp())
        cpu_offload(module.experts, execution_device=CPU)
        run = compile_with(module, options=options)
        assert not any(told(run, hidden()) for _ in range(4))


@pytest.mark.exhaustive
@pytest.mark.parametrize("packed", [False, True])
def test_a_freed_model_can_be_offloaded(packed: bool) -> None:
    """accelerate makes new parameters by the class of the old ones."""
    module, _ = freed(pack(mlp()) if packed else mlp())
    expected = in_parts(module, hidden())
    cpu_offload(module.experts, execution_device=CPU)
    run = compile_with(module, options={"free_weights": True})
    for _ in range(2):
        assert torch.equal(run(hidden())[0], expected)


def test_the_class_of_freed_parameters_makes_plain_ones() -> None:
    values = torch.randn(2, 3)
    made = FreedParameter(values, requires_grad=False)
    assert type(made) is nn.Parameter
    assert made.data_ptr() == values.data_ptr()
    assert not made.requires_grad


def test_a_freed_parameter_on_meta_needs_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def values_of(*_: object) -> None:
        raise AssertionError("a freed weight is made again")

    module, _ = freed(mlp())
    monkeypatch.setattr(type(STORE), "values_of", values_of)
    on_meta = module.experts.down_proj.to("meta")
    assert on_meta.is_meta
    assert on_meta.shape == (6, 96, 64)
    with pytest.raises(AssertionError, match="is made again"):
        module.experts.down_proj.to(torch.bfloat16)


def test_which_modules_are_offloaded(tmp_path: Path) -> None:
    module = nn.Sequential(mlp(), mlp())
    cpu_offload(module[1], execution_device=CPU)
    assert {*offloaded(module)} == {module[1].router, module[1].experts}
    preloaded = nn.Sequential(mlp())
    cpu_offload(preloaded, execution_device=CPU, preload_module_classes=["GptOssMLP"])
    assert {*offloaded(preloaded)} == {*preloaded[0].modules()}


@pytest.mark.exhaustive
def test_a_device_map_with_a_layer_on_disk(tmp_path: Path) -> None:
    sizes = {"hidden": 64, "intermediate": 96, "experts": 6, "experts_per_token": 3}
    shape = CheckpointShape(**sizes, heads=4, kv_heads=2, head_dim=16)
    path = write_random_checkpoint(tmp_path / "tiny", shape)
    whole = mxfp4_fx.from_pretrained(
        path, device_map=SECOND_LAYER_ON_DISK, offload_folder=tmp_path / "offload"
    )
    run = compile_with(whole, options={"strict": True, "free_weights": True})
    expected = logits(whole)
    for _ in range(3):
        torch.testing.assert_close(logits(run), expected)
    blocks = [layer.mlp.experts.down_proj_blocks for layer in whole.model.layers]
    assert [type(p) is FreedParameter for p in blocks] == [True, False]
