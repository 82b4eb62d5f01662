"""A rank of ``benchmarks.distributed``: it loads its part of a model, compiles it and generates.

It tells its phases, as lines of JSON, through a pipe that it inherits.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.full_size_child import Phases
from benchmarks.wire import expected_bytes, sent_bytes

WAYS = ("one", "EP", "TP")
ONE, EP, TP = WAYS
TIMEOUT = datetime.timedelta(seconds=300)  # of the group: a rank that is alone ends


def main(settings: dict[str, Any]) -> None:
    psutil.Process().cpu_affinity(settings["cores"])
    rank, ranks = settings["rank"], settings["ranks"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    phase = Phases(settings["pipe"])
    with phase("import"):
        import torch
        import torch.distributed as dist
        import transformers  # noqa: F401

        import mxfp4_fx
    from benchmarks.generation import generate, prompt
    from mxfp4_fx.huggingface.packed import PackedExperts

    torch.set_num_threads(settings["threads"])
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True}
    if settings["way"] != ONE:
        from transformers.distributed import DistributedConfig

        store = dist.FileStore(settings["store"], ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        spread = {"tp_size": ranks, **({"ep_size": ranks} if settings["way"] == EP else {})}
        kwargs["distributed_config"] = DistributedConfig(**spread)
    with phase("load") as facts:
        model = mxfp4_fx.from_pretrained(settings["checkpoint"], **kwargs)
        held = [m.parameters() for m in model.modules() if isinstance(m, PackedExperts)]
        facts["experts_bytes"] = sum(p.nbytes for parameters in held for p in parameters)
    swizzles = _counted_swizzles()
    model.compile(backend="mxfp4", options={"strict": True, "inner": settings["inner"]})
    ids, new_tokens = prompt(model, settings["prompt_tokens"]), settings["new_tokens"]
    with phase("first generate") as facts:
        generate(model, ids, new_tokens)
        facts["swizzles"] = len(swizzles)
    with phase("generate") as facts:
        sent, swizzled = sent_bytes(), len(swizzles)
        found = [generate(model, ids, new_tokens) for _ in range(settings["rounds"])]
        facts["tokens_per_second"] = [speeds for _, speeds in found]
        facts["swizzles"] = len(swizzles) - swizzled
        facts["sent_bytes"] = sent_bytes() - sent
    config = json.loads(Path(settings["checkpoint"], "config.json").read_text("utf-8"))
    tokens = ids.numel() + new_tokens
    with phase("result") as told:
        told["expected_bytes"] = expected_bytes(config, ranks, tokens, 1 + new_tokens)
        told["tokens"] = found[-1][0].sequences[0].tolist()
    if dist.is_initialized():
        dist.barrier()


def _counted_swizzles() -> list[None]:
    """A list that gets an entry for each weight that is swizzled from now on."""
    from mxfp4_fx.weights import store

    found: list[None] = []
    swizzle = store.swizzle_weight

    def counting(*args: Any, **kwargs: Any) -> Any:
        found.append(None)
        return swizzle(*args, **kwargs)

    store.swizzle_weight = counting
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
