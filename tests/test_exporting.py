"""``mxfp4_fx.export``: what is exported, what the report says, and what is refused."""

from __future__ import annotations

import collections
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Graphs, compile_with, hidden, mlp, model, pack, tokens
from sharded import sharded
from torch import Tensor, nn
from torch import distributed as dist
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim

import mxfp4_fx
from mxfp4_fx.core import torch_private_export
from mxfp4_fx.core.options import Options
from mxfp4_fx.errors import (
    FreedWeightError,
    MissedRewriteError,
    NoExpertsWarning,
    OptionError,
    PackageError,
)
from mxfp4_fx.exported import Input, Size
from mxfp4_fx.exporting import Exported, lowered_program

pytestmark = pytest.mark.usefixtures("no_gradients")

LENGTHS = {"dynamic_shapes": ({1: Dim("T", min=1, max=64)},)}


def lowered(model: nn.Module, *args: Any, dynamic_shapes: Any = None, **options: Any) -> Exported:
    """Export as far as AOTInductor, which takes a long time."""
    return lowered_program(model, args, {}, dynamic_shapes, Options.parse(options))


class Other(nn.Module):
    """Experts beside GPT-OSS's: another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()
        self.mlp.experts._apply_gate = lambda y: y[..., ::2] * torch.tanh(y[..., 1::2])

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[0]


class Returns(nn.Module):
    """A module that gives its input to a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# ---- what is exported


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_a_program_computes_what_the_compiled_model_does_for_any_length(form: str) -> None:
    module = mlp(form="eager") if form == "dense" else pack(mlp())
    exported = lowered(module, hidden(7), strict=True, **LENGTHS)
    assert mxfp4_fx.forget(module) == 0  # the weights were swizzled for the program alone
    run, compiled = exported.program.module(), compile_with(module, dynamic=True)
    for length in (1, 7, 64):
        x = hidden(length, seed=length)
        for actual, expected in zip(run(x), compiled(x), strict=True):
            assert torch.equal(actual, expected)
    (rewrite,) = exported.explanation.rewrites
    assert rewrite.layer == "experts"
    # The program has the weights swizzled, and not as the model holds them.
    held = sum(t.numel() * t.element_size() for t in exported.program.state_dict.values())
    others = [p for n, p in module.named_parameters() if n.endswith("bias") or "router" in n]
    assert held == rewrite.bytes_after + sum(p.numel() * p.element_size() for p in others)

    note = type(exported.note).of_json(exported.note.to_json())
    assert note == exported.note
    (taken,) = note.inputs.values()
    assert taken == Input("torch.float32", (1, Size(taken.shape[1].symbol, 1, 64), 64))
    assert (rewrite.kernels, rewrite.layout) in note.targets
    assert not any(tensor.requires_grad for tensor in exported.program.state_dict.values())
    assert "matmul_ogs" in note.schemas


def test_a_miss_is_an_error_when_strict_with_the_name_in_the_model() -> None:
    with pytest.raises(MissedRewriteError, match=r"mlp\.experts"):
        lowered(Other(), hidden(), strict=True)


def test_parts_that_are_compiled_by_themselves_are_left_out() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.mlp(x)[0]
            return result

    layer, graphs = Layer(), Graphs()
    layer.mlp.compile(backend=graphs)
    assert len(lowered(layer, hidden(), strict=True).explanation.rewrites) == 1
    assert not graphs.seen


def test_attention_is_reported() -> None:
    whole = model(num_hidden_layers=1)
    given = {"input_ids": tokens(), "use_cache": False}
    explanation = lowered_program(whole, (), given, None, Options.parse({})).explanation
    assert [one.layer for one in explanation.attention] == ["model.layers.0.self_attn"]
    assert explanation.attention_misses == ()


def test_what_runs_as_the_reference_is_for_any_layout() -> None:
    exported = lowered(pack(mlp()), hidden(), kernels="reference")
    assert exported.note.targets == (("reference", ""),)


def test_what_was_rewritten_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mxfp4_fx.backend"):
        lowered(pack(mlp()), hidden())
    assert re.search(r"experts: packed -> MXFP4, \w+ kernels", caplog.text)


def test_adapters_are_exported_and_verify_says_what_it_does_not_compare() -> None:
    peft = pytest.importorskip("peft")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    module = peft.get_peft_model(pack(mlp()), config)
    exported = lowered(module, hidden(), verify=True, strict=True)
    assert any("compares no experts with adapters" in note for note in exported.explanation.notes)
    (actual, _), (expected, _) = exported.program.module()(hidden()), compile_with(module)(hidden())
    assert torch.equal(actual, expected)


def test_skipped_experts_of_a_module_that_is_compiled_by_itself_stay() -> None:
    module = mlp()
    module.compile(backend="eager")  # left out, as is the wrapper
    explanation = lowered(torch.compile(module), hidden(), skip=["experts"]).explanation
    assert not explanation.rewrites
    assert [(miss.layer, miss.skipped) for miss in explanation.misses] == [("experts", True)]


def test_rewrites_are_compared_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mxfp4_fx"):
        lowered(mlp(), hidden(), verify=True)
    assert "verified 1 rewritten layers" in caplog.text


def test_swizzled_weights_of_the_compiled_model_stay() -> None:
    module = mlp()
    compile_with(module)(hidden())
    lowered(module, hidden())
    assert mxfp4_fx.forget(module) == 2


def test_freed_weights_are_freed_and_then_not_exported_again() -> None:
    module = mlp()
    exported = lowered(module, hidden(), free_weights=True)
    assert module.experts.gate_up_proj.untyped_storage().nbytes() == 0
    (expected, _), (actual, _) = compile_with(module)(hidden()), exported.program.module()(hidden())
    assert torch.equal(actual, expected)
    with pytest.raises(FreedWeightError, match=r"experts\.gate_up_proj was freed.*restore"):
        lowered(module, hidden())


def test_no_experts_are_told() -> None:
    with pytest.warns(NoExpertsWarning, match="Returns runs without MXFP4"):
        lowered(Returns(torch.relu), hidden())
    with pytest.raises(MissedRewriteError, match="nothing in what it called looks like a mixture"):
        lowered(Returns(torch.relu), hidden(), strict=True)


# ---- what goes in and out


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
class TestInputsAndResults:
    def test_a_class_of_transformers_becomes_a_dict(self) -> None:
        from transformers.modeling_outputs import BaseModelOutput

        def function(x: Tensor) -> Any:
            return BaseModelOutput(last_hidden_state=x + 1, hidden_states=(x, x * 2))

        x = hidden()
        result = lowered(Returns(function), x).program.module()(x)
        assert type(result) is dict
        assert torch.equal(result["last_hidden_state"], x + 1)
        assert type(result["hidden_states"]) is tuple
        assert torch.equal(result["hidden_states"][1], x * 2)

    def test_a_result_of_another_class_is_refused(self) -> None:
        from transformers import DynamicCache

        def function(x: Tensor) -> Any:
            cache = DynamicCache()
            cache.update(x[None], x[None], 0)
            return {"x": x + 1, "cache": cache}

        with pytest.raises(PackageError, match="export with use_cache=False"):
            lowered(Returns(function), hidden())

    def test_examples_in_another_order_of_memory(self) -> None:
        """Calls give packages contiguous tensors."""
        program = lowered(Returns(torch.relu), torch.randn(4, 3).T).program
        (x,) = program.graph.find_nodes(op="placeholder")
        assert x.meta["val"].is_contiguous()

    def test_a_weight_under_two_names_is_there_once(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
                self.two.weight = self.one.weight

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.two(self.one(x)) + self.two.weight
                return result

        module = Tied()
        program = lowered(module, torch.ones(64, 64)).program
        assert [*map(len, program.state_dict.values())].count(64) == 3
        assert torch.equal(program.module()(torch.ones(64, 64)), module(torch.ones(64, 64)))

    def test_a_branch_at_run_time(self) -> None:
        weight = nn.Parameter(torch.ones(3))

        def function(x: Tensor) -> Tensor:
            result: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
            return result

        module = Returns(function)
        module.weight = weight
        run = lowered(module, torch.ones(3)).program.module()
        for x in (torch.ones(3), -torch.ones(3)):
            assert torch.equal(run(x), function(x))

    def test_a_size_that_is_computed_from_another_is_refused(self) -> None:
        half = Dim("half", min=2, max=32)
        with pytest.raises(PackageError, match=r"dimension 1 of args\[0\] is 2\*"):
            lowered(Returns(torch.relu), hidden(8), dynamic_shapes=({1: 2 * half},))

    def test_a_bound_that_the_model_breaks_is_told(self) -> None:
        def function(x: Tensor) -> Tensor:
            return x + 1 if x.shape[1] > 16 else x * 2

        with pytest.raises(PackageError, match=r"Returns cannot be exported[\s\S]*16"):
            lowered(Returns(function), hidden(7), **LENGTHS)

    def test_what_breaks_a_graph_is_told(self) -> None:
        def function(x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

        with pytest.raises(PackageError, match="Returns cannot be exported as one graph"):
            lowered(torch.compile(Returns(function)), hidden())

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: (x + 1, x.shape[1]), "returns 7 beside its tensors"),
            (lambda x: (x[0].add_(1), x * 2)[1], "writes to .*, by add_ "),
        ],
        ids=["a number", "a write"],
    )
    def test_what_is_no_tensor_or_stays_behind_is_refused(
        self, function: Any, message: str
    ) -> None:
        with pytest.raises(PackageError, match=f"Returns {message}"):
            lowered(Returns(function), hidden(7))

    def test_a_number_that_varies_is_refused(self) -> None:
        class Scaled(nn.Module):
            def forward(self, x: Tensor, by: int) -> Tensor:
                return x * by

        with pytest.raises(PackageError, match=r"args\[1\] is a number, which cannot vary"):
            lowered(Scaled(), hidden(), 3, dynamic_shapes=(None, Dim.DYNAMIC))
        assert lowered(Scaled(), hidden(), 3).note.inputs["args[1]"] == 3

    def test_sizes_of_one_dim_have_one_symbol(self) -> None:
        class Sum(nn.Module):
            def forward(self, x: Tensor, others: dict[str, Tensor]) -> Tensor:
                return x + others["y"]

        length = {1: Dim("T", max=64)}
        shapes = {"x": length, "others": {"y": length}}
        exported = lowered(Sum(), hidden(), {"y": hidden()}, dynamic_shapes=shapes)
        first, second = exported.note.inputs.values()
        assert [*exported.note.inputs] == ["args[0]", "args[1]['y']"]
        assert first.shape[1] == second.shape[1]


class Cache(collections.UserDict[str, Tensor]):
    pass


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": torch.relu}, OptionError, "takes a module, not a builtin_function"),
        ({"args": [hidden()]}, OptionError, r"args must be a tuple.*it is a list"),
        ({"args": (hidden(), Cache())}, OptionError, r"args\[1\] is a Cache.*use_cache=False"),
        ({"args": (hidden().to("meta"),)}, PackageError, r"args\[0\] is on meta, and packages are"),
        ({"path": "model.pt"}, OptionError, r"model\.pt must end in \.pt2"),
        ({"path": "none/model.pt2"}, PackageError, "there is no directory .*none"),
        ({"path": "there.pt2"}, PackageError, r"there\.pt2 exists already: remove it"),
        ({"options": {"inner": "eager"}}, OptionError, "'inner'.* is 'eager'.*leave it out"),
        ({"options": {"kernel": "cpu"}}, OptionError, "Did you mean 'kernels'"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "there.pt2").touch()
    given = {"model": nn.Linear(64, 8), "args": (hidden(),), "path": "model.pt2", **changes}
    model, args = given.pop("model"), given.pop("args")
    with pytest.raises(error, match=message):
        mxfp4_fx.export(model, args, tmp_path / given.pop("path"), **given)
    assert [file.name for file in tmp_path.iterdir()] == ["there.pt2"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no space left"), r"model\.pt2 cannot be written: no space left"),
        (InvalidCxxCompiler(), "AOTInductor needs a C\\+\\+ compiler"),
    ],
)
@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
def test_a_file_that_cannot_be_made_leaves_nothing(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def package(program: Any, file: str, *_: Any) -> None:
        Path(file).write_text("a part")
        raise error

    monkeypatch.setattr(torch_private_export, "package", package)
    with pytest.raises(PackageError, match=message):
        mxfp4_fx.export(nn.Linear(64, 8), (hidden(),), tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_spread_over_processes_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = sharded(mlp())
        with pytest.raises(PackageError, match=r"experts\.gate_up_proj is spread over processes"):
            mxfp4_fx.export(whole, (hidden(),), tmp_path / "model.pt2")
    finally:
        dist.destroy_process_group()


def test_a_model_that_is_not_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"router\.weight is on meta, and packages are for CPUs"):
        mxfp4_fx.export(mlp().to("meta"), (hidden(),), tmp_path / "model.pt2")
