"""Fine-tune the experts of a GPT-OSS checkpoint with LoRA: packed and compiled, or in bfloat16.

Each way is a process of its own, so that its peak memory is its own. Both train the same adapters
of PEFT, on the experts and on the attention, on random tokens. Prints losses, seconds a step and
memory. If there is no checkpoint, one of random weights is written first.

    python examples/finetune_lora.py --checkpoint build/lora --layers 2 --tokens 256
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Mxfp4Config

import mxfp4_fx
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint

WAYS = ("packed", "bfloat16")
ADAPTERS = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="written if it is absent")
    parser.add_argument("--layers", type=int, default=2, help="of a checkpoint that is written")
    parser.add_argument("--size", type=int, default=2880, help="its hidden and intermediate size")
    parser.add_argument("--experts", type=int, default=32, help="its experts in a layer")
    parser.add_argument("--tokens", type=int, default=256, help="in a step")
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed: it compiles")
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graph")
    parser.add_argument("--only", choices=WAYS, help="one way, in this process")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be 2 or more: the first is not timed")
    if not args.checkpoint.exists():
        sizes = {"hidden": args.size, "intermediate": args.size, "experts": args.experts}
        write_random_checkpoint(args.checkpoint, CheckpointShape(layers=args.layers, **sizes))
    if args.only:
        print(json.dumps(train(args.only, args)))
        return 0
    found = {way: in_a_process(way, argv) for way in WAYS}
    print(f"{'':10}  {'seconds a step':>14}  {'weights':>9}  {'peak memory':>11}  losses")
    for way, told in found.items():
        losses = ", ".join(f"{loss:.4f}" for loss in told["losses"])
        sizes = (f"{told[name] / 2**30:.2f} GiB" for name in ("weights", "peak"))
        weights, peak = sizes
        print(f"{way:10}  {told['seconds']:14.2f}  {weights:>9}  {peak:>11}  {losses}")
    return 0


def in_a_process(way: str, argv: list[str] | None) -> dict[str, Any]:
    """Return what this program prints for one way."""
    given = sys.argv[1:] if argv is None else argv
    command = [sys.executable, __file__, *given, "--only", way]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def train(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train adapters for some steps; return losses, seconds a step, and bytes."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    if way == "packed":
        base = mxfp4_fx.from_pretrained(
            args.checkpoint, dtype=torch.bfloat16, local_files_only=True
        )
    else:
        base = AutoModelForCausalLM.from_pretrained(
            args.checkpoint,
            dtype=torch.bfloat16,
            quantization_config=Mxfp4Config(dequantize=True),
            local_files_only=True,
        )
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**ADAPTERS)).train()
    if way == "packed":
        options = {"inner": args.inner, "strict": True, "free_weights": True}
        model.compile(backend="mxfp4", options=options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(256, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses, seconds = [], []
    for _ in range(args.steps):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
        gc.collect()
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "losses": losses,
        "seconds": statistics.median(seconds[1:]),
        "weights": weights,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


if __name__ == "__main__":
    raise SystemExit(main())
