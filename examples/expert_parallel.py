"""Spread the experts of a GPT-OSS checkpoint over processes: each loads and runs its own.

Start one process for each GPU, or several on a CPU, which shows how it works and is no faster:

    torchrun --nproc-per-node 2 examples/expert_parallel.py --checkpoint build/gpt-oss-tiny

Prints the mesh, the bytes of experts that each rank holds, which layers are rewritten, and tokens a
second. If there is no checkpoint, one of random weights is written first; all ranks must see it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

import mxfp4_fx
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.huggingface.packed import PackedExperts

TINY = CheckpointShape(
    layers=2, hidden=64, intermediate=96, experts=12, experts_per_token=4,
    heads=4, kv_heads=2, head_dim=16,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="written if it is absent")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graph")
    args = parser.parse_args(argv)

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if not dist.is_initialized():
        if device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(dist.get_default_backend_for_device(device))  # NCCL, gloo
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0 and not args.checkpoint.exists():
        write_random_checkpoint(args.checkpoint, TINY, progress=False)
    dist.barrier()

    model = mxfp4_fx.from_pretrained(
        args.checkpoint,
        distributed_config=DistributedConfig(tp_size=world, ep_size=world),
        local_files_only=True,
    )
    ids = torch.arange(16)[None].to(model.device)
    with torch.no_grad():
        explanation = mxfp4_fx.explain(model, ids)  # on every rank: it runs the model
    held: list[Any] = [None] * world
    dist.all_gather_object(held, expert_bytes(model))

    options = {"inner": args.inner, "strict": True, "free_weights": True}
    model.compile(backend="mxfp4", options=options)
    generate(model, ids, args.new_tokens)  # compiles
    seconds, tokens = generate(model, ids, args.new_tokens)
    generated: list[Any] = [None] * world
    dist.all_gather_object(generated, tokens.tolist())

    if rank == 0:
        print(f"mesh: {world} ranks, {dist.get_backend()}")
        for one, (experts, nbytes) in enumerate(held):
            share = f"{experts} of {model.config.num_local_experts} experts in each layer"
            print(f"rank {one}: {share}, {nbytes / 1e6:.2f} MB of MXFP4")
        print(explanation)
        print(f"{args.new_tokens / seconds:.1f} tokens a second")
        print(f"all ranks generated the same: {all(found == generated[0] for found in generated)}")
    dist.destroy_process_group()
    return 0


def expert_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of a layer's experts here, and the bytes of all layers' weights."""
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    nbytes = sum(
        p.nbytes for module in experts for p in module.parameters() if not p.is_floating_point()
    )
    return experts[0].num_experts, nbytes


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, torch.Tensor]:
    """Generate exactly ``new_tokens`` greedily; return the seconds and the tokens."""
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    return time.perf_counter() - started, out[0, ids.shape[1] :]


if __name__ == "__main__":
    raise SystemExit(main())
