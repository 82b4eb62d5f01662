"""What each rank does in ``test_soak.py``: see ``ranks.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import soak_child


def soak_here(settings: dict[str, Any], checkpoint: Path) -> list[dict[str, Any]]:
    """Generate, and return the samples."""
    samples: list[dict[str, Any]] = []
    rank = dist.get_rank()
    own = {"seconds": 0.0, "checkpoint": str(checkpoint), "rank": rank}
    soak_child.soak({**settings, **own}, lambda sample: samples.append({"rank": rank, **sample}))
    return samples
