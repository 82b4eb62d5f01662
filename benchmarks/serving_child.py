"""The process of ``benchmarks.serving``: requests to one model, then models that come and go.

The models that come and go are compiled by this package, then by torch alone.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCHES, PROMPTS, NEW = (1, 2, 3, 4), range(2, 25), range(1, 5)  # sizes of a request


def main() -> None:
    settings = json.loads(sys.argv[1])
    with os.fdopen(settings["pipe"], "w", encoding="utf-8") as pipe:

        def tell(found: dict[str, Any]) -> None:
            pipe.write(json.dumps(found) + "\n")
            pipe.flush()

        serve(settings, tell)


def serve(settings: dict[str, Any], tell: Callable[[dict[str, Any]], object]) -> None:
    """Serve requests, then compile and drop models, as many by torch alone.

    Args:
        settings: of ``benchmarks.serving``.
        tell: gets a sample ``settings["samples"]`` times in each part, at even distances.
    """
    import psutil
    import torch
    from torch._dynamo.utils import counters

    from benchmarks.process_memory import memory, peak
    from mxfp4_fx.weights.store import STORE

    torch.set_num_threads(settings["threads"])
    process, started = psutil.Process(), time.perf_counter()
    parts: dict[str, tuple[Callable[..., Iterator[int]], int]] = {
        "requests": (_requests, settings["requests"]),
        "models": (functools.partial(_models, _model), settings["models"]),
        "peers": (functools.partial(_models, _peer), settings["models"]),
    }
    for part, (run, count) in parts.items():
        every = max(1, count // settings["samples"])
        for done in run(settings, count):
            if done % every and done != count:
                continue
            gc.collect()
            tell(
                {
                    "phase": f"{done} {part}",
                    "part": part,
                    "calls": done,
                    "seconds": time.perf_counter() - started,
                    "memory": {**memory(process), "peak": peak()},
                    "graphs": counters["stats"]["unique_graphs"],
                    "swizzles": STORE.swizzled,
                }
            )


def _loaded(settings: dict[str, Any]) -> Any:
    import torch

    import mxfp4_fx

    checkpoint = Path(settings["checkpoint"])
    return mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16, local_files_only=True).eval()


def _model(settings: dict[str, Any]) -> Any:
    import mxfp4_fx

    options = {"inner": settings["inner"], "strict": True}
    return mxfp4_fx.compile(_loaded(settings), options=options)


def _peer(settings: dict[str, Any]) -> Any:
    """The same model, compiled by torch alone: all of them share what Dynamo made for the first."""
    model = _loaded(settings)
    model.compile(backend=settings["inner"])
    return model


def _requests(settings: dict[str, Any], count: int) -> Iterator[int]:
    """Generate for requests of any size, and yield how many there were."""
    import torch

    import mxfp4_fx

    model, chance = _model(settings), random.Random(0)
    mxfp4_fx.warmup(model, lengths=PROMPTS[-2:], batch_sizes=BATCHES[:3])
    for done in range(1, count + 1):
        batch, length, new = map(chance.choice, (BATCHES, PROMPTS, NEW))
        ids = torch.tensor([[chance.randrange(64) for _ in range(length)] for _ in range(batch)])
        mask = torch.ones_like(ids)
        mask[0, : chance.randrange(length)] = 0  # a shorter prompt, padded
        settings_of_call = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        model.generate(ids, attention_mask=mask, **settings_of_call)
        yield done


def _models(
    make: Callable[[dict[str, Any]], Any], settings: dict[str, Any], count: int
) -> Iterator[int]:
    """Load, compile, call and drop models, and yield how many there were."""
    import torch

    ids = torch.ones(1, 8, dtype=torch.long)
    for done in range(1, count + 1):
        model = make(settings)
        with torch.no_grad():
            model(ids)
        del model
        gc.collect()
        yield done


if __name__ == "__main__":
    main()
