"""What is almost GPT-OSS's experts stays as it is, and is reported with the difference.

Each test changes one thing in transformers' own code. The snapshots are for reading: would the
reason help the one who meets it? ``EXPECTTEST_ACCEPT=1`` writes them anew.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import compile_with, hidden, mlp
from near_miss import NearMisses, edited, missed, with_experts, with_gate, with_router
from test_forms import check, first
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import mxfp4_fx

SILU = "torch.nn.functional.silu(gate)"
SWISH = "gate * torch.sigmoid(gate * self.alpha)"
GATE = "gate.clamp(min=None, max=self.limit)"
UP = "up.clamp(min=-self.limit, max=self.limit)"
COLUMNS = "gate_up[..., ::2], gate_up[..., 1::2]"
TOP_K = "torch.topk(router_logits, self.top_k, dim=-1)"
SOFTMAX = "torch.nn.functional.softmax(router_top_value, dim=1, dtype=router_top_value.dtype)"


class TestSwiglu(NearMisses):
    def test_a_tensor_stands_where_the_number_should(self) -> None:
        self.assert_missed(
            with_gate({"(up + 1)": "(up + glu)"}),
            """\
experts: not the grouped_mm form: expected add(clamp(..) or getitem(..), other=up_offset,
alpha=1), with up_offset but found mul(gate_1, other=sigmoid)
""",
        )

    def test_one_is_added_with_a_factor(self) -> None:
        self.assert_missed(
            with_gate({"(up + 1)": "torch.add(up, 1, alpha=2)"}),
            """\
experts: not the grouped_mm form: expected add(clamp(..) or getitem(..), other=up_offset,
alpha=1), with 1 = 1 but found 2
""",
        )

    def test_the_parts_are_added(self) -> None:
        self.assert_missed(
            with_gate({"(up + 1) * glu": "(up + 1) + glu"}),
            """\
experts: not the grouped_mm form: expected an activation that kernels compute (GPT-OSS's
SwiGLU, SiLU or GELU in its tanh form times up, or squared ReLU), found add(alpha=1, add,
other=glu)
""",
        )

    def test_gate_is_clamped_on_both_sides(self) -> None:
        self.assert_missed(
            with_gate({GATE: "gate.clamp(-self.limit, self.limit)"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=None, max=limit), found
clamp(min=-7.0, max=7.0, gate)
""",
        )

    def test_gate_is_clamped_below_instead(self) -> None:
        self.assert_missed(
            with_gate({GATE: "gate.clamp(min=-self.limit)"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=None, max=limit), found
clamp(min=-7.0, max=None, gate)
""",
        )

    def test_gate_is_not_clamped(self) -> None:
        self.assert_missed(
            with_gate({GATE: "gate"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=None, max=limit), found
getitem(add_, index=(..., ::2))
""",
        )

    def test_up_is_clamped_above_only(self) -> None:
        self.assert_missed(
            with_gate({UP: "up.clamp(max=self.limit)"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=-limit, max=limit), with
-limit but found None
""",
        )

    def test_up_is_clamped_below_only(self) -> None:
        self.assert_missed(
            with_gate({UP: "up.clamp(min=-self.limit)"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=-limit, max=limit), with
limit but found None
""",
        )

    def test_up_has_another_limit_below(self) -> None:
        self.assert_missed(
            with_gate({UP: "up.clamp(-self.limit / 2, self.limit)"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=-limit, max=limit), with
-limit = -7.0 but found -3.5
""",
        )

    def test_up_has_another_limit_than_gate(self) -> None:
        self.assert_missed(
            with_gate({UP: "up.clamp(-self.limit / 2, self.limit / 2)"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=None, max=limit), with
limit = 3.5 but found 7.0
""",
        )

    def test_up_has_another_limit_under_dynamic_shapes(self) -> None:
        module = with_gate({UP: "up.clamp(-self.limit / 2, self.limit / 2)"})
        assert "limit = 3.5" in missed(module, hidden() * 8, dynamic=True)

    def test_gate_and_up_are_swapped(self) -> None:
        self.assert_missed(
            with_gate({"gate, up =": "up, gate ="}),
            """\
experts: not the grouped_mm form: expected getitem(add(..) or grouped_mm(..), index=(...,
1::2)), found getitem(add_, index=(..., ::2))
""",
        )

    def test_gate_and_up_are_the_same_columns(self) -> None:
        self.assert_missed(
            with_gate({"1::2": "0::2"}),
            """\
experts: not the grouped_mm form: expected getitem(add(..) or grouped_mm(..), index=(...,
1::2)), found getitem(add_, index=(..., 0::2))
""",
        )

    def test_alpha_is_applied_again(self) -> None:
        self.assert_missed(
            with_gate({SWISH: f"{SWISH} * self.alpha"}),
            """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=None, max=limit), found
mul(gate_1, other=sigmoid)
""",
        )

    def test_alpha_is_a_tensor(self) -> None:
        alpha = "gate.new_full((), self.alpha)"
        self.assert_missed(
            with_gate({"gate * self.alpha": f"gate * {alpha}"}),
            """\
experts: not the grouped_mm form: expected mul(clamp(..) or getitem(..), other=alpha), with
alpha but found new_full(..)
""",
        )

    def test_the_sigmoid_is_of_the_gate_before_clamping(self) -> None:
        changes = {"gate * self.alpha": "gate_up[..., ::2] * self.alpha"}
        self.assert_missed(
            with_gate(changes),
            """\
experts: not the grouped_mm form: getitem(add_, index=(..., ::2)) stands where
clamp(min=None, max=7.0, gate) should be used again
""",
        )

    def test_the_sigmoid_is_of_up(self) -> None:
        self.assert_missed(
            with_gate({"gate * self.alpha": "up * self.alpha"}),
            """\
experts: not the grouped_mm form: clamp(min=-7.0, max=7.0, up) stands where clamp(min=None,
max=7.0, gate) should be used again
""",
        )

    def test_tanh(self) -> None:
        self.assert_missed(
            with_gate({"torch.sigmoid": "torch.tanh"}),
            """\
experts: not the grouped_mm form: expected sigmoid(mul(..)), found tanh(..)
""",
        )


@pytest.mark.parametrize(
    "changes",
    [{"torch.sigmoid": "torch.tanh"}, {GATE: "gate"}, {"gate, up =": "up, gate ="}],
    ids=["tanh", "gate not clamped", "swapped"],
)
def test_reasons_speak_of_the_form_at_hand(changes: dict[str, str]) -> None:
    with torch.no_grad():
        assert "not the batched_mm form" in missed(with_gate(changes, "batched_mm"), hidden() * 8)


REVERSED = {"router_scores, router_indices": "router_scores, router_indices.flip(1)"}
# Other experts, or another router, than GPT-OSS's: they become what they are.
RIGHT: dict[str, Any] = {
    "no one added to up": lambda: with_gate({"(up + 1)": "up"}),
    "two added to up": lambda: with_gate({"(up + 1)": "(up + 2)"}),
    "halves": lambda: with_gate({COLUMNS: "gate_up.chunk(2, dim=-1)"}),
    "silu": lambda: with_gate({SWISH: SILU}),
    "sigmoid without alpha": lambda: with_gate({"gate * self.alpha": "gate"}),
    "softmax before top-k": lambda: with_router(
        {
            TOP_K: "torch.topk(router_logits.softmax(dim=-1), self.top_k, dim=-1)",
            SOFTMAX: "router_top_value",
        }
    ),
    "softmax over all experts": lambda: with_router(
        {SOFTMAX: "router_logits.softmax(dim=-1).gather(1, router_indices)"}
    ),
    "softmax over tokens": lambda: with_router({"dim=1": "dim=0"}),
    "sigmoid": lambda: with_router({SOFTMAX: "router_top_value.sigmoid()"}),
    "scaled scores": lambda: with_router({SOFTMAX: f"{SOFTMAX} * 2.5"}),
    "temperature": lambda: with_router({"(router_top_value,": "(router_top_value / 2,"}),
    "smallest logits": lambda: with_router({"dim=-1": "dim=-1, largest=False"}),
    "other logits for the choice": lambda: with_router(
        {
            TOP_K: "torch.topk(-router_logits, self.top_k, dim=-1)",
            SOFTMAX: "router_logits.gather(1, router_indices).softmax(dim=1)",
        }
    ),
    "another top-k": lambda: with_router(
        {"return router_logits": f"router_indices = (-{TOP_K}[0]).topk(3)[1]\n    return 0"}
    ),
    "scores in reverse": lambda: with_router({SOFTMAX: f"{SOFTMAX}.flip(1)"}),
    "indices in reverse": lambda: with_router(REVERSED),
    "scores in the wrong order": lambda: with_experts(
        {"top_k_weights.reshape(-1)": "top_k_weights.t().reshape(-1)"}, "batched_mm"
    ),
}


@pytest.mark.parametrize("what", RIGHT)
def test_other_experts_and_routers_become_what_they_are(what: str) -> None:
    with torch.no_grad():
        # As many tokens as experts a token: no shape tells the order of the scores.
        module, x = RIGHT[what](), hidden(3)
        if what != "softmax before top-k":  # where large logits would tie
            x = x * 8
        run = compile_with(module, options={"strict": True, "verify": True})
        check(run(x)[0], module, first, x)


class TestGroupedExperts(NearMisses):
    def test_gate_up_bias_of_the_wrong_expert(self) -> None:
        changes = {"gate_up_proj_bias[expert_ids_g]": "gate_up_proj_bias[expert_ids]"}
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: view(router_indices, shape=(21)) stands where
getitem(sort, index=0) should be used again
""",
        )

    def test_down_bias_of_the_wrong_expert(self) -> None:
        changes = {"down_proj_bias[expert_ids_g]": "down_proj_bias[expert_ids]"}
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: view(router_indices, shape=(21)) stands where
getitem(sort, index=0) should be used again
""",
        )

    def test_scores_are_not_applied(self) -> None:
        changes = {"proj_out * sample_weights_g.unsqueeze(-1)": "proj_out"}
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: expected mul(add(..) or grouped_mm(..), other=view(..)),
found add(alpha=1, out_1, other=selected_biases_1)
""",
        )

    def test_scores_in_the_wrong_order(self) -> None:
        self.assert_missed(
            with_experts({"sample_weights[perm]": "sample_weights"}),
            """\
experts: not the grouped_mm form: expected getitem(view(..), index=getitem(..)), found
view(router_scores, shape=(21))
""",
        )

    def test_scores_applied_before_the_down_projection(self) -> None:
        changes = {
            "proj_out = self._apply_gate(proj_out)": "proj_out = self._apply_gate(proj_out)"
            " * sample_weights_g.unsqueeze(-1)",
            "proj_out * sample_weights_g": "proj_out + 0 * sample_weights_g",
        }
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: expected mul(add(..) or grouped_mm(..), other=view(..)),
found add(alpha=1, add__1, other=mul_4)
""",
        )

    def test_rows_of_the_wrong_token(self) -> None:
        self.assert_missed(
            with_experts({"perm // num_top_k": "perm % num_tokens"}),
            """\
experts: not the grouped_mm form: expected floordiv(getitem(..), other=A), found mod(perm,
other=7)
""",
        )

    def test_experts_sorted_downwards(self) -> None:
        changes = {"torch.sort(expert_ids)": "torch.sort(expert_ids, descending=True)"}
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: expected sort(view(..), dim=0, descending=False), found
sort(dim=0, descending=True, expert_ids)
""",
        )

    def test_counts_over_another_range(self) -> None:
        changes = {"max=self.num_experts - 1)\n    offsets": "max=self.num_experts)\n    offsets"}
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: expected histc(cast(..), bins=E, min=0, max=E-1), with E-1
= 5 but found 6
""",
        )

    def test_rows_stay_sorted(self) -> None:
        changes = {"weighted_out[inv_perm]": "weighted_out + 0 * inv_perm[:, None]"}
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: expected getitem(mul(..), index=index_put(..)), found
add(alpha=1, weighted_out, other=mul_4)
""",
        )

    def test_rows_are_sorted_again(self) -> None:
        self.assert_missed(
            with_experts({"weighted_out[inv_perm]": "weighted_out[perm]"}),
            """\
experts: not the grouped_mm form: expected index_put(empty_like(..), indices=(getitem(..)),
values=arange(..), accumulate=False), found getitem(sort, index=1)
""",
        )

    def test_sum_over_tokens(self) -> None:
        changes = {
            "view(num_tokens, num_top_k, hidden_dim)": "view(num_top_k, num_tokens, hidden_dim)",
            "sum(dim=1)": "sum(dim=0)",
        }
        self.assert_missed(
            with_experts(changes),
            """\
experts: not the grouped_mm form: expected view(getitem(..), shape=(T, A, H)), with T = 7
but found 3
""",
        )

    def test_mean_over_the_choices(self) -> None:
        self.assert_missed(
            with_experts({".sum(dim=1)": ".mean(dim=1)"}),
            """\
experts: no weighted sum over the chosen experts follows it
""",
        )


class TestBatchedExperts(NearMisses):
    def test_tokens_in_the_wrong_order(self) -> None:
        changes = {"repeat_interleave(num_top_k, dim=0)": "repeat(num_top_k, 1)"}
        self.assert_missed(
            with_experts(changes, "batched_mm"),
            """\
experts: not the batched_mm form: expected repeat_interleave(hidden, repeats=A, dim=0),
found repeat(..)
""",
        )

    def test_scores_in_the_wrong_order(self) -> None:
        changes = {"top_k_weights.reshape(-1)": "top_k_weights.t().reshape(-1)"}
        self.assert_missed(
            with_experts(changes, "batched_mm"),
            """\
experts: not the batched_mm form: scores must be [T, A]; it is (3, 7)
""",
        )

    def test_weights_of_the_wrong_expert(self) -> None:
        changes = {"down_proj[expert_ids]": "down_proj[expert_ids.flip(0)]"}
        self.assert_missed(
            with_experts(changes, "batched_mm"),
            """\
experts: not the batched_mm form: flip(..) stands where view(router_indices, shape=(21))
should be used again
""",
        )

    def test_max_over_the_choices(self) -> None:
        changes = {".sum(dim=1)": ".amax(dim=1)"}
        self.assert_missed(
            with_experts(changes, "batched_mm"),
            """\
experts: no weighted sum over the chosen experts follows it
""",
        )


class Capped(GptOssExperts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return super()._apply_gate(gate_up).tanh()


def test_the_place_is_the_line_that_differs() -> None:
    module = mlp()
    module.experts.__class__ = Capped
    with torch.no_grad():
        (miss,) = mxfp4_fx.explain(module, hidden()).misses
    line = r"test_near_misses.py:\d+: return super\(\)._apply_gate\(gate_up\).tanh\(\)"
    assert re.fullmatch(line, miss.where)


def test_an_unedited_copy_is_rewritten() -> None:
    """What the tests above change is rewritten when it is not changed."""
    with torch.no_grad():
        for module in (
            with_gate({}),
            with_gate({}, "batched_mm"),
            with_router({}),
            with_experts({}),
            with_experts({}, "batched_mm"),
        ):
            told = mxfp4_fx.explain(module, hidden())
            assert (len(told.rewrites), len(told.misses)) == (1, 0)
            torch.compiler.reset()


def test_editing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(AssertionError, match="does not occur once"):
        edited(edited, {"no such text": ""})
