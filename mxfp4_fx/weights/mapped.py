"""Tensors whose memory is a mapped file: which these are, read ahead, and given back."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# linux/mman.h. Linux before 5.4 refuses the last two, which does no harm.
_MADV_DONTNEED, _MADV_COLD, _MADV_PAGEOUT = 4, 20, 21
# Bytes of an entry of /proc/self/pagemap, and values of the last one for pages that are as their
# file has them.
_ENTRY = 8
_IS_PRESENT, _IS_SWAPPED, _IS_OF_FILE = 0x80, 0x40, 0x20
_UNCHANGED = bytes(
    byte
    for byte in range(256)
    if not byte & _IS_SWAPPED and (byte & _IS_OF_FILE or not byte & _IS_PRESENT)
)
_LIMIT = Path("/sys/fs/cgroup")  # of the container, if it has one


# Threads that read ahead, and what they read.
_reading: list[tuple[threading.Thread, list[_Part]]] = []


class MappedFile(NamedTuple):
    """A part of a file that this process has mapped: where to, and from where."""

    start: int
    stop: int
    offset: int
    path: str


class _Part(NamedTuple):
    path: str
    offset: int
    length: int


def mapped_files() -> list[MappedFile]:
    """Return the files that this process has mapped, in the order of addresses; Linux only."""
    if sys.platform != "linux":
        return []
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0":
            start, stop = (int(address, 16) for address in addresses.split("-"))
            found.append(MappedFile(start, stop, int(offset, 16), path[0]))
    return found


def is_mapped(tensor: Tensor, files: Sequence[MappedFile]) -> bool:
    """Return whether a tensor's storage lies in one of :func:`mapped_files`."""
    return _file_of(_place(tensor), files) is not None


def read_ahead(tensors: Iterable[Tensor], others: Iterable[Tensor] = ()) -> threading.Thread | None:
    """Let the system read tensors in mapped files into its cache, in a thread.

    Whoever reads the tensors later need not wait for the disk, page by page. What such a thread of
    this process is reading already is left to it.

    Args:
        tensors: nothing is read unless memory has room for all of these. It need not have room for
            what they become when they are swizzled: their pages are no longer needed then.
        others: are read behind them, if memory has room for these as well.

    Returns:
        The thread, which nobody needs to wait for; None if there is nothing to do.
    """
    files = mapped_files()
    parts, more = _parts(tensors, files), _parts(others, files)
    if not parts and not more:
        return None
    room = _free_bytes() - sum(part.length for part in parts)
    if room < 0:
        return None
    if sum(part.length for part in more) <= room:
        parts += more
    _reading[:] = [(thread, theirs) for thread, theirs in _reading if thread.is_alive()]
    begun = {part for _, theirs in _reading for part in theirs}
    parts = [part for part in parts if part not in begun]
    if not parts:
        return None
    thread = threading.Thread(target=_read, args=(parts,), name="mxfp4_fx reads", daemon=True)
    thread.start()
    _reading.append((thread, parts))
    return thread


def read_model_ahead(model: nn.Module, experts: Iterable[nn.Module]) -> threading.Thread | None:
    """Read a model's weights ahead, as :func:`read_ahead` does.

    Experts come first: they are swizzled before a call needs anything else. Of an embedding a call
    needs a few rows, which are not worth the whole.
    """
    first = {id(tensor): tensor for module in experts for tensor in module.parameters()}
    others = (
        tensor
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for tensor in module.parameters(recurse=False)
        if id(tensor) not in first
    )
    return read_ahead(first.values(), others)


def page_out(tensors: Sequence[Tensor]) -> None:
    """Give back the memory of tensors in mapped files; mappings live as long as tensors use them.

    No data is lost: the system reads the pages again, and keeps pages that were written to. Pages
    of the file alone stay in the system's cache, so that the next process need not wait for a disk.
    Where memory gets short they go first, before those of weights that are yet to be swizzled.
    """
    for tensor in tensors:
        place = _place(tensor)
        start = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (place.stop - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            is_of_file = _are_of_file(start, length)
            advise = ctypes.CDLL(None).madvise
            for advice in (_MADV_COLD, _MADV_DONTNEED) if is_of_file else (_MADV_PAGEOUT,):
                advise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def _place(tensor: Tensor) -> range:
    """Return the addresses of a tensor's storage; none if torch itself allocated it."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return range(0)  # sparse ones have no storage
    storage = tensor.untyped_storage()
    if storage.resizable():
        return range(0)
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def _file_of(place: range, files: Sequence[MappedFile]) -> MappedFile | None:
    at = bisect.bisect_right(files, place.start, key=lambda file: file.start) - 1
    is_inside = len(place) > 0 and at >= 0 and place.stop <= files[at].stop
    return files[at] if is_inside else None


def _parts(tensors: Iterable[Tensor], files: Sequence[MappedFile]) -> list[_Part]:
    """Return where in files tensors lie, each part once; those that are not in files are left."""
    places = (_place(tensor) for tensor in tensors if type(tensor) in (Tensor, nn.Parameter))
    found = [(place, _file_of(place, files)) for place in places]
    parts = (
        _Part(file.path, place.start - file.start + file.offset, len(place))
        for place, file in found
        if file is not None
    )
    return [*dict.fromkeys(parts)]


def _read(parts: Sequence[_Part]) -> None:
    """Copy parts of files to nowhere: it fills the cache, and keeps neither core nor GIL."""
    with open(os.devnull, "wb", buffering=0) as nowhere:
        for part in parts:
            # A file that is gone or cannot be copied so is read when its tensor is.
            with contextlib.suppress(OSError):
                _read_part(part, nowhere.fileno())


def _read_part(part: _Part, nowhere: int) -> None:
    with open(part.path, "rb", buffering=0) as file:
        offset, stop = part.offset, part.offset + part.length
        while offset < stop and (
            sent := os.sendfile(nowhere, file.fileno(), offset, stop - offset)
        ):
            offset += sent


def _free_bytes() -> int:
    """Return how much memory the system, and the container, can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = dict(line.split(":") for line in lines)
    free = int(facts["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no limit is a missing file, or "max"
        limit, used = (int((_LIMIT / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def _are_of_file(start: int, length: int) -> bool:
    """Return whether all pages at some addresses are as a file has them: none was written to."""
    size = length // mmap.PAGESIZE * _ENTRY
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(start // mmap.PAGESIZE * _ENTRY)
            entries = pagemap.read(size)
    except OSError:
        return False
    changed = entries[_ENTRY - 1 :: _ENTRY].translate(None, delete=_UNCHANGED)
    return len(entries) == size and not changed
