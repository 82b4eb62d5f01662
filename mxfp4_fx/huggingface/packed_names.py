"""A pair of names for the two tensors of a packed matrix, whatever its format calls them.

Formats may call blocks ``weight``, as dense matrices are called, which transformers converts in
another way. So packed matrices get names that nothing else has, before a family's own mapping
of names sees them, and their own names again when they are saved.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from transformers.core_model_loading import WeightRenaming

from mxfp4_fx.checkpoints.encodings import Encoding, Fp8, Mxfp4
from mxfp4_fx.checkpoints.packed_formats import Format, PackedWeight

BLOCKS, SCALES = "weight_packed", "weight_scale"  # as in compressed-tensors
_NAMES = {Mxfp4: (BLOCKS, SCALES), Fp8: ("weight_fp8", "weight_fp8_scale")}

_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)")  # between two dots that re.escape has escaped


class PartRenaming(WeightRenaming):
    """The renaming of one part of packed matrices, whose inverse does not name the matrices."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        (source,), (target,) = self._original_source_patterns, self._original_target_patterns
        own, ours = source.rpartition(".")[2], target.rpartition(".")[2]
        return WeightRenaming(rf"\.{ours}", rf".{own}")


def names_of(encoding: Encoding) -> tuple[str, str]:
    """Return the last parts of the names of a matrix's two tensors."""
    return _NAMES[type(encoding)]


def renamings(
    form: Format, packed: Mapping[str, PackedWeight], names: Iterable[str]
) -> list[WeightRenaming]:
    """Return what gives packed matrices the names of `names_of`.

    Args:
        form: the format of the files.
        packed: stem -> packed matrix.
        names: names of all tensors in the files.
    """
    found: list[WeightRenaming] = []
    if form.stacked:  # whose names no dense matrix has
        return found
    stems = {stem for name in names if (stem := form.split(name)[0])}
    for kind, parts in _NAMES.items():
        of_kind = {stem for stem, weight in packed.items() if isinstance(weight.encoding, kind)}
        for own, ours in zip((form.blocks, form.scales), parts, strict=True):
            if of_kind and own != ours:
                # transformers sees to it that a pattern that ends in a letter ends with a word.
                matching = "|".join(_patterns(of_kind, stems - of_kind))
                found.append(PartRenaming(rf"^({matching})\.{own}", rf"\1.{ours}"))
    return found


def _patterns(wanted: set[str], others: set[str]) -> list[str]:
    """Return patterns that match all of some names, and none of the others.

    They are for any numbers where possible, else for one first number each, else for one name.
    """
    found, left = [], wanted
    for kept in (0, 1, None):
        forms = defaultdict(set)
        for name in left:
            forms[_pattern(name, kept)].add(name)
        mixed = {_pattern(name, kept) for name in others} if kept is not None else set()
        pure = forms.keys() - mixed
        found += sorted(pure)
        left = left.difference(*(forms[pattern] for pattern in pure))
    return found


def _pattern(name: str, kept: int | None) -> str:
    """Return a pattern for a name in which numbers but the first `kept` may be others."""
    escaped = re.escape(name)
    if kept is None:
        return escaped
    for number in reversed([*_NUMBER.finditer(escaped)][kept:]):
        escaped = rf"{escaped[: number.start()]}\d+{escaped[number.end() :]}"
    return escaped
