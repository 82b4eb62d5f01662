"""The target is chosen once for a device, and anew for each graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import Layers, compile_with, hidden
from native_workshop import join_loaders

import mxfp4_fx
from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError, NativeBuildError
from mxfp4_fx.core.loaded_once import LoadedOnce
from mxfp4_fx.core.options import Options
from mxfp4_fx.ops import native, target
from mxfp4_fx.ops.target import Target
from mxfp4_fx.passes.context import Context

CPU = torch.device("cpu")
META = torch.device("meta")

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What targets are chosen for, each time that it happens."""
    seen: list[tuple[Any, ...]] = []
    choose = target.choose

    def noted(*asked: Any) -> Target:
        seen.append(asked)
        return choose(*asked)

    monkeypatch.setattr(target, "choose", noted)
    return seen


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_layers_of_a_graph_have_one_choice(chosen: list[tuple[Any, ...]]) -> None:
    compile_with(Layers())(hidden())
    assert chosen == [(CPU, "auto")]


def test_the_next_graph_has_its_own(threads: None) -> None:
    """What a choice depends on may have changed: threads, variables, what was asked for."""
    for count in (1, 2):
        torch.set_num_threads(count)
        rewrite, *_ = mxfp4_fx.explain(Layers(count=1), hidden()).rewrites
        assert f"on {count} CPU threads" in rewrite.reason


def test_each_device_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "choose", lambda device, asked: Target(device.type, asked, ""))
    context = Context(Options(kernels="reference"), [])
    assert context.target_for(CPU) is context.target_for(CPU)
    assert context.target_for(CPU) == Target("cpu", "reference", "")
    assert context.target_for(META) == Target("meta", "reference", "")


def test_a_device_that_nothing_serves_is_refused_each_time() -> None:
    context = Context(Options(), [])
    for _ in range(2):
        with pytest.raises(KernelsUnavailableError, match="no 'auto' kernels for device 'meta'"):
            context.target_for(META)


class TestLoadAhead:
    """The native kernels, as if they were not compiled yet."""

    @pytest.fixture
    def loading(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
        """Takes what loading returns or raises; returns the names of the threads that load."""

        def set_up(result: Any) -> list[str]:
            join_loaders()
            threads: list[str] = []

            def load(path: str) -> Any:
                threads.append(threading.current_thread().name)
                if isinstance(result, Exception):
                    raise result
                return result

            monkeypatch.setattr(native, "libraries", LoadedOnce(load, NativeBuildError, ()))
            return threads

        return set_up

    def test_who_needs_them_gets_what_a_thread_loads(self, loading: Any) -> None:
        threads, path = loading("library"), hardware.cpu_path()
        target.load_ahead("auto", CPU)
        join_loaders()
        assert native.load(path) == "library"
        target.load_ahead("auto", CPU)
        join_loaders()
        assert threads == ["mxfp4_fx builds"]

    def test_who_needs_them_gets_the_failure(self, loading: Any) -> None:
        threads = loading(NativeBuildError("no compiler"))
        target.load_ahead("cpu", CPU)
        join_loaders()
        with pytest.raises(NativeBuildError, match="no compiler"):
            native.load(hardware.cpu_path())
        assert threads == ["mxfp4_fx builds"]

    @pytest.mark.parametrize(("requested", "device"), [("reference", CPU), ("auto", META)])
    def test_not_if_others_will_be_chosen(
        self, loading: Any, requested: str, device: torch.device
    ) -> None:
        threads = loading("library")
        target.load_ahead(requested, device)
        join_loaders()
        assert threads == []
