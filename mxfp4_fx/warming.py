"""``mxfp4_fx.warmup``: what generation needs is compiled before the first request, not in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.errors import OptionError


def warmup(
    model: nn.Module,
    *,
    lengths: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 3,
    **settings: Any,
) -> None:
    """Compile what ``model.generate`` needs for prompts of these sizes, and swizzle the weights.

    Calls ``model.generate`` for each batch size and length, on prompts of its own; a bar on a
    terminal shows how far it is. A later ``generate`` with these sizes and settings compiles
    nothing. The model and the random numbers stay as they were: their state is put back.

    Args:
        model: a model of transformers that is compiled in place, by :func:`mxfp4_fx.compile` or
            ``model.compile(backend="mxfp4")``.
        lengths: numbers of tokens of a prompt, padding included.
        batch_sizes: numbers of prompts in a call.
        new_tokens: tokens to generate in each call: one comes from the prompt, the second from the
            first compilation for decoding. A model that is compiled as a whole also compiles anew
            where the cache reaches a sliding window, which so many tokens must get to.
        settings: further arguments of the calls of ``generate``, such as
            ``cache_implementation="static"``. The rest is the model's own ``generation_config``.

    Raises:
        OptionError: a size is no positive whole number or is more than the model has positions
            for, ``model`` has no ``generate``, or it is not compiled in place.
    """
    sizes = _sizes("batch_sizes", batch_sizes), _sizes("lengths", lengths)
    (tokens,) = _sizes("new_tokens", [new_tokens])
    _check(model, settings)
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and sizes[1][-1] + tokens > most:
        raise OptionError(
            f"lengths: a prompt of {sizes[1][-1]} tokens and {tokens} new ones are more than the "
            f"{most} positions of the model (max_position_embeddings)"
        )
    device = next(model.parameters()).device
    calls = [(batch, length) for batch in sizes[0] for length in sizes[1]]
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=_accelerator(device)):
        for batch, length in tqdm(calls, "mxfp4: warming up", leave=False, disable=None):
            for mask in _masks(batch, length, device):
                ids = torch.arange(batch * length, device=device).view(batch, length)
                model.generate(  # type: ignore[operator]
                    ids % getattr(config, "vocab_size", 2),
                    attention_mask=mask,
                    **{"max_new_tokens": tokens, "min_new_tokens": tokens, **settings},
                )


def _sizes(name: str, given: Sequence[int]) -> list[int]:
    """Return the sizes in ascending order: Dynamo compiles for one first, then for any number."""
    is_sequence = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_sequence or not given or not all(type(n) is int and n > 0 for n in given):
        kind = "a positive whole number" if name == "new_tokens" else "positive whole numbers"
        shown = given[0] if name == "new_tokens" else given
        raise OptionError(f"warmup's {name} must be {kind}, not {shown!r}")
    return sorted({*given})


def _check(model: Any, settings: dict[str, Any]) -> None:
    if torch_private.unwrapped(model) is not model:
        raise OptionError(
            "warmup: generate of a model that torch.compile returned runs uncompiled. Compile the "
            'model in place: mxfp4_fx.compile(model), or model.compile(backend="mxfp4")'
        )
    if not isinstance(model, nn.Module) or not callable(getattr(model, "generate", None)):
        raise OptionError(
            f"warmup: a {type(model).__name__} has no generate, which warmup calls; call what you "
            "compiled once for each size instead"
        )
    held = settings.get("compile_config") or getattr(
        getattr(model, "generation_config", None), "compile_config", None
    )
    calls = map(torch_private.called_through, model.modules())
    if held is None and "forward" not in vars(model) and not any(calls):
        raise OptionError(
            f"warmup: this {type(model).__name__} is not compiled: call mxfp4_fx.compile(model) or "
            'model.compile(backend="mxfp4") before'
        )


def _masks(batch: int, length: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield attention masks [batch, length]: of prompts of one length, and of a shorter one."""
    yield torch.ones(batch, length, dtype=torch.long, device=device)
    if batch > 1 and length > 1:
        mask = torch.ones(batch, length, dtype=torch.long, device=device)
        mask[0, 0] = 0
        yield mask


def _accelerator(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
