"""llama.cpp as a peer: built here, from the source package of llama-cpp-python.

    python -m benchmarks.llama_cpp build/llama.cpp     # once: source, build, our driver

It needs cmake, ninja, a C++ compiler and a package index, and takes a quarter of an hour on two
cores. Its models are converted from the checkpoints that are measured, by llama.cpp's own script:
experts stay MXFP4, and all else is bfloat16, or Q8_0. Files are kept in the folder and used again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.command import Log
from benchmarks.contenders import Unavailable
from benchmarks.machine import COMPILER

VERSION = "0.3.36"
KINDS = ("bf16", "q8_0")  # of all but the experts
FOLDER = Path("build/llama.cpp")  # unless another one is named
HERE = Path(__file__).resolve().parent
DRIVER = HERE / "llama_driver.cpp"
# Nothing but the library; for this CPU, as its authors' instructions for a local build have it.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def set_up(folder: Path, log: Log) -> None:
    """Fetch, unpack and build what is not there yet.

    Raises:
        Unavailable: a program is missing or fails; the message has its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not _source(folder).exists():
        log(f"fetching llama-cpp-python {VERSION}")
        with tempfile.TemporaryDirectory(dir=folder) as room:
            package = f"llama-cpp-python=={VERSION}"
            options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", room)
            _run([sys.executable, "-m", "pip", "download", *options, package])
            (archive,) = Path(room).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(room, filter="data")
            (unpacked,) = (path for path in Path(room).iterdir() if path.is_dir())
            unpacked.rename(_package(folder))
    log("building llama.cpp")
    build = folder / "build"
    defines = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _run(["cmake", "-S", str(_source(folder)), "-B", str(build), "-G", "Ninja", *defines])
    _run(["cmake", "--build", str(build), "--target", "llama"])
    log("building the driver")
    source, libraries = _source(folder), build / "bin"
    _run(
        [
            *(COMPILER, "-O2", "-std=c++17", str(DRIVER), "-o", str(_driver(folder))),
            *(f"-I{source / part}" for part in ("include", "ggml/include")),
            *(f"-L{libraries}", f"-Wl,-rpath,{libraries.resolve()}"),
            *("-lllama", "-lggml", "-lggml-base", "-lggml-cpu"),
        ]
    )


def driver(folder: Path) -> Path:
    """The program that measures.

    Raises:
        Unavailable: it is not built; the message says how.
    """
    path = _driver(folder)
    if not path.exists():
        raise Unavailable(
            f"it is not built in {folder.name}: python -m benchmarks.llama_cpp FOLDER builds it"
        )
    return path


def driver_command(
    folder: Path, pipe: int, model: Path, ids: Path, cores: Iterable[int], orders: Iterable[str]
) -> list[str]:
    """The command line of the driver; ``llama_driver.cpp`` says what the orders are."""
    numbers = ",".join(map(str, cores))
    return [str(driver(folder)), str(pipe), str(model), str(ids), numbers, *orders]


def order(cell: tuple[Any, ...], states: Path) -> str:
    """The driver's order to measure a cell of ``full_size_cells.py``.

    Args:
        states: the begin of a path; files of that name keep contexts.
    """
    parts = list(map(str, cell))
    if parts[0] == "decode":
        parts.append(f"{states}-{parts[1]}-{parts[2]}.state")  # it knows how many sequences
    return ":".join(parts)


def model(folder: Path, checkpoint: Path, kind: str, log: Log) -> Path:
    """The checkpoint as llama.cpp's file, which is made if it is absent.

    Args:
        kind: of :data:`KINDS`.

    Raises:
        Unavailable: llama.cpp's script cannot make it.
    """
    driver(folder)
    path = folder / f"{_digest(checkpoint)}-{kind}.gguf"
    if not path.exists():
        log(f"converting the checkpoint for llama.cpp, {kind}")
        partial = path.with_suffix(".part")
        options = ("--outfile", str(partial), "--outtype", kind)
        script = str(HERE / "llama_convert.py")
        try:
            _run([sys.executable, script, str(_source(folder)), str(checkpoint), *options])
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _package(folder: Path) -> Path:
    return folder / f"llama_cpp_python-{VERSION}"


def _source(folder: Path) -> Path:
    return _package(folder) / "vendor" / "llama.cpp"


def _driver(folder: Path) -> Path:
    return folder / "llama_driver"


def _digest(checkpoint: Path) -> str:
    """Names what is in a checkpoint, without reading all of it."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:12]


def _run(arguments: list[str]) -> None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"{arguments[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise Unavailable(f"{Path(arguments[0]).name} failed:\n" + "\n".join(last))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where it is kept")
    parser.add_argument("--checkpoint", type=Path, help="convert this, too")
    parser.add_argument("--silent", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)
    log = command.start(args)
    try:
        set_up(args.folder, log)
        for kind in KINDS if args.checkpoint else ():
            model(args.folder, args.checkpoint, kind, log)
    except Unavailable as error:
        raise SystemExit(f"llama.cpp is not available: {error}") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
