"""The Flower engine's rounds: the same bytes as the local engine's, and what happens when sites fail, lie or lag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from desks import LATE, LOST, SITES, DeskGrid, assemble, settings

from fedloom.compress.entries import Dense
from fedloom.errors import ConfigError, RoundError
from fedloom.flower.settings import join_settings, server_settings, shared_settings
from fedloom.lora.pair import digest
from fedloom.model.evaluate import Scores
from fedloom.records.events import Silent
from fedloom.records.ledger import Note, Roll, RunRow, Transfer, read_rows, totals
from fedloom.report import summarise
from fedloom.server.attendance import Attendance
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.wire import Message, decode, describe, encode
from fedloom.workspace import folder
from fedloom.workspace.folder import RunFolder

pytestmark = pytest.mark.flower


def local(
    tmp_path: Path,
    *overrides: str,
    absent: dict[int, tuple[str, ...]] | None = None,
    out: str = "local",
    resume: bool = False,
):
    """The local engine's run on the same made-up models; `absent` says who is not asked, by round."""
    config = settings(*overrides)

    class Course(LocalSites):
        def collect(self, rounds: Rounds, present: Attendance) -> dict[str, bytes]:
            asked = tuple(name for name in present.asked if name not in (absent or {}).get(rounds.round, ()))
            return super().collect(rounds, replace(present, asked=asked))

    with RunFolder.open(tmp_path / out, config, resume=resume) as folder:
        setup = assemble(config, dict.fromkeys(SITES, []), {})
        course = Rounds(setup, folder, Silent(), Course(setup))
        course.play(resume)
    return course


def state(server) -> tuple[str, ...]:
    return server.version, server.digest, digest(server.adapter), digest(server.frozen)


def rolls(tmp_path: Path) -> list[Roll]:
    return [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Roll)]


def notes(tmp_path: Path) -> str:
    return "\n".join(row.text for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Note))


def payloads(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "payloads").iterdir()}


def only(site: str, round: int, outcome):
    """Disturb one site's turn in one round, the first time it is asked; all else arrives as it is."""
    times = iter(range(1000))

    def disturb(node, ask, number, reply):
        hit = (node.desk.site.name, ask, number) == (site, "turn", round) and next(times) == 0
        return outcome(node, reply) if hit else "as it is"

    return disturb


def spoilt(change):
    """An outcome that changes the entries of the update."""

    def outcome(node, reply):
        message = decode(reply.payloads[0])
        return Parcel(reply.facts, (encode(Message(*change(message.header, dict(message.entries)))),))

    return outcome


@pytest.mark.parametrize("method", ["fedsrd", "florist", "fedit", "flora", "fedkseed", "hiso", "sparseloco"])
def test_payloads_and_states_are_those_of_the_local_engine(toy_federation, tmp_path: Path, method: str):
    overrides = [f"method.name={method}", "output.keep_payloads=true", "federation.fraction_train=0.7"]
    federation, grid = toy_federation(*overrides)
    simulation = local(tmp_path, *overrides)
    assert state(federation.server) == state(simulation.server)
    assert payloads(tmp_path / "run") == payloads(tmp_path / "local")
    for name in SITES:
        held = grid.node(name).desk.held.after
        assert state(held) == state(simulation.sites.states[name])
        assert held.memory.keys() == simulation.sites.states[name].memory.keys()
    sums = [totals(read_rows(tmp_path / out / "ledger.jsonl")) for out in ("run", "local")]
    assert sums[0] == sums[1]


def test_shares_that_bound_a_liar_and_its_refusal_are_those_of_the_local_engine(toy_federation, tmp_path: Path):
    """By a loss that grows with the adapter somebody is refused in every round; the bits are the same all the same."""
    overrides = ["method.name=loom", "output.keep_payloads=true", "federation.robust=clip"]
    overrides += ["federation.clip_ratio=1.0", "federation.public=unread.jsonl", "federation.public_tolerance=0.0"]
    federation, _ = toy_federation(*overrides)
    simulation = local(tmp_path, *overrides)
    assert state(federation.server) == state(simulation.server)
    assert payloads(tmp_path / "run") == payloads(tmp_path / "local")
    assert "the error on federation.public is" in notes(tmp_path)
    assert "federation.public" not in shared_settings(federation.setup.config), "a site is not told what passes"


def test_a_site_that_is_lost_on_the_way_is_asked_again_and_counted_once(toy_federation, tmp_path: Path):
    def restart(node, reply):
        node.last_activated_at = "second start"

    federation, grid = toy_federation("flower.deadline=20", disturb=only("lab", 2, restart))
    assert state(federation.server) == state(local(tmp_path).server)
    assert grid.log.count(("lab", "turn", 2)) == 2
    assert rolls(tmp_path)[1].answered == SITES


def test_how_often_a_run_is_evaluated_may_change_when_it_goes_on():
    """Sites were told, and refused the job as one with other settings."""
    given, before = settings("federation.eval_every=2"), settings("federation.eval_every=1")
    told = shared_settings(given)
    assert told == shared_settings(before)
    assert join_settings(told, server_settings(given)) == given


def test_the_baseline_has_the_attendance_of_the_run(toy_federation, tmp_path: Path, monkeypatch):
    """What FedIT sends is what the baseline says, asked again or not; both engines tell the same."""
    real = folder.transfer_row

    def plain(round, client, direction, payload):
        size = 4 * sum(tensor.values for tensor in describe(payload).tensors)
        return replace(real(round, client, direction, payload), bytes=size)

    monkeypatch.setattr(folder, "transfer_row", plain)
    fedit = "method.name=fedit"
    local(tmp_path, fedit)
    toy_federation(fedit)
    toy_federation(fedit, out="lossy", disturb=only("lab", 2, lambda node, reply: LOST))
    same, other, lossy = (summarise(read_rows(tmp_path / name / "ledger.jsonl")) for name in ("local", "run", "lossy"))
    assert same.baseline == other.baseline
    for report in (same, other, lossy):
        assert report.totals.bytes == report.baseline.bytes > 0
        assert sum(report.delivered.values()) == report.baseline.delivery > 0
    assert lossy.baseline.down > other.baseline.down, "lab was sent its broadcast twice"


def test_an_error_of_flowers_own_is_no_failure_of_the_site(toy_federation, tmp_path: Path):
    federation, grid = toy_federation("flower.deadline=20", disturb=only("bank", 3, lambda node, reply: LOST))
    assert state(federation.server) == state(local(tmp_path).server)
    assert grid.log.count(("bank", "turn", 3)) == 2


def test_rounds_go_on_without_a_silent_site_and_its_residual_is_taken_back(toy_federation, tmp_path: Path):
    federation, grid = toy_federation(disturb=only("lab", 2, lambda node, reply: None))
    simulation = local(tmp_path, absent={2: ("lab",)})
    assert state(federation.server) == state(simulation.server)
    for name, tensor in simulation.sites.states["lab"].memory.items():
        assert tensor.equal(grid.node("lab").desk.held.after.memory[name])
    assert rolls(tmp_path)[1].failed == {"lab": "did not answer in time"}


def test_a_late_update_is_refused_by_its_round(toy_federation, tmp_path: Path):
    hold = only("lab", 2, lambda node, reply: LATE)
    federation, _ = toy_federation("flower.grace=0.02", "flower.deadline=20", disturb=hold)
    assert state(federation.server) == state(local(tmp_path, absent={2: ("lab",)}).server)
    late = {site: reason for roll in rolls(tmp_path) for site, reason in roll.late.items()}
    assert "update of round 2 came after" in late["lab"] and "rests on version 1" in late["lab"]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (lambda node, reply: Parcel(reply.facts, (b"FLOM" + bytes(100),)), "refused: "),
        (lambda node, reply: Parcel(reply.facts, (reply.payloads[0][:-9],)), "damaged or cut"),
        (lambda node, reply: Parcel(reply.facts, reply.payloads * 2), "2 payloads where one"),
        (lambda node, reply: Parcel(reply.facts), "0 payloads where one"),
        (spoilt(lambda header, entries: (replace(header, base_version=0), entries)), "rests on version 0"),
        (spoilt(lambda header, entries: (replace(header, round=1), entries)), "update of round 1 arrived in round 2"),
        (
            spoilt(lambda header, entries: (replace(header, kind="change", result_digest=""), entries)),
            "of kind 'change'",
        ),
        (spoilt(lambda header, entries: (header, _filled(entries, float("nan")))), "NaN or infinity"),
        (spoilt(lambda header, entries: (header, _filled(entries, 1e4))), "the round's median is"),
        (spoilt(lambda header, entries: (header, _filled(entries, 1e6))), "federation.max_norm is 1e+06"),
        (spoilt(lambda header, entries: (replace(header, num_examples=2**62), entries)), "1,000,000,000 at most"),
        (spoilt(lambda header, entries: (replace(header, result_digest="ab" * 16), entries)), "'lab' as its sender"),
        (spoilt(lambda header, entries: (header, _scalar(entries))), "has shape ()"),
        (spoilt(lambda header, entries: (header, _grown(entries))), "at most 1,040"),
    ],
)
def test_a_bad_update_is_refused_and_reported_and_the_round_goes_on(toy_federation, tmp_path, outcome, reason):
    federation, _ = toy_federation("method.name=fedit", disturb=only("lab", 2, outcome))
    assert state(federation.server) == state(local(tmp_path, "method.name=fedit", absent={2: ("lab",)}).server)
    assert reason in rolls(tmp_path)[1].failed["lab"]
    assert f"client lab: {rolls(tmp_path)[1].failed['lab']}" in notes(tmp_path)


def _filled(entries: dict, value: float) -> dict:
    return {name: Dense(entry.shape, entry.values * 0 + value) for name, entry in entries.items()}


def _scalar(entries: dict) -> dict:
    return entries | {min(entries): Dense((), torch.ones(1))}


def _grown(entries: dict) -> dict:
    name, entry = min(entries.items())
    shape = (entry.shape[0] * 1000, *entry.shape[1:])
    return entries | {name: Dense(shape, entry.values.repeat(1000))}


def test_an_update_replayed_from_an_earlier_round_is_refused(toy_federation, tmp_path: Path):
    kept = []

    def replay(node, ask, round, reply):
        if (node.desk.site.name, ask) != ("bank", "turn"):
            return "as it is"
        kept.append(reply)
        return kept[0]

    federation, _ = toy_federation(disturb=replay)
    absent = dict.fromkeys((2, 3, 4), ("bank",))
    assert state(federation.server) == state(local(tmp_path, absent=absent).server)
    assert all("rests on version 0" in roll.failed["bank"] for roll in rolls(tmp_path)[1:])


def test_a_round_without_enough_answers_stops_the_run_and_resumes_to_the_same_bits(toy_federation, tmp_path: Path):
    gone = [True]

    def away(node, ask, round, reply):
        return None if gone[0] and round >= 3 and node.desk.site.name != "bank" else "as it is"

    overrides = ["flower.deadline=0.1"]
    with pytest.raises(RoundError, match="round 3: 1 of 3 sites answered in 2 tries") as stopped:
        toy_federation(*overrides, disturb=away)
    assert "--resume" in str(stopped.value)
    assert (tmp_path / "run" / "checkpoints" / "round-00002.safetensors").exists()
    gone[0] = False
    federation, grid = toy_federation("flower.deadline=30", disturb=away, resume=True)  # [flower] may be changed
    assert state(federation.server) == state(local(tmp_path).server)
    assert {ask for _, ask, round in grid.log if round in (1, 2)} == set()


class Crash(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_server_that_dies_before_its_checkpoint_counts_nothing_twice(toy_federation, tmp_path, call, monkeypatch):
    original, calls = RunFolder.save, iter(range(1000))

    def crash(self, snapshot):
        if next(calls) == call:
            raise Crash
        original(self, snapshot)

    monkeypatch.setattr(RunFolder, "save", crash)
    with pytest.raises(Crash):
        toy_federation()
    monkeypatch.setattr(RunFolder, "save", original)
    federation, grid = toy_federation(resume=True)
    simulation = local(tmp_path)
    assert state(federation.server) == state(simulation.server)
    assert grid.node("lab").desk.held.after.memory.keys() == simulation.sites.states["lab"].memory.keys()
    for name, tensor in simulation.sites.states["lab"].memory.items():
        assert tensor.equal(grid.node("lab").desk.held.after.memory[name])


def test_a_site_with_another_past_is_sent_the_full_state(toy_federation, tmp_path: Path):
    def amnesia(node, reply):
        node.desk.release()
        for path in Path(node.desk.site.state).rglob("*.safetensors"):
            path.unlink()
        return None

    federation, grid = toy_federation("method.name=fedit", disturb=only("lab", 2, amnesia))
    assert state(grid.node("lab").desk.held.after)[0] == federation.server.version
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert [row.kind for row in rows if isinstance(row, Transfer) and row.client == "lab"].count("state") >= 1


def test_a_refusal_by_policy_is_told_without_its_reason(toy_federation, tmp_path: Path):
    policies = {"lab": Policy(max_update_norm=1e-9)}
    federation, _ = toy_federation(policies=policies)
    absent = dict.fromkeys(range(1, 4), ("lab",))
    assert state(federation.server) == state(local(tmp_path, absent=absent).server)
    reason = rolls(tmp_path)[0].failed["lab"]
    assert "refused by the site's policy" in reason and "1e-09" not in reason and "norm" not in reason


def test_a_reply_that_is_sent_again_counts_against_the_sites_bytes(toy_federation, tmp_path: Path):
    toy_federation("federation.num_rounds=1", out="probe")
    rows = [row for row in read_rows(tmp_path / "probe" / "ledger.jsonl") if isinstance(row, Transfer)]
    size = max(row.bytes for row in rows if row.direction == "up")

    def restart(node, reply):
        node.last_activated_at = "second start"

    policies = {"lab": Policy(max_bytes_round=str(int(1.5 * size)))}
    toy_federation("federation.num_rounds=1", policies=policies, disturb=only("lab", 1, restart))
    assert "max_bytes_round is used up" in rolls(tmp_path)[0].failed["lab"]


def test_a_job_that_a_site_does_not_allow_never_starts_there(toy_federation, tmp_path: Path):
    with pytest.raises(RoundError, match="1 of 3 sites are there") as stopped:
        toy_federation(policies=dict.fromkeys(("lab", "bank"), Policy(methods=("fedit",))))
    assert "method 'fedsrd' is not allowed" in str(stopped.value)


def test_a_name_belongs_to_one_connected_node_and_to_the_one_that_was_registered_with_it(toy_federation, tmp_path):
    def pretend(node, ask, round, reply):
        false = ask == "hello" and node.desk.site.name == "depot"
        return Parcel({**reply.facts, "name": "bank"}) if false else "as it is"

    grid = DeskGrid(settings(), tmp_path, pretend)
    grid.node("lab").name = "laboratory"
    with pytest.raises(RoundError, match="1 of 3 sites are there") as stopped:
        toy_federation(grid=grid)
    assert "registered as 'laboratory'" in str(stopped.value)
    assert "as another node that is connected does" in str(stopped.value)


def test_a_site_that_was_refused_may_mend_itself_and_take_part(toy_federation, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("fedloom.flower.fleet.GREET_SECONDS", 0.01)
    times = iter(range(1000))

    def mended(node, ask, round, reply):
        broken = ask == "hello" and node.desk.site.name == "lab" and next(times) < 2
        return Parcel({"error": "no data yet"}) if broken else "as it is"

    federation, grid = toy_federation("flower.deadline=30", disturb=mended)
    assert state(federation.server) == state(local(tmp_path).server)
    assert notes(tmp_path).count("no data yet") == 1


def test_the_ledger_says_what_the_run_is(toy_federation, tmp_path: Path):
    toy_federation()
    assert isinstance(read_rows(tmp_path / "run" / "ledger.jsonl")[0], RunRow)
    assert [roll.round for roll in rolls(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.participants=null", "federation.participants is missing"),
        ("federation.participants=['bank', 'bank']", "names a site twice"),
        ("flower.min_replies=4", "flower.min_replies is 4"),
        ("federation.drop_out=0.1", "drop out by themselves"),
    ],
)
def test_settings_that_cannot_go_across_machines_are_refused_at_once(override: str, words: str):
    from fedloom.flower.settings import check_flower_settings

    with pytest.raises(ConfigError, match=words):
        check_flower_settings(settings(override))


def test_a_site_whose_update_makes_the_round_fail_is_named_and_not_counted(toy_federation, tmp_path: Path, monkeypatch):
    """Its update passes every check, and the method stumbles over it: the others' round goes on without it."""
    from fedloom.rounds.cohort import Group

    plain = Group.__iter__

    def stumble(self):
        for update in plain(self):
            if update.client == "lab" and stumbling:
                raise IndexError("list index out of range")
            yield update

    stumbling = [True]
    monkeypatch.setattr(Group, "__iter__", stumble)
    federation, _ = toy_federation("method.name=fedit", "federation.num_rounds=1")
    assert "client lab refused: the round fails with its update: IndexError" in notes(tmp_path)
    assert [federation.sites.known[site].counted for site in SITES] == [1, 1, 0]
    stumbling.clear()
    overrides = ("method.name=fedit", "federation.num_rounds=1")
    assert state(federation.server) == state(local(tmp_path, *overrides, absent={1: ("lab",)}).server)


def test_a_round_with_too_few_updates_that_can_be_averaged_stops_the_run(toy_federation, monkeypatch):
    from fedloom.rounds.cohort import Group

    def stumble(self):
        raise IndexError("list index out of range")
        yield

    monkeypatch.setattr(Group, "__iter__", stumble)
    with pytest.raises(RoundError, match="1 usable update from 3 clients .* 2 needed"):
        toy_federation("method.name=fedit", "federation.num_rounds=1")


@pytest.mark.parametrize("method", ["fedsrd", "flora"])
def test_both_engines_stop_alike_and_leave_the_best_rounds_model(toy_federation, tmp_path: Path, monkeypatch, method):
    """The server scores the validation split, so that its sites need not know; round 1 of 6 is the best one."""
    scores = lambda setup, state: {"bank": Scores(0.0, abs(state.version - 1.25), 1)}  # noqa: E731
    monkeypatch.setattr("desks.ToySetup.validate", scores)
    judged = [f"method.name={method}", "federation.num_rounds=6", "federation.load_best_model_at_end=true"]
    judged += ["federation.early_stopping_patience=2", "federation.eval_every=1"]
    federation, grid = toy_federation(*judged)
    simulation = local(tmp_path, *judged)
    assert federation.round == 3 and federation.course.best == 1 and federation.server.version == 4
    assert state(federation.server) == state(simulation.server)
    first = local(tmp_path, f"method.name={method}", "federation.num_rounds=1", out="first")
    assert state(federation.server)[2:] == state(first.server)[2:]
    assert {state(grid.node(name).desk.held.after) for name in SITES} == {state(federation.server)}
    sums = [totals(read_rows(tmp_path / out / "ledger.jsonl")) for out in ("run", "local")]
    assert sums[0] == sums[1]
