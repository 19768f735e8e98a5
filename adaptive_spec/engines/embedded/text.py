"""Text that every Python installation contains, in two kinds: code and prose.

Code is the source of the standard library with docstrings removed; prose is its docstrings, the pydoc topics and the
licence. Both are bytes: the models are byte-level, so there is no tokenizer to ship.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("prose", "code")
SEPARATOR = b"\x00"
"""Byte between documents. It does not occur in the texts and is also the end-of-text token."""

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}
)
_MIN_DOCSTRING_BYTES = 120
_HELD_OUT_PERCENT = 4


@dataclass(frozen=True)
class Document:
    """One text of one kind; `held_out` documents are never trained on."""

    kind: str
    name: str
    text: bytes
    held_out: bool


def standard_library_documents() -> Iterator[Document]:
    """Yield every document of the running interpreter's standard library, in a fixed order.

    Which documents are held out depends only on their name, so it is the same on every machine.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if relative.as_posix() == "pydoc_data/topics.py":
            yield from _topics(source)
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        name = relative.as_posix()
        docstrings, code = _split(tree, source)
        yield _document("code", name, code)
        prose = "\n\n".join(docstrings)
        if len(prose) >= _MIN_DOCSTRING_BYTES:
            yield _document("prose", name, prose)
    licence = vars(builtins)["license"]  # put there by the site module at start-up
    licence._Printer__setup()
    yield _document("prose", "licence", "\n".join(licence._Printer__lines))


def _topics(source: str) -> Iterator[Document]:
    namespace = ast.literal_eval(ast.parse(source).body[0].value)  # type: ignore[attr-defined]
    for topic, text in sorted(namespace.items()):
        yield _document("prose", f"topic:{topic}", text)


def _split(tree: ast.Module, source: str) -> tuple[list[str], str]:
    """Return the longer docstrings, and the source without docstrings."""
    docstrings: list[str] = []
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None:
            continue
        expression = node.body[0]
        for number in range(expression.lineno - 1, expression.end_lineno or expression.lineno):
            lines[number] = ""
        cleaned = inspect.cleandoc(text)
        if len(cleaned) >= _MIN_DOCSTRING_BYTES:
            docstrings.append(cleaned)
    return docstrings, "".join(lines)


def _document(kind: str, name: str, text: str) -> Document:
    digest = hashlib.sha256(f"{kind}:{name}".encode()).digest()
    held_out = int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT
    return Document(kind, name, text.encode("utf-8", errors="replace").replace(SEPARATOR, b" "), held_out)
