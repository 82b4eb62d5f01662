"""LoRA on packed experts, with PEFT's own ``target_parameters=["mlp.experts.gate_up_proj", ..]``.

PEFT finds parameters by name and wraps their module in ``lora.ParamWrapper``, which adds the
product of the factors to the parameter at each call. Packed experts have no parameter of floats.
So they show PEFT one, without values, while it looks for parameters, and get a wrapper of their
own: the factors go to the experts, which compute the low-rank part beside their frozen bytes. Names
and shapes of the factors are PEFT's own, so that an adapter trained on dense experts loads here,
and the other way round.

Shape letters: E experts, H hidden, I intermediate, r rank.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as DenseParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.ops.adapters import LowRank
from mxfp4_fx.weights.source import MXFP4, Source
from mxfp4_fx.weights.store import STORE

log = logging.getLogger("mxfp4_fx.peft")


class Rounding(NamedTuple):
    """What merging an adapter into MXFP4 weights lost; Frobenius norms over all experts.

    Attributes:
        weight: its name in the model.
        of_weight: the rounding error, relative to the exact merged weight.
        of_adapter: the rounding error, relative to what the adapter adds. From 1 on, the error is
            as large as the adapter itself.
    """

    weight: str
    of_weight: float
    of_adapter: float


class ParamWrapper(DenseParamWrapper):
    """PEFT's wrapper of one parameter, for packed experts. PEFT asks for a class of this name.

    Attributes:
        roundings: what merging has lost since the last ``unmerge``, an entry for each ``merge``.

    Raises:
        OptionError: it is to adapt something else than a projection, or shards of experts.
    """

    def __init__(
        self, base_layer: Any, adapter_name: str, parameter_name: str | None = None, **given: Any
    ) -> None:
        experts = base_layer.get_base_layer() if isinstance(base_layer, LoraLayer) else base_layer
        if parameter_name not in PROJECTIONS:
            raise OptionError(
                f"packed experts take no adapter on {parameter_name or 'the module itself'}: name "
                'their weights in target_parameters=["mlp.experts.gate_up_proj", '
                '"mlp.experts.down_proj"], and no experts in target_modules'
            )
        if experts.shards or experts.cuts:
            raise OptionError(
                "packed experts that are spread over processes take no adapters: train them in one "
                "process, or in processes that each hold all experts"
            )
        self.roundings: list[Rounding] = []
        self._unmerged: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._weight: str = given.get("target_name", parameter_name)
        super().__init__(base_layer, adapter_name, parameter_name, **given)

    def get_param(self) -> Tensor:
        """Return a tensor with the dense weight's shape, dtype and device, and no values."""
        experts = self.get_base_layer()
        if not isinstance(experts, PackedExperts):  # mxfp4_fx.dequantize has made them dense
            dense: Tensor = super().get_param()
            return dense
        return _shown(experts, self.parameter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self.get_base_layer(), PackedExperts):
            dense: Tensor = super().forward(x, *args, **kwargs)
            return dense
        self._check_forward_args(x, *args, **kwargs)
        adapters: Mapping[str, Sequence[LowRank]] = kwargs.pop("adapters", {})
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not (self.disable_adapters or self.merged):
            mine = [self.low_rank(name) for name in self.active_adapters if name in self.lora_A]
            adapters = {**adapters, self.parameter_name: mine}
        result: Tensor = self.base_layer(x, *args, adapters=adapters, **kwargs)
        return result

    def low_rank(self, adapter: str) -> LowRank:
        """Return the factors of an adapter: ``a`` [E, r, K] and ``b`` [E, N, r]."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        base = self.get_base_layer()
        home = base.gate_up_proj_blocks.device
        if a.device != home:  # place_experts keeps the experts where they are, not their adapters
            a, b = a.to(home), b.to(home)
        experts = self.num_experts
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
        if self.parameter_name == "gate_up_proj" and base.dense_order.is_concatenated:
            b = b.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return LowRank(a.reshape(experts, -1, a.shape[-1]), b, self.scaling[adapter])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the weight and round it to MXFP4 again.

        The log says what the rounding lost (:class:`Rounding`), and ``roundings`` keeps it. The
        bytes from before stay in memory for ``unmerge``.

        Raises:
            ValueError: with ``safe_merge``, if the merged weight is not finite.
        """
        experts = self.get_base_layer()
        if not isinstance(experts, PackedExperts):
            super().merge(safe_merge, adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names) or []
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        blocks, scales = (f"{self.parameter_name}_{part}" for part in ("blocks", "scales"))
        held = experts.get_parameter(blocks), experts.get_parameter(scales)
        # All of them at once: each rounding has its error.
        added = [self.low_rank(name) for name in names]
        parts, rounding = _merged(self._weight, held, added, safe_merge)
        self._unmerged.append(held)
        self.roundings.append(rounding)
        _hold(experts, self.parameter_name, parts)
        self.merged_adapters += names
        log.warning(
            "merged %s into %s: rounding to MXFP4 has an error of %.2g of the weight, and of %.2g "
            "of what the adapter adds",
            ", ".join(names),
            rounding.weight,
            rounding.of_weight,
            rounding.of_adapter,
        )

    def unmerge(self) -> None:
        """Put back the bytes from before the first merge, exactly."""
        experts = self.get_base_layer()
        if not (isinstance(experts, PackedExperts) and self._unmerged):
            super().unmerge()
            return
        _hold(experts, self.parameter_name, self._unmerged[0])
        self._unmerged.clear()
        self.roundings.clear()
        self.merged_adapters.clear()


def _merged(
    name: str, held: tuple[Tensor, Tensor], added: list[LowRank], safe: bool
) -> tuple[tuple[nn.Parameter, nn.Parameter], Rounding]:
    """Return the bytes of a weight with adapters, one expert at a time, and what rounding lost."""
    values = STORE.values(Source(held, MXFP4))
    blocks, scales = (torch.empty_like(part) for part in values)
    lost = whole = change = 0.0
    for expert in range(blocks.shape[0]):
        weight = dequantize(values[0][expert], values[1][expert], torch.float32)
        delta = torch.zeros_like(weight)
        for a, b, scaling in added:
            delta += (b[expert].float() @ a[expert].float()).to(weight.device) * scaling
        exact = weight + delta
        if safe and not exact.isfinite().all():
            raise ValueError(f"the merged weight {name} is not finite: the adapter seems broken")
        blocks[expert], scales[expert] = quantize(exact, scale_rule="search")
        back = dequantize(blocks[expert], scales[expert], torch.float32)
        lost += float((back - exact).double().square().sum())
        whole += float(exact.double().square().sum())
        change += float(delta.double().square().sum())
    rounding = Rounding(name, _root(lost, whole), _root(lost, change))
    frozen = functools.partial(nn.Parameter, requires_grad=False)
    return (frozen(blocks), frozen(scales)), rounding


def _root(part: float, whole: float) -> float:
    """Return the square root of a quotient; of nothing of nothing, 0."""
    return 0.0 if part == 0 else (part / whole) ** 0.5 if whole else float("inf")


def _hold(experts: PackedExperts, name: str, parts: tuple[nn.Parameter, nn.Parameter]) -> None:
    for end, parameter in zip(("blocks", "scales"), parts, strict=True):
        setattr(experts, f"{name}_{end}", parameter)


def _shown(experts: PackedExperts, name: str) -> Tensor:
    """Return a weight as transformers has it, [E, K, N] or [E, N, K]; its values share a number."""
    n, k = experts.sizes()[PROJECTIONS.index(name)]
    bias: Tensor | None = getattr(experts, f"{name}_bias")
    dtype = cast(Any, experts.replaced[0]).down_proj.dtype if bias is None else bias.dtype
    one = torch.zeros((), dtype=dtype, device=experts.down_proj_blocks.device)
    return one.expand(experts.num_experts, *((k, n) if experts.is_transposed else (n, k)))


@contextmanager
def _shown_to_peft(model: nn.Module) -> Iterator[None]:
    """Give packed experts parameters with the names and shapes of dense ones, for a while."""
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    for experts in packed:
        for name in PROJECTIONS:
            shown = nn.Parameter(_shown(experts, name), requires_grad=False)
            experts.register_parameter(name, shown)
    try:
        yield
    finally:
        for experts in packed:
            for name in PROJECTIONS:
                delattr(experts, name)


def register(model_class: Any) -> None:
    """Let PEFT's ``LoraModel`` find the weights of packed experts."""
    inject = model_class._inject_parameters

    @functools.wraps(inject)
    def inject_parameters(
        self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> list[str]:
        peft_config._register_custom_module({PackedExperts: ParamWrapper})
        with _shown_to_peft(model):
            found: list[str] = inject(self, peft_config, model, *args, **kwargs)
        return found

    model_class._inject_parameters = inject_parameters
