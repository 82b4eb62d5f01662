"""Experts of every family of the installed transformers are rewritten, and compute what they did.

``CLASSES`` of the kinds run in ``make test``; every class, and whole models, in ``make test-all``.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import families
import pytest
import torch
from models import DTYPES, Graphs, compile_with
from near_miss import missed
from oracle import assert_as_accurate, random_logits
from torch import Tensor

pytestmark = pytest.mark.usefixtures("no_gradients")

FORMS = ("grouped_mm", "batched_mm")
STRICT = {"strict": True, "verify": True}
# A class of each kind of experts' arithmetic -> the activation that its graph has.
KINDS: dict[str, tuple[str, float, float, float]] = {
    "Qwen3MoeExperts": ("swiglu", 1.0, torch.inf, 0.0),
    "AriaExperts": ("swiglu", 1.0, torch.inf, 0.0),  # [E, K, N]
    "DeepseekV4Experts": ("swiglu", 1.0, 10.0, 0.0),  # clamped
    "MiniMaxM3VLExperts": ("swiglu", 1.702, 7.0, 1.0),  # GPT-OSS's in halves
    "OpenAIPrivacyFilterExperts": ("swiglu", 1.702, 7.0, 1.0),  # the same, [E, K, N], with biases
    "GptOssExperts": ("swiglu", 1.702, 7.0, 1.0),
    "Gemma4TextExperts": ("geglu_tanh", 1.0, torch.inf, 0.0),
    "NemotronHExperts": ("relu2", 1.0, torch.inf, 0.0),
}
# Why the others are not rewritten.
KNOWN_MISSES = {
    "Inkling2Experts": "not the grouped_mm form",  # soft-capped by tanh
    "MuseSparkExperts": "not the grouped_mm form",  # a norm behind each expert
}


def x_and_logits(dtype: torch.dtype = torch.float32, tokens: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((tokens, families.H), generator=generator) * 8  # reaches the limits
    return x.to(dtype), random_logits(tokens, families.E, dtype)


def activation_in(graphs: Graphs) -> tuple[str, float, float, float]:
    (gm,) = graphs.seen
    first, second = (n for n in gm.graph.nodes if str(n.target).startswith("mxfp4.matmul_ogs"))
    assert "activation" not in second.kwargs
    usual = {"up_offset": 1.0}
    names = ("activation", "alpha", "limit", "up_offset")
    return tuple((usual | first.kwargs)[name] for name in names)  # type: ignore[return-value]


def check(block: Any, *calls: tuple[Tensor, ...], **options: Any) -> Graphs:
    """Compile a block, verified; its results are about as accurate as those of the uncompiled one.

    Args:
        calls: the inputs of each call. If there are several, shapes are dynamic.
    """
    graphs = Graphs()
    dynamic = True if len(calls) > 1 else None
    run = compile_with(block, graphs, dynamic=dynamic, options={**STRICT, **options})
    exact = copy.deepcopy(block).double()
    exact.experts.config._experts_implementation = "batched_mm"  # grouped_mm has no float64
    for inputs in calls:
        ideal = exact(*(value.double() for value in inputs))
        assert_as_accurate(run(*inputs), block(*inputs), ideal.double())
    assert len(graphs.seen) == 1
    return graphs


# Each kind with one form and one dtype in ``make test``; all products in ``make test-all``.
CASES = [
    pytest.param(
        *(name, form, dtype),
        id=f"{name}-{form}-{str(dtype).removeprefix('torch.')}",
        marks=[] if (at + 3 * (form == "batched_mm") + DTYPES.index(dtype)) % 6 == 0
        else pytest.mark.exhaustive,
    )
    for (at, name), form, dtype in itertools.product(enumerate(KINDS), FORMS, DTYPES)
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "dtype"), CASES)
def test_a_kind_of_experts(name: str, form: str, dtype: torch.dtype) -> None:
    block = families.Block(families.experts(name, form, dtype), wide=dtype != torch.float32)
    assert activation_in(check(block, x_and_logits(dtype))) == KINDS[name]


ALIKE = [names for names in families.written_alike() if KNOWN_MISSES.keys().isdisjoint(names)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("names", ALIKE, ids=lambda names: names[0])
def test_every_class_of_the_installed_transformers(names: list[str]) -> None:
    """Of classes of one source, one of each form with each activation that their configs have."""
    by_activation: dict[str, list[str]] = {}
    for name in names:
        activation = str(getattr(families.experts(name), "act_fn", None))
        by_activation.setdefault(activation, []).append(name)
    for alike in by_activation.values():
        for form, name in zip(FORMS, (alike[0], alike[-1]), strict=True):
            check(families.Block(families.experts(name, form)), x_and_logits())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_the_eager_loop_of_a_kind(name: str) -> None:
    """transformers loops over the experts; captured is its grouped form."""
    check(families.Block(families.experts(name, "eager")), x_and_logits())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KNOWN_MISSES)
def test_classes_that_are_known_misses(name: str) -> None:
    block = families.Block(families.experts(name))
    assert KNOWN_MISSES[name] in missed(block, *x_and_logits())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_dynamic_lengths(name: str) -> None:
    block = families.Block(families.experts(name))
    check(block, *(x_and_logits(tokens=tokens) for tokens in (7, 5)))
