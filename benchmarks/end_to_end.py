"""A whole model: tokens a second of a GPT-OSS uncompiled, compiled by Inductor, and in MXFP4.

One model is in memory. It is compiled in place twice (``model.compile``), and which of the three
serves a call is switched between the calls, so that they are measured in turn.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Log
from benchmarks.contenders import WrongResult
from benchmarks.generation import generate, prompt
from benchmarks.moe import ROUNDINGS, relative_error
from benchmarks.timing import summary
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.core.errors import InflatedExpertsWarning

TINY = CheckpointShape(
    layers=1, hidden=64, intermediate=96, experts=8, experts_per_token=4,
    heads=4, kv_heads=2, head_dim=16,
)  # fmt: skip


def end_to_end(
    checkpoint: Path,
    *,
    tiny: bool,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    compiler: str,
    log: Log,
) -> dict[str, Any]:
    """Prefill and greedy decode, medians of ``rounds``.

    Args:
        checkpoint: written with random weights if it is absent.
        tiny: write it with tiny sizes, for tests.
        compiler: the Dynamo backend that the others are compiled with: "inductor".

    Raises:
        WrongResult: the compiled models compute something else.
    """
    from transformers import AutoModelForCausalLM, Mxfp4Config

    if not checkpoint.exists():
        log("writing a checkpoint of random weights")
        write_random_checkpoint(checkpoint, TINY if tiny else CheckpointShape(), progress=False)
    log("loading the model")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True),
        local_files_only=True,
    ).eval()
    warnings.simplefilter("ignore", InflatedExpertsWarning)  # others need dense experts
    ids = prompt(model, prompt_tokens)
    calls: dict[str, Any] = {"uncompiled": None}
    model.compile(backend=compiler)
    calls["inductor"] = model._compiled_call_impl
    model.compile(backend="mxfp4", options={"strict": True, "inner": compiler})
    calls["mxfp4"] = model._compiled_call_impl

    samples: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in calls
    }
    differences: dict[str, float] = {}
    layers = model.config.num_hidden_layers
    # Two compilers, prefill, decode, and a cache that grows: more graphs than Dynamo expects.
    with torch._dynamo.config.patch(recompile_limit=64):
        for name, call in calls.items():
            model._compiled_call_impl = call
            log(f"{name}: first calls (compiling)")
            logits = generate(model, ids, new_tokens, output_logits=True)[0].logits[0].double()
            if call is None:
                plain = logits
            differences[name] = relative_error(logits, plain)
            check_logits(name, differences[name], layers)
        for turn in range(rounds):
            log(f"round {turn + 1} of {rounds}")
            for name in random.Random(turn).sample(list(calls), len(calls)):
                model._compiled_call_impl = calls[name]
                for part, rate in generate(model, ids, new_tokens)[1].items():
                    samples[name][part].append(rate)
    return {
        "layers": layers,
        "hidden": model.config.hidden_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "compiler": compiler,
        "tokens_per_second": {
            name: {part: summary(rates) for part, rates in parts.items()}
            for name, parts in samples.items()
        },
        "relative_difference_of_logits": differences,
    }


def logits_bound(layers: int) -> float:
    """Of relative differences: attention rounds about as often as the MLP does, and two runs
    differ by two errors. From about ten layers on it says nothing.
    """
    return 2 * 2 * ROUNDINGS * layers * 2**-9


def check_logits(name: str, difference: float, layers: int) -> None:
    """Raise WrongResult unless rounding explains how far logits are from the uncompiled ones."""
    if not difference <= logits_bound(layers):
        raise WrongResult(
            f"{name}: the logits differ by {difference:.2e} of themselves from the uncompiled "
            f"model's; rounding explains {logits_bound(layers):.2e}"
        )
