"""What the store tells users about a weight."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from mxfp4_fx.core import background
from mxfp4_fx.core.errors import KeptWeightsWarning, NanWeightsWarning, RepeatedSwizzleWarning
from mxfp4_fx.weights.source import Source


def warn_of_repeats(name: str, why: str) -> None:
    """Warn that a weight is swizzled at each call."""
    background.warn(
        f"{name or 'an expert weight'} is swizzled again at each call: {why}. The results are "
        f"right, but swizzling takes longer than the experts themselves",
        RepeatedSwizzleWarning,
        stacklevel=3,
    )


def warn_of_kept(name: str) -> None:
    background.warn(
        f"options={{'free_weights': True}} could not give the memory of {name or 'a weight'} back: "
        "the device has no room to do it, or something refers to the tensor. The model keeps it",
        KeptWeightsWarning,
        stacklevel=3,
    )


def warn_of_kept_shard(name: str) -> None:
    background.warn(
        f"options={{'free_weights': True}} keeps the memory of {name}: it is the local tensor of a "
        "DTensor, through which other code may read it. A checkpoint in MXFP4, loaded by "
        "mxfp4_fx.from_pretrained, takes a quarter of the memory",
        KeptWeightsWarning,
        stacklevel=3,
    )


def of_full_device(source: Source, name: str) -> str:
    as_they_are = ""
    if not source.encoding.of_parameters:
        as_they_are = ", and options={'kernels': 'hub'} reads the model's own weights as they are"
    return (
        f"{source.tensors[0].device} has no room for {name or 'an expert weight'} in its kernels' "
        "layout beside the model's own weights. options={'free_weights': True} gives each of these "
        f"back as soon as it is swizzled{as_they_are}"
    )


def warn_of_nan(source: Source, experts: list[int], name: str) -> None:
    if experts and source.encoding.of_linears:
        background.warn(
            f"{name or 'a weight'} has infinite or NaN elements: MXFP8 makes NaN of each block of "
            "32 that holds one",
            NanWeightsWarning,
            stacklevel=3,
        )
    elif experts:
        shown = ", ".join(map(str, experts[:8])) + (", ..." if experts[8:] else "")
        background.warn(
            f"{name or 'an expert weight'} has infinite or NaN elements (experts {shown}): MXFP4 "
            f"makes NaN of each block of 32 that holds one",
            NanWeightsWarning,
            stacklevel=3,
        )


def restoring(count: int) -> tqdm[Any]:
    """Return the bar of so many parameters that are restored, which a terminal shows."""
    text = "mxfp4: restoring expert weights"
    return tqdm(total=count, desc=text, leave=False, disable=None if count else True)
