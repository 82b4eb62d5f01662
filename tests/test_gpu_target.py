"""Which kernels and which layout a GPU gets, and what is said where it gets none.

No GPU is needed: what torch says of one is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mxfp4_fx.cli import main
from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.ops import hub_loader, target, tiles

triton = pytest.importorskip("triton")

CUDA = torch.device("cuda", 0)
XPU = torch.device("xpu", 0)


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


def pretend_intel(monkeypatch: pytest.MonkeyPatch, *, compiler: bool = True) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Intel(R) Some GPU")
    names = ["nvidia", "intel"] if compiler else ["nvidia", "amd"]
    monkeypatch.setattr(triton.backends, "backends", dict.fromkeys(names, SimpleNamespace()))


@pytest.mark.parametrize(
    ("capability", "layout"),
    [
        ((7, 5), "row_major"),
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
        "order of wgmma's registers; untried: no test has run on sm_90"
    )


def test_a_gpu_on_which_tests_have_passed_is_not_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 9, 0, "NVIDIA H200")
    monkeypatch.setattr(hardware, "TRIED_GPUS", ("sm_90",))
    assert "untried" not in target.choose(CUDA).reason


OF_HUB = target.Target("hub", "row_major", "as was asked for")


def test_linears_in_mxfp8_are_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's kernels have none, so that Triton's compute them where they can."""
    pretend(monkeypatch, 9, 0)
    assert target.mxfp8_kernels(target.choose(CUDA), CUDA) == "triton"
    assert target.mxfp8_kernels(OF_HUB, CUDA) == "triton"


def test_linears_in_mxfp8_beside_the_hubs_kernels_on_an_old_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, 7, 0)
    with pytest.raises(KernelsUnavailableError) as caught:
        target.mxfp8_kernels(OF_HUB, CUDA)
    message = str(caught.value)
    assert message.startswith("options['linears']='mxfp8' needs Triton's kernels beside")
    assert "is older than compute capability 7.5" in message
    assert message.endswith("leave options['linears'] out: linears stay exact")


def test_turing_multiplies_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 7, 5, "Tesla T4")
    assert target.choose(CUDA).reason == (
        f"Triton {triton.__version__} on Tesla T4 (sm_75): float32 products, because Triton uses "
        "no matrix units before sm_80; untried: no test has run on sm_75"
    )


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 2)])
def test_an_older_gpu_is_refused_by_name(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *capability, "Tesla V100")
    name = "sm_{}{}".format(*capability)
    with pytest.raises(
        KernelsUnavailableError, match=rf"Tesla V100 \({name}\) is older .* 7\.5.*'reference'"
    ):
        target.choose(CUDA)


@pytest.mark.parametrize("requested", ["auto", "triton"])
def test_an_intel_gpu(requested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_intel(monkeypatch)
    chosen = target.choose(XPU, requested)
    asked = ", as was asked for" if requested == "triton" else ""
    assert chosen == target.Target(
        "triton",
        "row_major",
        f"Triton {triton.__version__} on Intel(R) Some GPU (xpu){asked}: no order of its own is "
        "known for its matrix instructions; untried: no test has run on xpu",
    )


def test_kernels_of_the_hub_on_an_intel_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_loader, "load", lambda: None)
    pretend_intel(monkeypatch, compiler=False)
    with pytest.raises(KernelsUnavailableError, match=r"'hub' needs a Triton that .* Intel GPUs"):
        target.choose(XPU, "hub")
    pretend_intel(monkeypatch)
    assert target.choose(XPU, "hub").kernels == "hub"


def test_kernels_that_read_a_layout_on_an_intel_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_intel(monkeypatch)
    assert target.kernels_for("row_major", XPU) == "triton"
    assert target.kernels_for("cpu_panels", XPU) == "reference"


@pytest.mark.parametrize("gpu", ["sm_75", "xpu"])
def test_it_has_tiles_of_its_own(gpu: str) -> None:
    assert tiles.table_name(gpu, "row_major") == gpu


def test_a_triton_that_does_not_compile_for_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_intel(monkeypatch, compiler=False)
    with pytest.raises(
        KernelsUnavailableError,
        match=r"compiles for Intel GPUs, and this one, .* compiles for .*nvidia.*"
        r"triton-xpu.*'reference'",
    ):
        target.choose(XPU)


def test_an_intel_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's triton would not help."""
    pretend_intel(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelsUnavailableError, match=r"package 'triton'.*triton-xpu") as raised:
        target.choose(XPU)
    assert "mxfp4_fx[triton]" not in str(raised.value)


def test_an_intel_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_intel(monkeypatch)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(KernelsUnavailableError, match=r"model is on 'xpu', and torch .* sees no"):
        target.choose(XPU)


def test_doctor_lists_gpus_of_all_kinds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 7, 5, "Tesla T4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pretend_intel(monkeypatch)
    assert main(["doctor"]) == 1  # these are not usable
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    said_of = [(device, said) for device, _, said in lines if device.startswith(hardware.GPU_TYPES)]
    gpus = dict(said_of[: len(said_of) // 2])  # the self-check follows
    assert [device for device, said in said_of if said.startswith("self-check failed")] == [*gpus]
    assert list(gpus) == ["cuda:0", "cuda:1", "xpu:0"]
    assert all(said.startswith("triton kernels, layout row_major") for said in gpus.values())
    assert all("untried" in said for said in gpus.values())


@pytest.mark.parametrize("kind", hardware.GPU_TYPES)
def test_launches_are_on_the_tensors_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, device = torch.get_device_module(kind), torch.device(kind, 1)
    current: list[Any] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            current.append(device)

    monkeypatch.setattr(module, "device", Device)
    assert isinstance(hardware.on(device), Device)
    assert current == [device]


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
    with pytest.raises(KernelsUnavailableError, match="NVIDIA, AMD and Intel GPUs, not on 'meta'"):
        target.choose(torch.device("meta"), "triton")
