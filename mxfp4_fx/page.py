"""An explanation as HTML: one piece that needs nothing else, for a file or for a notebook.

All text of a model (names, code) is escaped. There are no scripts and no external resources.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mxfp4_fx.core.console import size_in_words
from mxfp4_fx.core.version import __version__
from mxfp4_fx.passes.listing import GraphChange, Line, Listing

_Marked = tuple[Line, str]  # a line, and the class of its mark or ""
_CONTEXT = 3  # lines around a change that are shown with it
_LIGHT = {
    "text": "#1d2430",
    "soft": "#5b6675",
    "page": "#ffffff",
    "card": "#f5f7fa",
    "line": "#d9dee6",
    "good": "#0b6e4f",
    "bad": "#a8321d",
    "gone": "#fde8e4",
    "new": "#ddf3e8",
}
_DARK = {
    "text": "#e3e8ef",
    "soft": "#9aa6b5",
    "page": "#14181f",
    "card": "#1c222b",
    "line": "#333c49",
    "good": "#5fd3a6",
    "bad": "#ff9a85",
    "gone": "#43221d",
    "new": "#15382a",
}
# Every rule holds inside our own element, so that a notebook's page keeps its look.
_RULES = """
.mxfp4-fx { color: var(--text); background: var(--page); max-width: 110rem;
  font: 15px/1.5 system-ui, sans-serif; padding: 1rem 1.25rem; box-sizing: border-box; }
.mxfp4-fx h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
.mxfp4-fx h2 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; }
.mxfp4-fx p { margin: .25rem 0; }
.mxfp4-fx .soft { color: var(--soft); }
.mxfp4-fx .good { color: var(--good); }
.mxfp4-fx .bad { color: var(--bad); }
.mxfp4-fx .wide { overflow-x: auto; }
.mxfp4-fx table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.mxfp4-fx th, .mxfp4-fx td { text-align: left; padding: .3rem .9rem .3rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); background: none; color: inherit; }
.mxfp4-fx th { color: var(--soft); font-weight: 600; }
.mxfp4-fx td.number, .mxfp4-fx th.number { text-align: right; }
.mxfp4-fx tfoot td { font-weight: 600; border-bottom: 0; }
.mxfp4-fx .bar { display: inline-block; vertical-align: middle; width: 8rem; height: .5rem;
  background: var(--line); border-radius: .25rem; overflow: hidden; }
.mxfp4-fx .bar i { display: block; height: 100%; background: var(--good); }
.mxfp4-fx .card { background: var(--card); border-left: 3px solid var(--bad); margin: .5rem 0;
  padding: .5rem .75rem; overflow-wrap: anywhere; }
.mxfp4-fx code, .mxfp4-fx pre { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace;
  background: none; color: inherit; }
.mxfp4-fx details { margin: .25rem 0; }
.mxfp4-fx summary { cursor: pointer; padding: .2rem 0; }
.mxfp4-fx .pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1px;
  background: var(--line); border: 1px solid var(--line); }
.mxfp4-fx pre { margin: 0; padding: .3rem .5rem; overflow-x: auto; background: var(--page); }
.mxfp4-fx pre span { display: block; width: max-content; min-width: 100%; }
.mxfp4-fx pre .gone { background: var(--gone); }
.mxfp4-fx pre .new { background: var(--new); }
.mxfp4-fx pre em { color: var(--soft); font-style: normal; }
.mxfp4-fx .one { grid-template-columns: minmax(0, 1fr); }
@media (max-width: 60rem) { .mxfp4-fx .pair { grid-template-columns: minmax(0, 1fr); } }
"""


def fragment(found: Mapping[str, Any], changes: Sequence[GraphChange]) -> str:
    """Return an explanation as one HTML element with its style.

    Args:
        found: what ``Explanation.to_dict`` returns.
        changes: the graphs before and after the passes.
    """
    return "\n".join(
        ['<div class="mxfp4-fx">', f"<style>{_style()}</style>", *_body(found, changes), "</div>"]
    )


def page(found: Mapping[str, Any], changes: Sequence[GraphChange]) -> str:
    """Return the same as a whole HTML document, to be written in UTF-8."""
    background = f"html {{ background: {_LIGHT['page']}; }} body {{ margin: 0; }}"
    dark = f"@media (prefers-color-scheme: dark) {{ html {{ background: {_DARK['page']}; }} }}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>mxfp4_fx: {escape(_headline(found))}</title>
<style>{background}
{dark}</style>
</head>
<body>
{fragment(found, changes)}
</body>
</html>
"""


def _style() -> str:
    """Colors follow the system, and in a notebook the notebook's own theme."""
    light, dark = (
        " ".join(f"--{name}: {color};" for name, color in colors.items())
        for colors in (_LIGHT, _DARK)
    )
    return (
        f".mxfp4-fx {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ .mxfp4-fx {{ {dark} }} }}\n"
        f'[data-jp-theme-light="true"] .mxfp4-fx, .vscode-light .mxfp4-fx {{ {light} }}\n'
        f'[data-jp-theme-light="false"] .mxfp4-fx, .vscode-dark .mxfp4-fx {{ {dark} }}\n{_RULES}'
    )


def _headline(found: Mapping[str, Any]) -> str:
    rewritten, all_of = len(found["rewrites"]), len(found["rewrites"]) + len(found["misses"])
    graphs = "1 graph" if found["graphs"] == 1 else f"{found['graphs']} graphs"
    return f"{rewritten} of {all_of} MoE layers rewritten, {graphs}"


def _body(found: Mapping[str, Any], changes: Sequence[GraphChange]) -> Iterator[str]:
    rewrites, misses = found["rewrites"], found["misses"]
    yield f"<h1>{escape(_headline(found))}</h1>"
    yield f'<p class="soft">mxfp4_fx {__version__}: what <code>backend="mxfp4"</code> does</p>'
    if not rewrites and not misses:
        yield "<p>Nothing in it looks like GPT-OSS experts.</p>"
    if misses:
        yield f'<h2 class="bad">Not rewritten: {len(misses)}</h2>'
        yield from map(_miss, misses)
    if rewrites:
        yield "<h2>Layers in MXFP4</h2>"
        yield from _layers(found)
    around = "attention", "attention_misses", "linears", "mxfp8", "linear_misses"
    if any(found[name] for name in around):
        yield "<h2>Around the experts</h2>"
    if found["attention"]:
        yield (
            f"<p>{len(found['attention'])} attentions with sinks: "
            "memory linear in the prompt's length</p>"
        )
    if found["linears"]:
        yield f"<p>{found['linears']} linears: native while they have few rows</p>"
    if found["mxfp8"]:
        yield f"<p>{escape(in_mxfp8(found['mxfp8']))}</p>"
    for miss in found["linear_misses"]:
        yield _miss(miss, "not in MXFP8: ")
    for miss in found["attention_misses"]:
        yield _miss(miss, "attention with sinks as it was: ")
    if found["rounding_errors"]:
        yield "<h2>What rounding changed in the weights</h2>"
        errors = found["rounding_errors"].items()
        yield from (f"<p>{escape(experts)}: {error:.2%}</p>" for experts, error in errors)
    if found["notes"]:
        yield "<h2>Notes</h2>"
        yield from (f"<p>{escape(note)}</p>" for note in found["notes"])
    for at, change in enumerate(changes):
        number = f" {at + 1} of {len(changes)}" if len(changes) > 1 else ""
        yield f"<h2>Graph{number}, before and after the passes</h2>"
        yield from _change(change)


def in_mxfp8(linears: Sequence[Mapping[str, Any]]) -> str:
    """Return in words what linears that read MXFP8 save; each is a ``QuantizedLinear`` as data."""
    before, after = (
        size_in_words(sum(linear[f"bytes_{end}"] for linear in linears))
        for end in ("before", "after")
    )
    kernels = ", ".join(sorted({linear["kernels"] for linear in linears}))
    return f"{len(linears)} linears in MXFP8 ({kernels} kernels): {before} -> {after}"


def _miss(miss: Mapping[str, Any], what: str = "") -> str:
    where = f"<br><code>{escape(miss['where'])}</code>" if miss["where"] else ""
    layer, reason = escape(miss["layer"]), escape(miss["reason"])
    return f'<div class="card">{what}<strong>{layer}</strong><br>{reason}{where}</div>'


def _layers(found: Mapping[str, Any]) -> Iterator[str]:
    rewrites = found["rewrites"]
    names = ("layer", "form", "experts", "kernels (layout)")
    numbers = ("before", "after")
    yield '<div class="wide"><table><thead><tr>'
    yield "".join(f"<th>{name}</th>" for name in names)
    yield "".join(f'<th class="number">{name}</th>' for name in numbers) + "<th></th></tr></thead>"
    yield "<tbody>"
    for one in rewrites:
        cells = (
            one["layer"],
            one["form"],
            f"{one['experts']}, top-{one['top_k']}",
            f"{one['kernels']} ({one['layout']})",
        )
        yield _row(cells, one["bytes_before"], one["bytes_after"])
    yield "</tbody><tfoot>"
    yield _row(("total", "", "", ""), found["bytes_before"], found["bytes_after"])
    yield "</tfoot></table></div>"
    told = [f"{one['kernels']} ({one['layout']}): {one['reason']}" for one in rewrites]
    told += [one[key] for key in ("travel", "router") for one in rewrites if one[key]]
    yield from (f'<p class="soft">{escape(text)}</p>' for text in dict.fromkeys(told))


def _row(cells: Iterable[str], before: int, after: int) -> str:
    texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    sizes = "".join(f'<td class="number">{size_in_words(n)}</td>' for n in (before, after))
    part = after / before if before else 0.0
    bar = f'<span class="bar"><i style="width: {min(part, 1):.1%}"></i></span> {part:.0%}'
    return f"<tr>{texts}{sizes}<td>{bar}</td></tr>"


def _change(change: GraphChange) -> Iterator[str]:
    if change.after == change.before:
        yield '<p class="soft">The passes changed nothing in it.</p>'
    legend = '<span class="bad">red</span> has gone, <span class="good">green</span> is new'
    yield f'<p class="soft">{legend}; comments name the module and the line of code</p>'
    for listing in change.after:
        old = _partner(listing, change.before)
        name = "the graph" if listing is change.after[0] else f"region {listing.name}"
        counts = f"({len(old.lines)} lines before, {len(listing.lines)} after)"
        summary = f'{escape(name)} <span class="soft">{counts}</span>'
        yield f"<details open><summary>{summary}</summary>"
        yield from _pairs(old, listing)
        yield "</details>"


def _partner(listing: Listing, before: Sequence[Listing]) -> Listing:
    """Return the listing that another one was made from: that with the most lines in common."""
    texts = {line.text for line in listing.lines}
    return max(before, key=lambda old: sum(line.text in texts for line in old.lines))


def _pairs(old: Listing, new: Listing) -> Iterator[str]:
    """Yield both listings side by side; what is equal for long is folded."""
    a, b = old.lines, new.lines
    matcher = difflib.SequenceMatcher(
        None, [line.text for line in a], [line.text for line in b], autojunk=False
    )
    shown = 0  # lines of the new listing
    for group in (*matcher.get_grouped_opcodes(_CONTEXT), None):
        begin = group[0][3] if group else len(b)
        if begin > shown:
            equal = _code((line, "") for line in b[shown:begin])
            yield f"<details><summary>{begin - shown} equal lines</summary>"
            yield f'<div class="pair one">{equal}</div></details>'
        if group is None:
            return
        left: list[_Marked] = []
        right: list[_Marked] = []
        for kind, from_a, to_a, from_b, to_b in group:
            left += [(line, "" if kind == "equal" else "gone") for line in a[from_a:to_a]]
            right += [(line, "" if kind == "equal" else "new") for line in b[from_b:to_b]]
        yield f'<div class="pair">{_code(left)}{_code(right)}</div>'
        shown = group[-1][4]


def _code(lines: Iterable[_Marked]) -> str:
    shown, last = [], ""
    for line, kind in lines:
        comment = "  ".join(filter(None, (line.layer, line.where)))
        if comment and comment != last:
            shown.append(f"<span><em># {escape(comment)}</em></span>")
        last = comment
        value = f"  <em>{escape(line.value)}</em>" if line.value else ""
        mark = f' class="{kind}"' if kind else ""
        shown.append(f"<span{mark}>{escape(line.text)}{value}</span>")
    return f"<pre>{''.join(shown)}</pre>"
