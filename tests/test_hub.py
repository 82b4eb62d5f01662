"""kernels="hub": loading the package, what it is handed, and what comes out.

That values are right, test_ops.py and test_routing.py test, too, with the package of
``hub_package.py``. The real package is used where ``triton_kernels`` can be imported, or lies in
the folder that ``MXFP4_FX_TRITON_KERNELS`` names: in Triton's interpreter, compiled for GPUs that
need not be there, and on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_package
import hub_repository
import pytest
import torch
from combinations import covering, exhaustive
from implementations import Kernels, check_matmul, chosen, int32, randn
from models import DTYPES, Graphs, compile_with, hidden, mlp, model, tokens
from oracle import Matrices, assert_as_accurate, random_routes
from test_imports import HIDE, run
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode

from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.ops import hub as hub_ops
from mxfp4_fx.ops import hub_loader, target
from mxfp4_fx.ops.operands import operands_of
from mxfp4_fx.weights.source import FLOATS, Source
from mxfp4_fx.weights.store import STORE

HUB = Kernels("hub")
CUDA = torch.device("cuda")
ops = torch.ops.mxfp4
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="the kernels library is not installed"
)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], None]]:
    """Makes a folder the kernel repository, until the test ends."""
    contexts = []

    def serve(folder: Path) -> None:
        contexts.append(hub_repository.served(folder))
        contexts[-1].__enter__()

    yield serve
    for context in reversed(contexts):
        context.__exit__(None, None, None)


@pytest.fixture
def served(serve: Callable[[Path], None]) -> None:
    serve(hub_repository.standard())


def message() -> str:
    """Why the package cannot be loaded, as compiling for a GPU finds out."""
    with pytest.raises(KernelsUnavailableError) as raised:
        target.choose(CUDA, "hub")
    return str(raised.value)


# ---- loading


@needs_library
def test_the_package_is_imported_once(tmp_path: Path, serve: Callable[[Path], None]) -> None:
    count = f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n"
    source = hub_repository.PACKAGE.read_text().replace("FP4 = object()", count + "FP4 = object()")
    serve(hub_repository.write(tmp_path / "repository", source))
    first = hub_loader.load()
    assert hub_loader.load() is first
    assert (tmp_path / "imports").read_text() == "x"


@needs_library
def test_the_choice_says_where_kernels_come_from(served: None) -> None:
    chosen = target.choose(CUDA, "hub")
    assert (chosen.kernels, chosen.layout) == ("hub", "row_major")
    assert chosen.reason == (
        "kernels-community/gpt-oss-triton-kernels, as was asked for; untried: no test has run it "
        "on a GPU"
    )


def test_a_cpu_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_loader, "load", lambda: pytest.fail("was loaded"))
    with pytest.raises(KernelsUnavailableError, match=r"needs a GPU.*'cpu'; kernels='auto'"):
        target.choose(torch.device("cpu"), "hub")


@needs_library
def test_an_empty_folder(tmp_path: Path, serve: Callable[[Path], None]) -> None:
    serve(tmp_path)
    assert re.match(
        r"kernels-community/gpt-oss-triton-kernels, version 1, cannot be loaded: "
        r"\w+Error: .*\. Download it once while online .*"
        r"LOCAL_KERNELS=kernels-community/gpt-oss-triton-kernels=DIRECTORY .*kernels='auto'",
        message(),
    )


@needs_library
def test_a_package_that_cannot_be_imported(tmp_path: Path, serve: Callable[[Path], None]) -> None:
    serve(hub_repository.write(tmp_path, "import no_such_module"))
    assert "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'" in message()


@needs_library
@pytest.mark.parametrize("name", hub_loader.NAMES)
def test_a_package_that_lacks_a_name(
    tmp_path: Path, serve: Callable[[Path], None], name: str
) -> None:
    module, _, attribute = name.partition(".")
    lost = f"\ndel {module}.{attribute}\n"
    serve(hub_repository.write(tmp_path, hub_repository.PACKAGE.read_text() + lost))
    assert re.search(rf"lacks {re.escape(name)}: .*version 1\..*kernels='auto'", message())


@needs_library
def test_a_package_that_lacks_a_module(tmp_path: Path, serve: Callable[[Path], None]) -> None:
    serve(hub_repository.write(tmp_path, hub_repository.PACKAGE.read_text() + "\ndel swiglu\n"))
    assert "lacks swiglu.swiglu_fn: " in message()


def test_a_failure_is_remembered_until_the_environment_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def fail(repository: str) -> None:
        tried.append(os.environ["LOCAL_KERNELS"])
        raise KernelsUnavailableError("no such package")

    monkeypatch.setattr(hub_loader, "_get_kernel", fail)
    monkeypatch.setattr(hub_loader, "packages", hub_loader.packages.anew())
    for local in ("a", "a", "b"):
        monkeypatch.setenv("LOCAL_KERNELS", local)
        assert message() == "no such package"
    assert tried == ["a", "b"]


CHOOSE = """
import sys, torch
from mxfp4_fx.ops import target
try:
    target.choose(torch.device("cuda"), "hub")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_without_the_library(tmp_path: Path) -> None:
    assert re.match(
        r"KernelsUnavailableError: kernels='hub' needs the package 'kernels', .*"
        r"pip install 'mxfp4_fx\[kernels\]'.*kernels='auto'",
        run(f"{HIDE}\nhide(['kernels'])\n{CHOOSE}", tmp_path),
    )


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fresh interpreters know no network, and this folder is their cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("LOCAL_KERNELS", "KERNELS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    return tmp_path / "hub"


@needs_library
def test_offline_the_cache_is_enough(offline: Path, tmp_path: Path) -> None:
    repository = offline / f"kernels--{hub_loader.REPOSITORY.replace('/', '--')}"
    commit = "0123456789" * 4
    hub_repository.write(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / f"v{hub_loader.VERSION}").write_text(commit)
    code = "from mxfp4_fx.ops import hub_loader; print(hub_loader.load().__file__)"
    assert f"/snapshots/{commit}/build/" in run(code, tmp_path)


@needs_library
@pytest.mark.exhaustive
def test_offline_with_nothing_in_the_cache(offline: Path, tmp_path: Path) -> None:
    assert re.match(
        r"KernelsUnavailableError: .*cannot be loaded: ValueError: .*offline mode.*"
        r"Download it once while online \(without HF_HUB_OFFLINE\)",
        run(CHOOSE, tmp_path),
    )


def test_other_kernels_do_not_import_the_library(tmp_path: Path) -> None:
    code = """
import sys, torch
from mxfp4_fx.ops import target
for name in ("auto", "cpu", "pytorch", "reference"):
    for device in ("cpu", "cuda"):
        try:
            target.choose(torch.device(device), name)
        except target.KernelsUnavailableError as error:
            print(error)
        print("after", name, "kernels" in sys.modules, "huggingface_hub" in sys.modules)
"""
    said = [line.split() for line in run(code, tmp_path).splitlines()]
    after = [words[2:] for words in said if words[0] == "after"]
    assert after == [["False", "False"]] * 8


# ---- what the package is handed


def stub(record: dict[str, Any]) -> Any:
    """A package that computes nothing, only shapes."""

    def matmul_ogs(x: Tensor, w: Any, bias: Any, routing: Any, **kwargs: Any) -> Tensor:
        record.update(kwargs, x=x, w=w, bias=bias, routing=routing)
        gather, scatter = kwargs.get("gather_indx"), kwargs.get("scatter_indx")
        rows = (x if gather is None else gather.src_indx).shape[0]
        rows = rows if scatter is None else rows // routing.n_expts_act
        columns = w.shape[2] // (2 if "fused_activation" in kwargs else 1)
        return x.new_empty((rows, columns), dtype=kwargs["precision_config"].out_dtype)

    package = {name: getattr(hub_package, name) for name in ("tensor", "routing", "swiglu")}
    functions = {**vars(hub_package.matmul_ogs), "matmul_ogs": matmul_ogs}
    return SimpleNamespace(**package, matmul_ogs=SimpleNamespace(**functions))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the latest call of the package, which computes nothing."""
    record: dict[str, Any] = {}
    monkeypatch.setitem(hub_loader.packages.loaded, hub_loader.REPOSITORY, stub(record))
    return record


@pytest.mark.parametrize(
    ("k", "a", "activation", "dtype"), covering((0, 64), (1, 3, 4), ("none", "swiglu"), DTYPES)
)
def test_nothing_is_read_back_from_the_device(
    seen: dict[str, Any], k: int, a: int, activation: str, dtype: torch.dtype
) -> None:
    """A CUDA graph could not capture that. Fake tensors have no values to be read."""
    matrices, rows = Matrices.random(5, 48, k), 3 * a
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        weight = [mode.from_tensor(t) for t in matrices.operands]
        routes = [mode.from_tensor(t) for t in (int32([0, 0, 1, 1, 2, 3]), int32([0] * rows))]
        x = mode.from_tensor(randn(3, k, dtype=dtype))
        for scatter in (None, routes[1]):
            gammas = x.new_empty(rows, dtype=torch.float32)
            flat = operands_of(x, *weight, 48, *routes, scatter, gammas, a, activation)
            hub_ops.matmul_ogs(*flat[:4])
    assert seen


def test_the_package_runs_on_the_tensors_device(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        assert not seen
        entered.append(device)
        yield
        assert seen

    monkeypatch.setattr(hardware, "on", on)
    HUB.matmul_ogs(randn(1, 32), Matrices.random(1, 16, 32), int32([0, 1]))
    assert entered == [torch.device("cpu")]


def test_weights_are_wrapped_where_they_lie(seen: dict[str, Any]) -> None:
    matrices = Matrices.random(3, 48, 64)
    HUB.matmul_ogs(randn(4, 64, dtype=torch.bfloat16), matrices, int32([0, 1, 2, 4]))
    assert seen["w"].data.data_ptr() == matrices.blocks.data_ptr()
    scales = seen["precision_config"].weight_scale
    assert scales.data.data_ptr() == matrices.scales.data_ptr()
    assert seen["w"].shape == [3, 64, 48]
    assert scales.shape == [3, 2, 48]


@needs_library
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_routes_of_other_dtypes_and_strides(served: None, activation: str) -> None:
    matrices, x = Matrices.random(3, 48, 64), randn(4, 64)
    routes = ops.routing(randn(4, 3), 2)
    gammas, gather, scatter, offsets = (
        torch.stack((r, r), dim=1)[:, 0].to(torch.float64 if r.is_floating_point() else torch.int64)
        for r in routes
    )
    y = HUB.matmul_ogs(x, matrices, offsets, gather, scatter, gammas, 2, activation)
    gammas, gather, scatter, offsets = routes
    expected = HUB.matmul_ogs(x, matrices, offsets, gather, scatter, gammas, 2, activation)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("a", "activation", "scatters"),
    [(4, "none", True), (2, "none", True), (3, "none", False), (1, "none", False),
     (4, "swiglu", False)],
)  # fmt: skip
def test_the_package_scatters_what_it_can(
    seen: dict[str, Any], a: int, activation: str, scatters: bool
) -> None:
    slots = torch.arange(2 * a).int()
    x = randn(2 * a, 32, dtype=torch.bfloat16)
    HUB.matmul_ogs(
        x, Matrices.random(1, 6, 32), int32([0, 2 * a]), None, slots, None, a, activation
    )
    assert ("scatter_indx" in seen) == scatters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_has_its_activation_fused(seen: dict[str, Any], dtype: torch.dtype) -> None:
    x, matrices = randn(4, 32, dtype=dtype), Matrices.random(1, 6, 32)
    y = HUB.matmul_ogs(x, matrices, int32([0, 4]), activation="swiglu", alpha=0.5, limit=3.0)
    assert y.dtype == dtype
    if dtype == torch.bfloat16:
        assert seen["fused_activation"].fn_args == (0.5, 3.0)
        assert seen["precision_config"].out_dtype == torch.bfloat16
    else:
        assert "fused_activation" not in seen
        assert seen["precision_config"].out_dtype == torch.float32


@pytest.mark.parametrize(("rows", "e", "n"), [(0, 2, 6), (4, 0, 6), (4, 2, 0)])
def test_the_package_is_not_called_for_nothing(
    seen: dict[str, Any], rows: int, e: int, n: int
) -> None:
    x, offsets = randn(rows, 32), torch.zeros(e + 1, dtype=torch.int32)
    slots = torch.arange(rows).int()
    y = HUB.matmul_ogs(x, Matrices.random(e, n, 32), offsets, None, slots, None, 2)
    assert torch.equal(y, torch.zeros(rows // 2, n))
    assert not seen


@needs_library
@pytest.mark.parametrize("layout", ["hub_hopper", exhaustive("hub_strided")])
def test_weights_as_modules_of_transformers_hold_them(layout: str) -> None:
    indices = random_routes(7, 4, 2)[0]
    with chosen(f"hub:{layout}") as hub:
        for k in (96, 0):
            x = randn(7, k, dtype=torch.bfloat16)
            check_matmul(hub, x, Matrices.random(4, 40, k), indices, activation="swiglu")


def test_another_layout_is_refused() -> None:
    weight = Kernels("cpu").operands(Matrices.random(1, 32, 64))
    with pytest.raises(ValueError, match=r"'hub' reads layouts row_major, .* not 'cpu_panels'"):
        ops.matmul_ogs(randn(1, 64), *weight, int32([0, 1]), layout="cpu_panels", kernels="hub")


@pytest.mark.parametrize(
    "counts",
    [[0], [1], [0, 0, 3], [16, 17, 15], [0, 300, 0, 1], [1] * 9, [255, 256, 257, 0], [33] * 128],
)
@pytest.mark.parametrize("others", [0, 40])
def test_tiles_are_those_of_a_plain_loop(counts: list[int], others: int) -> None:
    offsets, rows = int32([0, *counts]).cumsum(0).int(), sum(counts) + others
    data = hub_ops._expert_data(hub_package, offsets, rows)
    assert data.hist.tolist() == counts
    assert list(data.block_pid_map) == list(data.token_offs_pad) == [16, 32, 64, 128, 256]
    for height, tiles in data.block_pid_map.items():
        expected = [
            tile << 16 | expert
            for expert, count in enumerate(counts)
            for tile in range(-(-count // height))
        ]
        e = len(counts)
        launched = rows if rows <= e else -(-(rows - e + 1) // height) + e - 1
        assert launched <= len(tiles)
        assert tiles.tolist() == expected + [-1] * (len(tiles) - len(expected))
        ends = [-(-count // height) for count in counts]
        assert data.token_offs_pad[height].diff().tolist() == ends
        assert data.token_offs_pad[height][0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_terms_of_bfloat16_add_up_exactly(dtype: torch.dtype) -> None:
    x = (randn(64, 32) * torch.exp2(randn(64, 32, seed=2) * 20)).to(dtype)
    x = torch.where(x.isfinite(), x, 1)  # float16 overflows
    terms = hub_ops._bf16_terms(x)
    assert len(terms) == {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
    assert all(term.dtype == torch.bfloat16 for term in terms)
    assert torch.equal(sum(term.double() for term in terms), x.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_infinity_and_nan_are_in_the_first_term_only(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan]], dtype=dtype)
    first, *others = hub_ops._bf16_terms(x)
    assert torch.equal(first.nan_to_num(), x.bfloat16().nan_to_num())
    assert first[0, 2].isnan()
    assert all(torch.equal(term, torch.zeros_like(term)) for term in others)


# ---- compiled models, with the package of hub_package.py


@needs_library
@pytest.mark.parametrize("dtype", [exhaustive(torch.float32), torch.bfloat16])
def test_a_whole_model(served: None, dtype: torch.dtype) -> None:
    graphs = Graphs()
    exact = model(dtype, "eager").double()(tokens()).logits
    with torch.no_grad():
        options = {"kernels": "hub", "strict": True, "regions": False}
        compiled = compile_with(model(dtype), graphs, options=options)
        assert_as_accurate(compiled(tokens()).logits, model(dtype)(tokens()).logits, exact)
    called = [
        (str(node.target), node.kwargs["kernels"])
        for gm in graphs.seen
        for node in gm.graph.nodes
        if str(node.target).startswith("mxfp4.")
    ]
    assert called.count(("mxfp4.matmul_ogs.default", "hub")) == 4
    assert {kernels for _, kernels in called} == {"hub"}


@needs_library
@pytest.mark.exhaustive
def test_through_inductor(served: None) -> None:
    module, x = mlp(), hidden()
    with torch.no_grad():
        out = torch.compile(module, backend="mxfp4", options={"kernels": "hub"})(x)[0]
        assert_as_accurate(out, module(x)[0], mlp(form="eager").double()(x.double())[0])
    source = Source((module.experts.down_proj,), FLOATS)
    assert STORE.get(source, "row_major")[0].shape == (6, 64, 3, 16)


@needs_library
def test_verified(served: None) -> None:
    with torch.no_grad():
        compile_with(mlp(), options={"kernels": "hub", "verify": True})(hidden())


@needs_library
def test_gradients_flow_through(served: None) -> None:
    grads = []
    for kernels in ("hub", "reference"):
        module, x = mlp(), hidden().requires_grad_()
        module.experts.requires_grad_(False)
        compile_with(module, options={"kernels": kernels})(x)[0].square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_missing_kernels_are_an_error_with_strict() -> None:
    options = {"kernels": "hub", "strict": True}
    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match="kernels='hub' needs a GPU"),
    ):
        compile_with(mlp(), options=options)(hidden())


# ---- the real package


def real_folder() -> str | None:
    """The folder that triton_kernels lies in."""
    if folder := os.environ.get("MXFP4_FX_TRITON_KERNELS"):
        return folder
    found = importlib.util.find_spec("triton_kernels")
    return str(Path(found.origin).parents[1]) if found and found.origin else None


needs_real = pytest.mark.skipif(
    real_folder() is None or importlib.util.find_spec("triton") is None,
    reason="needs triton and triton_kernels (MXFP4_FX_TRITON_KERNELS names the folder it is in)",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_real
@pytest.mark.parametrize(
    "case",
    ["gather", "no_gather", "bfloat16", "split_k", "experts_per_token", "many_rows",
     "rows_of_nobody"],
)  # fmt: skip
def test_the_real_package_in_the_interpreter(case: str, tmp_path: Path) -> None:
    run_with_real_package("interpreted_hub.py", case, tmp_path, TRITON_INTERPRET="1")


@needs_real
@pytest.mark.parametrize("arch", ["80", "90", "90:hub_hopper", "100", "120", "gfx942"])
def test_the_real_package_compiles(arch: str, tmp_path: Path) -> None:
    printed = run_with_real_package("compiled_hub.py", arch, tmp_path)
    names = " ".join(printed.splitlines())
    assert names.count("_matmul_ogs_") == 4
    assert names.count("_swiglu") == 2


def run_with_real_package(program: str, argument: str, cwd: Path, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name(program), argument],
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "MXFP4_FX_TRITON_KERNELS": real_folder() or "",
            "TRITON_CACHE_DIR": str(cwd),
            **environment,
        },
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


class OnGpu(Kernels):
    """The real package; operands and results are on the CPU outside."""

    def matmul_ogs(self, x: Tensor, matrices: Matrices, *args: Any, **kwargs: Any) -> Tensor:
        on_gpu = Matrices(*(operand.cuda() for operand in matrices.operands))
        args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
        return super().matmul_ogs(x.cuda(), on_gpu, *args, **kwargs).cpu()


@functools.cache
def real_package() -> Any:
    sys.path.insert(0, real_folder() or "")
    names = ("matmul_ogs", "routing", "swiglu", "tensor", "tensor_details")
    return SimpleNamespace(
        **{name: importlib.import_module(f"triton_kernels.{name}") for name in names}
    )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    package = hub_loader._checked(real_package())
    monkeypatch.setitem(hub_loader.packages.loaded, hub_loader.REPOSITORY, package)
    return OnGpu("hub")


@needs_real
@needs_gpu
@pytest.mark.parametrize("activation", ["none", "swiglu"])
@pytest.mark.parametrize("gammas", [False, True], ids=["plain", "gammas"])
@pytest.mark.parametrize("scatter", [False, True], ids=["rows", "scatter"])
@pytest.mark.parametrize("gather", [False, True], ids=["sorted", "gather"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(
    on_gpu: OnGpu, dtype: torch.dtype, gather: bool, scatter: bool, gammas: bool, activation: str
) -> None:
    x = randn(7 if gather else 28, 64, dtype=dtype)
    matrices, indices = Matrices.random(6, 48, 64, dtype), random_routes(7, 6, 4)[0]
    check_matmul(on_gpu, x, matrices, indices, gather, scatter, gammas, activation)


@needs_real
@needs_gpu
@pytest.mark.parametrize("t", [1, 4, 130])
def test_sizes_of_gpt_oss_on_a_gpu(on_gpu: OnGpu, t: int) -> None:
    """K is no multiple of a tile's, and with few rows the package cuts it into parts."""
    matrices, indices = Matrices.random(8, 512, 2880, torch.bfloat16), random_routes(t, 8, 4)[0]
    for activation in ("none", "swiglu"):
        x = randn(t, 2880, dtype=torch.bfloat16)
        check_matmul(on_gpu, x, matrices, indices, activation=activation)


@needs_real
@needs_gpu
def test_a_cuda_graph_captures_a_layer(on_gpu: OnGpu) -> None:
    first, second = (
        Matrices(*(operand.cuda() for operand in Matrices.random(5, 64, k).operands))
        for k in (64, 32)
    )
    x, logits = randn(8, 64, dtype=torch.bfloat16).cuda(), randn(8, 5, seed=3).cuda()

    def layer() -> Tensor:
        gammas, gather, scatter, offsets = ops.routing(logits, 2, kernels="hub")
        inner, outer = on_gpu.operands(first), on_gpu.operands(second)
        y = ops.matmul_ogs(x, *inner, offsets, gather, activation="swiglu", kernels="hub")
        return ops.matmul_ogs(y, *outer, offsets, None, scatter, gammas, 2, kernels="hub")

    layer()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    x.copy_(randn(8, 64, seed=5))
    logits.copy_(randn(8, 5, seed=6))
    graph.replay()
    assert torch.equal(captured, layer())


@needs_real
@needs_gpu
def test_a_compiled_model_on_a_gpu(on_gpu: OnGpu) -> None:
    module, x = mlp(torch.bfloat16).cuda(), hidden(dtype=torch.bfloat16).cuda()
    exact = mlp(torch.bfloat16, "eager").double()(x.cpu().double())[0]
    with torch.no_grad():
        options = {"kernels": "hub", "strict": True}
        out = torch.compile(module, backend="mxfp4", options=options)(x)[0]
        assert_as_accurate(out.cpu(), module(x)[0].cpu(), exact)
