"""``python -m benchmarks.quality`` at tiny sizes, its text, and the results in the repository."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from benchmarks import corpus, plot, quality, weight_error

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks/results/quality.json"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
RUNS = [("bfloat16", False)] + [
    (rule, runs) for rule in ("max", "search") for runs in (False, True)
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What a run prints, its JSON, and its checkpoint."""
    folder = tmp_path_factory.mktemp("quality")
    files = ["--output", str(folder / "made/quality.json"), "--checkpoint", str(folder / "kept")]
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        # A part of the text, for reading all source files takes seconds.
        patch.setattr(corpus, "documents", lambda: dict(topics))
        assert quality.main(["--tiny", "--inner", "eager", "--silent", *files]) == 0
    results = json.loads((folder / "made" / "quality.json").read_text("utf-8"))
    return out.getvalue(), results, folder / "kept"


@pytest.fixture
def results(finished: tuple[str, dict[str, Any], Path]) -> dict[str, Any]:
    return finished[1]


# --- the run


def test_judges_bfloat16_and_both_rules_uncompiled_and_compiled(results: dict[str, Any]) -> None:
    assert [(row["weights"], row["compiled"]) for row in results["models"]] == RUNS
    dense, *packed = (row["expert_bytes"] for row in results["models"])
    assert all(size * 64 == dense * 17 for size in packed)  # 4.25 bits of 16


def test_differences_are_those_of_the_perplexities(results: dict[str, Any]) -> None:
    perplexity = {(r["weights"], r["compiled"]): r["perplexity"] for r in results["models"]}
    pairs = [
        *((row["to_bfloat16"], (row["weights"], row["compiled"]), RUNS[0])
          for row in results["models"]),
        (results["search_to_max"], ("search", True), ("max", True)),
        *((apart, (rule, True), (rule, False))
          for rule, apart in results["compiled_to_uncompiled"].items()),
    ]  # fmt: skip
    for apart, of, to in pairs:
        # Both are near 256, where float64 has steps of 2^-45, and come by a few operations.
        assert abs(apart["perplexity"] - (perplexity[of] - perplexity[to])) < 2**-38
        assert (apart["standard_error"] > 0) == (of != to)


def test_linears_in_mxfp8_are_judged(finished: tuple[str, dict[str, Any], Path]) -> None:
    out, results, _ = finished
    found = results["linears_in_mxfp8"]
    perplexity = {(r["weights"], r["compiled"]): r["perplexity"] for r in results["models"]}
    for to, of in (("to_bfloat16", ("bfloat16", False)), ("to_max", ("max", True))):
        apart = found[to]["perplexity"] - (found["perplexity"] - perplexity[of])
        assert abs(apart) < 2**-38
        assert found[to]["standard_error"] > 0
    assert f"{found['perplexity']:.4f}" in out
    assert f"{found['to_max']['perplexity']:+.4f}" in out


def test_compiled_logits_are_within_the_bound(results: dict[str, Any]) -> None:
    assert results["logits"].keys() == {"max", "search"}
    for row in results["logits"].values():
        assert 0 < row["difference"] <= row["bound"]
        assert row["bytes_compared"] > 0


def test_the_searched_scales_move_weights_less(results: dict[str, Any]) -> None:
    assert "the trained experts" in results["weights"]
    for rules in results["weights"].values():
        error = {rule: measure["relative_squared_error"] for rule, measure in rules.items()}
        assert 0 < error["search"] < error["max"]
        assert math.isclose(rules["max"]["snr_db"], -10 * math.log10(error["max"]))


def test_prints_what_it_writes(finished: tuple[str, dict[str, Any], Path]) -> None:
    check_text(*finished[:2])


def test_the_table_of_the_stored_run_shows_its_figures() -> None:
    results = json.loads(STORED.read_text("utf-8"))
    check_text(quality.text(results), results)


def check_text(out: str, results: dict[str, Any]) -> None:
    def apart(difference: dict[str, float]) -> str:
        moved = re.escape(f"{difference['perplexity']:+.4f}")
        return f"{moved} +{difference['standard_error']:.4f}$"

    for row in results["models"]:
        runs = "compiled" if row["compiled"] else "uncompiled"
        figures = rf"{row['expert_bytes'] / 1024:.0f} +{row['perplexity']:.4f}"
        moved = f" +{apart(row['to_bfloat16'])}"
        assert re.search(f"{row['weights']} {runs} +{figures}{moved}", out, re.M)
    assert re.search(f"^search less max[ -]+{apart(results['search_to_max'])}", out, re.M)
    for rule, row in results["logits"].items():
        figures = f"{row['difference']:.4f} +{row['bound']:.4f} +{row['bytes_compared']}"
        assert re.search(rf"^{rule} +{figures}$", out, re.M)
    for rules in results["weights"].values():
        assert all(f"{error['snr_db']:.2f} dB" in out for error in rules.values())


def test_keeps_the_checkpoint_and_overwrites_none(
    finished: tuple[str, dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished[2]
    config = json.loads((kept / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["dtype"]) == ("gpt_oss", "bfloat16")
    with pytest.raises(SystemExit):
        quality.main(["--tiny", "--checkpoint", str(kept)])
    assert "exists already" in capsys.readouterr().err


@needs_matplotlib
def test_draws_the_stored_results(tmp_path: Path) -> None:
    results = json.loads(STORED.read_text("utf-8"))
    plot.draw(results, tmp_path / "quality.svg")
    drawn = (tmp_path / "quality.svg").read_text("utf-8")
    base = results["models"][0]["perplexity"]
    for row in results["models"]:
        runs = "compiled" if row["compiled"] else "uncompiled"
        text = f"{100 * row['to_bfloat16']['perplexity'] / base:+.2f} %"
        text = f"{base:.3f}" if row["weights"] == "bfloat16" else text
        assert f"<!-- {text}  {runs} -->" in drawn
    for rules in results["weights"].values():
        assert all(f"<!-- {error['snr_db']:.1f} -->" in drawn for error in rules.values())


# --- its parts


def test_a_difference_compares_window_by_window() -> None:
    reference = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    same_everywhere = quality.difference(reference + 0.25, reference)
    assert same_everywhere["nats"] == 0.25
    assert same_everywhere["nats_standard_error"] == same_everywhere["standard_error"] == 0
    assert math.isclose(same_everywhere["perplexity"], math.exp(3.25) - math.exp(3))

    apart = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=torch.float64)  # deviation sqrt(1/12)
    error = quality.difference(reference + apart, reference)["nats_standard_error"]
    assert math.isclose(error, math.sqrt(1 / 12) / math.sqrt(4))


def run_of(logits: list[float], experts: list[list[bool]]) -> quality.Run:
    """One window of a byte each, a vocabulary of one and one layer."""
    return quality.Run(
        torch.tensor(logits, dtype=torch.float64).view(1, -1, 1),
        torch.tensor(experts).view(1, len(logits), 1, -1),
    )


def test_a_difference_of_logits_beyond_the_bound_stops_it() -> None:
    served = [[True, False]] * 2
    exact, plain = run_of([1.0, 1.0], served), run_of([1.01, 1.01], served)
    with pytest.raises(SystemExit, match=r"differ by 0\.0900 .* rounding explains 0\.0339"):
        quality.check_agreement(exact, plain, run_of([1.0, 1.1], served))
    assert quality.check_agreement(exact, plain, run_of([1.0, 0.99], served))["bytes_compared"] == 2


@pytest.mark.parametrize("other", [[False, True], [False, False]], ids=["another expert", "tie"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_logits_are_compared_up_to_a_byte_that_other_experts_serve(
    which: int, other: list[bool]
) -> None:
    served = [[[True, False] for _ in range(4)] for _ in range(3)]
    served[which][2] = other
    runs = [run_of([1.0, 1.0, 9.0 * which, 9.0 * which], experts) for experts in served]
    assert quality.check_agreement(*runs)["bytes_compared"] == 2
    served[which][0] = other
    with pytest.raises(SystemExit, match="no logits to compare"):
        quality.check_agreement(*(run_of([1.0] * 4, experts) for experts in served))


def test_windows_predict_every_byte_once() -> None:
    text = {"a": "".join(map(chr, range(128)))}
    windows = quality.cut(text, quality.Settings(context=30, batch=2))
    assert windows.shape == (4, 31)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 121))


def test_laplace_samples_are_laplace() -> None:
    """The mean magnitude of a Laplace distribution is its standard deviation by sqrt(2)."""
    count = 1 << 16
    samples = weight_error.distributions(count)["Laplace"].double()
    # Of variance 2, the magnitudes have mean 1 and deviation 1, the squares deviation sqrt(20).
    assert abs(samples.abs().mean().item() - 1) < 5 / math.sqrt(count)
    assert abs(samples.square().mean().item() - 2) < 5 * math.sqrt(20 / count)


def test_weight_error_prints_both_rules_for_every_distribution(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert weight_error.main(["--samples", "1024"]) == 0
    out = capsys.readouterr().out
    for name in weight_error.distributions(32):
        for rule in ("max", "search"):
            assert re.search(rf"^{name} +{rule} +0\.0\d+ +\d\d\.\d\d dB$", out, re.MULTILINE)


# --- the text


def held_out(count: int) -> list[str]:
    names = (str(number) for number in range(1000))
    return [name for name in names if corpus._number(name) % corpus.HELD_OUT == 0][:count]


@pytest.mark.exhaustive
def test_of_all_text_no_document_and_no_paragraph_is_on_both_sides() -> None:
    documents = corpus.documents()
    assert "statistics.py" in documents
    assert "help/if" in documents
    found = corpus.split(documents)
    assert len(found.train) > 5 * len(found.validation) > 100
    check_apart(found)


def test_no_document_and_no_paragraph_is_on_both_sides() -> None:
    found = corpus.split(topics)
    assert len(found.train) > 5 * len(found.validation) >= 20
    check_apart(found)


def check_apart(found: corpus.Split) -> None:
    assert not found.train.keys() & found.validation.keys()
    paragraphs = [
        {corpus._normal(part) for text in texts.values() for part in corpus._paragraphs(text)}
        for texts in (found.train, found.validation)
    ]
    cut_off = {corpus._normal(t) for t in found.validation.values() if len(t) == corpus.LONGEST}
    assert not {p for p in paragraphs[0] & paragraphs[1] if not any(t.endswith(p) for t in cut_off)}


def test_what_a_held_out_document_quotes_is_left_out() -> None:
    first, second, third = held_out(3)
    quoted = "quoted\n   from elsewhere"
    texts = {
        "train": f"before\n\n{quoted}",
        first: f"its own\n\nquoted from elsewhere\n\n{'x' * 20000}",
        second: "quoted from\n elsewhere",
        third: "its own\n \nand more",
    }
    assert corpus._number("train") % corpus.HELD_OUT != 0
    found = corpus.split(texts)
    assert found.train == {"train": texts["train"]}
    assert found.validation.keys() == {first, third}
    assert found.validation[first].startswith("its own\n\nxxx")
    assert len(found.validation[first]) == corpus.LONGEST
    assert found.validation[third] == "and more"


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
    )
    assert corpus.docstrings(file) == "One.\n\nTwo.\n\nThree."
    file.write_text("no python at all")
    assert corpus.docstrings(file) == ""


# --- the results in the repository


def test_figures_of_the_documentation_are_those_of_a_run() -> None:
    results = json.loads(STORED.read_text("utf-8"))
    assert results["settings"] == asdict(quality.Settings())
    documentation = (ROOT / "docs/quality.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for row in results["models"]:
        rule, runs = row["weights"], "compiled" if row["compiled"] else "uncompiled"
        figures = f"{row['perplexity']:.4f} |"
        if rule != "bfloat16":
            apart = row["to_bfloat16"]
            figures += f" {apart['perplexity']:+.4f} ± {apart['standard_error']:.4f} |"
        assert f"| {rule} | {runs} | {figures}" in documentation
        if runs == "compiled":
            assert f'| MXFP4, `scale_rule="{rule}"`, compiled | {figures}' in readme
    for name, rules in results["weights"].items():
        decibels = " | ".join(f"{rules[rule]['snr_db']:.2f} dB" for rule in ("max", "search"))
        assert f"| {name} | {decibels} |" in documentation


def test_figures_of_linears_in_mxfp8_are_those_of_a_run() -> None:
    stored = ROOT / "benchmarks/results/quality-mxfp8.json"
    results = json.loads(stored.read_text("utf-8"))
    assert results["settings"] == asdict(quality.Settings(steps=600))
    documentation = (ROOT / "docs/quality.md").read_text("utf-8")
    base = results["models"][0]["perplexity"]
    (plain,) = (r for r in results["models"] if (r["weights"], r["compiled"]) == ("max", True))
    assert f"| bfloat16 | exact | {base:.4f} | | |" in documentation
    for linears, row in (("exact", plain), ("MXFP8", results["linears_in_mxfp8"])):
        apart = row["to_bfloat16"]
        figures = f"{apart['perplexity']:+.4f} ± {apart['standard_error']:.4f}"
        percent = f"{100 * apart['perplexity'] / base:+.2f} %"
        line = f"| max, compiled | {linears} | {row['perplexity']:.4f} | {figures} | {percent} |"
        assert line in documentation
    added = results["linears_in_mxfp8"]["to_max"]
    figures = f"{added['perplexity']:+.4f} ± {added['standard_error']:.4f}"
    assert f"exact linears: {figures}" in documentation
    assert figures in (ROOT / "README.md").read_text("utf-8")


def test_the_error_of_mxfp8_in_the_documentation_is_that_of_samples() -> None:
    found = weight_error.in_mxfp8(weight_error.distributions(1 << 18))
    documentation = (ROOT / "docs/quality.md").read_text("utf-8")
    for rules in found.values():
        error = rules["MXFP8"]
        assert f"{error['snr_db']:.1f} dB of all three" in documentation
        assert f"(error {error['relative_squared_error']:.4f})" in documentation
