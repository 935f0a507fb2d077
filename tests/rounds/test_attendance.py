"""Any attendance: k of n with drop-outs, late joiners, clients that vanish for rounds, consolidation in between."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from test_methods_contract import assert_same_model

from fedloom.errors import RoundError, StaleError
from fedloom.lora.pair import LoraState, stack
from fedloom.methods.method import State
from fedloom.methods.table import METHODS, build
from fedloom.rounds.catchup import MOST_DIGESTS, Archive
from fedloom.rounds.consolidation import Consolidation, consolidate
from fedloom.rounds.step import Train
from fedloom.rounds.turns import Job, ServerTurn, accept, full_state, start
from fedloom.server.roster import Roster, same_state
from fedloom.wire import read_header
from toy import RANK, SHAPES, Federation, built, delta, initial, job, random_state, ranks, step

MERGING = ["flora", "florist:paper", "fedex"]


def consolidating(name: str, every: int = 3, energy: float = 1.0, **settings: object) -> Job:
    name, _, preset = name.partition(":")
    plain = job(build(name, {**settings, **({"preset": preset} if preset else {})}))
    return replace(plain, consolidation=Consolidation(every, energy))


class Attended(Federation):
    """A federation whose clients come and go, brought in step from the archive as an engine does it."""

    def __init__(self, job: Job, clients: dict | None = None) -> None:
        super().__init__(job, clients)
        self.archive = Archive()
        self.top = initial(self.server.adapter.ranks())
        self.roster = Roster(job, self.top, self.ranks)
        self.sent: list[tuple[str, int]] = []

    def bring(self, client: str) -> None:
        """Catch the client up, and hold it to one that comes from nothing by the full state."""
        state = self.clients[client]
        needed = self.archive.payloads_for(self.job, self.server, state.version, self.ranks[client], self.number + 1)
        for payload in needed:
            self.sent.append((read_header(payload).kind, len(payload)))
            state = accept(self.job, state, payload)
        self.roster.receive(client, needed)
        assert same_state(self.roster[client], state), "what is computed once is what the client itself would have"
        newcomer = start(self.job, self.top, self.ranks[client])
        assert_same_model(state, accept(self.job, newcomer, full_state(self.job, self.server, self.number)))
        self.clients[client] = state

    def attend(self, asked: list[str], vanished: set[str]) -> None:
        for client in asked:
            self.bring(client)
        there = {client: self.training(client) for client in asked if client not in vanished}
        if not there:
            self.number += 1
            return
        result = self.round(there)
        assert not result.refused
        self.stats = result.stats

    def deliver(self, turn: ServerTurn) -> None:
        """Only the archive and the roster learn of the broadcast; clients are brought in step when they are asked."""
        before = read_header(turn.payload).base_version
        self.archive.add(before, turn.payload, limit=4 * self.server.total.numel())
        led = self.server.version == before + 1
        self.roster.follow(turn.payload if led else full_state(self.job, self.server, self.number))

    def client_turn(self, client: str, train: Train) -> bytes:
        payload = super().client_turn(client, train)
        self.roster.hold(client, self.clients[client])
        return payload


SCHEDULES = [(name, 0) for name in sorted(METHODS)] + [(name, 3) for name in sorted(METHODS) if build(name).merges]


@pytest.mark.parametrize(("name", "every"), SCHEDULES)
def test_whoever_comes_when_is_in_step_to_the_bit(name: str, every: int):
    """Nine rounds, 3 of 6 asked, a third drops out; one joins in round 6, one vanishes from round 2 to 8."""
    method = built(name)
    kinds = [4, 2, 1] if method.facts.unequal_ranks else [4, 4, 4]
    clients = {f"c{i}": ranks(kinds[i % 3]) for i in range(6)}
    if method.module_subsets:
        del clients["c5"]["layers.1.down"]
    plain = job(method)
    federation = Attended(Job(method, plain.seed, plain.quantize, consolidation=Consolidation(every, 0.99)), clients)
    draw = random.Random(f"{name} {every}")
    for round in range(1, 10):
        there = [c for c in clients if not (c == "c4" and round < 6) and not (c == "c0" and 2 <= round <= 8)]
        asked = sorted(draw.sample(there, 3))
        federation.attend(asked, {client for client in asked if draw.random() < 0.3})
    for client in clients:
        federation.bring(client)
    assert_same_model(federation.clients["c0"], federation.server)


@pytest.mark.parametrize("name", MERGING)
def test_consolidation_shortens_the_way_back(name: str):
    """Steps that shrink from round to round, as under any schedule, leave increments that few components hold."""
    ways = {}
    for every in (0, 6):
        federation = Attended(consolidating(name, every, 0.99), dict.fromkeys("abc", 2))
        federation.train = lambda state, round, seed: step(state, round, seed, size=0.3**round)
        for _ in range(6):
            federation.attend(["a", "b"], set())
        federation.bring("c")
        ways[every] = sum(size for _, size in federation.sent[-1:])
    assert federation.server.version == 7, "a consolidation is a version of its own"
    assert 0 < federation.stats["consolidated_lost_energy"] <= 0.01
    assert ways[6] < 0.9 * ways[0]


@pytest.mark.parametrize("energy", [1.0, 0.99, 0.8])
def test_a_consolidation_loses_the_energy_that_it_reports(energy: float):
    """Ten increments of rank 1 in modules whose rank is 6 to 10 at most; the adapter in training is left alone."""
    frozen = stack([random_state(seed, rank=1, size=0.5**seed) for seed in range(10)])
    state = State(random_state(99), frozen=frozen, version=4, digest="d")
    after, stats = consolidate(state, energy)
    lost = total = 0.0
    for module, before in delta(frozen).items():
        change = before - (delta(after.frozen)[module] if module in after.frozen else 0)
        lost, total = lost + float(change.square().sum()), total + float(before.square().sum())
        assert float(change.square().sum()) <= (1 - energy + 1e-9) * float(before.square().sum())
    assert stats["consolidated_lost_energy"] == pytest.approx(lost / total, abs=1e-6)
    assert stats["consolidated_from_rank"] == 10 > stats["consolidated_rank"]
    assert after.adapter is state.adapter and after.version == 5 and after.digest != state.digest


def test_nothing_to_recompress_is_no_version():
    for frozen in (LoraState(), random_state(1, rank=2)):
        state = State(initial(), frozen=frozen, version=3, digest="d")
        assert consolidate(state, 1.0) == (state, {})


def test_after_a_consolidation_everybody_receives_the_same_full_state():
    federation = Attended(consolidating("flora", every=2, energy=0.9), {"ada": 2, "bob": 2})
    federation.attend(["ada", "bob"], set())
    federation.attend(["ada"], set())
    assert federation.server.version == 3
    federation.sent.clear()
    federation.attend(["ada", "bob"], set())
    assert [kind for kind, _ in federation.sent] == ["state", "state"]
    assert len({size for _, size in federation.sent}) == 1
    federation.sent.clear()
    federation.bring("ada")
    assert [kind for kind, _ in federation.sent] == ["change"]


def test_the_archive_forgets_what_no_way_leads_on_from():
    archive = Archive()
    for version in (0, 1, 2, 4, 5):
        archive.add(version, b"x", limit=100)
    assert sorted(archive.payloads) == [4, 5]
    assert (archive.reach(6), archive.reach(5), archive.reach(9)) == (4, 4, 9)


def test_one_large_broadcast_gives_way_to_a_smaller_full_state():
    """FLoRA's stack of many clients exceeds the merged state, whose rank is at most min(m, n)."""
    federation = Attended(job(build("flora")), dict.fromkeys("abcdefghij", RANK))
    federation.attend(list("abcdefghi"), set())
    assert len(federation.archive.payloads[0]) > len(full_state(federation.job, federation.server, 1))
    federation.bring("j")
    assert [kind for kind, _ in federation.sent] == ["state"]
    assert torch.equal(federation.clients["j"].frozen[min(SHAPES)].A, federation.server.frozen[min(SHAPES)].A)


def test_the_roster_keeps_two_states_for_each_kind_of_client_however_many_versions_are_held():
    federation = Attended(job(build("fedsrd")), {f"c{i}": RANK for i in range(8)})
    for client in federation.clients:
        federation.attend([client], set())
    assert len({state.version for state in federation.roster.values()}) == 8
    assert len({id(state.adapter) for state in federation.roster.values()}) == 1, "all are behind by a round or more"
    federation.bring("c0")
    assert len({id(state.adapter) for state in federation.roster.values()}) == 2


def test_the_roster_refuses_what_does_not_lead_to_the_servers_state():
    federation = Attended(job(build("fedit")), dict.fromkeys("ab", RANK))
    for _ in range(3):
        federation.attend(["a"], set())
    needed = federation.archive.payloads_for(federation.job, federation.server, 0, federation.ranks["b"], 4)
    with pytest.raises(RoundError, match="client b was sent leads to version 0"):
        federation.roster.receive("b", [])
    if len(needed) > 1:
        with pytest.raises(StaleError):
            federation.roster.receive("b", needed[1:])
    other = Attended(job(build("fedit"), seed=9), dict.fromkeys("ab", RANK))
    for _ in range(3):
        other.attend(["a"], set())
    with pytest.raises(RoundError, match="not to the server's"):
        federation.roster.receive("b", [full_state(other.job, other.server, 4)])


@pytest.mark.parametrize("name", sorted(name for name in METHODS if build(name).replaces))
def test_who_missed_rounds_is_sent_one_broadcast_where_the_newest_say_all(name: str):
    federation = Attended(job(build(name), values="int8"), {"a": RANK, "b": RANK, "c": RANK - 1})
    for _ in range(4):
        federation.attend(["a", "b"], set())
    federation.bring("c")
    assert [kind for kind, _ in federation.sent if kind == "state"] == []
    assert federation.clients["c"].version == federation.server.version == 4
    assert len(federation.archive.payloads_for(federation.job, federation.server, 1, ranks(RANK), 5)) == 1
    federation.attend(["a", "b", "c"], set())  # and its next update counts


def test_a_broadcast_that_lacks_a_module_does_not_stand_alone():
    """Modules that nobody trained this round are as an earlier broadcast left them."""
    some = dict.fromkeys(list(SHAPES)[:2], RANK)
    federation = Attended(job(build("fedit"), values="int8"), {"a": RANK, "b": some, "c": RANK})
    federation.attend(["a"], set())
    federation.attend(["b"], set())
    newest = federation.archive.payloads[1]
    with pytest.raises(StaleError, match="rests on version 1"):
        accept(federation.job, federation.clients["c"], newest)
    federation.bring("c")
    assert [kind for kind, _ in federation.sent][-2:] == ["change", "change"]


@pytest.mark.parametrize("rank", [RANK, RANK - 1])
def test_broadcasts_that_name_some_modules_each_travel_as_one(rank: int):
    """The newest of every module, whichever round trained it last, cut to the receiver's rank."""
    some, others = dict.fromkeys(list(SHAPES)[:2], RANK), dict.fromkeys(list(SHAPES)[2:], RANK)
    federation = Attended(job(build("fedit"), values="int8"), {"a": some, "b": others, "c": rank})
    for client in "abab":
        federation.attend([client], set())
    federation.bring("c")  # holds it to who comes from nothing
    assert [kind for kind, _ in federation.sent][-1:] == ["change"] and federation.clients["c"].version == 4
    assert len(federation.archive.payloads_for(federation.job, federation.server, 0, ranks(rank), 5)) == 1


def test_of_factors_that_take_turns_the_newest_two_travel_as_one():
    """Whoever missed one round or two is sent what it missed; whoever missed more, the newest of both factors."""
    federation = Attended(job(build("rolora"), values="int8"), {"a": RANK, "b": RANK, "c": RANK - 1})
    for _ in range(5):
        federation.attend(["a", "b"], set())
    archive = federation.archive

    def sizes_for(version: int) -> list[int]:
        needed = archive.payloads_for(federation.job, federation.server, version, ranks(RANK), federation.number + 1)
        return [len(payload) for payload in needed]

    sizes = [sizes_for(version) for version in range(5)]
    newest = [len(archive.payloads[version]) for version in (3, 4)]
    assert sizes[4] == newest[1:] and sizes[3] == newest
    assert sizes[0] == sizes[1] == sizes[2] and len(sizes[0]) == 1 and sizes[0][0] < sum(newest)
    only_one = archive.payloads[4]
    with pytest.raises(StaleError, match="rests on version 4"):
        accept(federation.job, federation.clients["c"], only_one)
    federation.bring("c")
    federation.attend(["a", "b", "c"], set())
    assert len(sizes_for(3)) == 1 and len(sizes_for(4)) == 2, "made anew for the new version"
    federation.bring("c")


def test_an_older_broadcast_is_stale_even_where_it_says_all():
    federation = Attended(job(build("fedit")), {"a": RANK, "b": RANK})
    first = None
    for _ in range(2):
        federation.attend(["a", "b"], set())
        first = first or federation.archive.payloads[0]
    federation.bring("a")
    with pytest.raises(StaleError, match="rests on version 0"):
        accept(federation.job, federation.clients["a"], first)


def test_who_does_not_take_the_newest_alone_is_sent_the_chain_or_the_full_state():
    federation = Attended(job(build("fedit"), values="int8"), dict.fromkeys("abc", RANK))
    for _ in range(3):
        federation.attend(["a", "b"], set())
    archive, given = federation.archive, (federation.job, federation.server, 0, ranks(RANK), 4)
    assert [read_header(payload).base_version for payload in archive.payloads_for(*given)] == [2]
    older = archive.payloads_for(*given, alone=False)
    assert [read_header(payload).base_version for payload in older] in ([0, 1, 2], [3])
    state = start(federation.job, federation.top)
    for payload in older:  # as a receiver that knows nothing of newest broadcasts: each rests on the one before
        header = read_header(payload)
        assert header.kind == "state" or header.base_version == state.version
        state = accept(federation.job, state, payload)
    assert_same_model(state, federation.server)


def test_digests_outlive_the_broadcasts_that_are_forgotten():
    """A site many versions back is known by its digest, and the newest broadcast alone brings it in step."""
    archive = Archive()
    for version in range(MOST_DIGESTS + 5):
        archive.add(version, b"xx", limit=4, digest=f"d{version}")
    assert len(archive.payloads) == 2 and archive.digests[MOST_DIGESTS] == f"d{MOST_DIGESTS}"
    assert len(archive.digests) == MOST_DIGESTS and min(archive.digests) == 5
