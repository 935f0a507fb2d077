"""The documentation builds as a site, strictly, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    # Without --quiet, which would keep warnings from --strict.
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_built(site):
    pages = {path.relative_to(REPO / "docs").with_suffix(".html") for path in REPO.glob("docs/**/*.md")}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert {page for page in pages if page.parts[:2] != ("methods", "text")} <= built
    assert not (site / "methods" / "text").exists()


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\s\">]+)", page)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"?([^\s\">]+)", page)
        assert loaded, path
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], path


def test_the_exported_names_are_described(site):
    import fedloom

    described = set(re.findall(r'id="fedloom\.(\w+)"', "".join(p.read_text("utf-8") for p in site.glob("api/*.html"))))
    told = "".join(path.read_text("utf-8") for path in REPO.glob("docs/**/*.md"))
    missing = [name for name in fedloom.__all__ if name not in described and f"fedloom.{name}" not in told]
    assert not missing
