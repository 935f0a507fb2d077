"""`python -m benchmarks page FILE …`: measure the tables of a page again, and write them into it.

A table that a command prints stands on the page between two comments, of which the first says the command:

    <!-- printed by: wan --preset llama-3.2-3b (8 min) -->
    <!-- end of what is printed -->

The table is replaced as soon as it is measured, so that an interruption loses nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trees import REPOSITORY
from fedloom.errors import ConfigError

END = "<!-- end of what is printed -->"
PRINTED = re.compile(
    rf"(?P<head><!-- printed by: (?P<words>[^\n]+?) \((?P<minutes>\d+) min\) -->\n).*?{END}", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Printed:
    """A table of a page: the words after `python -m benchmarks` that print it, and how long they take."""

    page: Path
    words: str
    minutes: int


def tables_of(pages: Sequence[Path], only: str = "") -> list[Printed]:
    """The tables of the pages in their order; only: those whose command begins with it.

    Raises ConfigError where there is none.
    """
    found = [
        Printed(page, it["words"], int(it["minutes"]))
        for page in pages
        for it in PRINTED.finditer(page.read_text(encoding="utf-8"))
        if it["words"].startswith(only)
    ]
    if not found:
        wanted = f"a table printed by {only!r}" if only else "a table between two comments: see benchmarks/page.py"
        raise ConfigError(f"{', '.join(map(str, pages)) or 'no page'}: expected {wanted}")
    return found


def write(table: Printed) -> None:
    """Measure it, and put it in its place. Raises ConfigError where the command fails."""
    words = [sys.executable, "-m", "benchmarks", "--markdown", *shlex.split(table.words)]
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"{table.page}: `python -m benchmarks {table.words}` fails; the page is as it was")
    place(table, done.stdout.strip())


def place(table: Printed, printed: str) -> None:
    """Put what was printed in the place of the table."""
    text = table.page.read_text(encoding="utf-8")

    def fill(found: re.Match[str]) -> str:
        return f"{found['head']}\n{printed}\n\n{END}" if found["words"] == table.words else found[0]

    table.page.write_text(PRINTED.sub(fill, text), encoding="utf-8")
