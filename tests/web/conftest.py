"""One headless browser for the tests of pages."""

import pytest
from scripts.browser import find_program, start_browser


@pytest.fixture(scope="session")
def browser():
    """Skips where no Chromium is installed: `apt install chromium` has one, CHROMIUM=… names another."""
    if find_program() is None:
        pytest.skip("no Chromium here: apt install chromium, or CHROMIUM=/path/to/one")
    with start_browser() as started:
        yield started
