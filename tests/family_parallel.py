"""What each rank does in the tests of other families across processes: see ``ranks.py``."""

from __future__ import annotations

from pathlib import Path

import torch
from expert_parallel import compiled, spread
from loaded import IDS, logits
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxfp4_fx


def load_and_run(checkpoints: list[tuple[Path, str]]) -> list[tuple[int, Tensor]]:
    """Return for each checkpoint and form: how many experts are here, and the compiled logits."""
    found = []
    for path, form in checkpoints:
        torch.compiler.reset()
        model = AutoModelForCausalLM.from_pretrained(
            path, distributed_config=spread(), experts_implementation=form, dtype=torch.float32
        )
        with torch.no_grad():
            (rewrite,) = mxfp4_fx.explain(model, IDS).rewrites
        found.append((rewrite.experts, logits(compiled(model))))
    return found
