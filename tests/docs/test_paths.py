"""Files and folders that the documentation names are there."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
HISTORY = {"LOG.md", "CHANGELOG.md"}
"""Pages that speak of how things were."""
PAGES = sorted(
    path.relative_to(REPO).as_posix()
    for path in [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")]
    if path.name not in HISTORY
)
NAMED = re.compile(r"`((?:src|tests|docs|scripts|benchmarks|experiments|fedloom)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page):
    text = (REPO / page).read_text(encoding="utf-8")
    for name in NAMED.findall(text):
        path = REPO / ("src" if name.startswith("fedloom/") else "") / name
        assert path.exists(), f"{page} names {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if "/" not in page])
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    """mkdocs checks those inside it."""
    text = (REPO / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (REPO / link).exists(), f"{page} links to {link}"


def test_a_name_that_is_not_there_would_be_found():
    assert NAMED.findall("see `src/fedloom/nowhere.py` and `tests/`") == ["src/fedloom/nowhere.py", "tests/"]
