"""A whole model: tokens a second of a GPT-OSS uncompiled, compiled by Inductor, and in MXFP4.

One model is in memory. It is compiled in place twice (``model.compile``), and which of the three
serves a call is switched between the calls, so that they are measured in turn.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe import ROUNDINGS, relative_error
from samples import summary
from token_times import TokenTimes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from compile_model import TINY, load

from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint


class WrongLogits(Exception):
    """A compiled model's logits are not the uncompiled one's."""


def end_to_end(
    checkpoint: Path,
    *,
    tiny: bool,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    compiler: str,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Prefill and greedy decode, medians of ``rounds``.

    Prefill is from the prompt to the first token; decode is what ``new_tokens`` more take, in the
    same call: the difference of two calls would be negative when the machine is busy in one.

    Args:
        checkpoint: written with random weights if it is absent.
        tiny: write it with tiny sizes, for tests.
        compiler: the Dynamo backend that the others are compiled with: "inductor".

    Raises:
        WrongLogits: the compiled models compute something else.
    """
    if not checkpoint.exists():
        log("writing a checkpoint of random weights")
        write_random_checkpoint(checkpoint, TINY if tiny else CheckpointShape(), progress=False)
    log("loading the model")
    model = load(checkpoint, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=generator)

    calls: dict[str, Any] = {"uncompiled": None}
    model.compile(backend=compiler)
    calls["inductor"] = model._compiled_call_impl
    model.compile(backend="mxfp4", options={"strict": True, "inner": compiler})
    calls["mxfp4"] = model._compiled_call_impl

    def use(name: str) -> None:
        model._compiled_call_impl = calls[name]

    # Two compilers, prefill, decode, and a cache that grows: more graphs than Dynamo expects.
    rates: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in calls
    }
    differences = {}
    with torch._dynamo.config.patch(recompile_limit=64):
        for name in calls:
            use(name)
            log(f"{name}: first calls (compiling)")
            logits = _first_logits(model, ids)
            if name == "uncompiled":
                plain = logits
            differences[name] = relative_error(logits, plain)
            _rates(model, ids, new_tokens)
        _check(differences, model.config.num_hidden_layers)
        for turn in range(rounds):
            log(f"round {turn + 1} of {rounds}")
            for name in random.Random(turn).sample(list(calls), len(calls)):
                use(name)
                for part, rate in _rates(model, ids, new_tokens).items():
                    rates[name][part].append(rate)
    return {
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "compiler": compiler,
        "tokens_per_second": {
            name: {part: summary(samples) for part, samples in parts.items()}
            for name, parts in rates.items()
        },
        "relative_difference_of_logits": differences,
    }


def _first_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Float64 logits of the first new token, by the graph that is timed."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits[0].double()


def _rates(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Tokens a second of greedy generation, prefill and decode."""
    times = TokenTimes()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=1 + new_tokens,
        max_new_tokens=1 + new_tokens,
        do_sample=False,
        streamer=times,
    )
    return times.rates(ids.shape[1])


def _check(differences: dict[str, float], layers: int) -> None:
    """Attention rounds about as often as the MLP does, and two runs differ by two errors."""
    bound = 2 * 2 * ROUNDINGS * layers * 2**-9
    for name, difference in differences.items():
        if not difference <= bound:
            raise WrongLogits(
                f"{name}: the logits differ by {difference:.2e} of themselves from the uncompiled "
                f"model's; rounding explains {bound:.2e}"
            )
