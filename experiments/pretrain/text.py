"""How a file of each kind becomes plain documents."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from xml.etree import ElementTree

QUOTES_WORDNET = "[WordNet"
"""GCIDE marks what it has from WordNet 1.5, whose glosses the testbed's clients hold."""
SHORTEST = 40
"""Characters of a document; what is shorter is a heading or a leftover."""


def dictionary(text: str) -> Iterator[str]:
    """Entries of a dictd database: a headword at the margin, its text indented below."""
    for entry in re.split(r"\n\n?(?=\S)", text):
        if QUOTES_WORDNET in entry:
            continue
        entry = re.sub(r"\[(1913 Webster|PJC|AS)[^\]]*\]|\\[^\\\n]*\\", "", entry)
        entry = re.sub(r"[{}]", "", entry)
        paragraphs = re.split(r"\n\s*\n", entry)
        yield "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


class _Words(HTMLParser):
    """The text of a page's paragraphs, headings, items and listings."""

    BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "pre", "td", "th", "div", "br"})
    HIDDEN = frozenset({"script", "style", "nav", "head"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html(text: str) -> Iterator[str]:
    """A page: one document."""
    words = _Words()
    words.feed(text)
    yield _lines("".join(words.parts))


def xml(text: str) -> Iterator[str]:
    """All text of an XML page: one document."""
    try:
        yield _lines("".join(ElementTree.fromstring(text).itertext()))
    except ElementTree.ParseError:
        return


def _lines(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def plain(text: str) -> Iterator[str]:
    """Text as it stands, without roles and rules of reStructuredText."""
    text = re.sub(r":[\w:+-]+:`~?([^`<]+)(?:\s<[^`]*>)?`", r"\1", text)
    text = re.sub(r"(?m)^([=\-~^\"*+#])\1{2,}\s*$\n?|^\.\. .*$\n?|^\s+:\w+:.*$\n?", "", text)
    yield re.sub(r"\n{3,}", "\n\n", text)


def pod(text: str) -> Iterator[str]:
    """Perl's documentation."""
    text = re.sub(r"(?m)^=\w+ ?", "", text)
    yield re.sub(r"\b[A-Z]<+ ?([^<>]*?) ?>+", r"\1", text)


def troff(text: str) -> Iterator[str]:
    """A man page."""
    text = re.sub(r'(?m)^[.\']\\".*$\n?', "", text)
    text = re.sub(r"(?m)^[.'](TH|de|\.|ie|el|if|nr|ds|ft|ta|in|ad|hy|nh|so).*$\n?", "", text)
    text = re.sub(r'(?m)^[.\'][A-Za-z]{1,2}\b ?|"(?=\s)|(?<=\s)"', "", text)
    text = text.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\\").replace(r"\&", "")
    text = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\s[-+]?\d|\\[|^]|\\\*\(?\w+|\\\((\w\w)", "", text)
    yield _lines(text)


def fortunes(text: str) -> Iterator[str]:
    """Sayings, divided by lines with a per cent sign."""
    yield from text.split("\n%\n")


def quoted(text: str) -> Iterator[str]:
    """What is said in a game's scenes: the strings marked for translation."""
    said = re.findall(r'_\s*"((?:[^"]|"")*)"', text)
    yield "\n".join(" ".join(line.split()) for line in said if len(line) > SHORTEST)


def docstrings(text: str) -> Iterator[str]:
    """Signatures with their docstrings, of every function and class of a Python file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            yield f'{signature(node)}\n    """{doc}"""'


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The line that a function or class begins with."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(map(ast.unparse, node.bases))}):"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


KINDS: Mapping[str, Callable[[str], Iterator[str]]] = {
    reader.__name__: reader for reader in (dictionary, html, xml, plain, pod, troff, fortunes, quoted, docstrings)
}
"""Name of a kind in sources.toml → what reads its text."""


def documents(kind: str, text: str) -> Iterator[str]:
    """The documents of one file, without those too short to say anything."""
    for document in KINDS[kind](text):
        if len(stripped := document.strip()) >= SHORTEST:
            yield stripped
