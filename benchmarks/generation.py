"""Tokens a second of ``generate``, prefill and decode apart."""

from __future__ import annotations

import time
from typing import Any


class TokenTimes:
    """A streamer: when the prompt and each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def prompt(model: Any, tokens: int) -> Any:
    """Random token numbers [1, tokens]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator)


def generate(
    model: Any, ids: Any, new_tokens: int, times: TokenTimes | None = None, **options: Any
) -> tuple[Any, dict[str, float]]:
    """Greedy generation of ``new_tokens`` after the first one: what it returns, tokens a second.

    Prefill is from the prompt to the first token; decode is what the others take, in the same call:
    the difference of two calls would be negative when the machine is busy in one. Who wants to know
    of each token when it comes passes ``times``.
    """
    times = times or TokenTimes()
    out = model.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        min_new_tokens=1 + new_tokens,
        max_new_tokens=1 + new_tokens,
        do_sample=False,
        streamer=times,
        return_dict_in_generate=True,
        **options,
    )
    start, first, *rest = times.times
    decode = len(rest) / (rest[-1] - first) if rest else 0.0
    return out, {"prefill": ids.shape[1] / (first - start), "decode": decode}
