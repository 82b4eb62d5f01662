"""Python's garbage collector while a model is loaded and while a call compiles."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from models import hidden, mlp

import mxfp4_fx
from mxfp4_fx.core import collector
from mxfp4_fx.core.errors import CheckpointError

USUAL = 700, 10, 7


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the collector has no such generation")
def test_old_objects_are_left_alone_in_a_block() -> None:
    collections: list[int] = []
    this_one = threading.get_ident()

    def note(phase: str, info: dict[str, int]) -> None:
        # Another test's thread may collect, too.
        if phase == "start" and threading.get_ident() == this_one:
            collections.append(info["generation"])

    gc.collect()
    gc.set_threshold(10, 2, 2)
    gc.callbacks.append(note)
    try:
        with collector.young_only():
            collections.clear()  # the block has begun
            held: list[Any] = [[] for _ in range(gc.get_count()[0] + 100 + len(gc.get_objects()))]
        inside = set(collections)
        held += [[] for _ in held]
    finally:
        gc.callbacks.remove(note)
    assert inside == {0, 1}
    assert 2 in collections


def test_the_last_of_several_blocks_ends_it() -> None:
    inside, ended = threading.Event(), threading.Event()

    def other() -> None:
        with collector.young_only():
            inside.set()
            ended.wait()

    thread = threading.Thread(target=other)
    with collector.young_only():
        thread.start()
        inside.wait()
    assert gc.get_threshold() != USUAL
    ended.set()
    thread.join()
    assert gc.get_threshold() == USUAL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_forked_child_has_no_block(is_inside: bool) -> None:
    """Neither of a thread that it lacks, nor of the one that forked."""
    inside, ended = threading.Event(), threading.Event()

    def other() -> None:
        with collector.young_only():
            inside.set()
            ended.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with collector.young_only() if is_inside else contextlib.nullcontext():
        child = os.fork()
        seen = [gc.get_threshold()]
        with collector.young_only():
            seen.append(gc.get_threshold())
    if not child:
        seen.append(gc.get_threshold())
        with collector.young_only():
            seen.append(gc.get_threshold())
        inside_of_one = *USUAL[:2], collector._NEVER
        os._exit(seen != [USUAL, inside_of_one, USUAL, inside_of_one])
    ended.set()
    thread.join()
    assert processes.exit_status(child) == 0
    assert gc.get_threshold() == USUAL


def test_thresholds_that_are_set_meanwhile_stay() -> None:
    with collector.young_only():
        gc.set_threshold(5, 6, 8)
    assert gc.get_threshold() == (5, 6, 8)


def test_loading_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        mxfp4_fx.from_pretrained(tmp_path)
    assert gc.get_threshold() == USUAL


def test_a_call_that_compiles_ends_it() -> None:
    seen = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            seen.append(gc.get_threshold())
            return gm.forward(*args)

        return run

    compiled = torch.compile(mlp(), backend="mxfp4", options={"inner": inner})
    with torch.no_grad():
        for _ in range(2):
            compiled(hidden())
            assert gc.get_threshold() == USUAL
    first, second = seen
    assert first != USUAL
    assert second == USUAL
