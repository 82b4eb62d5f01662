"""Load a checkpoint with transformers alone, without a word about MXFP4, and compile the model.

Where transformers finds a GPU, Triton and its version of ``kernels``, it loads the experts into
MXFP4 modules of its own, whose weights this backend reads. Elsewhere it makes them dense, and this
backend quantizes them again. If there is no checkpoint, one of random weights is written first.

    python examples/default_load.py --checkpoint build/gpt-oss-tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mxfp4_fx
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint

TINY = CheckpointShape(
    layers=2, hidden=64, intermediate=96, experts=8, experts_per_token=4,
    heads=4, kv_heads=2, head_dim=16,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="written if it is absent")
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graph")
    args = parser.parse_args(argv)
    if not args.checkpoint.exists():
        write_random_checkpoint(args.checkpoint, TINY)

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    mlp = model.model.layers[0].mlp
    print(f"transformers loaded {type(mlp).__name__} with {type(mlp.experts).__name__}")

    compiled = torch.compile(model, backend="mxfp4", options={"inner": args.inner})
    ids = torch.arange(16)[None].to(model.device)
    with torch.no_grad():
        before = model(ids).logits
        difference = (compiled(ids).logits - before).abs().max() / before.abs().max()
        print(mxfp4_fx.explain(model, ids))
    print(f"logits compiled and uncompiled differ by {difference:.1%} of the largest")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
