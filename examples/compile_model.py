"""Compile an MXFP4 checkpoint with backend="mxfp4", and compare it with transformers' own model.

Runs the checkpoint twice: as transformers loads it, dequantized, and as mxfp4_fx loads it, packed
and compiled. Prints the rewritten layers, the difference of the logits, and tokens a second. If
there is no checkpoint, one of random weights is written first: two layers in the widths of
gpt-oss-20b, or of another family's model.

    python examples/compile_model.py --checkpoint build/gpt-oss-2-layers
    python examples/compile_model.py --checkpoint build/qwen3_moe-2-layers --family qwen3_moe
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    Mxfp4Config,
)

import mxfp4_fx
from mxfp4_fx.checkpoints.gpt_oss import MODEL_TYPE
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.huggingface.random_family import FAMILIES, family_config, write_random_family

PROMPT = "A mixture of experts sends every token to the few experts that know it best."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="written if it is absent")
    parser.add_argument("--family", default=MODEL_TYPE, choices=(MODEL_TYPE, *FAMILIES))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graph")
    parser.add_argument("--tiny", action="store_true", help="write a checkpoint of tiny sizes")
    args = parser.parse_args(argv)
    # Dynamo warns that transformers caches a version check, which no user can change.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")

    if not args.checkpoint.exists():
        write(args.checkpoint, args.family, args.tiny)

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, local_files_only=True)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids

    step("running it in float32, to know the exact logits")
    exact = logits(load(args.checkpoint, torch.float32), ids)
    gc.collect()

    step("running it in bfloat16, uncompiled")
    model = load(args.checkpoint, torch.bfloat16)
    plain = logits(model, ids)
    plain_speed, _ = generate(model, ids, args.new_tokens)

    del model
    gc.collect()

    step('loading it packed and compiling it with backend="mxfp4"')
    model = mxfp4_fx.from_pretrained(args.checkpoint, dtype=torch.bfloat16, local_files_only=True)
    with torch.no_grad():
        explanation = mxfp4_fx.explain(model, ids)
    started = time.perf_counter()
    options = {"inner": args.inner, "strict": True, "free_weights": True}
    model.compile(backend="mxfp4", options=options)
    fused = logits(model, ids)
    generate(model, ids, args.new_tokens)  # compiles the graphs of decoding, too
    print(f"compiled in {time.perf_counter() - started:.0f} s")
    fused_speed, text = generate(model, ids, args.new_tokens)

    print(f"\n{explanation}\n")
    report_error(exact, plain, fused)
    print("tokens a second, prompt included:", end=" ")
    print(f"{plain_speed:.2f} uncompiled, {fused_speed:.2f} mxfp4")
    print(f"generated: {tokenizer.decode(text)!r}")
    return 0


TINY = CheckpointShape(
    layers=1, hidden=64, intermediate=96, experts=8, experts_per_token=4,
    heads=4, kv_heads=2, head_dim=16,
)  # fmt: skip

TINY_FAMILY = {"layers": 1, "hidden": 64, "intermediate": 96, "experts": 16, "heads": 16}
# So few that the float32 run of two layers needs no more than 8 GB; other families keep them all.
FEWER_EXPERTS = {"deepseek_v3": 16, "glm4_moe": 32, "minimax_m2": 32, "mixtral": 4}


def write(checkpoint: Path, family: str, is_tiny: bool) -> None:
    """Write a checkpoint of random weights."""
    if family == MODEL_TYPE:
        step(f"writing a random GPT-OSS checkpoint to {checkpoint}")
        write_random_checkpoint(checkpoint, TINY if is_tiny else CheckpointShape())
        return
    fewer = {"experts": FEWER_EXPERTS[family]} if family in FEWER_EXPERTS else {}
    sizes = TINY_FAMILY if is_tiny else fewer
    found, model = family_config(family, sizes, {}), FAMILIES[family].model
    (experts,) = FAMILIES[family].keys_of("experts")
    count, all_experts = (getattr(c, experts) for c in (found, family_config(family, {}, {})))
    step(
        f"writing a random checkpoint to {checkpoint}: {found.num_hidden_layers} layers of width "
        f"{found.hidden_size}, with {count} of the {all_experts} experts of {model}"
    )
    write_random_family(checkpoint, family, sizes)


def load(checkpoint: Path, dtype: torch.dtype) -> Any:
    """Load the model as transformers does on any machine: experts dequantized to ``dtype``."""
    given = AutoConfig.from_pretrained(checkpoint, local_files_only=True).quantization_config
    dequantized = Mxfp4Config if given["quant_method"] == "mxfp4" else CompressedTensorsConfig
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        quantization_config=dequantized(dequantize=True),
        local_files_only=True,
    ).eval()
    for parameter in model.parameters():  # experts of other families became bfloat16, exactly
        parameter.data = parameter.data.to(dtype)
    return model


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [tokens, vocabulary] of a prompt, as float64."""
    return model(ids).logits[0].double()


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, torch.Tensor]:
    """Generate exactly ``new_tokens`` greedily; return tokens a second and the tokens."""
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    return new_tokens / (time.perf_counter() - started), out[0, ids.shape[1] :]


def report_error(exact: torch.Tensor, plain: torch.Tensor, fused: torch.Tensor) -> None:
    """Print the largest difference of the logits and its bound; exit if the bound is exceeded.

    The expert weights are MXFP4 values already, so the runs differ by rounding only. The uncompiled
    bfloat16 run misses the float32 logits by e, measured here. The compiled run rounds less often
    and in other places: its error is another sample of the same kind. It may be 2e and the rounding
    of a logit at the end, u|logit| with u = 2^-8. The runs may differ by the sum of both errors.
    """
    e = (plain - exact).abs().max().item()
    mine = (fused - exact).abs().max().item()
    rounding = 2**-8 * exact.abs().max().item()
    bound = e + 2 * e + rounding
    difference = (fused - plain).abs().max().item()
    print(
        f"largest logit {exact.abs().max().item():.3f}; largest error against float32: "
        f"{e:.4f} uncompiled bfloat16, {mine:.4f} mxfp4"
    )
    print(
        f"largest difference of the logits, compiled against uncompiled: {difference:.4f}; "
        f"bound 3*{e:.4f} + {rounding:.4f} (rounding of a logit) = {bound:.4f}"
    )
    if not difference <= bound:
        raise SystemExit("the difference exceeds its bound: please report this")


def step(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
