"""``free_weights`` for weights in every order in which models hold them."""

from __future__ import annotations

import pytest
import torch
from kept import sources
from torch import Tensor, nn

from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.weights.source import Source
from mxfp4_fx.weights.store import WeightStore
from mxfp4_fx.weights.swizzle import swizzle_weight

pytestmark = pytest.mark.usefixtures("no_gradients")


def random_sources(seed: int) -> list[Source]:
    """All sources of one weight [2, 12, 64]; its values are those of MXFP4."""
    values = torch.randn((2, 12, 64), generator=torch.Generator().manual_seed(seed))
    return sources(dequantize(*quantize(values), torch.float32))


def equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, some, others))


def bytes_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("layout", ["row_major", "cpu_panels", "mma_fragments"])
@pytest.mark.parametrize("at", range(len(random_sources(0))))
def test_a_weight_is_freed_and_comes_back(at: int, layout: str) -> None:
    given, changed = random_sources(0)[at], random_sources(1)[at]
    parameters = tuple(nn.Parameter(tensor.clone(), False) for tensor in given.tensors)
    source, store = Source(parameters, given.encoding), WeightStore()
    if layout in given.encoding.layouts:  # the kernels read the model's own memory
        assert not store.free(source, layout)
        return
    assert store.free(source, layout)
    assert bytes_of(parameters) == 0
    for name in (layout, "row_major", "cpu_panels"):  # for kernels of another layout, too
        assert equal(store.get(source, name), swizzle_weight(given, name))
    assert equal(store.values(source), given.tensors)
    assert store.restore(parameters) == len(parameters)
    assert equal(parameters, given.tensors)
    for parameter, tensor in zip(parameters, given.tensors, strict=True):
        assert parameter.stride() == tensor.stride()
    for parameter, tensor in zip(parameters, changed.tensors, strict=True):
        parameter.copy_(tensor)
    assert equal(store.get(source, layout), swizzle_weight(changed, layout))


def test_saving_makes_what_the_model_had() -> None:
    for given in random_sources(0):
        parameters = tuple(nn.Parameter(tensor.clone(), False) for tensor in given.tensors)
        store = WeightStore()
        assert store.free(Source(parameters, given.encoding), "cpu_panels")
        assert equal(tuple(map(store.values_of, parameters)), given.tensors)


def test_row_major_kernels_have_one_packed_copy_of_a_concatenated_weight() -> None:
    """Two sets of the packed bytes, and one when the model's is freed."""
    given = random_sources(0)[-1]
    parameters = tuple(nn.Parameter(tensor.clone(), False) for tensor in given.tensors)
    source, store, size = Source(parameters, given.encoding), WeightStore(), bytes_of(given.tensors)
    parts = store.get(source, "row_major")
    assert {part.data_ptr() for part in parts}.isdisjoint(p.data_ptr() for p in parameters)
    assert bytes_of((*parts, *parameters)) == 2 * size
    assert store.free(source, "row_major")
    parts = store.get(source, "row_major")
    assert bytes_of((*parts, *parameters)) == size


def test_a_freed_weight_that_is_read_in_another_order() -> None:
    """Where its values are is said by the order in which it was freed, not by the one asked for."""
    every = random_sources(0)
    for held, asked in ((every[2], every[3]), (every[5], every[4])):
        store = WeightStore()
        parameters = tuple(nn.Parameter(tensor.clone(), False) for tensor in held.tensors)
        assert store.free(Source(parameters, held.encoding), "cpu_panels")
        parts = store.get(Source(parameters, asked.encoding), "cpu_panels")
        expected = swizzle_weight(Source(held.tensors, asked.encoding), "cpu_panels")
        assert equal(parts, expected)
