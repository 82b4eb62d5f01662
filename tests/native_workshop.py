"""Tiny sources in the place of the kernels, a compiler that counts its runs, and a cache."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from processes import LAST_RESORT

from mxfp4_fx.core.errors import NativeBuildError
from mxfp4_fx.ops import compiler, native

# Of kernels.cpp, with the functions that the weights' library lacks.
SOURCE = """
#include "answer.h"
#include <omp.h>
#pragma GCC visibility push(default)
extern "C" {
int mxfp4_init(void) { return 0; }
int answer(void) { return ANSWER; }
int max_threads(void) { return omp_get_max_threads(); }
int team(void) {
  int threads = 0;
#pragma omp parallel
#pragma omp single
  threads = omp_get_num_threads();
  return threads;
}
}
#pragma GCC visibility pop
"""

WEIGHTS = """
#pragma GCC visibility push(default)
extern "C" {
int mxfp4_init_weights(void) { return 0; }
int weights_answer(void) { return 12; }
}
#pragma GCC visibility pop
"""

UNITS = "weights.cpp", "kernels.cpp"

# What a fresh interpreter runs first; the environment says the rest.
START = f"""
import ctypes, dataclasses, os, re, sys
from pathlib import Path
import torch
from mxfp4_fx.ops import native
native._SOURCES = Path(sys.argv[1])
native._KERNELS = dataclasses.replace(native._KERNELS, units={UNITS})
native._LIBRARIES = native._WEIGHTS, native._KERNELS

def runtimes():
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[^/\\s]*\\.so[^/\\s]*", maps))
"""


@dataclasses.dataclass
class Workshop:
    """Sources, a compiler that counts its runs, and a cache, below one folder."""

    folder: Path
    real_compiler: str

    @property
    def sources(self) -> Path:
        return self.folder / "sources"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def compilations(self, unit: str = "kernels.cpp") -> int:
        log = self.folder / "log"
        return log.read_text().split().count(unit) if log.exists() else 0

    def write_source(
        self, unit: str = SOURCE, answer: int = 42, weights: str = WEIGHTS, **more: str
    ) -> None:
        """Write the units; ``more`` are others, by their names without an ending."""
        self.sources.mkdir(exist_ok=True)
        for name, text in {"kernels": unit, "weights": weights, **more}.items():
            (self.sources / f"{name}.cpp").write_text(text)
        (self.sources / "answer.h").write_text(f"#define ANSWER {answer}\n")

    def write_compiler(
        self, before: str = "", name: str = "compiler", unit: str = "kernels.cpp"
    ) -> Path:
        """A compiler that runs the shell commands `before` when it is asked to compile a unit."""
        script = self.folder / name
        log = shlex.quote(str(self.folder / "log"))
        script.write_text(
            f"""#!/bin/sh
unit=; for argument; do case $argument in *.cpp) unit=$argument;; esac; done
case " $* " in *" -c "*) echo $unit >> {log};; esac
case $unit in {unit})
{before}
;; esac
exec {self.real_compiler} "$@"
"""
        )
        script.chmod(0o755)
        return script

    def start(self, code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", START + code, str(self.sources)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> str:
        """What `code` prints in a fresh interpreter."""
        process = self.start(code)
        output, errors = process.communicate(timeout=LAST_RESORT)
        assert process.returncode == 0, errors
        return output

    def libraries(self, below: Path | None = None, name: str = "kernels") -> list[Path]:
        return sorted((below or self.cache).rglob(f"*-{name}-*.so"))


def loaders() -> list[native._Loader]:
    return [thread for thread in threading.enumerate() if isinstance(thread, native._Loader)]


def join_loaders() -> None:
    """Wait for the threads of earlier tests too: any test that loads packed experts leaves one.

    With a cold cache it still builds, or waits while another worker does.
    """
    for thread in loaders():
        thread.join()


def set_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Let ``native`` use a new workshop."""
    join_loaders()
    made = Workshop(folder / "work shop", " ".join(map(shlex.quote, compiler.command())))
    made.folder.mkdir()
    made.write_source()
    (made.folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made.folder / "temporary"))
    monkeypatch.setattr(native, "_SOURCES", made.sources)
    use_units(monkeypatch, *UNITS)
    monkeypatch.setenv("CXX", str(made.write_compiler()))
    monkeypatch.setenv("MXFP4_FX_CACHE_DIR", str(made.cache))
    monkeypatch.delenv("MXFP4_FX_CXXFLAGS", raising=False)
    forget(monkeypatch)
    return made


def use_units(monkeypatch: pytest.MonkeyPatch, *units: str) -> None:
    kernels = dataclasses.replace(native._KERNELS, units=units)
    monkeypatch.setattr(native, "_KERNELS", kernels)
    monkeypatch.setattr(native, "_LIBRARIES", (native._WEIGHTS, kernels))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process would know."""
    for name in ("libraries", "weight_libraries"):
        monkeypatch.setattr(native, name, getattr(native, name).anew())


def refusal(path: str = "portable") -> str:
    with pytest.raises(NativeBuildError) as raised:
        native.load(path)
    return str(raised.value)
