"""The docstrings testbed's data: signature → first line of the docstring, one client a library, read where installed.

Nothing of it is shipped. The libraries are those that fedloom itself needs, in the versions of constraints.txt, so that
the data are the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from experiments.jsonl import write_rows
from experiments.pretrain.text import signature
from fedloom.errors import DataError

LIBRARIES = (
    *("PIL", "accelerate", "click", "fontTools", "huggingface_hub", "jinja2", "matplotlib", "mpmath", "networkx"),
    *("numba", "numpy", "peft", "pydantic", "rich", "sympy", "torch", "transformers"),
)
TRAIN, VALIDATION, HELD_OUT = 600, 12, 24
"""Examples of a library, at most; a small one gives a tenth of what it has to each of the other two."""
LONGEST_SIGNATURE, LONGEST_LINE = 240, 160
SHORTEST_LINE = 12
"""Characters. A shorter line says nothing that could be learnt."""

Pair = tuple[str, str]


def pairs(folder: Path) -> Iterator[Pair]:
    """(signature, first line) of the documented functions and classes of a library, tests left out."""
    for path in sorted(folder.rglob("*.py")):
        if "test" in path.as_posix().removeprefix(folder.as_posix()):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            line = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            head = signature(node)
            if SHORTEST_LINE <= len(line) <= LONGEST_LINE and len(head) <= LONGEST_SIGNATURE:
                yield head, line


def write_data(target: Path) -> dict[str, int]:
    """Write <target>/data/<library>/{train,validation,heldout}.jsonl; returns examples of training by library.

    A line that several functions share is taken once, over all libraries. Raises DataError where one is not installed.
    """
    known: set[str] = set()
    counts = {}
    for library in LIBRARIES:
        spec = find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"library {library} is not installed: run make test once, it installs what is missing")
        found = []
        for head, line in pairs(Path(next(iter(spec.submodule_search_locations)))):
            if line not in known:
                known.add(line)
                found.append((head, line))
        found.sort(key=_chance)
        held, checked = min(HELD_OUT, len(found) // 10), min(VALIDATION, len(found) // 10)
        splits = {
            "heldout": found[:held],
            "validation": found[held : held + checked],
            "train": found[held + checked :][:TRAIN],
        }
        for split, those in splits.items():
            write_rows(target / "data" / library / f"{split}.jsonl", map(_row, those))
        counts[library] = len(splits["train"])
    return counts


def _chance(pair: Pair) -> bytes:
    """A number that stands for chance: the same for this pair everywhere and always."""
    return hashlib.blake2b(f"{pair[0]}|{pair[1]}".encode(), digest_size=8).digest()


def _row(pair: Pair) -> dict[str, str]:
    """The row of a data file."""
    head, line = pair
    return {"prompt": f'{head}\n    """', "completion": f'{line}"""'}
