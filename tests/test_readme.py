"""README.md names all that there is to use, and the versions that it takes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from test_family_models import MODELS

import mxfp4_fx
from mxfp4_fx import errors
from mxfp4_fx.core.options import Options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def section(title: str) -> str:
    """From a heading to the next one of its level, or of a higher one."""
    marks, _ = title.split(" ", 1)
    begin = README.index(f"\n{title}\n") + len(title)
    end = re.search(rf"^#{{1,{len(marks)}}} ", README[begin:], re.MULTILINE)
    return README[begin : begin + end.start()] if end else README[begin:]


def rows(text: str) -> set[str]:
    """The names that begin the rows of tables."""
    return set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))


def test_all_public_names_errors_and_warnings_are_listed() -> None:
    classes = {name for name, found in vars(errors).items() if inspect.isclass(found)}
    names = set(mxfp4_fx.__all__) - {"Explanation"} | classes
    assert rows(section("## All names")) - {"mxfp4_fx"} == names | {"mxfp4"}
    assert "`Explanation`" in section("## All names")


def test_arguments_that_are_shown_are_those_of_the_functions() -> None:
    table = section("## All names")
    shown = re.findall(r"^\| `(\w+)\(([^`]*)\)` \|", table, re.MULTILINE)
    assert len(shown) > 4
    for name, arguments in shown:
        known: Any = inspect.signature(getattr(mxfp4_fx, name)).parameters
        for argument in re.findall(r"[a-z]\w+", arguments):
            assert argument in known, f"{name}({argument})"


def test_all_options_are_listed() -> None:
    names = {field.name for field in dataclasses.fields(Options)} - {"mode"}
    assert rows(section("### Options")) == names


@pytest.mark.parametrize("package", ["torch", "transformers", "triton"])
def test_versions_are_those_that_are_declared(package: str) -> None:
    before_the_first_example = README[: README.index("```")]
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    oldest = re.search(rf'"{package}>=([\d.]+)', declared)
    python = re.search(r'requires-python = ">=([\d.]+)"', declared)
    assert oldest
    assert python
    assert re.search(rf"{package} {re.escape(oldest[1])}\b", before_the_first_example, re.I)
    assert f"Python {python[1]}" in before_the_first_example
    tested = re.search(rf"^{package}==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert package == "triton" or (tested and f"{package} {tested[1]}" in before_the_first_example)


def test_links_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_families_are_those_that_are_run() -> None:
    (table,) = (part for part in section("### Families").split("\n\n") if "| experts |" in part)
    rows_of_models = [line.split("|")[2] for line in table.splitlines()[2:]]
    named = [name.strip() for row in rows_of_models for name in row.split(",")]
    assert sorted(named) == sorted(MODELS)
