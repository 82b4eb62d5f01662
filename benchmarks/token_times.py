"""When the tokens of ``generate`` come."""

from __future__ import annotations

import time
from typing import Any


class TokenTimes:
    """A streamer for ``generate``."""

    def __init__(self) -> None:
        self.times: list[float] = []  # of the prompt, then of each new token

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def rates(self, prompt_tokens: int) -> dict[str, float]:
        """Tokens a second: of the prompt, and after the first new one."""
        start, first, *rest = self.times
        decode = len(rest) / (rest[-1] - first)
        return {"prefill": prompt_tokens / (first - start), "decode": decode}
