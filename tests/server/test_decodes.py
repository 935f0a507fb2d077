"""The local engine decodes every update once, and every broadcast once for all clients."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedloom.records.configfile import load_config
from fedloom.rounds import decoded
from fedloom.rounds import turns as rounds
from fedloom.server import roster
from fedloom.wire import decode, read_header
from toy import initial
from toy_run import simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SETTINGS = ("federation.num_rounds=3", "federation.eval_every=0")


@pytest.mark.parametrize("method", ["fedit", "fedsrd"])
def test_a_run_decodes_every_payload_once(tmp_path, monkeypatch, method: str):
    found: Counter[bytes] = Counter()

    def read(payload, *rest):
        found[payload] += 1
        return decode(payload, *rest)

    for module in (decoded, rounds, roster):
        monkeypatch.setattr(module, "decode", read)
    monkeypatch.setattr("fedloom.server.loop.finish_run", lambda *arguments: None)
    clients, config = 6, load_config(TESTBED / "demo.toml", [f"method.name={method}", *SETTINGS])
    with simulation(toy_setup(config, clients, initial()), tmp_path / "run") as run:
        run.play(resume=False)
    kinds = Counter(read_header(payload).kind for payload in found)
    states = {"state": 3} if method == "fedit" else {}  # of whole factors the state is a few bytes smaller
    assert kinds == {"update": 3 * clients, "change": 3, **states} and set(found.values()) == {1}
