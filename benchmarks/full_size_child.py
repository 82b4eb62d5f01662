"""The process that benchmarks/full_size.py measures: it has nothing else in its memory.

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

from process_memory import mapped_bytes, memory, reset_peak
from token_times import TokenTimes


class Phases:
    """Tells what each phase took, and the memory at its end."""

    def __init__(self, pipe: int) -> None:
        self._pipe = os.fdopen(pipe, "w", encoding="utf-8")

    @contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        """A phase; what the caller puts into the dictionary is told, too."""
        facts: dict[str, Any] = {"load_average": os.getloadavg()[0]}
        graphs = _graphs()
        reset_peak()
        started = time.perf_counter()
        yield facts
        facts["seconds"] = time.perf_counter() - started
        facts["memory"] = memory()
        facts["checkpoint_mapped"] = mapped_bytes(".safetensors")
        facts["graphs"] = _graphs() - graphs
        print(json.dumps({"phase": name, **facts}), file=self._pipe, flush=True)


def main(settings: dict[str, Any]) -> None:
    os.sched_setaffinity(0, settings["cores"])
    phase = Phases(settings["pipe"])
    with phase("import"):
        import torch
        import transformers  # noqa: F401

        import mxfp4_fx
    torch.set_num_threads(settings["threads"])
    with phase("load"):
        model = mxfp4_fx.from_pretrained(
            settings["checkpoint"], dtype=torch.bfloat16, local_files_only=True
        )
    tokens = settings["prompt_tokens"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)

    def generate(new_tokens: int, **kwargs: Any) -> tuple[Any, dict[str, float]]:
        times = TokenTimes()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=1 + new_tokens,
            max_new_tokens=1 + new_tokens,
            do_sample=False,
            streamer=times,
            return_dict_in_generate=True,
            **kwargs,
        )
        return out, times.rates(tokens)

    if not settings["compile"]:
        with phase("generate") as facts:
            out, facts["tokens_per_second"] = generate(settings["new_tokens"], output_logits=True)
        torch.save(out.logits[0][0].float(), settings["logits"])
        return
    torch._dynamo.config.recompile_limit = 64  # a cache that grows: more graphs than it expects
    options = {"free_weights": True, "strict": True, "inner": settings["inner"]}
    model.compile(backend="mxfp4", options=options)
    with phase("first forward"), torch.no_grad():
        logits = model(ids).logits[0, -1].float()
    torch.save(logits, settings["logits"])
    del logits
    with phase("first generate"):
        generate(settings["new_tokens"])
    with phase("decode") as facts:
        _, facts["tokens_per_second"] = generate(settings["new_tokens"])
    if settings["rounds"]:
        measure(phase, generate, settings)


def measure(phase: Phases, generate: Any, settings: dict[str, Any]) -> None:
    """Rounds of reading memory and generating in turn; the probe's buffer is memory, too."""
    from probes import Probes

    rates = []
    with (
        phase("measure") as facts,
        Probes(settings["threads"], settings["probe_mib"] << 20, seconds=0.01) as probes,
    ):
        for _ in range(settings["rounds"]):
            probes.measure()
            rates.append(generate(settings["new_tokens"])[1])
        facts["rounds"], facts["read_rates"] = rates, probes.read_rates


def _graphs() -> int:
    """How many graphs Dynamo has compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["stats"]["unique_graphs"] if utils else 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
