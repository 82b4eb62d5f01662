"""``mxfp4_fx.explain`` and the command line."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from models import DTYPES, Layers, compile_with, hidden, mlp, model, tokens
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import mxfp4_fx
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint
from mxfp4_fx.cli import main
from mxfp4_fx.core import hardware
from mxfp4_fx.core.torch_private_capture import can_capture_regions
from mxfp4_fx.ops import target
from mxfp4_fx.weights.store import STORE

CPU = target.choose(torch.device("cpu"))
# Panels are 32 rows high and two blocks wide: all weights here fill theirs but down_proj, whose 96
# columns take room for 128.
PANEL_BYTES = 6 * (192 * 64 + 64 * 128) * 17 // 32
TABLE = f"""\
2 of 2 MoE layers rewritten, 1 graph
layer                       form        experts   kernels (layout)  before     after
model.layers.0.mlp.experts  grouped_mm  6, top-3  cpu (cpu_panels)  432.0 KiB  63.8 KiB
model.layers.1.mlp.experts  grouped_mm  6, top-3  cpu (cpu_panels)  432.0 KiB  63.8 KiB
total                                                               864.0 KiB  127.6 KiB
cpu (cpu_panels): {CPU.reason}"""
ATTENTION = "2 attentions with sinks: memory linear in the prompt's length"
WHOLE = f"{TABLE}\n{ATTENTION}"
# Where this torch has no regions.
NOTE = (
    "\nnote: each of 2 decoder layers is captured by itself, which takes longer to compile: "
    "regions need torch 2.13"
)
NOTES = "" if can_capture_regions() else NOTE


# The same of two MLPs alone, whose names are shorter by fewer columns.
LAYERS_TABLE = "\n".join(
    line.replace("model.layers.", "layers.").replace(".mlp.experts", ".experts")
    if line.startswith("model.")
    else line[:5] + line[15:]
    if line.startswith(("layer ", "total "))
    else line
    for line in TABLE.splitlines()
)


def test_table() -> None:
    with torch.no_grad():
        assert str(mxfp4_fx.explain(model(), tokens())) == WHOLE + NOTES


def test_table_of_misses_names_layer_reason_and_place() -> None:
    lines = str(mxfp4_fx.explain(mlp(), hidden())).splitlines()  # outside no_grad
    assert lines[:2] == ["0 of 1 MoE layers rewritten, 1 graph", "not rewritten: experts"]
    assert lines[2].startswith("  gate_up requires a gradient, which MXFP4 experts do not have")
    assert lines[3].startswith("  at moe.py:")


def test_a_model_without_experts() -> None:
    text = str(mxfp4_fx.explain(nn.Linear(4, 4), torch.zeros(1, 4)))
    assert text.endswith("nothing in it looks like a mixture of experts")


def test_linears_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each layer the router's, q, k, v and o, and the head's; layers share pieces."""
    monkeypatch.setattr(hardware, "LINEAR_BYTES", dict.fromkeys(DTYPES, 0))
    monkeypatch.setattr(hardware, "linear_rows", lambda dtype: 4)
    with torch.no_grad():
        on, off = (
            mxfp4_fx.explain(model(), tokens(1, 2), options={"linears": linears})
            for linears in (True, False)
        )
    assert str(on) == f"{WHOLE}\n11 linears: native while they have few rows{NOTES}"
    assert on.to_dict()["linears"] == 11
    assert str(off) == WHOLE + NOTES


def test_the_same_as_data() -> None:
    with torch.no_grad():
        data = json.loads(json.dumps(mxfp4_fx.explain(Layers(), hidden()).to_dict()))
    assert data["graphs"] == 1
    assert data["misses"] == []
    assert data["bytes_before"] == 2 * 6 * (64 * 192 + 96 * 64) * 4
    assert data["bytes_after"] == 2 * (PANEL_BYTES + 6 * (192 + 64) // 32)
    first = data["rewrites"][0]
    assert (first["layer"], first["alpha"], first["limit"]) == ("layers.0.experts", 1.702, 7.0)


def test_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: object) -> None:
        raise AssertionError("a swizzled weight is asked for")

    monkeypatch.setattr(type(STORE), "get", get)
    whole = Layers()
    with torch.no_grad():
        mxfp4_fx.explain(whole, hidden())
        with pytest.raises(BackendCompilerFailed, match="is asked for"):
            compile_with(whole)(hidden())


@pytest.mark.exhaustive
def test_explaining_again_says_the_same() -> None:
    """More often than Dynamo compiles a function again."""
    module = mlp()
    with torch.no_grad():
        texts = {str(mxfp4_fx.explain(module, hidden())) for _ in range(10)}
    assert len(texts) == 1
    assert texts.pop().startswith("1 of 1 MoE layers rewritten, 1 graph")


def test_a_compiled_model_is_unwrapped() -> None:
    whole = Layers()
    with torch.no_grad():
        compiled = compile_with(whole)
        compiled(hidden())
        assert str(mxfp4_fx.explain(compiled, hidden())) == LAYERS_TABLE


def test_a_model_compiled_in_place_is_explained_and_stays_compiled() -> None:
    whole = model()
    whole.compile(backend="mxfp4", options={"inner": "eager"})
    whole.model.layers[0].mlp.compile(backend="mxfp4", options={"inner": "eager"})
    with torch.no_grad():
        assert str(mxfp4_fx.explain(whole, tokens())) == WHOLE + NOTES
    assert whole._compiled_call_impl is not None
    assert whole.model.layers[0].mlp._compiled_call_impl is not None


def test_an_explained_model_can_die() -> None:
    whole = Layers()
    with torch.no_grad():
        mxfp4_fx.explain(whole, hidden())
    weight = weakref.ref(whole.layers[0].experts.gate_up_proj)
    del whole
    gc.collect()
    assert weight() is None


def test_the_reason_is_that_of_the_form_that_came_nearest() -> None:
    module = mlp(form="batched_mm")
    module.experts._apply_gate = lambda gate_up: gate_up[..., ::2]
    with torch.no_grad():
        (miss,) = mxfp4_fx.explain(module, hidden()).misses
    assert miss.reason.startswith("not the batched_mm form: expected an activation that kernels")


def test_options_count() -> None:
    with torch.no_grad():
        explanation = mxfp4_fx.explain(
            Layers(), hidden(), options={"kernels": "reference", "skip": ["*.0.*"]}
        )
    assert [r.kernels for r in explanation.rewrites] == ["reference"]
    assert [(m.layer, m.skipped) for m in explanation.misses] == [("layers.0.experts", True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = CheckpointShape(
        hidden=64,
        intermediate=96,
        experts=6,
        experts_per_token=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
    )
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", shape)


class TestCommandLine:
    def test_explain(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["explain", str(checkpoint), "--dtype", "float32", "--experts", "grouped_mm"]
        assert main(argv) == 0
        assert capsys.readouterr().out.strip() == WHOLE + NOTES

    @pytest.mark.exhaustive
    def test_experts_are_packed_unless_told_otherwise(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(checkpoint)]) == 0
        out = capsys.readouterr().out
        assert re.search(r"layers\.0\.mlp\.experts  packed +6, top-3 .* 57\.4 KiB +63\.8 KiB", out)

    def test_explain_reads_nothing_but_the_config(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
        page = tmp_path / "page.html"
        argv = ["explain", str(tmp_path), "--experts", "batched_mm", "--json", "--html", str(page)]
        assert main(argv) == 0
        assert "mxfp4.matmul_ogs(" in page.read_text("utf-8")
        told = capsys.readouterr()
        assert "mxfp4_fx: capturing the model ...\nmxfp4_fx: ... done in " in told.err
        data = json.loads(told.out)
        assert [r["form"] for r in data["rewrites"]] == ["batched_mm", "batched_mm"]

    def test_explain_without_a_config_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", str(tmp_path)]) == 1
        assert "has no config.json" in capsys.readouterr().err

    def test_doctor_says_what_the_cpu_will_use(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert f"torch {torch.__version__}" in out
        assert f"cpu: cpu kernels, layout cpu_panels: {CPU.reason}" in out

    def test_checkpoint(self, tmp_path: Path) -> None:
        sizes = "--layers 1 --hidden 64 --intermediate 32 --experts 2 --experts-per-token 1"
        assert main(["checkpoint", str(tmp_path / "new"), *sizes.split()]) == 0
        assert (tmp_path / "new" / "config.json").exists()

    def test_a_fault_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["checkpoint", str(tmp_path / "new"), "--hidden", "48"]) == 1
        assert capsys.readouterr().err.startswith("error: hidden is 48: it must be a multiple of")
