"""Experts of more than one dtype: under autocast, and in models whose parts differ in dtype.

The rewritten experts compute in the dtype that the uncompiled ones had (``checks.compute_dtype``),
within the bound of that dtype. Results have the uncompiled dtype, and so have gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from combinations import exhaustive
from models import Graphs, compile_with, hidden, mlp, model, pack, tokens
from near_miss import edited, swap_methods
from oracle import assert_as_accurate, assert_within
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# In float64, in a form that has it.
IN_FLOAT64: dict[str, Any] = {"dtype": torch.float64, "form": "batched_mm"}


def frozen(dtype: torch.dtype = F32, form: str = "grouped_mm", seed: int = 0) -> GptOssMLP:
    """An MLP whose experts need no gradient; ``form`` may be "packed"."""
    packed = form == "packed"
    module = mlp(dtype, form="grouped_mm" if packed else form, seed=seed)
    if packed:
        pack(module)
    module.experts.requires_grad_(False)
    return module


def matmul_dtypes(graphs: Graphs) -> list[torch.dtype]:
    """The dtype of the result of each ``matmul_ogs``."""
    matmuls = (n for gm in graphs.seen for n in gm.graph.nodes if "matmul_ogs" in str(n.target))
    return [n.meta["example_value"].dtype for n in matmuls]


def ideal(module: GptOssMLP, x: Tensor, logits: Tensor, dtype: torch.dtype) -> oracle.Bounded:
    """The MLP's exact output for these logits, and the bound of ``dtype``'s rounding."""
    exact = mlp(**IN_FLOAT64).experts  # of the same seed
    parts = [(exact.gate_up_proj, exact.gate_up_proj_bias), (exact.down_proj, exact.down_proj_bias)]
    biases = [getattr(module.experts, f"{n}_bias").double() for n in ("gate_up_proj", "down_proj")]
    gate_up, down = (
        (weight.mT, bias) for (weight, _), bias in zip(parts, biases, strict=True)
    )  # fmt: skip
    assert all(row.unique().numel() == row.numel() for row in logits), "equal logits: any order"
    routes = oracle.route(logits, 3)
    return oracle.experts(x.to(dtype), *routes, gate_up, down, 1.702, 7.0, inner_dtype=dtype)


@pytest.mark.parametrize(
    ("form", "dtype", "autocast", "inside"),
    [
        # torch._grouped_mm and this package's ops have no rule for autocast; bmm has one.
        ("grouped_mm", F32, BF16, F32),
        ("batched_mm", F32, BF16, BF16),
        ("packed", F32, BF16, F32),
        ("batched_mm", BF16, F16, F16),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("grouped_mm", F32, F16, F32),
                ("batched_mm", F32, F16, F16),
                ("packed", F32, F16, F32),
                ("grouped_mm", BF16, F16, BF16),
                ("packed", BF16, F16, BF16),
                ("eager", F32, BF16, F32),
            )
        ),
    ],
)
@pytest.mark.usefixtures("no_gradients")
def test_every_form(
    form: str, dtype: torch.dtype, autocast: torch.dtype, inside: torch.dtype
) -> None:
    module, x, graphs = frozen(dtype, form), hidden(dtype=dtype), Graphs()
    run = compile_with(module, graphs, options={"strict": True})
    with torch.autocast("cpu", autocast):
        (y, scores), (expected, expected_scores) = run(x), module(x)
        logits = module.router(x[0])[0]
    assert matmul_dtypes(graphs) == [inside, inside]
    assert torch.equal(scores, expected_scores)
    assert scores.dtype == autocast
    assert y.dtype == expected.dtype == dtype
    exact = ideal(module, x[0], logits, inside)
    assert_within(y[0], exact.rounded(dtype) if dtype != inside else exact)
    assert_as_accurate(y[0], expected[0], exact.value)


class InModes(nn.Module):
    """An MLP called under one autocast after the other, in one graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", BF16):
            plain = self.module(x)[0]
            with torch.autocast("cpu", enabled=False):
                off = self.module(x)[0]
            with torch.autocast("cpu", F16, cache_enabled=False):
                nested = self.module(x)[0]
        with torch.autocast("xpu", BF16):
            elsewhere = self.module(x)[0]
        return plain, off, nested, elsewhere, self.module(x)[0]


@pytest.mark.usefixtures("no_gradients")
def test_each_part_of_a_graph_computes_in_its_own_mode() -> None:
    module, x, graphs = InModes(mlp(form="batched_mm")), hidden(), Graphs()
    actual = compile_with(module, graphs, options={"strict": True})(x)
    assert matmul_dtypes(graphs)[::2] == [BF16, F32, F16, F32, F32]
    exact = mlp(**IN_FLOAT64)(x.double())[0]
    for y, expected in zip(actual, module(x), strict=True):
        assert_as_accurate(y, expected, exact)


FUNCTIONAL_BIAS = {"out.add_(bias)": "out = out + bias"}


def with_autocast(sizes: tuple[int, ...], changes: dict[str, str]) -> GptOssMLP:
    """An MLP of the batched form, with the matmuls of these input sizes under autocast."""
    bmm = "out = torch.bmm(input.unsqueeze(1), weight).squeeze(1)"
    mode = f"with torch.autocast('cpu', torch.bfloat16, enabled=input.shape[1] in {sizes}):"
    linear = edited(moe._batched_linear, {bmm: f"{mode}\n            {bmm}", **changes})
    module = mlp(form="batched_mm")
    forward = edited(moe.batched_mm_experts_forward, {}, _batched_linear=linear)
    swap_methods(module.experts, forward=forward)
    return module


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param((96,), {}, id="the second"),
        # A functional bias of float32, as in older transformers, makes the products float32 again.
        pytest.param((64, 96), FUNCTIONAL_BIAS, id="both"),
        pytest.param((64,), FUNCTIONAL_BIAS, id="the first", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.usefixtures("no_gradients")
def test_the_matmuls_alone(sizes: tuple[int, ...], changes: dict[str, str]) -> None:
    """The rewritten experts compute in the widest dtype."""
    module, x, graphs = with_autocast(sizes, changes), hidden(), Graphs()
    y, expected = compile_with(module, graphs, options={"strict": True})(x)[0], module(x)[0]
    assert matmul_dtypes(graphs) == [F32, F32]
    assert_as_accurate(y, expected, mlp(**IN_FLOAT64)(x.double())[0])


def experts_of_bfloat16() -> GptOssMLP:
    module = mlp()
    module.experts.bfloat16()
    return module


def biases_of_float32(form: str = "grouped_mm") -> GptOssMLP:
    module = mlp(BF16, form=form)
    for bias in (module.experts.gate_up_proj_bias, module.experts.down_proj_bias):
        bias.data = bias.data.float()
    return module


class RouterInFloat32(nn.Module):
    """A model of bfloat16 whose router is float32."""

    def __init__(self) -> None:
        super().__init__()
        module = mlp(BF16)
        self.router, self.experts = module.router.float(), module.experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, scores, indices = self.router(x[0].float())
        return self.experts(x[0], indices, scores), scores


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (experts_of_bfloat16, F32),
        (biases_of_float32, BF16),
        (RouterInFloat32, BF16),
        pytest.param(lambda: biases_of_float32("batched_mm"), BF16, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.usefixtures("no_gradients")
def test_parts_of_other_dtypes(make: Callable[[], Any], dtype: torch.dtype) -> None:
    """Without autocast. All of them multiply in bfloat16."""
    module, x, graphs = make(), hidden(dtype=dtype), Graphs()
    (y, scores), (expected, expected_scores) = (
        compile_with(module, graphs, options={"strict": True})(x),
        module(x),
    )
    assert matmul_dtypes(graphs) == [BF16, BF16]
    assert torch.equal(scores, expected_scores)
    exact = copy.deepcopy(module).double()
    exact.experts.config._experts_implementation = "batched_mm"
    indices = module.router(x[0].to(module.router.weight.dtype))[2]
    assert_as_accurate(
        y.view_as(x[0]),
        expected.view_as(x[0]),
        exact.experts(x[0].double(), indices, scores.double()),
    )


VERIFIED = [
    (F32, BF16, "batched_mm"),
    (F32, BF16, "grouped_mm"),
    (F32, BF16, "packed"),
    (F32, F16, "batched_mm"),
    (BF16, F16, "grouped_mm"),
    (BF16, F16, "batched_mm"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("dtype", "autocast", "form"), VERIFIED)
@pytest.mark.usefixtures("no_gradients")
def test_every_form_is_verified(dtype: torch.dtype, autocast: torch.dtype, form: str) -> None:
    with torch.autocast("cpu", autocast):
        compile_with(frozen(dtype, form), options={"verify": True})(hidden(dtype=dtype))


@pytest.mark.usefixtures("no_gradients")
def test_what_is_rounded_more_than_the_op_does_is_verified() -> None:
    module = with_autocast((64, 96), FUNCTIONAL_BIAS)
    compile_with(module, options={"verify": True, "strict": True})(hidden())


def step(module: Any, run: Callable[..., Any], x: Tensor, autocast: bool = True) -> list[Tensor]:
    """The gradients of the input and of the router, as in a step of training."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y, scores = run(x)
        loss = y.square().mean() + scores.square().mean()
    loss.backward()
    return [x.grad, module.router.weight.grad, module.router.bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("form", "inner"),
    [
        ("packed", "aot_eager"),
        *(exhaustive(form, "aot_eager") for form in ("grouped_mm", "batched_mm")),
        exhaustive("packed", "inductor"),
    ],
)
def test_gradients(form: str, inner: str) -> None:
    compiled, eager, exact = frozen(form=form), frozen(form=form), mlp(**IN_FLOAT64)
    x = hidden()
    run = compile_with(compiled, inner, options={"strict": True})
    actual, expected = step(compiled, run, x), step(eager, eager, x)
    wanted = step(exact, exact, x.double(), autocast=False)
    for a, e, w in zip(actual, expected, wanted, strict=True):
        assert_as_accurate(a, e, w)


@pytest.mark.exhaustive
def test_a_trainer(tmp_path: Path) -> None:
    """All but the packed experts is trained, by transformers' Trainer with ``bf16=True``."""

    def losses(whole: Any, bf16: bool) -> Tensor:
        torch.manual_seed(0)
        rows = [tokens(1, seed=seed)[0] for seed in range(6)]
        arguments = TrainingArguments(
            str(tmp_path), bf16=bf16, use_cpu=True, max_steps=3, learning_rate=1e-2,
            per_device_train_batch_size=2, logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(whole, arguments, train_dataset=data)
        trainer.train()
        return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])

    made = [pack(model(num_hidden_layers=1)).train() for _ in range(2)]
    made[0].compile(backend="mxfp4", options={"strict": True, "inner": "aot_eager"})
    exact = model(num_hidden_layers=1, **IN_FLOAT64).train()
    for name, parameter in exact.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    found, expected = (losses(whole, bf16=True).bfloat16() for whole in made)
    assert len(found) == 3
    assert_as_accurate(found, expected, losses(exact, bf16=False).double())
