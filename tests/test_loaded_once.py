"""What is loaded once: by one thread, in one process and its children, and not again in vain."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import processes
import pytest

from mxfp4_fx.core import forks
from mxfp4_fx.core.errors import NativeBuildError
from mxfp4_fx.core.loaded_once import LoadedOnce

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")


class Shelf:
    """Loads what it has, and counts."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.missing = False
        self.things = LoadedOnce(self._load, NativeBuildError, while_same=("SHELF", "ROOM"))

    def _load(self, key: str) -> list[str]:
        self.tried.append(key)
        if self.missing:
            raise NativeBuildError(f"there is no {key}")
        return [key]

    def refusal(self, key: str) -> str:
        with pytest.raises(NativeBuildError) as raised:
            self.things(key)
        return str(raised.value)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.delenv("SHELF", raising=False)
    monkeypatch.delenv("ROOM", raising=False)
    return Shelf()


def test_each_key_is_loaded_once(shelf: Shelf) -> None:
    first = shelf.things("a")
    assert shelf.things("a") is first
    assert shelf.things("b") == ["b"]
    assert shelf.tried == ["a", "b"]
    assert shelf.things.loaded == {"a": ["a"], "b": ["b"]}


def test_threads_that_ask_at_once_get_the_same(shelf: Shelf) -> None:
    at_once = threading.Barrier(4)
    found: list[list[str]] = []

    def ask() -> None:
        at_once.wait(processes.LAST_RESORT)
        found.append(shelf.things("a"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one is found[0] for one in found)
    assert shelf.tried == ["a"]


def test_a_failure_is_told_again_and_not_tried_again(shelf: Shelf) -> None:
    shelf.missing = True
    assert shelf.refusal("a") == shelf.refusal("a") == "there is no a"
    shelf.missing = False
    assert shelf.refusal("a") == "there is no a"
    assert shelf.tried == ["a"]


def test_a_failure_is_that_keys_alone(shelf: Shelf) -> None:
    shelf.missing = True
    for key in ("a", "b", "a", "b"):
        assert shelf.refusal(key) == f"there is no {key}"
    assert shelf.tried == ["a", "b"]
    shelf.missing = False
    assert shelf.things("c") == ["c"]


@pytest.mark.parametrize("variable", ["SHELF", "ROOM"])
def test_each_variable_that_matters_has_it_tried_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    shelf.missing = True
    shelf.refusal("a")
    shelf.missing = False
    monkeypatch.setenv("ANOTHER", "1")
    shelf.refusal("a")
    monkeypatch.setenv(variable, "1")
    assert shelf.things("a") == ["a"]


def test_other_errors_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def interrupted(key: int) -> int:
        tried.append(key)
        if len(tried) == 1:
            raise KeyboardInterrupt
        return key

    things = LoadedOnce(interrupted, NativeBuildError, while_same=())
    with pytest.raises(KeyboardInterrupt):
        things(1)
    assert things(1) == 1


def test_one_that_is_made_anew_knows_nothing(shelf: Shelf) -> None:
    shelf.things("a")
    shelf.missing = True
    shelf.refusal("b")
    shelf.missing = False
    other = shelf.things.anew()
    assert other.loaded == {}
    assert (other("a"), other("b")) == (["a"], ["b"])
    assert shelf.tried == ["a", "b", "a", "b"]


@pytest.fixture
def loading(shelf: Shelf) -> Iterator[None]:
    """Another thread loads something else, and is not done before the test is."""
    begun, done = threading.Event(), threading.Event()
    inner = shelf.things._load

    def slow(key: str) -> list[str]:
        if key == "slow":
            begun.set()
            done.wait(processes.LAST_RESORT)
        return inner(key)

    shelf.things._load = slow
    thread = threading.Thread(target=shelf.things, args=("slow",))
    thread.start()
    begun.wait(processes.LAST_RESORT)
    yield
    done.set()
    thread.join()


@needs_fork
def test_a_fork_does_not_wait_for_a_thread_that_it_lacks(shelf: Shelf, loading: None) -> None:
    child = os.fork()
    if not child:
        os._exit(0 if shelf.things("a") == ["a"] else 1)
    assert processes.exit_status(child) == 0


@needs_fork
def test_a_fork_has_what_was_loaded(shelf: Shelf) -> None:
    shelf.things("a")
    child = os.fork()
    if not child:
        os._exit(0 if shelf.things("a") and shelf.tried == ["a"] else 1)
    assert processes.exit_status(child) == 0


@needs_fork
def test_only_a_child_is_forked() -> None:
    assert not forks.is_forked()
    child = os.fork()
    if not child:
        os._exit(0 if forks.is_forked() else 1)
    assert processes.exit_status(child) == 0


def test_it_tells_a_failure_until_another_try_is_useful(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.missing = True
    assert not shelf.things.has_failed("a")
    shelf.refusal("a")
    assert shelf.things.has_failed("a")
    assert not shelf.things.has_failed("b")
    monkeypatch.setenv("ROOM", "another")
    assert not shelf.things.has_failed("a")
    assert shelf.tried == ["a"]
