"""Second pass: rewrite the graph so that equal computations look alike.

- It makes an in-place call functional if the write is visible through one value only, and removes
  it if nothing reads that.
- It removes casts and views that change nothing.

Both keep the graph's results bit for bit. Where that is not certain, the call stays as it is.
"""

from __future__ import annotations

import collections
import operator

import torch
from torch import fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import Effect, Modes, modes
from mxfp4_fx.passes.graph import known_tensor, read_call, same_shape, tensor_of
from mxfp4_fx.passes.memory import UNKNOWN, effects_on, storages, tensors_in

# In-place methods and the functional methods of the same meaning.
_FUNCTIONAL = {
    "add_": "add",
    "clamp_": "clamp",
    "masked_fill_": "masked_fill",
}


def canonicalize(gm: fx.GraphModule, ctx: Context) -> None:
    """Make in-place calls functional where that is safe, then remove what changes nothing."""
    values = _Values(gm.graph, ctx.begin)
    made: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target in _FUNCTIONAL:
            made += _functionalize_method(node, values)
        elif node.op == "call_function" and node.target is operator.setitem:
            _functionalize_setitem(node, values)
    for node in reversed(made):
        if not node.users:
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        base = _value_unchanged(node, values)
        if base is not None:
            node.replace_all_uses_with(base)
            gm.graph.erase_node(node)


class _Values:
    """The values of a graph: their memory, torch's modes at them, and which are *steady*.

    Dynamo records one fake tensor for each value, in the state at the end of the graph. A value is
    steady if no call may change its shape or its memory in place. Only then does the fake tensor
    describe the value at every node.
    """

    def __init__(self, graph: fx.Graph, begin: Modes | None = None) -> None:
        self._modes = modes(graph, begin)
        self._nodes_of: dict[object, list[fx.Node]] = collections.defaultdict(list)
        for node in graph.nodes:
            self.note(node, node)
        self._unsteady = {
            id(value)
            for effects in effects_on(graph).values()
            for argument, what in effects.items()
            if what & ~Effect.WRITES
            for value in tensors_in(argument)
        }

    def note(self, node: fx.Node, like: fx.Node) -> None:
        """Add a new node that replaces ``like``."""
        self._modes[node] = self._modes[like]
        for key in storages(node):
            self._nodes_of[key].append(node)

    def are_steady(self, *nodes: fx.Node) -> bool:
        """Return whether all values of these nodes are steady."""
        return all(id(value) not in self._unsteady for node in nodes for value in tensors_in(node))

    def modes_at(self, node: fx.Node) -> Modes:
        """Return torch's modes at a node of the captured graph."""
        return self._modes[node]

    def behind(self, base: fx.Node) -> list[fx.Node] | None:
        """Return all nodes that share memory with ``base``, or None if they are not known.

        They are known if these nodes, their inputs and their users are all steady, because any
        further node of that memory would be an input or a user of one of them.
        """
        keys = storages(base)
        found = [node for key in keys for node in self._nodes_of[key]]
        neighbours = {n for node in found for n in (node, *node.all_input_nodes, *node.users)}
        return found if UNKNOWN not in keys and self.are_steady(*neighbours) else None


def _functionalize_method(node: fx.Node, values: _Values) -> list[fx.Node]:
    """Make an in-place call functional if that is safe; return the nodes that it becomes."""
    base = node.args[0]
    if tensor_of(base) is None or not values.are_steady(*node.all_input_nodes):
        return []
    assert isinstance(base, fx.Node)
    dtype = _functional_dtype(node, base)
    if dtype is None or not _is_private(node, base, values):
        return []
    node.target, result = _FUNCTIONAL[str(node.target)], node
    if dtype != known_tensor(base).dtype:
        result = _cast_behind(node, dtype, values)
    base.replace_all_uses_with(result, delete_user_cb=lambda user: user > result)
    return [node] if result is node else [node, result]


def _functionalize_setitem(node: fx.Node, values: _Values) -> None:
    """``base[index] = value`` -> ``index_put(base, (index,), value)`` for one index tensor."""
    base, index, put = node.args
    if not isinstance(base, fx.Node) or not isinstance(index, fx.Node):
        return
    base_value, index_value, value = map(tensor_of, (base, index, put))
    if base_value is None or index_value is None or value is None:
        return
    # Masks and numbers index in other ways. An assignment broadcasts in ways index_put does not.
    if index_value.dtype not in (torch.int64, torch.int32) or index_value.ndim == 0:
        return
    if not values.are_steady(*node.all_input_nodes) or value.dtype != base_value.dtype:
        return
    if not same_shape(tuple(value.shape), (*index_value.shape, *base_value.shape[1:])):
        return
    if node.users or not _is_private(node, base, values):
        return
    with node.graph.inserting_before(node):
        result = node.graph.call_function(torch.index_put, (base, (index,), put))
    result.meta = {**base.meta, "stack_trace": node.meta.get("stack_trace")}
    values.note(result, node)
    base.replace_all_uses_with(result, delete_user_cb=lambda user: user > node)
    node.graph.erase_node(node)


def _functional_dtype(node: fx.Node, base: fx.Node) -> torch.dtype | None:
    """Return the dtype of the functional call; None if a cast of it is not the in-place call.

    A cast of a sum is, bit for bit: torch computes the in-place sum in the promoted dtype as well.
    With a factor, or a shape other than that of ``base``, gradients would be rounded elsewhere.
    """
    target = known_tensor(base)
    operands = [v for a in node.all_input_nodes if (v := tensor_of(a)) is not None]
    dtype = target.dtype
    for other in operands:
        # A bool mask selects; it takes no part in type promotion.
        if other.dtype is not torch.bool:
            dtype = torch.promote_types(dtype, other.dtype)
    shape = tuple(target.shape)
    if dtype == target.dtype:
        wanted = torch.broadcast_shapes(*(tuple(v.shape) for v in operands))
        return dtype if same_shape(tuple(wanted), shape) else None
    is_sum = node.target == "add_" and len(node.args) == 2 and not node.kwargs
    alike = all(v.dtype in DTYPES and same_shape(tuple(v.shape), shape) for v in operands)
    return dtype if is_sum and alike else None


def _cast_behind(node: fx.Node, dtype: torch.dtype, values: _Values) -> fx.Node:
    """Insert a cast of a call, made functional and now of ``dtype``, to the dtype that it had."""
    before = known_tensor(node)
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("to", (node, before.dtype))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    cast.meta = dict(node.meta)
    recorded = torch.set_grad_enabled(before.requires_grad)
    with recorded, torch_private.without_saved_tensor_hooks(), before.fake_mode:  # type: ignore[attr-defined]
        node.meta["example_value"] = before.to(dtype)
    values.note(cast, node)
    return cast


def _is_private(write: fx.Node, base: fx.Node, values: _Values) -> bool:
    """Return whether the effect of ``write`` is visible only through ``base``."""
    value, here = tensor_of(base), values.modes_at(write)
    if value is None or (value.requires_grad and not here.gradients):
        return False  # autograd ignores the write, but would record the functional call
    if here.inference != values.modes_at(base).inference:
        return False  # only one of base and the functional result would be an inference tensor
    nodes = values.behind(base)
    if nodes is None:
        return False
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            return False  # the caller can see the write
        if node in (base, write):
            continue
        # A view that is made before the write and read after it sees the write. A view of base that
        # is made later becomes a view of the result.
        if node < write and any(user > write for user in node.users):
            return False
    return True


def _value_unchanged(node: fx.Node, values: _Values) -> fx.Node | None:
    """Return the input of a cast or a view that changes neither dtype nor shape, or None."""
    if any(user.op == "output" for user in node.users):
        return None  # the graph would return its input itself instead of another object
    call = read_call(node)
    if call is None or call.op not in ("cast", "view"):
        return None
    base = call.args["input"]
    before, after = tensor_of(base), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if not values.are_steady(base, node):
        return None
    if before.requires_grad and not values.modes_at(node).gradients:
        return None  # under no_grad the view is cut off from the gradients of its input
    same = before.device == after.device and same_shape(tuple(before.shape), tuple(after.shape))
    return base if same and isinstance(base, fx.Node) else None
