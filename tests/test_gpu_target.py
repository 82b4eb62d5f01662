"""Which kernels and which layout a GPU gets, and what is said where it gets none.

No GPU is needed: what torch says of one is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.ops import target

triton = pytest.importorskip("triton")

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    hardware.gpu_name.cache_clear()
    yield
    hardware.gpu_name.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch, major: int, minor: int, name: str = "Some GPU"
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize(
    ("capability", "layout"),
    [
        ((8, 0), "mma_fragments"),
        ((8, 6), "mma_fragments"),
        ((8, 9), "mma_fragments"),
        ((9, 0), "wgmma_fragments"),
        ((10, 0), "row_major"),
        ((10, 3), "row_major"),
        ((11, 0), "row_major"),
        ((12, 0), "mma_fragments"),
        ((12, 1), "mma_fragments"),
    ],
)
@pytest.mark.parametrize("requested", ["auto", "triton"])
def test_an_nvidia_gpu(
    requested: str, capability: tuple[int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *capability)
    chosen = target.choose(CUDA, requested)
    assert (chosen.kernels, chosen.layout) == ("triton", layout)


@pytest.mark.parametrize("name", ["gfx942", "gfx950", "gfx1201"])
def test_an_amd_gpu(name: str) -> None:
    layout = hardware.gpu_layout(name)
    assert layout is not None
    assert layout.name == "row_major"


def test_the_reason_names_the_gpu_and_why_this_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 9, 0, "NVIDIA H200")
    assert target.choose(CUDA, "triton").reason == (
        f"Triton {triton.__version__} on NVIDIA H200 (sm_90), as was asked for: weights in the "
        "order of wgmma's registers"
    )


def test_a_gpu_without_bfloat16_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 7, 5, "Tesla T4")
    with pytest.raises(KernelsUnavailableError, match=r"Tesla T4 \(sm_75\).*8\.0.*'reference'"):
        target.choose(CUDA)


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelsUnavailableError, match=r"package 'triton'.*mxfp4_fx\[triton\]"):
        target.choose(CUDA)


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0"])
def test_an_older_triton_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(KernelsUnavailableError, match=rf"needs Triton 3\.6.*this is {version}"):
        target.choose(CUDA)


def test_the_oldest_triton_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 9, 0)
    monkeypatch.setattr(triton, "__version__", "3.6.0+git1234")
    assert target.choose(CUDA).kernels == "triton"


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(KernelsUnavailableError, match=r"needs a GPU.*'cpu'.*TRITON_INTERPRET=1"):
        target.choose(torch.device("cpu"), "triton")


def test_a_cpu_in_the_interpreter_is_served_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert target.choose(torch.device("cpu"), "triton").kernels == "triton"
    assert target.choose(torch.device("cpu"), "auto").kernels != "triton"


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelsUnavailableError, match=r"model is on 'cuda', and torch .* sees no"):
        target.choose(CUDA)


def test_another_device_is_refused() -> None:
    with pytest.raises(KernelsUnavailableError, match="NVIDIA and AMD GPUs, not on 'meta'"):
        target.choose(torch.device("meta"), "triton")
