"""Experts of other families than GPT-OSS, spread over processes by transformers."""

from __future__ import annotations

from pathlib import Path

import family_parallel
import pytest
import ranks
import torch
from loaded import logits
from models import on_mxfp4_grid
from oracle import assert_as_accurate
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

pytestmark = pytest.mark.exhaustive

WORLD, E = 2, 6
_SIZES = {"num_hidden_layers": 1, "vocab_size": 128, "hidden_size": 64, "num_experts_per_tok": 2}
_SIZES |= {"num_attention_heads": 4, "intermediate_size": 96, "num_key_value_heads": 4}

FAMILIES: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, num_experts=E, moe_intermediate_size=96, head_dim=16),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=E, head_dim=16),
    "deepseek_v3": DeepseekV3Config(
        **_SIZES,
        n_routed_experts=E,
        moe_intermediate_size=96,
        first_k_dense_replace=0,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor, Tensor]]:
    """Family -> its checkpoint, and the logits of one process in float32 and in float64."""
    folder, made = tmp_path_factory.mktemp("families"), {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    parameter.copy_(on_mxfp4_grid(parameter.mT * 5).mT)
        model.save_pretrained(folder / family)
        single = logits(model)
        model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
        made[family] = folder / family, single, logits(model.double())
    return made


# Each family in the default form, and one of them in all.
RUNS = [(family, "grouped_mm") for family in FAMILIES]
RUNS += [("qwen3_moe", form) for form in ("batched_mm", "eager", "mxfp4_fx")]


def test_each_rank_has_its_experts_and_the_logits_of_one_process(
    expected: dict[str, tuple[Path, Tensor, Tensor]], tmp_path: Path
) -> None:
    given = [(expected[family][0], form) for family, form in RUNS]
    results = ranks.run(family_parallel.load_and_run, WORLD, tmp_path, given)
    for run, (experts, actual), (_, other) in zip(RUNS, *results, strict=True):
        _, single, exact = expected[run[0]]
        assert experts == E // WORLD, run
        assert torch.equal(actual, other), run
        assert_as_accurate(actual, single, exact)
