"""What each rank does in the tests of expert parallelism: see ``ranks.py``."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import default_load
import pytest
import torch
import torch.distributed as dist
from loaded import IDS, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.distributed import DistributedConfig

import mxfp4_fx
from mxfp4_fx import explanation
from mxfp4_fx.huggingface import meeting
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.weights.mapped import is_mapped, mapped_files

WORLD = 2  # ranks that give an `answer`


@dataclasses.dataclass
class Loaded:
    """What a rank found of a model that it loaded its part of.

    Attributes:
        experts: how many experts the layers have here.
        unmapped: the names of blocks and scales that are not pages of the files.
        read: tensor's name -> the ranges of its first dimension that were read.
        uncompiled, compiled: logits of `loaded.IDS`, compiled with ``free_weights``.
        left: the bytes of blocks and scales that are not freed then.
    """

    experts: list[int]
    unmapped: list[str]
    read: dict[str, list[slice]]
    uncompiled: Tensor
    compiled: Tensor
    left: int


@dataclasses.dataclass
class Told:
    """What a rank is told.

    Attributes:
        faults: fault of the second rank while they load -> what this rank is told, "nothing" of it.
        refusal: what ``explain`` on the first rank alone says to it.
        explanation: what ``explain`` on all ranks says.
        refusals: what cannot be done where experts are spread -> how that is said.
    """

    faults: dict[str, str]
    refusal: str
    explanation: str
    refusals: dict[str, str]


def spread(**changes: Any) -> DistributedConfig:
    """Return the config that gives each rank its part of the experts."""
    world = dist.get_world_size()
    return DistributedConfig(**{"tp_size": world, "ep_size": world, **changes})


def load(path: Path, **kwargs: Any) -> Any:
    kwargs = {"distributed_config": spread(), "dtype": torch.float32, **kwargs}
    return mxfp4_fx.from_pretrained(path, **kwargs)


def answer(checkpoint: Path, dense: Path, other: Path, folder: Path) -> tuple[Loaded, Told]:
    """Load, run and save models; the folders' names are those of `load_run_and_save`, and "dense".

    Args:
        dense: a checkpoint with dense experts.
        other: one that differs from `checkpoint` a little.
    """
    found, model = load_run_and_save(checkpoint, folder)
    load(dense).save_pretrained(folder / "dense")
    return found, Told(
        fail_while_loading(checkpoint, other),
        *explain_on_one(model),
        {
            "dequantize": told(lambda: mxfp4_fx.dequantize(model)),
            "eager": told(lambda: load(checkpoint, skip="*.0", experts_implementation="eager")),
            "FSDP": told(
                lambda: load(dense, distributed_config=DistributedConfig(fsdp_size=WORLD))
            ),
            "stages": told(
                lambda: load(
                    checkpoint, distributed_config=DistributedConfig(pp_size=WORLD)
                ).save_pretrained(folder / "stages")
            ),
            "device": told(lambda: load(checkpoint, experts_device="cpu")),
        },
    )


def load_run_and_save(checkpoint: Path, folder: Path) -> tuple[Loaded, Any]:
    """Load, save to "saved", compile and run with ``free_weights``, and save to "freed"."""
    with recorded_slices() as read:
        model = load(checkpoint)
    files, held = mapped_files(), bytes_of(model)
    unmapped = [name for name, parameter in held.items() if not is_mapped(parameter, files)]
    experts = [m.num_experts for m in model.modules() if isinstance(m, PackedExperts)]
    uncompiled = logits(model)
    model.save_pretrained(folder / "saved")
    options = {"inner": "eager", "strict": True, "free_weights": True}
    compiled = logits(torch.compile(model, backend="mxfp4", options=options))
    left = sum(parameter.untyped_storage().nbytes() for parameter in bytes_of(model).values())
    model.save_pretrained(folder / "freed")
    return Loaded(experts, unmapped, read, uncompiled, compiled, left), model


def load_and_run(checkpoint: Path, folder: Path) -> Loaded:
    return load_run_and_save(checkpoint, folder)[0]


def bytes_of(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}


@contextmanager
def recorded_slices() -> Iterator[dict[str, list[slice]]]:
    """Record which parts of tensors transformers reads from files."""
    found: dict[str, list[slice]] = {}

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = original(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> Any:
            return self._file.__exit__(*args)

        def get_slice(self, name: str) -> Any:
            return Slice(name, self._file.get_slice(name))

    class Slice:
        def __init__(self, name: str, part: Any) -> None:
            self._name, self._part = name, part

        def __getattr__(self, name: str) -> Any:
            return getattr(self._part, name)

        def __getitem__(self, index: Any) -> Tensor:
            first = index[0] if isinstance(index, tuple) else index
            found.setdefault(self._name, []).append(first)
            return self._part[index]

    original = modeling_utils.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "safe_open", File)
        yield found


def fail_while_loading(checkpoint: Path, other: Path) -> dict[str, str]:
    """Load with one fault after the other on the second rank; return fault -> what one is told."""
    is_second = dist.get_rank() == 1
    found: dict[str, str] = {}

    def attempt(fault: str, run: Callable[[], object]) -> None:
        found[fault] = told(run)

    attempt("checkpoint", lambda: load(other if is_second else checkpoint))
    skip = "model.layers.0.mlp.experts" if is_second else ()
    attempt("options", lambda: load(checkpoint, skip=skip))
    with pytest.MonkeyPatch.context() as patch:
        if is_second:
            patch.setattr(meeting, "__version__", "0.0.1")
        attempt("versions", lambda: load(checkpoint))
    attempt("path", lambda: load(checkpoint / "nowhere" if is_second else checkpoint))
    with pytest.MonkeyPatch.context() as patch:
        if is_second:
            patch.setattr(PackedExperts, "keep_shards", no_memory)
        attempt("memory", lambda: load(checkpoint))
    with pytest.MonkeyPatch.context() as patch:
        if is_second:
            patch.setattr(modeling_utils, "convert_and_load_state_dict_in_model", no_memory)
        quantization = mxfp4_fx.Mxfp4Config()
        given = {"quantization_config": quantization, "distributed_config": spread()}
        attempt("door", lambda: AutoModelForCausalLM.from_pretrained(checkpoint, **given))
    attempt("none", lambda: load(checkpoint))
    return found


def told(run: Callable[[], object]) -> str:
    """Return the exception that a call ends with, or "nothing"."""
    try:
        run()
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()


def no_memory(*_: object, **__: object) -> object:
    raise torch.OutOfMemoryError("no room for the experts")


def explain_on_one(model: Any) -> tuple[str, str]:
    """Explain a model on the first rank alone, and then on all."""
    refusal = ""
    if dist.get_rank() == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(explanation, "PATIENCE", 0.5)
            try:
                mxfp4_fx.explain(model, IDS)
            except mxfp4_fx.errors.Mxfp4Error as error:
                refusal = str(error)
    dist.barrier()
    with torch.no_grad():
        return refusal, str(mxfp4_fx.explain(model, IDS))


@dataclasses.dataclass
class OfTransformers:
    """What a rank found of models that transformers loaded without this package.

    Attributes:
        modules: logits of its own MXFP4 modules, compiled.
        explanation: what ``explain`` says of these.
        dense: form of dense experts -> logits, compiled.
        tokens: what a compiled model with dense experts generates after `loaded.IDS`.
    """

    modules: Tensor
    explanation: str
    dense: dict[str, Tensor]
    tokens: Tensor


def load_as_transformers_does(checkpoint: Path, dense: Path) -> OfTransformers:
    modules = compiled(default_load.load(checkpoint, distributed_config=spread()))
    with torch.no_grad():
        explanation = str(mxfp4_fx.explain(modules, IDS))
    found = OfTransformers(logits(modules), explanation, {}, IDS)
    for form in ("grouped_mm", "batched_mm"):
        model = AutoModelForCausalLM.from_pretrained(
            dense, distributed_config=spread(), experts_implementation=form, dtype=torch.float32
        )
        found.dense[form] = logits(compiled(model))
    found.tokens = generate(model)
    return found


def compiled(model: Any) -> Any:
    model.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
    return model


def generate(model: Any) -> Tensor:
    """Return some greedy tokens."""
    tokens: Tensor = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return tokens
