"""A model's last linear, outside of every graph of ``mxfp4_fx.compile``."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from mxfp4_fx import calls
from mxfp4_fx.core import profiling, torch_private, torch_private_dynamo
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.layouts import MXFP8_ROWS
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.skip import Skip
from mxfp4_fx.ops import target
from mxfp4_fx.passes import linear_verification
from mxfp4_fx.passes.report import Miss
from mxfp4_fx.telling import tell_of_linears
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.source import LINEAR, Source
from mxfp4_fx.weights.store import STORE

log = logging.getLogger("mxfp4_fx.layerwise")


class Head:
    """Calls the model's last linear as an op that reads the weight once, or reads it in MXFP8.

    Compiled, it would be a graph for prompts, one for decoding and one for further prompts.
    """

    def __init__(self, head: nn.Linear, name: str, options: Options) -> None:
        self._head, self._name, self._options = head, name, options
        self._hooks = torch_private.hooks([head])
        self._is_verified = not options.verify
        self._is_skipped = Skip(options.skip).names(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            head, x = self._head, args[0]
            if self._options.linears == "mxfp8" and not self._is_skipped:
                why = self._why_exact(x)
                if why is None:
                    return self._in_mxfp8(x)
                miss = Miss(self._name, why)
                log.info("not in MXFP8: %s", miss)
                tell_of_linears([miss], [head], self._options)
            if self._is_for_op(x):
                return torch.ops.mxfp4.linears(x, [head.weight], [head.bias], "cpu")[0]
        return torch_private.uncompiled(self._head)(*args, **kwargs)

    def _is_for_op(self, x: Tensor) -> bool:
        """Return whether the op computes what the linear does now, as ``lower_linears`` has it."""
        head = self._head
        held = [head.weight, *([] if head.bias is None else [head.bias])]
        return (
            all(type(tensor) is nn.Parameter for tensor in held)
            and all(tensor.is_cpu and tensor.dtype == x.dtype for tensor in (x, *held))
            and target.linears_pay(held[:1])
            and not any(self._hooks)
            and "forward" not in vars(head)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch_private.are_transforms_active()
            and not torch_private_dynamo.is_traced()
            and self._has_kernels
        )

    def _why_exact(self, x: Tensor) -> str | None:
        """Return why the op does not compute what the linear does now, or None if it does."""
        head = self._head
        held = [head.weight, *([] if head.bias is None else [head.bias])]
        if not all(type(tensor) in (nn.Parameter, FreedParameter) for tensor in held):
            return "an operand is of a subclass of Tensor"
        if any(tensor.dtype != x.dtype for tensor in held) or x.dtype not in DTYPES:
            return "its operands must have one dtype of float32, bfloat16 and float16"
        if any(tensor.device != x.device for tensor in held):
            return "its operands are on several devices"
        if x.shape[-1:] != (head.in_features,) or head.in_features % BLOCK:
            return f"MXFP8 needs a multiple of {BLOCK} input features"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held):
            return "its weight requires a gradient: run under torch.no_grad()"
        if any(self._hooks) or "forward" in vars(head):
            return "it has hooks or a forward of its own"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if torch_private.are_transforms_active() or torch_private_dynamo.is_traced():
            return "it is inside a function transform or another compilation"
        return None

    def _in_mxfp8(self, x: Tensor) -> Tensor:
        head, options = self._head, self._options
        chosen = target.choose(x.device, options.kernels)
        kernels = target.mxfp8_kernels(chosen, x.device)
        source, name = Source((head.weight,), LINEAR), f"weight of {self._name}"
        call = calls.current()
        with torch_private.as_plain_tensors():
            if (
                options.free_weights
                and call is not None
                and STORE.can_free(source, MXFP8_ROWS)
                and not call.called.is_shared(head.weight)
            ):
                STORE.free(source, MXFP8_ROWS, name)
            codes, scales = STORE.get(source, MXFP8_ROWS, name)
            if profiling.is_on():
                profiling.name(codes, self._name)
            # The op reads no freed memory.
            result = torch.ops.mxfp4.linears_mxfp8(x, [codes], [scales], [head.bias], kernels)[0]
            if not self._is_verified:
                original = nn.functional.linear(x, head.weight, head.bias)
                operands = (x, head.weight, head.bias)
                linear_verification.compare(self._name, original, result, *operands)
                self._is_verified = True
        return result

    @functools.cached_property
    def _has_kernels(self) -> bool:
        return target.has_native_linears(self._options.kernels)
