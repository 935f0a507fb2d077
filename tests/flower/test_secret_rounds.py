"""Secure aggregation over Flower: the bytes and the bits of the local engine, and what becomes of sites that vanish,
servers that lie and whoever is killed in the middle.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from desks import LOST, SITES, DeskGrid, assemble, settings
from desks import site as site_config

from fedloom.errors import SecureSumError, SiteError
from fedloom.filed import SMALL, lay_down
from fedloom.flower.settings import shared_settings
from fedloom.lora.pair import digest
from fedloom.methods.method import State
from fedloom.records.events import Silent
from fedloom.records.ledger import Note, Training, Transfer, read_rows, totals
from fedloom.rounds.sums import Rounding
from fedloom.secagg import PHASES, Invitation
from fedloom.server.journal import Journal
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.site import sums
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.site.sums import check_peers, load_identity
from fedloom.workspace.folder import RunFolder

pytestmark = pytest.mark.flower

SECRET = (
    "method.name=fedit",
    "federation.num_rounds=2",
    "privacy.secure_aggregation=true",
    "privacy.least_cohort=2",
    "privacy.threshold=2",
)


def among_slow(phase):
    """Every phase, where there is time; otherwise the one in which most is at stake."""
    return phase if phase == "mask" else pytest.param(phase, marks=pytest.mark.slow)


def local(tmp_path: Path, *overrides: str, absent=None):
    """The local engine's run; absent: round → the sites that are not in its sum."""
    config = settings(*SECRET, *overrides)

    class Course(LocalSites):
        def collect(self, rounds, present):
            gone = (absent or {}).get(rounds.round, ())
            return super().collect(rounds, type(present)(tuple(n for n in present.asked if n not in gone), frozenset()))

    with RunFolder.open(tmp_path / "local", config) as folder:
        setup = assemble(config, dict.fromkeys(SITES, []), {})
        course = Rounds(setup, folder, Silent(), Course(setup))
        course.play(False)
    return course


def state(server):
    return server.version, server.digest, digest(server.adapter)


def rows_of(tmp_path, out="run"):
    return read_rows(tmp_path / out / "ledger.jsonl")


def notes(tmp_path):
    return "\n".join(row.text for row in rows_of(tmp_path) if isinstance(row, Note))


def at(site, round, phase, outcome):
    """Disturb a site's answer to one phase of a round's sum."""

    def disturb(node, ask, number, reply):
        hit = (node.desk.site.name, ask, number, reply.facts.get("phase")) == (site, "sum", round, phase)
        return outcome(node, reply) if hit else "as it is"

    return disturb


def test_bytes_and_states_are_those_of_the_local_engine(toy_federation, tmp_path):
    coarse = ("privacy.bits=14", "privacy.clip_schedule=learning_rate")
    federation, grid = toy_federation(*SECRET, *coarse)
    simulation = local(tmp_path, *coarse)
    assert state(federation.server) == state(simulation.server)
    ours, theirs = (totals(rows_of(tmp_path, out)) for out in ("run", "local"))
    assert ours == theirs
    crossed = Counter()
    for _, way, size in grid.carried:
        crossed[way] += size
    assert crossed["down"] == ours.bytes_down, "every byte of every phase stands in the ledger"
    for name in SITES:
        assert state(grid.node(name).desk.held.after) == state(simulation.sites.states[name])
    trained = [row for row in rows_of(tmp_path) if isinstance(row, Training)]
    assert len(trained) == 6 and all(row.loss != row.loss and row.examples == 0 for row in trained)


def test_no_update_and_nothing_about_it_leaves_a_site(toy_federation, tmp_path):
    replies = []

    def look(node, ask, round, reply):
        replies.append((ask, dict(reply.facts), [len(payload) for payload in reply.payloads]))

    toy_federation(*SECRET, disturb=lambda *about: look(*about) or "as it is")
    turns = [(facts, sizes) for ask, facts, sizes in replies if ask == "turn"]
    assert len(turns) == 6
    for facts, sizes in turns:
        assert not sizes and {"loss", "examples", "norm"}.isdisjoint(facts) and facts["key"]
    audit = tmp_path / "bank" / "audit" / "audit.jsonl"
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    sent = [row for row in rows_of(tmp_path) if isinstance(row, Transfer) and row.kind == "masked"]
    assert [line["bytes"] for line in lines] == [row.bytes for row in sent if row.client == "bank"], "as they left"


@pytest.mark.parametrize("phase", [among_slow(phase) for phase in PHASES])
def test_a_site_may_vanish_in_any_phase(toy_federation, tmp_path, phase):
    quick = ("flower.deadline=20", "flower.grace=0.01")
    federation, grid = toy_federation(*SECRET, *quick, disturb=at("lab", 1, phase, lambda node, reply: None))
    counted = phase in ("agree", "open")
    simulation = local(tmp_path, absent={} if counted else {1: ("lab",)})
    if not counted:  # the grid is for all who are asked, so the bits are those of a round without it
        assert f"client lab has left the secure sum ({phase}): did not answer in time" in notes(tmp_path)
    assert state(federation.server) == state(simulation.server)
    assert federation.sites.known["lab"].counted == 2
    assert state(grid.node("lab").desk.held.after) == state(simulation.sites.states["lab"])


def test_below_the_threshold_a_round_is_skipped_and_the_run_goes_on(toy_federation, tmp_path):
    least = ("privacy.least_cohort=3", "flower.grace=0.01", "method.name=flasc")
    federation, _ = toy_federation(*SECRET, *least, disturb=at("lab", 1, "mask", lambda node, reply: None))
    assert federation.server.version == 1
    assert "only 2 of 3 sites have sent their vectors, 3 are needed; not lab. The round is skipped" in notes(tmp_path)
    assert {known.counted for known in federation.sites.known.values()} == {2}


def spoil(node, reply):
    return Parcel(reply.facts, (bytes(len(reply.payloads[0])),))


@pytest.mark.parametrize(("phase", "words"), [("announce", "does not bear that site's signature"), ("agree", "does")])
def test_a_wrong_message_is_refused_by_name_and_the_sum_goes_on(toy_federation, tmp_path, phase, words):
    federation, _ = toy_federation(*SECRET, disturb=at("lab", 1, phase, spoil))
    assert federation.server.version == 2
    refused = [row.text for row in rows_of(tmp_path) if isinstance(row, Note) and row.about == "refused"]
    assert len(refused) == 1 and refused[0].startswith("client lab refused: ") and words in refused[0]


def test_a_site_that_opens_wrong_shares_is_named(toy_federation, tmp_path):
    federation, _ = toy_federation(*SECRET, disturb=at("bank", 1, "open", spoil))
    assert federation.server.version == 2, "the two others' shares are enough"
    assert "client bank has opened wrong shares; the others' made up for them" in notes(tmp_path)


class Liar:
    """Asks the desk of lab, in the middle of round 2, what a server must not ask. said: what it answered."""

    def __init__(self, folder, when, ask):
        self.folder, self.when, self.ask, self.said, self.told = folder, when, ask, [], {}
        self.config = settings(*SECRET)

    def disturb(self, node, ask, round, reply):
        if (node.desk.site.name, ask, round, reply.facts.get("phase")) == ("lab", *self.when):
            self.desk = node.desk
            self.said = [(self.answer(message, phase), words) for phase, message, words in self.ask(self)]
        return "as it is"

    def answer(self, message, phase):
        job = next(iter(self.desk.places)).job
        told = {"ask": "sum", "job": job, "settings": shared_settings(self.config), "base": self.desk._base}
        return self.desk.answer(Parcel({**told, "round": 2, "counted": 1, "protocol": 2, "phase": phase}, (message,)))

    def invitation(self, threshold=2, **changed):
        keys = {name: load_identity(self.folder / name).public_key().public_bytes_raw() for name in SITES}
        return Invitation(bytes(16), threshold, {**keys, **changed}).write()

    def check(self, toy_federation, caplog):
        grid = DeskGrid(self.config, self.folder, self.disturb)
        federation, _ = toy_federation(*SECRET, grid=grid)
        assert self.said and federation.server.version == 2, "the run goes on as if nobody had asked"
        for reply, words in self.said:
            assert words in reply.facts["error"] and not reply.payloads
            assert words in caplog.text, "the site's own log says it too"


def test_wrong_invitations_are_refused(toy_federation, tmp_path, caplog):
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()

    def invitations(liar):
        yield "announce", liar.invitation(threshold=1), "at half of the sites or fewer, a server could open two"
        yield "announce", liar.invitation(stranger=other), "'stranger' is invited, which takes no part in this run"
        yield "announce", liar.invitation(bank=other), "another key of site 'bank' than the sum that this site was in"
        yield "announce", liar.invitation(lab=other), "another key for site 'lab' than the site's own"
        yield "announce", liar.invitation()[:-1], "ends in the middle of a site"
        yield "announce", b"", "names a site twice, or its sites out of order"
        yield "share", b"", "site 'lab' is in no sum of round 2"

    Liar(tmp_path, ("turn", 2, None), invitations).check(toy_federation, caplog)


def test_a_vector_leaves_in_one_sum_alone(toy_federation, tmp_path, caplog):
    """Of two sums with the same vectors but one, the difference is that one."""

    def requests(liar):
        yield "announce", liar.invitation(), "the vector of site 'lab' of round 2 has left in a sum already"
        yield "mask", b"", "asked to mask after mask: a secure sum runs announce, share, mask, agree, open, each once"

    Liar(tmp_path, ("sum", 2, "mask"), requests).check(toy_federation, caplog)


def test_a_repeated_question_gets_the_same_answer_and_is_counted(toy_federation, tmp_path):
    """Flower loses a reply: the site is asked again, and no second vector leaves."""
    lost = []

    def lose(node, reply):
        lost.append(reply.payloads[0])
        return LOST if len(lost) == 1 else "as it is"

    federation, grid = toy_federation(*SECRET, "flower.deadline=20", disturb=at("lab", 1, "mask", lose))
    assert len(lost) == 2 and lost[0] == lost[1]
    assert state(federation.server) == state(local(tmp_path).server)
    assert len({line.payload for line in grid.node("lab").desk.trail.lines()}) == 2


def test_keys_that_a_site_was_given_beforehand_hold(tmp_path):
    keys = {name: load_identity(tmp_path / name).public_key().public_bytes_raw() for name in SITES}
    lab = site_config("lab", tmp_path)
    check_peers(lab, keys)
    assert json.loads((tmp_path / "lab" / "peers.json").read_text()).keys() == {"bank", "depot"}
    pinned = lab.model_copy(update={"peers": {"bank": keys["bank"].hex()}})
    with pytest.raises(SecureSumError, match="site 'depot' is invited, of which .peers. of this site has no key"):
        check_peers(pinned, keys)
    with pytest.raises(SecureSumError, match="another key of site 'bank' than .peers. of this site: ask that site"):
        check_peers(pinned, {**keys, "bank": keys["depot"]})
    (tmp_path / "lab" / "peers.json").write_text("[]")
    with pytest.raises(SiteError, match="is no list of keys"):
        check_peers(lab, keys)
    assert load_identity(tmp_path / "lab").private_bytes_raw() == (tmp_path / "lab" / "secure.key").read_bytes()
    assert (tmp_path / "lab" / "secure.key").stat().st_mode & 0o77 == 0


def test_a_server_that_had_one_site_train_from_another_adapter_gets_no_sum_with_it(toy_federation, tmp_path):
    """Sites whose changes such a server knows beforehand would leave the others' bare."""

    def tell_otherwise(node, reply):
        place = next(iter(real.desk.places))
        pair = place.held.before.adapter["layers.1.down"]
        pair.B[0, 0] += 1e-3

    grid = DeskGrid(settings(*SECRET), tmp_path)
    real = grid.node("lab")
    grid.disturb = lambda node, ask, round, reply: (
        (tell_otherwise(node, reply) if (node.desk.site.name, ask, round) == ("lab", "turn", 1) else None) or "as it is"
    )
    federation, _ = toy_federation(*SECRET, "flower.grace=0.01", grid=grid)
    refused = "client lab refused: what site 'lab' announces does not bear that site's signature"
    assert notes(tmp_path).count(refused) == 1 and "client bank refused" not in notes(tmp_path)
    assert state(federation.server) == state(local(tmp_path, absent={1: ("lab",)}).server)


def test_sites_that_are_told_other_settings_sign_another_sum(toy_federation, tmp_path):
    grid = DeskGrid(settings(*SECRET, "training.learning_rate=0.5"), tmp_path)
    federation, _ = toy_federation(*SECRET, grid=grid)
    assert "client depot refused: what site 'depot' announces does not bear that site's" in notes(tmp_path)
    assert "no site has given an answer that counts (announce). The round is skipped" in notes(tmp_path)
    assert federation.server.version == 0


def test_a_policy_may_require_it(toy_federation, tmp_path):
    policies = {"lab": Policy(order="run", secure_aggregation="required", least_cohort=3)}
    federation, _ = toy_federation(
        "method.name=fedit", "flower.deadline=0.3", "federation.num_rounds=1", policies=policies
    )
    assert "requires privacy.secure_aggregation" in notes(tmp_path)
    assert not totals(rows_of(tmp_path)).by_client.get("lab", (0, 0))[0]


def test_a_policy_may_ask_for_a_larger_cohort(toy_federation, tmp_path):
    policies = {"lab": Policy(order="run", secure_aggregation="required", least_cohort=3)}
    toy_federation(*SECRET, "flower.deadline=0.3", "federation.num_rounds=1", policies=policies)
    assert "least_cohort does not allow privacy.least_cohort of 2" in notes(tmp_path)


def test_a_site_that_was_started_anew_has_left_the_sum(toy_federation, tmp_path):
    def restart(node, reply):
        node.desk.close()
        node.desk = Desk(site_config("lab", tmp_path))

    grid = DeskGrid(settings(*SECRET), tmp_path)
    real = {name: grid.node(name) for name in SITES}
    grid.disturb = at("lab", 1, "mask", lambda node, reply: restart(real["lab"], reply) or "as it is")
    federation, _ = toy_federation(*SECRET, grid=grid)
    assert "client lab has left the secure sum (agree): site 'lab' is in no sum of round 1" in notes(tmp_path)
    assert state(federation.server) == state(local(tmp_path).server), "its vector was in the sum all the same"


class Killed(BaseException):
    """Ends the server's process."""


@pytest.mark.parametrize("phase", [None, *(among_slow(phase) for phase in PHASES)])
def test_a_server_that_is_killed_goes_on_with_that_very_sum(toy_federation, tmp_path, phase):
    """phase: in which the first reply has come; None: the sum is there, and not yet taken up."""
    config = settings(*SECRET)
    grid = DeskGrid(config, tmp_path)
    died = []

    def die(node, ask, round, reply):
        if (ask, round, reply.facts.get("phase")) == ("sum", 1, phase) and len(died) < 2:
            died.append(node.desk.site.name)
            if len(died) == 2:
                raise Killed
        return "as it is"

    with pytest.MonkeyPatch.context() as patch:
        if phase is None:
            patch.setattr("fedloom.server.sums.mean_update", lambda job, state, total, sites, round: mean(round))
        grid.disturb = die
        with pytest.raises(Killed):
            toy_federation(*SECRET, grid=grid)
    grid.disturb = None
    grid.arriving.clear()
    federation, _ = toy_federation(*SECRET, grid=grid, resume=True)
    assert state(federation.server) == state(local(tmp_path).server)
    for name in SITES:
        assert len({line.payload for line in grid.node(name).desk.trail.lines()}) == 2, "a masked vector a round"
    assert "skipped" not in notes(tmp_path) and not (tmp_path / "run" / "secure-sum").exists()


def mean(round):
    raise Killed


def test_without_its_journal_a_server_begins_no_second_sum_of_the_same_vectors(toy_federation, tmp_path, monkeypatch):
    take_turn, aggregate = Rounds.take_turn, []

    def die(self, updates, round):
        if round == 1 and not aggregate:
            aggregate.append(round)
            raise Killed
        return take_turn(self, updates, round)

    monkeypatch.setattr(Rounds, "take_turn", die)
    grid = DeskGrid(settings(*SECRET), tmp_path)
    with pytest.raises(Killed):
        toy_federation(*SECRET, grid=grid)
    (tmp_path / "run" / "secure-sum").unlink()
    federation, _ = toy_federation(*SECRET, grid=grid, resume=True)
    assert "0 sites are ready, 2 are needed" in notes(tmp_path) and federation.server.version == 1
    assert "client lab: its vector of this round left in a sum that was not completed" in notes(tmp_path)


def test_a_journal_takes_up_whole_entries_of_its_own_sum_alone(tmp_path):
    path, invitation = tmp_path / "sum", Invitation(bytes(16), 2, {"a": bytes(32), "b": bytes(32)})
    journal = Journal(path, "2 1 ab of job c")
    journal.begin(invitation)
    asked = []

    def ask(phase, messages):
        asked.append((phase, sorted(messages)))
        for site in messages:
            yield site, f"{phase} of {site}".encode()

    assert dict(journal.keep(ask)("announce", {"a": b"", "b": b""})) == {"a": b"announce of a", "b": b"announce of b"}
    first = next(iter(journal.keep(ask)("share", {"a": b"", "b": b""})))
    path.write_bytes(path.read_bytes() + b"\x01\x00\x01\x00")  # an entry that a crash cut short
    again = Journal(path, "2 1 ab of job c")
    assert again.invitation == invitation and len(asked) == 2
    assert len(dict(again.keep(ask)("announce", {"a": b"", "b": b""}))) == 2 and len(asked) == 2, "that phase is over"
    assert dict(again.keep(ask)("share", {"a": b"", "b": b""}))[first[0]] == first[1]
    assert asked[2] == ("share", ["b"]), "whose answer is there is not asked again"
    assert Journal(path, "2 1 ab of job d").invitation is None


def test_a_payload_that_noise_is_drawn_from_stays_in_memory(tmp_path, monkeypatch):
    """The key of the noise is made of its bytes: a view of a file would have put its own address there."""
    plain, secret = (assemble(settings(*own), dict.fromkeys(SITES, []), {}) for own in ((), SECRET))
    assert plain.with_files_in(tmp_path).job.scratch == tmp_path and secret.with_files_in(tmp_path) is secret
    laid, drawn = lay_down(bytes(SMALL), tmp_path), []
    monkeypatch.setattr(sums, "noise_for_sum", lambda secure, secret, *about: drawn.append(about))
    monkeypatch.setattr(sums, "make_vector", lambda *given: (b"", Rounding(1, 0, 1.0, 0.0, 0.0)))
    monkeypatch.setattr(sums, "facts_of", lambda *given, **told: b"")
    for payload in (bytes(SMALL), laid):
        sums.hide_turn(secret, SITES[0], State(secret.initial), SimpleNamespace(payload=payload), 1)
    assert drawn[0] == drawn[1] and {type(about[-1]) for about in drawn} == {bytes}
