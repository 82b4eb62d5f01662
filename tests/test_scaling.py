"""The model behind docs/scaling.md, and that the document has the tables that it gives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks import scaling_model as model
from benchmarks.scaling_model import FABRICS, LAUNCH, LAUNCHES, MEMORY, MODELS, NVLINK, Layout

NVLINKED, _, NETWORKED, EIGHTS = FABRICS
EXPERTS = list(MODELS.values())


def test_the_document_has_the_tables_of_the_model() -> None:
    text = scaling.DOCUMENT.read_text("utf-8")
    assert scaling.filled(text) == text
    assert {name for _, name, _ in scaling._BLOCK.findall(text)} == set(scaling.TABLES)


@pytest.mark.parametrize("experts", EXPERTS)
def test_as_many_experts_are_hit_as_chance_has_it(experts: int) -> None:
    for tokens in (1, 8, 32):
        rows = model.rows_of(experts, tokens)
        assert (rows.sum(1) == tokens * model.A).all()
        hit = (rows > 0).sum(1)
        expected = experts * (1 - (1 - model.A / experts) ** tokens)
        assert abs(hit.mean() - expected) <= 4 * hit.std() / math.sqrt(len(hit))


def test_popular_experts_make_a_rank_busier() -> None:
    busiest = [model.busiest(128, 2048, 8, skew) for skew in (0, 0.5, 1)]
    assert 1 < busiest[0] < busiest[1] < busiest[2] < 8


def test_the_slowest_rank_of_tp_reads_the_larger_share_of_blocks() -> None:
    rows = np.array([[1, 1, 1, 1, *[0] * 28]])
    (time,) = model.experts_time(rows, 1, Layout(1, 4))[0]
    inner = 23 * 32
    weights = 4 * model.EXPERT_BYTES * 23 / 90
    moved = 2 * (4 * (2 * 2880 + 2 * inner) + 5 * 2880)
    assert math.isclose(time - LAUNCHES * LAUNCH, (weights + moved) / MEMORY)


def test_a_rank_of_ep_reads_its_experts_and_stores_zeros_for_the_rest() -> None:
    rows = np.array([[2, 1, 0, 1, *[0] * 28]])
    times = model.experts_time(rows, 1, Layout(32, 1))[0] - LAUNCHES * LAUNCH
    others = 2 * 2 * 2880  # bytes of a row that is stored twice
    summed = 2 * 5 * 2880
    for time, mine in zip(times, rows[0], strict=True):
        own = model.EXPERT_BYTES * (mine > 0) + mine * 2 * 4 * 2880
        assert math.isclose(time, (own + (4 - mine) * others + summed) / MEMORY)


def test_latencies_of_an_all_reduce_are_nccls() -> None:
    ring = 6.6 + 2 * 0.6
    assert math.isclose(model.all_reduce(NVLINKED, 2, 0), ring)
    hosts = 6.8 + 2 * 7 * 0.6 + 2 * 3 * 5.0  # a tree over eight hosts of eight
    assert math.isclose(model.all_reduce(EIGHTS, 64, 0), hosts)
    size = 1e9  # of which latency is no part to speak of
    assert math.isclose(
        model.all_reduce(NVLINKED, 8, size), size * 14 / 8 / NVLINK.rate, rel_tol=0.02
    )


def test_all_to_all_sends_the_less_the_more_ranks_there_are() -> None:
    for ranks in scaling.RANKS:
        ratio = model.wire_bytes("all-to-all", ranks) / model.wire_bytes("all-reduce", ranks)
        assert math.isclose(ratio, model.A / ranks)


# --- what the document says in words


@pytest.mark.parametrize("experts", EXPERTS)
def test_few_tokens_are_for_tp_and_two_ranks_never_for_all_to_all(experts: int) -> None:
    for fabric, ranks in scaling.places():
        found = model.best(fabric, experts, 1, ranks)
        assert min(found, key=found.__getitem__) in ("TP", "both")
        if ranks == 2:
            kinds = {scaling.simplest(model.best(fabric, experts, t, 2)) for t in model.TOKENS}
            assert kinds == {"TP", "EP"}


def test_tp_and_ep_are_alike_once_all_experts_are_hit() -> None:
    for experts in EXPERTS:
        for ranks in (2, 4, 8):
            found = model.best(NVLINKED, experts, 4 * experts, ranks)
            assert math.isclose(found["TP"], found["EP"], rel_tol=0.05)


@pytest.mark.parametrize(
    ("fabric", "ranks", "tokens"),
    [(NVLINKED, 8, 128), (NETWORKED, 8, 64), (NVLINKED, 2, 256), (NETWORKED, 2, 1024)],
)
def test_with_attention_all_to_all_wins_from_so_many_tokens(
    fabric: model.Fabric, ranks: int, tokens: int
) -> None:
    for count in (tokens // 2, tokens):
        found = model.best(fabric, MODELS["gpt-oss-120b"], count, ranks)
        exchanged = found.pop("all-to-all") + model.attention_time(count / ranks)
        reduced = min(found.values()) + model.attention_time(count)
        assert (exchanged < reduced) == (count == tokens)


def test_the_out_variant_saves_five_percent_at_most() -> None:
    for ranks in (2, 4, 8):
        for tokens in (1, 8, 32, 128):
            found = model.one_shot(NVLINKED, ranks, tokens)
            layer = min(model.best(NVLINKED, 128, tokens, ranks).values())
            layer += model.attention_time(tokens)
            assert (found.copied - found.direct) / layer < 0.055
