"""Where the packed weights of a family's files go in its model.

transformers has, for each family, a mapping from names in files to names in the model, which also
says which tensors of single experts a stacked weight is made of. It is asked here what each packed
matrix would be if it were dense. So there is no table of families, and all faults of a checkpoint
are found before a tensor is read.

Shape letters: E experts, H hidden, I intermediate, N output rows, K contraction.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.encodings import Encoding, Mxfp4
from mxfp4_fx.checkpoints.files import AGAIN, few
from mxfp4_fx.checkpoints.packed_formats import PackedWeight
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.huggingface.dense_matrices import DenseMatrices, parameters_of
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.ops.operands import Activation

_ORIGINAL = "load the checkpoint with transformers itself, which makes its experts dense"
_SAME = "copy or download config.json and all files from one and the same checkpoint"
_EXPERT = re.compile(r".*\.(\d+)(?=\.)")  # the last number of a name


@dataclass
class Plan:
    """Where packed weights go.

    Attributes:
        experts: name of a module of experts -> parameter -> pattern of its sources -> the matrices
            of experts 0 to E - 1, or the one tensor that has all of them.
        dense: name of a parameter that is no expert's, or of the first of several that are made
            together -> the matrices that it is made of.
        strays: names of packed matrices that the model does not have.
        patterns: patterns of sources of `experts`.
        dense_patterns: patterns of those of `dense` that a conversion takes -> their encodings.
    """

    experts: dict[str, dict[str, dict[str, list[PackedWeight]]]] = field(default_factory=dict)
    dense: dict[str, DenseMatrices] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    patterns: set[str] = field(default_factory=set)
    dense_patterns: dict[str, set[Encoding]] = field(default_factory=lambda: defaultdict(set))


def plan_of(
    model: Any,
    checkpoint: Checkpoint,
    packed: Mapping[str, PackedWeight],
    key_mapping: dict[str, str] | None = None,
) -> Plan:
    """Find the place of each packed matrix, and check that the files are the model's.

    Args:
        model: as transformers makes it, on meta.
        checkpoint: its files.
        packed: stem -> packed matrix.
        key_mapping: as in transformers' ``from_pretrained``.

    Raises:
        CheckpointError: a tensor of the model is missing, experts are incomplete or have other
            sizes than the model's, or are merged in a way that is not known.
    """
    conversions = with_single_experts(get_model_conversion_mapping(model, key_mapping or None))
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    held = model.state_dict()
    modules = {name for name, module in model.named_modules() if is_family(module)}
    plan, found = Plan(), set()
    stacked: dict[str, PackedWeight] = {}
    parts: dict[str, dict[str, dict[int, PackedWeight]]] = defaultdict(lambda: defaultdict(dict))

    def place(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, held)

    def place_plainly(name: str) -> str:
        return rename_source_key(name, renamings, converters)[0]

    for stem, weight in packed.items():
        name, pattern = place(weight.dense_name)
        path, _, parameter = name.rpartition(".")
        if name not in held:
            plan.strays.append(stem)
            continue
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        if path in modules:
            found.add(name)
            if weight.experts is not None:
                stacked[name] = weight
                continue
            expert = _EXPERT.match(stem)
            if pattern is None or expert is None:
                raise CheckpointError(
                    f"{weight.blocks.name} is no single expert's, as {name} would need: {_ORIGINAL}"
                )
            if not isinstance(weight.encoding, Mxfp4):
                raise CheckpointError(
                    f"{weight.blocks.name} in {weight.blocks.file} is {weight.blocks.dtype}, and "
                    f"experts of {path} are to be MXFP4: {_ORIGINAL}"
                )
            parts[name][pattern][int(expert[1])] = weight
            plan.patterns.add(pattern)
        else:
            made = parameters_of(name, converter)
            found |= {*made}
            before = rename_source_key(weight.dense_name, renamings, [])[0]
            source = _like(before, place_plainly(weight.dense_name), name)
            plan.dense.setdefault(name, DenseMatrices(made, converter)).add(source, pattern, weight)
            if pattern is not None:
                plan.dense_patterns[pattern].add(weight.encoding)
    parts_of_packed = {
        part.name for weight in packed.values() for part in (weight.blocks, weight.scales)
    }
    for name in checkpoint.tensors:
        if name in parts_of_packed:
            continue
        target, pattern = place(name)
        if target not in held and name in held:  # the loader then takes the name as it is
            target, pattern = name, None
        if target in parts or target in stacked:
            raise CheckpointError(
                f"{name} in {checkpoint.tensors[name].file} is dense, and other experts of "
                f"{target} are packed: {AGAIN}, or quantize all experts of a layer"
            )
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        found |= {*parameters_of(target, converter)}
    _require_all(model, held, found, checkpoint)
    for name in parts:
        path, _, parameter = name.rpartition(".")
        converter = next(c for c in converters if next(iter(parts[name])) in c.source_patterns)
        plan.experts.setdefault(path, {})[parameter] = _experts(
            model.get_submodule(path), name, parts[name], converter
        )
    for name, weight in stacked.items():
        path, _, parameter = name.rpartition(".")
        _require_stacked(model.get_submodule(path), name, weight)
        plan.experts.setdefault(path, {})[parameter] = {weight.dense_name: [weight]}
    for path, weights in plan.experts.items():
        if missing := {"gate_up_proj", "down_proj"} - weights.keys():
            raise CheckpointError(
                f"{path}.{min(missing)} is not packed in the files, and the layer's other weight "
                f"is: {AGAIN}, or quantize all experts of a layer"
            )
    _check_dense(model, held, plan)
    return plan


def with_single_experts(conversions: list[Any]) -> list[Any]:
    """Return a model's conversions, with the merge of single experts if it has none of its own.

    transformers has none for Qwen3-VL, whose dense files hold all experts of a layer in one tensor.
    Packed files hold them one by one.
    """
    targets = {
        t for one in conversions if len(one.source_patterns) > 1 for t in one.target_patterns
    }
    if any(target.endswith("experts.gate_up_proj") for target in targets):
        return conversions
    halves = [".experts.*.gate_proj.weight", ".experts.*.up_proj.weight"]
    merge, concatenate = MergeModulelist(dim=0), Concatenate(dim=1)
    down = ".experts.*.down_proj.weight"
    return [
        *conversions,
        WeightConverter(halves, ".experts.gate_up_proj", [merge, concatenate]),
        WeightConverter(down, ".experts.down_proj", [merge]),
    ]


def is_family(module: nn.Module) -> bool:
    """Return whether a module is experts on transformers' interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def packed_like(experts: Any, name: str, found: Activation) -> PackedExperts:
    """Return packed experts, without values, in the place of a family's experts.

    Args:
        experts: transformers' experts.
        name: their name, for messages.
        found: their activation.

    Raises:
        CheckpointError: a size is no multiple of 32.
    """
    count, h, intermediate = experts.down_proj.shape
    for size in (h, intermediate):
        if size % BLOCK:
            raise CheckpointError(
                f"{name} cannot be MXFP4: its size {size} is no multiple of {BLOCK}: {_ORIGINAL}"
            )
    packed = PackedExperts(
        count,
        h,
        intermediate,
        found.alpha,
        found.limit,
        activation=found.kind,
        up_offset=found.up_offset,
        has_bias=False,
    )
    packed.replaced = (experts,)
    return packed


def _like(before: str, converted: str, name: str) -> str:
    """Return a name with the prefix of the base model if `name` has it, and without it otherwise.

    Args:
        before: a name, without the conversion that made `converted` of it.
        converted: the name of a parameter, as the loader's patterns make it.
        name: the same as the model has it.
    """
    if converted.endswith(name):
        return before.removeprefix(converted.removesuffix(name))
    return name.removesuffix(converted) + before


def _require_all(
    model: Any, held: Mapping[str, Any], found: set[str], checkpoint: Checkpoint
) -> None:
    """Raise CheckpointError if a tensor of the model is not in the files.

    Another head than the language model's, such as ``score.weight``, may be missing: it is new.
    """
    base = model.base_model_prefix
    ours = (f"{base}.", "lm_head.") if hasattr(model, base) else ("",)
    optional = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
    tied = {*(getattr(model, "all_tied_weights_keys", None) or ())}
    missing = [
        name
        for name in held
        if name.startswith(ours)
        and name not in found | tied
        and not any(re.search(one, name) for one in optional)
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint.config_name} wants {few(missing)}, which the files have not: {AGAIN}, "
            "with all of its shards"
        )


def _experts(
    module: Any, name: str, parts: Mapping[str, Mapping[int, PackedWeight]], converter: Any
) -> dict[str, list[PackedWeight]]:
    """Return pattern -> matrices of experts 0 to E - 1, of one stacked weight."""
    is_down = name.endswith(".down_proj")
    _require_usual(
        module,
        name,
        _merge(converter) == (["MergeModulelist"] if is_down else _OF_HALVES)
        and len(converter.source_patterns) == (1 if is_down else 2),
    )
    experts, n, k = getattr(module, name.rpartition(".")[2]).shape
    rows = n if is_down else n // 2
    ordered: dict[str, list[PackedWeight]] = {}
    for pattern in converter.source_patterns:
        of_pattern = parts.get(pattern, {})
        if missing := sorted(set(range(experts)) ^ of_pattern.keys()):
            named = [_name_of(of_pattern, pattern, expert) for expert in missing]
            what = "lack" if missing[0] < experts else "have more than the config's experts:"
            raise CheckpointError(f"the files {what} {few(named)} for {name}: {AGAIN}")
        ordered[pattern] = [of_pattern[expert] for expert in range(experts)]
        for weight in ordered[pattern]:
            _require_size(weight, rows, k, name)
    return ordered


def _require_stacked(module: Any, name: str, weight: PackedWeight) -> None:
    """Raise CheckpointError unless a tensor has all experts of one stacked weight."""
    _require_usual(module, name)
    experts, n, k = getattr(module, name.rpartition(".")[2]).shape
    _require_size(weight, n, k, name)
    if weight.experts != experts:
        raise CheckpointError(
            f"{weight.blocks.name} in {weight.blocks.file} has {weight.experts} experts, and the "
            f"config {experts}: {_SAME}"
        )


def _require_usual(module: Any, name: str, is_merged_so: bool = True) -> None:
    """Raise CheckpointError unless experts are gate, up and down, and no more."""
    if (
        module.is_transposed
        or module.has_bias
        or getattr(module, "has_post_expert_norm", False)
        or not (module.is_concatenated and module.has_gate)
        or not is_merged_so
    ):
        raise CheckpointError(
            f"{name} is of {type(module).__name__}, whose experts are not packed as one matrix of "
            f"gate, one of up and one of down for each: {_ORIGINAL}"
        )


def _name_of(of_pattern: Mapping[int, PackedWeight], pattern: str, expert: int) -> str:
    """Return the name of an expert's tensor, as one of the others of its layer has it."""
    for other in of_pattern.values():
        stem, part = other.stem, other.blocks.name.rpartition(".")[2]
        start, end = _EXPERT.match(stem).span(1)  # type: ignore[union-attr]
        return f"{stem[:start]}{expert}{stem[end:]}.{part}"
    return pattern.replace("*", str(expert))


_OF_HALVES = ["MergeModulelist", "Concatenate"]


def _merge(converter: Any) -> list[str]:
    """Return the names of a converter's operations, with the axes if these are unusual."""
    usual = {"MergeModulelist": 0, "Concatenate": 1}
    names = []
    for step in converter.operations:
        kind = type(step).__name__
        is_usual = getattr(step, "dim", None) == usual.get(kind, object())
        names.append(kind if is_usual else repr(step))
    return names


def _check_dense(model: Any, held: Mapping[str, Any], plan: Plan) -> None:
    shapes = {name: value.shape for name, value in held.items()}
    for name, matrices in plan.dense.items():
        matrices.check(model, shapes)
        if matrices.converter is None and held[name].ndim == 2:
            (weight,) = matrices.sources.values()
            _require_size(weight, held[name].shape[0], held[name].shape[1], name)


def _require_size(weight: PackedWeight, n: int, k: int, name: str) -> None:
    if (weight.n, weight.k) != (n, k):
        raise CheckpointError(
            f"{weight.blocks.name} in {weight.blocks.file} holds a matrix {[weight.n, weight.k]}, "
            f"and {name} needs {[n, k]}: {_SAME}"
        )
