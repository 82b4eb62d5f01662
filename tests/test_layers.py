"""A file of the package imports only from layers below its own; `LAYERS` says which those are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Every file of the package but the `__init__`s of folders: a line is a layer, the lowest comes
# first. Files of one layer do not import one another. ops/cpu/ holds C++ only.
LAYERS = [
    ["errors.py", "console.py", "dynamo.py", "version.py", "sources.py"],
    ["native.py", "hub.py", "freed.py", "skip.py"],
    ["experts.py", "formats.py", "target.py", "options.py", "safetensors_file.py", "journal.py"],
    ["layouts.py", "gpt_oss.py"],
    ["checkpoint_files.py", "foreign_tensors.py"],
    ["checkpoint.py"],
    ["ops/reference.py", "ops/tiles.py", "ops/triton_kernels/arithmetic.py"],
    ["ops/triton_kernels/decode.py", "ops/triton_kernels/routing.py"],
    ["ops/triton_kernels/matmul.py"],
    [
        *("ops/triton.py", "ops/cpu.py", "ops/pytorch.py", "ops/hub.py"),
        *("ops/backward.py", "ops/autograd.py"),
    ],
    ["ops/schemas.py"],
    ["swizzle.py", "verification.py", "passes/graph.py", "passes/origin.py", "passes/report.py"],
    ["store.py"],
    ["weights.py", "packed.py", "passes/matcher.py", "passes/context.py", "passes/effects.py"],
    ["passes/patterns.py", "passes/memory.py"],
    ["passes/canonicalize.py"],
    ["passes/checks.py"],
    ["passes/suspects.py"],
    ["passes/fuse_moe.py", "passes/lower_moe.py"],
    ["passes/pipeline.py"],
    ["transformers/capture.py", "transformers/unpacking.py"],
    ["random_checkpoint.py", "quantization.py", "calls.py"],
    ["transformers/quantizer.py"],
    ["transformers/loading.py", "backend.py"],
    ["explanation.py"],
    ["cli.py", "__init__.py"],
    ["__main__.py"],
]

# (files whose path begins so, what they may not import although it may lie below them, why)
FORBIDDEN = [
    ("passes/", "mxfp4_fx.ops.triton", "passes know nothing of kernels"),
    ("passes/", "mxfp4_fx.ops.triton_kernels", "passes know nothing of kernels"),
    ("passes/", "mxfp4_fx.ops.cpu", "passes know nothing of kernels"),
    ("passes/", "mxfp4_fx.ops.pytorch", "passes know nothing of kernels"),
    ("passes/", "mxfp4_fx.ops.hub", "passes know nothing of kernels"),
    ("ops/", "torch.fx", "ops know nothing of FX"),
]
KNOW_TRANSFORMERS = (
    *(f"transformers/{name}.py" for name in ("capture", "unpacking", "quantizer", "loading")),
    "passes/patterns.py",
)

ROOT = Path(__file__).parent.parent
PACKAGE = "mxfp4_fx"
LAYER_OF = {path: number for number, layer in enumerate(LAYERS) for path in layer}
FOLDERS = {path.rpartition("/")[0] for path in LAYER_OF} - {""}


def absolute(path: str, level: int, name: str) -> str:
    """The dotted name that `name`, after `level` dots, has in the file `path` of the package."""
    if level == 0:
        return name
    package = [PACKAGE, *path.split("/")[:-1]]
    return ".".join([*package[: len(package) - level + 1], *([name] if name else [])])


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, wherever it stands; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield node.lineno, alias.name
            case ast.ImportFrom():
                module = absolute(path, node.level, node.module or "")
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}"
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                level = len(name) - len(name.lstrip("."))
                yield node.lineno, absolute(path, level, name.lstrip("."))


def lies_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def file_of(name: str) -> str:
    """The file that a dotted name of the package lies in: mxfp4_fx.a.b is a/b.py, or b in a.py."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if path + ".py" in LAYER_OF:
            return path + ".py"
        if path in FOLDERS:
            return path + "/__init__.py"
    return "__init__.py"


def fault(path: str, name: str) -> str | None:
    """What is wrong with the file `path` importing the dotted name `name`; None if nothing is."""
    for start, module, reason in FORBIDDEN:
        if path.startswith(start) and lies_in(name, module):
            return f"imports {name}, but {reason}"
    if lies_in(name, "transformers") and path not in KNOW_TRANSFORMERS:
        return f"imports {name}; only {' and '.join(KNOW_TRANSFORMERS)} know transformers"

    folder = path.removesuffix("/__init__.py")
    if folder in FOLDERS:
        own = f"{PACKAGE}.{folder.replace('/', '.')}"
        if lies_in(name, own) or lies_in(name, "__future__"):
            return None
        return f"imports {name}; a folder's __init__ only hands on names of its own files"
    if not lies_in(name, PACKAGE):
        return None

    target = file_of(name)
    if target not in LAYER_OF:
        return f"takes {name} from {target}; import the file that defines it, which needs a layer"
    if LAYER_OF[target] < LAYER_OF[path]:
        return None
    return f"imports {target}, which is not below it in LAYERS of tests/test_layers.py"


def faults(path: str, source: str) -> list[str]:
    """Each fault of one file with its place, `file:line: ...`."""
    where = f"{PACKAGE}/{path}"
    if path not in LAYER_OF and path.removesuffix("/__init__.py") not in FOLDERS:
        return [
            f"{where}:1: has no layer; add it to LAYERS in tests/test_layers.py, above its imports"
        ]
    found = {(line, what) for line, name in imports(path, source) if (what := fault(path, name))}
    return [f"{where}:{line}: {what}" for line, what in sorted(found)]


def package_files() -> list[str]:
    package = ROOT / PACKAGE
    return sorted(file.relative_to(package).as_posix() for file in package.rglob("*.py"))


def test_every_file_imports_only_from_below() -> None:
    files = package_files()
    assert files, f"no Python file under {ROOT / PACKAGE}"
    found = [line for f in files for line in faults(f, (ROOT / PACKAGE / f).read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_no_folder_hides_a_file_of_its_name() -> None:
    """Python would import ops/cpu/__init__.py and never ops/cpu.py."""
    files = set(package_files())
    assert not [f for f in files if f.removesuffix(".py") + "/__init__.py" in files]


# From here on the check itself is tested. The next two tables are imports in passes/graph.py.

UPWARD = {
    "absolute": "import mxfp4_fx.backend",
    "renamed": "import mxfp4_fx.backend as b",
    "name in a file": "from mxfp4_fx.backend import mxfp4",
    "file of the package": "from mxfp4_fx import backend",
    "relative": "from ..backend import mxfp4",
    "relative file": "from .. import backend",
    "file beside it": "from . import pipeline",
    "name in a file beside it": "from .pipeline import run",
    "star": "from ..backend import *",
    "local to a function": "def f():\n    from ..backend import mxfp4",
    "local to a method": "class C:\n    def f(self):\n        import mxfp4_fx.backend",
    "for types only": "if TYPE_CHECKING:\n    from ..backend import mxfp4",
    "import_module": "importlib.import_module('mxfp4_fx.backend')",
    "relative import_module": "import_module('..backend', __package__)",
    "same layer": "from ..swizzle import swizzle_weight",
    "the package": "import mxfp4_fx",
    "name of the package": "from mxfp4_fx import explain_all",
    "folder": "from mxfp4_fx import ops",
    "name of a folder": "from ..ops import moe",
}


@pytest.mark.parametrize("source", UPWARD.values(), ids=UPWARD)
def test_finds_an_upward_import(source: str) -> None:
    assert len(faults("passes/graph.py", source)) == 1


DOWNWARD = {
    "absolute": "import mxfp4_fx.formats",
    "relative": "from ..formats import quantize",
    "file of the package": "from .. import errors, target",
    "file of a folder": "from ..ops import schemas",
    "local": "def f():\n    from mxfp4_fx.ops.schemas import moe",
    "other packages": "import json, torch.fx\nfrom transformers_tools import backend",
}


@pytest.mark.parametrize("source", DOWNWARD.values(), ids=DOWNWARD)
def test_lets_a_downward_import_pass(source: str) -> None:
    assert faults("passes/graph.py", source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("passes/lower_moe.py", "from ..ops.cpu import launch"),
        ("passes/lower_moe.py", "from ..ops import triton"),
        ("ops/schemas.py", "import torch.fx"),
        ("ops/schemas.py", "from torch import fx"),
        ("ops/schemas.py", "from torch.fx.experimental import symbolic_shapes"),
        ("backend.py", "import transformers"),
        ("backend.py", "from transformers.models.gpt_oss import modeling_gpt_oss"),
        ("ops/__init__.py", "from ..formats import quantize"),
        ("ops/__init__.py", "import torch"),
        ("__main__.py", "from .ops import moe"),
    ],
)
def test_finds_an_import_that_a_part_must_not_have(path: str, source: str) -> None:
    assert len(faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("transformers/capture.py", "import transformers"),
        ("passes/patterns.py", "from transformers import GptOssConfig"),
        ("explanation.py", "from .transformers.capture import load"),
        ("ops/schemas.py", "from . import cpu, hub, triton"),
        ("ops/__init__.py", "from __future__ import annotations\nfrom .schemas import moe"),
    ],
)
def test_lets_an_import_pass_where_it_belongs(path: str, source: str) -> None:
    assert faults(path, source) == []


def test_a_fault_names_its_place() -> None:
    (found,) = faults("weights.py", "import torch\n\ndef f():\n    from . import explanation\n")
    assert found.startswith("mxfp4_fx/weights.py:4: imports explanation.py, which is not below")


@pytest.mark.parametrize("path", ["new.py", "ops/new.py", "new/__init__.py"])
def test_a_file_without_a_layer_is_told_where_to_get_one(path: str) -> None:
    (found,) = faults(path, "")
    assert found.startswith(f"mxfp4_fx/{path}:1: ")
    assert "LAYERS in tests/test_layers.py" in found
