"""``make versions``: what it plans, runs and writes. Nothing here is installed or downloaded."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from versions import cuda_stubs, releases, table
from versions.behaviours import BEHAVIOURS, PASSES, TESTS


def test_the_plan_is_the_oldest_version_and_the_last_of_each_minor_one() -> None:
    found = ["2.13.0+cpu", "2.13.0", "2.12.1", "2.12.0", "2.11.2", "2.11.0", "2.10.0", "2.9.1"]
    assert releases.plan(found, "2.11.0") == ["2.11.0", "2.11.2", "2.12.1", "2.13.0"]


@pytest.mark.parametrize("package", BEHAVIOURS)
def test_the_oldest_versions_are_declared(package: str) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", releases.oldest(package))


def distribution(folder: Path, *requirements: str) -> Path:
    """Write what pip leaves of a package, with these requirements, into a folder."""
    info = folder / "some_package-1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: some-package", "Version: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    return folder


def test_what_a_release_needs_besides(tmp_path: Path) -> None:
    met = ("torch>=2", "some-package<2", 'tomli; python_version < "3"', "nvidia-nccl==2; extra==''")
    unmet = ("torch<2", "no-such-package", 'kernels<0.1; extra == "kernels"')
    found = releases.unmet(distribution(tmp_path, *met, *unmet, 'numpy<1; extra == "dev"'))
    assert found == {"torch<2", "no-such-package", "kernels<0.1"}


def test_each_behaviour_names_tests_that_there_are() -> None:
    for shown in BEHAVIOURS.values():
        for test in (test for tests in shown.values() for test in tests):
            file, *names = test.partition("[")[0].split("::")
            source = (TESTS / file).read_text("utf-8")
            for name in names:
                assert re.search(rf"^ *(def|class) {name}", source, re.MULTILINE), test


def test_outcomes_are_those_of_the_tests(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = exhaustive\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "@pytest.mark.parametrize('n', (1, 2))\n"
        "def test_half(n): assert n == 1\n"
        "def test_left_out(): pytest.skip('no reason')\n"
        "def test_of_nothing(): assert False\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\ndef test_any(): pass\n")
    behaviours = {
        "right": ["test_some.py::test_right"],
        "half": ["test_some.py::test_half["],
        "left out": ["test_some.py::test_left_out"],
        "broken": ["test_broken.py::test_any", "test_some.py::test_right"],
    }
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(TESTS)!r})
from versions import behaviours
found = behaviours.run({behaviours!r}, pathlib.Path({str(tmp_path)!r}))
print()
print(found)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert eval(ended.stdout.splitlines()[-1]) == {
        "right": PASSES,
        "half": "assert 2 == 1",
        "left out": "no test ran",
        "broken": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_stubs_stand_for_libraries_that_are_not_there(tmp_path: Path) -> None:
    needing, folder = tmp_path / "libneeding.so", tmp_path / "stubs"
    missing, script = tmp_path / "libmissing.so.1", tmp_path / "versions"
    script.write_text("MISSING_1 { missing_function; };")
    versioned = f"-Wl,-soname,libmissing.so.1,--version-script={script}"
    build("int missing_function(void) { return 1; }", missing, versioned)
    build(
        "int missing_function(void); int ask(void) { return missing_function(); }", needing, missing
    )
    missing.unlink()
    with pytest.raises(OSError, match=r"libmissing\.so\.1"):
        ctypes.CDLL(str(needing))
    ask = f"import ctypes; print(ctypes.CDLL({str(needing)!r}).ask())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(cuda_stubs.make(tmp_path, folder))}
    printed = subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True)
    assert int(printed) == 100


def build(source: str, library: Path, *options: Any) -> None:
    command = [os.environ.get("CXX", "g++"), "-x", "c", "-shared", "-fPIC", "-", "-o", library]
    command += ["-x", "none", *options]
    subprocess.run(list(map(str, command)), input=source, text=True, check=True)


def test_no_stubs_where_nothing_is_missing(tmp_path: Path) -> None:
    assert cuda_stubs.make(tmp_path, tmp_path / "stubs") is None


RESULTS: dict[str, Any] = {
    "torch": {
        "versions": {
            "2.9.0": {"saving": PASSES, "loading": "RuntimeError: no"},
            "2.10.0": {"saving": PASSES, "loading": PASSES},
            "2.11.0": {"saving": PASSES, "loading": PASSES},
            "2.12.0": {"error": "torch==2.12.0: no such release"},
            "2.13.0": {"saving": "no test ran", "loading": "no"},
            "2.14.0": {"saving": PASSES},
        }
    }
}


def test_neighbouring_versions_of_which_the_same_passes_share_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "BEHAVIOURS", {"torch": {"saving": (), "loading": ()}})
    lines = table.markdown(RESULTS).split("\n\n")[0].splitlines()
    assert lines[2:] == [
        "| torch | 2.9.0 | all but loading |",
        "| torch | 2.10.0, 2.11.0 | all |",
        "| torch | 2.12.0 | not run: torch==2.12.0: no such release |",
        "| torch | 2.13.0 | nothing |",
        "| torch | 2.14.0 | all; not run: loading |",
    ]


def test_only_the_table_of_the_readme_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "versions.json")
    table.write(RESULTS)
    text = readme.read_text()
    assert text == f"before\n{table.BEGIN}{table.markdown(RESULTS)}{table.END}after\n"
    assert table.read() == RESULTS


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    assert table.markdown(table.read()) in table.README.read_text("utf-8")
