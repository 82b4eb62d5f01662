"""Registration of the ops' gradients, for autograd and for ``torch.func``'s transforms.

``torch.library.register_autograd`` serves autograd only. Its functions have no ``setup_context``,
which ``torch.func.grad`` needs, and they drop forward-mode derivatives without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mxfp4_fx.core import torch_private, torch_private_dynamo
from mxfp4_fx.core.errors import GradientError


def register(
    library: torch.library.Library,
    op: torch_private.OpOverload,
    backward: Callable[..., Any],
    save: Callable[..., Any],
) -> None:
    """Register the gradient of an op.

    Args:
        library: the library that defines the op.
        op: the op.
        backward, save: ``backward`` and ``setup_context`` of an ``autograd.Function`` whose
            ``inputs`` are all of the op's arguments.
    """
    schema = torch_private.schema_of(op)
    name = schema.name.rpartition("::")[2]
    is_list = isinstance(schema.returns[0].type, torch.ListType)
    defaults = tuple(argument.default_value for argument in schema.arguments)

    def forward(*args: Any) -> Any:
        with torch_private.below_autograd():
            results = op(*args)
        return tuple(results) if is_list else results  # a list is no result for autograd

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    gradients: Any = type(f"{name}_gradients", (torch.autograd.Function,), members)

    def autograd(*args: Any) -> Any:
        if torch_private.in_forward_mode() and any(map(_has_tangent, args)):
            raise GradientError(
                f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): use "
                "torch.func.vjp or jacrev"
            )
        if torch.is_grad_enabled() and torch_private.any_requires_grad(*args):
            # The dispatcher omits trailing arguments that equal their defaults.
            inputs = (*args, *defaults[len(args) :])
            if torch_private.are_transforms_active():
                with torch_private.as_python_calls():
                    results = gradients.apply(*inputs)
            else:
                results = gradients.apply(*inputs)
            return list(results) if is_list else results
        with torch_private.below_autograd():
            return op(*args)

    for function in (autograd, forward, save, backward):
        torch_private_dynamo.untraced(function)
    library.impl(op, autograd, "Autograd")


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
