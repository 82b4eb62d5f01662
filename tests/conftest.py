import gc
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from costs import Costs

if TYPE_CHECKING:
    from implementations import Kernels

# Read by huggingface_hub when it is imported: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


VARIABLES = (
    *("CXX", "MXFP4_FX_CPU", "MXFP4_FX_CXXFLAGS", "MXFP4_FX_CACHE_DIR"),
    *("HF_HOME", "HF_HUB_OFFLINE", "LOCAL_KERNELS", "TRITON_INTERPRET"),
)


# Read by triton when it is imported: without a GPU its kernels run in its interpreter.
if not has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of one ``run`` of a file stand together: a worker runs neighbours."""
    files: dict[str, int] = {}

    def place(item: pytest.Item) -> tuple[int, str]:
        run = getattr(item, "callspec", None) and item.callspec.params.get("run")
        return files.setdefault(str(item.path), len(files)), run if isinstance(run, str) else ""

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Keep what imports have made out of later collections of garbage, which take 0.3 s else."""
    gc.collect()
    gc.freeze()
    # pytest gives loggers that do not propagate its handlers, and torch draws each graph several
    # times for a trace that anybody handles: a tenth of a compilation.
    logging.getLogger("torch.__trace").propagate = True
    if "torch._dynamo" in sys.modules:
        import torch._dynamo.guards

        # For a line of its log, Dynamo times each graph's guards with a flushed cache: 30 ms.
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of what is left when the process ends


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What lasts a process, such as recompile limits and warnings given once, lasts a test."""
    begin_anew()
    before = settings()
    yield
    begin_anew()
    assert settings() == before, "the test changed what other tests rely on"


def begin_anew() -> None:
    if "torch" in sys.modules:
        import torch

        # torch.manual_seed also notes, with a stack, that GPUs are to be seeded: 1 ms.
        (torch if has_gpu() else torch.default_generator).manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
    if "mxfp4_fx.calls" in sys.modules:
        from mxfp4_fx import calls, telling

        telling._told.clear()
        calls._seen.clear()
        calls._told_of_size.clear()
    if "mxfp4_fx.experts" in sys.modules:
        from mxfp4_fx import experts

        experts._models.clear()  # limits count modules that live; others may be garbage
    if "mxfp4_fx.ops.target" in sys.modules:
        from mxfp4_fx.ops import target

        target._warn_slow.cache_clear()


def settings() -> dict[str, object]:
    """What a process has one of, and a test that changes it must put back."""
    import torch

    return {
        "folder": os.getcwd(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "variables": {k: v for k, v in os.environ.items() if k in VARIABLES},
    }


@pytest.fixture
def no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        import implementations

        is_routing = metafunc.module.__name__.rpartition(".")[2] == "test_routing"
        is_one_enough = is_routing or metafunc.definition.get_closest_marker("any_layout")
        specs = implementations.ANY_LAYOUT if is_one_enough else implementations.ALL
        metafunc.parametrize("kernels", specs, indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> "Iterator[Kernels]":
    """Each of all kernels that run on this machine, one after the other."""
    import implementations

    with implementations.chosen(request.param) as found:
        yield found
