"""The origin of a node in a Dynamo graph: the module and the line of code that made it."""

from __future__ import annotations

import itertools
import os
import re

import torch
from torch import fx

from mxfp4_fx.core import torch_private

_TORCH = os.path.dirname(torch.__file__) + os.sep


# A step of a path to a module: .name, [0] or ['name'].
_STEP = re.compile(r"""\.([^.\[]+)|\[(\d+)\]|\[(?:'([^']*)'|"([^"]*)")\]""")
# Steps through attributes of Python and torch, which the names of ``named_modules`` do not have.
_NO_NAMES = {
    *("__dict__", "_modules", "_orig_mod"),
    *("forward", "__call__", "__self__", "__func__", "__closure__", "cell_contents"),
}


def module_name(node: fx.Node) -> str:
    """Return the qualified name of the module whose forward made a node, as in ``named_modules``.

    The name is relative to the compiled module. If a function is compiled, the name begins with the
    variable through which the function uses the module.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "(top level)"
    return _name(str(list(stack.values())[-1][0])) or "(top level)"


def owner_name(placeholder: fx.Node) -> str:
    """Return the qualified name of the module whose parameter or buffer an input is, or ""."""
    path, _, last = torch_private.source_path(placeholder).rpartition("[")
    is_held = last and path.endswith(("._parameters", "._buffers"))
    return _name(path.rpartition(".")[0]) if is_held else ""


def _name(path: str) -> str:
    # In a module Dynamo's path is like L['self'].model.layers[0].mlp or
    # L['self'].__dict__['_modules']['model'], in a function like G['model'] or
    # L['run'].__closure__[0].cell_contents.
    steps = ["".join(step.groups("")) for step in _STEP.finditer(path)]
    names = [
        name
        for before, name in itertools.pairwise(["", *steps])
        if name not in _NO_NAMES and before != "__closure__" and not name.startswith("__import_")
    ]
    return ".".join(names[1:] if path.startswith("L[") else names)


def is_of_gpt_oss(node: fx.Node) -> bool:
    """Return whether transformers' code of GPT-OSS, or of experts in general, made a node."""
    trace = (node.meta.get("stack_trace") or "").replace("\\", "/")
    files = "transformers/models/gpt_oss/modeling_gpt_oss.py", "transformers/integrations/moe.py"
    return any(f'{file}", line' in trace for file in files)


def source_line(node: fx.Node) -> str:
    """Return the line of code outside torch that made a node, as ``file:line: code``, or ""."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        found = re.match(r'\s*File "(.*?)", line (\d+)', lines[at])
        if found and not found[1].startswith(_TORCH):
            code = lines[at + 1].strip() if at + 1 < len(lines) else ""
            file = found[1].replace("\\", "/").rpartition("/")[2]
            return f"{file}:{found[2]}: {code}"
    return ""
