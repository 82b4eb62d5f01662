"""`Called`: what a call of a compiled model calls, and what the user knows its parts by.

One graph may serve many layers, and knows them by the names that it was captured with. A call knows
the modules, so it can tell which of them holds an input, and how the model names it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.skip import KEEP_DENSE, SKIPPED, WHY_SKIPPED, Skip
from mxfp4_fx.experts import Model, holders_of, names_of_holders, tensors_of
from mxfp4_fx.huggingface.offloading import offloaded
from mxfp4_fx.passes.report import Attention, GraphReport, Miss, QuantizedLinear

_Item = TypeVar("_Item", Attention, QuantizedLinear, Miss)


class Called:
    """The modules in a call, and their names.

    Attributes:
        options: the options of ``torch.compile``.
        models: the modules that are called or used, as far as ``experts.modules_of`` finds them.
        experts: the experts in these modules -> their names.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.models: list[Model] = []
        self.experts: dict[nn.Module, str] = {}

    def name_of(self, module: nn.Module) -> str:
        return self.experts.get(module, type(module).__name__) or "(top level)"

    def left(self, module: nn.Module) -> str | None:
        """Return why the user wants these experts left as they are; None if the user does not."""
        if getattr(module, KEEP_DENSE, False):
            return "kept dense: skip= or modules_to_not_convert named it when it was loaded"
        if vars(module).get(SKIPPED, False):
            return WHY_SKIPPED
        return None

    def left_inputs(self, inputs: Sequence[Any]) -> dict[int, str | None]:
        """Return index -> :meth:`left`, for each of a graph's inputs that is an expert weight.

        If linears are quantized, it is so for their weights, too.
        """
        owners = self.owners()
        found = {at: self.left(owners[id(v)]) for at, v in enumerate(inputs) if id(v) in owners}
        if self.options.linears == "mxfp8" and self.options.skip:
            skip, names = Skip(self.options.skip), names_of_holders(self.tops())
            for at, value in enumerate(inputs):
                if at not in found and (name := names.get(id(value))) is not None:
                    found[at] = WHY_SKIPPED if skip.names(name) else None
        return found

    @functools.cached_property
    def offloaded(self) -> dict[nn.Module, str]:
        """The experts whose weights are loaded for a call alone -> their names."""
        return {module: self.name_of(module) for module in self.experts if module in self._lent}

    def is_lent(self, tensor: Tensor) -> bool:
        """Return whether a weight is one of :attr:`offloaded` experts."""
        return any(tensor is held for module in self.offloaded for held in tensors_of(module))

    def is_shared(self, weight: Tensor) -> bool:
        """Return whether a weight may be read by more than a linear, or is there for a call alone.

        It is so unless one module is known to hold it, which is no embedding.
        """
        readers = self._holders.get(id(weight), [])
        return len(readers) != 1 or isinstance(readers[0], nn.Embedding) or readers[0] in self._lent

    def check_skip(self) -> None:
        """Check ``options["skip"]``.

        Raises:
            OptionError: a pattern names no module of what is called.
        """
        names = [name for model in self.models for name in model.names]
        if not self.options.skip or not names:
            return
        for pattern in Skip(self.options.skip).unused(names):
            experts = [*map(self.name_of, self.experts)]
            known = ", ".join(experts[:3]) + (", ..." if experts[3:] else "")
            raise OptionError(
                f"options['skip']: {pattern!r} names no module of {self.models[0].kind}. Names are "
                f"those that named_modules() of what is compiled has; its experts are "
                f"{known or 'none'}"
            )

    def renamed(
        self, report: GraphReport, args: Sequence[Any], entered: Sequence[nn.Module]
    ) -> GraphReport:
        """Return the report with the names that these inputs' experts have in the model.

        Args:
            report: of a graph.
            args: its inputs.
            entered: the experts that are being called, the innermost last.
        """
        owners = self.owners()

        def rename(item: Any) -> Any:
            found = {owners[id(args[at])] for at in item.inputs if id(args[at]) in owners}
            if not item.inputs:  # no weight is an input: these are the experts called last
                found |= {*entered[-1:]}
            name = ", ".join(sorted(self.name_of(module) for module in found))
            # A longer name in the graph stays: it begins with the variable that holds the module.
            is_told = not name or f".{item.layer}".endswith(f".{name}")
            return item if is_told else dataclasses.replace(item, layer=name)

        by_parameter = functools.partial(self._by_parameter, args=args)
        return dataclasses.replace(
            report,
            rewrites=[rename(one) for one in report.rewrites],
            misses=[rename(one) for one in report.misses],
            attention=by_parameter(report.attention),
            mxfp8=by_parameter(report.mxfp8),
            linear_misses=by_parameter(report.linear_misses),
        )

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """``id`` of each parameter and each tensor of experts -> its module's name."""
        of_experts = {key: self.name_of(module) for key, module in self.owners().items()}
        return {**names_of_holders(self.tops()), **of_experts}

    def tops(self) -> list[nn.Module]:
        return [top for model in self.models if (top := model.top()) is not None]

    def owners(self) -> dict[int, nn.Module]:
        return {id(tensor): module for module in self.experts for tensor in tensors_of(module)}

    @functools.cached_property
    def _lent(self) -> set[nn.Module]:
        return {module for top in self.tops() for module in offloaded(top)}

    @functools.cached_property
    def _holders(self) -> dict[int, list[nn.Module]]:
        return holders_of(self.tops())

    def _by_parameter(self, items: Sequence[_Item], args: Sequence[Any]) -> list[_Item]:
        """Return items with the names of the modules that hold these inputs in the model."""
        if not items:
            return []
        names = names_of_holders(self.tops())

        def rename(one: _Item) -> _Item:
            name = next((names[id(args[at])] for at in one.inputs if id(args[at]) in names), "")
            return dataclasses.replace(one, layer=name) if name else one

        return [rename(one) for one in items]
