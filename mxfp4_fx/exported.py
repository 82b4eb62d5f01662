"""``load_exported``: a package of :func:`mxfp4_fx.export`, checked before it is loaded and called.

A package has machine code of the CPU it was made on, and calls this package's ops by name, with
weights in a layout of theirs. AOTInductor checks none of that, nor the inputs: it would crash or
return wrong numbers. So a package tells what it was made for (:class:`Note`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import zipfile
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import hardware, torch_private, torch_private_export
from mxfp4_fx.core.errors import PackageError
from mxfp4_fx.ops import target
from mxfp4_fx.ops.schemas import SCHEMAS

FORMAT = 1  # of packages: another number for another meaning of a layout or of a note

_AGAIN = "export the model again"


@dataclasses.dataclass(frozen=True)
class Size:
    """A symbolic size of an input: sizes of one symbol are equal. ``most`` is None for no limit."""

    symbol: str
    least: int
    most: int | None

    def __str__(self) -> str:
        return f"{self.least} to {'any' if self.most is None else self.most}"


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor that a package takes; it is contiguous and on the CPU."""

    dtype: str
    shape: tuple[int | Size, ...]


@dataclasses.dataclass(frozen=True)
class Note:
    """What a package was made for.

    Attributes:
        format: :data:`FORMAT`.
        torch: torch's release.
        machine: the system, the kind of CPU and its name.
        instruction_sets: of the CPU; none for other kinds than x86.
        targets: (kernels, layout) pairs that :func:`target.choose` must give.
        schemas: this package's ops in it -> their schemas.
        inputs: path of each input, as in ``args[0]`` -> what it is. Others than tensors are
            constants: numbers, strings, bools or None.
    """

    format: int
    torch: str
    machine: tuple[str, str, str]
    instruction_sets: tuple[str, ...]
    targets: tuple[tuple[str, str], ...]
    schemas: dict[str, str]
    inputs: dict[str, Input | Any]

    @classmethod
    def here(
        cls, targets: set[tuple[str, str]], ops: set[str], inputs: dict[str, Input | Any]
    ) -> Note:
        """Return the note of a package that is made in this process."""
        return cls(
            FORMAT,
            _torch_release(),
            _machine(),
            tuple(sorted(hardware.instruction_sets())),
            tuple(sorted(targets)),
            {op: SCHEMAS[op] for op in sorted(ops)},
            inputs,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Note:
        """Read :meth:`to_json`.

        Raises:
            PackageError: another format, or none.
        """
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise PackageError(
                f"it is a package of format {data.get('format')}, and this mxfp4_fx reads format "
                f"{FORMAT}: {_AGAIN} with this one"
            )
        data["inputs"] = {path: _read_input(value) for path, value in data["inputs"].items()}
        for name in ("machine", "instruction_sets"):
            data[name] = tuple(data[name])
        data["targets"] = tuple(tuple(pair) for pair in data["targets"])
        return cls(**data)

    def check_machine(self) -> None:
        """Check that this process can run the package, and build or load the kernels it calls.

        Raises:
            PackageError: the package is for another torch, mxfp4_fx, system or CPU.
            KernelsUnavailableError: its kernels are not available.
        """
        if self.torch != _torch_release():
            raise PackageError(
                f"it was exported with torch {self.torch}, and this is torch {_torch_release()}: "
                f"{_AGAIN} with this torch, or install that one"
            )
        changed = [op for op, schema in self.schemas.items() if SCHEMAS.get(op) != schema]
        if changed:
            raise PackageError(
                f"it calls {', '.join(f'mxfp4::{op}' for op in changed)} with other arguments than "
                f"this mxfp4_fx takes: {_AGAIN} with this one"
            )
        system, cpu, name = self.machine
        here = _machine()
        lacking = sorted({*self.instruction_sets} - hardware.instruction_sets())
        if (system, cpu) != here[:2] or lacking:
            what = f", which lacks {', '.join(lacking)}" if lacking else ""
            raise PackageError(
                f"it was exported on {system} {cpu} ({name}), for this CPU's instructions, and "
                f"this is {here[0]} {here[1]} ({here[2]}){what}: {_AGAIN} on this machine"
            )
        for kernels, layout in self.targets:
            chosen = target.choose(torch.device("cpu"), kernels)
            if layout not in ("", chosen.layout):
                raise PackageError(
                    f"its weights are in layout {layout!r}, and kernels={kernels!r} read "
                    f"{chosen.layout!r} here: {_AGAIN} on this machine"
                )

    def checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the inputs of a call.

        Raises:
            PackageError: one is missing or unknown, or is not as it was said when it was exported.
        """
        given = named_inputs(args, kwargs)
        if given.keys() != self.inputs.keys():
            raise PackageError(
                f"the package takes {', '.join(self.inputs) or 'nothing'}, and the call gives "
                f"{', '.join(given) or 'nothing'}: pass the same arguments by position and by name "
                "as it was exported with"
            )
        sizes: dict[str, tuple[int, str]] = {}
        for path, wanted in self.inputs.items():
            _check_input(path, given[path], wanted, sizes)


class ExportedModel:
    """A model that was exported; call it like the model, with the same arguments.

    Attributes:
        inputs: path of each input, as in ``args[0]`` -> what it may be, in words.
    """

    def __init__(self, program: Any, note: Note) -> None:
        self._program, self._note = program, note
        self.inputs = {path: _in_words(wanted) for path, wanted in note.inputs.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; results record no gradients.

        Raises:
            PackageError: an input is not as the package takes it.
        """
        self._note.checked(args, kwargs)
        args, kwargs = torch_private.tree_map_only(Tensor, contiguous, (args, kwargs))
        return self._program(*args, **kwargs)


def load_exported(path: str | os.PathLike[str]) -> ExportedModel:
    """Load what :func:`mxfp4_fx.export` has written.

    It needs neither the model's code nor transformers. The first load on a machine may compile the
    native kernels. A package is machine code: load only those that you trust.

    Args:
        path: the file.

    Raises:
        PackageError: the file is no such package, or is one for another torch, mxfp4_fx, system or
            CPU.
        KernelsUnavailableError: the kernels that it calls are not available.
    """
    file = os.fspath(path)
    try:
        note = Note.of_json(_note_in(file))
        note.check_machine()
    except PackageError as error:
        raise PackageError(f"{file} cannot be loaded: {error}") from error
    return ExportedModel(torch_private_export.load(file), note)


def named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the paths of all values in the arguments of a call -> the values."""
    found = {f"args{path}": leaf for path, leaf in torch_private_export.leaves(args).items()}
    return found | {f"kwargs{p}": leaf for p, leaf in torch_private_export.leaves(kwargs).items()}


def contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor in the order of memory that packages are compiled for."""
    return tensor.contiguous()


def _note_in(file: str) -> str:
    try:
        with zipfile.ZipFile(file) as package:
            for name in package.namelist():
                if name.endswith(torch_private_export.METADATA):
                    found = json.loads(package.read(name)).get(torch_private_export.NOTE)
                    if found is not None:
                        return str(found)
    except FileNotFoundError:
        raise PackageError("there is no such file") from None
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise PackageError(f"it is damaged, or no package ({error})") from error
    raise PackageError("mxfp4_fx.export has not written it")


def _torch_release() -> str:
    return str(torch.__version__).partition("+")[0]


def _machine() -> tuple[str, str, str]:
    return platform.system(), platform.machine(), hardware.cpu_name()


def _read_input(value: Any) -> Input | Any:
    if not isinstance(value, dict):
        return value
    shape = tuple(Size(**size) if isinstance(size, dict) else size for size in value["shape"])
    return Input(value["dtype"], shape)


def _in_words(wanted: Input | Any) -> str:
    if not isinstance(wanted, Input):
        return f"always {wanted!r}"
    return f"{wanted.dtype} [{', '.join(map(str, wanted.shape))}]"


def _check_input(path: str, value: Any, wanted: Input | Any, sizes: dict[str, Any]) -> None:
    """Check one input; ``sizes`` has symbols -> the size met, and where."""
    if not isinstance(wanted, Input):
        if type(value) is not type(wanted) or value != wanted:
            raise PackageError(
                f"{path} is {value!r}, and the package was exported for {wanted!r}: pass that, or "
                "export another package"
            )
        return
    if not isinstance(value, Tensor):
        raise PackageError(f"{path} is a {type(value).__name__}, and must be a tensor")
    if not value.is_cpu:
        raise PackageError(f"{path} is on {value.device}, and the package is for the CPU")
    if str(value.dtype) != wanted.dtype:
        raise PackageError(f"{path} is {value.dtype}, and must be {wanted.dtype}")
    if value.ndim != len(wanted.shape):
        raise PackageError(f"{path} has {value.ndim} dimensions, and must be {_in_words(wanted)}")
    for dim, (size, known) in enumerate(zip(value.shape, wanted.shape, strict=True)):
        where = f"dimension {dim} of {path}"
        if isinstance(known, int):
            if size != known:
                raise PackageError(
                    f"{where} is {size}, and the package was exported for {known}: name the "
                    "dimension in dynamic_shapes to let it vary"
                )
            continue
        if size < known.least or (known.most is not None and size > known.most):
            raise PackageError(
                f"{where} is {size}, and the package was exported for {known}: give its Dim other "
                "bounds"
            )
        first, at = sizes.setdefault(known.symbol, (size, where))
        if size != first:
            raise PackageError(f"{where} is {size}, and must be {first}, as {at} is")
