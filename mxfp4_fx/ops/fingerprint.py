"""What in torch's caches depends on this package: what its passes do and its ops mean.

Torch keys a cached graph by its text, in which an op is a name with arguments, and by torch's own
sources. It cannot know that a newer version of an op returns other strides or has another backward,
or that another version, or another CPU, would not have let Inductor compile the graph at all.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.core.version import __version__


def fingerprint() -> str:
    """Return the version of the package, a hash of its Python sources, and the CPU's path.

    Kernels and compiled libraries are left out: a cached graph calls them by name.
    """
    try:
        path = hardware.cpu_path()
    except KernelsUnavailableError:
        path = "none"
    return f"mxfp4_fx-{__version__}-{_hash_of(Path(__file__).parents[1])}-{path}"


@functools.cache
def _hash_of(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
