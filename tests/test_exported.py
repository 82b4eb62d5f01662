"""``mxfp4_fx.load_exported``: what a package checks, and packages in other processes.

AOTInductor compiles for half a minute, so all that it makes is asked once, among the exhaustive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import hidden, mlp, pack
from oracle import Bounded
from torch import Tensor, nn
from torch.export import Dim

import mxfp4_fx
from examples import export_model
from mxfp4_fx.core import hardware, torch_private_export
from mxfp4_fx.errors import KernelsUnavailableError, PackageError
from mxfp4_fx.exported import ExportedModel, Input, Note, Size

# ---- what is checked before a package is loaded


def note(**changes: Any) -> Note:
    made = Note.here({("cpu", "cpu_panels")}, {"matmul_ogs"}, {})
    return dataclasses.replace(made, **changes)


def test_a_package_of_this_machine_is_taken() -> None:
    note().check_machine()
    note(instruction_sets=()).check_machine()  # of an older CPU
    note(machine=(*note().machine[:2], "another name")).check_machine()
    assert {*note().instruction_sets} == hardware.instruction_sets()
    note(targets=(("reference", ""), ("cpu", ""))).check_machine()


def test_builds_of_one_release_of_torch_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    made = note()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    made.check_machine()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "2.1.0"}, r"exported with torch 2\.1\.0, and this is torch \d.*export"),
        ({"schemas": {"matmul_ogs": "()"}}, "calls mxfp4::matmul_ogs with other arguments"),
        ({"schemas": {"moe.old": "()"}}, r"calls mxfp4::moe\.old with other arguments"),
        ({"machine": ("Darwin", "arm64", "M9")}, r"exported on Darwin arm64 \(M9\).* this is \w+"),
        ({"instruction_sets": ("avx9",)}, r"this is .*, which lacks avx9: export the model again"),
        ({"targets": (("cpu", "row_major"),)}, "in layout 'row_major', and kernels='cpu' read"),
    ],
    ids=["torch", "schema", "op", "machine", "instructions", "layout"],
)
def test_a_package_for_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        note(**changes).check_machine()


def test_a_path_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.CPU_PATH_VARIABLE, "avx3")
    hardware.cpu_path.cache_clear()
    with monkeypatch.context(), pytest.raises(KernelsUnavailableError, match="MXFP4_FX_CPU='avx3'"):
        note().check_machine()
    hardware.cpu_path.cache_clear()


def write(file: Path, text: str | None) -> None:
    """Write a file like a package with a note."""
    with zipfile.ZipFile(file, "w") as package:
        package.writestr("model/data/model.so", "code")
        about = "{}" if text is None else f'{{"{torch_private_export.NOTE}": {text}}}'
        package.writestr(f"model/data/x{torch_private_export.METADATA}", about)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "there is no such file"),
        (lambda file: file.write_text("nothing"), "it is damaged, or no package"),
        (lambda file: file.mkdir(), "it is damaged, or no package"),
        (lambda file: write(file, "{"), "it is damaged, or no package"),
        (lambda file: write(file, None), r"mxfp4_fx\.export has not written it"),
        (lambda file: write(file, '"{\\"format\\": 0}"'), "of format 0, and this mxfp4_fx reads"),
        (lambda file: write(file, repr_json(note(torch="1.0"))), r"with torch 1\.0"),
    ],
    ids=["absent", "damaged", "a directory", "no JSON", "another's", "format", "torch"],
)
def test_a_file_that_cannot_be_loaded_is_named(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt2"
    make(file)
    with pytest.raises(PackageError, match=rf"model\.pt2 cannot be loaded: .*{message}"):
        mxfp4_fx.load_exported(file)


def repr_json(made: Note) -> str:
    text = made.to_json().replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


# ---- what is checked in a call


LENGTH = Size("s0", 2, 8)
TAKES = {
    "args[0]": Input("torch.float32", (1, LENGTH)),
    "args[1]": None,
    "kwargs['mask']": Input("torch.bool", (LENGTH, 3)),
    "kwargs['scale']": 0.5,
}


def call(*args: Any, **kwargs: Any) -> Any:
    """Call a package that takes this and returns what it gets."""
    return ExportedModel(lambda *a, **k: (a, k), note(inputs=TAKES))(*args, **kwargs)


def mask(tokens: int) -> Tensor:
    return torch.ones(tokens, 3, dtype=torch.bool)


def test_inputs_within_their_bounds_are_taken_as_they_lie_in_memory() -> None:
    for tokens in (2, 8):
        x = torch.randn(tokens, 1).mT if tokens == 2 else torch.randn(1, 16)[:, ::2]
        (given, nothing), named = call(x, None, mask=mask(tokens), scale=0.5)
        assert torch.equal(given, x)
        assert given.is_contiguous()
        assert (nothing, named["scale"]) == (None, 0.5)


def test_a_size_without_a_limit() -> None:
    takes = {"args[0]": Input("torch.float32", (Size("s0", 2, None),))}
    package = ExportedModel(lambda x: x, note(inputs=takes))
    assert package.inputs == {"args[0]": "torch.float32 [2 to any]"}
    assert package(torch.ones(10_000)).shape == (10_000,)


def test_inputs_are_told() -> None:
    assert ExportedModel(None, note(inputs=TAKES)).inputs == {
        "args[0]": "torch.float32 [1, 2 to 8]",
        "args[1]": "always None",
        "kwargs['mask']": "torch.bool [2 to 8, 3]",
        "kwargs['scale']": "always 0.5",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(1, 1)}, r"dimension 1 of args\[0\] is 1, .* for 2 to 8: give its Dim"),
        ({"x": torch.ones(1, 9)}, r"dimension 1 of args\[0\] is 9, .* for 2 to 8: give its Dim"),
        ({"x": torch.ones(2, 4)}, r"dimension 0 of args\[0\] is 2, .* for 1: name the dimension"),
        ({"x": torch.ones(1, 4, 1)}, r"args\[0\] has 3 dimensions, and must be .* \[1, 2 to 8\]"),
        (
            {"x": torch.ones(1, 4).double()},
            r"args\[0\] is torch.float64, and must be torch.float32",
        ),
        ({"x": torch.ones(1, 4, device="meta")}, r"args\[0\] is on meta, and .* for the CPU"),
        ({"x": 4}, r"args\[0\] is a int, and must be a tensor"),
        ({"mask": mask(5)}, r"0 of kwargs\['mask'\] is 5, and must be 4, as dimension 1 of args"),
        ({"scale": 1.0}, r"kwargs\['scale'\] is 1\.0, and the package was exported for 0\.5"),
        ({"scale": torch.tensor(0.5)}, r"kwargs\['scale'\] is tensor.* was exported for 0\.5"),
        (
            {"more": 1},
            r"takes args\[0\], args\[1\], .* and the call gives .*kwargs\['more'\]: pass",
        ),
    ],
)
def test_other_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(1, 4), "mask": mask(4), "scale": 0.5, **changes}
    with pytest.raises(PackageError, match=message):
        call(given.pop("x"), None, **given)


# ---- packages in other processes

# None among Python's modules stands for a package that is not installed.
RUN = """
import sys

sys.modules["transformers"] = None

import torch
import mxfp4_fx

package, inputs, results = sys.argv[1:]
model = mxfp4_fx.load_exported(package)
torch.save([model(*args) for args in torch.load(inputs)], results)
assert sys.modules["transformers"] is None
"""


class Pair(nn.Module):
    """Dense and packed experts for given routes, and a linear that is large enough for the op."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = mlp(form="eager", seed=1).experts
        self.packed = pack(mlp(seed=2)).experts
        self.linear = nn.Linear(256, 512).to(torch.bfloat16)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
        both = {name: getattr(self, name)(x, indices, weights) for name in ("dense", "packed")}
        return {**both, "linear": self.linear(x.repeat(1, 4).to(torch.bfloat16))}


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return hidden(tokens, seed=tokens)[0], *oracle.random_routes(tokens, 6, 3, seed=tokens)


def exact(seed: int, x: Tensor, indices: Tensor, weights: Tensor) -> Bounded:
    held = {name: value.double() for name, value in mlp(seed=seed).experts.named_parameters()}
    parts = [(held[f"{n}_proj"].mT, held[f"{n}_proj_bias"]) for n in ("gate_up", "down")]
    routes = indices, Bounded.exact(weights)
    return oracle.experts(x, *routes, *parts, 1.702, 7.0, inner_dtype=x.dtype)


def run(folder: Path, package: Path, given: list[Any], **environment: str) -> list[Any]:
    torch.save(given, folder / "inputs.pt")
    argv = [package, folder / "inputs.pt", folder / "results.pt"]
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert ended.returncode == 0, ended.stderr
    results: list[Any] = torch.load(folder / "results.pt")
    return results


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_gradients")
def test_a_package_of_dense_and_packed_experts_runs_elsewhere(tmp_path: Path) -> None:
    model, length, package = Pair(), {0: Dim("T", min=1, max=64)}, tmp_path / "pair.pt2"
    explanation = mxfp4_fx.export(
        model,
        inputs(7),
        package,
        dynamic_shapes=(length, length, length),
        options={"inductor": {"aot_inductor.compile_wrapper_opt_level": "O0"}},
    )
    assert [rewrite.layer for rewrite in explanation.rewrites] == ["dense", "packed"]
    assert explanation.linears == (hardware.linear_rows(torch.bfloat16) > 0)
    given = [inputs(tokens) for tokens in (1, 7, 64)]
    for name, parameter in model.named_parameters():  # the package has its own
        if parameter.is_floating_point() and "linear" not in name:
            parameter.fill_(9.0)
    # Another path's kernels read the same layout.
    for environment in ({}, {hardware.CPU_PATH_VARIABLE: "portable"}):
        for args, results in zip(given, run(tmp_path, package, given, **environment), strict=True):
            for seed, name in ((1, "dense"), (2, "packed")):
                expected = exact(seed, *args)
                assert (results[name].double() - expected.value).abs().le(expected.error).all()
            x = args[0].repeat(1, 4).to(torch.bfloat16)
            expected = oracle.linear(
                Bounded.exact(x), model.linear.weight.double(), model.linear.bias.double()
            ).rounded(torch.bfloat16)
            assert (results["linear"].double() - expected.value).abs().le(expected.error).all()


@pytest.mark.exhaustive
def test_the_example_exports_a_model(tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert export_model.main(["--path", str(tmp_path / "model.pt2")]) == 0
    text = out.getvalue()
    assert "1 of 1 MoE layers rewritten, 1 graph" in text
    assert "1 attentions with sinks" in text
    assert re.findall(r"(\d+) tokens: off by \S+ of the largest logit", text) == ["1", "5", "64"]
