"""How the ops' gradients are registered: for autograd, and for ``torch.func``'s transforms.

``torch.library.register_autograd`` would do for the first. Its functions have no ``setup_context``,
which ``torch.func.grad`` asks for, and forward-mode derivatives are lost in silence there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.errors import GradientError


def register(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    backward: Callable[..., Any],
    save: Callable[..., Any],
) -> None:
    """Give an op a gradient.

    Args:
        library: that the op is defined in.
        op: the op.
        backward, save: an ``autograd.Function``'s ``backward`` and ``setup_context``; ``inputs``
            there are all of the op's arguments.
    """
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    gradients: Any = type(f"{op._opname}_gradients", (torch.autograd.Function,), members)

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise GradientError(
                f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): use "
                "torch.func.vjp or jacrev"
            )
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # The dispatcher leaves arguments out that are equal to their defaults.
            inputs = (*args, *defaults[len(args) :])
            if torch._C._are_functorch_transforms_active():
                with _as_python_calls():
                    return gradients.apply(*inputs)
            return gradients.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    for function in (autograd, forward, save, backward):
        torch_private.untraced(function)
    library.impl(op, autograd, "Autograd")


def _as_python_calls() -> Any:
    """Functorch has begun with the op, and shall begin anew with the ``autograd.Function``."""
    key = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set().add(key),
        torch._C._dispatch_tls_local_exclude_set().remove(key),
    )


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
