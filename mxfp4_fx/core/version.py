"""The version of the package, which ``pyproject.toml`` reads here, and that of transformers."""

from __future__ import annotations

import importlib.metadata
import re
import sys

__version__ = "0.1.0"

# The oldest whose experts the passes know and whose loader the quantizer fits.
OLDEST_TRANSFORMERS = "5.8"
# The oldest that can spread packed experts over processes.
OLDEST_TO_SPREAD = "5.20"
# The oldest whose quantizers can change how a family's experts are merged.
OLDEST_FOR_FAMILIES = "5.23"


def transformers_version() -> str | None:
    """Return the version of transformers: of what is imported, or else installed."""
    version: str | None = getattr(sys.modules.get("transformers"), "__version__", None)
    if version is None:
        try:
            return importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return None
    return version


def too_old_transformers() -> str | None:
    """Return transformers' version if it is older than it must be, or else None."""
    version = transformers_version()
    if version is None or _numbers(version) >= _numbers(OLDEST_TRANSFORMERS):
        return None
    return version


def too_old_for_families() -> str | None:
    """Return transformers' version if it cannot load packed experts of any family, or else None."""
    version = transformers_version()
    if version is None or _numbers(version) >= _numbers(OLDEST_FOR_FAMILIES):
        return None
    return version


def can_spread() -> bool:
    """Return whether this transformers loads a model's parts in several processes as we need it."""
    version = transformers_version()
    return version is None or _numbers(version) >= _numbers(OLDEST_TO_SPREAD)


def why_other_experts() -> str | None:
    """Return why the passes do not know the experts of this transformers, or None if they do."""
    version = too_old_transformers()
    if version is None:
        return None
    return (
        f"transformers {version} writes its experts in another form: {OLDEST_TRANSFORMERS} or "
        "newer is needed"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
