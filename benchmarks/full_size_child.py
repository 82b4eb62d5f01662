"""The process that ``benchmarks.full_size`` measures: it has nothing else in its memory.

It tells its phases, as lines of JSON, through a pipe that it inherits.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from benchmarks.process_memory import mapped_bytes, memory, peak, reset_peak


class Phases:
    """Tells what each phase took, and the memory at its end."""

    def __init__(self, pipe: int) -> None:
        self._pipe = os.fdopen(pipe, "w", encoding="utf-8")

    @contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        """A phase; what the caller puts into the dictionary is told, too."""
        facts: dict[str, Any] = {"load_average": psutil.getloadavg()[0]}
        graphs = compiled_graphs()
        reset_peak()
        started = time.perf_counter()
        yield facts
        facts["seconds"] = time.perf_counter() - started
        now = memory(psutil.Process())
        # The system notes a peak some pages late.
        facts["memory"] = {**now, "peak": max(peak(), now["resident"])}
        facts["checkpoint_mapped"] = mapped_bytes(".safetensors")
        facts["graphs"] = compiled_graphs() - graphs
        print(json.dumps({"phase": name, **facts}), file=self._pipe, flush=True)


def main(settings: dict[str, Any]) -> None:
    psutil.Process().cpu_affinity(settings["cores"])
    phase = Phases(settings["pipe"])
    with phase("import"):
        import torch
        import transformers  # noqa: F401

        import mxfp4_fx
    from benchmarks.generation import generate, prompt

    torch.set_num_threads(settings["threads"])
    with phase("load"):
        model = mxfp4_fx.from_pretrained(
            settings["checkpoint"], dtype=torch.bfloat16, local_files_only=True
        )
    ids, new_tokens = prompt(model, settings["prompt_tokens"]), settings["new_tokens"]
    if not settings["compile"]:
        with phase("generate") as facts:
            out, facts["tokens_per_second"] = generate(model, ids, new_tokens, output_logits=True)
        torch.save(out.logits[0][0].float(), settings["logits"])
        return
    torch._dynamo.config.recompile_limit = 64  # a cache that grows: more graphs than it expects
    options = {"free_weights": True, "strict": True, "inner": settings["inner"]}
    mxfp4_fx.compile(model, options=options)
    with phase("first forward"), torch.no_grad():
        logits = model(ids).logits[0, -1].float()
    torch.save(logits, settings["logits"])
    del logits
    with phase("first generate"):
        generate(model, ids, new_tokens)
    with phase("decode") as facts:
        facts["tokens_per_second"] = generate(model, ids, new_tokens)[1]
    if not settings["rounds"]:
        return
    from benchmarks.probes import Probes

    # Reading memory and generating in turn; the probe's buffer is memory, too.
    room = settings["probe_mib"] << 20
    with phase("measure") as facts, Probes(settings["threads"], room, seconds=0.01) as probes:
        facts["rounds"] = []
        for _ in range(settings["rounds"]):
            probes.measure(tokens=1)
            facts["rounds"].append(generate(model, ids, new_tokens)[1])
        facts["read_rates"] = [each.read for each in probes.rates]


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["stats"]["unique_graphs"] if utils else 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
