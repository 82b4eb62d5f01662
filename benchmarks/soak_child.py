"""A rank of ``benchmarks.soak``: generates until time is up, and tells its memory now and then."""

from __future__ import annotations

import datetime
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"batch": (1, 3), "prompt": (2, 24), "new tokens": (1, 12)}  # least and most of a call


def main() -> None:
    import torch.distributed as dist

    settings = json.loads(sys.argv[1])
    with os.fdopen(settings["pipe"], "w", encoding="utf-8") as pipe:

        def tell(found: dict[str, Any]) -> None:
            pipe.write(json.dumps(found) + "\n")
            pipe.flush()

        soak(settings, tell)
    dist.destroy_process_group()


def soak(settings: dict[str, Any], tell: Callable[[dict[str, Any]], object]) -> None:
    """Generate, in the process group that there is or in one of its own.

    Args:
        settings: of ``benchmarks.soak``, and of this rank.
        tell: gets a sample after the first call, whenever it is time, and in the end.
    """
    import psutil
    import torch
    import torch.distributed as dist
    from torch._dynamo.utils import counters
    from transformers.distributed import DistributedConfig

    import mxfp4_fx
    from benchmarks.process_memory import memory, peak
    from mxfp4_fx.weights.store import STORE

    torch.set_num_threads(settings["threads"])
    rank, ranks = settings["rank"], settings["ranks"]
    if not dist.is_initialized():
        store = dist.FileStore(settings["store"], ranks)
        limit = datetime.timedelta(minutes=10)  # a rank may compile alone
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    model = mxfp4_fx.from_pretrained(
        Path(settings["checkpoint"]),
        dtype=torch.bfloat16,
        distributed_config=DistributedConfig(tp_size=ranks, ep_size=ranks),
        local_files_only=True,
    ).eval()
    options = {"inner": settings["inner"], "strict": True}
    model.compile(backend="mxfp4", dynamic=True, options=options)  # no graph for a size alone

    process, chance = psutil.Process(), random.Random(0)  # all ranks draw the same
    started = told = time.perf_counter()
    calls = tokens = 0
    is_over = torch.zeros((), dtype=torch.int64)
    while not is_over:
        batch, length, new = (chance.randint(*sizes) for sizes in SIZES.values())
        ids = torch.tensor([[chance.randrange(64) for _ in range(length)] for _ in range(batch)])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        calls, tokens = calls + 1, tokens + batch * new
        now = time.perf_counter()
        is_over.fill_(calls >= settings["least_calls"] and now - started >= settings["seconds"])
        dist.broadcast(is_over, 0)
        if calls == 1 or now - told >= settings["every"] or is_over:
            told = now
            found = {**memory(process), "peak": peak()}
            tell(
                {
                    "phase": f"{calls} calls",
                    "seconds": now - started,
                    "memory": found,
                    "calls": calls,
                    "tokens": tokens,
                    "graphs": counters["stats"]["unique_graphs"],
                    "swizzles": STORE.swizzled,
                }
            )


if __name__ == "__main__":
    main()
