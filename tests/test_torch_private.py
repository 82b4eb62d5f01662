"""What is taken of torch's private parts is there, and does what it is trusted to do.

A new torch that breaks this package breaks it here, with the name that it lacks.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Graphs
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import mxfp4_fx
from mxfp4_fx.core import (
    torch_private,
    torch_private_distributed,
    torch_private_dynamo,
)
from mxfp4_fx.errors import TorchVersionError

PACKAGE = Path(mxfp4_fx.__file__).parent

# ---- one file


# Attributes of torch's objects that are read in every call, where they are read ...
ATTRIBUTES = {
    *("_base", "_cdata", "_version"),
    *("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
}
# ... those of accelerate, transformers and PEFT, and a named tuple's methods.
OTHERS = {
    *("_active_collector", "_attn_implementation", "_experts_implementation"),
    *("_device_mesh", "_hf_hook", "_is_hooked", "_weight_conversions", "_replace"),
    *("_apply_gate", "_is_expert_parallel", "_asdict"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
    *("_original_source_patterns", "_original_target_patterns"),
    *("_check_forward_args", "_inject_parameters", "_register_custom_module"),
}


def private_names(file: Path, own: set[str]) -> Iterator[str]:
    """Private names in a file that are torch's, or at least none of this package's ``own``."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith("torch"):
                names = [*module.split("."), *(alias.name for alias in node.names)]
            case ast.Import():
                paths = [alias.name for alias in node.names]
                names = [part for p in paths if p.startswith("torch") for part in p.split(".")]
            case ast.Attribute(attr=name):
                names = [name] if name not in own else []
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, name, *_]):
                names = [name.value] if isinstance(name, ast.Constant) else []
            case _:
                continue
        yield from (name for name in names if re.match(r"_(?!_)", str(name)))


def own_names(files: list[Path]) -> set[str]:
    """Private names that the package itself defines: functions, classes, attributes."""
    found: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name):
                found.add(name)
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                found.add(name)
    return found


def test_private_names_stand_in_their_files() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if not f.name.startswith("torch_private")]
    own = own_names(files)
    found = {(f.name, name) for f in files for name in private_names(f, own)}
    assert {name for _, name in found} == ATTRIBUTES | OTHERS, found


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch._dynamo.eval_frame", "_no_such_name"), ("torch._no_such_module", "anything")],
)
def test_what_torch_lacks_is_told_by_name(module: str, name: str) -> None:
    with pytest.raises(TorchVersionError) as raised:
        torch_private.look_up(module, name)
    assert re.search("_no_such_(name|module)", str(raised.value))
    assert f"torch {torch.__version__} does not have" in str(raised.value)


def test_what_torch_lacks_ends_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_assert_async")
    source = Path(torch_private.__file__).read_text()
    with pytest.raises(TorchVersionError, match="_assert_async"):
        exec(compile(source, "another torch_private", "exec"), {"__name__": "another"})


# ---- the dispatcher and autograd


def test_the_library_is_a_file_that_is_loaded() -> None:
    if sys.platform == "linux":
        assert torch_private.LIBRARY in Path("/proc/self/maps").read_text()


def test_a_schema_has_names_defaults_and_who_is_written() -> None:
    schema = torch_private.schema_of(torch.ops.aten.add_.Tensor)
    assert schema.name == "aten::add_"
    first, second, alpha = schema.arguments
    assert (first.name, str(first.type), first.alias_info.is_write) == ("self", "Tensor", True)
    assert second.alias_info is None
    assert (alpha.name, alpha.default_value, alpha.is_out) == ("alpha", 1, False)
    assert isinstance(torch.ops.aten.add_, torch_private.OpOverloadPacket)
    assert isinstance(torch.ops.aten.add_.Tensor, torch_private.OpOverload)


def test_whether_a_profiler_runs() -> None:
    assert not torch_private.is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch_private.is_profiling()
    assert not torch_private.is_profiling()


def test_below_autograd_nothing_is_recorded() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch_private.below_autograd():
        assert not torch.ops.aten.mul.Tensor(x, x).requires_grad
    assert torch.ops.aten.mul.Tensor(x, x).requires_grad


def test_gradients_are_wanted_by_tensors_in_lists_too() -> None:
    plain, wants = torch.ones(2), torch.ones(2, requires_grad=True)
    assert torch_private.any_requires_grad(1, [plain, wants])
    assert not torch_private.any_requires_grad(1, [plain])


def test_function_transforms_are_seen() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_private.are_transforms_active(), torch_private.is_transformed(x)))
        with torch_private.as_python_calls():
            return x

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    assert seen == [(False, False), (True, True)]


def test_forward_mode_is_seen() -> None:
    assert not torch_private.in_forward_mode()
    with forward_ad.dual_level():
        assert torch_private.in_forward_mode()


def test_autocast_is_kept_out() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with torch_private.without_keys(torch_private.AUTOCAST):
            assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("device", ["CPU", "CUDA", "XPU"])
def test_autocast_has_a_key_for_each_kind_of_device(device: str) -> None:
    assert torch_private.AUTOCAST.has(getattr(torch._C.DispatchKey, f"Autocast{device}"))


def test_an_assertion_has_its_message() -> None:
    torch_private.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="out of range"):
        torch_private.assert_async(torch.tensor(False), "out of range")


# ---- tensors and modules


class Loud(Tensor):
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("was asked")


def test_classes_are_not_asked_where_tensors_are_plain() -> None:
    loud = torch_private.make_subclass(Loud, torch.ones(2))
    with torch_private.as_plain_tensors():
        assert loud.sum() == 2
    with pytest.raises(AssertionError, match="was asked"):
        loud.sum()


def test_a_subclass_has_the_same_memory() -> None:
    plain = torch.ones(2)
    loud = torch_private.make_subclass(Loud, plain)
    with torch_private.as_plain_tensors():
        assert loud.data_ptr() == plain.data_ptr()


def test_guards_tell_shape_strides_and_dtype() -> None:
    x = torch.ones(2, 3)
    guards = torch_private.TensorGuards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    assert guards.check(torch.zeros(2, 3))
    for other in (torch.ones(3, 2), torch.ones(3, 2).t(), torch.ones(2, 3).double()):
        assert not guards.check(other)


def test_tensors_that_are_made_of_tensors_are_known() -> None:
    assert torch_private.is_wrapper(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not torch_private.is_wrapper(torch.ones(2))


def test_storages_are_known_by_a_key() -> None:
    with torch_private.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(4))
        assert isinstance(fake, torch_private.FakeTensor)
    for x in (torch.ones(4), fake):
        assert torch_private.storage_key(x) == torch_private.storage_key(x[1:])
        assert torch_private.storage_key(x) != torch_private.storage_key(torch.ones(4))


def test_attributes_that_are_read_where_they_are_used() -> None:
    x = torch.ones(4)
    before = x._version
    x.add_(1)
    assert x._version > before
    assert x[1:]._base is x
    assert x._base is None
    assert x._cdata == x.view_as(x)._base._cdata  # type: ignore[union-attr]
    module = nn.BatchNorm1d(2)
    assert {*module._parameters} == {"weight", "bias"}
    assert {*module._buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    assert nn.Sequential(module)._modules == {"0": module}
    seen: list[str] = []
    module._forward_pre_hooks[-1] = lambda *_: seen.append("before")
    module._forward_hooks[-1] = lambda *_: seen.append("after")
    module(torch.ones(2, 2))
    assert seen == ["before", "after"]


def test_trees_are_mapped() -> None:
    assert torch_private.tree_map_only(int, str, ([1, 2.0], {"a": 3})) == (["1", 2.0], {"a": "3"})


def test_a_parameter_of_a_tensors_class_is_marked() -> None:
    class Quiet(Tensor):
        pass

    held = nn.Parameter(torch_private.make_subclass(Quiet, torch.ones(2)))
    assert type(held) is Quiet
    assert torch_private.has_parameter_mark(held)
    assert not torch_private.has_parameter_mark(torch.ones(2))


def test_what_is_wrapped_by_compile_is_found() -> None:
    module = nn.Linear(2, 2)
    assert torch_private.unwrapped(torch.compile(module)) is module
    assert torch_private.unwrapped(module) is module


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_module_is_called_as_before_it_was_compiled() -> None:
    module, graphs = Twice(), Graphs()
    module.compile(backend=graphs)
    with torch_private.without_compiled_calls([module]):
        module(torch.ones(2))
    assert not graphs.seen
    module(torch.ones(2))
    assert len(graphs.seen) == 1


def test_calls_go_through_what_is_set() -> None:
    module = Twice()
    plain = torch_private.uncompiled(module)
    torch_private.call_through(module, lambda x: plain(x) + 1)
    assert module(1) == plain(1) + 1
    assert torch_private.called_through(module) is not None
    torch_private.call_through(module, None)
    assert module(1) == plain(1)


def test_all_hooks_around_calls_are_found() -> None:
    module = nn.Linear(2, 2)
    kinds = "forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"
    before = sum(map(len, torch_private.hooks([module])))
    for kind in kinds:
        getattr(module, f"register_{kind}")(lambda *_: None)
    of_all = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert sum(map(len, torch_private.hooks([module]))) == before + len(kinds) + 1
    of_all.remove()


def test_what_cannot_be_captured_whole_is_told_by_known_errors() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch_private_dynamo.capture_errors()):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_a_length_that_may_vary_is_compiled_once() -> None:
    compiled = torch.compile(torch.sin, backend="eager")
    for length in (3, 4):
        x = torch.ones(length)
        if length == 3:
            torch_private_dynamo.let_vary(x, [-1])
        compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_object_that_dynamo_would_guard_is_another() -> None:
    x = torch.ones(2)
    assert torch_private_dynamo.without_address(x) is x
    torch._dynamo.mark_static_address(x)
    other = torch_private_dynamo.without_address(x)
    assert other is not x
    assert other.data_ptr() == x.data_ptr()


def test_fsdps_parameters_are_looked_for_where_it_is_loaded() -> None:
    import torch.distributed.fsdp

    assert not torch_private_distributed.is_filled_by_fsdp(torch.ones(2))


def test_a_dtensor_wraps_its_shard() -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard

    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        whole = nn.Parameter(DTensor.from_local(torch.ones(2, 3, 4), mesh, [Shard(0)]))
        module = nn.ParameterDict({"whole": whole, "plain": torch.ones(2, 3, 4)})
        assert torch_private_distributed.is_dtensor(whole)
        assert not torch_private_distributed.is_dtensor(module["plain"])
        assert torch_private_distributed.dtensors_in([module]) == [whole]
        shard = torch_private_distributed.shard_of(whole)
        assert shard is torch_private_distributed.shard_of(whole)
        assert shard.data_ptr() == whole.to_local().data_ptr()
        assert not torch_private_distributed.why_no_shard(whole)
        partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        assert "Partial" in torch_private_distributed.why_no_shard(partial)
    finally:
        dist.destroy_process_group()
