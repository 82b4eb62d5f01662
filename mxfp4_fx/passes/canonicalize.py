"""First pass: write the graph in a form in which equal computations look alike.

- In-place calls on values that nobody else can see become functional ones.
- Casts and views that change nothing are dropped.

Everything it does keeps the graph's meaning bit for bit; whatever is not certain stays as it is.
"""

from __future__ import annotations

import collections
import operator

import torch
from torch import fx

from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.graph import (
    UNKNOWN,
    read_call,
    same_shape,
    storages,
    surely_writes,
    tensor_of,
)

# In-place methods and the functional methods of the same meaning.
_FUNCTIONAL = {
    "add_": "add",
    "clamp_": "clamp",
    "masked_fill_": "masked_fill",
}


# Key of a piece of memory -> the nodes behind which it is.
Sharing = dict[object, list[fx.Node]]


def canonicalize(gm: fx.GraphModule, ctx: Context) -> None:
    """Functionalize what is safe to, then drop what does nothing."""
    sharing: Sharing = collections.defaultdict(list)
    for node in gm.graph.nodes:
        for key in storages(node):
            sharing[key].append(node)
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target in _FUNCTIONAL:
            _functionalize_method(node, sharing)
        elif node.op == "call_function" and node.target is operator.setitem:
            _functionalize_setitem(node, sharing)
    # Dynamo notes one fake tensor a value: if its shape changes in place (``t_``), the note does.
    reshaped = {
        id(tensor_of(value))
        for node in gm.graph.nodes
        if surely_writes(node)
        for value in node.all_input_nodes
    }
    for node in list(gm.graph.nodes):
        base = _value_unchanged(node)
        if base is not None and reshaped.isdisjoint({id(tensor_of(base)), id(tensor_of(node))}):
            node.replace_all_uses_with(base)
            gm.graph.erase_node(node)


def _functionalize_method(node: fx.Node, sharing: Sharing) -> None:
    base = node.args[0]
    if not isinstance(base, fx.Node) or not _keeps_type(node, base):
        return
    if _is_private(node, base, sharing):
        node.target = _FUNCTIONAL[str(node.target)]
        base.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)


def _functionalize_setitem(node: fx.Node, sharing: Sharing) -> None:
    """``base[index] = values`` -> ``index_put(base, (index,), values)`` for one index tensor."""
    base, index, values = node.args
    value = tensor_of(values)
    if not isinstance(base, fx.Node) or not isinstance(index, fx.Node) or value is None:
        return
    base_value, index_value = tensor_of(base), tensor_of(index)
    if base_value is None or index_value is None or value.dtype != base_value.dtype:
        return
    # Masks and numbers index in other ways, and an assignment broadcasts in more ways.
    if index_value.dtype not in (torch.int64, torch.int32) or index_value.ndim == 0:
        return
    if not same_shape(tuple(value.shape), (*index_value.shape, *base_value.shape[1:])):
        return
    if node.users or not _is_private(node, base, sharing):
        return
    with node.graph.inserting_before(node):
        put = node.graph.call_function(torch.index_put, (base, (index,), values))
    put.meta = {**base.meta, "stack_trace": node.meta.get("stack_trace")}
    for key in storages(put):
        sharing[key].append(put)
    base.replace_all_uses_with(put, delete_user_cb=lambda user: user > node)
    node.graph.erase_node(node)


def _keeps_type(node: fx.Node, base: fx.Node) -> bool:
    """Whether the functional call gives the in-place call's dtype and shape."""
    target = tensor_of(base)
    if target is None:
        return False
    operands = [v for a in node.all_input_nodes if (v := tensor_of(a)) is not None]
    dtype = target.dtype
    for other in operands:
        # a bool mask selects, it does not promote
        if other.dtype is not torch.bool:
            dtype = torch.promote_types(dtype, other.dtype)
    shape = torch.broadcast_shapes(*(tuple(v.shape) for v in operands))
    return dtype == target.dtype and same_shape(tuple(shape), tuple(target.shape))


def _is_private(write: fx.Node, base: fx.Node, sharing: Sharing) -> bool:
    """Whether the memory that ``write`` changes is seen afterwards through ``base`` alone."""
    keys = storages(base)
    if UNKNOWN in keys:
        return False
    for node in (node for key in keys for node in sharing[key]):
        if node.op in ("placeholder", "get_attr"):
            return False  # the caller sees it
        if node in (base, write):
            continue
        # Views taken before the write would see it; views of base taken later are views of the
        # result.
        if node < write and any(user > write for user in node.users):
            return False
    return True


def _value_unchanged(node: fx.Node) -> fx.Node | None:
    """What a cast to the dtype, or a view to the shape, is of that its value has already."""
    if any(user.op == "output" for user in node.users):
        return None  # the graph would return another object
    call = read_call(node)
    if call is None or call.op not in ("cast", "view"):
        return None
    base = call.args["input"]
    before, after = tensor_of(base), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    same = before.device == after.device and same_shape(tuple(before.shape), tuple(after.shape))
    return base if same and isinstance(base, fx.Node) else None
