"""Warnings about modules and functions, each given once; with ``strict``, misses are errors."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from mxfp4_fx.core.errors import MissedRewriteError, MissedRewriteWarning
from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.report import Miss

# A module or function -> the warnings that were given about it.
_told: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def is_told(subject: Any, message: str) -> bool:
    """Return whether a warning was given about a module or function."""
    return message in _told.get(subject, ())


def note_told(subjects: Iterable[Any], message: str) -> None:
    """Note that a warning was given about modules or functions."""
    for subject in subjects:
        _told.setdefault(subject, set()).add(message)


def tell(misses: Sequence[tuple[Miss, list[Any]]], options: Options) -> None:
    """Warn of misses, once for each module and reason, or raise with ``strict``.

    Raises:
        MissedRewriteError: there are misses, and ``options.strict`` is set.
    """
    if misses and options.strict:
        lines = "\n".join(f"  {miss}" for miss, _ in misses)
        raise MissedRewriteError(
            f"strict=True, and {len(misses)} MoE layer(s) cannot be rewritten:\n{lines}"
        )
    fresh = [
        (miss, modules)
        for miss, modules in misses
        if not all(is_told(module, str(miss)) for module in modules)
    ]
    if not fresh:
        return
    more = f"\n  and {len(fresh) - 3} more; mxfp4_fx.explain lists all" if fresh[3:] else ""
    shown = "".join(f"\n  {miss}" for miss, _ in fresh[:3])
    warn(f"these MoE layers run as they were, not in MXFP4:{shown}{more}", MissedRewriteWarning)
    # If the warning is raised as an error, this is not reached: the next call raises it again.
    for miss, modules in fresh:
        note_told(modules, str(miss))


def tell_of_linears(misses: Sequence[Miss], subjects: list[Any], options: Options) -> None:
    """Warn of linears that stay exact though MXFP8 was asked for, or raise with ``strict``.

    Raises:
        MissedRewriteError: there are misses, and ``options.strict`` is set.
    """
    what = "linear(s) stay exact under options={'linears': 'mxfp8'}"
    if misses and options.strict:
        lines = "\n".join(f"  {miss}" for miss in misses)
        raise MissedRewriteError(
            f"strict=True, and {len(misses)} {what}; options['skip'] can name them:\n{lines}"
        )
    fresh = [m for m in misses if not all(is_told(one, str(m)) for one in subjects)]
    if not fresh:
        return
    more = f"\n  and {len(fresh) - 3} more; mxfp4_fx.explain lists all" if fresh[3:] else ""
    shown = "".join(f"\n  {miss}" for miss in fresh[:3])
    warn(f"{len(fresh)} {what}:{shown}{more}", MissedRewriteWarning)
    for miss in fresh:
        note_told(subjects, str(miss))


def warn(message: str, category: type[Warning]) -> None:
    """Warn, whatever was warned of before."""
    # With a shared registry, Python would show a message once, though it is about several models.
    warnings.warn_explicit(
        f"backend 'mxfp4': {message}", category, __file__, 0, module=__name__, registry={}
    )
