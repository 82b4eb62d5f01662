"""Packed experts that are spread over processes: each loads its own, and saving gathers them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import default_load
import expert_parallel
import pytest
import ranks
import torch
from checkpoints import TINY, copied, edit_tensors, read_tensors, write_packed
from expert_parallel import WORLD, Loaded, OfTransformers, Told
from loaded import assert_same_tensors, dequantized, exact_logits, logits, write_dense
from oracle import assert_as_accurate
from processes import LAST_RESORT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mxfp4_fx
from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.huggingface import parallel

EXAMPLE = Path(__file__).parent.parent / "examples" / "expert_parallel.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks save models."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def answers(checkpoint: Path, folder: Path) -> list[tuple[Loaded, Told]]:
    """What each rank found, and was told."""
    dense = write_dense(folder / "to_quantize", checkpoint, torch.bfloat16)
    other = edit_tensors(copied(checkpoint, folder / "other"), double_norm)
    return ranks.run(expert_parallel.answer, WORLD, folder, checkpoint, dense, other, folder)


def double_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] *= 2


@pytest.fixture
def loaded(answers: list[tuple[Loaded, Told]]) -> list[Loaded]:
    return [found for found, _ in answers]


@pytest.fixture
def told(answers: list[tuple[Loaded, Told]]) -> list[Told]:
    return [told for _, told in answers]


def test_each_rank_reads_and_maps_its_own_experts(loaded: list[Loaded]) -> None:
    for rank, found in enumerate(loaded):
        assert found.experts == [2, 2]
        read = {name: parts for name, parts in found.read.items() if ".experts." in name}
        assert len(read) == 2 * 6
        for name, parts in read.items():
            assert parts == [slice(2 * rank, 2 * rank + 2)], name
        assert found.unmapped == []


def test_every_rank_computes_the_whole_model(loaded: list[Loaded], checkpoint: Path) -> None:
    check_logits(loaded, checkpoint)


def test_weights_of_every_rank_are_freed(loaded: list[Loaded]) -> None:
    assert [found.left for found in loaded] == [0, 0]


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("saved", ["saved", "freed"])
def test_it_is_saved_byte_for_byte(checkpoint: Path, folder: Path, saved: str) -> None:
    check_saved(folder / saved, checkpoint)


@pytest.mark.usefixtures("answers")
def test_what_each_rank_quantizes_of_its_own_is_what_one_process_quantizes(folder: Path) -> None:
    alone = mxfp4_fx.from_pretrained(folder / "to_quantize", dtype=torch.float32)
    assert_same_tensors(read_tensors(folder / "dense"), dict(alone.state_dict()))


@pytest.mark.exhaustive
def test_one_expert_for_each_rank(checkpoint: Path, tmp_path: Path) -> None:
    found = ranks.run(expert_parallel.load_and_run, 4, tmp_path, checkpoint, tmp_path)
    assert [one.experts for one in found] == [[1, 1]] * 4
    check_logits(found, checkpoint)
    check_saved(tmp_path / "freed", checkpoint)


@pytest.fixture(scope="module")
def of_transformers(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[OfTransformers]]:
    """A dense checkpoint, and what the ranks found of it and of the packed one."""
    folder = tmp_path_factory.mktemp("of_transformers")
    dense = checkpoints.write_dense(folder / "dense", TINY, torch.float32)  # of MXFP4 values
    run = expert_parallel.load_as_transformers_does
    return dense, ranks.run(run, WORLD, folder / "ranks", checkpoint, dense)


@pytest.mark.exhaustive
def test_transformers_own_modules_are_captured(
    checkpoint: Path, of_transformers: tuple[Path, list[OfTransformers]]
) -> None:
    exact = exact_logits(dequantized(checkpoint, torch.float32))
    alone = logits(default_load.load(checkpoint))
    _, found = of_transformers
    for one in found:
        assert torch.equal(one.modules, found[0].modules)
        assert_as_accurate(one.modules, alone, exact)
        assert one.explanation.count(" transformers_mxfp4 ") == 2


@pytest.mark.exhaustive
def test_dense_experts_that_transformers_spreads(
    of_transformers: tuple[Path, list[OfTransformers]],
) -> None:
    dense, found = of_transformers
    alone = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    exact = exact_logits(alone)
    for one in found:
        for compiled in one.dense.values():
            assert_as_accurate(compiled, logits(alone), exact)
        assert torch.equal(one.tokens, expert_parallel.generate(alone))


def check_logits(found: list[Loaded], checkpoint: Path) -> None:
    """Compare the ranks with one another, and with one process and the exact values."""
    exact = exact_logits(dequantized(checkpoint, torch.float32))
    alone = logits(mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32))
    for one in found:
        assert torch.equal(one.uncompiled, found[0].uncompiled)
        assert torch.equal(one.compiled, found[0].compiled)
        assert_as_accurate(one.uncompiled, alone, exact)
        assert_as_accurate(one.compiled, alone, exact)


def check_saved(saved: Path, checkpoint: Path) -> None:
    expected = read_tensors(checkpoint)
    for name, tensor in expected.items():
        if tensor.dtype != torch.uint8:  # the model is float32
            expected[name] = tensor.float()
    assert_same_tensors(read_tensors(saved), expected)


# ---- faults


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("checkpoint", r"the checkpoint of rank {} is \w{{16}}, and of this rank \w{{16}}; give"),
        ("options", "skip of rank {} is "),
        ("versions", "the version of mxfp4_fx of rank {} is "),
    ],
)
def test_ranks_that_load_different_models(told: list[Told], fault: str, what: str) -> None:
    for rank, one in enumerate(told):
        expected = f"CheckpointError: the processes load different models: {what.format(1 - rank)}"
        assert re.match(expected, one.faults[fault]), one.faults[fault]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("path", "CheckpointError: .*nowhere is no directory"),
        ("memory", "OutOfMemoryError: no room for the experts"),
        ("door", "it gave up"),  # through transformers' own from_pretrained
    ],
)
def test_a_rank_that_fails_leaves_nobody_waiting(told: list[Told], fault: str, reason: str) -> None:
    first, second = (one.faults[fault] for one in told)
    failed = "CheckpointError: rank 1 could not load its part of the model, so this rank cannot run"
    assert re.match(f"{failed}: {reason}", first), first
    assert failed not in second


def test_after_a_failure_they_can_load(told: list[Told]) -> None:
    assert [one.faults["none"] for one in told] == ["nothing", "nothing"]


def test_explain_on_one_rank_says_what_to_do(told: list[Told]) -> None:
    refusal = told[0].refusal
    assert "is spread over ranks 0, 1, and within 0 seconds rank 1 did not call it" in refusal
    assert "call it on every rank" in refusal
    for one in told:
        assert "2 of 2 MoE layers rewritten, 1 graph" in one.explanation


@pytest.mark.parametrize(
    ("what", "reason"),
    {
        "dequantize": "DequantizeError: model.layers.0.mlp.experts is spread over processes",
        "eager": "OptionError: model.layers.0.mlp.experts is to stay dense, .*='grouped_mm'",
        "FSDP": r"OptionError: layers.0.* is dense, and FSDP .*quantize_checkpoint",
        "stages": "CheckpointError: a model in pipeline stages cannot be saved",
        "device": "OptionError: .*experts_device=..., distributed_config=.*pass one of them",
    }.items(),
)
def test_what_cannot_be_done_is_said(told: list[Told], what: str, reason: str) -> None:
    said = [one.refusals[what] for one in told]  # by itself, or of the other by which it failed
    assert all(re.search(reason, text) for text in said), said


def test_a_plan_that_would_not_add_up_what_ranks_compute() -> None:
    model = nn.Module()
    model.ep_plan = {"model.layers.*.mlp.experts": "moe_tp_experts"}  # transformers 5.18's
    with pytest.raises(OptionError, match=r"needs transformers 5\.20 or newer"):
        parallel.plan_packed(model)


# ---- the example


@pytest.mark.exhaustive
def test_the_example(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += [str(EXAMPLE), "--checkpoint", str(tmp_path / "new"), "--inner", "eager"]
    run += ["--new-tokens", "4"]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(run, env=env, capture_output=True, text=True, timeout=LAST_RESORT)
    assert ended.returncode == 0, ended.stderr
    out = ended.stdout
    assert "mesh: 2 ranks, gloo" in out
    for rank in (0, 1):
        assert re.search(rf"^rank {rank}: 6 of 12 experts in each layer, 0.12 MB", out, re.M), out
    assert "2 of 2 MoE layers rewritten, 1 graph" in out
    assert re.search(r"^[0-9.]+ tokens a second$", out, re.M), out
    assert "all ranks generated the same: True" in out
