"""Experts on the CPU while the rest of the model is elsewhere: hidden states travel, not weights.

There is no GPU here. Graphs are captured from fake CUDA tensors, which have no values; models run
on the device of ``second_device.py``, whose ops are the CPU's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors, write_packed
from expecttest import assert_expected_inline
from models import config, mlp, pack
from near_miss import edited, swap_methods
from torch import Tensor, fx, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP, GptOssTopKRouter

import mxfp4_fx
from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.torch_private import FakeTensorMode
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.passes.pipeline import run_pipeline

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def beside_a_gpu() -> Iterator[GptOssMLP]:
    """An MLP on a GPU, its packed experts on the CPU; of fake tensors."""
    with FakeTensorMode():
        with torch.device("cuda"):
            module = GptOssMLP(config())
        module.experts = PackedExperts(6, 64, 96)
        yield module


def hidden_on_gpu() -> Tensor:
    return torch.empty(1, 7, 64, device="cuda")


def calls(module: nn.Module, *inputs: Any) -> str:
    """The calls of the lowered graph of a module, each with the device of its result."""
    lines: list[str] = []

    def backend(gm: fx.GraphModule, values: list[Any]) -> Any:
        lowered, _ = run_pipeline(gm, values, Options())
        for node in lowered.graph.nodes:
            value = node.meta.get("example_value")
            if node.op.startswith("call_") and isinstance(value, Tensor):
                name = getattr(node.target, "__name__", str(node.target))
                lines.append(f"{name} on {value.device}")
        return gm.forward

    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    return "\n".join(lines)


def test_the_graph(beside_a_gpu: GptOssMLP) -> None:
    """Three values travel to the CPU and one back; weights do not."""
    assert_expected_inline(
        calls(beside_a_gpu, hidden_on_gpu()),
        """\
reshape on cuda:0
linear on cuda:0
getitem on cuda:0
getitem on cuda:0
softmax on cuda:0
to on cpu
to on cpu
to on cpu
getitem on cpu
getitem on cpu
getitem on cpu
getitem on cpu
matmul_ogs.default on cpu
matmul_ogs.default on cpu
to on cuda:0
reshape on cuda:0""",
    )


def test_what_explain_says(beside_a_gpu: GptOssMLP) -> None:
    told = mxfp4_fx.explain(beside_a_gpu, hidden_on_gpu())
    (rewrite,) = told.rewrites
    assert rewrite.kernels in ("cpu", "pytorch")
    assert "hidden states travel from cuda:0 to cpu" in str(told)


def test_another_router_on_the_gpu(beside_a_gpu: GptOssMLP) -> None:
    """It is not proven, and its routes are taken as they are."""
    softmax = "torch.nn.functional.softmax(router_top_value, dim=1, dtype=router_top_value.dtype)"
    forward = edited(GptOssTopKRouter.forward, {softmax: "torch.sigmoid(router_top_value)"})
    swap_methods(beside_a_gpu.router, forward=forward)
    (rewrite,) = mxfp4_fx.explain(beside_a_gpu, hidden_on_gpu()).rewrites
    assert rewrite.router.startswith("routes of the model's own router")


class DenseOnCpu(nn.Module):
    """Dense experts on the CPU, for which the model's own code moves what they need."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("cuda"):
            self.router = GptOssTopKRouter(config())
        self.experts = GptOssMLP(config()).experts

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(0)
        _, scores, indices = self.router(x)
        return self.experts(x.cpu(), indices.cpu(), scores.to("cpu")).to(x.device)


def test_dense_experts_that_the_model_serves_itself() -> None:
    with FakeTensorMode():
        told = mxfp4_fx.explain(DenseOnCpu(), hidden_on_gpu())
    (rewrite,) = told.rewrites
    assert rewrite.form == "grouped_mm"
    assert rewrite.travel == "hidden states travel from cuda:0 to cpu"


def test_only_the_rest_moves() -> None:
    module = pack(mlp())
    before = dict(module.experts.named_parameters())
    assert mxfp4_fx.place_experts(module, "cpu") == 1
    module.to("meta")
    assert module.router.weight.is_meta
    for name, parameter in module.experts.named_parameters():
        assert parameter is before[name]
        assert parameter.device.type == "cpu"
    module.experts.to("meta", torch.float16)  # the dtype changes, the device does not
    assert module.experts.down_proj_bias.dtype == torch.float16
    assert module.experts.down_proj_bias.device.type == "cpu"
    assert module.experts.down_proj_blocks.dtype == torch.uint8


def test_experts_are_placed_anew() -> None:
    module = pack(mlp())
    for device in ("cpu", "meta"):
        mxfp4_fx.place_experts(module, device)
        assert {p.device.type for p in module.experts.parameters()} == {device}


def test_nothing_to_place() -> None:
    with pytest.raises(OptionError, match="this GptOssMLP has no packed experts"):
        mxfp4_fx.place_experts(mlp(), "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.mark.parametrize("device_map", ["meta", {"": torch.device("meta")}], ids=repr)
def test_a_loaded_model(checkpoint: Path, device_map: Any) -> None:
    model = mxfp4_fx.from_pretrained(checkpoint, device_map=device_map, experts_device="cpu")
    stored = read_tensors(checkpoint)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (".experts." not in name)
        assert parameter.is_meta or torch.equal(parameter, stored[name])


@pytest.mark.parametrize("device_map", ["auto", {"model": 0, "lm_head": 1}], ids=repr)
def test_a_rest_on_several_devices(checkpoint: Path, device_map: Any) -> None:
    with pytest.raises(OptionError, match="the rest of the model needs one device"):
        mxfp4_fx.from_pretrained(checkpoint, device_map=device_map, experts_device="cpu")


def test_a_device_that_torch_does_not_know(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="experts_device='gpu'"):
        mxfp4_fx.from_pretrained(checkpoint, experts_device="gpu")


ON_A_SECOND_DEVICE = """
import second_device
import torch
from models import Graphs, compile_with, hidden, mlp, pack
import mxfp4_fx

def run(experts, x, indices, scores):
    # The result and the gradients of the experts alone.
    inputs = x.detach().requires_grad_(), indices, scores.detach().requires_grad_()
    y = experts(*inputs)
    y.backward(torch.ones_like(y))
    return [g.cpu() for g in (y.detach(), inputs[0].grad, inputs[2].grad)]

def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)

near, far, x = pack(mlp()), pack(mlp()), hidden()
mxfp4_fx.place_experts(far, "cpu")
far.to("far")
assert {p.device.type for p in far.router.parameters()} == {"far"}
assert {p.device.type for p in far.experts.parameters()} == {"cpu"}

with torch.no_grad():
    y, scores = near(x)
    assert_same([t.cpu() for t in far(x.to("far"))], [y, scores])
    indices = near.router(x[0])[2]
inputs = x[0], indices, scores
inputs_far = [t.to("far") for t in inputs]
assert_same(run(far.experts, *inputs_far), run(near.experts, *inputs))
expected = run(compile_with(near.experts, options={"strict": True}), *inputs)
assert_same(run(compile_with(far.experts, options={"strict": True}), *inputs_far), expected)

graphs = Graphs()
with torch.no_grad():
    y, _ = compile_with(far, graphs, options={"strict": True})(x.to("far"))
assert y.device.type == "far"
assert_same([y[0].cpu()], expected[:1])

with torch.device("meta"):
    empty = pack(mlp()).experts
empty.stays_on = torch.device("cpu")
empty.to_empty(device="far")
assert {p.device.type for p in empty.parameters()} == {"cpu"}

"""


@pytest.mark.exhaustive
def test_a_second_device() -> None:
    """Uncompiled and compiled, with gradients, bit for bit what the CPU computes alone."""
    command = [sys.executable, "-c", ON_A_SECOND_DEVICE]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
