"""Two processes with transformers' expert parallelism by all-to-all, and with FSDP beside it."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import compile_with, model, tokens
from processes import LAST_RESORT
from transformers import AutoModelForCausalLM

from mxfp4_fx.weights.store import STORE

WAYS = {
    "all_to_all": {
        "tp_size": 2,
        "ep_size": 2,
        "tp_plan": {"lm_head": "replicate"},
        "ep_implementation": "all_to_all",
    },
    "fsdp": {"fsdp_size": 2, "ep_size": 2},
}


@pytest.mark.exhaustive
def test_experts_that_tokens_are_sent_to_are_swizzled_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed.expert_parallel")
    model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    command = [sys.executable, __file__, str(tmp_path)]
    common = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, text=True)
        for rank in "01"
    ]
    try:
        assert [rank.wait(LAST_RESORT) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main(folder: Path) -> None:
    """Be one rank: call each model three times, change a weight, and call it once more."""
    from transformers.distributed import DistributedConfig

    rank, ids = int(os.environ["RANK"]), tokens()
    store = dist.FileStore(str(folder / "store"), 2)
    wait = datetime.timedelta(seconds=LAST_RESORT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    torch.set_grad_enabled(False)
    for way, config in WAYS.items():
        whole = AutoModelForCausalLM.from_pretrained(
            folder / "model",
            dtype=torch.float32,
            experts_implementation="grouped_mm",
            distributed_config=DistributedConfig(**config),
        ).eval()
        compiled = compile_with(whole, options={"strict": True})
        counts = []
        for _ in range(3):
            before = STORE.swizzled
            assert_near(compiled(ids).logits, whole(ids).logits)
            counts.append(STORE.swizzled - before)
        assert counts == [2, 0, 0], (way, rank, counts)
        whole.model.layers[0].mlp.experts.down_proj.mul_(2)
        before = STORE.swizzled
        changed = compiled(ids).logits
        assert STORE.swizzled == before + 1, (way, rank)
        assert_near(changed, whole(ids).logits)
    dist.destroy_process_group()


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits of float32, of which each of 640 roundings is at most 2^-24."""
    assert (actual - expected).abs().max() <= 640 * 2**-24 * expected.abs().max()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
