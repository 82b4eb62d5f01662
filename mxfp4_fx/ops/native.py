"""The build of the native CPU kernels: compiled on first use, cached on disk, loaded.

There are two libraries for each instruction-set path, from the C++ in ``ops/cpu_kernels/``: one
with all functions, and one with those of weights alone, which one build makes seconds before. They
run on the threads of torch's own OpenMP runtime. They include no header of torch or Python, so that
one build serves every version of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mxfp4_fx.core import forks, torch_private, torch_private_dynamo
from mxfp4_fx.core.console import announced, say
from mxfp4_fx.core.errors import NativeBuildError
from mxfp4_fx.core.hardware import CPU_PATH_VARIABLE, CPU_PATHS
from mxfp4_fx.core.loaded_once import LoadedOnce
from mxfp4_fx.ops import compiler, library_files
from mxfp4_fx.ops.library_files import CACHE_DIR_VARIABLE

CXXFLAGS_VARIABLE = "MXFP4_FX_CXXFLAGS"  # more flags, for development: sanitizers, -g, -Werror
# After a failure, a build is tried again only if one of these variables has changed.
_MATTERS = (compiler.VARIABLE, CXXFLAGS_VARIABLE, "PATH", *library_files.VARIABLES)

_COMPILE = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra")
# api.h exports its functions. All other names are the same in every library and stay hidden.
_SHARED = ("-shared", "-fPIC", "-pthread", "-fvisibility=hidden")
_SOURCES = Path(__file__).parent / "cpu_kernels"
_TORCH = torch_private.LIBRARY
_PAUSE = 0.05  # seconds between two looks for a library that another thread or process builds
# At once, each with up to 350 MiB. One unit takes a third of all the time, so more gain little.
_MOST_COMPILERS = 4

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Library:
    """What a library is linked from, and the function that must be called first."""

    name: str
    units: tuple[str, ...]
    init: str

    @property
    def built(self) -> str:
        """The name of its file during the build."""
        return f"{self.name}.so"


_WEIGHTS = _Library("weights", ("weights.cpp",), "mxfp4_init_weights")
_KERNELS = _Library(
    "kernels",
    # Those that take long first, so that compilers end at about the same time.
    (
        *(*_WEIGHTS.units, "experts.cpp", "linears_mxfp8.cpp", "attention.cpp"),
        *("linears.cpp", "kernels.cpp", "program.cpp", "routing.cpp"),
    ),
    "mxfp4_init",
)
_LIBRARIES = _WEIGHTS, _KERNELS  # in the order in which they are built


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """Everything that the libraries of a path are made from; ``key`` is a hash of it."""

    path: str
    sources: dict[str, bytes]
    compile: dict[str, tuple[str, ...]]  # unit -> command
    link: dict[str, tuple[str, ...]]  # library -> command
    key: str

    def file_name(self, library: _Library) -> str:
        return f"{self.path}-{library.name}-{self.key}.so"


class _DlInfo(ctypes.Structure):
    """Dl_info of <dlfcn.h>."""

    _fields_ = (("file", ctypes.c_char_p), ("not_read", ctypes.c_void_p * 3))


def load(path: str) -> ctypes.CDLL:
    """Return the library for an instruction-set path; compile it if there is none.

    Compiling takes seconds and is announced on stderr. A library stays loaded until the process
    ends.

    Args:
        path: a key of ``CPU_PATHS``.

    Raises:
        NativeBuildError: there is no compiler, or it fails; no directory can be written; the system
            is not Linux or refuses the instructions; torch has no OpenMP; the kernels compute wrong
            results. Later calls raise the same error until an environment variable of
            :data:`_MATTERS` changes.
    """
    library = libraries.loaded.get(path)  # every call of an op takes this short way
    if library is not None:
        return library
    with torch_private_dynamo.timed("mxfp4_fx.load_kernels"):  # or waits for a thread that does
        return libraries(path)


def load_weights(path: str) -> ctypes.CDLL:
    """Return a library with the functions of weights: swizzling, quantizing, and back.

    It does not wait until the kernels are built, and serves even if they cannot be. If there is
    none, a thread builds both.

    Args:
        path: a key of ``CPU_PATHS``.

    Raises:
        NativeBuildError: as :func:`load` does.
    """
    library = weight_libraries.loaded.get(path)
    if library is not None:
        return library
    with torch_private_dynamo.timed("mxfp4_fx.load_kernels"):
        return weight_libraries(path)


def load_in_thread(path: str) -> threading.Thread:
    """Return a thread that loads the library of a path. A failure is left to who needs it.

    If the interpreter ends before, it stops compiling and cleans up.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _Loader) and thread.path == path and thread.is_alive():
            return thread
    thread = _Loader(path)
    thread.start()
    return thread


class _Loader(threading.Thread):
    def __init__(self, path: str) -> None:
        super().__init__(name="mxfp4_fx builds", daemon=False)  # the interpreter waits
        self.path = path

    def run(self) -> None:
        with contextlib.suppress(NativeBuildError):
            load(self.path)


def _end_with_interpreter() -> None:
    """End a thread that nobody waits for any more, because the main thread has ended."""
    if isinstance(threading.current_thread(), _Loader) and not threading.main_thread().is_alive():
        sys.exit()


def _load(path: str) -> ctypes.CDLL:
    try:
        return _checked(_find_or_build(_recipe(path)), _KERNELS, path)
    except OSError as error:
        raise NativeBuildError(str(error)) from error


def _load_weights(path: str) -> ctypes.CDLL:
    if path in libraries.loaded:  # it has all functions
        return libraries.loaded[path]
    try:
        recipe = _recipe(path)
        library = _find(recipe, _WEIGHTS)
        if library is None:
            with contextlib.suppress(RuntimeError):  # the system gives no thread
                thread = load_in_thread(path)
                while library is None and thread.is_alive():
                    thread.join(_PAUSE)
                    library = _find(recipe, _WEIGHTS)
    except OSError as error:
        raise NativeBuildError(str(error)) from error
    # Without it, the kernels' library serves, or raises what the thread met.
    return libraries(path) if library is None else _checked(library, _WEIGHTS, path)


libraries = LoadedOnce(_load, NativeBuildError, while_same=_MATTERS)
weight_libraries = LoadedOnce(_load_weights, NativeBuildError, while_same=_MATTERS)


def _checked(library: ctypes.CDLL, kind: _Library, path: str) -> ctypes.CDLL:
    """Return a library after its first call.

    Raises:
        NativeBuildError: it cannot be used here.
    """
    # A forked process lacks torch's threads, and OpenMP would wait for them.
    status = library[kind.init](forks.is_forked())
    if not status:
        return library
    wrong = (
        f"compute wrong results as compiled here; set {compiler.VARIABLE} to another compiler or "
        f"{CPU_PATH_VARIABLE} to another path"
    )
    refused = f"need what the system refuses: {os.strerror(status)}"
    why = wrong if status == errno.EDOM else refused  # api.h
    raise NativeBuildError(f"the {path} CPU kernels {why}")


def is_built(path: str) -> bool:
    """Return whether ``load(path)`` would find a finished library. Writes nothing."""
    try:
        name = _recipe(path).file_name(_KERNELS)
        directories = filter(library_files.is_trusted, library_files.directories())
        return any(library_files.is_whole(directory / name) for directory in directories)
    except (NativeBuildError, OSError):
        return False


def _recipe(path: str) -> _Recipe:
    if sys.platform != "linux":
        raise NativeBuildError(f"the CPU kernels run on Linux only, and this is {sys.platform}")
    sources = {
        file.name: file.read_bytes()
        for file in sorted(_SOURCES.glob("*"))
        if file.suffix in (".cpp", ".h") and file.is_file()
    }
    for unit in _KERNELS.units:
        if unit not in sources:
            raise NativeBuildError(f"{_SOURCES / unit} is missing; install mxfp4_fx again")
    openmp, cxx = _openmp_runtime(), compiler.command()
    more = (*_SHARED, *os.environ.get(CXXFLAGS_VARIABLE, "").split())
    instructions = (*CPU_PATHS[path].compiler_flags, f"-DMXFP4_PATH_{path.upper()}=1")
    flags = (*_COMPILE, *instructions, "-fopenmp", *more)
    compile_ = {unit: (*cxx, *flags, "-c", unit, "-o", _object(unit)) for unit in _KERNELS.units}
    # Without -fopenmp, which would add the compiler's own runtime.
    link = {
        library.name: (*cxx, *more, *map(_object, library.units), "-o", library.built)
        for library in _LIBRARIES
    }
    made_from = (
        *(path, sources, compile_, link, platform.machine()),
        # Another compiler may have replaced one of the same name.
        *(os.path.realpath(cxx[0]), compiler.run([*cxx, "--version"])),
        # The runtime's bytes and not its path: environments with the same runtime share a library.
        *(os.path.basename(openmp), hashlib.sha256(Path(openmp).read_bytes()).digest()),
    )
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]
    return _Recipe(path, sources, compile_, {k: (*v, openmp) for k, v in link.items()}, key)


def _object(unit: str) -> str:
    return f"{Path(unit).stem}.o"


def _openmp_runtime() -> str:
    """Return the file of the OpenMP runtime that torch uses.

    Another runtime would have a second pool of threads, and the two pools would compete for the
    cores. The process may have several runtimes loaded, so this looks up where torch's own calls
    lead.

    Raises:
        NativeBuildError: torch has no OpenMP.
    """
    try:
        function = ctypes.CDLL(_TORCH, mode=os.RTLD_NOW | os.RTLD_NOLOAD).omp_get_max_threads
    except (OSError, AttributeError):
        raise NativeBuildError(
            f"torch {torch.__version__} has no OpenMP, whose threads the CPU kernels run on; "
            "install one for which torch.backends.openmp.is_available() is true"
        ) from None
    info = _DlInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.path.abspath(os.fsdecode(info.file))


def _find(recipe: _Recipe, library: _Library) -> ctypes.CDLL | None:
    """Return a library that is built, or None."""
    for directory in filter(library_files.is_trusted, library_files.directories()):
        if found := _open_whole(directory / recipe.file_name(library), library):
            return found
    return None


def _find_or_build(recipe: _Recipe) -> ctypes.CDLL:
    if library := _find(recipe, _KERNELS):
        return library
    unusable: list[str] = []
    for directory in library_files.directories():
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not library_files.is_trusted(directory):
                raise OSError("it is not this user's alone")
            with library_files.locked(directory / f"{recipe.path}.lock", _end_with_interpreter):
                return _build(recipe, directory, unusable)
        except OSError as error:
            unusable.append(f"{directory} cannot be used ({error.strerror or error})")
    raise NativeBuildError(
        f"there is no directory for the compiled CPU kernels: {'; '.join(unusable)}; "
        f"set {CACHE_DIR_VARIABLE} to a directory that can be written"
    )


def _build(recipe: _Recipe, directory: Path, unusable: Sequence[str]) -> ctypes.CDLL:
    """Build the libraries into ``directory``; the caller holds its lock. Return the kernels'.

    Args:
        recipe: what to build.
        directory: where the libraries are kept.
        unusable: why the directories before this one could not be used.

    Raises:
        OSError: the directory cannot be used, so the caller may try the next.
        NativeBuildError: no other directory would help.
    """
    files = {library: directory / recipe.file_name(library) for library in _LIBRARIES}
    if library := _open_whole(files[_KERNELS], _KERNELS):  # the last holder of the lock built it
        return library
    missing = [kind for kind, file in files.items() if not _open_whole(file, kind)]
    for left in directory.glob(f"{recipe.path}.*.building"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    # A TemporaryDirectory would be removed by a forked child that ends, too.
    folder = tempfile.mkdtemp(".building", f"{recipe.path}.", directory)
    try:
        # The bytes that the key was made from: the files may have been edited since.
        for name, content in recipe.sources.items():
            Path(folder, name).write_bytes(content)
        for reason in unusable:
            say(f"{reason}, so the CPU kernels are kept in {directory}")
        title = f"compiling the CPU kernels ({recipe.path}), once for this machine"
        with torch_private_dynamo.timed("mxfp4_fx.compile_kernels"), announced(title) as tick:
            _make(recipe, missing, files, folder, tick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    file = files[_KERNELS]
    try:
        return _open(file, _KERNELS)
    except (OSError, AttributeError) as error:
        file.unlink(missing_ok=True)
        raise NativeBuildError(
            f"the {recipe.path} CPU kernels that {recipe.link[_KERNELS.name][0]} made do not load: "
            f"{error}; set {compiler.VARIABLE} to a g++ (clang++ cannot use the OpenMP runtime "
            f"libgomp), or {CACHE_DIR_VARIABLE} if {directory} is mounted noexec"
        ) from error


def _make(
    recipe: _Recipe,
    missing: Sequence[_Library],
    files: dict[_Library, Path],
    folder: str,
    tick: Callable[[], None],
) -> None:
    """Compile units side by side in ``folder``. Link a library, and put it in its place, as soon as
    its units are compiled."""

    def watch() -> None:
        _end_with_interpreter()
        tick()

    units = list(dict.fromkeys(unit for library in missing for unit in library.units))
    commands = [recipe.compile[unit] for unit in units]
    at_once = min(len(os.sched_getaffinity(0)), _MOST_COMPILERS)
    left, compiled = list(missing), set[str]()
    with contextlib.closing(compiler.run_each(commands, folder, watch, at_once)) as runs:
        for number, warnings in runs:
            if warnings:
                _log.debug("%s", warnings)
            compiled.add(units[number])
            while left and compiled.issuperset(left[0].units):
                library = left.pop(0)
                compiler.run(recipe.link[library.name], folder, watch)
                library_files.seal(Path(folder, library.built))
                os.replace(Path(folder, library.built), files[library])


def _open_whole(file: Path, library: _Library) -> ctypes.CDLL | None:
    """Return a library if it exists, is whole and loads; else None, and it must be built."""
    try:
        return _open(file, library) if library_files.is_whole(file) else None
    except (OSError, AttributeError):
        return None


def _open(file: Path, library: _Library) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(file))
    getattr(opened, library.init)  # AttributeError if this is another library
    return opened
