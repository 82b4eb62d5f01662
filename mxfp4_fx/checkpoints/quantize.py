"""`quantize_checkpoint`: quantize a checkpoint to MXFP4 in bounded memory.

Experts are read, quantized and written one at a time; other tensors are copied a few MiB at a time.
All files are written in ``OUT.partial``, which `journal.py` describes, and then read again and
compared. Only then does the checkpoint move to ``OUT``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from mxfp4_fx.checkpoints import consistency, packed_formats, single_experts
from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.checkpoints.files import CONFIG, INDEX, other_files
from mxfp4_fx.checkpoints.fused_experts import experts_of, fused
from mxfp4_fx.checkpoints.gpt_oss import (
    METHOD,
    MULTIPLES_OF_BLOCK,
    PROJECTIONS,
    not_converted_by_default,
    quantized_config,
)
from mxfp4_fx.checkpoints.journal import Journal, Squares, locked, sync
from mxfp4_fx.checkpoints.quantized_item import Item
from mxfp4_fx.checkpoints.rounding import write_rounding
from mxfp4_fx.checkpoints.safetensors_file import (
    SHARD_BYTES,
    StoredTensor,
    TensorSpec,
    cut,
    index_of,
    require_new,
    require_room,
    take_place,
    write_safetensors,
)
from mxfp4_fx.checkpoints.single_experts import packed_specs
from mxfp4_fx.core.errors import CheckpointError, OptionError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E8M0_NAN, SCALE_RULES
from mxfp4_fx.core.skip import Skip


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    skip: str | Sequence[str] = (),
    scale_rule: str = "max",
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    report: Callable[[dict[str, float]], object] | None = None,
) -> Path:
    """Write the checkpoint directory `source` to `out`, with its experts in MXFP4.

    `formats.quantize` turns a GPT-OSS's dense experts [E, K, N] into blocks [E, N, K/32, 16] and
    scales [E, N, K/32]. Experts of other families, whose files have a matrix [N, K] for each
    expert or all experts of a layer in one tensor, become single matrices of compressed-tensors'
    ``mxfp4-pack-quantized``, which other programs read. All other tensors and files are copied byte
    for byte, except weights in other files. The config gets a ``quantization_config``. `out`
    appears only after its files were read again and compared. An interrupted run leaves
    ``out.partial``; the same call resumes it after the last complete shard.

    Args:
        source: a directory with dense experts in bfloat16, float16 or float32.
        out: a directory that does not exist or is empty; its parents are created.
        skip: names of modules, or patterns (`core/skip.py`), whose experts stay dense, in addition
            to those that the config names.
        scale_rule: one of SCALE_RULES, for `formats.quantize`.
        max_shard_bytes: tensor bytes in a shard. A weight's blocks and scales stay in one shard,
            even if they exceed it.
        progress: show progress bars if stderr is a terminal.
        report: called at the end with experts -> relative error of their rounding: the norm of what
            it changed, divided by the norm of the weights, which is also recorded beside the
            weights (``rounding.py``). None means that it is not computed.

    Returns:
        `out` as an absolute path.

    Raises:
        OptionError: a pattern of `skip` names no experts, or another argument is wrong.
        CheckpointError: `source` is damaged, inconsistent or packed already; `out` exists and is
            not empty, or cannot be written; the disk has too little room or fails; another run
            works on `out`, or an interrupted run had another input or other options.
    Warns:
        NanWeightsWarning: a block had a NaN or an infinity, and is NaN in `out`.
    """
    source, out = (Path(os.path.realpath(os.path.expanduser(path))) for path in (source, out))
    if scale_rule not in SCALE_RULES:
        raise OptionError(f"scale_rule is {scale_rule!r}: it must be in {SCALE_RULES}")
    if max_shard_bytes < 1:
        raise OptionError(f"max_shard_bytes is {max_shard_bytes}: it must be 1 or more")
    require_new(out)
    if out.is_relative_to(source):
        raise CheckpointError(f"{out} lies in {source}: name a directory elsewhere")
    plan = _plan(source, Skip.of(skip), scale_rule, max_shard_bytes)

    partial = partial_of(out)
    if not partial.exists():
        require_room(out, plan.nbytes)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            require_new(out)  # another run may have finished before we got the lock
            journal = Journal(partial, plan.identity, measures=report is not None)
            require_room(out, plan.nbytes - journal.nbytes)
            _write(plan, journal, progress, report is not None)
            _verify(plan, journal, progress)
            _add_files(plan, journal.checkpoint)
            if report is not None:
                errors = journal.rounding_errors
                sync(write_rounding(journal.checkpoint, errors, scale_rule))
            take_place(journal.checkpoint, out)
        # Now, because Windows does not remove a file that is open, such as the lock.
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{error}: repair that, and the same command goes on from {partial}"
        ) from error
    warn_of_nan_blocks(journal.nan_blocks)
    if report is not None:
        report(journal.rounding_errors)
    return out


def partial_of(out: Path) -> Path:
    """Return the directory in which a run works until `out` is complete."""
    return out.with_name(f"{out.name}.partial")


# ---- planning -----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    directory: Path  # the input
    shards: dict[str, list[Item]]
    config: dict[str, Any]  # of the output
    files: list[Path]  # to copy, relative to the directory
    identity: dict[str, Any]  # the input and the options, which a resumed run must repeat
    scale_rule: str

    @property
    def nbytes(self) -> int:
        others = sum((self.directory / file).stat().st_size for file in self.files)
        return others + sum(item.nbytes for items in self.shards.values() for item in items)


def _plan(directory: Path, skip: Skip, scale_rule: str, max_shard_bytes: int) -> _Plan:
    checkpoint = Checkpoint.open(directory)
    if single_experts.is_of_another_family(checkpoint):
        return _plan_of_family(checkpoint, directory, skip, scale_rule, max_shard_bytes)
    config = dict(checkpoint.config)
    _require_dense(checkpoint)
    _, modules = checkpoint.quantization()
    if not modules:
        modules = not_converted_by_default(checkpoint.prefix)
    kept = {layer for pattern in modules for layer in checkpoint.matching(pattern)}
    more = checkpoint.skipped(skip) - kept
    modules += [checkpoint.experts(layer) for layer in sorted(more)]
    kept |= more
    if not checkpoint.forms.keys() - kept:
        raise CheckpointError(
            f"nothing of {directory} is left to quantize: skip fewer layers, or remove some of "
            f"modules_to_not_convert from its {CONFIG}"
        )
    config["quantization_config"] = quantized_config(modules)
    dense = {
        f"{checkpoint.experts(layer)}.{projection}"
        for layer in checkpoint.forms.keys() - kept
        for projection in PROJECTIONS
    }
    items = [_item(tensor, name in dense) for name, tensor in checkpoint.tensors.items()]
    identity = {
        "input": _fingerprint(checkpoint, directory / CONFIG),
        "modules_to_not_convert": modules,
        "scale_rule": scale_rule,
        "max_shard_bytes": max_shard_bytes,
    }
    shards = cut(items, lambda item: item.nbytes, max_shard_bytes)
    return _Plan(directory, shards, config, other_files(directory), identity, scale_rule)


def _plan_of_family(
    checkpoint: Checkpoint, directory: Path, skip: Skip, scale_rule: str, max_shard_bytes: int
) -> _Plan:
    names = single_experts.to_quantize(checkpoint, skip)
    items: list[Item] = []
    for name, one in checkpoint.tensors.items():
        if name not in names:
            items.append(Item(one, (one.spec,)))
        elif experts_of(name) is None:
            items.append(Item(one, packed_specs(one)))
        else:
            whole = fused(checkpoint, name)
            for expert in range(one.shape[0]):
                specs = [part for spec in whole.specs(expert) for part in packed_specs(spec)]
                items.append(Item(one, tuple(specs), whole, expert))
    matrices = single_experts.matrices(checkpoint, names)
    settings = single_experts.quantized_config({**checkpoint.tensors, **matrices}, {*matrices})
    config = {**checkpoint.config, "quantization_config": settings}
    identity = {
        "input": _fingerprint(checkpoint, directory / CONFIG),
        "quantization_config": settings,
        "scale_rule": scale_rule,
        "max_shard_bytes": max_shard_bytes,
    }
    shards = cut(items, lambda item: item.nbytes, max_shard_bytes)
    return _Plan(directory, shards, config, other_files(directory), identity, scale_rule)


def _require_dense(checkpoint: Checkpoint) -> None:
    method, _ = checkpoint.quantization()
    if "packed" in checkpoint.forms.values() or method not in (None, METHOD):
        consistency.check(checkpoint)  # raises a more specific error if it finds another fault
        layers = [layer for layer, form in checkpoint.forms.items() if form == "packed"]
        raise CheckpointError(
            f"{checkpoint.experts(layers[0])} in {checkpoint.files[0].parent} is in MXFP4 already: "
            "name a checkpoint that is not quantized"
        )
    config = checkpoint.config
    # The config may say mxfp4 already, but the experts are still dense.
    checkpoint.config = {key: config[key] for key in config if key != "quantization_config"}
    consistency.check(checkpoint)
    checkpoint.config = config
    for key in MULTIPLES_OF_BLOCK:
        if config[key] % BLOCK:
            raise CheckpointError(
                f"{key} is {config[key]}, which MXFP4 cannot have: it must be a multiple of {BLOCK}"
            )


def _item(source: StoredTensor, is_dense: bool) -> Item:
    if not is_dense:
        return Item(source, (source.spec,))
    experts, k, n = source.shape
    shape = experts, n, k // BLOCK
    blocks = TensorSpec(f"{source.name}_blocks", torch.uint8, (*shape, BYTES_PER_BLOCK))
    return Item(source, (blocks, TensorSpec(f"{source.name}_scales", torch.uint8, shape)))


def _fingerprint(checkpoint: Checkpoint, config: Path) -> list[list[Any]]:
    """Return name, size, mtime and a digest of the header (config: content) of each file."""
    headers: dict[Path, list[str]] = {file: [] for file in checkpoint.files}
    for tensor in checkpoint.tensors.values():
        headers[tensor.file].append(repr((tensor.spec, tensor.offset)))
    digests = {file: "\n".join(header).encode() for file, header in headers.items()}
    digests[config] = config.read_bytes()
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns, hashlib.sha256(data).hexdigest()]
        for file, data in digests.items()
    ]


# ---- running ------------------------------------------------------------------------------------


def _write(plan: _Plan, journal: Journal, progress: bool, measured: bool) -> None:
    """Write the shards that the journal does not have."""
    missing = {name: items for name, items in plan.shards.items() if name not in journal}
    total = sum(item.nbytes for items in missing.values() for item in items)
    with _bar("quantizing", total, progress) as bar:
        for name, items in missing.items():
            specs = [spec for item in items for spec in item.specs]
            digests = {spec.name: hashlib.sha256() for spec in specs}
            nan: dict[str, int] = {}
            squares: Squares | None = {} if measured else None
            written = journal.checkpoint / f"{name}.writing"
            parts = _watched(items, plan.scale_rule, digests, nan, squares)
            write_safetensors(written, specs, parts, bar.update)
            sync(written)
            written.replace(journal.checkpoint / name)
            size = (journal.checkpoint / name).stat().st_size
            hashes = {key: digest.hexdigest() for key, digest in digests.items()}
            journal.add(name, size, hashes, nan, squares)


def _watched(
    items: Iterable[Item],
    scale_rule: str,
    digests: Mapping[str, Any],
    nan: dict[str, int],
    squares: Squares | None,
) -> Iterator[tuple[str, memoryview]]:
    """Yield the parts of `items`; update `digests`, and count NaN scales in `nan`, on the way."""
    for item in items:
        for name, part in item.parts(scale_rule, squares):
            digests[name].update(part)
            is_scales = not item.is_copied and name in {spec.name for spec in item.specs[1::2]}
            if is_scales and (count := bytes(part).count(E8M0_NAN)):
                nan[name] = nan.get(name, 0) + count
            yield name, part


def _verify(plan: _Plan, journal: Journal, progress: bool) -> None:
    """Read all shards again; compare them with the checksums, and copied tensors with the input."""
    written = Checkpoint([journal.checkpoint / name for name in plan.shards], plan.config)
    form = packed_formats.format_of(plan.config, CONFIG)
    if form is None:
        consistency.check(written)
    else:
        packed_formats.packed_weights(written, form)
    total = sum(item.nbytes for items in plan.shards.values() for item in items)
    with _bar("verifying", total, progress) as bar:
        for shard, items in plan.shards.items():
            for item in items:
                for spec in item.specs:
                    found = _digest(written.tensors[spec.name])
                    source = _digest(item.source) if item.is_copied else found
                    if not found == source == journal.digest(shard, spec.name):
                        raise CheckpointError(
                            f"{spec.name} in {journal.checkpoint / shard} is not what was written "
                            f"there: check the disk and the memory, and remove {journal.partial}"
                        )
                    bar.update(spec.nbytes)
    now = Checkpoint.open(plan.directory)
    if _fingerprint(now, plan.directory / CONFIG) != plan.identity["input"]:
        raise CheckpointError(
            f"{plan.directory} was changed meanwhile: remove {journal.partial} and begin anew"
        )


def _add_files(plan: _Plan, directory: Path) -> None:
    for file in plan.files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.directory / file, directory / file)
        sync(directory / file)
    specs = {name: [s for item in items for s in item.specs] for name, items in plan.shards.items()}
    for name, content in ((INDEX, index_of(specs)), (CONFIG, plan.config)):
        text = json.dumps(content, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
        sync(directory / name)


def _digest(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _bar(what: str, total: int, progress: bool) -> tqdm[Any]:
    return tqdm(
        desc=what, total=total, unit="B", unit_scale=True, disable=None if progress else True
    )
