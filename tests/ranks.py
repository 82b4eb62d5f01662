"""Process groups in tests: several processes of this machine, on gloo, that run one function.

    results = ranks.run(ask, 2, tmp_path, checkpoint)

calls ``ask(checkpoint)`` in two processes and returns what they return, the first rank's first. The
function must be importable by its name, and its module is imported by each rank: keep it small. The
first start costs seconds of imports in each process of pytest; one run can answer many questions.

All ranks are killed as soon as one fails or dies, and when time is up: a rank that hangs in a
collective ends a test with what the others said.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LAST_RESORT = 300.0  # seconds: only ends a run that hangs

# One process imports all this, and forks the ranks.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.distributed.distributed_c10d",
        "transformers.models.gpt_oss.modeling_gpt_oss",
        "mxfp4_fx.explanation",
        "mxfp4_fx.huggingface.quantizer",
        "mxfp4_fx.huggingface.hub_modules",
    ]
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """How a rank ended that returned nothing.

    Attributes:
        text: the traceback of its exception, or "" if it had none.
        status: its exit status, negative for a signal; None if it was killed because of others.
        log: what it wrote to stdout and stderr.
    """

    text: str
    status: int | None
    log: str


def run(
    function: Callable[..., Any],
    world: int,
    folder: Path,
    *args: Any,
    timeout: float = 120.0,
    may_fail: bool = False,
) -> list[Any]:
    """Call a function in the processes of a new group.

    Args:
        function: called with `args`; it finds the group initialized.
        world: the number of ranks.
        folder: for the group's store and the ranks' output; a new one for each run.
        timeout: of the group, in seconds.
        may_fail: return a `Failure` for a rank that fails, and let the others go on.

    Raises:
        AssertionError: a rank failed, died or was not ready in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(world):
        ours, theirs = _FORKS.Pipe(duplex=False)
        arguments = (theirs, function, rank, world, folder, timeout, args)
        process = _FORKS.Process(target=_serve, args=arguments, daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # a fork would miss the threads of OpenMP
            process.start()
        theirs.close()
        started.append((process, ours))
    try:
        return _collected(started, folder, may_fail)
    finally:
        for process, ours in started:
            process.kill()
            process.join()
            ours.close()


def _collected(started: list[Any], folder: Path, may_fail: bool) -> list[Any]:
    until = time.monotonic() + LAST_RESORT
    results: dict[int, Any] = {}
    while len(results) < len(started):
        waiting = {ours: rank for rank, (_, ours) in enumerate(started) if rank not in results}
        ready = multiprocessing.connection.wait(waiting, max(0.0, until - time.monotonic()))
        for ours in ready:
            rank = waiting[ours]
            results[rank] = _received(started[rank], folder, rank)
        failed = {r: f for r, f in results.items() if isinstance(f, Failure)}
        if not ready or (failed and not may_fail):
            missing = [rank for rank in range(len(started)) if rank not in results]
            told = [f"rank {rank}: {one.text or one}\n{one.log}" for rank, one in failed.items()]
            told += [f"rank {rank} has not ended\n{_log(folder, rank)}" for rank in missing]
            raise AssertionError("\n".join(told))
    return [results[rank] for rank in range(len(started))]


def _received(one: tuple[Any, Any], folder: Path, rank: int) -> Any:
    process, ours = one
    try:
        is_result, content = ours.recv()
    except EOFError:
        process.join()
        return Failure("", process.exitcode, _log(folder, rank))
    if is_result:
        return torch.load(io.BytesIO(content), weights_only=False)
    return Failure(content, None, _log(folder, rank))


def _log(folder: Path, rank: int) -> str:
    log = folder / f"rank{rank}.log"
    return log.read_text(errors="replace") if log.exists() else ""


def _serve(
    answers: Any,
    function: Callable[..., Any],
    rank: int,
    world: int,
    folder: Path,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    """Be one rank: join the group, call the function, send what it returns."""
    with (folder / f"rank{rank}.log").open("wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LAST_RESORT * 0.8)  # what it waits for, in its log
    try:
        limit = datetime.timedelta(seconds=timeout)
        store = dist.FileStore(str(folder / "store"), world)
        store.set_timeout(limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        content = io.BytesIO()
        torch.save(function(*args), content)
        answers.send((True, content.getvalue()))
    except BaseException:
        answers.send((False, traceback.format_exc()))
    answers.close()
    while True:  # until it is killed: a rank that leaves ends what the others wait for
        signal.pause()
