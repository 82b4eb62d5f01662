"""Where matched experts get their routes from: a router that is proven, or any other.

``mxfp4::moe`` computes the router that :data:`~mxfp4_fx.passes.routers.ROUTERS` describe. Every
other router stays in the graph as it is, and ``mxfp4::moe.routes`` takes what it chooses. Then only
the form says what an id means that no expert has, unless the ids are proven to be those of experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from mxfp4_fx.passes.graph import before_moves, fixed, read_call, tensor_of
from mxfp4_fx.passes.matcher import Match, Mismatch
from mxfp4_fx.passes.memory import Memory, may_share
from mxfp4_fx.passes.patterns import E, Form
from mxfp4_fx.passes.routers import ALL, RANK, ROUTERS, Router

# Form.above, in words.
_MEANINGS = {
    "skip": "ids of no expert here count nothing",
    "last": "ids beyond the last expert are taken for it",
    "error": "ids of no expert are an error when it runs",
}
_INDICES = (torch.int32, torch.int64)  # casts to these keep every id


class Routes(NamedTuple):
    """The routes of matched experts.

    Attributes:
        match: the proof of the experts, and of the router if there is one.
        router: the router, or None if it stays in the graph.
        origin: ``Rewrite.router``: where the routes come from, in words.
        why: ``Rewrite.why_own_router``: why the router stays in the graph, or "".
    """

    match: Match
    router: Router | None
    origin: str
    why: str = ""

    @property
    def first_expert(self) -> int:
        """The id of the first expert that is here."""
        is_part = self.router is not None and self.router.is_part
        return self.match.letters[RANK.name] * self.match.letters[E.name] if is_part else 0


def find_routes(match: Match, form: Form, memory: Memory) -> Routes:
    """Prove the router, or take its routes as they are.

    The router's values may have other users, because models return the scores. They stay in the
    graph. The router may be on another device than the experts.

    Raises:
        Mismatch: the router is that of one rank, with numbers that cannot be.
    """
    scores, indices = (before_moves(match.leaves[name]) for name in ("scores", "indices"))
    if scores.op == indices.op == "placeholder":
        return Routes(match, None, "routes as they are: they are inputs of the graph")
    failures: list[Mismatch] = []
    for router in ROUTERS:
        if router.is_part and not form.takes_sentinels:
            continue
        attempt = match.copy()
        try:
            attempt.expect(router.scores, scores)
            attempt.expect(router.indices, indices)
            attempt.solve(router.shapes)
            if router.experts not in (None, fixed(attempt.letters[E.name])):
                reason = f"it is for {router.experts} expert, of {attempt.letters[E.name]}"
                raise Mismatch(reason, scores, len(attempt.nodes))
            return Routes(attempt, router, _range_in_words(attempt, scores, router))
        except Mismatch as mismatch:
            mismatch.reason = f"the router is not ({router.name}): {mismatch.reason}"
            failures.append(mismatch)
    why = max(failures, key=lambda m: m.matched).reason
    origin = "routes of the model's own router"
    if not are_of_experts(match.leaves["indices"], match.letters[E.name], memory):
        origin += f"; {_MEANINGS[form.above]}"
    return Routes(match, None, origin, why)


def are_of_experts(indices: fx.Node, experts: object, memory: Memory) -> bool:
    """Return whether ids are the choice of a top-k among so many, and so those of experts."""
    while not _may_be_written(indices, memory):
        if before_moves(indices) is not indices:
            indices = before_moves(indices)
            continue
        call = read_call(indices)
        if call is None:
            return False
        if call.op == "getitem" and call.args["index"] == 1:
            call = read_call(call.args["input"])
            among = None if call is None else tensor_of(call.args["input"])
            if call is None or call.op != "topk" or among is None:
                return False
            count = fixed(experts)
            return count is not None and fixed(among.shape[call.args["dim"]]) == count
        is_same = call.op == "view" or (call.op == "cast" and call.args["dtype"] in _INDICES)
        if not is_same or not isinstance(call.args["input"], fx.Node):
            return False
        indices = call.args["input"]
    return False


def _may_be_written(node: fx.Node, memory: Memory) -> bool:
    """Return whether any call may write to a value, in the graph or outside of it."""
    mine = memory.of(node)
    written = [keys for _, keys in memory.writes] + [keys for _, keys, _ in memory.writes_outside]
    return any(may_share(mine, keys) for keys in written) or memory.reshaper(node) is not None


def insert_ids(root: fx.Node, match: Match, form: Form, memory: Memory) -> fx.Node:
    """Insert the op that treats ids out of range as the form does, unless there are none."""
    indices = match.leaves["indices"]
    experts = match.letters[E.name]
    if (form.below, form.above) == ("skip", "skip"):
        return indices
    if are_of_experts(indices, experts, memory):
        return indices
    value = tensor_of(indices)
    assert value is not None
    with root.graph.inserting_before(root):
        args = (indices, experts, form.below, form.above)
        ids = root.graph.call_function(torch.ops.mxfp4.expert_ids.default, args)
    with value.fake_mode:  # type: ignore[attr-defined]
        ids.meta = {**root.meta, "example_value": torch.empty_like(value)}
    return ids


def _range_in_words(match: Match, scores: fx.Node, router: Router) -> str:
    """Say which experts are here, if the router is that of one rank; fix the numbers that say it.

    Raises:
        Mismatch: the numbers are no range of the router's experts.
    """
    if not router.is_part:
        return ""
    numbers = {letter.name: fixed(match.letters[letter.name]) for letter in (RANK, E, ALL)}
    rank, experts, every = numbers.values()
    if rank is None or experts is None or every is None:
        reason = f"the rank {match.letters[RANK.name]} is no whole number that is known"
        raise Mismatch(reason, scores, len(match.nodes))
    first = rank * experts
    if not 0 <= first <= every - experts:
        reason = f"there are no {experts} experts from {first} on among {every}"
        raise Mismatch(reason, scores, len(match.nodes))
    match.letters |= numbers
    return f"{experts} of {every} experts, from {first} on: routes to others count nothing here"
