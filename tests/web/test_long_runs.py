"""A run of many rounds and clients in the browser: as much as a page may have to hold."""

import pytest
from scripts.browser import PHONE

from served_runs import WrittenRun, served

pytestmark = pytest.mark.slow
ROUNDS = 1000
CLIENTS = tuple(f"client-{place:03d}" for place in range(50))


def test_a_thousand_rounds_of_fifty_clients_are_shown_and_followed(browser, tmp_path):
    run = WrittenRun(tmp_path / "long", rounds=ROUNDS, clients=CLIENTS).begin().play(ROUNDS - 1)
    with served(run.folder) as service, browser.open(service.url, size=PHONE) as tab:
        assert tab.wait(
            "[...document.querySelectorAll('[data-chart]')].every((plot) => plot.querySelector('svg path'))"
        )
        assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
        assert tab.ask("document.documentElement.outerHTML.length") < 12_000_000
        status = "document.querySelector('.status').textContent"
        assert f"round {ROUNDS - 1:,} of" in tab.ask(status) or f"round {ROUNDS - 1} of" in tab.ask(status)
        run.play().end()
        assert tab.wait(f"{status} === 'finished'")
        assert tab.problems == []
