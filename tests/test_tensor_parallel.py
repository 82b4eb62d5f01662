"""Tensor parallelism: each rank holds a range of channels of every expert, and saving gathers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import tensor_parallel
import torch
import torch.distributed as dist
from checkpoints import (
    TINY,
    copied,
    edit_config,
    edit_tensors,
    read_tensors,
    unpack_layers,
    write_packed,
)
from loaded import assert_same_tensors, dequantized, exact_logits, logits, write_dense
from oracle import Bounded, Matrices, assert_as_accurate, assert_within, experts, random_routes
from tensor_parallel import Answers, load
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mxfp4_fx
from mxfp4_fx.core.errors import DequantizeError, OptionError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.huggingface.block_shards import block_range
from mxfp4_fx.huggingface.tensor_parallel import plan

Two = tuple[list[tuple[Answers, tuple[Tensor, Tensor]]], Path]
BLOCKS = 5  # of I: 2 ranks have 3 and 2, 3 ranks 2, 2 and 1, 4 ranks 2, 1, 1 and 1
SHAPE = dataclasses.replace(TINY, intermediate=BLOCKS * BLOCK)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed", SHAPE)


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> Path:
    return write_dense(checkpoint.with_name("dense"), checkpoint, torch.bfloat16)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense experts of four blocks, for 2 and 4 ranks alike; MXFP4 holds their values."""
    folder = tmp_path_factory.mktemp("even")
    packed = write_packed(folder / "packed", dataclasses.replace(TINY, intermediate=4 * BLOCK))

    def unpack(tensors: dict[str, Tensor]) -> None:
        unpack_layers(tensors, 0, 1, dtype=torch.float32)

    path = edit_tensors(copied(packed, folder / "dense"), unpack)
    return edit_config(path, lambda config: config.pop("quantization_config"))


@contextlib.contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """Be one rank of a group that has no others: torch's fake one, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mxfp4_fx.core.ranks.is_one_of_several", lambda: False)  # to wait for
            yield
    finally:
        dist.destroy_process_group()


# --- which part a rank has


def test_blocks_are_dealt_out_evenly() -> None:
    ranges = [block_range(90, rank, 4) for rank in range(4)]
    assert [end - first for first, end in ranges] == [23, 23, 22, 22]
    for world in range(1, 91):
        ends = [0, *(block_range(90, rank, world)[1] for rank in range(world))]
        assert ends[-1] == 90
        assert ends[:-1] == [block_range(90, rank, world)[0] for rank in range(world)]


def matrices(checkpoint: Path) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias, in float64, of both projections of the second layer."""
    tensors, found = read_tensors(checkpoint), []
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.1.mlp.experts.{name}"
        held = (tensors[f"{full}_{part}"] for part in ("blocks", "scales"))
        found.append(Matrices(*held, tensors[f"{full}_bias"].float()).exact)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_parts_of_all_ranks_add_up_to_the_experts(checkpoint: Path, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((9, SHAPE.hidden), generator=generator)
    indices, weights = random_routes(9, SHAPE.experts, SHAPE.experts_per_token)
    (gate_up, gate_up_bias), (down, down_bias) = matrices(checkpoint)

    def oracle(channels: slice, factor: int) -> Bounded:
        both = slice(2 * channels.start, 2 * channels.stop)
        first = gate_up[:, both], gate_up_bias[:, both]
        second = down[:, :, channels], factor * down_bias
        constants = 1.702, 7.0, torch.float32
        return experts(x, indices, Bounded.exact(weights), first, second, *constants)

    whole = oracle(slice(0, BLOCKS * BLOCK), 1).value
    for rank in range(world):
        with rank_of(rank, world), torch.no_grad():
            part = load(checkpoint).model.layers[1].mlp.experts
            found = part(x.clone(), indices, weights)
        first, end = block_range(BLOCKS, rank, world)
        expected = oracle(slice(first * BLOCK, end * BLOCK), rank == 0)
        assert_within(found, expected)
        whole = whole - expected.value
        # It keeps its own share, and not the file's tensors that this is a view of.
        assert part.gate_up_proj_blocks.shape[1] == 2 * BLOCK * (end - first)
        assert part.down_proj_blocks.shape[2] == end - first
        for parameter in part.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert whole.abs().max() < 1e-12


def test_a_part_of_a_dense_weight_quantizes_to_the_part_of_its_blocks(dense: Path) -> None:
    whole = mxfp4_fx.from_pretrained(dense, dtype=torch.float32).model.layers[0].mlp.experts
    for rank in range(2):
        with rank_of(rank, 2):
            part = load(dense).model.layers[0].mlp.experts
            for name, parameter in part.named_parameters():
                assert torch.equal(parameter, part.cuts[name].part(whole.get_parameter(name), rank))


def test_whole_tensors_are_loaded_as_parts(checkpoint: Path) -> None:
    alone = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32)
    whole = {name: value for name, value in alone.state_dict().items() if ".experts." in name}
    with rank_of(1, 2):
        model = load(checkpoint)
        before = {name: p.clone() for name, p in model.named_parameters() if ".experts." in name}
        zeros = {name: torch.zeros_like(value) for name, value in whole.items()}
        model.load_state_dict(zeros, strict=False)
        for name in before:
            assert not model.get_parameter(name).any()
        model.load_state_dict(whole, strict=False)
        for name, value in before.items():
            assert torch.equal(model.get_parameter(name), value)


# --- what cannot be


def test_more_ranks_than_blocks(checkpoint: Path) -> None:
    with rank_of(5, 6), pytest.raises(OptionError, match=r"5 blocks of 32, so 5 ranks .*ep_size=6"):
        load(checkpoint)


def test_dense_experts_that_cannot_be_cut_alike(even: Path) -> None:
    spread = DistributedConfig(tp_size=3, tp_plan=plan())
    told = r"4 blocks of 32 have none for 3 ranks. Load them packed .* or take one of 2, 4$"
    with rank_of(0, 3), pytest.raises(OptionError, match=told):
        AutoModelForCausalLM.from_pretrained(even, distributed_config=spread)


def test_dense_experts_without_whole_blocks() -> None:
    from mxfp4_fx.huggingface.tensor_parallel import _blocks_of

    odd = torch.nn.Module()
    odd.intermediate_size = 40  # type: ignore[assignment]
    with pytest.raises(OptionError, match="size of 40, which is no multiple of 32"):
        _blocks_of(odd)


def test_skipped_experts(checkpoint: Path) -> None:
    spread = DistributedConfig(tp_size=2)
    told = r"^model\.layers\.1\.mlp\.experts is to stay dense, and tensor parallelism"
    with rank_of(0, 2), pytest.raises(OptionError, match=told):
        mxfp4_fx.from_pretrained(checkpoint, skip="*.layers.1.*", distributed_config=spread)


def test_a_part_is_not_made_dense(checkpoint: Path) -> None:
    with rank_of(0, 2):
        model = load(checkpoint)
        with pytest.raises(
            DequantizeError, match=r"layers\.0\.mlp\.experts is spread over processes"
        ):
            mxfp4_fx.dequantize(model)


# --- real processes


@pytest.fixture(scope="module")
def two(checkpoint: Path, dense: Path, even: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    return ranks.run(tensor_parallel.everything, 2, folder, checkpoint, dense, even, folder), folder


def check_logits(found: list[Tensor], checkpoint: Path) -> None:
    """They are the same bits on all ranks, and as accurate as those of one process."""
    assert all(torch.equal(other, found[0]) for other in found)
    model = dequantized(checkpoint, torch.float32)
    assert_as_accurate(found[0], logits(model), exact_logits(model))


def test_two_ranks_compute_the_model(two: Two, checkpoint: Path) -> None:
    answers = [answer for answer, _ in two[0]]
    for name in ("uncompiled", "compiled", "freed"):
        check_logits([getattr(answer, name) for answer in answers], checkpoint)
    assert [answer.swizzles for answer in answers] == [(4, 4)] * 2


def test_two_ranks_save_what_one_loaded(
    two: Two, checkpoint: Path, dense: Path, even: Path
) -> None:
    def in_float32(path: Path) -> dict[str, Tensor]:
        return {n: t.float() if t.is_floating_point() else t for n, t in read_tensors(path).items()}

    assert_same_tensors(read_tensors(two[1] / "packed"), in_float32(checkpoint))
    alone = mxfp4_fx.from_pretrained(dense, dtype=torch.float32).state_dict()
    assert_same_tensors(read_tensors(two[1] / "quantized"), alone)
    assert_same_tensors(read_tensors(two[1] / "dense"), in_float32(even))


def test_a_state_dict_is_refused_with_the_remedy(
    two: Two,
) -> None:
    assert all("model.save_pretrained(...) on all ranks" in a.refused for a, _ in two[0])


def test_two_ranks_compute_dense_experts(two: Two, even: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(even, dtype=torch.float32)
    alone, exact = logits(model), exact_logits(model)
    for first, second in zip(*(found for _, found in two[0]), strict=True):
        assert torch.equal(first, second)
        assert_as_accurate(first, alone, exact)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_compute_and_save_the_model(
    checkpoint: Path, tmp_path: Path, world: int
) -> None:
    found = ranks.run(tensor_parallel.load_compile_and_save, world, tmp_path, checkpoint, tmp_path)
    for name in ("uncompiled", "compiled", "freed"):
        check_logits([getattr(answer, name) for answer in found], checkpoint)
    kept = read_tensors(checkpoint)
    saved = read_tensors(tmp_path)
    assert_same_tensors(saved, {n: t.to(saved[n].dtype) for n, t in kept.items()})


@pytest.mark.exhaustive
def test_more_ranks_compute_dense_experts(even: Path, tmp_path: Path) -> None:
    found = ranks.run(tensor_parallel.load_dense, 4, tmp_path, even, tmp_path, "batched_mm")
    model = AutoModelForCausalLM.from_pretrained(even, dtype=torch.float32)
    for each in zip(*found, strict=True):
        assert all(torch.equal(other, each[0]) for other in each)
        assert_as_accurate(each[0], logits(model), exact_logits(model))
    assert_same_tensors(
        read_tensors(tmp_path), {n: t.float() for n, t in read_tensors(even).items()}
    )
