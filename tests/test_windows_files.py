"""Checkpoints are written under Windows' rules for files, which this system does not have."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY, convert, edit_tensors, files, randomize, write_dense

from mxfp4_fx.checkpoints.random_weights import write_random_checkpoint
from mxfp4_fx.checkpoints.safetensors_file import take_place

fcntl = pytest.importorskip("fcntl")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def is_held(path: Any) -> bool:
    """Whether this process has a file open or mapped that is, or lies in, ``path``."""
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return os.path.realpath(path) in "\n".join([*opened, Path("/proc/self/maps").read_text()])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edit_tensors(write_dense(tmp_path_factory.mktemp("dense")), randomize)


@pytest.fixture
def _windows(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def flush(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def move(source: Any, target: Any) -> None:
        if os.path.isdir(target) or is_held(source):
            raise PermissionError(errno.EACCES, "Access is denied", source, None, target)
        replace(source, target)

    def remove(path: Any, *, dir_fd: int | None = None) -> None:
        folder = "" if dir_fd is None else os.path.realpath(f"/proc/self/fd/{dir_fd}")
        if is_held(os.path.join(folder, path)):
            raise PermissionError(errno.EACCES, "Access is denied", path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    monkeypatch.setattr(os, "unlink", remove)
    monkeypatch.delattr(os, "posix_fadvise")


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("exists", [False, True])
def test_a_checkpoint_is_quantized(dense: Path, exists: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    convert(dense, out)
    assert "config.json" in files(out)
    assert not out.with_name("out.partial").exists()


@pytest.mark.usefixtures("_windows")
def test_random_weights_are_written_to_an_empty_directory(tmp_path: Path) -> None:
    assert "config.json" in files(write_random_checkpoint(tmp_path, TINY, progress=False))


def test_elsewhere_an_empty_directory_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (complete := tmp_path / "complete").mkdir()
    (complete / "file").touch()
    (path := tmp_path / "path").mkdir()
    monkeypatch.delattr(Path, "rmdir")
    take_place(complete, path)
    assert files(path) == {"file": b""}
