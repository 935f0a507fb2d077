"""Asynchronous rounds in one process: the same bits as synchronous ones where nobody is late, and what becomes of who is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.errors import ConfigError
from fedloom.lora.pair import digest
from fedloom.methods.table import METHODS, build, buffered_names
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Aggregation, Note, Training, Transfer, read_rows, totals
from fedloom.server.loop import Rounds
from fedloom.workspace.plan import check_buffer, check_method_takes
from toy import initial
from toy_run import simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SLOW = 'federation.pace={"client-0000" = 5.0}'
pytestmark = pytest.mark.usefixtures("no_picture")


def settings(*overrides: str, method: str = "fedit", rounds: int = 6) -> Config:
    usual = [f"method.name={method}", f"federation.num_rounds={rounds}", "federation.eval_every=0"]
    return load_config(TESTBED / "demo.toml", [*usual, *overrides])


def buffered(*overrides: str, method: str = "fedit", rounds: int = 6) -> Config:
    return settings("federation.mode=buffered", *overrides, method=method, rounds=rounds)


def play(out: Path, config: Config, clients: int = 3, *, resume: bool = False) -> Rounds:
    with simulation(toy_setup(config, clients, initial()), out, resume=resume) as rounds:
        rounds.play(resume=resume)
    return rounds


def bits(rounds: Rounds) -> tuple[object, ...]:
    """What the server and every client hold, private memory included."""
    states = {"": rounds.server, **rounds.sites.states}
    return tuple(
        (name, held.version, held.digest, digest(held.adapter), {key: t.tolist() for key, t in held.memory.items()})
        for name, held in states.items()
    )


def rows(out: Path, kind: type) -> list:
    return [row for row in read_rows(out / "ledger.jsonl") if isinstance(row, kind)]


@pytest.mark.parametrize("method", buffered_names())
def test_where_nobody_is_late_the_bits_are_those_of_synchronous_rounds(method: str, tmp_path: Path):
    more = ["method.client_residual=0.9"] if method.startswith("fedsrd") else []
    whole = play(tmp_path / "whole", settings(*more, method=method, rounds=4))
    steps = play(tmp_path / "steps", buffered("federation.buffer_size=3", *more, method=method, rounds=4))
    assert bits(steps) == bits(whole)
    assert totals(read_rows(tmp_path / "steps" / "ledger.jsonl")) == totals(
        read_rows(tmp_path / "whole" / "ledger.jsonl")
    )


def test_nobody_waits_for_a_slow_client(tmp_path: Path):
    config = buffered("federation.buffer_size=2", SLOW, rounds=12)
    rounds = play(tmp_path / "run", config)
    steps = rows(tmp_path / "run", Aggregation)
    assert [step.version for step in steps] == list(range(1, 13))
    assert steps[-1].stats["simulated_time"] <= 12, "synchronous rounds would take 60"
    assert max(step.stats["max_staleness"] for step in steps) >= 4
    turns = [row.client for row in rows(tmp_path / "run", Training)]
    assert turns.count("client-0000") == 2 and turns.count("client-0001") > 8
    assert {(state.version, state.digest) for state in rounds.sites.states.values()} == {
        (rounds.server.version, rounds.server.digest)
    }, "everybody has the result"
