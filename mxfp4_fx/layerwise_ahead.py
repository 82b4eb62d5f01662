"""Decoder layers of one token that are prepared in a row, before the first of them is computed.

A decoded token runs two native programs a layer. What leads to each, from Dynamo's guards to the
allocation of results, is a few thousand places in memory; between two layers 100 MB of weights push
them out of the caches. In a row with those of other layers they stay there, and take a fraction of
the time.

So all layers are checked before the first one is computed, as the parts of a model are that is
compiled as a whole. They are checked with the very tensors that they will get: a layer's result is
there, without values, when the next layer is prepared. Only the keys and values that a cache is
going to return are unknown; tensors of the expected sizes stand in for them. A layer that is called
with anything else than it was prepared for is computed as if nothing had been prepared.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxfp4_fx.core.torch_private_direct import Direct
from mxfp4_fx.huggingface import decoder_layers
from mxfp4_fx.ops.pending import CannotWait, Pending, prepared
from mxfp4_fx.weights.state import guards_of
from mxfp4_fx.weights.store import STORE

log = logging.getLogger("mxfp4_fx.layerwise")

_MOST_IN_VAIN = 3  # tokens in a row; then only one in
_RARELY = 64  # tokens is tried


class Stand(NamedTuple):
    """Tensors that stand in for the keys and values of a cache.

    Attributes:
        k, v: [batch, heads, tokens, head_dim], without values.
        check: whether others have their class, dtype, device, sizes, strides and modes.
    """

    k: Tensor
    v: Tensor
    check: Callable[..., bool]


class Ready(NamedTuple):
    """A layer that is prepared.

    Attributes:
        hidden, kwargs: the very arguments that it is prepared for.
        named: those of ``kwargs`` that the pieces get.
        update: what the head returns: new keys and values, and further arguments of the update.
        head, rest: the programs.
        stand: what stands in for the cache's keys and values,
        reads: and where ``rest`` reads either.
        output: the layer's result.
        number: of the layer in the cache.
    """

    hidden: Tensor
    kwargs: Mapping[str, Any]
    named: dict[str, Any]
    update: tuple[Any, ...]
    head: Pending
    rest: Pending
    stand: Stand
    reads: tuple[list[int], list[int]]
    output: Tensor
    number: int

    def is_for(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        return hidden is self.hidden and are_same(kwargs, self.kwargs)

    def compute_head(self) -> tuple[Any, ...]:
        self.head.run()
        return self.update

    def fits(self, k: Tensor, v: Tensor, changes: Mapping[str, Any]) -> bool:
        """Return whether the rest is prepared for what the cache has returned."""
        return not changes and k is not v and self.stand.check(k, v)

    def compute_rest(self, k: Tensor, v: Tensor) -> Tensor:
        self.rest.replace(self.reads[0], k)
        self.rest.replace(self.reads[1], v)
        self.rest.run()
        return self.output


def can_wait(hidden: Tensor, kwargs: Mapping[str, Any], cache: str) -> bool:
    """Return whether a layer's call may be prepared: of one token, in inference, with a cache."""
    return (
        hidden.shape[1] == 1
        and not torch.is_grad_enabled()
        and kwargs.get(cache) is not None
        and decoder_layers.why_not_called(cache, kwargs) is None
    )


class Plan:
    """What a model's tokens have shown about the next one.

    Attributes:
        alike: for each layer, the first one that had the same arguments; None if that is unknown.
        in_vain: how many tokens in a row did not use what was prepared for them.
    """

    def __init__(self, count: int) -> None:
        self.alike: list[int | None] = [None] * count
        self.in_vain = 0
        self._tokens = 0

    def is_promising(self) -> bool:
        """Return whether to prepare anything of one more token."""
        self._tokens += 1
        return self.in_vain < _MOST_IN_VAIN or self._tokens % _RARELY == 0


class Token:
    """The layers that one call of the model prepares, and those that it has called unprepared.

    Attributes:
        plan: the model's.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._called: dict[int, Mapping[str, Any]] = {}
        self._ready: dict[Callable[..., Any], Ready] = {}
        self._is_off = False

    def take(
        self, layer: Callable[..., Any], hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Ready | None:
        """Return what is prepared for a layer's call, once."""
        ready = self._ready.pop(layer, None)
        if ready is None or ready.is_for(hidden, kwargs):
            return ready
        self.drop()
        return None

    def drop(self) -> None:
        """Forget what is prepared: a layer is called with other things."""
        self._ready.clear()
        self._is_off = True
        self.plan.in_vain += 1

    def used(self) -> None:
        """Note that a layer was computed as it was prepared."""
        if not self._ready:
            self.plan.in_vain = 0

    def note(self, number: int, kwargs: Mapping[str, Any]) -> None:
        """Note the arguments of a layer that is called unprepared."""
        if not self._called:
            self._is_off = not self.plan.is_promising()
        same = (first for first, known in self._called.items() if are_same(known, kwargs))
        self.plan.alike[number] = next(same, number)
        self._called[number] = kwargs

    def following(self, number: int) -> list[Mapping[str, Any]]:
        """Return the arguments of this layer and of those after it, as far as they are known."""
        found: list[Mapping[str, Any]] = []
        if not self._is_off:
            for first in self.plan.alike[number:]:
                if first not in self._called:
                    break
                found.append(self._called[first])
        return found

    def prepare(
        self,
        layers: Sequence[Any],
        pieces: tuple[Direct, Direct],
        hidden: Tensor,
        given: Sequence[Mapping[str, Any]],
        cache: str,
    ) -> None:
        """Prepare layers.

        Args:
            layers: what calls them; its ``layer`` is the module.
            pieces: the compiled head and rest of all layers.
            hidden: the first one's hidden states.
            given: the other arguments of each.
            cache: the name of the one that the pieces do not get.
        """
        before, made = STORE.swizzled, {}
        stands: dict[int, Stand] = {}
        try:
            with prepared() as calls:
                for one, kwargs in zip(layers, given, strict=False):
                    named = {name: value for name, value in kwargs.items() if name != cache}
                    ready = _ready(one.layer, pieces, hidden, kwargs, named, calls, stands)
                    made[one], hidden = ready, ready.output
        except CannotWait as why:
            log.debug("a layer is not prepared before its call: %s", why)
            self._is_off = True
        if not made:
            return self.drop()
        if STORE.swizzled != before:
            return  # perhaps in memory that a program is about to read
        programs = [program for ready in made.values() for program in (ready.head, ready.rest)]
        size = max(program.bytes for program in programs)
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # they run in turn
        for program in programs:
            program.use(memory)
        self._ready = made


def _ready(
    layer: Any,
    pieces: tuple[Direct, Direct],
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    named: dict[str, Any],
    calls: list[Pending],
    stands: dict[int, Stand],
) -> Ready:
    head, rest = pieces
    calls.clear()
    found = head.known(layer, hidden, named)
    if found is None:
        raise CannotWait("its first piece would be compiled")
    k, v, _, _ = update = found[0]
    stand = _stand(k, v, named.get("attention_mask"), stands)
    found = rest.known(layer, (stand.k, stand.v), {}, hidden, named, None)
    if found is None:
        raise CannotWait("its second piece would be compiled")
    output, _ = found[0]
    if len(calls) != 2:
        raise CannotWait(f"it runs {len(calls)} programs")
    first, second = calls
    if not all(any(one is result for result in first.results) for one in (k, v)) or not any(
        output is result for result in second.results
    ):
        raise CannotWait("what it returns is no result of a program")
    reads = second.reads(stand.k), second.reads(stand.v)
    number = layer.self_attn.layer_idx
    return Ready(hidden, kwargs, named, update, first, second, stand, reads, output, number)


def _stand(k: Tensor, v: Tensor, mask: Any, stands: dict[int, Stand]) -> Stand:
    """Return keys and values as a cache will return them: as many as the mask has columns."""
    if not isinstance(mask, Tensor):
        raise CannotWait("no mask tells how many keys there will be")
    count = mask.shape[-1]
    if count not in stands:
        keys, values = (new.new_empty((*new.shape[:2], count, new.shape[3])) for new in (k, v))
        stands[count] = Stand(keys, values, guards_of((keys, values)))
    return stands[count]


def are_same(ones: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether arguments are the very same objects."""
    return [*ones] == [*others] and all(map(operator.is_, ones.values(), others.values()))
