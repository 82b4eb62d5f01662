"""The examples run and show what they say; an example that no test names is a fault."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import default_load
import pytest

from mxfp4_fx.core.errors import InflatedExpertsWarning
from mxfp4_fx.passes.pipeline import PIPELINE

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"

HERE = {"default_load", "explain", "graph_passes"}
ELSEWHERE = {
    "compile_model": "test_demo.py",
    "expert_parallel": "test_expert_parallel.py",
    "export_model": "test_exported.py",
    "finetune_lora": "test_fine_tuning.py",
}

BLOCK, BYTES_PER_BLOCK = 32, 17  # MXFP4: 32 elements of four bits and a scale of eight


def run(name: str, *argv: str) -> str:
    """What an example prints."""
    assert name in HERE
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert importlib.import_module(f"examples.{name}").main(list(argv)) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def explained() -> str:
    return run("explain")


def test_every_example_has_a_test() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == HERE | ELSEWHERE.keys()
    for name, file in ELSEWHERE.items():
        assert name in (TESTS / file).read_text("utf-8"), f"{file} does not test {name}.py"


def test_explain_shows_rewrites_a_miss_and_data(explained: str) -> None:
    check_explained(explained, "grouped_mm")


@pytest.mark.exhaustive
def test_explain_shows_another_form() -> None:
    check_explained(run("explain", "--form", "batched_mm"), "batched_mm")


def check_explained(out: str, form: str) -> None:
    gpt_oss, other, data = re.split(r"^(?=The same|As data)", out, flags=re.MULTILINE)

    assert "2 of 2 MoE layers rewritten, 1 graph" in gpt_oss
    assert "not rewritten" not in gpt_oss
    assert "1 of 2 MoE layers rewritten, 1 graph" in other
    assert "not rewritten: model.layers.1.mlp.experts" in other

    report = json.loads(data.partition("\n")[2])
    (rewrite,), (miss,) = report["rewrites"], report["misses"]
    gate_up, down = 64 * 2 * 96, 96 * 64
    swizzled = gate_up + down // 3 * 4  # blocks go in pairs, and 96 columns are three of them
    assert (rewrite["layer"], rewrite["form"]) == ("model.layers.0.mlp.experts", form)
    assert rewrite["bytes_before"] == 8 * 2 * (gate_up + down)
    # One more byte for each 32 rows.
    assert rewrite["bytes_after"] == 8 * (swizzled // BLOCK * BYTES_PER_BLOCK + (192 + 64) // 32)
    assert miss["reason"]
    assert miss["reason"] in other


def test_explain_points_at_the_line_that_differs(explained: str) -> None:
    where = json.loads(explained.partition("to read:")[2])["misses"][0]["where"]
    file, line, code = where.split(":", 2)
    assert file == "explain.py"
    assert (EXAMPLES / file).read_text("utf-8").splitlines()[int(line) - 1].strip() == code.strip()


@pytest.mark.parametrize(
    ("argv", "matmul"),
    [((), "_grouped_mm("), (("--form", "batched_mm", "--dynamic"), "= bmm(")],
    ids=["grouped_mm", "batched_mm dynamic"],
)
def test_graph_passes_shows_the_way_of_a_graph(argv: tuple[str, ...], matmul: str) -> None:
    out = run("graph_passes", *argv)
    sections = dict(re.findall(r"^== (\w+)(.*?)(?=^== |\Z)", out, re.MULTILINE | re.DOTALL))
    assert list(sections) == ["captured", *(step.__name__ for step in PIPELINE)]

    assert sections["captured"].count(matmul) == 2
    assert ("input s" in sections["captured"]) == ("--dynamic" in argv)
    assert ".add_(" in sections["captured"]
    assert ".add_(" not in sections["canonicalize"]

    fused = sections["fuse_moe"]
    assert fused.count("= moe.default(") == 1
    assert matmul not in fused
    assert "+ input" not in fused

    lowered = sections["lower_moe"]
    assert "= moe.default(" not in lowered
    assert lowered.count("= routing.default(") == 1
    assert lowered.count("= matmul_ogs.default(") == 2
    for weight in ("gate_up_proj", "down_proj"):
        assert f"input experts_{weight}:" in fused
        assert f"input experts_{weight}:" not in lowered
        assert f"+ input experts_{weight}_blocks: uint8" in lowered
    assert "not rewritten" not in out


def test_a_default_load_as_on_a_gpu(tmp_path: Path) -> None:
    with default_load.on_a_gpu():
        out = run("default_load", "--checkpoint", str(tmp_path / "ck"), "--inner", "eager")
    assert "transformers loaded Mxfp4GptOssMLP with Mxfp4GptOssExperts" in out
    assert "2 of 2 MoE layers rewritten, 1 graph" in out
    assert out.count("transformers_mxfp4") == 2
    assert re.search(r"logits compiled and uncompiled differ by [0-9.]+% of the largest", out)


@pytest.mark.exhaustive
def test_a_default_load_on_a_cpu(tmp_path: Path) -> None:
    with pytest.warns(InflatedExpertsWarning):
        out = run("default_load", "--checkpoint", str(tmp_path / "ck"), "--inner", "eager")
    assert "transformers loaded GptOssMLP with GptOssExperts" in out
    assert "2 of 2 MoE layers rewritten, 1 graph" in out
