"""What only a GPU can show. Other tests of the Triton kernels run on it, too, if there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_triton_mxfp8
import torch
from implementations import ALPHA, LIMIT, TRITON, Kernels, check_matmul, chosen, randn
from models import DTYPES, compile_with, hidden, mlp, model, on_mxfp4_grid, pack, tokens
from oracle import Matrices, assert_as_accurate, random_logits, random_routes
from test_linears_mxfp8 import random_weight
from torch import Tensor

from mxfp4_fx.core.layouts import MXFP8_ROWS
from mxfp4_fx.ops import target
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.source import FLOATS, LINEAR, Source
from mxfp4_fx.weights.swizzle import swizzle_weight
from mxfp4_fx.weights.upkeep import restore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ops = torch.ops.mxfp4


@pytest.fixture(params=TRITON)
def triton(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    with chosen(request.param) as kernels:
        yield kernels


@pytest.mark.parametrize("activation", ["none", "swiglu"])
@pytest.mark.parametrize("t", [1, 4, 20, 130, 700])
def test_sizes_of_gpt_oss(triton: Kernels, t: int, activation: str) -> None:
    """K is gpt-oss's, and so are steps and splits; there are fewer columns and experts."""
    matrices, indices = Matrices.random(8, 512, 2880, torch.bfloat16), random_routes(t, 8, 4)[0]
    x = randn(t, 2880, dtype=torch.bfloat16)
    check_matmul(triton, x, matrices, indices, activation=activation)


class Layer:
    """Routing and two matmuls on the device, with whatever ``x`` and ``logits`` hold."""

    def __init__(self, kernels: Kernels, t: int, e: int = 32) -> None:
        self.kernels = kernels
        self.x, self.logits = kernels.there(
            (randn(t, 2880, dtype=torch.bfloat16), random_logits(t, e))
        )
        sizes = ((512, 2880), (2880, 256))
        each = [kernels.operands(Matrices.random(e, *size, torch.bfloat16)) for size in sizes]
        self.gate_up, self.down = kernels.there(each)

    def __call__(self) -> Tensor:
        here = {"kernels": "triton", "layout": self.kernels.layout}
        routes = ops.routing(self.logits, 4, kernels="triton")
        gammas, gather_index, scatter_index, offsets = routes
        inner = ops.matmul_ogs(
            self.x, *self.gate_up, offsets, gather_index, activation="swiglu", alpha=ALPHA,
            limit=LIMIT, **here,
        )  # fmt: skip
        y: Tensor = ops.matmul_ogs(
            inner, *self.down, offsets, None, scatter_index, gammas, 4, **here
        )
        return y


@pytest.mark.parametrize("t", [1, 16, 64, 400, 1000, 4096])
def test_two_runs_give_the_same_bits(triton: Kernels, t: int) -> None:
    layer = Layer(triton, t)
    first = layer()
    for _ in range(3):
        assert torch.equal(first, layer())


@pytest.mark.parametrize("t", [1, 64, 1000])
def test_a_cuda_graph_follows_its_inputs(triton: Kernels, t: int) -> None:
    layer = Layer(triton, t)
    layer()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    layer.x.copy_(randn(t, 2880, seed=5))
    layer.logits.copy_(random_logits(t, 32).flip(1))
    graph.replay()
    replayed = captured.clone()
    assert torch.equal(replayed, layer())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 60, 130, 1100])
def test_linears_in_mxfp8_of_sizes_of_gpt_oss(rows: int, dtype: torch.dtype) -> None:
    """Each of a table's tiles, and the same twice; of o and of q, k and v there are fewer rows."""
    for k, sizes in ((2880, (640, 64, 64)), (4096, (500,))):
        weights = [random_weight(n, k, seed=n) for n in sizes]
        biases = [randn(n, dtype=dtype, seed=n) for n in sizes]
        x = randn(rows, k, dtype=dtype)
        test_triton_mxfp8.check(x, weights, biases)
        pairs = zip(*(test_triton_mxfp8.run(x, weights, biases) for _ in range(2)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("rows", [1, 130])
def test_a_cuda_graph_of_linears_in_mxfp8_follows_their_input(rows: int) -> None:
    codes, scales = (part.cuda() for part in random_weight(640, 2880))
    x = randn(rows, 2880, dtype=torch.bfloat16).cuda()

    def call() -> Tensor:
        (y,) = ops.linears_mxfp8(x, [codes], [scales], [None], "triton")
        return y

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(randn(rows, 2880, seed=5))
    graph.replay()
    replayed = captured.clone()
    assert torch.equal(replayed, call())


def test_quantizing_to_mxfp8_on_the_device_is_that_of_the_cpu() -> None:
    weight = torch.randn(40, 96, dtype=torch.bfloat16)
    made = [swizzle_weight(Source((on,), LINEAR), MXFP8_ROWS) for on in (weight.cuda(), weight)]
    for there, here in zip(*made, strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
@pytest.mark.usefixtures("no_gradients")
def test_linears_in_mxfp8_on_a_gpu_are_freed_and_restored() -> None:
    """Small integers are values of MXFP8."""
    module = torch.nn.Linear(64, 40, bias=False).requires_grad_(False)
    module.weight.copy_(torch.randint(-3, 4, (40, 64)))
    module, x = module.cuda(), torch.randint(-3, 4, (3, 64)).float().cuda()
    expected = module(x)
    on = {"linears": "mxfp8"}
    assert torch.equal(compile_with(module, "eager", options={**on, "verify": True})(x), expected)
    torch.compiler.reset()
    run = compile_with(module, "eager", options={**on, "free_weights": True})
    for _ in range(2):
        assert torch.equal(run(x), expected)
    assert type(module.weight) is FreedParameter
    restore(module)
    assert torch.equal(module(x), expected)


@pytest.mark.usefixtures("no_gradients")
def test_a_model_under_cuda_graphs() -> None:
    ids = tokens().cuda()
    module = model(torch.bfloat16).cuda()
    eager = module(ids).logits
    exact = model(torch.float64, "batched_mm")(ids.cpu()).logits
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend="mxfp4", mode="reduce-overhead")
    for _ in range(3):  # runs, records, replays
        logits = compiled(ids).logits.clone()
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert_as_accurate(logits.cpu(), eager.cpu(), exact)


@pytest.mark.usefixtures("no_gradients")
def test_a_gpu_is_served_by_triton_unasked() -> None:
    module, x = mlp(torch.bfloat16).cuda(), hidden(dtype=torch.bfloat16).cuda()
    compiled = torch.compile(module, backend="mxfp4", options={"strict": True})
    exact = mlp(torch.float64, "batched_mm")(x.cpu().double())[0]
    assert_as_accurate(compiled(x)[0].cpu(), module(x)[0].cpu(), exact)


@pytest.mark.parametrize("layout", ["wgmma_fragments", "mma_fragments", "row_major"])
def test_swizzling_on_the_device_is_that_of_the_cpu(layout: str) -> None:
    weight = on_mxfp4_grid(torch.randn(3, 96, 80) * 0.1)
    swizzled = [swizzle_weight(Source((on,), FLOATS), layout) for on in (weight.cuda(), weight)]
    for there, here in zip(*swizzled, strict=True):
        assert there.is_cuda
        assert torch.equal(there.cpu(), here)


def test_swizzling_takes_no_more_room_for_more_experts() -> None:
    """Beside the result."""
    layout = target.choose(torch.device("cuda"), "triton").layout

    def extra(experts: int) -> int:
        weight = torch.randn((experts, 1024, 2048), dtype=torch.bfloat16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        parts = swizzle_weight(Source((weight,), FLOATS), layout)
        return torch.cuda.max_memory_allocated() - before - sum(p.numel() for p in parts)

    assert extra(16) <= extra(4)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    workload = Path(__file__).with_name("gpu_workload.py")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, workload],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_packed_weights_are_freed_on_the_device() -> None:
    packed = pack(mlp(torch.bfloat16)).cuda()
    x = hidden(dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        expected = compile_with(packed)(x)[0]
        torch.compiler.reset()
        compiled = compile_with(packed, options={"free_weights": True})
        assert torch.equal(compiled(x)[0], expected)
    layout = target.choose(x.device).layout
    # Kernels that read checkpoint order go on reading the parameters themselves.
    freed = 0 if layout == "row_major" else 4
    assert sum(isinstance(p, FreedParameter) for p in packed.parameters()) == freed


def test_packed_weights_come_back_to_the_device() -> None:
    packed = pack(mlp(torch.bfloat16)).cuda()
    before = {name: p.clone() for name, p in packed.named_parameters()}
    with torch.no_grad():
        compile_with(packed, options={"free_weights": True})(hidden(dtype=torch.bfloat16).cuda())
    restore(packed)
    for name, parameter in packed.named_parameters():
        assert parameter.is_cuda
        assert torch.equal(parameter, before[name])
