"""What is taken of torch's exporter and of AOTInductor does what it is trusted to.

``tests/test_exported.py`` compiles and loads a package.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import exc
from torch.export import Dim

from mxfp4_fx.core import torch_private_export as private


class Halves(nn.Module):
    """Returns a dict of tuples, does not read its second input, and asks a result for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: Tensor, unread: Tensor, *, by: float) -> dict[str, Any]:
        y = torch.cat([x * self.weight, x], dim=0)
        return {"pair": (y * by, y.new_ones(y.size(0)))}


X = torch.randn(3, 4)
UNREAD = torch.zeros(2)


@pytest.mark.parametrize("shapes", [None, {"x": {0: Dim("T", min=1, max=9)}}], ids=["fixed", "any"])
def test_a_module_is_captured_in_torchs_calls(shapes: Any) -> None:
    module = Halves()
    if shapes is not None:
        shapes = {**shapes, "unread": None, "by": None}
    gm = private.capture(module, (X, UNREAD), {"by": 2.0}, shapes)
    flat = gm.graph.find_nodes(op="placeholder")
    assert len(flat) == 3
    assert torch.cat in [node.target for node in gm.graph.nodes]
    (weight,) = gm.graph.find_nodes(op="get_attr")
    assert gm.get_parameter(weight.target) is module.weight
    tensors = [*flat[:2], weight, *gm.graph.find_nodes(op="call_function", target=torch.cat)]
    assert all(isinstance(node.meta["example_value"], Tensor) for node in tensors)
    (cat,) = gm.graph.find_nodes(op="call_function", target=torch.cat)
    assert "size" not in {user.target for user in cat.users}

    signature = private.take_signature(gm.graph)
    assert private.result_of(signature) == {"pair": (0, 1)}
    gm.recompile()
    flat_results = gm(X, UNREAD, 2.0)
    private.give_signature(gm.graph, signature, {"a": 0, "b": 1})
    gm.recompile()
    results = gm(X, UNREAD, by=2.0)
    assert [*results] == ["a", "b"]
    for mine, other in zip(results.values(), flat_results, strict=True):
        assert torch.equal(mine, other)


def test_leaves_have_paths() -> None:
    assert private.leaves(({"a": 1}, [2, None])) == {"[0]['a']": 1, "[1][0]": 2, "[1][1]": None}


@pytest.mark.parametrize("most", [9, None])
def test_the_sizes_of_inputs_are_known(most: int | None) -> None:
    program = torch.export.export(
        nn.ReLU(), (X,), dynamic_shapes=({0: Dim("T", min=2, max=most)},), strict=False
    )
    (value,) = private.known_values(program).values()
    symbol, *bounds = private.range_of(program, value.shape[0])
    assert symbol.isidentifier()
    assert bounds == [2, most]
    assert value.shape[1] == 4


def test_a_missing_compiler_is_told_with_who_needs_it() -> None:
    told = "AOTInductor needs a C\\+\\+ compiler"
    needs_it = private.without_compiler("AOTInductor")
    with pytest.raises(FileNotFoundError, match=told), needs_it:
        raise exc.InvalidCxxCompiler
    with pytest.raises(ValueError, match="another"), private.without_compiler("AOTInductor"):
        raise ValueError("another")


def test_inductors_options_go_before_those_of_a_mode() -> None:
    assert private.inductor_configs(None, {})["cpp.dynamic_threads"]
    configs = private.inductor_configs("max-autotune-no-cudagraphs", {"max_autotune": False})
    assert configs["max_autotune"] is False
