import os
import sys
from collections.abc import Iterator

import pytest

# Read by huggingface_hub when it is imported: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Dynamo's caches and recompile limits last a process: tests would depend on their order."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()
