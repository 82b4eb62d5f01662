"""Weights are swizzled in a thread while the inner compiler works, and nothing of it is lost."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from freeing import FREE
from models import Layers, compile_with, hidden, mlp, model, pack, swizzled, tokens
from processes import wait_until
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError

import mxfp4_fx
from mxfp4_fx.core import background
from mxfp4_fx.core.errors import MissedRewriteWarning, NanWeightsWarning
from mxfp4_fx.weights import mapped
from mxfp4_fx.weights import store as store_module
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.store import STORE

pytestmark = pytest.mark.usefixtures("no_gradients")

NATIVE = {"kernels": "cpu"}


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mxfp4_fx"]


def forgotten(module: nn.Module) -> bool:
    """Whether the store has nothing of a module."""
    return STORE.forget(module.parameters()) == 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each weight that is swizzled: whether that happened beside the main thread."""
    found: list[bool] = []
    real = store_module.swizzle_weight

    def watching(*args: Any) -> Any:
        found.append(threading.current_thread() is not threading.main_thread())
        return real(*args)

    monkeypatch.setattr(store_module, "swizzle_weight", watching)
    return found


class Inner:
    """An inner compiler that does something and then compiles nothing."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        self.meanwhile = meanwhile

    def __call__(self, gm: Any, inputs: Any) -> Any:
        self.meanwhile()
        return gm.forward


def test_each_weight_is_swizzled_once_while_the_compiler_works(made: list[bool]) -> None:
    layers, x = Layers(), hidden()
    expected = compile_with(Layers(), options=NATIVE)(x)
    made.clear()
    inner = Inner(lambda: wait_until(lambda: len(made) == 4, "all four weights"))
    compiled = compile_with(layers, inner, options=NATIVE)
    for _ in range(2):
        assert torch.equal(compiled(x), expected)
    assert made == [True] * 4
    assert not running()


def test_no_thread_for_weights_that_are_there(made: list[bool]) -> None:
    module, x = mlp(), hidden()
    compile_with(module, options=NATIVE)(x)
    made.clear()
    seen: list[threading.Thread] = []
    compile_with(module, Inner(lambda: seen.extend(running())), options=NATIVE)(x[:, :3])
    assert not made
    assert not seen


def test_weights_that_torch_swizzles_are_swizzled_after_the_compiler(made: list[bool]) -> None:
    """The compiler holds Python's lock, which those would wait for."""
    before: list[int] = []
    inner = Inner(lambda: before.append(len(made)))
    compile_with(mlp(), inner, options={"kernels": "pytorch"})(hidden())
    assert before == [0]
    assert made == [False] * 2


@pytest.mark.exhaustive
def test_a_compiler_that_measures_is_left_alone(made: list[bool]) -> None:
    options = {**NATIVE, "inductor": {"max_autotune_pointwise": True}}
    compile_with(mlp(), "inductor", options=options)(hidden())
    assert made == [False] * 2


class Fault(Exception):
    pass


def test_an_error_of_swizzling_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Fault("no")

    def fail(*args: Any) -> Any:
        raise error

    module = mlp()
    monkeypatch.setattr(store_module, "swizzle_weight", fail)
    with pytest.raises(BackendCompilerFailed) as caught:
        compile_with(module, options=NATIVE)(hidden())
    assert caught.value.inner_exception is error
    assert forgotten(module)
    assert not running()


@pytest.mark.parametrize("error", [Fault("no"), KeyboardInterrupt()])
def test_a_compiler_that_fails_leaves_nothing(error: BaseException, made: list[bool]) -> None:
    module = mlp()

    def fail() -> None:
        wait_until(lambda: len(made) > 0, "a weight")
        raise error

    with pytest.raises((BackendCompilerFailed, KeyboardInterrupt)) as caught:
        compile_with(module, Inner(fail), options=NATIVE)(hidden())
    assert error in (caught.value, getattr(caught.value, "inner_exception", None))
    assert not running()
    assert forgotten(module)


def test_no_weight_begins_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    began, goes_on = threading.Event(), threading.Event()
    made = []
    real = store_module.swizzle_weight

    def slow(*args: Any) -> Any:
        made.append(args)
        began.set()
        goes_on.wait()
        return real(*args)

    def fail() -> None:
        began.wait()
        threading.Timer(0.1, goes_on.set).start()  # while the caller waits for the thread
        raise Fault("no")

    monkeypatch.setattr(store_module, "swizzle_weight", slow)
    with pytest.raises(BackendCompilerFailed):
        compile_with(Layers(), Inner(fail), options=NATIVE)(hidden())
    assert len(made) == 1
    assert not running()


def test_a_warning_is_not_lost_to_the_compilers_filter(made: list[bool]) -> None:
    module = mlp()
    module.experts.down_proj.data[0, 0, 0] = torch.nan

    def quiet() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wait_until(lambda: not running(), "the weights")

    with pytest.warns(NanWeightsWarning, match=r"down_proj.*experts 0"):
        compile_with(module, Inner(quiet), options=NATIVE)(hidden())


def test_a_warning_that_is_an_error_reaches_the_caller() -> None:
    module = mlp()
    module.experts.down_proj.data[0, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", NanWeightsWarning)
        with pytest.raises(BackendCompilerFailed) as caught:
            compile_with(module, options=NATIVE)(hidden())
    assert isinstance(caught.value.inner_exception, NanWeightsWarning)


def test_weights_swizzled_ahead_in_inference_mode_are_current(made: list[bool]) -> None:
    with torch.inference_mode():
        module, x = mlp(), hidden()
        compiled = compile_with(module, options=NATIVE)
        compiled(x)
        compiled(x)
    assert made == [True] * 2
    assert not any(part.is_inference() for part in swizzled(module.experts))


# ---- with free_weights


def in_a_file(folder: Path) -> Any:
    """Packed layers whose experts are a mapped file."""
    layers = pack(Layers())
    tensors = {name: p.detach() for name, p in layers.named_parameters() if "proj_" in name}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "w.safetensors")
    for name, tensor in load_file(folder / "w.safetensors").items():
        parent, _, leaf = name.rpartition(".")
        setattr(layers.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    return layers


def test_a_mapped_weight_is_swizzled_ahead_and_freed_by_the_first_call(
    tmp_path: Path, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layers = hidden(), in_a_file(tmp_path)
    expected = compile_with(pack(Layers()), options=NATIVE)(x)
    given_back: list[int] = []
    real = mapped.page_out

    def watching(tensors: Any) -> None:
        given_back.append(len(made))
        real(tensors)

    monkeypatch.setattr(mapped, "page_out", watching)
    made.clear()
    inner = Inner(lambda: wait_until(lambda: len(given_back) == 4, "all four weights"))
    compiled = compile_with(layers, inner, options={**FREE, **NATIVE})
    assert torch.equal(compiled(x), expected)
    assert given_back[:4] == [1, 2, 3, 4]  # one after the other, before the next
    assert made == [True] * 4
    assert all(is_freed(p) for name, p in layers.named_parameters() if name.endswith("_blocks"))


def test_other_memory_is_freed_one_by_one_in_the_first_call(made: list[bool]) -> None:
    """It could not be given back while compiling, and the peak would grow."""
    before: list[int] = []
    inner = Inner(lambda: before.append(len(made)))
    compile_with(pack(Layers()), inner, options={**FREE, **NATIVE})(hidden())
    assert before == [0]
    assert made == [False] * 4


# ---- packed experts, while Dynamo traces


class Tracing(nn.Module):
    """Packed layers that do something while Dynamo traces them, before it comes to the experts."""

    def __init__(self, meanwhile: Callable[[], Any], layers: Any = None) -> None:
        super().__init__()
        self.layers = pack(Layers()) if layers is None else layers
        self._meanwhile = torch.compiler.assume_constant_result(meanwhile)

    def forward(self, x: Any) -> Any:
        self._meanwhile()
        return self.layers(x)


def test_packed_weights_are_swizzled_while_dynamo_traces(made: list[bool]) -> None:
    x = hidden()
    expected = compile_with(pack(Layers()), options=NATIVE)(x)
    made.clear()
    wait = Tracing(lambda: wait_until(lambda: len(made) == 4, "all four weights"))
    compiled = compile_with(wait, options=NATIVE)
    for _ in range(2):
        assert torch.equal(compiled(x), expected)
    assert made == [True] * 4


def test_weights_are_swizzled_while_the_first_piece_is_compiled(made: list[bool]) -> None:
    """A layer's first piece reads no experts."""
    calls: list[int] = []

    def wait() -> None:
        calls.append(len(made))
        wait_until(lambda: len(made) == 4, "all four weights")

    whole = mxfp4_fx.compile(pack(model()), options={**NATIVE, "inner": Inner(wait)})
    whole(tokens(1), use_cache=True)
    assert len(calls) == 2
    assert made == [True] * 4


def test_mapped_weights_give_their_pages_back_while_dynamo_traces(
    tmp_path: Path, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, given_back = hidden(), []
    real = mapped.page_out
    monkeypatch.setattr(mapped, "page_out", lambda *a: (given_back.append(len(made)), real(*a)))
    layers = in_a_file(tmp_path)
    wait = Tracing(lambda: wait_until(lambda: len(given_back) == 4, "all four weights"), layers)
    compile_with(wait, options={**FREE, **NATIVE})(x)
    assert given_back[:4] == [1, 2, 3, 4]
    assert made == [True] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": "pytorch"},
        {**NATIVE, **FREE},  # what is no file's memory cannot be given back
        {**NATIVE, "skip": ["layers.*"]},
        {**NATIVE, "inner": "inductor", "inductor": {"max_autotune_pointwise": True}},
    ],
    ids=["other kernels", "freed", "skipped", "measuring"],
)
def test_nothing_is_swizzled_while_dynamo_traces(options: dict[str, Any], made: list[bool]) -> None:
    seen: list[object] = []  # a thread that swizzles, or what it has made already
    compile_with(Tracing(lambda: seen.extend([*running(), *made])), options=options)(hidden())
    assert not seen


def test_nothing_is_swizzled_for_a_function_that_may_call_other_modules(made: list[bool]) -> None:
    seen: list[object] = []
    module = Tracing(lambda: seen.extend([*running(), *made]))
    compile_with(lambda x: module(x), options=NATIVE)(hidden())
    assert not seen


def test_weights_that_are_no_parameters_are_left(made: list[bool]) -> None:
    """As in ``torch.func.functional_call``."""
    layers = pack(Layers())
    given = {name: weight.detach() for name, weight in layers.named_parameters()}
    compiled = compile_with(layers, options=NATIVE)
    x = hidden()
    assert torch.equal(torch.func.functional_call(compiled, given, (x,)), compiled(x))


def test_what_no_graph_reads_is_forgotten(made: list[bool]) -> None:
    layers = pack(Layers())
    first, second = layers.layers
    second.forward = torch.compiler.disable(second.forward)
    with pytest.warns(MissedRewriteWarning):
        compile_with(Tracing(lambda: None, layers), options=NATIVE)(hidden())
    assert len(made) == 4
    assert forgotten(second)
    assert not forgotten(first)


def test_an_error_while_dynamo_traces_leaves_nothing(made: list[bool]) -> None:
    def fail() -> None:
        wait_until(lambda: len(made) > 0, "a weight")
        raise Fault("no")

    module = Tracing(fail)
    with pytest.raises(InternalTorchDynamoError, match="Fault: no") as caught:
        compile_with(module, options=NATIVE)(hidden())
    assert caught.traceback[-1].frame.code.raw is fail.__code__  # the whole traceback is there
    assert not running()
    assert forgotten(module)


def test_no_weight_begins_after_an_error_while_dynamo_traces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began, goes_on, made = threading.Event(), threading.Event(), []
    real, join = store_module.swizzle_weight, threading.Thread.join

    def slow(*args: Any) -> Any:
        made.append(args)
        began.set()
        goes_on.wait()
        return real(*args)

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        goes_on.set()
        join(thread, timeout)

    def fail() -> None:
        began.wait()
        raise Fault("no")

    monkeypatch.setattr(store_module, "swizzle_weight", slow)
    monkeypatch.setattr(threading.Thread, "join", joined)
    with pytest.raises(InternalTorchDynamoError):
        compile_with(Tracing(fail), options=NATIVE)(hidden())
    assert len(made) == 1


def test_an_error_beside_dynamo_is_left_to_who_needs_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, failed = store_module.swizzle_weight, threading.Event()
    module, x = pack(Layers()), hidden()
    expected = compile_with(module, options=NATIVE)(x)

    def fail_once(*args: Any) -> Any:
        if failed.is_set():
            return real(*args)
        failed.set()
        raise Fault("no")

    STORE.forget(module.parameters())
    monkeypatch.setattr(store_module, "swizzle_weight", fail_once)
    wait = Tracing(lambda: failed.wait(), module)
    assert torch.equal(compile_with(wait, options=NATIVE)(x), expected)


# ---- the thread itself


def test_the_work_sees_no_modes_of_the_caller() -> None:
    seen: list[Any] = []

    def work(is_stopped: Callable[[], bool]) -> None:
        seen.extend((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.ones(1)))

    with torch.inference_mode(), torch.device("meta"), background.meanwhile(work):
        pass
    grad, inference, made = seen
    assert (grad, inference, made.device.type) == (True, False, "cpu")


def test_the_work_has_the_callers_number_of_threads() -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with background.meanwhile(lambda is_stopped: seen.append(torch.get_num_threads())):
            pass
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_an_interrupt_while_waiting_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    real = threading.Thread.join

    def work(is_stopped: Callable[[], bool]) -> None:
        wait_until(is_stopped, "the interrupt")
        ended.append(True)

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), background.meanwhile(work):
        pass
    assert ended == [True]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not running()
