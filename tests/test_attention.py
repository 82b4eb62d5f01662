"""``mxfp4::attention_with_sinks``: all masks, dtypes and layouts against float64, and its memory.

The exact result is that of transformers' own eager attention in float64.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from allocations import LargestAllocation
from combinations import covering
from implementations import randn
from models import DTYPES
from oracle import Bounded, assert_within, attention_error
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.ops import cpu_attention
from mxfp4_fx.ops.operands_around import Attention

attention_with_sinks = torch.ops.mxfp4.attention_with_sinks
KERNELS = ("reference", "pytorch", "cpu")
SCALE = 0.3


@dataclass(frozen=True)
class Operands:
    """Operands of an attention; see ``ops/reference.py``."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    mask: Tensor | None

    @staticmethod
    def random(
        heads: tuple[int, int] = (6, 2),
        queries: int = 5,
        keys: int = 9,
        size: int = 16,
        batch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> Operands:
        """Draw operands without a mask; ``heads`` are those of queries and of keys."""
        return Operands(
            randn(batch, heads[0], queries, size, dtype=dtype, seed=1),
            randn(batch, heads[1], keys, size, dtype=dtype, seed=2),
            randn(batch, heads[1], keys, size, dtype=dtype, seed=3),
            randn(heads[0], dtype=dtype, seed=4),
            None,
        )

    def masked(self, mask: Tensor | None) -> Operands:
        return replace(self, mask=None if mask is None else mask.to(self.query.dtype))

    def run(self, by: str = "cpu") -> Tensor:
        result: Tensor = attention_with_sinks(*self.given, SCALE, by)
        return result

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.query, self.key, self.value, self.sinks, self.mask

    def eager(self, dtype: torch.dtype | None = None) -> Tensor:
        """The result of transformers' code, in another dtype if one is given."""
        query, key, value, sinks = (
            tensor.to(dtype or tensor.dtype)
            for tensor in (self.query, self.key, self.value, self.sinks)
        )
        module = types.SimpleNamespace(
            num_key_value_groups=query.shape[1] // key.shape[1], sinks=sinks, training=False
        )
        mask = None if self.mask is None else self.mask.to(query.dtype)
        result: Tensor = eager_attention_forward(module, query, key, value, mask, SCALE)[0]
        return result


def check(operands: Operands, by: str = "cpu") -> Tensor:
    result = operands.run(by)
    assert result.is_contiguous()
    exact = operands.eager(torch.float64)
    infinite = exact.isinf()
    assert torch.equal(result.double()[infinite], exact[infinite])
    expected = Bounded(exact, attention_error(*operands.given, SCALE))
    assert_within(result[~infinite], expected[~infinite])
    return result


# ---- masks


def low(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def causal(queries: int, keys: int, fill: float) -> Tensor:
    """Let query i see the keys up to keys - queries + i."""
    return torch.full((1, 1, queries, keys), fill).triu(keys - queries + 1)


def sliding(queries: int, keys: int, fill: float, window: int = 3) -> Tensor:
    older = torch.full((1, 1, queries, keys), fill).tril(keys - queries - window)
    return torch.where(older == 0, causal(queries, keys, fill), older)


def padded(queries: int, keys: int, fill: float) -> Tensor:
    """Let the first of two sequences begin with padding, whose own rows see nothing."""
    mask = causal(queries, keys, fill).repeat(2, 1, 1, 1)
    mask[0, :, :, : keys - queries + 2] = fill
    return mask


MASKS: dict[str, Callable[[int, int, float], Tensor | None]] = {
    "none": lambda queries, keys, fill: None,
    "causal": causal,
    "sliding": sliding,
    "padded": padded,
    "nothing is seen": lambda queries, keys, fill: torch.full((1, 1, queries, keys), fill),
    "of any numbers": lambda queries, keys, fill: randn(2, 6, queries, keys, seed=7) * 3,
    "of heads": lambda queries, keys, fill: randn(1, 6, 1, keys, seed=7) * 3,
    "of queries": lambda queries, keys, fill: randn(queries, 1, seed=7) * 3,
}


@pytest.mark.parametrize(
    ("dtype", "name", "queries", "fill", "by"),
    covering(DTYPES, tuple(MASKS), (1, 2, 9, 300), ("lowest", "-inf"), KERNELS),
)
def test_masks(dtype: torch.dtype, name: str, queries: int, fill: str, by: str) -> None:
    keys = max(9, queries)
    lowest = low(dtype) if fill == "lowest" else -torch.inf
    operands = Operands.random(queries=queries, keys=keys, dtype=dtype)
    result = check(operands.masked(MASKS[name](queries, keys, lowest)), by)
    if name == "nothing is seen":
        assert not result.any()


@pytest.mark.parametrize(
    ("dtype", "heads", "key_heads", "queries", "keys", "size"),
    covering(DTYPES, ((6, 2), (6, 6), (6, 1), (1, 1)), (1, 2, 7, 130), (1, 2, 33, 700), (1, 5, 64)),
)
def test_sizes(
    dtype: torch.dtype, heads: int, key_heads: int, queries: int, keys: int, size: int
) -> None:
    operands = Operands.random((heads, key_heads), queries, keys, size, dtype=dtype)
    mask = torch.where(randn(2, 1, queries, keys, seed=5) > 1, low(dtype), 0.0)
    check(operands.masked(mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-1e4, -300.0, -50.0, 50.0, 300.0, 1e4])
def test_sinks_far_from_the_logits(dtype: torch.dtype, shift: float) -> None:
    """A sink takes all weight or none, and what the mask hides may weigh more than it."""
    operands = Operands.random(queries=9, dtype=dtype)
    operands = replace(operands, sinks=operands.sinks + shift)
    for name in ("none", "padded"):
        check(operands.masked(MASKS[name](9, 9, low(dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [-1.0, -60.0, -150.0, -1000.0])
def test_a_mask_that_hides_only_in_part(dtype: torch.dtype, fill: float) -> None:
    operands = Operands.random(queries=9, dtype=dtype)
    check(operands.masked(padded(9, 9, fill)))
    check(replace(operands, sinks=operands.sinks + fill).masked(padded(9, 9, fill)))


@pytest.mark.parametrize("without", ["batch", "queries", "keys"])
@pytest.mark.parametrize("by", KERNELS)
def test_nothing_to_compute(without: str, by: str) -> None:
    operands = Operands.random(**{without: 0})  # type: ignore[arg-type]
    result = operands.run(by)
    assert torch.equal(result, operands.eager())


# ---- layouts of the operands


def gapped(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads behind tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "gaps": gapped,
    "part of a cache": lambda x: torch.cat([x, x], dim=2)[:, :, 3 : 3 + x.shape[2]],
    "one for the batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 5])
def test_layouts(layout: str, queries: int) -> None:
    operands, change = Operands.random(queries=queries), LAYOUTS[layout]
    operands = replace(operands, query=change(operands.query), key=change(operands.key))
    operands = replace(operands, value=change(operands.value), sinks=operands.sinks[::1])
    for mask in (None, randn(2, 1, queries, 9), randn(2, 1, 9, queries).transpose(2, 3)):
        check(operands.masked(mask))


# ---- NaN and infinity


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "sinks", "mask"])
@pytest.mark.parametrize("queries", [1, 9])
def test_nan_and_infinity(value: float, where: str, queries: int) -> None:
    """They reach the results that they reach in the original, from behind a mask, too."""
    for lowest in (low(torch.float32), -torch.inf):
        operands = Operands.random(queries=queries).masked(padded(queries, 9, lowest))
        changed = getattr(operands, where)
        changed[(0,) * changed.ndim] = value
        check(operands)


def test_an_infinite_query_that_sees_nothing() -> None:
    """All its logits are minus infinity: the sink takes all weight."""
    operands = Operands.random(queries=1)
    operands = replace(operands, key=operands.key.abs() + 1)
    operands.query[0, 1, 0, 2] = -torch.inf
    assert not check(operands)[0, 0, 1].any()


def test_all_weight_on_no_key() -> None:
    """Without a sink and with all keys at -inf, softmax makes NaN."""
    operands = Operands.random().masked(torch.full((1, 1, 5, 9), -torch.inf))
    operands.sinks[1] = -torch.inf
    assert check(operands).isnan().any()


# ---- memory


def test_memory_is_linear_in_the_tokens() -> None:
    """Nothing as large as the weights of one head is made, and K and V are not repeated."""
    tokens = 1024
    operands = Operands.random((16, 2), tokens, tokens, 32, batch=1, dtype=torch.bfloat16)
    operands = operands.masked(causal(tokens, tokens, low(torch.bfloat16)))
    with LargestAllocation() as watched:
        operands.run()
    one_head = tokens * tokens * 2
    assert watched.bytes_besides(*operands.given) <= one_head  # the mask of one block of queries
    with LargestAllocation() as watched:
        operands.eager()
    assert watched.bytes_besides(*operands.given) > 16 * one_head


def test_one_query_repeats_no_keys() -> None:
    operands = Operands.random((64, 8), 1, 4096, 64, batch=1, dtype=torch.bfloat16)
    with LargestAllocation() as watched:
        operands.run()
    given = (operands.query, operands.key, operands.value, operands.sinks)
    assert watched.bytes_besides(*given) <= operands.key.nbytes // 8


def test_keys_that_the_mask_hides_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    block = cpu_attention._block

    def counted(operands: Attention, out: Tensor) -> None:
        read.append(operands.key.shape[2])
        block(operands, out)

    monkeypatch.setattr(cpu_attention, "_block", counted)
    monkeypatch.setattr(cpu_attention, "_BLOCK", 10)
    operands = Operands.random(queries=30, keys=30)
    for name, expected in {
        "causal": [10, 20, 30],
        "sliding": [10, 12, 12],
        "nothing is seen": [],
        "none": [30, 30, 30],
    }.items():
        check(operands.masked(MASKS[name](30, 30, low(torch.float32))))
        assert read == expected
        read.clear()


# ---- the op


@pytest.mark.parametrize("by", KERNELS)
def test_opcheck(by: str) -> None:
    for queries, mask in ((1, None), (5, causal(5, 9, -torch.inf))):
        given = Operands.random(queries=queries)
        arguments = (given.query, given.key, given.value, given.sinks, mask, SCALE, by)
        torch.library.opcheck(attention_with_sinks.default, arguments)


WRONG: dict[str, tuple[type[Exception], Operands]] = {
    "of one dtype": (TypeError, replace(Operands.random(), sinks=randn(6).double())),
    "must be float32, bfloat16": (TypeError, Operands.random(dtype=torch.float64)),
    r"query must be \[B, H, Q, D\]": (
        ValueError,
        replace(Operands.random(), query=randn(6, 5, 16)),
    ),
    r"key and value \[B, KV, T, D\]": (
        ValueError,
        replace(Operands.random(), value=randn(2, 2, 8, 16)),
    ),
    "where KV divides 6": (ValueError, Operands.random(heads=(6, 4))),
    r"sinks must be \[6\]": (ValueError, replace(Operands.random(), sinks=randn(5))),
    "mask must broadcast to": (ValueError, Operands.random().masked(randn(3, 1, 5, 9))),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("by", KERNELS)
def test_operands_that_do_not_fit(message: str, by: str) -> None:
    error, operands = WRONG[message]
    for device in ("cpu", "meta"):
        given = [
            None if tensor is None else tensor.to(device)
            for tensor in (
                operands.query,
                operands.key,
                operands.value,
                operands.sinks,
                operands.mask,
            )
        ]
        with pytest.raises(error, match=message):
            attention_with_sinks(*given, SCALE, by)
