"""Show what ``mxfp4_fx.explain`` returns: which layers become MXFP4, which do not, and why.

Explains a tiny GPT-OSS of random weights, then the same model after the experts of one layer get
another activation. Needs no files.

    python examples/explain.py
"""

from __future__ import annotations

import argparse
import json
import warnings

import torch
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import mxfp4_fx

FORMS = ("grouped_mm", "batched_mm", "eager")


class TanhExperts(GptOssExperts):
    """Experts with an activation that no kernel has."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return up * torch.tanh(gate)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="experts_implementation")
    args = parser.parse_args(argv)
    # Dynamo warns of an lru_cache in transformers' code, which no user can change.
    warnings.filterwarnings("ignore", message=".*lru_cache", category=UserWarning)

    model = tiny_model(args.form)
    ids = torch.zeros((1, 8), dtype=torch.long)
    with torch.no_grad():
        print("A GPT-OSS:\n")
        print(mxfp4_fx.explain(model, ids))

        model.model.layers[1].mlp.experts = TanhExperts(model.config).to(torch.bfloat16)
        explanation = mxfp4_fx.explain(model, ids)
        print("\nThe same with other experts in layer 1:\n")
        print(explanation)

    print("\nAs data, for a program to read:\n")
    print(json.dumps(explanation.to_dict(), indent=2))
    return 0


def tiny_model(form: str) -> GptOssForCausalLM:
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=4,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = GptOssForCausalLM(config).to(torch.bfloat16).eval()
    model.set_experts_implementation(form)
    return model


if __name__ == "__main__":
    raise SystemExit(main())
