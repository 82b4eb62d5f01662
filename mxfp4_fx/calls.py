"""`Call`: one call of a model that this backend compiled, and which of its experts ran in MXFP4.

A backend sees graphs only. Whether a *model's* experts run in MXFP4 is known only after a call: a
graph break, a hook or one of Dynamo's limits may keep experts out of every graph, and one graph may
serve many layers. So Dynamo enters a :class:`Call` around each call of a compiled model. During the
call, the experts have forward hooks, which Dynamo traces to nothing. The hooks run only where
experts are called uncompiled, and check whether a graph of ours with experts ran in between.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mxfp4_fx.ahead import Ahead
from mxfp4_fx.called import Called
from mxfp4_fx.core import collector, compilation, forks, profiling, ranks, torch_private_dynamo
from mxfp4_fx.core.errors import (
    InflatedExpertsWarning,
    MissedRewriteError,
    NoExpertsWarning,
    OptionError,
    RepeatedSwizzleWarning,
)
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.skip import KEEP_DENSE, SKIPPED
from mxfp4_fx.core.torch_private_distributed import dtensors_in
from mxfp4_fx.core.version import why_other_experts
from mxfp4_fx.experts import (
    is_part,
    look_at,
    modules_of,
)
from mxfp4_fx.huggingface import hub_modules
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.huggingface.inflated import note_of_inflated
from mxfp4_fx.limits import sharers
from mxfp4_fx.passes.report import GraphReport, Miss
from mxfp4_fx.telling import is_told, note_told, tell, tell_of_linears, warn
from mxfp4_fx.weights.store import STORE

HOOK = -4  # our key among a module's hooks; torch's are not negative

# Modules and functions that have called experts, or are parts of models that have them.
_seen: weakref.WeakSet[Any] = weakref.WeakSet()
_told_of_size: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that may be inflated
_watched: dict[nn.Module, int] = {}  # modules with our hooks -> calls that need them
_lock = threading.RLock()
_calls = threading.local()


@dataclasses.dataclass
class Found:
    """What a call found: the report of each graph that ran, and experts that ran in no graph.

    Notes are what the user should know beside that.
    """

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    outside: list[Miss] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


_observer: contextvars.ContextVar[Found | None] = contextvars.ContextVar("observer", default=None)


class Call:
    """One call of a compiled model or function, in one thread.

    ``function`` is what is called; by default, it is looked up on the stack.

    Attributes:
        options: the options of ``torch.compile``.
        called: the models that are called, their experts, and the names of both.
        graphs: how many graphs with experts have run.
        found: whether experts were seen, in a graph or outside.
        observer: collects the findings for ``explain``; with it, nothing is warned of or raised.
    """

    def __init__(self, options: Options, function: Callable[..., Any] | None = None) -> None:
        self.options = options
        self.observer = _observer.get()
        self.graphs = 0
        self.found = False
        self.called = Called(options)
        self._function = function
        self._entered: dict[nn.Module, int] = {}  # experts -> graphs when they were called
        self._outer: Call | None = None
        self._compiling: contextlib.ExitStack | None = None
        self._tracing: contextlib.ExitStack | None = None
        self._ahead: Ahead | None = None
        self._raised: BaseException | None = None
        self._naming: contextlib.AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        prepare_capture()  # transformers may have been imported since the last call
        given = self._function
        called = (given, []) if given else compilation.compiled_function(apart=True)
        skipped = []
        if called is not None:
            self._function = called[0]
            for top in modules_of(*called):
                model, experts = look_at(top)
                self.called.models.append(model)
                self.called.experts.update((module, name) for name, module in experts)
                if self.options.skip:
                    names = model.skipped(self.options.skip)
                    skipped += [(module, name in names) for name, module in experts]
        STORE.look_at(dtensors_in(self.called.experts))  # a graph may be given their shards alone
        if profiling.is_on():  # before the hooks: if names cannot be looked up, none stay
            self._naming = profiling.naming(self.called.names)
            self._naming.__enter__()
        self._outer, self._raised = current(), sys.exc_info()[1]
        _calls.current = self
        with _lock:
            for module in self.called.experts:
                _watched[module] = _watched.get(module, 0) + 1
                module._forward_pre_hooks[HOOK] = _before_experts
                module._forward_hooks[HOOK] = _after_experts
            for module, is_skipped in skipped:
                vars(module)[SKIPPED] = is_skipped

    def __exit__(self, *_: object) -> None:
        try:
            if self._compiling is not None:
                # Dynamo passes no exception to __exit__.
                raised = sys.exc_info()
                is_new = raised[1] is not self._raised
                try:
                    self.traced()
                finally:
                    self._compiling.__exit__(*(raised if is_new else (None, None, None)))
        finally:
            self._leave()
        # A new exception goes to the user instead of a warning.
        error = sys.exc_info()[1]
        if error is self._raised:
            self._judge()
        elif isinstance(error, Exception):
            models = [f"a call of {model.kind}" for model in self.called.models]
            entered = map(self.called.name_of, self._entered)
            ranks.note(error, "in " + ["a call", *models, *entered][-1])

    def _leave(self) -> None:
        """Take the call and its hooks away."""
        if self._naming is not None:
            self._naming.__exit__(None, None, None)
        _calls.current = self._outer
        if self._outer is not None:  # a compiled part was called in a call of a compiled whole
            self._outer.graphs += self.graphs
            self._outer.found = self._outer.found or self.found
        with _lock:
            for module in self.called.experts:
                count = _watched.pop(module)
                if count > 1:
                    _watched[module] = count - 1
                    continue
                module._forward_pre_hooks.pop(HOOK, None)
                module._forward_hooks.pop(HOOK, None)
                if self.options.skip:
                    vars(module).pop(SKIPPED, None)

    def compiles(self, is_part: bool) -> None:
        """Note that Dynamo begins to compile in this call: a part of it, or what is called."""
        if self._compiling is None:
            self._compiling = contextlib.ExitStack()
            self._compiling.enter_context(collector.young_only())
            # Of a function it is not known which of its modules it calls.
            is_module = isinstance(getattr(self._function, "__self__", None), nn.Module)
            if self.observer is None and is_module:
                self._ahead = Ahead(self.called, are_read=is_part)
                self._compiling.enter_context(self._ahead.swizzling())
        if is_part and self._tracing is None:
            self._tracing = contextlib.ExitStack()
            self._tracing.enter_context(torch_private_dynamo.tracing_without_cache())

    def traced(self) -> None:
        """Note that Dynamo has traced a part, which is compiled now."""
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None
            torch_private_dynamo.keep_results()

    def _judge(self) -> None:
        """Warn, or raise with ``strict``, if the call has met no experts at all."""
        called = getattr(self._function, "__self__", None)
        if isinstance(called, nn.Module) and called in self.called.experts:
            self.leave(called)  # its forward may have been called without its hooks
        subjects = self._subjects()
        if self.found:
            _seen.update(subjects)
            return
        if self.observer is not None or all(subject in _seen for subject in subjects):
            return
        # Who has experts and ran none of them may still have called them in an unknown way.
        are_parts = all(isinstance(s, nn.Module) and is_part(s) for s in subjects)
        if not self.called.experts and are_parts:
            _seen.update(subjects)
            return
        message = "nothing in what it called looks like a mixture of experts"
        if self.options.strict:
            raise MissedRewriteError(
                f"strict=True, and {message}. If it is a part of a model whose experts are in "
                "other parts, compile the whole model, or this part without strict"
            )
        fresh = [subject for subject in subjects if not is_told(subject, message)]
        if fresh:
            name = getattr(fresh[0], "__qualname__", type(fresh[0]).__name__)
            warn(f"{message}: {name} runs without MXFP4", NoExpertsWarning)
            note_told(fresh, message)

    @torch.compiler.disable  # here and below: Dynamo would compile the bookkeeping
    def enter(self, module: nn.Module) -> None:
        """Note that experts are called uncompiled; functions that they call may be compiled."""
        self._entered[module] = self.graphs

    @torch.compiler.disable
    def leave(self, module: nn.Module) -> None:
        """Report experts that return from an uncompiled call, unless a graph with experts ran."""
        if self._entered.pop(module, 0) != self.graphs:
            return
        self.found = True
        name = self.called.name_of(module)
        why = self.called.left(module)
        if why is not None:
            miss = Miss(name, why, skipped=True)
        else:
            reason = hub_modules.why_not(module, self.options)
            miss = Miss(name, reason or f"it ran uncompiled: {_why_uncompiled(module)}")
        if self.observer is not None:
            self.observer.outside.append(miss)
        elif why is None:
            # With a stance, the user chose to run this call uncompiled: warn, but raise no error.
            strict = self.options.strict and not compilation.is_eager_by_stance()
            tell([(miss, [module])], dataclasses.replace(self.options, strict=strict))

    def tell_of_offloaded(self) -> None:
        """Warn once of each of the offloaded experts, unless they are left as they are."""
        told = "offloaded"
        fresh = {
            module: name
            for module, name in self.called.offloaded.items()
            if not is_told(module, told) and self.called.left(module) is None
        }
        if self.observer is not None or not fresh:
            return
        shown = "".join(f"\n  {name}" for name in [*fresh.values()][:3])
        more = f"\n  and {len(fresh) - 3} more" if len(fresh) > 3 else ""
        warn(
            "these MoE layers run in MXFP4, but each call loads their weights and swizzles them "
            f"again, because a device_map offloads them:{shown}{more}",
            RepeatedSwizzleWarning,
        )
        note_told(fresh, told)

    def ran(self, report: GraphReport, args: Sequence[Any]) -> None:
        """Record that a graph with this report will run on these inputs; announce its misses."""
        if report.rewrites or report.misses:
            self.found = True
            self.graphs += 1
        if report.rewrites:
            self._note_inflated()
        call: Call | None = self
        while call is not None:  # a compiled part may be called in a call of a compiled whole
            if call._ahead is not None:
                call._ahead.ran(report, args)
            call = call._outer
        if self.observer is not None:
            self.observer.graphs.append(self.renamed(report, args))
        elif report.misses:
            self.announce(report, args)

    def _note_inflated(self) -> None:
        """Warn, once a model, that transformers made its experts dense while it loaded them."""
        for model in self.called.models:
            top = model.top()
            if top is None or (self.observer is None and top in _told_of_size):
                continue
            experts = [one for _, one in model.experts() or () if self.called.left(one) is None]
            note = note_of_inflated(top, experts)
            if self.observer is not None:
                self.observer.notes += [note] if note else []
                continue
            if note:
                warn(note, InflatedExpertsWarning)
            _told_of_size.add(top)

    def renamed(self, report: GraphReport, args: Sequence[Any]) -> GraphReport:
        """Return the report with the names that these inputs' experts have in the model."""
        return self.called.renamed(report, args, [*self._entered])

    def announce(self, report: GraphReport, args: Sequence[Any]) -> None:
        """Warn of the misses of a graph that runs on these inputs, or raise with ``strict``."""
        owners = self.called.owners()
        found = []
        for miss in self.renamed(report, args).misses:
            modules = {owners[id(args[at])] for at in miss.inputs if id(args[at]) in owners}
            if not miss.skipped:
                found.append((miss, list(modules or self._subjects())))
        tell(found, self.options)

    def announce_linears(self, report: GraphReport, args: Sequence[Any]) -> None:
        """Warn of the linears of a graph that stay exact, or raise with ``strict``."""
        misses = [miss for miss in self.renamed(report, args).linear_misses if not miss.skipped]
        tell_of_linears(misses, self._subjects(), self.options)

    def caller(self) -> Any:
        """Return the first module in the call, a function without any, or None."""
        (first, *_) = self._subjects()
        return None if first is self else first

    def _subjects(self) -> list[Any]:
        """Return what a warning is about: the modules in the call, or a function without any."""
        function = getattr(self._function, "__func__", self._function)
        return self.called.tops() or [function or self]


def current() -> Call | None:
    """Return the innermost call of this thread, or None."""
    return getattr(_calls, "current", None)


@contextlib.contextmanager
def observed() -> Iterator[Found]:
    """Collect what calls find, instead of warning or raising."""
    found = Found()
    token = _observer.set(found)
    try:
        yield found
    finally:
        _observer.reset(token)


def _before_frame(is_part: bool) -> None:
    # Before each frame, because transformers may be imported at any time: code in a call may import
    # it, and set_stance(force_backend="mxfp4") compiles without a Call.
    prepare_capture()
    call = current()
    if call is not None:
        call.compiles(is_part)


def _why_uncompiled(module: nn.Module) -> str:
    is_of_transformers = type(module).__module__.startswith("transformers.")
    older = why_other_experts() if is_of_transformers else None
    return older or compilation.why_uncompiled()


def _call_with(keywords: dict[str, Any]) -> Callable[[], Call]:
    """Return what makes a :class:`Call` for something that was compiled with these arguments."""
    try:
        options = Options.parse(keywords.get("options"), keywords.get("mode"))
    except OptionError:  # the backend raises it when it compiles
        options = Options()
    return functools.partial(Call, options)


# If Dynamo compiled a hook by itself, it would make it do nothing.
@torch_private_dynamo.never_compiled
def _before_experts(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        # Dynamo guards the marks because they are read: skipped experts get a graph of their own.
        _ = bool(getattr(module, KEEP_DENSE, False)), bool(getattr(module, SKIPPED, False))
        return
    call = current()
    if call is not None:
        call.enter(module)


@torch_private_dynamo.never_compiled
def _after_experts(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    call = current()
    if call is not None:
        call.leave(module)


forks.renew_lock(sys.modules[__name__], "_lock", threading.RLock)
compilation.on_calls(_call_with)
compilation.on_frames(_before_frame, sharers)
