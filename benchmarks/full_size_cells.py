"""The process that measures a model of transformers for ``benchmarks.full_size``, cell by cell.

A cell is a prompt of so many tokens, or tokens one after another behind a context, for one sequence
or several. Tokens are random, as greedy ones of random weights repeat themselves, and so are keys
and values of a context, on whose numbers no time depends. A call in which Dynamo compiled a graph
is not counted.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import psutil

from benchmarks.full_size_child import Phases, compiled_graphs
from benchmarks.token_parts import TOKEN, parts_of

MOST_CALLS = 5  # that may compile something


class Decoding:
    """Tokens behind a context of random keys and values, one call after another."""

    def __init__(self, model: Any, ids: Any, context: int, batch: int) -> None:
        import torch
        from transformers import DynamicCache

        self.model, self.ids, self.batch, self.at = model, ids, batch, 0
        config = model.config
        self.cache = DynamicCache(config=config)
        shape = batch, config.num_key_value_heads, context, config.head_dim
        generator = torch.Generator().manual_seed(0)
        for layer in range(config.num_hidden_layers):
            keys = torch.randn(shape, generator=generator).to(model.dtype)
            self.cache.update(keys, keys.flip(-1), layer)

    def step(self) -> tuple[float, bool]:
        """A token of each sequence: (seconds, whether something was compiled)."""
        count, self.at = len(self.ids), self.at + self.batch
        row = self.ids[[(self.at - self.batch + i) % count for i in range(self.batch)], None]
        graphs, started = compiled_graphs(), time.perf_counter()
        self.model(row, past_key_values=self.cache, use_cache=True)
        return time.perf_counter() - started, compiled_graphs() != graphs


class Cells:
    """What is measured of a model; every method is a cell, and returns what there is to tell.

    Args:
        ids: [tokens], from which prompts and new tokens are taken.
    """

    def __init__(self, model: Any, ids: Any) -> None:
        self.model, self.ids = model, ids

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds of a prompt, until its last logits are there."""
        for _ in range(MOST_CALLS):
            graphs, started = compiled_graphs(), time.perf_counter()
            self.model(self.ids[None, :tokens], use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - started
            if compiled_graphs() == graphs:
                break
        return {"token_seconds": [seconds], "compiled": compiled_graphs() != graphs}

    def decode(self, context: int, batch: int, tokens: int) -> dict[str, Any]:
        """Seconds of each token but the first, which prepares."""
        decoding = Decoding(self.model, self.ids, context, batch)
        decoding.step()
        steps = [decoding.step() for _ in range(tokens)]
        for _ in range(MOST_CALLS):
            if not any(compiled for _, compiled in steps):
                break
            steps.append(decoding.step())
            steps.remove(next(step for step in steps if step[1]))
        return {
            "token_seconds": [seconds for seconds, _ in steps],
            "compiled": any(compiled for _, compiled in steps),
        }

    def parts(self, context: int, tokens: int) -> dict[str, Any]:
        """Seconds of a token's parts while torch's profiler watches, and of the whole token."""
        from torch.profiler import ProfilerActivity, profile, record_function

        decoding, seconds = Decoding(self.model, self.ids, context, 1), []
        decoding.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(tokens):
                with record_function(TOKEN):
                    seconds.append(decoding.step()[0])
        return {"token_seconds": seconds, "parts": parts_of(profiler.events(), tokens)}


def main(settings: dict[str, Any]) -> None:
    psutil.Process().cpu_affinity(settings["cores"])
    phase = Phases(settings["pipe"])
    with phase("import"):
        import torch
        import transformers  # noqa: F401

        import mxfp4_fx
    torch.set_num_threads(settings["threads"])
    warnings.simplefilter("ignore")
    with phase("load"):
        model = mxfp4_fx.from_pretrained(
            settings["checkpoint"], dtype=torch.bfloat16, local_files_only=True
        )
    ids = torch.from_numpy(np.fromfile(settings["ids"], np.int32)).long()
    if settings["compile"]:
        torch._dynamo.config.recompile_limit = 64  # prompts, tokens, batches, windows
        names = ("inner", "linears")
        options = {"free_weights": True, "strict": True} | {name: settings[name] for name in names}
        mxfp4_fx.compile(model, options=options)
    cells = Cells(model, ids)
    with torch.no_grad():
        for name, *numbers in settings["cells"]:
            with phase(" ".join((name, *map(str, numbers)))) as facts:
                facts |= getattr(cells, name)(*numbers)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
