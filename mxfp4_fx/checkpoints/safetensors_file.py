"""Files in the safetensors format: headers read strictly, tensors mapped in parts, shards written.

A file is a length (8 bytes, little-endian), a JSON header of that length, and the bytes of all
tensors, without gaps or overlaps. The safetensors library does not suffice here: its errors name
neither the file nor a remedy, it gives no byte ranges, and it writes only tensors that are whole in
memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mxfp4_fx.core.errors import CheckpointError

T = TypeVar("T")

SHARD_BYTES = 5 * 10**9  # gives gpt-oss-20b three shards, like the original
CHUNK_BYTES = 8 << 20  # read at a time by `StoredTensor.chunks`

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
_AGAIN = "copy or download the file again"


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `nbytes` bytes at `offset`, little-endian, in C order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    def read(self, index: int | None = None) -> Tensor:
        """Memory-map the tensor, or entry `index` of its first dimension (an expert, say).

        The mapping lasts as long as the result. The system reads a page when it is first touched.
        Writing to the result does not change the file.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
            IndexError: the first dimension has no entry `index`.
        """
        shape, start, nbytes = self.shape, self.offset, self.nbytes
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise IndexError(f"{self.name} of shape {list(shape)} has no entry {index}")
            shape, nbytes = shape[1:], nbytes // shape[0]
            start += index * nbytes
        if not nbytes:
            return torch.empty(shape, dtype=self.dtype, device="cpu")
        before = start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            # Touching a page beyond the file's end would kill the process: mmap raises instead.
            try:
                mapped = mmap.mmap(
                    file.fileno(), before + nbytes, access=mmap.ACCESS_COPY, offset=start - before
                )
            except ValueError as error:
                raise _became_shorter(self.file) from error
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=before)
        if start % self.dtype.itemsize:  # the format allows unaligned tensors, torch does not
            raw = raw.clone()
        return raw.view(self.dtype).view(shape)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the tensor's bytes in order, CHUNK_BYTES at a time, in one buffer that is reused.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.nbytes)))
        left = self.nbytes
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    raise _became_shorter(self.file)
                yield buffer[:count]
                left -= count


def _became_shorter(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} became shorter while it was read: {_AGAIN}")


# ---- headers ------------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be read, is cut short or contradicts its header.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(start := stream.read(8), "little")
            if start == b"version ":  # https://git-lfs.github.com/spec/v1
                raise CheckpointError(
                    f"{file} is a Git LFS pointer in the place of weights: run git lfs pull"
                )
            if size < 8 or length > _MAX_HEADER:
                raise CheckpointError(f"{file} is not a safetensors file: {_AGAIN}")
            if size < 8 + length:
                raise CheckpointError(
                    f"{file} is cut short: it has {size} bytes, and its header alone has "
                    f"{8 + length}: {_AGAIN}"
                )
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from error
    try:
        tensors = _parse(file, header)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the header of {file} is damaged ({error}): {_AGAIN}") from error
    end = 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    if size != end:
        what = "is cut short" if size < end else "is longer than it should be"
        raise CheckpointError(
            f"{file} {what}: it has {size} bytes, its header says {end}: {_AGAIN}"
        )
    return tensors


def _parse(file: Path, header: bytes) -> dict[str, StoredTensor]:
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("no JSON object")
    entries.pop("__metadata__", None)
    begin = 8 + len(header)
    tensors = []
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        first, last = entry["data_offsets"]
        numbers = (*spec.shape, first, last)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{name} has a size or an offset that is no natural number")
        if last - first != spec.nbytes:
            raise ValueError(f"{name} needs {spec.nbytes} bytes and is given {last - first}")
        tensors.append(StoredTensor(*spec, file, begin + first, spec.nbytes))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    for tensor in tensors:
        if tensor.offset != begin:
            raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
        begin += tensor.nbytes
    return {tensor.name: tensor for tensor in tensors}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


# ---- writing ------------------------------------------------------------------------------------


def require_new(path: Path) -> None:
    """Raise CheckpointError unless `path` is missing or an empty directory."""
    try:
        is_taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}): name another directory"
        ) from error
    if is_taken:
        raise CheckpointError(f"{path} exists already: remove it, or name another directory")


def take_place(complete: Path, path: Path) -> None:
    """Give a complete directory the name of a new one; see :func:`require_new`.

    This is one step, except on Windows, where an empty directory has to go first.
    """
    try:
        complete.replace(path)
    except PermissionError:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        complete.replace(path)


def require_room(path: Path, nbytes: int) -> None:
    """Raise CheckpointError if the disk that `path` will be on has less than `nbytes` free."""
    existing = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise CheckpointError(
            f"the checkpoint has {nbytes / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB "
            f"free: make room there, or name a directory on another disk"
        )


def cut(items: Iterable[T], nbytes: Callable[[T], int], max_bytes: int) -> dict[str, list[T]]:
    """Cut items into shards, in order.

    Returns:
        file name -> items of at most `max_bytes`, or one larger item.
    """
    shards: list[list[T]] = [[]]
    room = max_bytes
    for item in items:
        if shards[-1] and nbytes(item) > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(item)
        room -= nbytes(item)
    # Named as in the original, whose three shards are 00000, 00001 and 00002 "of 00002".
    last = len(shards) - 1
    return {f"model-{i:05d}-of-{last:05d}.safetensors": shard for i, shard in enumerate(shards)}


def index_of(shards: dict[str, list[TensorSpec]]) -> dict[str, Any]:
    """Return the content of ``model.safetensors.index.json``."""
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    parts: Iterable[tuple[str, memoryview]],
    wrote: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write one file from parts of its tensors.

    Args:
        path: the file; an existing one is overwritten.
        specs: its tensors, in the order of their bytes in the file.
        parts: (name, next bytes of that tensor); parts of different tensors may alternate.
        wrote: called after each part with its number of bytes.

    Raises:
        ValueError: the parts of a tensor have more or fewer bytes than the tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = 8 + len(encoded)
    places = {spec.name: begin + header[spec.name]["data_offsets"][0] for spec in specs}
    ends = {spec.name: places[spec.name] + spec.nbytes for spec in specs}
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, part in parts:
            if file.tell() != places[name]:
                file.seek(places[name])
            file.write(part)
            places[name] += part.nbytes
            if places[name] > ends[name]:
                break
            wrote(part.nbytes)
    if wrong := [name for name in places if places[name] != ends[name]]:
        raise ValueError(f"{path}: {wrong[0]} was given another number of bytes than it has")
