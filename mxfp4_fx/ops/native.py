"""The build of the native CPU library: compiled on first use, cached on disk, loaded.

There is one library for each instruction-set path, from the C++ in ``ops/cpu_kernels/``. It runs on
the threads of torch's own OpenMP runtime. It includes no header of torch or Python, so that one
build serves every version of them.
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
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from mxfp4_fx.core import forks, torch_private, torch_private_dynamo
from mxfp4_fx.core.console import announced, say
from mxfp4_fx.core.errors import NativeBuildError
from mxfp4_fx.core.hardware import CPU_PATH_VARIABLE, CPU_PATHS
from mxfp4_fx.core.loaded_once import LoadedOnce
from mxfp4_fx.ops import compiler

CACHE_DIR_VARIABLE = "MXFP4_FX_CACHE_DIR"
CXXFLAGS_VARIABLE = "MXFP4_FX_CXXFLAGS"  # more flags, for development: sanitizers, -g, -Werror
# After a failure, a build is tried again only if one of these variables has changed.
_MATTERS = (
    *(compiler.VARIABLE, CXXFLAGS_VARIABLE, "PATH"),
    *(CACHE_DIR_VARIABLE, "XDG_CACHE_HOME", "HOME"),
)

_COMPILE = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra")
# api.h exports its functions. All other names are the same in every library and stay hidden.
_SHARED = ("-shared", "-fPIC", "-pthread", "-fvisibility=hidden")
_SOURCES = Path(__file__).parent / "cpu_kernels"
_UNIT, _LIBRARY = "kernels.cpp", "kernels.so"  # the library has this name during the build
_TORCH = torch_private.LIBRARY
_SEAL_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """Everything that a library is made from. The name of its file has a hash of it."""

    path: str
    sources: dict[str, bytes]
    compile: tuple[str, ...]  # commands, run one after the other
    link: tuple[str, ...]
    file_name: str


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


def _load(path: str) -> ctypes.CDLL:
    try:
        library = _find_or_build(_recipe(path))
    except OSError as error:
        raise NativeBuildError(str(error)) from error
    # A forked process lacks torch's threads, and OpenMP would wait for them.
    if status := library.mxfp4_init(forks.is_forked()):
        raise NativeBuildError(_init_failed(path, status))
    return library


libraries = LoadedOnce(_load, NativeBuildError, while_same=_MATTERS)


def _init_failed(path: str, status: int) -> str:
    wrong = (
        f"compute wrong results as compiled here; set {compiler.VARIABLE} to another compiler or "
        f"{CPU_PATH_VARIABLE} to another path"
    )
    refused = f"need what the system refuses: {os.strerror(status)}"
    return f"the {path} CPU kernels {wrong if status == errno.EDOM else refused}"  # api.h


def is_built(path: str) -> bool:
    """Return whether ``load(path)`` would find a finished library. Writes nothing."""
    try:
        name = _recipe(path).file_name
        return any(_is_trusted(d) and _is_whole(d / name) for d in _directories())
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
    if _UNIT not in sources:
        raise NativeBuildError(f"{_SOURCES / _UNIT} is missing; install mxfp4_fx again")
    openmp, cxx = _openmp_runtime(), compiler.command()
    more = (*_SHARED, *os.environ.get(CXXFLAGS_VARIABLE, "").split())
    instructions = (*CPU_PATHS[path].compiler_flags, f"-DMXFP4_PATH_{path.upper()}=1")
    flags = (*_COMPILE, *instructions, "-fopenmp", *more)
    compile_ = (*cxx, *flags, "-c", _UNIT, "-o", "kernels.o")
    # Without -fopenmp, which would add the compiler's own runtime.
    link = (*cxx, *more, "kernels.o", "-o", _LIBRARY)
    made_from = (
        *(path, sources, compile_, link, platform.machine()),
        # Another compiler may have replaced one of the same name.
        *(os.path.realpath(cxx[0]), compiler.run([*cxx, "--version"])),
        # The runtime's bytes and not its path: environments with the same runtime share a library.
        *(os.path.basename(openmp), hashlib.sha256(Path(openmp).read_bytes()).digest()),
    )
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]
    return _Recipe(path, sources, compile_, (*link, openmp), f"{path}-{key}.so")


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


def _directories() -> list[Path]:
    """Return the directories for libraries; a build goes to the first that can be written."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # the XDG specification says to ignore relative paths
        caches = "~/.cache"
    chosen = os.environ.get(CACHE_DIR_VARIABLE) or os.path.join(caches, "mxfp4_fx")
    chosen = os.path.expanduser(chosen)
    if chosen.startswith("~"):  # a user without a home
        return [_fallback()]
    return [Path(os.path.abspath(chosen)), _fallback()]


def _fallback() -> Path:
    return Path(tempfile.gettempdir(), f"mxfp4_fx-{os.getuid()}")


def _is_trusted(directory: Path) -> bool:
    """Return whether code may be loaded from a directory.

    Any user may have made the one for temporary files.
    """
    if directory != _fallback():
        return True
    try:
        found = directory.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not found.st_mode & 0o077


def _find_or_build(recipe: _Recipe) -> ctypes.CDLL:
    directories = _directories()
    for directory in directories:
        if _is_trusted(directory) and (library := _open_whole(directory / recipe.file_name)):
            return library
    unusable: list[str] = []
    for directory in directories:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_trusted(directory):
                raise OSError("it is not this user's alone")
            with _locked(directory / f"{recipe.path}.lock"):
                return _build(recipe, directory, unusable)
        except OSError as error:
            unusable.append(f"{directory} cannot be used ({error.strerror or error})")
    raise NativeBuildError(
        f"there is no directory for the compiled CPU kernels: {'; '.join(unusable)}; "
        f"set {CACHE_DIR_VARIABLE} to a directory that can be written"
    )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, as one process at a time can. A killed process releases it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process compiles the CPU kernels; waiting for it ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(recipe: _Recipe, directory: Path, unusable: Sequence[str]) -> ctypes.CDLL:
    """Build a library into ``directory``; the caller holds its lock.

    Args:
        recipe: what to build.
        directory: where the library is kept.
        unusable: why the directories before this one could not be used.

    Raises:
        OSError: the directory cannot be used, so the caller may try the next.
        NativeBuildError: no other directory would help.
    """
    file = directory / recipe.file_name
    if library := _open_whole(file):  # the last holder of the lock has built it
        return library
    for left in directory.glob(f"{recipe.path}.*.building"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{recipe.path}.", suffix=".building", dir=directory, ignore_cleanup_errors=True
    ) as folder:
        # The bytes that the key was made from: the files may have been edited since.
        for name, content in recipe.sources.items():
            Path(folder, name).write_bytes(content)
        for reason in unusable:
            say(f"{reason}, so the CPU kernels are kept in {directory}")
        title = f"compiling the CPU kernels ({recipe.path}), once for this machine"
        with torch_private_dynamo.timed("mxfp4_fx.compile_kernels"), announced(title) as tick:
            for command in (recipe.compile, recipe.link):
                if warnings := compiler.run(command, folder, tick):
                    _log.debug("%s", warnings)
        _seal(Path(folder, _LIBRARY))
        os.replace(Path(folder, _LIBRARY), file)
    try:
        return _open(file)
    except (OSError, AttributeError) as error:
        file.unlink(missing_ok=True)
        raise NativeBuildError(
            f"the {recipe.path} CPU kernels that {recipe.compile[0]} made do not load: {error}; "
            f"set {compiler.VARIABLE} to a g++ (clang++ cannot use the OpenMP runtime libgomp), or "
            f"{CACHE_DIR_VARIABLE} if {directory} is mounted noexec"
        ) from error


def _seal(file: Path) -> None:
    """Append a library's hash to its file; the loader ignores bytes after the end."""
    digest = hashlib.sha256(file.read_bytes()).digest()
    with open(file, "ab") as end:
        end.write(digest)


def _is_whole(file: Path) -> bool:
    """Return whether a library matches its seal: one that is cut short would crash the loader."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == content[-_SEAL_BYTES:]


def _open_whole(file: Path) -> ctypes.CDLL | None:
    """Return the library if it exists, is whole and loads; else None, and it must be built."""
    try:
        return _open(file) if _is_whole(file) else None
    except (OSError, AttributeError):
        return None


def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.mxfp4_init  # noqa: B018  (AttributeError if this is another library)
    return library
