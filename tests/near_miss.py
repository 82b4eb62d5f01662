"""Near misses: transformers' code with one change, and the assertion that it is not rewritten."""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import expecttest
import pytest
import torch
from models import Graphs, compile_with, hidden, mlp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssExperts,
    GptOssMLP,
    GptOssTopKRouter,
)

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteWarning


def edited(
    function: Callable[..., Any], changes: dict[str, str], **names: Any
) -> Callable[..., Any]:
    """Return a copy of ``function`` with parts of its source replaced.

    Args:
        function: the original.
        changes: old text -> new text; the old text occurs exactly once in the source.
        names: further global names of the copy, and their values.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} does not occur once in\n{source}"
        source = source.replace(old, new)
    namespace = {**function.__globals__, **names}
    exec(source, namespace)
    return namespace[function.__name__]


def swap_methods(module: nn.Module, **methods: Any) -> None:
    """Change the class of ``module`` to a subclass with these methods; its weights stay."""
    module.__class__ = type("Edited", (type(module),), methods)


def with_gate(changes: dict[str, str], form: str = "grouped_mm") -> GptOssMLP:
    """Make an MLP with an edited ``_apply_gate``."""
    module = mlp(form=form)
    swap_methods(module.experts, _apply_gate=edited(GptOssExperts._apply_gate, changes))
    return module


def with_router(changes: dict[str, str]) -> GptOssMLP:
    """Make an MLP with an edited router."""
    module = mlp()
    swap_methods(module.router, forward=edited(GptOssTopKRouter.forward, changes))
    return module


def with_experts(changes: dict[str, str], form: str = "grouped_mm") -> GptOssMLP:
    """Make an MLP with an edited form of the experts."""
    module = mlp(form=form)
    swap_methods(module.experts, forward=edited(ALL_EXPERTS_FUNCTIONS[form], changes))
    return module


def mxfp4_ops(graphs: Graphs) -> list[str]:
    """Return the names of the ops that the backend made, in the order of the graphs.

    Packed experts call the same ops, but without the argument ``kernels``.
    """
    made = [node for gm in graphs.seen for node in gm.graph.nodes if "kernels" in node.kwargs]
    return [str(node.target) for node in made]


def state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(a, e), f"off by up to {(a - e).abs().max()}"


def missed(module: nn.Module, *inputs: Any, dynamic: bool = False, **options: Any) -> str:
    """Assert that ``module`` is compiled without being rewritten; return the reasons.

    Two calls must give the same bits as the uncompiled module: in the results, the weights and the
    inputs, which the calls may write to.
    """
    (eager, eager_inputs), (compiled, compiled_inputs) = (
        copy.deepcopy((module, inputs)) for _ in range(2)
    )
    graphs = Graphs()
    run = compile_with(compiled, graphs, dynamic=dynamic, options=options)
    with pytest.warns(MissedRewriteWarning, match="not in MXFP4") as told:
        results = [run(*compiled_inputs)]
    results.append(run(*compiled_inputs))
    expected = [eager(*eager_inputs), eager(*eager_inputs)]
    assert_same_bits(results, expected)
    assert_same_bits([state(compiled), compiled_inputs], [state(eager), eager_inputs])
    assert not mxfp4_ops(graphs)
    return _in_lines(
        _PLACE.sub("", line.strip())
        for warning in told
        if issubclass(warning.category, MissedRewriteWarning)
        for line in str(warning.message).splitlines()[1:]
    )


# Where in transformers' code a miss is: what a warning has behind the reason.
_PLACE = re.compile(r" \(at \S+:\d+: .*\)$")


def reasons(told: mxfp4_fx.Explanation) -> str:
    """Return the misses in lines that fit into a source file."""
    return _in_lines(f"{miss.layer}: {miss.reason}" for miss in told.misses)


def _in_lines(misses: Iterable[str]) -> str:
    return "".join(textwrap.fill(miss, 92) + "\n" for miss in misses)


@pytest.mark.usefixtures("no_gradients")
class NearMisses(expecttest.TestCase):
    """Tests without gradients, with the reasons as snapshots."""

    def assert_missed(self, module: nn.Module, expect: str, *inputs: Any, **options: Any) -> None:
        """Assert that ``module`` is not rewritten, for the reason ``expect``.

        The default input is large enough to reach SwiGLU's limits.
        """
        actual = missed(module, *(inputs or (hidden() * 8,)), **options)
        self.assertExpectedInline(actual, expect, skip=1)
