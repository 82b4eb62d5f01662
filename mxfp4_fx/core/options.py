"""The options of ``torch.compile(model, backend="mxfp4", options={...})``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.skip import Skip

KERNELS = ("auto", "triton", "cpu", "pytorch", "hub", "reference")


@dataclasses.dataclass(frozen=True)
class Options:
    """The parsed options.

    Attributes:
        kernels: the kernels that compute the rewritten experts: ``"auto"`` (the best for the
            device), ``"triton"`` (on a GPU), ``"cpu"`` (native), ``"pytorch"`` (on a CPU without a
            compiler), ``"hub"`` (on a GPU, from the ``kernels`` library), or ``"reference"`` (plain
            PyTorch for every device, slow).
        inner: the Dynamo backend that compiles the rewritten graph: a name or a callable
            ``(gm, example_inputs) -> callable``.
        inductor: options of Inductor, which get there if ``inner`` is ``"inductor"``.
        strict: raise for a missed rewrite instead of warning.
        verify: on each graph's first call, compare every rewritten region with the original one.
        free_weights: give the memory of each expert weight back as soon as it is swizzled. Only the
            compiled model can use a dense weight then; ``mxfp4_fx.restore`` undoes it.
        skip: patterns of the names of modules to leave alone; see ``skip.py``.
        regions: capture the repeated layer as a nested compile region, whose graph is compiled once
            for all layers that are alike.
        linears: compute linears of few rows on a CPU natively; or ``"mxfp8"``: quantize all linears
            but the router's to MXFP8.
        attention: compute attention with sinks on a CPU in memory linear in the number of tokens.
        programs: run a graph of few tokens on a CPU as one native call, where all of its ops are
            native, and leave Inductor the others.
        mode: the ``mode=`` of ``torch.compile``; reaches Inductor.
    """

    kernels: str = "auto"
    inner: str | Callable[..., Any] = "inductor"
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strict: bool = False
    verify: bool = False
    free_weights: bool = False
    skip: tuple[str, ...] = ()
    regions: bool = True
    linears: bool | str = True
    attention: bool = True
    programs: bool = True
    mode: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Parse and check the dictionary of ``torch.compile(options=...)``.

        Raises:
            OptionError: an unknown key (the message names the nearest one), a value of the wrong
                type, or two options that exclude each other.
        """
        given = dict(options or {})
        known = [f.name for f in dataclasses.fields(cls) if f.name != "mode"]
        for key in given:
            if key not in known:
                raise OptionError(_unknown(key, known))
        parsed = cls(**given, mode=mode)
        parsed._check()
        skip = Skip.of(parsed.skip).patterns
        return dataclasses.replace(parsed, skip=skip, inductor=dict(parsed.inductor))

    def _check(self) -> None:
        if self.kernels not in KERNELS:
            raise OptionError(
                f"options['kernels'] is {self.kernels!r}; it must be one of "
                f"{', '.join(KERNELS)}.{_nearest(self.kernels, KERNELS)}"
            )
        for name in ("strict", "verify", "free_weights", "regions", "attention", "programs"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"options[{name!r}] must be True or False.")
        if not isinstance(self.linears, bool) and self.linears != "mxfp8":
            raise OptionError(
                f"options['linears'] must be True, False or 'mxfp8'; it is {self.linears!r}."
            )
        if not (isinstance(self.inner, str) or callable(self.inner)):
            raise OptionError(
                "options['inner'] must be the name of a Dynamo backend, such as 'inductor' or "
                f"'eager', or a callable (gm, example_inputs); it is {self.inner!r}."
            )
        if not isinstance(self.inductor, Mapping):
            raise OptionError("options['inductor'] must be a dict of Inductor's own options.")
        if not isinstance(self.skip, str | list | tuple):  # what can be read more than once
            raise OptionError(
                "options['skip'] must be a list of module-name patterns, such as ['*.layers.0.*']."
            )
        if self.verify and self.free_weights:
            raise OptionError(
                "options['verify'] compares with the original weights, which "
                "options['free_weights'] gives back. Leave one of them out: verify first."
            )
        if (self.mode or self.inductor) and self.inner != "inductor":
            raise OptionError(
                "mode= and options['inductor'] are for Inductor, but options['inner'] is "
                f"{self.inner!r}. Leave one of them out."
            )


def _unknown(key: str, known: list[str]) -> str:
    hint = _nearest(key, known) or (
        " Options of Inductor go into their own dict: options={'inductor': {...}}."
    )
    return f"unknown option {key!r} for backend 'mxfp4'; it knows {', '.join(known)}.{hint}"


def _nearest(word: object, words: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(word), words, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
