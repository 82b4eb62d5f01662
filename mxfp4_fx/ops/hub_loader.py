"""The loader of the kernel package that the ``kernels`` library downloads from its hub.

``kernels="hub"`` runs the experts with the package that transformers itself uses for GPT-OSS. The
first use downloads it into the cache of huggingface_hub. With ``HF_HUB_OFFLINE=1`` the cache must
have it already. ``LOCAL_KERNELS="kernels-community/gpt-oss-triton-kernels=DIRECTORY"`` selects a
local copy instead. Both mechanisms are the library's own.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER
from mxfp4_fx.core.loaded_once import LoadedOnce

REPOSITORY = "kernels-community/gpt-oss-triton-kernels"
VERSION = 1  # of the package's interface; transformers 5 loads the same version

# Device types that the package's kernels run on. ROCm's device type in torch is "cuda", too.
DEVICES: tuple[str, ...] = ("cuda",)

# Layouts that ``ops/hub.py`` hands to the package as they are.
LAYOUTS = (CHECKPOINT_ORDER, "hub_strided", "hub_hopper")

# The names that ``ops/hub.py`` uses. Other versions of the package renamed some of these.
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
    "tensor.Storage",
    "tensor.Tensor",
    "tensor.wrap_torch_tensor",
    "tensor_details.layout.HopperMXValueLayout",
)

_LOCAL = "LOCAL_KERNELS"
_OTHERS = "kernels='auto' takes the best that needs no download"


def load() -> Any:
    """Return the kernel package; the first call downloads and imports it.

    Raises:
        KernelsUnavailableError: there is no ``kernels`` library, or no such package for this
            machine (or none in the cache while offline), or the package lacks a name of
            :data:`NAMES`. The message has the remedy. Later calls raise the same error until
            ``LOCAL_KERNELS`` changes.
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
    except Exception as error:  # files, network, a build for other hardware, the package's import
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
