"""A rank that dies or hangs in the middle of ``generate``: what each rank does, see ``ranks.py``.

torchrun --nproc-per-node 2 tests/failing_ranks.py CHECKPOINT    # the last rank dies
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from expert_parallel import load
from loaded import IDS
from torch import Tensor


def die(checkpoint: Path) -> None:
    """Let the last rank die while all generate."""
    generate(checkpoint, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang(checkpoint: Path) -> None:
    """Let the last rank stop while all generate; the first one ends it in the end."""
    ids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ids, os.getpid())
    try:
        generate(checkpoint, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    finally:
        os.kill(ids[-1], signal.SIGKILL)


def generate(checkpoint: Path, fail: Callable[[], object]) -> None:
    """Generate; the last rank fails after some tokens."""
    model = load(checkpoint)
    model.compile(backend="mxfp4", options={"inner": "eager"})

    def after_token(ids: Tensor, scores: Tensor) -> Tensor:
        if dist.get_rank() == dist.get_world_size() - 1 and ids.shape[1] == IDS.shape[1] + 3:
            fail()
        return scores

    with torch.no_grad():
        model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            logits_processor=[after_token],
        )


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    die(Path(sys.argv[1]))
