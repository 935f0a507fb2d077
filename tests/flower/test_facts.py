"""What a site says beside its payload: checked before anything rests on it, and harmless where it is shown."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from desks import DeskGrid, settings
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import RoundError, SiteError
from fedloom.flower import relay as client
from fedloom.flower.fleet import Fleet, Reply, SentRequest
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.records.ledger import Roll, Training, Transfer, read_rows
from fedloom.report import summarise
from fedloom.site.calling import call_worker
from fedloom.site.protocol import Parcel, Statement, parse_request, parse_statement
from hostile import WHOLE, is_tame

pytestmark = pytest.mark.flower

GOOD = {
    "name": "lab",
    "version": 3,
    "digest": "0a",
    "loss": 0.5,
    "steps": 10,
    "seconds": 2.5,
    "busy": 1.0,
    "relay": 0.1,
}
BAD = (
    {"seconds": math.inf},
    {"steps": math.inf},
    {"seconds": -1e9},
    {"steps": -5},
    {"steps": 1e300},
    {"loss": math.nan},
)
WORSE = (
    {"steps": True},
    {"steps": 2**31},
    {"steps": 2.0},
    {"seconds": 1e9},
    {"seconds": "2.5"},
    {"loss": -1.0},
    {"loss": "0.5"},
    {"version": -1},
    {"version": 2**62},
    {"digest": "x" * 129},
    {"digest": "\x1b[2J"},
    {"name": "x" * 201},
    {"name": 7},
    {"error": 7},
)


def test_what_a_site_may_say_is_read_and_the_rest_is_not_looked_at():
    assert parse_statement({**GOOD, "more": "x"}) == Statement("lab", 3, "0a", 0.5, 10, 2.5)
    assert parse_statement({}) == Statement()


def test_half_of_a_surrogate_pair_is_no_fact():
    with pytest.raises(SiteError, match="the facts in its reply are wrong: Invalid JSON"):
        parse_statement({"name": "\ud800"})


@pytest.mark.parametrize("bad", [*BAD, *WORSE], ids=str)
def test_what_no_site_can_have_is_refused_by_its_name(bad: dict):
    with pytest.raises(SiteError, match=f"the facts in its reply are wrong: {next(iter(bad))}"):
        parse_statement({**GOOD, **bad})


FACTS = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none())


# On a machine that never drew text, the first one makes a table of all characters, which takes a second or more.
@given(st.dictionaries(st.sampled_from([*GOOD, "error", "more"]), FACTS))
def test_any_facts_are_a_statement_of_finite_numbers_or_are_refused(facts: dict):
    try:
        said = parse_statement(facts)
    except SiteError as error:
        assert is_tame(str(error)) and len(str(error)) < 500
        return
    assert all(math.isfinite(number) and number >= 0 for number in (said.loss or 0, said.steps, said.seconds))
    assert len(said.name) <= 200 and len(said.digest or "") <= 128


@given(st.dictionaries(st.sampled_from(["ask", "job", "settings", "base", "round", "counted", "\x1b[2J" * 99]), FACTS))
def test_a_request_that_is_none_is_refused_in_tame_words(facts: dict):
    with pytest.raises(SiteError) as refused:
        parse_request(facts)
    assert is_tame(str(refused.value)) and len(str(refused.value)) < 500


@pytest.mark.parametrize("bad", [{"base": "\x1b"}, {"base": "0" * 129}, {"round": 2**31}, {"counted": 2**62}])
def test_a_request_is_bounded(bad: dict):
    good = {"ask": "turn", "job": "0" * 16, "settings": "", "base": "0" * 32, "round": 1, "counted": 0}
    assert parse_request(good).round == 1
    with pytest.raises(SiteError, match=next(iter(bad))):
        parse_request({**good, **bad})


def test_bad_facts_refuse_the_site_and_the_run_goes_on_and_is_whole(toy_federation, tmp_path: Path):
    def lie(node, ask, round, reply):
        hit = (node.desk.site.name, ask) == ("lab", "turn") and round <= len(BAD)
        return Parcel({**reply.facts, **BAD[round - 1]}, reply.payloads) if hit else "as it is"

    federation, _ = toy_federation(f"federation.num_rounds={len(BAD) + 1}", disturb=lie)
    assert federation.server.version == len(BAD) + 1
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    failed = [row.failed.get("lab", "") for row in rows if isinstance(row, Roll)]
    assert [next(iter(bad)) in reason for bad, reason in zip(BAD, failed, strict=False)] == [True] * len(BAD)
    assert all("refused: the facts in its reply are wrong" in reason for reason in failed[:-1]) and not failed[-1]
    assert [row.round for row in rows if isinstance(row, Training) and row.client == "lab"] == [len(BAD) + 1]
    assert math.isfinite(summarise(rows).train_seconds)
    toy_federation(f"federation.num_rounds={len(BAD) + 1}", disturb=lie, resume=True)


HARM = "\x1b]52;c;ZWNobyBvd25lZA==\x07\x9b31m‮" + "x" * 10_000


def test_what_a_site_calls_its_error_is_harmless_where_it_is_kept(toy_federation, tmp_path: Path):
    def fail(node, ask, round, reply):
        hit = (node.desk.site.name, ask, round) == ("lab", "turn", 2)
        return Parcel({"error": HARM}) if hit else "as it is"

    toy_federation(disturb=fail)
    (reason,) = (
        row.failed["lab"] for row in read_rows(tmp_path / "run" / "ledger.jsonl") if getattr(row, "failed", {})
    )
    assert reason.startswith(r"\x1b]52;c;") and len(reason) == 300
    for name in ("ledger.jsonl", "log.jsonl", "metrics.prom"):
        assert is_tame((tmp_path / "run" / name).read_text(encoding="utf-8"))


def test_a_name_or_an_error_in_a_greeting_is_harmless(toy_federation, tmp_path: Path):
    def fail(node, ask, round, reply):
        hello = {"lab": Parcel({"error": HARM}), "bank": Parcel({"name": HARM[:100]})}
        return hello.get(node.desk.site.name, "as it is") if ask == "hello" else "as it is"

    with pytest.raises(RoundError, match="1 of 3 sites are there") as stopped:
        toy_federation("flower.deadline=0.3", disturb=fail)
    assert is_tame(str(stopped.value)) and len(str(stopped.value)) < 1500


@dataclass
class Node:
    node_id: int
    name: str
    status: str = "online"
    last_activated_at: str = ""


@dataclass
class Nodes:
    """A grid that knows nodes and loses messages."""

    nodes: list[Node]
    pushed: list[Message] = field(default_factory=list)

    def get_nodes(self) -> list[Node]:
        return self.nodes

    def push_messages(self, messages: list[Message]) -> list[str]:
        return []

    def pull_messages(self, identifiers: list[str]) -> list[Message]:
        return []


def hello(fleet: Fleet, node: int, name: str) -> str | None:
    return fleet.introduce(Reply(SentRequest(node, "", "hello", 0, "", 0.0), Parcel({}), said=Statement(name)))


@pytest.fixture
def fleet() -> Fleet:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    grid = Nodes([Node(1, "lab"), Node(2, "bank", "offline"), Node(3, "")])
    fleet = Fleet(grid, {}, ("bank", "depot", "lab"))
    fleet.look()
    return fleet


def test_a_registered_name_is_binding_though_the_node_is_away(fleet: Fleet):
    fleet.grid.nodes = [Node(1, "lab", "offline"), Node(2, "bank")]
    fleet.look()
    assert "registered as 'lab'" in str(hello(fleet, 1, "bank"))
    fleet.grid.nodes = []
    fleet.look()
    assert "registered as 'bank'" in str(hello(fleet, 2, "lab"))
    assert hello(fleet, 1, "lab") is None and fleet.names == {"lab": 1}


def test_a_registered_name_is_nobody_elses(fleet: Fleet):
    assert "which another node is registered as" in str(hello(fleet, 3, "bank"))
    assert hello(fleet, 3, "depot") is None and hello(fleet, 2, "bank") is None
    assert fleet.names == {"depot": 3, "bank": 2}


@pytest.mark.parametrize(
    ("late", "words", "kept"),
    [
        (lambda reply: reply.payloads, "rests on version 1", 1),
        (lambda reply: reply.payloads * 50, "50 payloads where one", 0),
        (lambda reply: (bytes(10_000_000),), "refused: ", 0),
    ],
)
def test_a_late_reply_is_checked_before_it_is_kept(toy_federation, tmp_path: Path, late, words: str, kept: int):
    class Lagging(DeskGrid):
        """Lab's first answer to round 2 comes in round 3."""

        def handed(self, message: Message) -> str:
            identifier = super().handed(message)
            if self.log[-1] == ("lab", "turn", 2) and self.log.count(("lab", "turn", 2)) == 1:
                round, identifier, reply = self.arriving.pop()
                held = unpack_parcel(reply.content)
                self.arriving.append((round + 1, identifier, _changed(message, held.facts, late(held))))
            return identifier

    overrides = ("flower.grace=0.02", "flower.deadline=20", "output.keep_payloads=true")
    toy_federation(*overrides, grid=Lagging(settings(*overrides), tmp_path))
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    (reason,) = (row.late["lab"] for row in rows if isinstance(row, Roll) and row.late)
    assert "update of round 2 came after" in reason and words in reason
    counted = [row for row in rows if isinstance(row, Transfer) and (row.client, row.direction) == ("lab", "up")]
    files = [path for path in (tmp_path / "run" / "payloads").iterdir() if "-lab-up-" in path.name]
    assert len(counted) == len(files) == 2 + kept


def _changed(message: Message, facts: dict, payloads: tuple[bytes, ...]) -> Message:
    return Message(pack_parcel(Parcel(facts, payloads)), reply_to=message)


def _relayed(ask) -> Parcel:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(pack_parcel(Parcel({"ask": "hello"})), 1, "query")
    message.metadata.__dict__.update(_message_id="1", _run_id=1, _src_node_id=1)
    return unpack_parcel(client.relay(message, Context(1, 1, {}, RecordDict(), {"settings": ""}), ask).content)


def test_the_relay_tells_the_server_no_paths_and_the_site_all(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    socket, token = tmp_path / "secret-folder.sock", tmp_path / "secret-folder.token"
    with caplog.at_level(logging.WARNING, "fedloom.relay"):
        said = _relayed(lambda parcel, _: call_worker(parcel, socket, token, patience=-1))
    assert "its token cannot be read" in said.facts["error"] and "secret-folder" not in str(said.facts)
    assert str(socket) in caplog.text and str(token) in caplog.text


@given(WHOLE)
def test_what_the_relay_did_not_expect_stays_at_the_site(text: str):
    def broken(parcel: Parcel, context: Context) -> Parcel:
        raise ValueError(f"/home/site/{text}")

    logging.getLogger("fedloom.relay").disabled = True
    try:
        said = _relayed(broken).facts["error"]
    finally:
        logging.getLogger("fedloom.relay").disabled = False
    assert said == "the site's relay failed; the SuperNode's log says why"
