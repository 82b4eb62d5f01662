"""MLPs whose weights ``free_weights`` frees: dense ones and packed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import mlp, pack

FREE = {"free_weights": True}


def dense(dtype: torch.dtype = torch.float32) -> Any:
    return mlp(dtype)


def packed(dtype: torch.dtype = torch.float32) -> Any:
    return pack(mlp(dtype))


BOTH = pytest.mark.parametrize("make", [dense, packed])
