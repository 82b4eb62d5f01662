"""Which modules ``skip`` names: one rule for loading, quantizing and compiling.

A pattern names every module whose name has it as whole parts, from dot to dot, and so all that is
in a module that it names: ``model.layers.1`` is layer 1 with its experts, and not layer 10;
``mlp.experts`` is the experts of every layer. ``*``, ``?`` and ``[...]`` are as in a shell, and a
``*`` may span dots. A pattern with one of ``\\ ( ) | ^ $ + { }`` is a regular expression instead.

``modules_to_not_convert`` of a checkpoint's config is no ``skip``: other programs read it, too, so
that `not_converted` reads it as they do.
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

# Parts of names that tools add where they wrap a module. What they put in front needs no list.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# A mark on experts that the user skipped when they were loaded. It is the module's, which stays
# when its parameters are replaced.
KEEP_DENSE = "_mxfp4_fx_keep_dense"
_REGEX = set("\\()|^$+{}")
# What may follow a match: nothing or a dot, or the match ends in one.
_UP_TO_A_DOT = r"(?:(?<=\.)|(?=\.|$))"


@dataclasses.dataclass(frozen=True)
class Skip:
    """Patterns of module names.

    Attributes:
        patterns: see the head of this file.

    Raises:
        OptionError: a pattern is to be a regular expression, and is none.
    """

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            _matcher(pattern)

    @classmethod
    def of(cls, patterns: str | Iterable[str]) -> Skip:
        """One pattern, or several.

        Raises:
            OptionError: they are no strings, or one is no regular expression.
        """
        several = [patterns] if isinstance(patterns, str) else patterns
        found = tuple(several) if isinstance(several, Iterable) else (several,)
        if not all(isinstance(pattern, str) for pattern in found):
            raise OptionError(f"skip={patterns!r} is no list of names of modules")
        return cls(found)

    def names(self, module: str) -> bool:
        """Whether one of the patterns names a module.

        Args:
            module: its name as in ``named_modules``. A base model's modules ("layers.0") also have
                the names that they have in the whole model, and wrapped ones those that they have
                without the wrappers.
        """
        return any(_names(pattern, module) for pattern in self.patterns)

    def unused(self, modules: Iterable[str]) -> tuple[str, ...]:
        """The patterns that name none of these modules."""
        known = list(modules)
        return tuple(p for p in self.patterns if not any(_names(p, module) for module in known))

    def require_used(self, modules: Sequence[str]) -> None:
        """Refuse a pattern that names none of ``modules``, which are the experts that there are.

        Raises:
            OptionError: the message has the nearest name.
        """
        for pattern in self.unused(modules):
            raise OptionError(f"skip={pattern!r} names no experts{_hint(pattern, modules)}")


def not_converted(entry: str, module: str) -> bool:
    """Whether an entry of ``modules_to_not_convert`` names a module, as transformers has it.

    An entry is the end of the name, or a regular expression for its beginning up to a dot.

    Raises:
        CheckpointError: the entry is no regular expression.
    """
    expression = _compiled(rf"(?:{entry}){_UP_TO_A_DOT}", entry, CheckpointError)
    return module.endswith(entry) or expression.match(module) is not None


def bare(module: str) -> str:
    """A module's name without the parts that wrappers add."""
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
    parts = pattern.strip(".")  # a dot at an end says what every end says
    return lambda name: bool(parts) and fnmatch.fnmatchcase(f".{name}.", f"*.{parts}.*")


def _compiled(
    expression: str, pattern: str, error_class: type[Mxfp4Error] = OptionError
) -> re.Pattern[str]:
    try:
        re.compile(pattern)  # by itself, for a message that fits it
        return re.compile(expression)
    except re.error as error:
        raise error_class(
            f"{pattern!r} is no regular expression ({error}): name a module, for example "
            "model.layers.0.mlp.experts"
        ) from error


def _hint(pattern: str, modules: Sequence[str]) -> str:
    if not modules:
        return ", for there are none"
    # Containing modules can be named as well: "model.layers.1" is nearer to "layer.1" than experts.
    parts = [module.split(".") for module in modules]
    known = dict.fromkeys(".".join(p[:end]) for p in parts for end in range(len(p), 0, -1))
    near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.75)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f": theirs are names like {modules[0]}{hint}"
