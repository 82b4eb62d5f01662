"""What each rank does in ``test_ways_to_spread.py``: see ``ranks.py``."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from expert_parallel import load
from loaded import IDS, logits
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from mxfp4_fx.weights.store import STORE

ALL_TO_ALL, FSDP, STAGES = "tokens sent to experts", "FSDP", "stages of a pipeline"
LAYERS = {ALL_TO_ALL: 1, FSDP: 1, STAGES: 2}  # of the model: the least that has what is asked


@dataclasses.dataclass
class Answer:
    """What a rank got from a compiled model.

    Attributes:
        calls: the logits of each call.
        swizzles: how many weights each call swizzled to keep them.
        told: the classes of this package's warnings.
    """

    calls: list[Tensor] = dataclasses.field(default_factory=list)
    swizzles: list[int] = dataclasses.field(default_factory=list)
    told: set[str] = dataclasses.field(default_factory=set)


Trained = tuple[float, dict[str, Tensor]]  # the loss, and parameter -> its whole gradient


def ask(dense: Path, packed: dict[int, Path]) -> tuple[dict[str, Answer], Trained]:
    """Compute with the whole world in each way; all ranks have one batch but for FSDP's.

    Args:
        dense: a checkpoint of one layer, to train.
        packed: number of layers -> a checkpoint.
    """
    world = dist.get_world_size()
    answers = {}
    for way, config in {
        ALL_TO_ALL: DistributedConfig(tp_size=world, ep_size=world, ep_implementation="all_to_all"),
        FSDP: DistributedConfig(fsdp_size=world, ep_size=world),
        STAGES: DistributedConfig(pp_size=world),
    }.items():
        model = load(packed[LAYERS[way]], distributed_config=config).eval()
        answers[way] = answer(model, own_batch() if way == FSDP else IDS)
    everything = DistributedConfig(tp_size=world, ep_size=world, ep_implementation="all_reduce")
    return answers, train(load_dense(dense, distributed_config=everything))


def ask_four(dense: Path) -> Answer:
    """Compute with two ranks for each half of the experts: FSDP fills these for each call."""
    config = DistributedConfig(fsdp_size=4, ep_size=2)
    return answer(load_dense(dense, distributed_config=config), own_batch())


def own_batch(rank: int | None = None) -> Tensor:
    """Return the ids [1, 5 + rank] that a rank computes by itself."""
    rank = dist.get_rank() if rank is None else rank
    return IDS[:1, : 5 + rank] + rank


def load_dense(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)


def answer(model: Any, ids: Tensor) -> Answer:
    found = Answer()
    torch._dynamo.reset()
    model.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            before = STORE.swizzled
            found.calls.append(logits(model, ids))
            found.swizzles.append(STORE.swizzled - before)
    kinds = {warning.category for warning in told}
    found.told = {kind.__name__ for kind in kinds if kind.__module__.startswith("mxfp4_fx.")}
    return found


def train(model: Any) -> Trained:
    """Take a step's gradients of all but the experts, compiled."""
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    options = {"inner": "aot_eager", "strict": True}
    compiled = torch.compile(model, backend="mxfp4", options=options)
    loss = compiled(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {
        name: getattr(p.grad, "full_tensor", lambda grad=p.grad: grad)()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return loss.item(), gradients
