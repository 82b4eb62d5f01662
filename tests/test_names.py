"""Layers have the names of ``named_modules``, in whatever way Dynamo comes to a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import hidden, mlp
from torch import Tensor, nn

import mxfp4_fx

pytestmark = pytest.mark.usefixtures("no_gradients")
MLP = mlp()


class Holds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class LooksFurther(Holds):
    """A wrapper that has the attributes of what it wraps, as PEFT's have."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, x: Tensor) -> Any:
        return self.inner.inner(x)


class InContainers(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.named = nn.ModuleDict({"first-one": nn.ModuleList([nn.Identity(), inner])})

    def forward(self, x: Tensor) -> Any:
        return self.named["first-one"][1](x)


class CallsForward(Holds):
    def forward(self, x: Tensor) -> Any:
        return self.inner.forward(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "attribute": Holds,
    "attributes that are looked up": lambda inner: LooksFurther(Holds(inner)),
    "containers": InContainers,
    "forward": CallsForward,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_name_is_that_of_named_modules(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = wrap(MLP)
    (rewrite,) = mxfp4_fx.explain(module, hidden()).rewrites
    assert dict(module.named_modules())[rewrite.layer] is MLP.experts


def test_a_compiled_part_is_named_as_if_it_were_not() -> None:
    module = Holds(torch.compile(MLP, backend="eager"))
    (rewrite,) = mxfp4_fx.explain(module, hidden()).rewrites
    assert rewrite.layer == "inner.experts"


def test_outside_of_modules_names_begin_with_the_variable() -> None:
    local = MLP
    held = {"the one": MLP}
    for function, name in {
        (lambda x: MLP(x)): "MLP.experts",
        (lambda x: local(x)): "experts",
        (lambda x: held["the one"](x)): "the one.experts",
        MLP.forward: "experts",
    }.items():
        torch.compiler.reset()
        (rewrite,) = mxfp4_fx.explain(function, hidden()).rewrites
        assert rewrite.layer == name
