"""The turns of ``python -m benchmarks.full_size``: sums, tables, and a run at toy sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    end_to_end,
    full_size,
    full_size_turns,
    full_size_turns_report,
    llama_cpp,
    measured_process,
    model_bytes,
    plot,
)
from benchmarks.contenders import Unavailable
from benchmarks.full_size_turns import OURS, OURS_MXFP8, UNCOMPILED, WAYS, cells_of
from benchmarks.moe import relative_error
from benchmarks.token_parts import ATTENTION, EXPERTS, HEAD, LINEARS, PARTS, REST, TOKEN, parts_of
from mxfp4_fx.checkpoints.random_weights import write_random_checkpoint

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks/results/full-size-turns-epyc-2-threads.json"
TURNS = "--only turns --turns 2 --prefill 4,6 --contexts 5,20 --batches 1,2 --decode-tokens 2"
TOY = f"--tiny --layers 1 --vocab 512 --inner eager --probe-mib 8 --silent {TURNS}"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turns") / "checkpoint"
    shape = dataclasses.replace(end_to_end.TINY, layers=2, vocab=512)
    return write_random_checkpoint(path, shape, progress=False)


def arguments(*more: str) -> Any:
    return full_size.parse([*TOY.split(), *more])


# ---- the parts of a token


def an_event(name: str, start: float, length: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=start + length))


def events(*named: tuple[str, float]) -> list[Any]:
    """One event after another, each with its microseconds, in a token; a space is no event."""
    at, made = 1000.0, []
    for name, length in named:
        made.append(an_event(name, at, length))
        at += length
    return [an_event(TOKEN, 1000.0, at - 1000.0), *(each for each in made if each.name != " ")]


LAYER = (
    *((" ", 1), ("mxfp4::linears", 2), ("aten::cat", 4), ("mxfp4::linears", 8), (" ", 16)),
    *(("mxfp4::linears", 32), (" ", 64), ("aten::addmm", 128), ("mxfp4::routing", 256)),
    ("mxfp4::matmul_ogs", 512),
)
LAYER_PARTS = {LINEARS: 2 + 8 + 32, ATTENTION: 4 + 16, EXPERTS: 128 + 256 + 512, HEAD: 0, REST: 65}


def test_a_layer_is_cut_at_its_projections() -> None:
    assert parts_of(events(*LAYER), 1) == pytest.approx(
        {part: 1e-6 * microseconds for part, microseconds in LAYER_PARTS.items()}
    )


def test_what_comes_behind_the_last_experts_is_the_head_and_layers_add_up() -> None:
    found = parts_of(events(*LAYER, *LAYER, (" ", 1024), ("mxfp4::linears", 2048)), 1)
    assert found[HEAD] == pytest.approx(2048e-6)
    assert found[REST] == pytest.approx((2 * 65 + 1024) * 1e-6)
    for part in (LINEARS, ATTENTION, EXPERTS):
        assert found[part] == pytest.approx(2e-6 * LAYER_PARTS[part])


def test_an_attention_op_is_counted_once() -> None:
    layer = list(LAYER)
    layer[4:5] = [(" ", 3), ("mxfp4::attention", 10), (" ", 3)]
    assert parts_of(events(*layer), 1)[ATTENTION] == pytest.approx(20e-6)


def test_an_op_inside_another_is_counted_once() -> None:
    inside = an_event("aten::addmm", 1001, 1)
    found = parts_of([*events(("aten::linear", 4)), inside], 1)
    assert found == pytest.approx({**dict.fromkeys(PARTS, 0), HEAD: 4e-6})


def test_parts_are_of_the_token_that_took_the_median() -> None:
    tokens: list[Any] = []
    for number, length in enumerate((4, 900, 2)):
        shifted = events(("aten::linear", length), (" ", 1))
        for event in shifted:
            event.time_range.start += 5000 * number
            event.time_range.end += 5000 * number
        tokens += shifted
    found = parts_of(tokens, 3)
    assert found == pytest.approx({**dict.fromkeys(PARTS, 0), HEAD: 4e-6, REST: 1e-6})


def test_a_profile_of_other_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 tokens were decoded, 1 are in the profile"):
        parts_of(events(*LAYER), 2)


# ---- bytes


def test_bytes_of_parts_are_all_that_a_token_reads(checkpoint: Path) -> None:
    config = full_size.read_config(checkpoint)
    found, sizes = model_bytes.of_parts(config), model_bytes.of_model(config)
    assert sum(found.values()) == sizes["per_token"]
    assert found[HEAD] == 2 * 512 * 64
    assert found[EXPERTS] == sizes["per_token_experts"] + 2 * 2 * (8 * 64 + 8)
    assert found[LINEARS] == 2 * 2 * (64 * (64 + 2 * 32) + 64 + 2 * 32 + 64 * 64 + 64)
    assert found[ATTENTION] == 2 * 2 * 4


def test_a_sliding_layer_reads_its_window(checkpoint: Path) -> None:
    config = full_size.read_config(checkpoint) | {"sliding_window": 128}
    row = 2 * 2 * 2 * 16  # bytes of a token's keys and values
    assert model_bytes.of_cache(config, 100) == (100 + 100) * row
    assert model_bytes.of_cache(config, 4096) == (128 + 4096) * row


# ---- what is measured


def test_long_prompts_are_measured_once_and_few_of_them_uncompiled() -> None:
    more = ["--prefill", "1,2,3,4", "--most-each-round", "3", "--most-uncompiled", "2"]
    args = arguments(*more)

    def prompts(way: str, first: bool) -> list[int]:
        return [cell[1] for cell in cells_of(way, args, first=first) if cell[0] == "prefill"]

    assert prompts(OURS, True) == [1, 1, 2, 3, 4]
    assert prompts(OURS, False) == [1, 1, 2, 3]
    assert prompts(UNCOMPILED, True) == [1, 1, 2]
    assert cells_of(UNCOMPILED, args, first=False) == []


def test_all_contexts_and_batches_are_decoded_and_ours_is_watched() -> None:
    def others(way: str) -> list[Any]:
        return [c for c in cells_of(way, arguments(), first=True) if c[0] != "prefill"]

    decoded = [("decode", context, batch, 2) for batch in (1, 2) for context in (5, 20)]
    assert others("llama-bf16") == decoded
    assert others(OURS) == [*decoded, ("parts", 5, 2), ("parts", 20, 2)]


def test_an_unknown_way_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        full_size.main(["--ways", "ours,theirs"])
    assert f"--ways: theirs is none of {', '.join(WAYS)}" in capsys.readouterr().err


# ---- what the runs amount to


def a_phase(name: str, *seconds: float, **facts: Any) -> dict[str, Any]:
    return {"phase": name, "token_seconds": list(seconds), **facts}


def some_turns() -> dict[str, Any]:
    parts = dict.fromkeys(PARTS, 0.25)
    ours = [
        a_phase("load"),
        *(a_phase("prefill 4", 9.0), a_phase("prefill 4", 1.0), a_phase("decode 5 2 3", 1, 2, 7)),
        a_phase("parts 5 3", 0.5, parts=parts),
    ]
    again = [a_phase("prefill 4", 2.0)]
    theirs = [a_phase("prefill 4", 4.0), a_phase("decode 5 2 3", 8.0)]
    runs = [(OURS, 0, ours), ("llama-bf16", 0, theirs), (OURS, 1, again), ("llama-bf16", 1, again)]
    told = [
        {"way": way, "round": turn, "phases": phases, "failed": None, "read_rates": [1e9, 3e9]}
        for way, turn, phases in runs
    ]
    told[-1]["failed"] = "SomeError: no room"
    turns = {
        "settings": {"prefill": [4, 99], "contexts": [5], "batches": [1, 2], "turns": 2}
        | {"most_each_round": 50},
        "bytes": {"parts": dict.fromkeys(PARTS, 500_000_000), "cache": {"5": 1_000_000_000}},
        "unavailable": {"vllm": "no AMX"},
        "runs": told,
    }
    return {**turns, "summary": full_size_turns_report.summarize(turns)}


def test_the_last_of_a_name_counts_and_a_token_takes_the_median() -> None:
    rates = some_turns()["summary"]["tokens_per_second"]
    assert rates[OURS]["prefill 4"]["samples"] == [4 / 1.0, 4 / 2.0]
    assert rates[OURS]["decode 5 x 2"]["samples"] == [2 / 2]


def test_ratios_are_of_the_same_round() -> None:
    ratios = some_turns()["summary"]["ours_over"]
    assert ratios == {"llama-bf16": ratios["llama-bf16"]}
    assert ratios["llama-bf16"]["prefill 4"]["samples"] == [4.0, 1.0]
    assert ratios["llama-bf16"]["decode 5 x 2"]["samples"] == [4.0]


def test_the_tables_show_rates_parts_and_what_is_missing() -> None:
    out = full_size_turns_report.text(some_turns())
    lines = {line.split("  ")[0]: line.split("  ")[1:] for line in out.splitlines()}

    def cells(name: str) -> list[str]:
        return [cell.strip() for cell in lines[name] if cell.strip()]

    assert cells("mxfp4_fx.compile") == ["3", "-", "-", "1"]
    assert cells("times as fast as llama.cpp, bf16") == ["2.5", "-", "-", "4"]
    assert cells("attention") == ["250.00", "1.500", "750.00", "6.0"]
    assert cells("token") == ["1250.00", "3.500", "1750.00", "2.8"]
    assert "(prompts of 99: of one); memory was read at 2.0 (1.0 to 3.0) GB/s" in out
    assert "cannot be had: vLLM: no AMX" in out
    assert "failed: round 2, llama.cpp, bf16, behind ['prefill 4']: SomeError: no room" in out


def test_the_picture_has_every_part_and_way(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = {"cpu": "some", "threads": 2, "torch": "some"}
    results = {"machine": facts, "settings": {"layers": 2, "vocab": 512}, "turns": some_turns()}
    plot.draw(results, tmp_path / "turns.svg")
    drawn = (tmp_path / "turns.svg").read_text("utf-8")
    labels = ("ms of a token behind 5", *PARTS, "decode 5 x 2", "llama.cpp, bf16")
    for label in labels:
        assert f"<!-- {label} -->" in drawn


# ---- peers


def test_a_peer_that_is_not_built_is_named_with_its_reason(tmp_path: Path) -> None:
    args = arguments("--llama", str(tmp_path / "llama"))
    with pytest.raises(Unavailable, match=r"it is not built in llama: python -m benchmarks\.llama"):
        full_size_turns.prepare("llama-bf16", args, tmp_path, tmp_path, lambda _: None)


def test_a_converted_model_is_another_ones_if_the_weights_are(
    checkpoint: Path, tmp_path: Path
) -> None:
    shape = dataclasses.replace(end_to_end.TINY, layers=2, vocab=512)
    again = write_random_checkpoint(tmp_path / "again", shape, progress=False)
    other = write_random_checkpoint(tmp_path / "other", shape, seed=1, progress=False)
    digests = [llama_cpp._digest(path) for path in (checkpoint, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_context_is_kept_for_so_many_sequences(tmp_path: Path) -> None:
    assert llama_cpp.order(("prefill", 8), tmp_path) == "prefill:8"
    order = llama_cpp.order(("decode", 128, 8, 16), tmp_path / "bf16")
    assert order == f"decode:128:8:16:{tmp_path}/bf16-128-8.state"


def test_llama_cpp_computes_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    """Its activations are int8, in blocks of 32: each product may be off by 1/254 of a block's
    largest activation, which is at most as many times the root of their mean square as 32 has
    roots. Weights that are Q8_0 are off as much.
    """
    if "MXFP4_FX_LLAMA" not in os.environ:
        pytest.skip("needs a folder of benchmarks.llama_cpp (MXFP4_FX_LLAMA names it)")
    from transformers import AutoModelForCausalLM

    folder, ids, count = Path(os.environ["MXFP4_FX_LLAMA"]), tmp_path / "ids", 24
    tokens = np.random.default_rng(0).integers(512, size=count, dtype=np.int32)
    tokens.tofile(ids)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()[None]).logits[0, -1].double()
    for kind in llama_cpp.KINDS:
        path, gguf = tmp_path / kind, llama_cpp.model(folder, checkpoint, kind, lambda _: None)
        orders = [f"logits:{count}:{path}", "prefill:8", f"decode:8:2:2:{tmp_path}/{kind}.state"]
        phases = measured_process.run(
            kind,
            {"threads": 2, "checkpoint": str(gguf)},
            22 << 30,
            lambda _: None,
            lambda pipe, gguf=gguf, orders=orders: llama_cpp.driver_command(
                folder, pipe, gguf, ids, measured_process.choose_cores(2), orders
            ),
        )
        assert [phase["phase"] for phase in phases] == [
            "import",
            "load",
            "prefill 8",
            "decode 8 2 2",
        ]
        assert [len(phase["token_seconds"]) for phase in phases] == [0, 0, 1, 2]
        logits = torch.from_numpy(np.fromfile(path, np.float32)).double()
        roundings = 2 * (2 if kind == "bf16" else 4)  # layers; attention and experts of each
        assert relative_error(logits, expected) < roundings * 32**0.5 / 254


@pytest.mark.parametrize(
    ("name", "compile", "linears"),
    [(OURS, True, True), (OURS_MXFP8, True, "mxfp8"), (UNCOMPILED, False, True)],
)
def test_the_options_of_our_own_ways(
    tmp_path: Path, name: str, compile: bool, linears: bool | str
) -> None:
    args = arguments()
    way = full_size_turns.prepare(name, args, tmp_path, tmp_path, lambda _: None)
    assert (way.settings["compile"], way.settings["linears"]) == (compile, linears)


# ---- a run


@pytest.mark.exhaustive
def test_a_run_measures_in_turn_and_says_what_it_has_not(tmp_path: Path) -> None:
    path = tmp_path / "turns.json"
    files = ["--checkpoint", str(tmp_path / "checkpoint"), "--output", str(path)]
    argv = [*TOY.split(), *files, "--llama", str(tmp_path), "--ways", "ours,uncompiled,llama-q8_0"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert full_size.main(argv) == 0
    results = json.loads(path.read_text("utf-8"))
    turns = results["turns"]
    assert "runs" not in results
    assert turns["summary"] == full_size_turns_report.summarize(turns)
    assert turns["unavailable"].keys() == {"llama-q8_0"}
    assert [told["failed"] for told in turns["runs"]] == 3 * [None]
    made = sorted((told["round"], told["way"]) for told in turns["runs"])
    assert made == [(0, OURS), (0, UNCOMPILED), (1, OURS)]
    for told in turns["runs"]:
        cells = [p["phase"] for p in told["phases"] if p["phase"] not in ("import", "load")]
        expected = cells_of(told["way"], arguments(), first=told["round"] == 0)
        assert cells == [" ".join(map(str, cell)) for cell in expected]
        assert not any(p.get("compiled") for p in told["phases"])
        for phase in told["phases"]:
            if "parts" in phase:
                assert phase["parts"].keys() == set(PARTS)
                assert all(seconds > 0 for seconds in phase["parts"].values())
    assert "cannot be had: llama.cpp, Q8_0: it is not built" in out.getvalue()
    for text in (out.getvalue(), path.read_text("utf-8")):
        assert str(ROOT) not in text
        assert str(tmp_path) not in text


def test_a_process_that_fails_keeps_what_it_told_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    told = [a_phase("prefill 4", 1.0)]

    def run(name: str, *_: Any) -> list[dict[str, Any]]:
        if "uncompiled" in name:
            message = f"{name}: the process failed:\nSomeError: no /some/file\nlast line"
            raise measured_process.ProcessFailed(message, told)
        return told

    monkeypatch.setattr(full_size_turns, "run", run)
    args = arguments("--checkpoint", str(checkpoint), "--ways", "ours,uncompiled")
    results: dict[str, Any] = {}
    config = full_size.read_config(checkpoint)
    full_size_turns.measure(args, config, tmp_path, results, lambda _: None)
    runs = results["turns"]["runs"]
    assert [run["phases"] for run in runs] == 3 * [told]
    failed = {UNCOMPILED: "SomeError: no file", OURS: None}
    assert [run["failed"] for run in runs] == [failed[run["way"]] for run in runs]


def test_none_of_the_ways_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    args = arguments("--checkpoint", str(checkpoint), "--ways", "llama-bf16", "--llama", "none")
    config = full_size.read_config(checkpoint)
    with pytest.raises(SystemExit, match="none of the ways can be had"):
        full_size_turns.measure(args, config, tmp_path, {}, lambda _: None)


def test_figures_of_the_readme_are_those_of_a_run() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"]({STORED.relative_to(ROOT)})" in readme
    found = json.loads(STORED.read_text("utf-8"))["turns"]["summary"]
    for way, title in (
        ("ours", "`mxfp4_fx.compile`"),
        ("llama-bf16", "llama.cpp, bf16"),
        ("llama-q8_0", "llama.cpp, Q8_0"),
    ):
        rates = found["tokens_per_second"][way]
        first, second, decode = (rates[cell]["median"] for cell in rates)
        assert f"| {title} | {first:.1f} | {second:.1f} | {decode:.2f} |" in readme
    parts = {part: each["median"] for part, each in found["parts"]["128"].items()}
    weights = sum(parts[part] for part in (EXPERTS, LINEARS, HEAD))
    assert f"of a token's {1e3 * parts['token']:.0f} ms, {1e3 * weights:.0f} read" in readme


@pytest.mark.parametrize(("title", "machine"), [("AVX2", "zen3"), ("Zen 5", "zen5")])
def test_the_readme_has_the_ratios_of_six_layers(title: str, machine: str) -> None:
    file = f"benchmarks/results/full-size-turns-6-layers-epyc-{machine}-2-threads.json"
    ratios = json.loads((ROOT / file).read_text("utf-8"))["turns"]["summary"]["ours_over"]
    readme = (ROOT / "README.md").read_text("utf-8")
    _, _, *rows = readme[readme.index(f"| times as fast, {title} |") :].splitlines()[:4]
    cells = ["prefill 32", "prefill 128", "prefill 512", "decode 128 x 1", "decode 128 x 8"]
    for row, way in zip(rows, ("llama-bf16", "llama-q8_0"), strict=True):
        shown = [float(cell) for cell in row.strip(" |").split("|")[1:]]
        assert shown == [round(ratios[way][cell]["median"], 2) for cell in cells]


def test_the_readme_has_the_ratios_with_linears_in_mxfp8() -> None:
    file = ROOT / "benchmarks/results/full-size-turns-6-layers-epyc-zen5-2-threads.json"
    rates = json.loads(file.read_text("utf-8"))["turns"]["summary"]["tokens_per_second"]
    ratios = [
        rates["ours-mxfp8"][cell]["median"] / rates["llama-q8_0"][cell]["median"]
        for cell in rates["ours"]
    ]
    row = " | ".join(str(round(ratio, 2)) for ratio in ratios)
    readme = (ROOT / "README.md").read_text("utf-8")
    title = "with [linears in MXFP8](#linears-in-mxfp8), as llama.cpp, Q8_0"
    assert f"| {title} | {row} |" in readme
