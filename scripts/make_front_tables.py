"""Fills the tables of the front on the pages of docs/benchmarks from docs/front.csv, between two comments.

    <!-- from front.csv, wordnet docstrings: grid -->
    <!-- end of the figures -->

python -m scripts.make_front_tables      # or: make pages
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from experiments.figures import read_csv, write_grids, write_markdown
from experiments.front import read_lists
from experiments.points import Point

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "benchmarks" / "front.md", DOCS / "benchmarks" / "real-text.md")
END = "<!-- end of the figures -->"
FIGURES = re.compile(rf"(<!-- from front.csv, (?P<beds>[^:\n]+): (?P<what>\w+) -->\n).*?{END}", re.DOTALL)


def missing(points: Sequence[Point], testbeds: Sequence[str]) -> str:
    """How many entries of front.toml have no row, and which."""
    played = {(point.testbed, point.budget, point.variant) for point in points}
    lines = []
    for name in testbeds:
        _, budgets = read_lists(name)
        left = {
            budget: [variant.partition(":")[0] for variant in some if (name, budget, variant) not in played]
            for budget, some in budgets.items()
        }
        number, whole = sum(map(len, left.values())), sum(map(len, budgets.values()))
        told = "; ".join(f"{budget} {', '.join(some)}" for budget, some in left.items() if some)
        state = f"{number} of {whole} entries are still to be played: {told}" if number else f"all {whole} are played"
        lines.append(f"- {name}: {state}.\n")
    return "".join(lines)


def fill(text: str, points: Sequence[Point]) -> str:
    """A page with its figures made anew."""

    def put(found: re.Match[str]) -> str:
        testbeds = found["beds"].split()
        some = [point for point in points if point.testbed in testbeds]
        write = {"grid": write_grids, "rows": write_markdown, "missing": lambda some: missing(some, testbeds)}
        return f"{found[1]}\n{write[found['what']](some)}\n{END}"

    return FIGURES.sub(put, text)


def main() -> None:
    """Write the pages."""
    points = read_csv(DOCS / "front.csv")
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), points), encoding="utf-8")


if __name__ == "__main__":
    main()
