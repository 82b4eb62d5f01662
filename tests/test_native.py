"""The C++ is compiled once, kept, and loaded, with tiny sources in the place of the kernels."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import os
import platform
import re
import shlex
import signal
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from combinations import exhaustive
from native_workshop import SOURCE, Workshop, forget, refusal, set_up
from processes import LAST_RESORT, is_alive, is_written, until_there, wait_until

from mxfp4_fx.core.hardware import CPU_PATHS
from mxfp4_fx.ops import compiler, library_files, native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels run on Linux only")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return set_up(tmp_path, monkeypatch)


# Once


def test_what_was_compiled_is_used_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        forget(monkeypatch)
        assert native.load("portable").answer() == 42
    assert workshop.compilations() == 1


def test_a_process_loads_a_library_once(workshop: Workshop) -> None:
    assert native.load("portable") is native.load("portable")


def test_is_built_tells_whether_it_would_compile(workshop: Workshop) -> None:
    assert not native.is_built("portable")
    assert not workshop.cache.exists()
    native.load("portable")
    assert native.is_built("portable")
    assert workshop.compilations() == 1


@pytest.mark.parametrize("change", ["unit", "header", "new header", "flags", "compiler", "version"])
def test_a_change_gives_a_new_library(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    native.load("portable")
    match change:
        case "unit":
            workshop.write_source(SOURCE + "// changed\n")
        case "header":
            workshop.write_source(answer=43)
        case "new header":
            (workshop.sources / "empty.h").touch()
        case "flags":
            monkeypatch.setenv("MXFP4_FX_CXXFLAGS", "-O1")
        case "compiler":
            monkeypatch.setenv("CXX", str(workshop.write_compiler(name="another")))
        case "version":
            script = workshop.folder / "compiler"
            script.write_text(f"{script.read_text()}\n".replace("exec", "echo 99 >&2\nexec"))
    forget(monkeypatch)
    assert not native.is_built("portable")
    assert native.load("portable").answer() == (43 if change == "header" else 42)
    assert len(workshop.libraries()) == 2


def test_a_library_serves_the_same_sources_in_another_place(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.load("portable")
    monkeypatch.setattr(native, "_SOURCES", workshop.sources.rename(workshop.folder / "moved"))
    assert native.is_built("portable")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these flags are for x86")
@pytest.mark.parametrize("path", [name for name, p in CPU_PATHS.items() if not p.is_for_arm])
def test_a_path_has_its_flags_and_its_macro(workshop: Workshop, path: str) -> None:
    macros = {
        "avx2": "__AVX2__ && __FMA__ && __F16C__ && __BMI2__",
        "avx512": "__AVX512F__ && __AVX512BW__ && __AVX512DQ__ && __AVX512VL__ && __AVX512VNNI__",
        "avx512_bf16": "__AVX512VBMI__ && __AVX512BF16__",
        "amx": "__AMX_TILE__ && __AMX_BF16__",
    }
    has = {**dict(zip(macros, range(1, 5), strict=True)), "amx_emulated": 3, "portable": 0}[path]
    checks = [f"#if !MXFP4_PATH_{path.upper()}\n#error macro\n#endif\n"]
    for number, condition in enumerate(macros.values(), start=1):
        wrong = f"!({condition})" if number <= has else condition
        checks.append(f"#if {wrong}\n#error {number}\n#endif\n")
    workshop.write_source(SOURCE + "".join(checks))
    assert native.load(path).answer() == 42
    assert workshop.libraries()[0].name.startswith(f"{path}-")


def test_only_what_is_made_visible_can_be_seen(workshop: Workshop) -> None:
    workshop.write_source(SOURCE + 'extern "C" int hidden(void) { return 1; }\n')
    assert not hasattr(native.load("portable"), "hidden")


# At once, and cut short


@pytest.mark.exhaustive
def test_two_processes_at_once_compile_once(workshop: Workshop) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    code = "print('ready', flush=True); input(); print(native.load('portable').answer())"
    processes = [workshop.start(code) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stderr.readline() for process in processes if process.stderr]
    assert sorted(line.split()[1] for line in said) == ["another", "compiling"], said
    go.touch()
    outputs = [process.communicate(timeout=LAST_RESORT) for process in processes]
    assert [output for output, _ in outputs] == ["42\n", "42\n"], outputs
    assert workshop.compilations() == 1


def test_two_threads_at_once_get_one_library(workshop: Workshop) -> None:
    found: list[ctypes.CDLL] = []
    threads = [
        threading.Thread(target=lambda: found.append(native.load("portable"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] is found[1]
    assert workshop.compilations() == 1


@pytest.mark.exhaustive
def test_a_killed_build_leaves_nothing_that_is_taken_for_finished(workshop: Workshop) -> None:
    hang, pid = workshop.folder / "hang", workshop.folder / "pid"
    hang.touch()
    workshop.write_compiler(
        f"if [ -e {shlex.quote(str(hang))} ]; then echo x > kernels.o; echo x > kernels.so\n"
        f"echo $$ > {shlex.quote(str(pid))}; exec sleep 3600; fi"
    )
    process = workshop.start("native.load('portable')")
    wait_until(lambda: is_written(pid), "the compiler")
    compiler = int(pid.read_text())
    process.kill()
    process.communicate(timeout=LAST_RESORT)
    try:
        hang.unlink()
        assert not native.is_built("portable")
        # the compiler that is left does not keep others out
        assert native.load("portable").answer() == 42
    finally:
        os.kill(compiler, signal.SIGKILL)
    left = {file.name.partition("-")[0] for file in workshop.cache.iterdir()}
    assert left == {"portable", "portable.lock"}


@pytest.mark.parametrize("length", [0, exhaustive(20), exhaustive(0.5), -1])
def test_a_library_that_was_cut_short_is_built_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, length: float
) -> None:
    native.load("portable")
    (whole,) = workshop.libraries()
    content = whole.read_bytes()
    # Elsewhere, for the one here is mapped into this process.
    monkeypatch.setenv("MXFP4_FX_CACHE_DIR", str(workshop.folder / "other"))
    forget(monkeypatch)
    cut = workshop.folder / "other" / whole.name
    cut.parent.mkdir()
    cut.write_bytes(content[: int(length * len(content)) if length == 0.5 else int(length)])
    assert not native.is_built("portable")
    assert native.load("portable").answer() == 42
    assert native.is_built("portable")
    assert workshop.compilations() == 2


def test_a_library_that_no_longer_loads_is_built_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloadable = workshop.cache / native._recipe("portable").file_name(native._KERNELS)
    workshop.cache.mkdir()
    content = b"\x7fELF of another system"
    unloadable.write_bytes(content + hashlib.sha256(content).digest())
    assert native.is_built("portable")
    assert native.load("portable").answer() == 42
    assert workshop.compilations() == 1


# Where


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MXFP4_FX_CACHE_DIR": "{}/own", "XDG_CACHE_HOME": "{}/x", "HOME": "{}/h"}, "own"),
        ({"MXFP4_FX_CACHE_DIR": "~/own", "HOME": "{}/h"}, "h/own"),
        ({"XDG_CACHE_HOME": "{}/x", "HOME": "{}/h"}, "x/mxfp4_fx"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "{}/h"}, "h/.cache/mxfp4_fx"),
        ({"HOME": "{}/h"}, "h/.cache/mxfp4_fx"),
    ],
)
def test_the_environment_says_where_libraries_are_kept(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name in ("MXFP4_FX_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(workshop.folder))
    native.load("portable")
    (library,) = workshop.libraries(workshop.folder)
    assert library.parent == workshop.folder / expected


@pytest.fixture
def unwritable(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that cannot be made, not even by root: below a file."""
    (workshop.folder / "file").touch()
    monkeypatch.setenv("MXFP4_FX_CACHE_DIR", str(workshop.folder / "file" / "cache"))
    return workshop.folder / "temporary" / f"mxfp4_fx-{os.getuid()}"


def test_a_cache_that_cannot_be_written_is_replaced_by_a_private_one(
    workshop: Workshop, unwritable: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert native.load("portable").answer() == 42
    (library,) = workshop.libraries(workshop.folder)
    assert library.parent == unwritable
    assert stat.S_IMODE(unwritable.stat().st_mode) == 0o700
    said = capfd.readouterr().err
    assert "file/cache cannot be used (Not a directory), so the CPU kernels are kept in " in said
    assert str(unwritable) in said


def test_a_library_in_a_cache_that_cannot_be_written_is_used(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.load("portable")
    forget(monkeypatch)
    monkeypatch.setattr(library_files, "locked", pytest.fail)  # it would write
    native.load("portable")
    assert workshop.compilations() == 1


@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_nothing_is_loaded_from_a_temporary_directory_that_may_be_somebody_elses(
    workshop: Workshop, unwritable: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    native.load("portable")  # one that could be loaded
    forget(monkeypatch)
    if how == "a link":
        unwritable.symlink_to(unwritable.rename(unwritable.with_name("target")))
    else:
        unwritable.chmod(0o770)
    assert not native.is_built("portable")
    message = refusal()
    assert f"{unwritable} cannot be used (it is not this user's alone)" in message
    assert "set MXFP4_FX_CACHE_DIR" in message


# Failures


def test_a_missing_compiler_is_named(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX='no-such-compiler' names no program" in refusal()


def test_no_compiler_at_all_gives_the_remedy(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(workshop.folder))
    assert "none of g++, c++, clang++ is installed; install g++ or set CXX" in refusal()


def test_the_compiler_may_be_given_with_arguments(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = workshop.write_compiler().rename(workshop.folder.parent / "compiler")
    monkeypatch.setenv("CXX", f"{program} -DANSWER=7")
    workshop.write_source(SOURCE.replace('#include "answer.h"', ""))
    assert native.load("portable").answer() == 7


def test_the_compilers_errors_are_told(workshop: Workshop) -> None:
    workshop.write_source(SOURCE + "int wrong = not_declared_anywhere;\n")
    message = refusal()
    line = len(SOURCE.splitlines()) + 1
    assert f"\n    kernels.cpp:{line}:13: error: 'not_declared_anywhere'" in message
    assert "install g++ 11 or newer, or set CXX" in message
    assert not workshop.libraries()


def test_a_failure_is_not_tried_again_until_the_environment_changes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.write_source("wrong")
    assert refusal() == refusal()
    assert workshop.compilations() == 1
    workshop.write_source()
    refusal()
    monkeypatch.setenv("MXFP4_FX_CXXFLAGS", "-O1")
    assert native.load("portable").answer() == 42


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (SOURCE + "int lacking(); int use() { return lacking(); }\n", "lacking"),
        (SOURCE.replace("mxfp4_init", "other"), "mxfp4_init"),
    ],
    ids=["undefined symbol", "no entry point"],
)
def test_a_library_that_does_not_load_is_an_error_and_not_kept(
    workshop: Workshop, source: str, word: str
) -> None:
    workshop.write_source(source)
    message = refusal()
    assert "do not load" in message
    assert word in message
    assert not workshop.libraries()


def test_what_the_system_refuses_is_an_error(workshop: Workshop) -> None:
    source = SOURCE.replace("init(void) { return 0; }", f"init(void) {{ return {errno.EPERM}; }}")
    workshop.write_source(source)
    assert refusal() == (
        "the portable CPU kernels need what the system refuses: Operation not permitted"
    )


def test_a_compiler_that_hangs_is_stopped_with_its_children(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, finished = workshop.folder / "pid", workshop.folder / "finished"
    workshop.write_compiler(
        f"sleep 3600 & echo $! > {shlex.quote(str(pid))}\nwait; touch {shlex.quote(str(finished))}"
    )
    # Time passes once it hangs, and not before.
    readings = itertools.count(step=1e6)
    clock = SimpleNamespace(monotonic=lambda: next(readings) if is_written(pid) else 0.0)
    monkeypatch.setattr(compiler, "time", clock)
    assert "was stopped after 300 s" in refusal()
    child = int(pid.read_text())
    wait_until(lambda: not is_alive(child), "the compiler's child to end")
    assert not finished.exists()


def test_missing_sources_are_named(workshop: Workshop) -> None:
    (workshop.sources / "kernels.cpp").unlink()
    assert refusal().endswith("kernels.cpp is missing; install mxfp4_fx again")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert refusal() == f"the CPU kernels run on Linux only, and this is {system}"


# What is said


def test_it_says_when_it_compiles_and_only_then(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    native.load("portable")
    first, last = capfd.readouterr().err.splitlines()
    assert first == "mxfp4_fx: compiling the CPU kernels (portable), once for this machine ..."
    assert last.startswith("mxfp4_fx: ... done in ")
    forget(monkeypatch)
    native.load("portable")
    assert capfd.readouterr().err == ""


def test_a_terminal_shows_how_long_it_takes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as screen, open(theirs, "w") as terminal:
        shown = b""

        def watch() -> None:
            nonlocal shown
            while not re.search(rb"\nmxfp4_fx: \.\.\. \d+ s\r", shown):
                shown += screen.read(10_000)
            go.touch()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        monkeypatch.setattr(sys, "stderr", terminal)
        native.load("portable")
        thread.join()


def test_nobody_needs_to_listen(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert native.load("portable").answer() == 42
    assert capsys.readouterr().out == ""


# OpenMP


def test_threads_are_torchs(workshop: Workshop) -> None:
    """Neither a second runtime nor a second pool of threads, and torch's setting counts."""
    printed = workshop.run("""
torch.set_num_threads(3)
torch.rand(1 << 22).add_(1)
before, threads = runtimes(), len(os.listdir("/proc/self/task"))
library = native.load("portable")
assert runtimes() == before, runtimes() - before
assert library.max_threads() == 3
torch.set_num_threads(2)
assert library.max_threads() == 2
torch.set_num_threads(3)
assert library.team() == 3
print(len(os.listdir("/proc/self/task")) - threads)
""")
    assert printed == "0\n"


@pytest.mark.exhaustive
def test_a_runtime_of_another_name_is_the_only_one_linked(workshop: Workshop) -> None:
    """As in wheels that bring a libgomp under a name of their own."""
    runtime = Path(native._openmp_runtime())
    old = runtime.name.encode()
    renamed = workshop.folder / f"x{runtime.name[1:]}"
    content = runtime.read_bytes()
    assert content.count(b"\0" + old + b"\0") == 1  # its SONAME
    new = b"\0x" + old[1:] + b"\0"
    renamed.write_bytes(content.replace(b"\0" + old + b"\0", new))
    workshop.run(f"""
ctypes.CDLL({str(renamed)!r})
native._TORCH = {str(renamed)!r}
assert native.load("portable").team() > 0
""")
    (library,) = workshop.libraries()
    assert new in library.read_bytes()
    assert not any(b"\0" + name in library.read_bytes() for name in (b"libgomp", b"libomp"))


def test_another_runtime_gives_a_new_library(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.load("portable")
    other = workshop.folder / Path(native._openmp_runtime()).name
    other.write_bytes(Path(native._openmp_runtime()).read_bytes() + b"\0")
    monkeypatch.setattr(native, "_openmp_runtime", lambda: str(other))
    assert not native.is_built("portable")


def test_a_torch_without_openmp_is_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_TORCH", "libc.so.6")
    assert f"torch {torch.__version__} has no OpenMP" in refusal()
