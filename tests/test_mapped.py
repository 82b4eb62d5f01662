"""Tensors in mapped files: found, read ahead, and given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from models import model
from safetensors.torch import load_file, save_file
from torch import nn

import mxfp4_fx
from mxfp4_fx.weights import mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")


def test_what_is_in_a_mapped_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(5000)}, tmp_path / "w.safetensors")
    in_file = load_file(tmp_path / "w.safetensors")["w"]
    here = torch.ones(5000)
    of_numpy = torch.from_numpy(torch.ones(5000).numpy().copy())
    files = mapped.mapped_files()
    assert [mapped.is_mapped(t, files) for t in (in_file, here, of_numpy)] == [True, False, False]


def pages_of_cache(path: Path) -> int:
    """How many pages of a file the system has in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        count = -(-len(pages) // mmap.PAGESIZE)
        is_cached = (ctypes.c_ubyte * count)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        libc = ctypes.CDLL(None)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), is_cached) == 0
        return sum(entry & 1 for entry in is_cached)


def resident_kilobytes(tensor: torch.Tensor) -> int:
    """How much of a mapped file this process has in its own memory."""
    found = re.finditer(
        r"^([0-9a-f]+)-([0-9a-f]+) .*\n(?:.+: .*\n)*?Rss: +([0-9]+) kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE,
    )
    return next(
        int(one[3]) for one in found if int(one[1], 16) <= tensor.data_ptr() < int(one[2], 16)
    )


def test_pages_given_back_stay_in_the_systems_cache(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(50_000)}, path)
    in_file = load_file(path)["w"]
    assert torch.equal(in_file, torch.ones(50_000))
    before, cached = resident_kilobytes(in_file), pages_of_cache(path)
    mapped.page_out([in_file])
    assert resident_kilobytes(in_file) < before / 2
    assert pages_of_cache(path) == cached
    assert torch.equal(in_file, torch.ones(50_000))


@pytest.mark.parametrize("at", [0, 25_000, 49_999])
def test_no_write_is_lost_with_pages_given_back(tmp_path: Path, at: int) -> None:
    save_file({"w": torch.ones(50_000)}, tmp_path / "w.safetensors")
    in_file = load_file(tmp_path / "w.safetensors")["w"]
    in_file[at] = 2
    mapped.page_out([in_file])
    assert (in_file[at].item(), in_file.sum().item()) == (2, 50_001)


# ---- read ahead


NUMBERS = 200_000


def of_file(folder: Path) -> tuple[Path, nn.Parameter]:
    """A parameter in a mapped file, of which the system has nothing in memory."""
    path = folder / "w"
    path.write_bytes(torch.ones(NUMBERS).numpy().tobytes())
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_of_cache(path) > 0:
        pytest.skip("a file system in memory")
    return path, nn.Parameter(torch.from_file(str(path), size=NUMBERS))


def test_what_is_read_ahead_is_in_the_systems_cache_and_not_in_the_process(tmp_path: Path) -> None:
    path, parameter = of_file(tmp_path)
    before = resident_kilobytes(parameter)
    thread = mapped.read_ahead([parameter, torch.ones(5)])
    assert thread is not None
    thread.join()
    assert pages_of_cache(path) == -(-NUMBERS * 4 // mmap.PAGESIZE)
    assert resident_kilobytes(parameter) == before


@pytest.mark.parametrize("tied", [False, True])
def test_compile_reads_a_models_experts_ahead_and_then_all_but_its_embedding(
    monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Layer by layer, as they are swizzled. A tied embedding is read as the head that it is."""
    seen: list[tuple[list[torch.Tensor], ...]] = []
    monkeypatch.setattr(mapped, "read_ahead", lambda *given: seen.append((*map(list, given),)))
    whole = model(tie_word_embeddings=tied)
    mxfp4_fx.compile(whole)
    names = {id(p): name for name, p in whole.named_parameters(remove_duplicate=False)}
    ((experts, others),) = ([[names[id(t)] for t in part] for part in call] for call in seen)
    is_read = [*names.values()] if tied else [n for n in names.values() if "embed" not in n]
    assert experts == [name for name in is_read if ".experts." in name]
    assert sorted(others) == sorted(name for name in is_read if ".experts." not in name)


@pytest.mark.parametrize(("limit", "used"), [(10, 0), (10_000_000, 9_500_000)])
def test_nothing_is_read_ahead_for_which_a_container_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, used: int
) -> None:
    _, parameter = of_file(tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(mapped, "_LIMIT", tmp_path)
    assert mapped.read_ahead([parameter]) is None


def test_a_container_without_a_limit_has_the_systems_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, parameter = of_file(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    monkeypatch.setattr(mapped, "_LIMIT", tmp_path)
    assert mapped.read_ahead([parameter]) is not None


@pytest.mark.parametrize(("limit", "is_read"), [(2, True), (1.9, False)])
def test_others_are_read_where_there_is_room_for_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, is_read: bool
) -> None:
    parts = []
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
        parts.append(of_file(tmp_path / name))
    monkeypatch.setattr(mapped, "_free_bytes", lambda: limit * NUMBERS * 4)
    thread = mapped.read_ahead([parts[0][1]], [parts[1][1]])
    assert thread is not None
    thread.join()
    assert [pages_of_cache(path) > 0 for path, _ in parts] == [True, is_read]


def test_what_a_thread_reads_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has ended: then the system may have dropped it again."""
    _, parameter = of_file(tmp_path)
    go_on, begun = threading.Event(), []
    monkeypatch.setattr(mapped, "_read", lambda parts: (begun.append(parts), go_on.wait()))
    thread = mapped.read_ahead([parameter])
    assert thread is not None
    assert mapped.read_ahead([parameter]) is None
    go_on.set()
    thread.join()
    again = mapped.read_ahead([parameter])
    assert again is not None
    again.join()
    assert begun[0] == begun[1]


def test_other_systems_are_not_asked_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mapped, "_free_bytes", None)
    assert mapped.read_ahead([torch.ones(5)], [torch.ones(5)]) is None


def test_a_file_that_is_gone_is_not_read_ahead(tmp_path: Path) -> None:
    path, parameter = of_file(tmp_path)
    path.unlink()
    thread = mapped.read_ahead([parameter])
    assert thread is not None
    thread.join()
    assert parameter.sum().item() == NUMBERS


def test_a_file_that_is_gone_keeps_no_other_from_being_read_ahead(tmp_path: Path) -> None:
    for name in ("gone", "there"):
        (tmp_path / name).mkdir()
    gone, parameter = of_file(tmp_path / "gone")
    path, other = of_file(tmp_path / "there")
    gone.unlink()
    thread = mapped.read_ahead([parameter, other])
    assert thread is not None
    thread.join()
    assert pages_of_cache(path) > 0


def test_tensors_without_a_storage_are_not_read_ahead() -> None:
    sparse = nn.ParameterList([nn.Parameter(torch.eye(3).to_sparse())])
    assert mapped.read_model_ahead(sparse, []) is None
