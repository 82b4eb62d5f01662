"""An explanation as HTML: what it shows, that it needs nothing else, and that it escapes."""

from __future__ import annotations

import gc
import re
import weakref
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import Layers, hidden
from torch import fx

import mxfp4_fx
from mxfp4_fx.passes.listing import GraphChange, Line, Listing, list_graphs
from mxfp4_fx.passes.report import Attention, Miss, Rewrite

VOID = {"meta", "br"}


class Read(HTMLParser):
    """The elements of a document: (tag, class) -> texts. Fails if they are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: dict[tuple[str, str], list[str]] = {}
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))
            self.texts.setdefault(self.open[-1], []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            self.texts[element][-1] += data

    def all_of(self, tag: str, kind: str = "") -> list[str]:
        return self.texts.get((tag, kind), [])


@pytest.fixture(scope="module")
def explanation() -> mxfp4_fx.Explanation:
    """Of two layers, the second with another activation."""
    model = Layers()
    model.layers[1].experts._apply_gate = lambda gate_up: gate_up[..., ::2]
    with torch.no_grad():
        found = mxfp4_fx.explain(model, hidden())
    weight = weakref.ref(model.layers[0].experts.gate_up_proj)
    del model
    gc.collect()
    assert weight() is None, "the explanation keeps weights alive"
    return found


@pytest.fixture(scope="module")
def page(explanation: mxfp4_fx.Explanation, tmp_path_factory: pytest.TempPathFactory) -> Read:
    file = tmp_path_factory.mktemp("page") / "explained.html"
    explanation.save_html(file)
    return Read(file.read_text("utf-8"))


def test_layers_kernels_bytes_and_misses(explanation: mxfp4_fx.Explanation, page: Read) -> None:
    assert page.all_of("h1") == ["1 of 2 MoE layers rewritten, 1 graph"]
    (rewrite,), (miss,) = explanation.rewrites, explanation.misses
    cells = page.all_of("td")
    assert {"layers.0.experts", "grouped_mm", "6, top-3"} <= {*cells}
    assert f"{rewrite.kernels} ({rewrite.layout})" in cells
    assert page.all_of("td", "number") == ["432.0 KiB", "63.8 KiB"] * 2
    assert page.all_of("div", "card") == [miss.layer + miss.reason + miss.where]
    assert "[..., ::2]" in miss.where
    assert any(rewrite.reason in text for text in page.all_of("p", "soft"))


def test_the_graph_before_and_after(page: Read) -> None:
    gone, new = page.all_of("span", "gone"), page.all_of("span", "new")
    weight = "input layers.0.experts.gate_up_proj"
    assert f"{weight}  float32[6, 64, 192]" in gone
    assert any(line.startswith(f"{weight}_blocks  uint8[") for line in new)
    assert any(" = mxfp4.matmul_ogs(" in line for line in new)
    assert [line for line in gone if "grouped_mm_fallback(" in line]
    # The weights of the layer that stays are equal on both sides, and folded.
    assert not [line for line in (*gone, *new) if line.startswith("input layers.1")]
    assert any(line.startswith("input layers.1.experts.") for line in page.all_of("span"))
    assert any(
        line.startswith("# layers.0.experts  modeling_gpt_oss.py:") for line in page.all_of("em")
    )


def test_it_needs_nothing_else(explanation: mxfp4_fx.Explanation, page: Read) -> None:
    assert page.attributes <= {"class", "style", "open", "lang", "charset", "name", "content"}
    styles = "".join(page.all_of("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert not page.all_of("script")
    assert "prefers-color-scheme: dark" in styles


def test_a_notebook_keeps_its_own_look(explanation: mxfp4_fx.Explanation) -> None:
    read = Read(explanation._repr_html_())
    assert ("html", "") not in read.texts
    (style,) = read.all_of("style")
    selectors = re.findall(r"([^{}@]+)\{", re.sub(r"@media[^{]*\{", "", style))
    assert len(selectors) > 20
    assert all(".mxfp4-fx" in part for found in selectors for part in found.split(","))


def test_text_of_the_model_is_escaped() -> None:
    evil = "</pre><script>alert('x')</script>&amp;\""
    rewrite = Rewrite(
        evil, evil, 1, 1, 32, 32, 1.0, 1.0, evil, evil, evil, travel=evil, router=evil
    )
    change = GraphChange(
        (Listing(evil, (Line("a = 1"), Line(evil, evil, evil, evil))),),
        (Listing(evil, (Line("a = 1"), Line(evil + "b", evil, evil, evil))),),
    )
    made = mxfp4_fx.Explanation(
        graphs=1,
        rewrites=(rewrite,),
        misses=(Miss(evil, evil, evil),),
        notes=(evil,),
        attention=(Attention(evil),),
        attention_misses=(Miss(evil, evil, evil),),
        changes=(change,),
    )
    read = Read(made._repr_html_())
    assert not read.all_of("script")
    assert evil in read.all_of("td")
    assert read.all_of("div", "card") == [evil * 3, f"attention with sinks as it was: {evil * 3}"]
    assert f"{evil}b  {evil}" in read.all_of("span", "new")


def test_inputs_that_would_share_a_name_keep_their_own() -> None:
    graph = fx.Graph()
    names = ("l_self_modules_a_parameters_b_", "l_self_parameters_a_modules_b_", "l_self_x", "l_y")
    inputs = [graph.placeholder(name) for name in names]
    graph.output(graph.call_function(torch.add, (inputs[2], 1), {"alpha": 2}))
    (listing,) = list_graphs(fx.GraphModule(torch.nn.Module(), graph))
    assert [line.text for line in listing.lines] == [
        f"input {names[0]}",
        f"input {names[1]}",
        "input x",
        "input l_y",
        "add = add(x, 1, alpha=2)",
        "return add",
    ]


def test_a_region_is_shown_once_beside_what_it_was() -> None:
    """And a graph in which the passes change nothing says so."""
    body = Listing("body", (Line("x = 1"), Line("y = 2")))
    made = Listing("mxfp4_body_0", (Line("x = 1"), Line("z = 3")))
    outer = Listing("graph", (Line("call"),))
    same = GraphChange((outer,), (outer,))
    changes = (GraphChange((outer, body), (outer, made)), same)
    read = Read(mxfp4_fx.Explanation(2, (), (), changes=changes)._repr_html_())
    assert read.all_of("span", "gone") == ["y = 2"]
    assert read.all_of("span", "new") == ["z = 3"]
    summaries = read.all_of("summary")
    assert [text for text in summaries if text.startswith("region")] == [
        "region mxfp4_body_0 (2 lines before, 2 after)"
    ]
    assert read.all_of("p", "soft").count("The passes changed nothing in it.") == 1


def test_a_file_that_cannot_be_written(explanation: mxfp4_fx.Explanation, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no"):
        explanation.save_html(tmp_path / "no" / "page.html")
