"""Print the graph of one GPT-OSS MLP as Dynamo captures it, and after each pass of the pipeline.

A ``+`` marks the lines that a pass added. Needs no files.

    python examples/graph_passes.py [--form batched_mm] [--dynamic]
"""

from __future__ import annotations

import argparse
import collections
import warnings
from typing import Any

import torch
from torch import fx
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.pipeline import PIPELINE, run_pass


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=("grouped_mm", "batched_mm"), default="grouped_mm")
    parser.add_argument("--dynamic", action="store_true", help="any number of tokens")
    args = parser.parse_args(argv)
    # Dynamo warns of an lru_cache in transformers' code, which no user can change.
    warnings.filterwarnings("ignore", message=".*lru_cache", category=UserWarning)

    with torch.no_grad():  # otherwise experts whose weights require a gradient are not rewritten
        captured, inputs = capture(args.form, args.dynamic)
        print("== captured\n")
        print(*lines(captured), sep="\n")

        graph = copy_graph(captured)
        context = Context(Options(), inputs)
        for step in PIPELINE:
            before, counts = lines(graph), calls(graph)
            run_pass(step, graph, context)
            print(f"\n== {step.__name__}: {difference(counts, calls(graph))}\n")
            if lines(graph) != before:
                for line in lines(graph):
                    print(f"{' ' if line in before else '+'} {line}")

    for miss in context.report.misses:
        print(f"not rewritten: {miss}")
    inputs = captured.graph.find_nodes(op="placeholder")
    for binding in context.bindings:
        sources = " and ".join(brief(inputs[at]) for at in binding.slots)
        for name, part in zip(binding.inputs, ("blocks", "scales"), strict=True):
            print(f"at run time, {short(name)} is {part} of {sources}, {binding.layout}")
    return 0


def capture(form: str, dynamic: bool) -> tuple[fx.GraphModule, list[Any]]:
    """Return what Dynamo passes to a backend: the graph, and its inputs with the parameters."""
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 4}
    config = GptOssConfig(hidden_size=64, intermediate_size=96, **sizes)
    config._experts_implementation = form
    mlp = GptOssMLP(config).to(torch.bfloat16)
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((gm, inputs))
        return gm.forward

    hidden = torch.randn(1, 5, config.hidden_size, dtype=torch.bfloat16)
    torch.compile(mlp, backend=keep, dynamic=dynamic, fullgraph=True)(hidden)
    return seen[0]


def lines(gm: fx.GraphModule) -> list[str]:
    return [describe(node) for node in gm.graph.nodes]


def describe(node: fx.Node) -> str:
    """Return a node as ``name = call(arguments)``, and an input with its dtype and shape."""
    if node.op == "output":
        return f"return {brief(node.args[0])}"
    if node.op == "placeholder":
        value = node.meta["example_value"]
        if not isinstance(value, torch.Tensor):
            return f"input {brief(node)}: {value}"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"input {brief(node)}: {dtype} {list(value.shape)}"
    args = [brief(arg) for arg in node.args]
    args += [f"{name}={brief(arg)}" for name, arg in node.kwargs.items()]
    return f"{brief(node)} = {label(node)}({', '.join(args)})"


def brief(value: object) -> str:
    if isinstance(value, fx.Node):
        return short(value.name) if value.op == "placeholder" else value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(brief, value))}]"
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ":".join("" if part is None else brief(part) for part in parts)
    return "..." if value is Ellipsis else str(value)


def short(name: str) -> str:
    """Return an input's name without the words that Dynamo adds for modules and parameters."""
    return name.replace("l_self_modules_", "").replace("_parameters_", "_").rstrip("_")


def label(node: fx.Node) -> str:
    """Return the name of what a node calls, with a dot before methods."""
    if isinstance(node.target, str):
        return f".{node.target}"
    return str(getattr(node.target, "__name__", node.target))


def calls(gm: fx.GraphModule) -> collections.Counter[str]:
    return collections.Counter(label(n) for n in gm.graph.nodes if n.op.startswith("call_"))


def difference(before: collections.Counter[str], after: collections.Counter[str]) -> str:
    changes = {name: after[name] - before[name] for name in sorted({*before, *after})}
    shown = [f"{name} {n:+d}" for name, n in changes.items() if n]
    return f"{before.total()} -> {after.total()} calls; {', '.join(shown) or 'no change'}"


if __name__ == "__main__":
    raise SystemExit(main())
