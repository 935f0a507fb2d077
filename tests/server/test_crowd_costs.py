"""What a crowd costs: nothing for who is absent, one description of a payload for all who are sent it.

A payload is hashed once. Calls are counted, not seconds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedloom.methods.method import State
from fedloom.records import ledger as ledgers
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Transfer, read_rows
from fedloom.rounds import catchup
from fedloom.rounds.job import find_tops, group_alike
from fedloom.server import loop, roster
from fedloom.server.loop import Rounds
from fedloom.server.session import begin_session
from fedloom.workspace import checkpoint, folder, keys
from fedloom.workspace.recall import Recall
from toy import initial, ranks
from toy_run import simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
FEW = ["federation.drop_out=0", "federation.eval_every=0", "federation.num_rounds=4"]


def play(out: Path, clients: int, asked: int, *own: str) -> Rounds:
    share = f"federation.fraction_train={asked / clients}"
    config = load_config(TESTBED / "demo.toml", [*FEW, share, *own])
    with simulation(toy_setup(config, clients, initial()), out) as run:
        run.play(resume=False)
    return run


def counted(monkeypatch: pytest.MonkeyPatch, calls: Counter, module: object, name: str) -> None:
    """Count the calls of a function where a module uses it."""
    call = getattr(module, name)

    def count(*given, **named):
        calls[name] += 1
        return call(*given, **named)

    monkeypatch.setattr(module, name, count)


def test_a_delivery_to_many_reads_each_payload_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """120 clients and 12, of whom 3 attend: as many calls, though ten times as many are sent the result."""
    found = {}
    for clients in (12, 120):
        calls: Counter = Counter()
        with monkeypatch.context() as patch:
            counted(patch, calls, catchup, "narrow_broadcast")
            counted(patch, calls, folder, "describe_payload")
            counted(patch, calls, roster, "accept")
            counted(patch, calls, loop, "full_state")
            run = play(tmp_path / str(clients), clients, 3)
        reached = {row.client for row in read_rows(run.folder.path / "ledger.jsonl") if isinstance(row, Transfer)}
        assert len(reached) == clients, "everybody has received the result"
        found[clients] = calls
    assert found[12]["describe_payload"]
    for name, count in found[120].items():
        assert count <= found[12][name] + 4, f"{name}: {count} calls for 120 clients, {found[12][name]} for 12"


def test_nothing_is_kept_of_who_was_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint after a round names those who attended; who comes from it is as if nothing had happened."""
    saved: list[set[str]] = []
    remember = checkpoint.save_checkpoint

    def look(path, snapshot, *more):
        saved.append(set(snapshot.clients))
        return remember(path, snapshot, *more)

    monkeypatch.setattr(folder.checkpoint, "save_checkpoint", look)
    run = play(tmp_path / "run", 200, 2)
    assert [len(names) for names in saved[:4]] == sorted(len(names) for names in saved[:4]) and len(saved[3]) <= 6
    assert len(saved[-1]) == 200, "after the delivery each holds the result"
    assert {(state.version, state.digest) for state in run.sites.states.values()} == {
        (run.server.version, run.server.digest)
    }


def test_the_ledger_is_not_read_while_rounds_are_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reads: Counter = Counter()
    counted(monkeypatch, reads, ledgers, "_scan")
    found = {}
    for rounds in (3, 30):
        reads.clear()
        play(tmp_path / str(rounds), 4, 4, f"federation.num_rounds={rounds}")
        found[rounds] = reads["_scan"]
    assert found[3] == found[30]


def test_payloads_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Broadcasts that are kept from one checkpoint to the next stay what they were."""
    calls: Counter = Counter()
    counted(monkeypatch, calls, keys, "payload_key")
    hashed: list[int] = []
    save = Rounds.save

    def look(self: Rounds) -> None:
        before = calls["payload_key"]
        save(self)
        hashed.append(calls["payload_key"] - before)

    monkeypatch.setattr(Rounds, "save", look)
    run = play(tmp_path / "run", 4, 4, "federation.num_rounds=8")
    assert len(set(hashed[2:8])) == 1, f"{hashed}: broadcasts are hashed once, however many are kept"
    before = calls["payload_key"]
    for number in (98, 99):
        snapshot = run.sites.remember(checkpoint.Snapshot(number, run.server, archive=run.archive.payloads))
        checkpoint.save_checkpoint(tmp_path / "again", snapshot, run.folder._keys)
    assert calls["payload_key"] == before, "no broadcast is new since the last checkpoint"
    assert checkpoint.load_checkpoint(tmp_path / "again" / "round-00099.safetensors").round == 99


def test_what_is_asked_of_a_kind_is_not_asked_of_each_client():
    """A thousand clients share one mapping: one group, and the largest ranks are those of every client one by one."""

    class Read(dict):
        reads = 0

        def items(self):
            Read.reads += 1
            return super().items()

    shared, other = Read(ranks(4)), dict(ranks(2))
    held = {f"c{number}": shared for number in range(1000)} | {"z": other}
    assert [(first, count) for first, _, count in group_alike(held)] == [("c0", 1000), ("z", 1)]
    assert find_tops(held) == ranks(4) and Read.reads == 1


def test_the_same_memory_under_another_payload_is_not_taken_for_the_one_before():
    asked: list[bytes] = []
    found = Recall(lambda payload: (asked.append(payload), len(payload))[1], most=10)
    one, two = b"x" * 4, b"y" * 6
    assert [found.of(p) for p in (one, one, two, one)] == [4, 4, 6, 4] and asked == [one, two]
    three = b"z" * 5
    assert found.of(three) == 5 and found.of(two) == 6 and len(asked) == 4, "the longest unused was forgotten"
    assert found.of(b"w" * 11) == 11, "too large to be held"


def test_states_of_the_absent_are_made_when_they_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A round of 2 among 20 and among 400 makes as many states."""
    found = {}
    for clients in (20, 400):
        made: Counter = Counter()
        with monkeypatch.context() as patch:
            counted(patch, made, roster, "replace")
            config = load_config(TESTBED / "demo.toml", [*FEW, f"federation.fraction_train={2 / clients}"])
            with simulation(toy_setup(config, clients, initial()), tmp_path / str(clients)) as run:
                begin_session(run)
                run.begin()
                before = made["replace"]
                run.round = 1
                run.play_round(1)
        found[clients] = made["replace"] - before
        assert isinstance(run.server, State)
    assert found[20] == found[400]
