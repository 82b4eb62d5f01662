"""Programs: the native kernels of a small graph, run one after the other in one call.

Between two kernels of a decoded token, dispatch and Python take longer than the norms and sums that
lie between them. A program is called once for all of them (``cpu_kernels/program.h``).

A :class:`Builder` takes instructions in order, and the places of their operands: an argument's
memory, a result's, or memory that only the call uses. The :class:`Program` that it builds holds no
tensor. It serves all layers that share a graph, and several threads at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxfp4_fx.core import profiling
from mxfp4_fx.ops import cpu_structs
from mxfp4_fx.ops.cpu_library import check, library
from mxfp4_fx.ops.cpu_structs import INSTRUCTION, LINK, PROGRAM

# api.h: mxfp4_kind.
ELEMENTWISE, MATMUL_OGS, ROUTING, ATTENTION, LINEARS, LINEARS_MXFP8 = range(6)
# The ops' names in torch's profiles, where other instructions have none.
_OPS = {
    MATMUL_OGS: "mxfp4::matmul_ogs",
    ROUTING: "mxfp4::routing",
    ATTENTION: "mxfp4::attention_with_sinks",
    LINEARS: "mxfp4::linears",
    LINEARS_MXFP8: "mxfp4::linears_mxfp8",
}
_FIXED_SLOTS = 4  # api.h: mxfp4_slot
_ALIGNMENT = 64  # bytes: a cache line


class Place(NamedTuple):
    """Eight bytes that only a call knows: an address, a size or a stride.

    Attributes:
        slot: ``("memory",)``, the call's own; ``("pointer", argument)``; ``("size", argument,
            dimension)``; ``("stride", argument, dimension)``; or ``("result", number)``.
        offset: in bytes, behind the address.
    """

    slot: tuple[Any, ...]
    offset: int = 0

    def behind(self, offset: int) -> Place:
        return Place(self.slot, self.offset + offset)


class Result(NamedTuple):
    """A view, of memory that a call returns.

    Attributes:
        memory: of :meth:`Builder.returned`.
        shape, stride: of the view.
        offset: of its first element, in elements.
    """

    memory: Place
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Part(NamedTuple):
    """Instructions that a profile shows as one: an op, or what lies between ops."""

    op: str | None
    weights: tuple[int, ...]  # the arguments whose names it has
    start: int  # in the code, in bytes
    end: int


class Builder:
    """Collects a program's instructions, and hands out memory for what is between them."""

    def __init__(self) -> None:
        self.code = bytearray()
        self.parts: list[_Part] = []
        self.count = 0  # of instructions
        self.links: list[tuple[int, Place]] = []  # positions in the code, and what belongs there
        self.made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        self.bytes = 0  # of memory that only a call uses
        self._free: list[tuple[int, int]] = []  # offsets and sizes

    def returned(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> Place:
        """Return the place of a tensor that each call makes, and returns or returns views of."""
        self.made.append((shape, stride, dtype))
        return Place(("result", len(self.made) - 1))

    def allocate(self, size: int) -> Place:
        """Return the place of ``size`` bytes that only the call uses."""
        size = _whole_lines(size)
        for at, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[at : at + 1] = [(offset + size, room - size)] if room > size else []
                return Place(("memory",), offset)
        self.bytes += size
        return Place(("memory",), self.bytes - size)

    def release(self, place: Place, size: int) -> None:
        """Let what :meth:`allocate` gives from now on lie in the same memory."""
        merged: list[tuple[int, int]] = []
        for offset, room in sorted([*self._free, (place.offset, _whole_lines(size))]):
            if merged and sum(merged[-1]) == offset:
                offset, room = merged[-1][0], merged.pop()[1] + room
            merged.append((offset, room))
        self._free = merged

    def add(
        self, kind: int, form: struct.Struct, *fields: Any, weights: Sequence[int] = ()
    ) -> None:
        """Append an instruction.

        Args:
            kind: which.
            form: the struct of its arguments, one of ``cpu_structs``.
            fields: their values; a :class:`Place` may stand for any that has eight bytes.
            weights: the arguments whose names an op has in profiles.
        """
        start = len(self.code)
        size = -(-(INSTRUCTION.size + form.size) // 8) * 8
        for at, field in zip(cpu_structs.offsets(form), fields, strict=True):
            if isinstance(field, Place):
                self.links.append((start + INSTRUCTION.size + at, field))
        numbers = (0 if isinstance(field, Place) else field for field in fields)
        self.code += (INSTRUCTION.pack(kind, size) + form.pack(*numbers)).ljust(size, b"\0")
        self.count += 1
        op = _OPS.get(kind)
        if op is None and self.parts and self.parts[-1].op is None:
            start = self.parts.pop().start
        self.parts.append(_Part(op, tuple(weights), start, len(self.code)))


class Program:
    """Native kernels in order. It is called as compiled graphs are: with a list of arguments.

    The call empties the list, and returns a list of new tensors.

    Raises:
        ValueError: an index of a routing points outside its tensor.
        MemoryError: there is no memory for a kernel's buffers.
    """

    _boxed_call = True  # AOTAutograd asks

    def __init__(self, built: Builder, results: Sequence[Result]) -> None:
        slots = {place.slot for _, place in built.links}
        self._pointers = sorted(slot[1] for slot in slots if slot[0] == "pointer")
        self._sizes = sorted(slot[1:] for slot in slots if slot[0] == "size")
        self._strides = sorted(slot[1:] for slot in slots if slot[0] == "stride")
        self._made, self._parts, self._count = built.made, built.parts, built.count
        order = [
            ("memory",),
            *(("pointer", argument) for argument in self._pointers),
            *(("size", *at) for at in self._sizes),
            *(("stride", *at) for at in self._strides),
            *(("result", number) for number in range(len(built.made))),
        ]
        numbers = {slot: _FIXED_SLOTS + at for at, slot in enumerate(order)}
        self._results = [
            (one.memory.slot[1], *((None,) * 3 if _is_whole(one, built) else one[1:]))
            for one in results
        ]
        self._memory, self._end = built.bytes, len(built.code)
        links = [LINK.pack(at, numbers[place.slot], place.offset) for at, place in built.links]
        # The code and the links lie in these buffers, at the addresses that the program has.
        self._code = ctypes.create_string_buffer(bytes(built.code), len(built.code))
        self._links = ctypes.create_string_buffer(b"".join(links), LINK.size * len(links))
        buffers = ctypes.addressof(self._code), ctypes.addressof(self._links)
        self._program = PROGRAM.pack(*buffers, len(built.code), len(links))
        self._pack = struct.Struct(f"{_FIXED_SLOTS + len(order)}q").pack

    def __len__(self) -> int:
        """Return the number of instructions."""
        return self._count

    def __call__(self, args: list[Any]) -> list[Tensor]:
        # Explicit, because the user's default device may be another.
        memory = torch.empty(self._memory + self._end, dtype=torch.uint8, device="cpu")
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
            for shape, stride, dtype in self._made
        ]
        slots = (
            memory.data_ptr(),
            *[args[index].data_ptr() for index in self._pointers],
            *[args[index].size(dim) for index, dim in self._sizes],
            *[args[index].stride(dim) for index, dim in self._strides],
            *[tensor.data_ptr() for tensor in made],
        )
        if profiling.is_on():
            for op, weights, start, end in self._parts:
                with _shown(op, [args[at] for at in weights]):
                    self._run(start, end, slots)
        else:
            self._run(0, self._end, slots)
        args.clear()
        return [
            made[number] if shape is None else made[number].as_strided(shape, stride, offset)
            for number, shape, stride, offset in self._results
        ]

    def _run(self, start: int, end: int, slots: tuple[int, ...]) -> None:
        """Run the instructions in a range of the code."""
        fixed = slots[0] + self._memory, torch.get_num_threads(), start, end
        if status := library().mxfp4_run(self._program, self._pack(*fixed, *slots)):
            check(status, "a program of native kernels: an index points outside its tensor")


@contextlib.contextmanager
def _shown(op: str | None, weights: Sequence[Tensor]) -> Iterator[None]:
    """Show the block's time in a profile as the op does that is called alone."""
    if op is None:
        yield
        return
    none = contextlib.nullcontext()
    with torch.profiler.record_function(op):
        if op == _OPS[ATTENTION]:
            shown = profiling.shown(weights[0], "attention") if weights else none
        elif op in (_OPS[LINEARS], _OPS[LINEARS_MXFP8]):
            shown = profiling.shown_linears(weights)
        else:
            shown = profiling.shown(weights[0]) if weights else none
        with shown:
            yield


def _whole_lines(size: int) -> int:
    return -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT


def _is_whole(result: Result, built: Builder) -> bool:
    """Return whether a result is the tensor itself that a call makes, and no view of it."""
    shape, stride, _ = built.made[result.memory.slot[1]]
    return (result.shape, result.stride, result.offset) == (shape, stride, 0)
