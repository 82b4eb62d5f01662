"""Processes that load a model together: whether they load the same one, and whether all succeed.

Each leaves a word in the group's store before it reads weights, and one when it has read them. A
process that fails says so at once, and the others fail with it, instead of in the first collective
after the group's timeout.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import sys
from typing import Any

import torch
import transformers

from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.core import ranks
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.version import __version__

_SAMPLE = 4096  # bytes

_count = itertools.count()


class Meeting:
    """One model that all processes load; they must load their models in the same order.

    As a context, it tells the others of an exception that leaves it.

    Args:
        is_spread: whether the model is one for all processes; if not, nothing is said.
    """

    def __init__(self, is_spread: bool) -> None:
        self._is_over = not is_spread
        self._topic = f"load/{next(_count)}" if is_spread else ""

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(error)

    def compare(self, mine: dict[str, str]) -> None:
        """Wait until all ranks have said what they load, and compare.

        Args:
            mine: what must be the same -> its value here, in words for the user.

        Raises:
            CheckpointError: they do not load the same, or not all are there.
        """
        if self._is_over:
            return
        for rank, word in self._words("begin", {"loads": mine}).items():
            theirs = word["loads"]
            if differing := [name for name in mine if mine[name] != theirs.get(name)]:
                name = differing[0]
                raise CheckpointError(
                    f"the processes load different models: {name} of rank {rank} is "
                    f"{theirs.get(name)}, and of this rank {mine[name]}; give every rank the same "
                    "files, arguments and versions"
                )
        self._is_over = False

    def end(self) -> None:
        """Wait until all ranks have loaded their part.

        Raises:
            CheckpointError: one failed, or is not ready within the group's timeout.
        """
        self._words("end", {})

    def fail(self, why: object = None) -> None:
        """Tell the others that this rank fails, unless the meeting is over for it."""
        if self._is_over or not ranks.is_one_of_several():
            return
        self._is_over = True
        if why is None:  # an uncaught exception, and the process ends
            why = getattr(sys, "last_value", None)
        reason = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else "it gave up"
        for stage in ("begin", "end"):
            ranks.tell(f"{self._topic}/{stage}", json.dumps({"failed": reason}))

    def _words(self, stage: str, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        if self._is_over or not ranks.is_one_of_several():
            return {}
        topic = f"{self._topic}/{stage}"
        ranks.tell(topic, json.dumps(mine))
        self._is_over = True  # what is raised from here on, the others find out alike
        try:
            said = ranks.words(topic, ranks.everyone())
        except ranks.Absent as absent:
            raise CheckpointError(
                f"{ranks.named(absent.ranks)} did not load a part of the model within "
                f"{absent.seconds:.0f} seconds, so this rank cannot run: see what the other wrote"
            ) from absent
        words = {rank: json.loads(word) for rank, word in said.items()}
        for rank, word in words.items():
            if "failed" in word:
                raise CheckpointError(
                    f"rank {rank} could not load its part of the model, so this rank cannot run: "
                    f"{word['failed']}"
                )
        return words


def identity(checkpoint: Checkpoint, config: Any, settings: Any) -> dict[str, str]:
    """Return what must be the same on all ranks, for :meth:`Meeting.compare`.

    Of the values of weights, this reads the first bytes of all tensors but the experts', which a
    rank may not have read otherwise: checkpoints that differ in experts alone are not told apart.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        if ".experts." not in name:
            values = tensor.read().flatten().view(torch.uint8)
            digest.update(values[:_SAMPLE].numpy().tobytes())
    described = {k: v for k, v in checkpoint.config.items() if k != "transformers_version"}
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    return {
        "the checkpoint": digest.hexdigest()[:16],
        "dtype": str(config.dtype),
        "modules_to_not_convert": str(settings.modules_to_not_convert),
        "skip": str([*settings.skip.patterns]),
        "scale_rule": settings.scale_rule,
        "key_mapping": str(dict(settings.key_mapping)),
        "the version of mxfp4_fx": __version__,
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
        "the version of Python": platform.python_version(),
    }
