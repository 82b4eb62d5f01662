"""Models that are compiled and dropped leave nothing compiled behind: a server may load others."""

from __future__ import annotations

import gc
import linecache
import types
import weakref

import pytest
import torch
from models import model, tokens
from torch import Tensor
from torch._dynamo import eval_frame, pgo
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import get_metrics_context
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import mxfp4_fx
from mxfp4_fx import limits
from mxfp4_fx.core import torch_private_dynamo, torch_private_forget

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_what_dynamo_compiled_goes_with_a_function() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] < 10 else x

    code = function.__code__.replace(co_name="own")
    own = types.FunctionType(code, globals())
    torch_private_forget.forget_with(own)
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    for length in (3, 4):  # the second time for any length
        compiled(torch.ones(length))
    assert torch_private_dynamo.is_compiled(code)
    assert code in torch._dynamo.utils.guard_failures
    del own, compiled
    gc.collect()
    assert not torch_private_dynamo.is_compiled(code)
    assert code not in torch._dynamo.utils.guard_failures
    assert not ShapeEnv.get_implications.cache_info().currsize


def symbolic_sizes() -> int:
    """How many compilations' sizes are in memory, with fake tensors and all else that they hold."""
    gc.collect()
    return sum(type(one) is ShapeEnv for one in gc.get_objects())


def guards() -> int:
    """How many compilations' guards are in memory."""
    found = [one for one in gc.get_objects() if type(one).__name__ == "GuardManagerWrapper"]
    return sum(one.root is not None for one in found)


def finalizers() -> int:
    """How many finalizers of what Dynamo guards are registered."""
    found = [one.peek() for one in list(weakref.finalize._registry)]  # type: ignore[attr-defined]
    functions = [one[1] for one in found if one is not None]
    return sum(getattr(one, "func", one).__qualname__.endswith("invalidate") for one in functions)


def notes() -> dict[str, int]:
    """The lengths of torch's tables of what it noted, and of ours of functions."""
    return {
        "sizes": len(pgo.get_code_state()),
        "backends": len(eval_frame.cached_backends),
        "sources": len(graph_module._loader.eval_cache),
        "lines": sum("eval_with_key" in file for file in linecache.cache),
        "told": len(get_metrics_context()._edits),
        "code": len(limits._shared),
    }


def test_what_dynamo_noted_goes_with_a_model() -> None:
    seen = []
    for _ in range(3):
        whole = mxfp4_fx.compile(model(num_hidden_layers=1), options={"inner": "eager"})
        whole(tokens(1), use_cache=True)
        compiled = notes()
        del whole
        gc.collect()
        seen.append(notes())
        assert all(compiled[name] > count for name, count in seen[-1].items())
    # Until others are compiled, Dynamo holds the graphs that it has compiled last.
    assert seen[2] == seen[1]


def test_what_dynamo_compiled_goes_with_a_model() -> None:
    before, sizes, guarded = {*limits._shared}, symbolic_sizes(), guards()
    finalized = finalizers()
    whole = mxfp4_fx.compile(model(num_hidden_layers=1), options={"inner": "eager"})
    whole(tokens(1), use_cache=False)
    assert symbolic_sizes() > sizes
    assert guards() > guarded
    assert finalizers() > finalized
    codes = [code for code in limits._shared if code not in before]
    held = weakref.ref(whole)
    assert any(map(torch_private_dynamo.is_compiled, codes))
    del whole
    gc.collect()
    assert held() is None
    assert not any(map(torch_private_dynamo.is_compiled, codes))
    assert symbolic_sizes() == sizes
    assert guards() == guarded
    assert finalizers() == finalized


def test_the_sizes_of_a_model_that_lives_are_guarded() -> None:
    """A graph without experts too, of which nothing is left but the captured graph itself."""
    before = {*limits._shared}
    whole = mxfp4_fx.compile(model(num_hidden_layers=1), options={"inner": "eager"})
    whole(tokens(1), use_cache=True)
    gc.collect()
    named = {code.co_name.partition("_")[0]: code for code in limits._shared if code not in before}
    head = named["head"]
    (entry,) = _debug_get_cache_entry_list(head)
    assert "2 <= L['hidden'].size()[1]" in str(entry.guard_manager)
