"""Whole models of other families, tiny and random, as the installed transformers writes them."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
import transformers
from models import DTYPES, Graphs, compile_with
from oracle import assert_as_accurate
from test_forms import InFloat64
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.exhaustive]

_COMMON = {
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
}
_HEADS = {"head_dim": 16}
_ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 96}
_LATENT = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "n_shared_experts": 1,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64}
_LOCAL = {"num_local_experts": 8}
_ATTENTION = {"layer_types": ["full_attention"]}
# The name in README -> its config's class and sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-MoE": ("Qwen3MoeConfig", {**_QWEN, **_HEADS, "norm_topk_prob": True}),
    "Qwen2-MoE": ("Qwen2MoeConfig", _QWEN),
    "Qwen3-Next": ("Qwen3NextConfig", {**_QWEN, **_HEADS, **_ATTENTION}),
    "Mixtral": ("MixtralConfig", {**_LOCAL, **_HEADS}),
    "OLMoE": ("OlmoeConfig", {"num_experts": 8}),
    "DeepSeek-V2": ("DeepseekV2Config", _LATENT),
    "DeepSeek-V3": ("DeepseekV3Config", _LATENT),
    "DeepSeek-V4": ("DeepseekV4Config", _ROUTED),
    "GLM-4-MoE": ("Glm4MoeConfig", {**_ROUTED, **_HEADS, "first_k_dense_replace": 0}),
    "MiniMax-M2": ("MiniMaxM2Config", {**_LOCAL, **_HEADS}),
    "Granite": ("GraniteMoeConfig", _LOCAL),
    "Phi-MoE": ("PhimoeConfig", _LOCAL),
    "GPT-OSS": ("GptOssConfig", {**_LOCAL, **_HEADS, "sliding_window": 16}),
    "Aria": ("AriaTextConfig", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "Gemma 4": (
        "Gemma4TextConfig",
        {**_HEADS, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96,
         "enable_moe_block": True},
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        {**_ROUTED, **_HEADS, "layers_block_type": ["attention", "moe"], "n_group": 1,
         "topk_group": 1},
    ),
    "Ernie 4.5": (
        "Ernie4_5_MoeConfig",
        {**_HEADS, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 96,
         "moe_layer_start_index": 0},
    ),
    "HunYuan": ("HunYuanMoEV1Config", {**_HEADS, "num_experts": 8, "moe_topk": 2}),
    "dots1": (
        "Dots1Config",
        {**_ROUTED, **_HEADS, "first_k_dense_replace": 0, "n_shared_experts": 1, "n_group": 1,
         "topk_group": 1},
    ),
    "LFM2": ("Lfm2MoeConfig", {**_QWEN, **_ATTENTION, "num_dense_layers": 0}),
    "Jamba": (
        "JambaConfig",
        {"num_experts": 8, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
         "expert_layer_offset": 0, "use_mamba_kernels": False},
    ),
    "MiniMax-M3": ("MiniMaxM3VLTextConfig", {**_LOCAL, **_HEADS}),
}  # fmt: skip
FORMS = ("grouped_mm", "batched_mm")


def model(name: str, form: str, dtype: torch.dtype) -> Any:
    """Make the model with small random weights; those of experts are MXFP4 values."""
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(**{**_COMMON, **sizes})
    config._experts_implementation = form
    given = {"experts_implementation": form, "dtype": dtype}
    if name == "Aria":
        return families.fill(transformers.AriaTextForCausalLM._from_config(config, **given).eval())
    return families.fill(transformers.AutoModelForCausalLM.from_config(config, **given).eval())


def ids(length: int = 7) -> Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))


def layers(whole: Any) -> int:
    return sum(hasattr(part, "has_gate") for part in whole.modules())


# Each model once; neighbours differ in form and dtype.
CASES = [(name, FORMS[at % 2], DTYPES[at // 2 % 2]) for at, name in enumerate(MODELS)]


@pytest.mark.parametrize(("name", "form", "dtype"), CASES)
def test_a_whole_model(name: str, form: str, dtype: torch.dtype) -> None:
    """Each layer is held to its bound by ``verify``; float32, where no route flips, as a whole."""
    whole, graphs = model(name, form, dtype), Graphs()
    options = {"strict": True, "verify": True, "regions": False}
    actual = compile_with(whole, graphs, options=options)(ids()).logits
    rewritten = [
        node for gm in graphs.seen for node in gm.graph.nodes
        if str(node.target).startswith("mxfp4.matmul_ogs")
    ]  # fmt: skip
    assert len(rewritten) == 2 * layers(whole) > 0
    if dtype is torch.float32:
        exact = copy.deepcopy(whole).double()
        exact.config._experts_implementation = "batched_mm"
        with InFloat64():
            ideal = exact(ids()).logits
        assert_as_accurate(actual, whole(ids()).logits, ideal)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3", "Gemma 4"])
def test_generate(name: str) -> None:
    whole = model(name, "grouped_mm", torch.float32)
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = whole.generate(ids(), **given)
    whole.forward = compile_with(whole.forward, options={"strict": True})
    assert torch.equal(whole.generate(ids(), **given), expected)
