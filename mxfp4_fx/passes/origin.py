"""Whence a node of a Dynamo graph came: the module and the line of code that made it."""

from __future__ import annotations

import os
import re

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__) + os.sep


def module_name(node: fx.Node) -> str:
    """The qualified name of the module whose forward made a node, as ``named_modules`` has it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "(top level)"
    # Dynamo writes L['self'].model.layers[0].mlp or L['self']._modules['model']._modules['0'].
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]", r".\1", path)
    return re.sub(r"^L\.\w+\.?", "", path) or "(top level)"


def comes_from(node: fx.Node, file: str) -> bool:
    """Whether code in ``file``, the end of a path, made a node."""
    return f'{file}", line' in (node.meta.get("stack_trace") or "").replace("\\", "/")


def source_line(node: fx.Node) -> str:
    """The line of model code, not torch's, that made a node: ``file:line: code``, or ""."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        found = re.match(r'\s*File "(.*?)", line (\d+)', lines[at])
        if found and not found[1].startswith(_TORCH):
            code = lines[at + 1].strip() if at + 1 < len(lines) else ""
            file = found[1].replace("\\", "/").rpartition("/")[2]
            return f"{file}:{found[2]}: {code}"
    return ""
