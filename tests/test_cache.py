"""Torch's caches on disk: no weight is in a key or in an entry, and what fits is found again.

What of this package enters the keys is tested too, and that a broken cache costs time alone.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import hidden, mlp
from near_miss import edited
from torch._dynamo.utils import counters
from torch._inductor import codecache, cpp_builder
from torch._inductor.utils import clear_caches, fresh_cache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from mxfp4_fx import backend
from mxfp4_fx.core import hardware
from mxfp4_fx.ops import fingerprint

pytestmark = pytest.mark.usefixtures("no_gradients")

BOUND = 2 * (64 + 96) * 2**-24  # of the largest: both sides sum H and then I products in float32


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a cache with the MLP that :func:`compile_anew` compiles."""
    path = tmp_path_factory.mktemp("cache") / "filled"
    with torch.no_grad(), fresh_cache():
        assert not is_found(compile_anew())
        shutil.copytree(os.environ["TORCHINDUCTOR_CACHE_DIR"], path)
    return path


@pytest.fixture
def cache(filled: Path) -> Iterator[Path]:
    """The directory of such a cache for one test."""
    with fresh_cache():
        path = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        shutil.copytree(filled, path, dirs_exist_ok=True)
        yield path


def compile_anew(seed: int = 1, options: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Compile an MLP as a new process would, and check its result; what the caches say."""
    torch.compiler.reset()
    clear_caches()  # those in memory
    counters.clear()
    module, x = mlp(seed=seed), hidden()
    out, expected = torch.compile(module, backend="mxfp4", options=options)(x)[0], module(x)[0]
    assert (out - expected).abs().max() <= BOUND * expected.abs().max()
    return {**counters["aot_autograd"], **counters["inductor"]}


def is_found(counted: dict[str, int]) -> bool:
    hits = counted.get("autograd_cache_hit", 0), counted.get("fxgraph_cache_hit", 0)
    misses = counted.get("autograd_cache_miss", 0), counted.get("fxgraph_cache_miss", 0)
    assert (hits, misses) in (((1, 1), (0, 0)), ((0, 0), (1, 1)))
    return hits == (1, 1)


# ---- keys


def test_other_weights_hit_the_cache_and_are_right(cache: Path) -> None:
    assert is_found(compile_anew(seed=2))


def test_other_ops_other_options_and_the_users_tag_miss_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.compiler.config.patch(cache_key_tag="mine"):
        assert not is_found(compile_anew())
        assert torch.compiler.config.cache_key_tag == "mine"
    assert not is_found(compile_anew(options={"kernels": "reference"}))
    assert is_found(compile_anew())
    monkeypatch.setattr(backend, "fingerprint", lambda: "another version")
    assert not is_found(compile_anew())


def test_what_another_transformers_does_misses_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"return hidden_states,": "return hidden_states * 2,"}
    monkeypatch.setattr(GptOssMLP, "forward", edited(GptOssMLP.forward, changed))
    assert not is_found(compile_anew())


def test_the_fingerprint_is_of_the_version_and_the_cpus_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present = fingerprint.fingerprint()
    monkeypatch.setattr(fingerprint, "__version__", "0.0.0")
    assert fingerprint.fingerprint() == present.replace(present.split("-")[1], "0.0.0") != present
    monkeypatch.undo()
    for path in ("portable", "no such path"):
        monkeypatch.setenv("MXFP4_FX_CPU", path)
        hardware.cpu_path.cache_clear()
        assert fingerprint.fingerprint() != present
    monkeypatch.undo()
    hardware.cpu_path.cache_clear()
    assert fingerprint.fingerprint() == present


@pytest.mark.parametrize("folder", ["core", "ops", "passes", "weights", "."])
def test_the_fingerprint_is_of_the_sources(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass may leave a graph to Inductor that the next version computes otherwise."""
    package = tmp_path / "mxfp4_fx"
    present = fingerprint.fingerprint()
    shutil.copytree(Path(fingerprint.__file__).parents[1], package)
    (package / "ops" / "note.txt").touch()
    monkeypatch.setattr(fingerprint, "__file__", str(package / "ops/fingerprint.py"))
    assert fingerprint.fingerprint() == present
    fingerprint._hash_of.cache_clear()
    with next((package / folder).glob("*.py")).open("a") as file:
        file.write("\n")
    assert fingerprint.fingerprint() != present


# ---- a broken cache


def cut(directory: Path, *parts: str) -> None:
    """Cut files off whose paths have one of the parts, as a full disk does.

    Each is a new file: what a process has mapped of the old one stays.
    """
    files = [f for f in directory.rglob("*") if f.is_file() and any(p in str(f) for p in parts)]
    assert files
    for file in files:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:64])


def test_broken_entries_are_made_anew(cache: Path) -> None:
    cut(cache, "aotautograd", "fxgraph")
    assert not is_found(compile_anew())


@pytest.mark.parametrize("text", ["import ctypes,", exhaustive("import no_"), exhaustive("asyn")])
def test_a_broken_file_of_an_entry_costs_a_compilation_and_is_told(
    cache: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    for file in cache.rglob("*.py"):
        file.write_text(text)
    with caplog.at_level(logging.WARNING, "mxfp4_fx"):
        found = compile_anew()
    assert found["autograd_cache_miss"] == 1
    (told,) = (record.message for record in caplog.records if record.name == "mxfp4_fx.backend")
    assert "torch's compile cache seems to be broken" in told


@pytest.mark.exhaustive
def test_a_broken_precompiled_header_costs_a_compilation_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose precompilation was ended by force: only its beginning is there."""
    (tmp_path / "empty.h").touch()
    # With debug information, as Inductor has it: the compiler passes over headers that differ.
    command = f"{cpp_builder.get_cpp_compiler()} -g1 -x c++-header empty.h -o empty.gch"
    subprocess.run(command.split(), check=True, cwd=tmp_path)
    beginning = (tmp_path / "empty.gch").read_bytes()[:64]
    work = codecache._worker_compile_cpp

    def end_early(lock: str, builders: Any) -> None:
        if not lock.startswith(str(tmp_path)):
            work(lock, builders)
        for builder in builders if lock.startswith(str(tmp_path)) else ():
            Path(builder.get_target_file_path()).write_bytes(beginning)

    precompile = functools.cache(codecache._precompile_header.__wrapped__)
    monkeypatch.setattr(codecache, "_precompile_header", precompile)
    monkeypatch.setattr(codecache, "_worker_compile_cpp", end_early)
    monkeypatch.setattr(codecache, "_HEADER_DIR", str(tmp_path))
    monkeypatch.setattr(codecache, "_HEADER_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setattr(backend, "_headers_are_broken", threading.Event())
    with fresh_cache(), caplog.at_level(logging.WARNING, "mxfp4_fx"):
        compile_anew()
    with fresh_cache(), caplog.at_level(logging.WARNING, "mxfp4_fx"):
        compile_anew()  # and is told once
    (told,) = (record.message for record in caplog.records if record.name == "mxfp4_fx.backend")
    assert "torch's precompiled C++ headers seem to be broken" in told


def test_what_inductor_cannot_compile_is_an_error_with_its_own_message(cache: Path) -> None:
    with pytest.raises(Exception, match="no_such_option"):
        compile_anew(options={"inductor": {"no_such_option": 1}})


# ---- a second process

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_grad_enabled(False)
import test_cache
print(json.dumps(test_cache.compile_anew(seed=int(sys.argv[2]))))
"""


def in_a_process(directory: Path, seed: int) -> tuple[dict[str, int], str]:
    """What the caches in a directory say to a new process, and what that writes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(seed)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted, done.stderr


@pytest.mark.exhaustive
def test_a_second_process_finds_what_the_first_made_and_survives_broken_libraries(
    filled: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(filled, tmp_path / "cache")
    assert is_found(in_a_process(directory, 2)[0])
    cut(directory, ".main.so")  # not torch's own test of the CPU's instructions, which it needs
    found, told = in_a_process(directory, 3)
    assert found["autograd_cache_miss"] == 1
    assert "torch's compile cache seems to be broken" in told
