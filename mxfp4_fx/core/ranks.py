"""Words that the processes of a group leave for each other in its store, with a limit on waiting.

Not collectives: a process that fails, or never comes, leaves nobody hanging, and who waits can say
whom for.
"""

from __future__ import annotations

import datetime
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn

from mxfp4_fx.core import torch_private

log = logging.getLogger("mxfp4_fx.ranks")

_NOTE = "mxfp4_fx:"


class Absent(Exception):
    """Ranks left no word in time.

    Attributes:
        ranks: which.
        seconds: how long this one waited.
    """

    def __init__(self, ranks: list[int], seconds: float) -> None:
        super().__init__(f"{named(ranks)} left no word within {seconds:.0f} seconds")
        self.ranks, self.seconds = ranks, seconds


def is_one_of_several() -> bool:
    """Return whether this process is in a group with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everyone() -> range:
    return range(dist.get_world_size())


def tell(topic: str, word: str) -> None:
    """Leave a word on a topic; it replaces what this rank said before."""
    torch_private.default_store().set(_key(topic, dist.get_rank()), word)


def withdraw(topic: str) -> None:
    """Take back this rank's word on a topic."""
    torch_private.default_store().delete_key(_key(topic, dist.get_rank()))


def words(topic: str, ranks: Iterable[int], seconds: float | None = None) -> dict[int, str]:
    """Wait until all of `ranks` have left a word on a topic, and return rank -> word.

    Args:
        topic: must be new for each time that they do so.
        ranks: this one may be among them.
        seconds: how long to wait; None means as long as the group waits for anything.

    Raises:
        Absent: some have not, or the store is gone with the process that had it.
    """
    store = torch_private.default_store()
    limit = store.timeout if seconds is None else datetime.timedelta(seconds=seconds)
    keys = {rank: _key(topic, rank) for rank in ranks}
    try:
        store.wait([*keys.values()], limit)
        return {rank: store.get(key).decode() for rank, key in keys.items()}
    except RuntimeError as error:  # all of torch's about stores
        raise Absent(_missing(store, keys), limit.total_seconds()) from error


_gathered: Counter[str] = Counter()


def gather(topic: str, ranks: Sequence[int], seconds: float) -> None:
    """Wait until all of `ranks` call this; where one does not, the others may call it again.

    Raises:
        Absent: as :func:`words`.
    """
    topic = f"{topic}/{'-'.join(map(str, ranks))}"
    this = f"{topic}/{_gathered[topic]}"
    tell(this, "")
    try:
        words(this, ranks, seconds)
    except Absent:
        withdraw(this)
        raise
    _gathered[topic] += 1


def of_model(modules: Iterable[nn.Module]) -> list[int]:
    """Return the ranks that run a model together, as a mesh in it says, or [] if it is not spread.

    transformers has the mesh on the model, a DTensor has one, and so have shards of packed experts.
    """
    for module in modules:
        shards = getattr(module, "shards", None)
        parts = shards.values() if isinstance(shards, dict) else ()
        meshes = [getattr(module, "_device_mesh", None)]
        meshes += [getattr(p, "device_mesh", None) for p in module.parameters(recurse=False)]
        meshes += [getattr(part, "mesh", None) for part in parts]
        for mesh in meshes:
            if mesh is not None and mesh.size() > 1:
                ranks: list[int] = mesh.mesh.flatten().tolist()
                return ranks
    return []


def note(error: BaseException, doing: str) -> None:
    """Let what Python prints of an exception say which of several processes it ended, and where.

    A collective that fails names an address at most. The innermost note of an exception stays.

    Args:
        doing: "in ...".
    """
    notes: list[str] = getattr(error, "__notes__", [])
    if not is_one_of_several() or any(_NOTE in one for one in notes):
        return
    text = f"{_NOTE} rank {dist.get_rank()} of {dist.get_world_size()} was {doing}"
    error.__notes__ = [*notes, text]
    if sys.version_info < (3, 11):  # which does not print notes
        log.error(text)


def named(ranks: list[int]) -> str:
    """Return "rank 1", or "ranks 1, 2"."""
    listed = ", ".join(map(str, ranks))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _missing(store: dist.Store, keys: dict[int, str]) -> list[int]:
    try:
        return [rank for rank, key in keys.items() if not store.check([key])]
    except RuntimeError:
        return [0]  # which has the store


def _key(topic: str, rank: int) -> str:
    return f"mxfp4_fx/{topic}/{rank}"
