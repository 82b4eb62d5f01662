"""What a decoded token's time goes to, from the events of torch's profiler.

Kernels that Inductor made are no events. So attention is what lies in a layer between the last
projection before it (of queries) and the one behind it (of its output), and the update of the cache
(``aten::cat``); what is no part of all that, norms, residuals and Python, is the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

TOKEN = "benchmarks.token"  # the name of the event around each token
EXPERTS, LINEARS, HEAD, ATTENTION, REST = "experts", "q, k, v, o", "head", "attention", "the rest"
PARTS = (EXPERTS, LINEARS, HEAD, ATTENTION, REST)
_PREFIXES = {
    "mxfp4::moe": EXPERTS,
    "mxfp4::routing": EXPERTS,
    "mxfp4::matmul_ogs": EXPERTS,
    "mxfp4::expert_ids": EXPERTS,
    "mxfp4::linears": LINEARS,
    "aten::linear": LINEARS,
    "aten::addmm": LINEARS,
    "aten::mm": LINEARS,
    "mkldnn::_linear": LINEARS,
    "aten::cat": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
}


class Span(NamedTuple):
    """An event that belongs to a part, or to a token; microseconds."""

    start: float
    end: float
    part: str

    @property
    def length(self) -> float:
        return self.end - self.start


def parts_of(events: Iterable[Any], tokens: int) -> dict[str, float]:
    """Seconds of each part of the token that took the median of ``tokens``, while the profiler
    watched: of one token, so that they add up, and of a usual one.
    """
    spans = [span for event in events if (span := _span(event))]
    windows = sorted((span for span in spans if span.part == TOKEN), key=lambda each: each.length)
    if len(windows) != tokens:
        raise ValueError(f"{tokens} tokens were decoded, {len(windows)} are in the profile")
    token = windows[(tokens - 1) // 2]
    inside = [s for s in spans if token.start <= s.start < token.end and s.part != TOKEN]
    taken = _of_token(_outermost(inside))
    taken[REST] = token.length - sum(taken.values())
    return {part: 1e-6 * microseconds for part, microseconds in taken.items()}


def _of_token(spans: Sequence[Span]) -> dict[str, float]:
    """Microseconds of the parts of one token, but for the rest."""
    found = dict.fromkeys(PARTS[:-1], 0.0)
    linears: list[Span] = []  # since the last experts
    since: list[Span] = []
    for span in spans:
        if span.part == EXPERTS and linears:
            *others, router = linears
            found[EXPERTS] += router.length
            found[LINEARS] += sum(each.length for each in others)
            if len(others) > 1:
                found[ATTENTION] += _gap(others[-2], others[-1], since)
            linears, since = [], []
        if span.part == LINEARS:
            linears.append(span)
        else:
            found[span.part] += span.length
            since.append(span)
    found[HEAD] += sum(each.length for each in linears)
    return found


def _gap(before: Span, behind: Span, others: Sequence[Span]) -> float:
    """What lies between two events and is no event of a part itself."""
    counted = [each for each in others if before.end <= each.start < behind.start]
    return behind.start - before.end - sum(each.length for each in counted)


def _outermost(spans: Iterable[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in sorted(spans, key=lambda each: (each.start, -each.end)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _span(event: Any) -> Span | None:
    part = TOKEN if event.name == TOKEN else _part(event.name)
    return Span(event.time_range.start, event.time_range.end, part) if part else None


def _part(name: str) -> str | None:
    if name.startswith("mxfp4::") and "attention" in name:
        return ATTENTION
    return next((part for start, part in _PREFIXES.items() if name.startswith(start)), None)
