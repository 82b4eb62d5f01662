"""``doctor``: what it says of a machine on which experts run, and of one on which they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mxfp4_fx.cli import main
from mxfp4_fx.ops import schemas


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    def run(*argv: str) -> tuple[int, list[str]]:
        status = main(["doctor", *argv])
        return status, capfd.readouterr().out.splitlines()

    return run


def test_compiled_experts_are_run(doctor: Any) -> None:
    status, lines = doctor("--device", "cpu")
    assert status == 0
    assert lines[-2:] == [
        "cpu: self-check passed: compiled experts agree with their definition",
        "usable: cpu",
    ]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_is_noticed(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def kernel(kernels: str, op: str) -> Callable[..., Any]:
        found = right(kernels, op)
        is_changed = (kernels, op) == ("cpu", "matmul_ogs")
        return (lambda *args: found(*args) * factor) if is_changed else found

    right = schemas.kernel
    monkeypatch.setattr(schemas, "kernel", kernel)
    status, lines = doctor("--device", "cpu")
    assert status == 1
    assert lines[-2].startswith("cpu: self-check failed: VerificationError: ")
    assert lines[-1] == "not usable: cpu"


def test_a_compiler_that_fails_is_told_in_a_line(
    doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("Python.h is missing\nand a page of other things")

    monkeypatch.setattr("mxfp4_fx.core.torch_private_dynamo.compile_with_inductor", fails)
    status, lines = doctor("--device", "cpu")
    assert (status, lines[-1]) == (1, "not usable: cpu")
    assert lines[-2] == "cpu: self-check failed: OSError: Python.h is missing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(doctor: Any) -> None:
    status, lines = doctor("--device", "cuda:0")
    assert (status, lines[-1]) == (1, "not usable: cuda:0")
    assert not [line for line in lines if line.startswith("cpu")]
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--device", "gpu"])
