"""Patterns of module names for ``skip``: one rule for loading, quantizing and compiling.

A pattern names a module if it matches whole parts of the module's name; dots separate parts. A
pattern that names a module also names all modules inside it: ``model.layers.1`` names layer 1 with
its experts, but not layer 10; ``mlp.experts`` names the experts of every layer.
``*``, ``?`` and ``[...]`` work as in a shell, and a ``*`` may span dots. A pattern with one of
``\\ ( ) | ^ $ + { }`` is a regular expression instead.

``modules_to_not_convert`` of a checkpoint's config follows another rule. Other programs read it,
too, so `not_converted` reads it as transformers does.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mxfp4_fx.core.errors import CheckpointError, Mxfp4Error, OptionError

# Parts that wrappers add inside a name. Prefixes need no list: a pattern may match after any dot.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# An attribute of experts that the user skipped when loading. It is set on the module because the
# module stays when its parameters are replaced.
KEEP_DENSE = "_mxfp4_fx_keep_dense"
# The same on experts during a call whose options["skip"] names them. Dynamo guards both marks,
# because what it traces reads them.
SKIPPED = "_mxfp4_fx_skipped"
# An attribute of a layer that `mxfp4_fx.compile` computes in pieces: the names of its linears that
# options["skip"] names. Dynamo guards it, because layers share what is compiled.
EXACT_LINEARS = "_mxfp4_fx_exact_linears"
WHY_SKIPPED = "skipped by options['skip']"
_REGEX = set("\\()|^$+{}")
# A match must end at a dot, after a dot or at the end of the name.
_UP_TO_A_DOT = r"(?:(?<=\.)|(?=\.|$))"


@dataclasses.dataclass(frozen=True)
class Skip:
    """Patterns of module names.

    Attributes:
        patterns: see the head of this file.

    Raises:
        OptionError: a pattern that is read as a regular expression is not a valid one.
    """

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            _matcher(pattern)

    @classmethod
    def of(cls, patterns: str | Iterable[str]) -> Skip:
        """Make a ``Skip`` of one pattern or of several.

        Raises:
            OptionError: a pattern is not a string, or not a valid regular expression.
        """
        several = [patterns] if isinstance(patterns, str) else patterns
        found = tuple(several) if isinstance(several, Iterable) else (several,)
        if not all(isinstance(pattern, str) for pattern in found):
            raise OptionError(f"skip={patterns!r} is no list of names of modules")
        return cls(found)

    def names(self, module: str) -> bool:
        """Return whether one of the patterns names a module.

        Args:
            module: its name as in ``named_modules``. The name without the parts of wrappers counts
                as well. For a module of a base model ("layers.0"), so does its name in the whole
                model.
        """
        return any(_names(pattern, module) for pattern in self.patterns)

    def unused(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Return the patterns that name none of these modules."""
        known = list(modules)
        return tuple(p for p in self.patterns if not any(_names(p, module) for module in known))

    def require_used(self, modules: Sequence[str]) -> None:
        """Raise if a pattern names none of ``modules``, the names of all experts.

        Raises:
            OptionError: with the nearest name in the message.
        """
        for pattern in self.unused(modules):
            raise OptionError(f"skip={pattern!r} names no experts{_hint(pattern, modules)}")


def not_converted(entry: str, module: str) -> bool:
    """Return whether an entry of ``modules_to_not_convert`` names a module for transformers.

    The entry must be the end of the name, or a regular expression that matches the name from its
    beginning to a dot or to its end.

    Raises:
        CheckpointError: the entry is not a valid regular expression.
    """
    expression = _compiled(rf"(?:{entry}){_UP_TO_A_DOT}", entry, CheckpointError)
    return module.endswith(entry) or expression.match(module) is not None


def bare(module: str) -> str:
    """Return a module's name without the parts that wrappers add."""
    return ".".join(part for part in module.split(".") if part not in WRAPPERS)


def whole_name(module: str) -> str:
    """The name that a base model's module ("layers.0") has in the whole model."""
    return f"model.{module}" if module.startswith("layers.") else module


def _names(pattern: str, module: str) -> bool:
    return any(map(_matcher(pattern), _names_of(module)))


def _names_of(module: str) -> set[str]:
    return {module, bare(module), whole_name(bare(module))}


@functools.cache
def _matcher(pattern: str) -> Callable[[str], Any]:
    if _REGEX & set(pattern):
        return _compiled(rf"(?:^|(?<=\.))(?:{pattern}){_UP_TO_A_DOT}", pattern).search
    parts = pattern.strip(".")  # a dot at an end adds nothing: every end is one of a part
    return lambda name: bool(parts) and fnmatch.fnmatchcase(f".{name}.", f"*.{parts}.*")


def _compiled(
    expression: str, pattern: str, error_class: type[Mxfp4Error] = OptionError
) -> re.Pattern[str]:
    try:
        re.compile(pattern)  # alone first, so that the error is about the user's own text
        return re.compile(expression)
    except re.error as error:
        raise error_class(
            f"{pattern!r} is no regular expression ({error}): name a module, for example "
            "model.layers.0.mlp.experts"
        ) from error


def _hint(pattern: str, modules: Sequence[str]) -> str:
    if not modules:
        return ", for there are none"
    # Modules that contain experts are candidates, too: "model.layers.1" is nearer to "layer.1" than
    # the name of any experts.
    parts = [module.split(".") for module in modules]
    known = dict.fromkeys(".".join(p[:end]) for p in parts for end in range(len(p), 0, -1))
    near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.75)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f": theirs are names like {modules[0]}{hint}"
