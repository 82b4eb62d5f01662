import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from implementations import Kernels

# Read by huggingface_hub when it is imported: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# Read by triton when it is imported: without a GPU its kernels run in its interpreter.
if not has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What lasts a process, such as recompile limits and warnings given once, lasts a test."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()
    if "mxfp4_fx.calls" in sys.modules:
        from mxfp4_fx import calls

        calls._told.clear()
        calls._seen.clear()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        import implementations

        is_routing = metafunc.module.__name__.rpartition(".")[2] == "test_routing"
        specs = implementations.ROUTING if is_routing else implementations.ALL
        metafunc.parametrize("kernels", specs, indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> "Iterator[Kernels]":
    """Each of all kernels that run on this machine, one after the other."""
    import implementations

    with implementations.chosen(request.param) as found:
        yield found
