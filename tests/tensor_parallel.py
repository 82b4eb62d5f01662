"""What each rank does in the tests of tensor parallelism: see ``ranks.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loaded import logits
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mxfp4_fx
from mxfp4_fx.weights import store

EAGER = {"inner": "eager", "strict": True}


@dataclasses.dataclass
class Answers:
    """What a rank found.

    Attributes:
        held: parameter of the first layer's experts -> its shape here.
        uncompiled, compiled, freed: logits of `loaded.IDS`.
        swizzles: how many weights were swizzled by the end of the first call, and of the second.
        refused: what ``state_dict()`` said.
    """

    held: dict[str, tuple[int, ...]]
    uncompiled: Tensor
    compiled: Tensor
    freed: Tensor
    swizzles: tuple[int, int]
    refused: str


def load(path: Path) -> Any:
    spread = DistributedConfig(tp_size=dist.get_world_size())
    return mxfp4_fx.from_pretrained(path, dtype=torch.float32, distributed_config=spread)


def load_compile_and_save(checkpoint: Path, saved: Path) -> Answers:
    model = load(checkpoint)
    held = {name: (*p.shape,) for name, p in model.model.layers[0].mlp.experts.named_parameters()}
    uncompiled = logits(model)
    made = counted_swizzles()
    compiled = torch.compile(model, backend="mxfp4", options=EAGER)
    first = logits(compiled)
    swizzles = [len(made)]
    assert torch.equal(logits(compiled), first)
    swizzles.append(len(made))
    freeing = torch.compile(model, backend="mxfp4", options={**EAGER, "free_weights": True})
    freed = logits(freeing)
    model.save_pretrained(saved)
    try:
        model.state_dict()
    except mxfp4_fx.errors.CheckpointError as error:
        return Answers(held, uncompiled, first, freed, (*swizzles,), str(error))
    raise AssertionError("a state dict with a part of the experts")


def load_and_save(checkpoint: Path, saved: Path) -> None:
    """Quantize while loading, say."""
    load(checkpoint).save_pretrained(saved)


def load_dense(checkpoint: Path, saved: Path, experts: str) -> tuple[Tensor, Tensor]:
    """Load by transformers with this package's plan, and save.

    Returns:
        Logits, uncompiled and compiled.
    """
    from mxfp4_fx.huggingface import tensor_parallel

    spread = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=tensor_parallel.plan())
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, distributed_config=spread, experts_implementation=experts
    )
    model.save_pretrained(saved)
    return logits(model), logits(torch.compile(model, backend="mxfp4", options=EAGER))


def counted_swizzles() -> list[Any]:
    """Return a list that gets an entry for each weight that is swizzled from now on."""
    made: list[Any] = []
    original = store.swizzle_weight

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append(args[0])
        return original(*args, **kwargs)

    store.swizzle_weight = counting  # the process ends with the test
    return made


def everything(checkpoint: Path, dense: Path, even: Path, folder: Path) -> tuple[Any, ...]:
    """Answer all questions in one group."""
    answers = load_compile_and_save(checkpoint, folder / "packed")
    load_and_save(dense, folder / "quantized")
    return answers, load_dense(even, folder / "dense", "grouped_mm")
