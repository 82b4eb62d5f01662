"""The build of the CPU's libraries: units side by side, weights first, in a thread if need be."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import write_packed
from combinations import exhaustive
from native_workshop import (
    SOURCE,
    WEIGHTS,
    Workshop,
    forget,
    join_loaders,
    loaders,
    refusal,
    set_up,
    use_units,
)
from processes import LAST_RESORT, is_alive, is_written, until_there, wait_until

import mxfp4_fx
from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError, NativeBuildError
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.huggingface.packed_quantizer import _is_for_cpu
from mxfp4_fx.ops import cpu_panels, native, target

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels run on Linux only")

SOURCES = native._SOURCES
WRONG = "int wrong = not_declared_anywhere;\n"


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    made = set_up(tmp_path, monkeypatch)
    yield made
    (made.folder / "go").touch()  # a test that failed may have left a compiler that waits
    join_loaders()


def weights_refusal() -> str:
    with pytest.raises(NativeBuildError) as raised:
        native.load_weights("portable")
    return str(raised.value)


def until_weights(workshop: Workshop) -> str:
    """Return a shell command that waits until the weights' library can be loaded."""
    library = f"{shlex.quote(str(workshop.cache))}/*-weights-*.so"
    return f"until ls {library} > /dev/null 2>&1; do sleep 0.1; done"


# ---- units


def test_the_units_are_the_sources() -> None:
    """A unit that is not linked would lack at the first call of its functions."""
    assert sorted(native._KERNELS.units) == sorted(p.name for p in native._SOURCES.glob("*.cpp"))
    assert set(native._WEIGHTS.units) < set(native._KERNELS.units)


@pytest.mark.parametrize("cores", [1, 3])
def test_as_many_compilers_run_as_there_are_cores(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    units = ("weights", "kernels", "third")
    begun, ended = workshop.folder / "begun", workshop.folder / "ended"
    # Each waits until so many have begun as there are cores, and counts those that have.
    begun.mkdir()
    ended.mkdir()
    count = f"ls {shlex.quote(str(begun))} | wc -l"
    workshop.write_compiler(
        f"touch {shlex.quote(str(begun))}/$unit\n"
        f"while [ $({count}) -lt {cores} ]; do sleep 0.05; done\n"
        f"{count} > {shlex.quote(str(ended))}/$unit",
        unit="*.cpp",
    )
    workshop.write_source(third="")
    use_units(monkeypatch, *(f"{unit}.cpp" for unit in units))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert native.load("portable").answer() == 42
    found = [int((ended / f"{unit}.cpp").read_text()) for unit in units]
    assert found == ([1, 2, 3] if cores == 1 else [3, 3, 3])


def test_the_first_unit_that_fails_ends_the_others(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = workshop.folder / "pid"
    hangs = f"echo $$ > {shlex.quote(str(pid))}; exec sleep 3600"
    waits = until_there(pid)
    workshop.write_compiler(
        f"case $unit in kernels.cpp) {hangs};; bad.cpp) {waits};; esac", unit="*.cpp"
    )
    use_units(monkeypatch, "weights.cpp", "kernels.cpp", "bad.cpp", "behind.cpp")
    workshop.write_source(bad=WRONG, behind="")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    message = refusal()
    assert "\n    bad.cpp:1:13: error: 'not_declared_anywhere'" in message
    assert message.count("cannot compile the CPU kernels") == 1
    assert not is_alive(int(pid.read_text()))
    assert workshop.compilations("behind.cpp") == 0
    assert not [*workshop.cache.glob("*.building")]


def test_an_interrupt_ends_every_compiler_and_leaves_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = [workshop.folder / f"{unit}.pid" for unit in ("weights", "kernels")]
    folder = shlex.quote(str(workshop.folder))
    workshop.write_compiler(f"echo $$ > {folder}/${{unit%.cpp}}.pid; exec sleep 3600", unit="*.cpp")

    def tick() -> None:
        if all(map(is_written, pids)):
            raise KeyboardInterrupt

    monkeypatch.setattr(native, "announced", lambda title: contextlib.nullcontext(tick))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(KeyboardInterrupt):
        native.load("portable")
    assert not any(is_alive(int(pid.read_text())) for pid in pids)
    assert [file.name for file in workshop.cache.iterdir()] == ["portable.lock"]
    # It was no failure: who asks again gets them.
    workshop.write_compiler()
    assert native.load("portable").answer() == 42


# ---- weights


def test_weights_do_not_wait_for_the_kernels(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    thread = native.load_in_thread("portable")
    assert native.load_weights("portable").weights_answer() == 12
    assert native.load_weights("portable") is native.load_weights("portable")
    assert thread.is_alive()
    assert not native.is_built("portable")
    go.touch()
    assert native.load("portable").answer() == 42
    thread.join()
    assert workshop.compilations("weights.cpp") == workshop.compilations() == 1
    assert capfd.readouterr().err.count("compiling the CPU kernels") == 1


def test_who_needs_weights_first_begins_the_whole_build(workshop: Workshop) -> None:
    assert native.load_weights("portable").weights_answer() == 12
    assert native.load("portable").answer() == 42
    assert workshop.compilations("weights.cpp") == workshop.compilations() == 1


def test_weights_are_served_where_the_kernels_cannot_be_compiled(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.write_source(SOURCE + WRONG)
    workshop.write_compiler(before=until_weights(workshop))
    assert "not_declared_anywhere" in refusal()
    assert native.load_weights("portable").weights_answer() == 12
    forget(monkeypatch)  # another process finds them, and does not compile anything for them
    assert native.load_weights("portable").weights_answer() == 12
    assert workshop.compilations("weights.cpp") == workshop.compilations() == 1


@pytest.mark.parametrize("first", ["kernels", "weights"])
def test_weights_that_cannot_be_compiled_are_an_error_of_both(
    workshop: Workshop, first: str
) -> None:
    workshop.write_source(weights=WRONG)
    told = [refusal(), weights_refusal()] if first == "kernels" else [weights_refusal(), refusal()]
    assert "\n    weights.cpp:1:13: error: 'not_declared_anywhere'" in told[0]
    assert told[0] == told[1] == weights_refusal()
    assert workshop.compilations("weights.cpp") == 1


def test_loaded_kernels_serve_weights_too(workshop: Workshop) -> None:
    kernels = native.load("portable")
    assert native.load_weights("portable") is kernels


def test_kernels_serve_where_the_weights_library_is_lost(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.load("portable")
    (lost,) = workshop.libraries(name="weights")
    lost.unlink()
    forget(monkeypatch)
    assert native.load_weights("portable") is native.load("portable")
    assert workshop.compilations() == 1


def test_weights_that_come_out_wrong_are_refused(workshop: Workshop) -> None:
    workshop.write_source(weights=WEIGHTS.replace("return 0", f"return {errno.EDOM}"))
    assert weights_refusal().startswith("the portable CPU kernels compute wrong results")


@pytest.mark.parametrize(
    ("header", "right", "wrong"),
    [
        # The inverse of itself still: only the bytes of a panel tell.
        ("swizzle.h", "(dword ^ dword >> 12) & 0xf0f0", "(dword ^ dword >> 12) & 0xf0e0"),
        exhaustive("quantize.h", "FRACTION_BITS) - 2, 0)", "FRACTION_BITS) - 1, 0)"),
        exhaustive("mxfp8.h", "(bits >> 24 & 0x80)", "(bits >> 24 & 0)"),
    ],
)
def test_a_faulty_compiler_is_noticed_before_any_weight_is_swizzled(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, header: str, right: str, wrong: str
) -> None:
    use_real_weights(workshop, monkeypatch)
    source = (workshop.sources / header).read_text()
    assert source.count(right) == 1
    (workshop.sources / header).write_text(source.replace(right, wrong))
    assert weights_refusal().startswith("the portable CPU kernels compute wrong results")


def use_real_weights(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the real weights' unit, with kernels that do not compile."""
    for header in SOURCES.glob("*.h"):
        (workshop.sources / header.name).write_bytes(header.read_bytes())
    workshop.write_source(SOURCE + WRONG, weights=(SOURCES / "weights.cpp").read_text())
    workshop.write_compiler(before=until_weights(workshop))
    monkeypatch.setenv("MXFP4_FX_CXXFLAGS", "-O0")


@pytest.mark.exhaustive
def test_weights_do_not_wait_for_the_kernels_that_another_process_compiles(
    workshop: Workshop,
) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    builder = workshop.start("native.load('portable')")
    wait_until(lambda: workshop.compilations() == 1, "the kernels' compiler")
    try:
        code = "print(native.load_weights('portable').weights_answer(), flush=True)"
        assert workshop.run(code) == "12\n"
        assert builder.poll() is None
    finally:
        go.touch()
        builder.communicate(timeout=LAST_RESORT)


def test_swizzling_needs_no_kernels(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real weights' unit, alone: each function of ``cpu_panels`` finds what it calls."""
    use_real_weights(workshop, monkeypatch)
    panels = LAYOUTS["cpu_panels"]
    blocks = torch.randint(0, 256, (2, 34, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 34, 3), dtype=torch.uint8)
    out = cpu_panels.empty(2, 34, 96)
    cpu_panels.swizzle(blocks, scales, *out)
    for expert in range(2):
        expected = panels.swizzle(blocks[expert], scales[expert])
        assert all(map(torch.equal, (part[expert] for part in out), expected))
    back = torch.empty_like(blocks), torch.empty_like(scales)
    cpu_panels.unswizzle(*out, *back)
    assert torch.equal(back[0], blocks)
    cpu_panels.quantize(torch.randn(2, 34, 96), *out)
    with pytest.raises(NativeBuildError, match="not_declared_anywhere"):
        native.load(hardware.cpu_path())
    # Nothing reads these panels, so no more are made ahead.
    assert target.native_layout("auto") == ""


# ---- the thread


def test_one_thread_loads_a_path(workshop: Workshop) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    thread = native.load_in_thread("portable")
    assert native.load_in_thread("portable") is thread
    go.touch()
    thread.join()
    assert native.libraries.loaded["portable"].answer() == 42


@pytest.mark.parametrize("is_locked", [False, exhaustive(True)])
def test_an_interpreter_that_ends_stops_its_thread(workshop: Workshop, is_locked: bool) -> None:
    """Whether that compiles or waits for another process, which goes on."""
    pid, stop = workshop.folder / "pid", workshop.folder / "stop"
    hangs = f"echo $$ > {shlex.quote(str(pid))}; {until_there(stop)}"
    workshop.write_compiler(before=hangs)
    other = workshop.start("native.load('portable')") if is_locked else None
    if other:
        wait_until(lambda: is_written(pid), "the other's compiler")
    try:
        process = workshop.start("""
native.load_in_thread('portable')
input()
""")
        assert process.stderr is not None
        said = process.stderr.readline()
        assert ("waiting for it" in said) == is_locked, said
        wait_until(lambda: is_written(pid), "the compiler")
        _, errors = process.communicate("\n", timeout=LAST_RESORT)
        assert process.returncode == 0, errors
        assert ("stopped after" in errors) != is_locked
        assert "Traceback" not in errors
        assert is_alive(int(pid.read_text())) == is_locked
        assert len([*workshop.cache.glob("*.building")]) == is_locked
    finally:
        stop.touch()
        if other:
            other.communicate(timeout=LAST_RESORT)
    if other:
        assert other.returncode == 0
        assert native.is_built("portable")


FORK = """
import signal
thread = native.load_in_thread("portable")
native.load_weights("portable")
child = os.fork()
if not child:
    signal.alarm({limit})
    assert not thread.is_alive()
    answers = [native.load_weights("portable").weights_answer()]
    Path({go!r}).touch()
    answers.append(native.load("portable").answer())
    os._exit(answers != [12, 42])
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(native.load("portable").answer())
"""


def test_a_forked_child_does_not_wait_for_the_thread_that_it_lacks(workshop: Workshop) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    code = FORK.format(go=str(go), limit=int(LAST_RESORT))
    assert workshop.run("import warnings; warnings.simplefilter('ignore')" + code) == "0\n42\n"
    assert workshop.compilations() == 1


ENDING_FORK = """
import sys, warnings
warnings.simplefilter("ignore")
thread = native.load_in_thread("portable")
native.load_weights("portable")
child = os.fork()
if not child:
    sys.exit()  # and not os._exit, as multiprocessing's children end
os.waitpid(child, 0)
Path({go!r}).touch()
print(native.load("portable").answer())
"""


def test_a_forked_child_that_ends_leaves_the_build_alone(workshop: Workshop) -> None:
    go = workshop.folder / "go"
    workshop.write_compiler(before=until_there(go))
    assert workshop.run(ENDING_FORK.format(go=str(go))) == "42\n"


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ("cpu", True),
        (torch.device("cpu"), True),
        ({"": "cpu"}, True),
        ({"model": torch.device("cpu"), "lm_head": "cpu"}, True),
        ({"model": "cpu", "lm_head": 0}, False),
        ({"model": "cpu", "lm_head": "disk"}, False),
        ("cuda", False),
        ("auto", torch.accelerator.current_accelerator() is None),
        (None, torch.accelerator.current_accelerator() is None),
    ],
)
def test_a_map_says_whether_experts_go_to_the_cpu(device_map: object, expected: bool) -> None:
    assert _is_for_cpu(device_map) is expected


# ---- loading a model


def test_loading_packed_experts_begins_the_build_and_waits_for_nothing(
    workshop: Workshop, tmp_path: Path
) -> None:
    go, path = workshop.folder / "go", hardware.cpu_path()
    workshop.write_compiler(before=until_there(go))
    mxfp4_fx.from_pretrained(write_packed(tmp_path / "packed"), device_map="cpu")
    (thread,) = loaders()
    assert thread.path == path
    assert not native.is_built(path)
    go.touch()
    thread.join()
    assert native.libraries.loaded[path].answer() == 42
    assert workshop.compilations() == 1


def test_who_needs_the_kernels_meets_what_the_build_met(workshop: Workshop, tmp_path: Path) -> None:
    workshop.write_source(SOURCE + WRONG)
    mxfp4_fx.from_pretrained(write_packed(tmp_path / "packed"), device_map="cpu")
    with pytest.raises(KernelsUnavailableError, match="not_declared_anywhere"):
        target.choose(torch.device("cpu"), "cpu")
    assert workshop.compilations() == 1
