"""What is almost the experts of a family stays as it is, or becomes what it means.

Each case changes one thing in transformers' own code, as ``test_near_misses.py`` does for GPT-OSS.
"""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from combinations import exhaustive
from models import Graphs, compile_with
from near_miss import edited, missed, swap_methods
from oracle import E2M1
from test_families import STRICT, check, x_and_logits
from torch import Tensor, nn
from transformers.integrations import moe

pytestmark = pytest.mark.usefixtures("no_gradients")

SILU, GELU, RELU2 = "Qwen3MoeExperts", "Gemma4TextExperts", "NemotronHExperts"
CLAMPED, BIASED = "DeepseekV4Experts", "OpenAIPrivacyFilterExperts"
CHUNK = "gate_up_out.chunk(2, dim=-1)"


def block(name: str, form: str = "grouped_mm", **sizes: Any) -> families.Block:
    return families.Block(families.experts(name, form, **sizes))


def gated(name: str, body: str, **sizes: Any) -> families.Block:
    """A block whose gate is computed by other code."""
    made = block(name, **sizes)
    names: dict[str, Any] = {"torch": torch, "F": nn.functional}
    exec(f"def _apply_gate(self, gate_up_out):\n    {body}", names)
    swap_methods(made.experts, _apply_gate=names["_apply_gate"])
    return made


def acting(name: str, function: Any) -> families.Block:
    """A block with another activation function."""
    made = block(name)
    del made.experts.act_fn  # a module
    made.experts.act_fn = function
    return made


def formed(name: str, form: str, changes: dict[str, str], **sizes: Any) -> families.Block:
    """A block with an edited form of the experts."""
    made = block(name, form, **sizes)
    function = moe.ALL_EXPERTS_FUNCTIONS[form]
    linear = moe._grouped_linear if form == "grouped_mm" else moe._batched_linear
    inner = {k: v for k, v in changes.items() if k not in _OUTER}
    outer = {k: v for k, v in changes.items() if k in _OUTER}
    names = {linear.__name__: edited(linear, inner)} if inner else {}
    swap_methods(made.experts, forward=edited(function, outer, **names))
    return made


WEIGHTED = "weighted_out = proj_out * sample_weights.unsqueeze(-1)"
ACTED = "proj_out = self._apply_gate(proj_out)"
DOWN_BIAS = "selected_biases = self.down_proj_bias[expert_ids] if self.has_bias else None"
UP_BIAS = "selected_biases = self.gate_up_proj_bias[expert_ids] if self.has_bias else None"
DOWN_ORDER = "proj_out, selected_weights, bias=selected_biases, is_transposed=self.is_transposed"
_OUTER = {WEIGHTED, ACTED, DOWN_BIAS, UP_BIAS, DOWN_ORDER}

SPLIT = f"gate, up = {CHUNK}; return"
# What differs -> the block.
MISSES: dict[str, Any] = {
    # Activations.
    "GELU that is exact": lambda: gated(GELU, f"{SPLIT} F.gelu(gate) * up"),
    "GELU of up": lambda: gated(GELU, f"{SPLIT} gate * F.gelu(up, approximate='tanh')"),
    "SiLU of up": lambda: gated(SILU, f"{SPLIT} gate * F.silu(up)"),
    "SiLU of both": lambda: gated(SILU, f"{SPLIT} F.silu(gate) * F.silu(up)"),
    "ReLU for SiLU": lambda: gated(SILU, f"{SPLIT} F.relu(gate) * up"),
    "a soft cap": lambda: gated(SILU, f"{SPLIT} 7 * torch.tanh(F.silu(gate) * up / 7)"),
    "ReLU, not squared": lambda: acting(RELU2, nn.functional.relu),
    "a square without ReLU": lambda: acting(RELU2, torch.square),
    "ReLU of the square": lambda: acting(RELU2, lambda x: nn.functional.relu(torch.square(x))),
    "ReLU to the third": lambda: acting(RELU2, lambda x: nn.functional.relu(x).pow(3)),
    "squared ReLU of a gate": lambda: gated(SILU, f"{SPLIT} F.relu(gate).square() * up"),
    # Where gate and up are.
    "up, then gate": lambda: gated(SILU, f"up, gate = {CHUNK}; return F.silu(gate) * up"),
    "the gate twice": lambda: gated(SILU, f"{SPLIT} F.silu(gate) * gate"),
    "tokens in halves": lambda: gated(
        SILU,
        "gate, up = gate_up_out.chunk(2, dim=0); return torch.cat([F.silu(gate) * up] * 2)[:, :96]",
    ),
    # Clamps.
    "only the gate clamped": lambda: gated(CLAMPED, f"{SPLIT} F.silu(gate.clamp(max=2.5)) * up"),
    "only up clamped": lambda: gated(CLAMPED, f"{SPLIT} F.silu(gate) * up.clamp(-2.5, 2.5)"),
    "two limits": lambda: gated(
        CLAMPED, f"{SPLIT} F.silu(gate.clamp(max=2.5)) * up.clamp(-3.5, 3.5)"
    ),
    "SiLU clamped after it": lambda: gated(
        CLAMPED, f"{SPLIT} F.silu(gate).clamp(max=2.5) * up.clamp(-2.5, 2.5)"
    ),
    # Around the activation.
    "weights before the down projection": lambda: formed(
        SILU,
        "batched_mm",
        {
            ACTED: "proj_out = self._apply_gate(proj_out) * sample_weights.unsqueeze(-1)",
            WEIGHTED: "weighted_out = proj_out * 1.0",
        },
    ),
    "no bias behind down": lambda: formed(
        BIASED, "batched_mm", {DOWN_BIAS: "selected_biases = None"}
    ),
    "no bias behind gate and up": lambda: formed(
        BIASED, "batched_mm", {UP_BIAS: "selected_biases = None"}
    ),
    # Square weights: no size tells whether they are transposed.
    "square, transposed twice": lambda: formed(
        RELU2,
        "grouped_mm",
        {"weight.transpose(-2, -1)": "weight.transpose(-2, -1).transpose(-2, -1)"},
        moe_intermediate_size=64,
    ),
    "square, only down by columns": lambda: formed(
        RELU2, "batched_mm", {DOWN_ORDER: f"{DOWN_ORDER} or True"}, moe_intermediate_size=64
    ),
}


# What others show nearly as well.
RARE = {
    *("SiLU of both", "ReLU for SiLU", "ReLU of the square", "ReLU to the third", "the gate twice"),
    *("SiLU clamped after it", "squared ReLU of a gate", "SiLU of up", "tokens in halves"),
    *("SiLU by its formula", "up times the gate", "32 bits", "a view is written to", "sorted"),
    *("written to", "none"),
}


def thinned(cases: Any) -> list[Any]:
    return [exhaustive(case) if case in RARE else case for case in cases]


@pytest.mark.parametrize("what", thinned(MISSES))
def test_another_meaning_is_not_rewritten(what: str) -> None:
    assert missed(MISSES[what](), *x_and_logits(tokens=8))


# Near to another family's experts, and rewritten as what they are.
RIGHT: dict[str, Any] = {
    "square, operands of bmm swapped": lambda: formed(
        RELU2,
        "batched_mm",
        {"weight, input.unsqueeze(-1)).squeeze(-1)": "input.unsqueeze(1), weight).squeeze(1)"},
        moe_intermediate_size=64,
    ),
    "up times the gate": lambda: gated(SILU, f"{SPLIT} up * F.silu(gate)"),
    "SiLU by its formula": lambda: gated(SILU, f"{SPLIT} gate * torch.sigmoid(gate) * up"),
    "GELU clamped, of up and 2": lambda: gated(
        GELU,
        f"{SPLIT} F.gelu(gate.clamp(max=2.5), approximate='tanh') * (up.clamp(-2.5, 2.5) + 2)",
    ),
    "SiLU of up and minus a half": lambda: gated(SILU, f"{SPLIT} F.silu(gate) * (up + -0.5)"),
}


@pytest.mark.parametrize("what", thinned(RIGHT))
def test_another_family_is_rewritten_as_it_is(what: str) -> None:
    made = RIGHT[what]()
    for name in ("up_proj", "gate_up_proj", "down_proj"):
        weight = getattr(made.experts, name, None)
        if weight is not None:  # MXFP4 values along either axis
            weight.copy_(weight.new_tensor(E2M1)[(weight * 40).long() % 8] * weight.sign() / 16)
    check(made, x_and_logits())


def test_square_weights_that_are_not_transposed_are_rewritten_as_they_are() -> None:
    """grouped_mm has no float64; ``verify`` has its bound."""
    changes = {"weight.transpose(-2, -1)": "weight"}
    made = formed(RELU2, "grouped_mm", changes, moe_intermediate_size=64)
    compile_with(made, options=STRICT)(*x_and_logits())


class Ids(families.Block):
    """A block whose router's ids become others."""

    change = "none"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, scores = super().route(logits)
        if self.change == "written to":
            ids.sub_(1)
        elif self.change == "a view is written to":
            ids.view(-1).sub_(1)
        elif self.change == "a cast of them is written to":
            ids = ids.to(torch.int32)
            ids.sub_(1)
            ids = ids.to(torch.int64)
        elif self.change == "computed":
            ids = (ids + 1) % families.E
        elif self.change == "sorted":
            ids = torch.argsort(logits, dim=-1)[:, : self.top_k]
        elif self.change == "among more":
            ids = torch.topk(torch.cat([logits, logits - 99], dim=1), self.top_k, dim=-1)[1]
        elif self.change == "32 bits":
            ids = ids.to(torch.int32).to(torch.int64)
        return ids, scores


# How ids are made -> whether they are checked at each call, for want of a proof.
IDS = {
    "none": False,
    "32 bits": False,
    "written to": True,
    "a view is written to": True,
    "a cast of them is written to": True,
    "computed": True,
    "sorted": True,
    "among more": True,
}  # fmt: skip


@pytest.mark.parametrize("change", thinned(IDS))
def test_ids_that_are_not_proven_are_checked(change: str) -> None:
    """In the batched form -1 is the last expert."""
    made = Ids(families.experts(SILU, "batched_mm"))
    made.change = change
    graphs: Graphs = check(made, x_and_logits())
    assert ("mxfp4.expert_ids.default" in mxfp4_names(graphs)) == IDS[change]


def mxfp4_names(graphs: Graphs) -> list[str]:
    return [str(node.target) for gm in graphs.seen for node in gm.graph.nodes]
