"""`Journal` and `locked`: a run that writes a checkpoint, and can be interrupted and resumed.

The run works in a directory of its own:

    journal.json  input and options of the run; size and checksums of each complete shard
    lock          held by the process that works here; the kernel releases it if the process dies
    checkpoint/   the shards; the name of an incomplete one ends in ".writing"
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mxfp4_fx.core.errors import CheckpointError


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Keep other processes from working in a directory.

    Raises:
        CheckpointError: another one does.
    """
    lock = FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"another process works on {partial}: wait for it, or name another directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


# Experts -> sums of squares: of what rounding changed, and of the weights.
Squares = dict[str, tuple[float, float]]


class Journal:
    """The complete shards of a run, in a file that is replaced as a whole."""

    def __init__(
        self, partial: Path, identity: Mapping[str, Any], *, measures: bool = False
    ) -> None:
        """Begin a run in `partial`, or resume the run that was interrupted there.

        Args:
            partial: the run's directory.
            identity: the run's input and options, as JSON values.
            measures: whether the run measures what rounding changes. Shards of a run that did not
                are then written again: the errors would be those of a part of the weights.

        Raises:
            CheckpointError: the interrupted run had another `identity`, or its journal is missing
                or damaged.
        """
        self.partial = partial
        self.checkpoint = partial / "checkpoint"
        self._file = partial / "journal.json"
        self._content: dict[str, Any] = {**identity, "shards": {}}
        if self._file.exists():
            self._go_on(identity, measures)
        elif self.checkpoint.exists():
            raise CheckpointError(f"{partial} has no journal of its shards: remove it")
        self._save()
        self.checkpoint.mkdir(exist_ok=True)

    def _go_on(self, identity: Mapping[str, Any], measures: bool) -> None:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            other = [key for key in identity if content[key] != identity[key]]
            shards = content["shards"].items()
            sizes = {name: int(shard["size"]) for name, shard in shards}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file} is damaged: remove {self.partial}") from error
        if other:
            raise CheckpointError(
                f"{self.partial} is left from a run with another {' and another '.join(other)}: "
                f"remove it, or repeat that run as it was"
            )
        # Sizes are enough here: the run reads every byte again at its end.
        for name, shard in shards:
            if measures and shard.get("squares") is None:
                continue
            file = self.checkpoint / name
            if file.is_file() and file.stat().st_size == sizes[name]:
                self._content["shards"][name] = shard

    def __contains__(self, shard: str) -> bool:
        return shard in self._content["shards"]

    def add(
        self,
        shard: str,
        size: int,
        digests: dict[str, str],
        nan: dict[str, int],
        squares: Squares | None,
    ) -> None:
        """Enter a complete shard; `squares` are of its experts, or None if nobody measured."""
        self._content["shards"][shard] = {
            "size": size,
            "sha256": digests,
            "nan_blocks": nan,
            "squares": squares,
        }
        self._save()

    def digest(self, shard: str, tensor: str) -> str:
        digest: str = self._content["shards"][shard]["sha256"][tensor]
        return digest

    @property
    def nbytes(self) -> int:
        return sum(shard["size"] for shard in self._content["shards"].values())

    @property
    def nan_blocks(self) -> dict[str, int]:
        shards = self._content["shards"].values()
        return {name: n for shard in shards for name, n in shard["nan_blocks"].items()}

    @property
    def rounding_errors(self) -> dict[str, float]:
        """Experts -> the norm of what rounding changed, relative to the norm of the weights."""
        sums: Squares = {}
        for shard in self._content["shards"].values():
            for name, (error, value) in (shard.get("squares") or {}).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + error, before[1] + value
        return {
            name: math.sqrt(error / value) if value else 0.0
            for name, (error, value) in sums.items()
        }

    def _save(self) -> None:
        written = self._file.with_suffix(".writing")
        written.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        sync(written)
        written.replace(self._file)


def sync(file: Path) -> None:
    """Flush a file to the disk, and drop it from the page cache, so that reads come from disk."""
    with file.open("r+b") as stream:  # Windows flushes only what is open for writing
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
