"""The process that ``benchmarks.start`` measures: it starts a model, once, in one way with torch.

It tells its stages, as lines of JSON, through a pipe that it inherits.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil

from benchmarks.compile_phases import Spending, cpu_seconds, followed
from benchmarks.full_size_child import Phases
from benchmarks.generation import TokenTimes, generate, prompt

WAYS = ("uncompiled", "whole", "pieces", "inductor", "llama.cpp")
UNCOMPILED, WHOLE, PIECES, INDUCTOR, LLAMA = WAYS
STAGES = ("import", "load", "first token", "further tokens", "again")


class Stages(TokenTimes):
    """Tells the stages of a start. As a streamer, it ends the first token's when that comes."""

    def __init__(self, pipe: int, spending: Spending) -> None:
        super().__init__()
        self._phases, self._spending = Phases(pipe), spending
        self._open = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A stage, and what its time was spent on."""
        with self._phases(name) as facts:
            counted, cpu = _counted(), cpu_seconds()
            self._spending.take()
            yield
            facts["spent"], facts["timings"] = self._spending.take()
            facts["cpu_seconds"] = cpu_seconds() - cpu
            facts["caches"] = dict(_counted() - counted)

    def begin(self, name: str) -> None:
        """A stage that lasts until :meth:`end`."""
        self._open.enter_context(self(name))

    def end(self) -> None:
        self._open.close()

    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.times) == 2:  # the prompt came first
            self.end()
            self.begin("further tokens")


def main(settings: dict[str, Any]) -> None:
    psutil.Process().cpu_affinity(settings["cores"])
    spending = Spending(cpu_seconds if settings["clock"] == "cpu" else time.perf_counter)
    stage = Stages(settings["pipe"], spending)
    with stage("import"):
        import torch
        import transformers  # noqa: F401

        import mxfp4_fx  # noqa: F401
    torch.set_num_threads(settings["threads"])
    warnings.simplefilter("ignore")  # of experts that are dense, and of what torch says of itself
    with stage("load"):
        model = load(settings)
    ids, tokens = prompt(model, settings["prompt_tokens"]), settings["new_tokens"]
    stage.begin("first token")
    with contextlib.ExitStack() as stack:
        if settings["way"] != UNCOMPILED:
            torch._dynamo.config.recompile_limit = 64  # a whole model needs several graphs
            stack.enter_context(followed(spending))
            compile_model(model, settings)
        generate(model, ids, tokens, stage)
        with stage("again"):
            generate(model, ids, tokens)


def load(settings: dict[str, Any]) -> Any:
    """The model with packed experts; with dense ones for Inductor alone."""
    import torch

    import mxfp4_fx

    kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True}
    if settings["way"] != INDUCTOR:
        return mxfp4_fx.from_pretrained(settings["checkpoint"], **kwargs)
    from transformers import AutoModelForCausalLM, Mxfp4Config

    dense = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        settings["checkpoint"], quantization_config=dense, **kwargs
    ).eval()


def compile_model(model: Any, settings: dict[str, Any]) -> None:
    import mxfp4_fx

    options = {"strict": True, "inner": settings["inner"]}
    # At full size the model would not fit twice. Where it does, a prompt's graph serves longer:
    # its guards hold for weights that are not freed.
    options["free_weights"] = settings["full_size"]
    if settings["way"] == WHOLE:
        model.compile(backend="mxfp4", options=options)
    elif settings["way"] == PIECES:
        mxfp4_fx.compile(model, options=options)
    else:
        model.compile(backend=settings["inner"])


def _counted() -> Counter[str]:
    """How often torch's caches had something, or had not."""
    utils = sys.modules.get("torch._dynamo.utils")
    found: Counter[str] = Counter()
    for part in ("aot_autograd", "inductor"):
        counts = utils.counters[part] if utils else {}
        found.update({key: count for key, count in counts.items() if "cache_" in key})
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
