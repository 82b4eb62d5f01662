"""The backend as a user meets it: options, errors, warnings, logs, inner compilers."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Graphs, compile_with, hidden, mlp, model, tokens
from oracle import assert_as_accurate
from torch._dynamo.exc import BackendCompilerFailed

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteWarning, OptionError
from mxfp4_fx.core.options import Options


def mxfp4_nodes(graphs: Graphs) -> list[str]:
    nodes = [str(node.target) for gm in graphs.seen for node in gm.graph.nodes]
    return [name for name in nodes if name.startswith("mxfp4.")]


class TestOptions:
    def test_an_unknown_option_names_the_near_one(self) -> None:
        with pytest.raises(OptionError, match=r"'strickt'.*Did you mean 'strict'\?"):
            Options.parse({"strickt": True})

    def test_an_option_of_inductor_is_told_its_place(self) -> None:
        with pytest.raises(OptionError, match=r"'max_autotune'.*options=\{'inductor': \{"):
            Options.parse({"max_autotune": True})

    def test_an_unknown_kernel_names_the_near_one(self) -> None:
        with pytest.raises(OptionError, match=r"'referense'.*Did you mean 'reference'\?"):
            Options.parse({"kernels": "referense"})

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"strict": "yes"}, "strict"),
            ({"inner": 3}, "inner"),
            ({"inductor": ["max_autotune"]}, "inductor"),
            ({"skip": [1]}, "skip"),
            ({"inner": "eager", "inductor": {"max_autotune": True}}, "inner"),
        ],
    )
    def test_a_bad_value_names_its_option(self, options: dict[str, Any], name: str) -> None:
        with pytest.raises(OptionError, match=name):
            Options.parse(options)

    def test_what_is_compared_must_not_be_freed(self) -> None:
        with pytest.raises(OptionError, match=r"verify.*free_weights.*Leave one of them out"):
            Options.parse({"verify": True, "free_weights": True})

    def test_one_pattern_to_skip_may_stand_alone(self) -> None:
        assert Options.parse({"skip": "model.layers.0.*"}).skip == ("model.layers.0.*",)

    def test_a_bad_option_reaches_the_user_of_torch_compile(self) -> None:
        with pytest.raises(BackendCompilerFailed, match="Did you mean 'strict'"):
            compile_with(mlp(), options={"strickt": True})(hidden())

    def test_reference_kernels_are_in_the_graph(self) -> None:
        graphs = Graphs()
        with torch.no_grad():
            compile_with(mlp(), graphs, options={"kernels": "reference"})(hidden())
        (gm,) = graphs.seen
        kernels = {n.kwargs["kernels"] for n in gm.graph.nodes if "kernels" in n.kwargs}
        assert kernels == {"reference"}


class TestMisses:
    def test_a_miss_warns_with_layer_and_reason_once(self) -> None:
        module = mlp()  # outside no_grad: its weights require a gradient
        with pytest.warns(MissedRewriteWarning, match=r"experts: gate_up requires a gradient"):
            compile_with(module)(hidden())
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", MissedRewriteWarning)
            compile_with(module)(hidden())

    def test_a_miss_is_an_error_when_strict(self) -> None:
        with pytest.raises(BackendCompilerFailed, match=r"experts: gate_up requires a gradient"):
            compile_with(mlp(), options={"strict": True})(hidden())

    def test_strict_passes_when_everything_is_rewritten(self) -> None:
        with torch.no_grad():
            compile_with(model(), options={"strict": True})(tokens())

    def test_trainable_experts_get_their_gradient(self) -> None:
        module, x = mlp(), hidden()
        with pytest.warns(MissedRewriteWarning):
            compile_with(module, "aot_eager")(x)[0].sum().backward()
        got = {n: p.grad for n, p in module.named_parameters()}
        module.zero_grad()
        module(x)[0].sum().backward()
        for name, parameter in module.named_parameters():
            assert got[name] is not None, name
            assert torch.equal(got[name], parameter.grad), name

    def test_nothing_rewritten_leaves_the_captured_graph(self) -> None:
        graphs = Graphs()
        with pytest.warns(MissedRewriteWarning):
            compile_with(mlp(), graphs)(hidden())
        assert mxfp4_nodes(graphs) == []
        assert ".add_" in "".join(f".{node.target}" for node in graphs.seen[0].graph.nodes)


class TestInner:
    def test_by_name(self) -> None:
        module, x = mlp(), hidden()
        with torch.no_grad():
            out = compile_with(module, "aot_eager")(x)[0]
            assert_as_accurate(out, module(x)[0], mlp(form="eager").double()(x.double())[0])

    def test_a_callable_sees_the_rewritten_graph(self) -> None:
        graphs = Graphs()
        with torch.no_grad():
            compile_with(mlp(), graphs)(hidden())
        assert mxfp4_nodes(graphs) == [
            "mxfp4.routing.default",
            "mxfp4.matmul_ogs.default",
            "mxfp4.matmul_ogs.default",
        ]

    def test_an_unknown_name_is_an_error(self) -> None:
        with (
            torch.no_grad(),
            pytest.raises(BackendCompilerFailed, match="indctor"),
        ):
            compile_with(mlp(), "indctor")(hidden())

    @pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, True), (torch.float32, False)])
    def test_inductor(self, dtype: torch.dtype, dynamic: bool) -> None:
        module, x = mlp(dtype), hidden(dtype=dtype)
        with torch.no_grad():
            compiled = torch.compile(module, backend="mxfp4", dynamic=dynamic)
            out, scores = compiled(x)
            exact = mlp(dtype, "eager").double()(x.double())
            assert_as_accurate(out, module(x)[0], exact[0])
            assert_as_accurate(scores, module(x)[1], exact[1])

    def test_mode_reaches_inductor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = record_patches(monkeypatch)
        with torch.no_grad():
            torch.compile(mlp(), backend="mxfp4", mode="max-autotune-no-cudagraphs")(hidden())
        assert seen == [torch._inductor.list_mode_options("max-autotune-no-cudagraphs")]

    def test_options_of_inductor_reach_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = record_patches(monkeypatch)
        options = {"inductor": {"epilogue_fusion": False}}
        with torch.no_grad():
            torch.compile(mlp(), backend="mxfp4", options=options)(hidden())
        assert seen == [{"epilogue_fusion": False}]


def record_patches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from torch._inductor import compile_fx

    seen: list[Any] = []

    def record(gm: Any, inputs: list[Any], config_patches: Any = None, **_: Any) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", record)
    return seen


class TestDynamo:
    def test_compiling_again_finds_the_compiled_code(self) -> None:
        module, x, graphs = mlp(), hidden(), Graphs()
        with torch.no_grad():
            for _ in range(3):
                torch.compile(module, backend="mxfp4", options={"inner": graphs})(x)
        assert len(graphs.seen) == 1

    def test_two_threads_compile_and_agree(self) -> None:
        modules, x = [mlp(seed=1), mlp(seed=2)], hidden()
        start, results = threading.Barrier(2), {}

        def run(at: int) -> None:
            with torch.no_grad():
                start.wait()
                results[at] = compile_with(modules[at])(x)[0]

        threads = [threading.Thread(target=run, args=(at,)) for at in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for at, module in enumerate(modules):
            expected = module(x)[0]
            exact = mlp(form="eager", seed=at + 1).double()(x.double())[0]
            assert_as_accurate(results[at], expected, exact)

    def test_the_captured_graph_stays_as_it_is(self) -> None:
        """Dynamo keeps the graph it hands out; a backend may not change it under its hands."""
        before: list[str] = []
        after: list[str] = []

        def spy(gm: Any, inputs: list[Any]) -> Any:
            before.append(gm.print_readable(print_output=False))
            compiled = mxfp4_fx.mxfp4(gm, inputs, options={"inner": "eager"})
            after.append(gm.print_readable(print_output=False))
            return compiled

        with torch.no_grad():
            torch.compile(mlp(), backend=spy)(hidden())
        assert before == after


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.path.dirname(__file__),
        check=False,
    )


MODEL = """
import torch
from transformers import GptOssConfig, GptOssForCausalLM

config = GptOssConfig(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=64, hidden_size=64, intermediate_size=64, head_dim=16, num_attention_heads=4,
    num_key_value_heads=2)
model = GptOssForCausalLM(config).eval()
ids = torch.arange(6)[None]
torch.set_grad_enabled(False)
graphs = []

def keep(gm, inputs):
    graphs.append(gm)
    return gm.forward

torch.compile(model, backend="mxfp4", options={"inner": keep})(ids)
parts = [part for part in graphs[0].modules() if hasattr(part, "graph")]
print(sum("mxfp4.matmul_ogs" in str(node.target) for part in parts for node in part.graph.nodes))
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def done(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    nothing_built_yet = str(tmp_path_factory.mktemp("cache"))
    done = in_fresh_process(
        MODEL,
        TORCH_LOGS="+mxfp4_fx",
        TORCH_TRACE=str(trace),
        CXX="no-such-compiler",
        MXFP4_FX_CACHE_DIR=nothing_built_yet,
        TMPDIR=nothing_built_yet,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.exhaustive
class TestFreshProcess:
    """By name, without an import, logged, traced, and on a machine without a compiler."""

    def test_the_experts_are_rewritten(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stdout.split() == ["2"]  # in the region that both layers share

    def test_torch_logs_show_passes_and_layers(
        self, done: subprocess.CompletedProcess[str]
    ) -> None:
        assert "fuse_moe: " in done.stderr
        assert "moe.default +1" in done.stderr
        assert "model.layers.1.mlp.experts: grouped_mm -> MXFP4, pytorch kernels" in done.stderr

    def test_graphs_are_artifacts_of_the_structured_trace(
        self, done: subprocess.CompletedProcess[str], trace: Path
    ) -> None:
        written = "".join(path.read_text() for path in trace.iterdir())
        for name in ("canonicalize", "fuse_moe", "lower_moe", "check"):
            assert f"mxfp4_fx_before_{name}" in written
            assert f"mxfp4_fx_after_{name}" in written

    def test_layers_are_an_artifact_too(
        self, done: subprocess.CompletedProcess[str], trace: Path
    ) -> None:
        written = "".join(path.read_text() for path in trace.iterdir())
        _, _, layers = written.partition('"mxfp4_fx_layers"')
        assert "model.layers.1.mlp.experts: grouped_mm -> MXFP4, pytorch kernels" in layers

    def test_without_a_compiler_the_experts_run_in_pytorch_and_say_so_once(
        self, done: subprocess.CompletedProcess[str]
    ) -> None:
        assert done.stderr.count("SlowKernelsWarning") == 1
        assert "CXX='no-such-compiler' names no program" in done.stderr
