"""The CPU's C++ on every path that runs here, with AddressSanitizer and UBSan watching."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from combinations import exhaustive
from implementations import ARM_PATHS, CPU_PATHS

from mxfp4_fx.core.hardware import CPU_PATHS as ALL_PATHS

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "mxfp4_fx" / "ops" / "cpu_kernels"
UNITS = sorted(SOURCES.glob("*.cpp"))
DRIVER = TESTS / "native" / "driver.cpp"  # it includes all units
FLAGS = (
    # Not optimized: it compiles in a third of the time, and no load is optimized away.
    *("-std=c++17", "-O0", "-g", "-fopenmp", "-pthread", "-Wall", "-Wextra", "-Werror"),
    # gcc 12 sees uninitialized variables inside its own intrinsics.
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


def build(path: str, folder: Path, *more: str) -> Path:
    program = folder / "driver"
    define = f"-DMXFP4_PATH_{path.upper()}=1"
    command = [os.environ.get("CXX", "g++"), *FLAGS, *ALL_PATHS[path].compiler_flags, define, *more]
    subprocess.run([*command, f"-I{SOURCES}", str(DRIVER), "-o", str(program)], check=True)
    return program


def test_the_driver_has_every_unit() -> None:
    included = re.findall(r'^#include "(\w+\.cpp)"$', DRIVER.read_text(), re.MULTILINE)
    assert included == [unit.name for unit in UNITS]


@pytest.mark.parametrize("path", [*map(exhaustive, CPU_PATHS)])
def test_no_byte_too_far_and_nothing_undefined(path: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [build(path, tmp_path), "150"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "150 rounds\n"


IS_X86 = platform.machine() in ("x86_64", "AMD64")
# These two take what few machines can run, and nothing else compiles it there.
NEWEST = ("avx512_bf16", "amx")
OF_X86 = [path for path in ALL_PATHS if path not in ARM_PATHS]
HERE = OF_X86 if IS_X86 else ["portable"]
PATHS = [p if p in NEWEST or not IS_X86 else exhaustive(p) for p in HERE]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_compiles_without_a_warning(path: str) -> None:
    """Those of other CPUs, too, which cannot run here."""
    check_syntax(path, DRIVER)


@pytest.mark.parametrize("path", [*map(exhaustive, HERE)])
def test_each_unit_compiles_alone(path: str) -> None:
    """It includes what it needs, which the driver may have from another unit."""
    check_syntax(path, *UNITS)


def check_syntax(path: str, *sources: Path) -> None:
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fopenmp", "-fsyntax-only"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    define, flags = f"-DMXFP4_PATH_{path.upper()}=1", ALL_PATHS[path].compiler_flags
    subprocess.run([*command, *warnings, *flags, define, f"-I{SOURCES}", *sources], check=True)


def clangs_folders() -> list[str]:
    """Where clang's headers for ARM are, when gcc's cross compiler has brought the rest."""
    own = subprocess.run(
        ["clang++", "-print-resource-dir"], capture_output=True, text=True, check=True
    )
    (cxx,) = sorted(Path("/usr/aarch64-linux-gnu/include/c++").iterdir())[-1:]
    return [
        f"{own.stdout.strip()}/include",
        str(cxx),
        f"{cxx}/aarch64-linux-gnu",
        str(cxx.parents[1]),
    ]


@pytest.mark.skipif(
    not all(map(shutil.which, ("clang++", "aarch64-linux-gnu-g++"))),
    reason="wants clang++ and aarch64-linux-gnu-g++ (Debian: clang, g++-aarch64-linux-gnu)",
)
@pytest.mark.parametrize("path", [*map(exhaustive, [*ARM_PATHS, "portable"])])
def test_clang_reads_what_is_for_arm_without_a_warning(path: str, tmp_path: Path) -> None:
    """As Apple's compiler would. OpenMP's header is not there, so a stand-in declares it."""
    (tmp_path / "omp.h").write_text(
        "#pragma once\nint omp_in_parallel(); int omp_get_thread_num(); int omp_get_num_threads();"
    )
    command = ["clang++", "--target=aarch64-linux-gnu", "-std=c++17", "-fsyntax-only", "-fopenmp"]
    command += ["-Wall", "-Wextra", "-Werror", *ALL_PATHS[path].compiler_flags]
    command += [f"-I{folder}" for folder in (tmp_path, *clangs_folders())]
    command += [f"-DMXFP4_PATH_{path.upper()}=1", *map(str, UNITS)]
    subprocess.run(command, check=True)


CROSS = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not all(map(shutil.which, CROSS)),
    reason=f"wants {' and '.join(CROSS)} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
@pytest.mark.parametrize("path", [*map(exhaustive, [*ARM_PATHS, "portable"])])
def test_on_an_arm(path: str, tmp_path: Path) -> None:
    """In an emulator."""
    compiler, emulator = CROSS
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O3", "-static", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
    flags += [*ALL_PATHS[path].compiler_flags, f"-DMXFP4_PATH_{path.upper()}=1", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, str(DRIVER), "-o", str(program)], check=True)
    done = subprocess.run([emulator, program, "60"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "60 rounds\n"), done.stderr


SIMDE = Path("/usr/include/simde/x86/avx512.h")


@pytest.mark.skipif(not SIMDE.exists(), reason="wants SIMDe (Debian: libsimde-dev)")
@pytest.mark.skipif(not IS_X86, reason="AVX2 runs what is not emulated")
@pytest.mark.parametrize("path", [exhaustive("avx512"), exhaustive("avx512_bf16")])
def test_avx512_in_software(path: str, tmp_path: Path) -> None:
    """On machines without it, too."""
    program = tmp_path / "driver"
    # SIMDe's vectors have other elements than the compiler's own.
    flags = ["-std=c++17", "-O0", "-fopenmp", "-w", "-flax-vector-conversions"]
    flags += [*ALL_PATHS["avx2"].compiler_flags, f"-DMXFP4_PATH_{path.upper()}=1"]
    flags += ["-include", str(TESTS / "native" / "avx512_emulated.h"), f"-I{SOURCES}"]
    command = [os.environ.get("CXX", "g++"), *flags, str(DRIVER), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program, "60"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "60 rounds\n"), done.stderr
