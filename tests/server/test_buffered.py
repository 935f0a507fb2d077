"""Asynchronous rounds in one process: the bits of synchronous ones where nobody is late, and what becomes of who is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy
from fedloom.errors import ConfigError
from fedloom.lora.pair import digest
from fedloom.methods.table import buffered_names, build
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Aggregation, Note, Training, read_rows, totals
from fedloom.rounds.checks import UpdateFacts, check_update
from fedloom.rounds.stale import Past, weigh_staleness
from fedloom.rounds.turns import client_turn, server_turn, start
from fedloom.server.buffer import Buffer, choose_next
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.workspace.plan import check_buffer, check_method_takes
from toy_run import check_nothing_is_lost, counted, simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SLOW = 'federation.pace={"client-0000" = 5.0}'
RESIDUAL = ("method.client_residual=1.0", "method.rescale=none")
pytestmark = pytest.mark.usefixtures("no_picture")


def settings(*overrides: str, method: str = "fedit", rounds: int = 6) -> Config:
    usual = [f"method.name={method}", f"federation.num_rounds={rounds}", "federation.eval_every=0"]
    return load_config(TESTBED / "demo.toml", [*usual, *overrides])


def buffered(*overrides: str, method: str = "fedit", rounds: int = 6) -> Config:
    return settings("federation.mode=buffered", *overrides, method=method, rounds=rounds)


def play(out: Path, config: Config, clients: int = 3, *, resume: bool = False) -> Rounds:
    with simulation(toy_setup(config, clients, toy.initial()), out, resume=resume) as rounds:
        rounds.play(resume=resume)
    return rounds


def bits(rounds: Rounds) -> list[tuple[object, ...]]:
    """What the server and every client hold, private memory included."""
    states = {"": rounds.server, **rounds.sites.states}
    return [
        (name, held.version, held.digest, digest(held.adapter), {key: t.tolist() for key, t in held.memory.items()})
        for name, held in states.items()
    ]


def rows(out: Path, kind: type) -> list:
    return [row for row in read_rows(out / "ledger.jsonl") if isinstance(row, kind)]


@pytest.mark.parametrize("method", ["fedit", "fedsrd", "loom", "fedex"])
def test_where_nobody_is_late_the_bits_are_those_of_synchronous_rounds(method: str, tmp_path: Path):
    more = RESIDUAL if method == "fedsrd" else ()
    whole = play(tmp_path / "whole", settings(*more, method=method, rounds=3))
    steps = play(tmp_path / "steps", buffered("federation.buffer_size=3", *more, method=method, rounds=3))
    assert bits(steps) == bits(whole)
    sums = [totals(read_rows(tmp_path / name / "ledger.jsonl")) for name in ("steps", "whole")]
    assert sums[0] == sums[1]


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
    assert not [note for note in rows(tmp_path / "run", Note) if note.about]


@pytest.mark.parametrize("most", [100, 2])
def test_what_a_client_keeps_back_is_right_whether_its_update_counts_or_not(tmp_path: Path, monkeypatch, most: int):
    config = buffered(f"federation.max_staleness={most}", SLOW, *RESIDUAL, method="fedsrd", rounds=12)
    setup, found = toy_setup(config, 3, toy.initial()), counted(monkeypatch)
    with simulation(setup, tmp_path / "run") as rounds:
        rounds.play(resume=False)
    for one in rounds.buffer.waiting:
        found.setdefault(one.client, []).append(one.payload)
    refused = [note.text for note in rows(tmp_path / "run", Note) if note.about == "refused"]
    assert ("client-0000" in found) == (most == 100) == (not refused)
    assert all(f"federation.max_staleness is {most}" in text for text in refused)
    for client, state in rounds.sites.states.items():
        check_nothing_is_lost(setup, client, found.get(client, []), state.memory)


@pytest.mark.parametrize("method", ["fedit", "fedsrd"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(method: str, tmp_path: Path, monkeypatch):
    """Killed between rounds and in the middle of one, with turns in flight and updates in the buffer."""
    more = RESIDUAL if method == "fedsrd" else ()
    lost = ("federation.drop_out=0.2", "federation.fraction_train=0.8", "federation.buffer_size=2")
    config = buffered(SLOW, *lost, *more, method=method, rounds=9)
    whole, ends = play(tmp_path / "whole", config, 5), LocalSites.end
    for number, moment in enumerate((4, 5, 9)):
        calls = iter(range(1000))

        def crash(self, *arguments, calls=calls, moment=moment):
            if next(calls) == moment:
                raise KeyboardInterrupt
            ends(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(LocalSites, "end", crash)
            with pytest.raises(KeyboardInterrupt):
                play(tmp_path / "broken", config, 5, resume=number > 0)
    broken = play(tmp_path / "broken", config, 5, resume=True)
    assert bits(broken) == bits(whole)
    sums = [totals(read_rows(tmp_path / name / "ledger.jsonl")) for name in ("whole", "broken")]
    assert sums[0] == sums[1]
    assert [s.stats for s in rows(tmp_path / "whole", Aggregation)] == [
        s.stats for s in rows(tmp_path / "broken", Aggregation)
    ]


@pytest.mark.parametrize(("method", "settings"), [("fedit", {}), ("fed-dare", {"sparsity": 0.0})])
def test_a_step_is_the_present_state_and_the_weakened_changes(method: str, settings: dict[str, float]):
    """Slow twin: p_k of the examples, (1 + τ)^-a of the staleness, by hand on dense tensors."""
    job = toy.job(build(method, settings))
    then, now = (start(job, toy.random_state(seed)) for seed in (1, 2))
    payloads, seen, past, wanted = {}, {}, {}, now.adapter.tensors()
    examples = {}
    for client, base, age in (("ada", then, 3), ("bob", now, 0)):
        turn = client_turn(job, client, base, [], toy.trainer(job.method), 1)
        payloads[client], examples[client] = turn.payload, turn.trained.num_examples
        seen[client] = check_update(job, base, client, turn.payload, 1)
        if age:
            past[client] = Past(age, weigh_staleness(age, 0.5), job.method.updates, base.adapter, now.adapter)
    for client, base, weight in (("ada", then, 0.5), ("bob", now, 1.0)):
        seed = toy.client_seed(job, client, 1)
        after = toy.step(base, 1, seed).adapter.tensors()
        share = examples[client] / sum(examples.values())
        wanted = {name: t + share * weight * (after[name] - base.adapter.tensors()[name]) for name, t in wanted.items()}
    made = server_turn(job, now, payloads, 9, seen=seen, past=past).state.adapter.tensors()
    for name, tensor in wanted.items():
        assert torch.allclose(made[name], tensor, atol=1e-6)


def test_a_buffer_takes_one_update_of_each_client_in_the_order_in_which_they_came():
    """A client that came late and is quick afterwards has two updates there: the second waits for a step more."""
    job = toy.job(build("fedit"))
    federation = buffered("federation.buffer_size=2", "federation.max_staleness=1").federation
    buffer, server, facts = (
        Buffer(job, federation, 3),
        start(job, toy.initial()),
        UpdateFacts(1, frozenset(), 1.0, b"", 1),
    )
    for round in (1, 2):
        assert buffer.may_begin("ada", round)
        buffer.begin("ada", round, replace(server, version=round))
        assert not buffer.may_begin("ada", round + 1), "it is under way"
        buffer.take_in("ada", b"%d" % round, facts, replace(server, version=round))
        assert not buffer.may_begin("ada", round), "once a round"
    assert not buffer.is_full
    buffer.begin("bob", 2, replace(server, version=2))
    buffer.take_in("bob", b"b", facts, replace(server, version=2))
    assert buffer.is_full and buffer.describe(buffer.waiting, replace(server, version=2))["max_staleness"] == 1.0
    assert [one.payload for one in buffer.take()] == [b"1", b"b"]
    assert [one.payload for one in buffer.waiting] == [b"2"] and not buffer.is_full
    assert buffer.drop_stale(replace(server, version=3)) == {}
    assert "federation.max_staleness is 1" in buffer.drop_stale(replace(server, version=4))["ada"]
    assert choose_next(["cyd", "bob", "ada"], buffer, 3, ["ada", "cyd"]) == ["ada", "cyd"]


def test_weights_of_stale_updates():
    assert [weigh_staleness(age, 0.5) for age in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [weigh_staleness(age, 0.0) for age in (0, 3)] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["florist", "rolora", "flora", "fed-sb"])
def test_a_method_whose_updates_mean_nothing_later_is_refused(name: str):
    assert name not in buffered_names()
    with pytest.raises(ConfigError, match=rf"method '{name}' send means something .* use one of fedit, .*loom"):
        check_method_takes(build(name), buffered(method=name))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("federation.buffer_size=5",), "federation.buffer_size is 5, but there are 3 clients"),
        (('federation.pace={"lap" = 2.0}',), "federation.pace has a number for 'lap', which takes no part"),
    ],
)
def test_settings_that_fit_no_client_are_refused(overrides: tuple[str, ...], words: str):
    with pytest.raises(ConfigError, match=words):
        check_buffer(buffered(*overrides).federation, ["bank", "depot", "lab"])


@pytest.mark.parametrize("key", ["federation.buffer_size=2", 'federation.pace={"bank" = 2.0}'])
def test_settings_of_asynchronous_rounds_need_them(key: str):
    with pytest.raises(ConfigError, match=r"does nothing in synchronous rounds: set federation.mode = 'buffered'"):
        settings(key)
