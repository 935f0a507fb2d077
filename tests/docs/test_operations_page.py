"""Every message that an operator or a site's person can see stands on docs/operations.md, and none that is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedloom"
PAGE = ROOT / "docs" / "operations.md"
NOT_OPERATORS = {
    "catalogue",
    "embedding",
    "evaluate",
    "funnel",
    "inspect",
    "merge",
    "methods",
    "options",
    "preview",
    "studies",
}
"""Files of cli that read adapters or play studies: nobody needs them to run a federation."""
FOLDERS = (
    "noise/secret.py",
    "records/lock.py",
    "report/standing.py",
    "workspace/folder.py",
    "workspace/occupied.py",
    "workspace/resumption.py",
)
"""What says whether a run's folder, or a key in it or at a site, can be used."""
ROOMS = [
    path
    for pattern in ("flower/**/*.py", "site/*.py", "server/*.py", "deploy/*.py", "cli/*.py", *FOLDERS)
    for path in sorted(SOURCE.glob(pattern))
    if not (path.parent.name == "cli" and path.stem in NOT_OPERATORS)
]
LOGGED = {"note", "warning", "error", "exception"}
CHECKED = {"fail", "warn"}
"""What makes a line of the doctor: name, what was found, what to do."""
EXPLAIN = {"flower"}
"""Rooms whose functions give back reasons."""
ELSEWHERE = {
    "cli/main.py: … exists already; give another name: fedloom init other.toml",  # `fedloom init`, no federation
}
"""Messages of no federation."""


def words(node: ast.expr) -> str:
    """What an expression says, with … for what is not constant, as pages have it; "" where nothing is."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[rsd]|%\.?\d*f", "…", node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = words(node.left), words(node.right)
        return (left or "…") + (right or "…") if left or right else ""
    return ""


def name_of(call: ast.Call) -> str:
    function = call.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def choices(node: ast.expr) -> list[ast.expr]:
    """Both sides of a condition."""
    return [*choices(node.body), *choices(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def texts(tree: ast.Module, explains: bool) -> Iterator[str]:
    """What is raised, noted, logged, told as an error or found by a check; and sentences that functions give back where
    they explain."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found = [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
        elif isinstance(node, ast.Call) and (name_of(node) in LOGGED or name_of(node).endswith(("Error", "Refusal"))):
            found = node.args
        elif isinstance(node, ast.Call) and name_of(node) in CHECKED:
            found = node.args[1:2]
        elif isinstance(node, ast.Call) and name_of(node) == "error_parcel":
            found = node.args
        elif isinstance(node, ast.Dict):
            found = [value for key, value in zip(node.keys, node.values, strict=True) if key and words(key) == "error"]
        elif isinstance(node, ast.Return) and node.value is not None and explains:
            found = [node.value]
        for one in found:
            yield from (words(choice) for choice in choices(one))


def messages() -> dict[str, str]:
    """Message → a file that has it. A message has three words of its own at least: the rest are names and wholes."""
    found: dict[str, str] = {}
    for path in ROOMS:
        explains = path.parent.name in EXPLAIN
        for text in texts(ast.parse(path.read_text(encoding="utf-8")), explains):
            plain = " ".join(text.replace("`", "").split())
            if len(re.findall(r"[\w'-]+", plain)) > 2 and f"{path.relative_to(SOURCE)}: {plain}" not in ELSEWHERE:
                found.setdefault(plain, str(path.relative_to(SOURCE)))
    return found


def entries() -> list[str]:
    """The first cells of the page's tables of messages."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def matches(entry: str, message: str) -> bool:
    """Whether an entry stands for a message: … is anything."""
    return re.fullmatch(".*?".join(re.escape(part) for part in entry.split("…")), message) is not None


def own_words(entry: str) -> int:
    return len(re.findall(r"\w+", entry.replace("…", " ")))


def test_every_message_is_on_the_page():
    known = [entry for entry in entries() if own_words(entry) > 1]
    missing = [
        f"{path}: {text}" for text, path in messages().items() if not any(matches(entry, text) for entry in known)
    ]
    assert not missing, "\n".join(missing)


def test_every_row_says_what_it_means_and_what_to_do():
    rows = re.findall(r"^\| `[^`]+` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 100
    assert all(cell.strip() for row in rows for cell in row.split(" | "))
    assert len(entries()) == len(set(entries())), "an entry stands there once"


def test_no_entry_is_about_a_message_that_is_gone():
    """Its longest piece stands in the code of these rooms."""
    code = "".join(
        " ".join(words(node).replace("`", "").split()) + "\n"
        for path in ROOMS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
    )
    gone = [entry for entry in entries() if max(entry.split("…"), key=len).strip(" :;.,()") not in code]
    assert not gone, "\n".join(gone)


def test_a_message_that_is_new_would_be_missed():
    assert not any(
        matches(entry, "the moon is in the way: wait a month") for entry in entries() if own_words(entry) > 1
    )
