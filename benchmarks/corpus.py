"""Text to train and judge a language model on that is there wherever Python is.

The documents are the topics of Python's own help (``pydoc_data.topics``) and the docstrings of the
standard library, a document for each module. The text differs a little between versions of Python.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 10  # one document in this many is for validation
LONGEST = 16384  # characters of a held-out document, so that none outweighs the others
NOT_READ = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idlelib", "lib2to3"}
SEPARATOR = "\0"  # between documents


@dataclass(frozen=True)
class Split:
    """Training and validation documents, name -> text."""

    train: dict[str, str]
    validation: dict[str, str]


def documents() -> dict[str, str]:
    """Name -> text of all documents, in the order of their names."""
    found = {f"help/{name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for file in library.rglob("*.py"):
        name = file.relative_to(library)
        if not NOT_READ.intersection(name.parts) and (text := docstrings(file)):
            found[name.as_posix()] = text
    return dict(sorted(found.items()))


def docstrings(file: Path) -> str:
    """All docstrings of a source file in their order; empty if it has none or cannot be read."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def split(texts: Mapping[str, str]) -> Split:
    """Whole documents are held out, by a hash of their names.

    Some documents quote others. A paragraph of a held-out one that is in a training one as well,
    white space aside, or that came before, is left out, as is a document of which nothing is left.
    What is held out is cut at ``LONGEST``.
    """
    held_out = {name: text for name, text in texts.items() if _number(name) % HELD_OUT == 0}
    train = {name: text for name, text in texts.items() if name not in held_out}
    seen = {_normal(paragraph) for text in train.values() for paragraph in _paragraphs(text)}
    validation = {}
    for name, text in held_out.items():
        new = []
        for paragraph in _paragraphs(text):
            if (normal := _normal(paragraph)) not in seen:
                seen.add(normal)
                new.append(paragraph)
        if new:
            validation[name] = "\n\n".join(new)[:LONGEST]
    return Split(train, validation)


def as_bytes(texts: Iterable[str]) -> bytes:
    """The documents one after the other in UTF-8; a token is a byte."""
    return SEPARATOR.join(texts).encode()


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())
