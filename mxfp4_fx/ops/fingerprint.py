"""What in torch's caches depends on this package: the meaning of its ops.

Torch keys a cached graph by its text, in which an op is a name with arguments, and by torch's own
sources. It cannot know that a newer version of an op returns other strides or has another backward.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from mxfp4_fx.core.version import __version__


@functools.cache
def fingerprint() -> str:
    """Return the version of the package and a hash of the Python sources of its ops.

    Kernels and compiled libraries are left out: a cached graph calls them by name.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"mxfp4_fx-{__version__}-{digest.hexdigest()[:16]}"
