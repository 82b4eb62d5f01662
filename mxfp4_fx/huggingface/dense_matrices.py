"""Packed matrices that are no experts', and the parameters that transformers makes of them.

A family's mapping may merge several matrices of the files into one parameter (gate and up of
MiniMax-M3), split one into several (of HRM) or permute its rows (of Mistral Large 4). Its own
operations, and their inverses, say what becomes of what.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from mxfp4_fx.checkpoints.files import AGAIN, few
from mxfp4_fx.checkpoints.packed_formats import PackedWeight
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.huggingface.packed_names import names_of

_DENSE = (
    "load the checkpoint with transformers itself, which makes all of it dense, or quantize only "
    "the experts"
)


@dataclass
class DenseMatrices:
    """Packed matrices that become dense parameters together.

    Attributes:
        parameters: names of the parameters. The loader calls all of them by the first.
        converter: transformers' conversion, or None for one matrix that is one parameter.
        sources: name of a matrix, dense, behind all renamings but before the conversion -> it.
        patterns: the same name -> the pattern of the conversion that takes it.
    """

    parameters: tuple[str, ...]
    converter: WeightConverter | None
    sources: dict[str, PackedWeight] = field(default_factory=dict)
    patterns: dict[str, str | None] = field(default_factory=dict)

    def add(self, name: str, pattern: str | None, weight: PackedWeight) -> None:
        """Add a matrix.

        Raises:
            CheckpointError: there is one in its place already.
        """
        for other, its_pattern in self.patterns.items():
            if its_pattern == pattern:
                first = self.sources[other].blocks
                raise CheckpointError(
                    f"{first.name} in {first.file} and {weight.blocks.name} in "
                    f"{weight.blocks.file} both become {few([*self.parameters])}: {AGAIN}"
                )
        self.sources[name], self.patterns[name] = weight, pattern

    def check(self, model: Any, shapes: Mapping[str, torch.Size]) -> None:
        """Check, without values, that the matrices become the parameters, and these them again.

        Args:
            model: as transformers makes it, on meta.
            shapes: name of a parameter -> its shape.

        Raises:
            CheckpointError: a matrix is missing or is packed in another way, or sizes are others.
        """
        if self.converter is None:
            return
        named, weights = few([*self.parameters]), [*self.sources.values()]
        packed = [weight.blocks.name for weight in weights]
        found = {pattern for pattern in self.patterns.values() if pattern}
        if missing := [p for p in self.converter.source_patterns if p not in found]:
            words = [re.sub(r"\\|^[.^]|\$$", "", pattern).lstrip(".") for pattern in missing]
            raise CheckpointError(
                f"{few(packed)} in {weights[0].blocks.file} is packed, and what else {named} is "
                f"made of is not ({few(words)}): {_DENSE}, or all of these"
            )
        if len({weight.encoding for weight in weights}) > 1:
            raise CheckpointError(
                f"{few(packed)}, of which {named} is made, are packed in different ways: {_DENSE}"
            )
        given = {
            name: torch.empty(w.n, w.k, device="meta", dtype=torch.bfloat16)
            for name, w in self.sources.items()
        }
        made = self._run(lambda: self.to_parameters(model, given), named)
        for name in self.parameters:
            if name not in made or made[name].shape != shapes[name]:
                sizes = few([f"{w.blocks.name} {[w.n, w.k]}" for w in weights])
                raise CheckpointError(
                    f"{weights[0].blocks.file} has {sizes}, which do not become {name} "
                    f"{list(shapes[name])}: copy or download config.json and all files from one "
                    "and the same checkpoint"
                )
        again = self._run(lambda: self.to_matrices(model, made), named)
        if {n: t.shape for n, t in again.items()} != {n: t.shape for n, t in given.items()}:
            raise CheckpointError(
                f"{named} could not be saved: transformers does not make {few(packed)} of it "
                f"again: {_DENSE}"
            )

    def to_parameters(self, model: Any, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what dense matrices, by the names of `sources`, become."""
        if self.converter is None:
            ((name,), (matrix,)) = self.parameters, matrices.values()
            return {name: matrix}
        converter = fresh(self.converter)
        for name, pattern in self.patterns.items():
            converter.add_tensor(self.parameters[0], name, pattern, matrices[name])
        return _converted(converter, self.parameters[0], model)

    def to_matrices(self, model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the dense matrices, by the names of `sources`, that become such parameters."""
        if self.converter is None:
            ((name,), (parameter,)) = self.sources, self.parameters
            return {name: values[parameter]}
        # A fresh one, because `reverse_transform` changes the patterns of the one it reverses.
        converter, first = fresh(self.converter).reverse_transform(), ""
        for parameter in self.parameters:
            renamed, pattern = converter.rename_source_key(parameter)
            converter.add_tensor(renamed, parameter, pattern, values[parameter])
            first = first or renamed
        return _converted(converter, first, model)

    def _run(self, step: Callable[[], dict[str, Tensor]], named: str) -> dict[str, Tensor]:
        try:
            return step()
        except Exception as error:  # transformers' operations raise what they like
            packed = few([weight.blocks.name for weight in self.sources.values()])
            raise CheckpointError(
                f"{packed} cannot become {named}, which transformers makes of them ({error}): "
                f"{_DENSE}"
            ) from error


def fresh(converter: WeightConverter) -> WeightConverter:
    """Return a conversion that has collected no tensors."""
    return converter.copy(
        [*converter._original_source_patterns],
        [*converter._original_target_patterns],
        operations=copy.deepcopy(converter.operations),
    )


def parts_of(converter: WeightConverter, encoding: Any) -> tuple[list[str], list[str]]:
    """Return the patterns of a conversion's packed sources, two for each, and of its targets.

    A family's patterns end with ``weight``, or before it.
    """
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    ending = next((e for e in ("weight$", "weight", ".", "") if sources[0].endswith(e)), "")
    added = {".": "", "": r"\."}.get(ending)
    packed = [
        source.removesuffix(ending) + part if added is None else f"{source}{added}{part}"
        for source in sources
        for part in names_of(encoding)
    ]
    if added is not None:
        targets = [f"{target}{added}weight" for target in targets]
    return packed, [*targets]


def parameters_of(name: str, converter: WeightConverter | None) -> tuple[str, ...]:
    """Return the names of what a tensor becomes that the loader calls `name`."""
    if converter is None:
        return (name,)
    first, *others = converter.target_patterns
    return name, *(name.replace(first, other) for other in others)


def _converted(converter: WeightConverter, name: str, model: Any) -> dict[str, Tensor]:
    made = converter.convert(name, model=model, config=model.config)
    return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
