"""The kernels that the ``kernels`` library serves from its hub: loaded when asked for, and checked.

``kernels="hub"`` runs the experts with the package that transformers itself uses for GPT-OSS. It is
fetched the first time, into the cache of huggingface_hub. With ``HF_HUB_OFFLINE=1`` it must lie
there already; ``LOCAL_KERNELS="kernels-community/gpt-oss-triton-kernels=DIRECTORY"`` takes a local
copy instead. Both are the library's own mechanisms.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.core.loaded_once import LoadedOnce

REPOSITORY = "kernels-community/gpt-oss-triton-kernels"
VERSION = 1  # of its interface; the one that transformers 5 asks for

# Device types that the package's kernels are launched on; "cuda" is ROCm's name in torch, too.
DEVICES: tuple[str, ...] = ("cuda",)

# What ``ops/hub.py`` takes from the package. Other versions of it have renamed some of these.
NAMES = (
    "matmul_ogs.FnSpecs",
    "matmul_ogs.FusedActivation",
    "matmul_ogs.PrecisionConfig",
    "matmul_ogs.matmul_ogs",
    "routing.ExptData",
    "routing.GatherIndx",
    "routing.RoutingData",
    "routing.ScatterIndx",
    "swiglu.swiglu_fn",
    "tensor.FP4",
    "tensor.wrap_torch_tensor",
)

_LOCAL = "LOCAL_KERNELS"
_OTHERS = "kernels='auto' takes the best that needs no download"


def load() -> Any:
    """The kernel package, fetched and imported when this is first called.

    Raises:
        KernelsUnavailableError: no ``kernels`` library, no such package for this machine (or none
            in the cache while offline), or one that lacks a name of :data:`NAMES`. The message says
            what is missing and what to do. It is tried again when ``LOCAL_KERNELS`` changes.
    """
    return packages(REPOSITORY)


def _load(repository: str) -> Any:
    return _checked(_get_kernel(repository))


packages = LoadedOnce(_load, KernelsUnavailableError, while_same=(_LOCAL,))


def _get_kernel(repository: str) -> Any:
    try:
        from kernels import get_kernel
    except ImportError as error:
        raise KernelsUnavailableError(
            f"kernels='hub' needs the package 'kernels', which cannot be imported ({error}): "
            f"pip install 'mxfp4_fx[kernels]'. Or {_OTHERS}"
        ) from error
    try:
        return get_kernel(repository, version=VERSION)
    except Exception as error:  # of files, network, a build for other hardware, or its own import
        raise KernelsUnavailableError(
            f"{REPOSITORY}, version {VERSION}, cannot be loaded: {_first_line(error)}. "
            f"Download it once while online (without HF_HUB_OFFLINE), or set {_LOCAL}="
            f"{REPOSITORY}=DIRECTORY to a copy of it. Or {_OTHERS}"
        ) from error


def _checked(package: Any) -> Any:
    missing = [name for name in NAMES if not _has(package, name)]
    if missing:
        raise KernelsUnavailableError(
            f"{REPOSITORY} was loaded and lacks {', '.join(missing)}: this is not the interface of "
            f"its version {VERSION}. If {_LOCAL} is set, let it name a copy of that version. "
            f"Or {_OTHERS}"
        )
    return package


def _has(package: Any, name: str) -> bool:
    try:
        attrgetter(name)(package)
    except AttributeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.:')}" if lines else type(error).__name__
