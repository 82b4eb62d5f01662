"""Experts that this package computes itself: ``experts_implementation="mxfp4_fx"`` and the op."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from combinations import covering
from models import compile_with, on_mxfp4_grid
from torch import Tensor, nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import mxfp4_fx
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.core.when_imported import when_imported
from mxfp4_fx.huggingface.implementation import NAME
from mxfp4_fx.ops.operands import ACTIVATIONS

E, A, H, I, T = 6, 2, 64, 96, 5  # noqa: E741
_SIZES = {"hidden_size": H, "intermediate_size": I, "num_experts_per_tok": A}

# With a gate and biases, [E, K, N]; with a gate, [E, N, K]; without a gate.
EXPERTS = {
    GptOssExperts: GptOssConfig(num_local_experts=E, **_SIZES),
    Qwen3MoeExperts: Qwen3MoeConfig(num_experts=E, moe_intermediate_size=I, **_SIZES),
    NemotronHExperts: NemotronHConfig(n_routed_experts=E, moe_intermediate_size=I, **_SIZES),
}


def routes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [T, H], and ids and weights [T, A]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((T, H), generator=generator)
    ids = torch.rand((T, E), generator=generator).argsort(dim=1)[:, :A]
    return x, ids, torch.rand((T, A), generator=generator)


def experts(kind: type[nn.Module], implementation: str) -> nn.Module:
    config = copy.deepcopy(EXPERTS[kind])
    config._experts_implementation = implementation
    made = kind(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


@pytest.mark.parametrize("kind", EXPERTS)
class TestImplementation:
    def test_results_and_gradients_have_the_bits_of_grouped_mm(self, kind: type) -> None:
        def run(implementation: str) -> list[Tensor]:
            module = experts(kind, implementation)
            x, ids, weights = (value.clone() for value in routes())
            x.requires_grad_()
            weights.requires_grad_()
            y = module(x, ids, weights)
            inputs = [x, weights, *module.parameters()]
            return [y, *torch.autograd.grad(y.square().sum(), inputs)]

        for actual, expected in zip(run(NAME), run("grouped_mm"), strict=True):
            assert torch.equal(actual, expected)

    def test_it_is_rewritten(self, kind: type) -> None:
        module = experts(kind, NAME)
        with torch.no_grad():
            compiled = compile_with(module, options={"strict": True, "verify": True})
            compiled(*routes())

    def test_experts_of_other_processes_add_nothing(self, kind: type) -> None:
        """Ids from E on, as transformers marks them under expert parallelism."""
        x, ids, weights = routes()
        elsewhere = torch.arange(A).expand(T, A) == 0
        given = x, ids.masked_fill(elsewhere, E), weights.masked_fill(elsewhere, 0.0)
        module, theirs = experts(kind, NAME), experts(kind, "grouped_mm")
        module._is_expert_parallel = theirs._is_expert_parallel = True
        with torch.no_grad():
            assert torch.equal(module(*given), theirs(*given))
            compile_with(module, options={"strict": True, "verify": True})(*given)


WORDS = {
    GptOssExperts: "",
    Qwen3MoeExperts: "activation: silu(gate) * up",
    NemotronHExperts: "activation: relu(up)^2, without a gate",
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_activation_is_named_unless_it_is_that_of_gpt_oss(kind: type[nn.Module]) -> None:
    with torch.no_grad():
        told = mxfp4_fx.explain(experts(kind, NAME), *routes())
    lines = [line for line in str(told).splitlines() if line.startswith("activation")]
    assert lines == list(filter(None, [WORDS[kind]]))
    (data,) = told.to_dict()["rewrites"]
    assert data["limit"] == (7.0 if kind is GptOssExperts else None)


def test_weights_that_are_trained_stay_as_they_are() -> None:
    module = experts(Qwen3MoeExperts, NAME)
    (miss,) = mxfp4_fx.explain(module, *routes()).misses
    assert "requires a gradient" in miss.reason


def test_it_is_valid_once_both_packages_are_imported() -> None:
    """In a new process, with transformers behind this package."""
    program = (
        "import mxfp4_fx, sys\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "print('mxfp4_fx' in ALL_EXPERTS_FUNCTIONS)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
    assert NAME in ALL_EXPERTS_FUNCTIONS  # here transformers came first


class TestWhenImported:
    def test_now_if_it_is_imported(self) -> None:
        seen: list[types.ModuleType] = []
        when_imported("sys", seen.append)
        assert seen == [sys]

    def test_once_when_it_will_have_been(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "imported_later.py").write_text("VALUE = 7\n")
        monkeypatch.syspath_prepend(tmp_path)
        seen: list[int] = []
        before = list(sys.meta_path)
        when_imported("imported_later", lambda module: seen.append(module.VALUE))
        assert seen == []
        import imported_later  # type: ignore[import-not-found]

        assert seen == [7]
        assert sys.meta_path == before
        assert type(imported_later.__spec__.loader).__name__ == "SourceFileLoader"

    def test_nothing_if_it_is_not_there(self) -> None:
        when_imported("no_such_module", lambda _: pytest.fail("there is none"))
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            __import__("no_such_module")


class CallsTheOp(nn.Module):
    """Experts that call ``mxfp4::moe.routes`` themselves, with MXFP4 values as weights."""

    def __init__(
        self, activation: str, transposed: bool, concatenated: bool, biased: bool, packed: bool
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        n = 2 * I if ACTIVATIONS[activation] else I
        self.family = {"activation": activation, "up_offset": 0.5}
        self.family |= {"is_transposed": transposed, "is_concatenated": concatenated and n > I}
        for name, shape in (("gate_up", (E, n, H)), ("down", (E, H, I))):
            values = torch.randn(shape, generator=generator) * 0.2
            scales = None
            if packed:
                values, scales = quantize(values)
            else:
                values = on_mxfp4_grid(values.mT)
                values = values if transposed else values.mT
            bias = torch.randn(shape[:2], generator=generator) if biased else None
            for part, tensor in (("", values), ("_scales", scales), ("_bias", bias)):
                held = None if tensor is None else nn.Parameter(tensor.contiguous(), False)
                self.register_parameter(name + part, held)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, first: int = 0) -> Tensor:
        return torch.ops.mxfp4.moe.routes(
            *(x, ids, weights, self.gate_up, self.gate_up_bias, self.down, self.down_bias),
            *(1.3, 4.0, self.gate_up_scales, self.down_scales),
            first_expert=first,
            **self.family,
        )


BOTH = (True, False)


@pytest.mark.parametrize(
    ("activation", "transposed", "concatenated", "biased", "packed"),
    covering(list(ACTIVATIONS), BOTH, BOTH, BOTH, BOTH),
)
def test_a_call_of_the_op_is_lowered(
    activation: str, transposed: bool, concatenated: bool, biased: bool, packed: bool
) -> None:
    module = CallsTheOp(activation, transposed, concatenated, biased, packed)
    with torch.no_grad():
        compiled = compile_with(module, options={"strict": True, "verify": True})
        compiled(*routes())
        (rewrite,) = mxfp4_fx.explain(module, *routes()).rewrites
    assert rewrite.form == "mxfp4_fx"
    assert (rewrite.activation, rewrite.experts, rewrite.top_k) == (activation, E, A)
    assert (rewrite.hidden, rewrite.intermediate) == (H, I)


def test_a_call_of_the_op_with_a_part_of_the_experts_stays() -> None:
    module = CallsTheOp("swiglu", True, False, True, False)
    with torch.no_grad():
        (miss,) = mxfp4_fx.explain(module, *routes(), first=2).misses
    assert "first_expert=2" in miss.reason


@pytest.mark.parametrize("name", ["gate_up_bias", "down_bias"])
def test_a_call_of_the_op_with_one_bias_stays(name: str) -> None:
    module = CallsTheOp("swiglu", True, False, True, False)
    module.register_parameter(name, None)
    with torch.no_grad():
        (miss,) = mxfp4_fx.explain(module, *routes()).misses
    assert "one bias" in miss.reason


def test_a_call_of_the_op_with_shapes_that_do_not_fit_stays() -> None:
    """The op itself lets a bias broadcast."""
    module = CallsTheOp("swiglu", True, False, True, False)
    module.gate_up_bias = nn.Parameter(torch.ones(E, 1), False)
    with torch.no_grad():
        (miss,) = mxfp4_fx.explain(module, *routes()).misses
    assert "gate_up_bias must be [E, N]" in miss.reason
