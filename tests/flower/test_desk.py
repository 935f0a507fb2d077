"""A desk against a server that means harm: what is refused leaves nothing, and noise is always counted."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import desks
import pytest

import toy
from fedloom.flower.settings import shared_settings
from fedloom.model.identity import base_digest
from fedloom.records.ledger import Roll, read_rows
from fedloom.rounds.turns import server_turn
from fedloom.site.desk import Desk
from fedloom.site.places import MOST_PLACES
from fedloom.site.privacy import Privacy
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.site.store import Store
from fedloom.workspace.assemble import base_form

pytestmark = pytest.mark.flower
JOB = "0123456789abcdef"
NOISE = Policy(privacy=Privacy(clip_norm=1.0, noise_multiplier=2.0))
DESKS: list[Desk] = []


@pytest.fixture(autouse=True)
def closed():
    """Every desk lets go of its files at the end."""
    yield
    for desk in DESKS:
        desk.close()
    DESKS.clear()


@pytest.fixture
def loads(monkeypatch):
    """Settings that a model was loaded for, in order."""
    loaded = []

    def assemble(config, *arguments, load):
        loaded.append(config)
        return desks.assemble(config, *arguments)

    monkeypatch.setattr("fedloom.site.setups.build_setup", assemble)
    return loaded


def made(tmp_path: Path, policy: Policy | None = None) -> Desk:
    DESKS.append(Desk(desks.site("lab", tmp_path, policy)))
    return DESKS[-1]


def ask(desk: Desk, what: str, *overrides: str, job: str = JOB, round: int = 1, **facts) -> Parcel:
    asked = {"ask": what, "job": job, "settings": shared_settings(desks.settings(*overrides)), "round": round}
    return desk.answer(Parcel({**asked, "base": base_digest(desk.site.model), **facts}))


def refused(reply: Parcel, words: str = "refused by the site's policy") -> None:
    assert words in str(reply.facts["error"]) and not reply.payloads


def jobs(desk: Desk) -> list[Path]:
    return sorted(Path(desk.site.state).glob("jobs/*"))


def charged(desk: Desk) -> float:
    return desk.trail.count_spent(JOB, 1).mu_squared / NOISE.privacy.mu**2


@pytest.mark.parametrize("what", ["hello", "turn", "deliver"])
@pytest.mark.parametrize(
    ("policy", "override"),
    [
        (Policy(methods=("fedit",)), "method.name=florist"),
        (Policy(max_rank=8), "lora.r=9"),
        (Policy(max_rank=8), "clients.bank.rank_pattern={q_proj = 9}"),
        (Policy(max_steps=10), "training.max_steps=1000000"),
        (Policy(modules=("q_proj",)), "lora.target_modules=['lm_head']"),
    ],
)
def test_settings_that_are_not_allowed_load_and_leave_nothing(tmp_path, loads, what, policy, override):
    desk = made(tmp_path, policy)
    refused(ask(desk, what, override))
    assert loads == [] and jobs(desk) == []


@pytest.mark.parametrize("what", ["hello", "turn", "deliver"])
def test_what_is_refused_after_loading_leaves_nothing(tmp_path, loads, what):
    desk = made(tmp_path, Policy(min_examples=4, order="run"))
    refused(ask(desk, what))
    assert len(loads) == 1 and jobs(desk) == [] and desk.place is None


def test_a_job_that_nothing_may_leave_for_is_not_begun(tmp_path, loads):
    desk = made(tmp_path, Policy(max_bytes_round="1000"))
    desk.trail.record(bytes(1000), JOB, 1, None)
    for what in ("hello", "turn"):
        refused(ask(desk, what), "max_bytes_round is used up")
    assert jobs(desk) == []


def test_a_refused_job_does_not_push_out_the_one_at_hand_nor_learn_of_it(tmp_path, loads):
    desk = made(tmp_path, Policy(methods=("fedit",)))
    assert "digest" in ask(desk, "hello", "method.name=fedit").facts
    own = ask(desk, "turn", "method.name=fedit", round=9)
    assert "digest" in own.facts
    other = ask(desk, "hello", "method.name=flora", job="f" * 16)
    refused(other)
    assert not {"version", "digest"} & set(other.facts)
    assert desk.place is not None and desk.place.job == JOB and len(loads) == 1


def test_garbage_is_collected_where_a_model_is_let_go_of_and_nowhere_else(tmp_path, monkeypatch):
    collected, loaded = [], []

    def assemble(config, *arguments, load):
        load.release()
        load._loaded, load._form = (None, None), base_form(config)
        loaded.append(config)
        return desks.assemble(config, *arguments)

    monkeypatch.setattr("gc.collect", lambda: collected.append(len(loaded)))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("fedloom.site.setups.build_setup", assemble)
    desk = made(tmp_path)
    ask(desk, "hello"), ask(desk, "turn")
    ask(desk, "hello", job="f" * 16)
    assert collected == []
    ask(desk, "hello", "model.dtype='bfloat16'", job="e" * 16)
    assert collected == [2] and [place.job for place in desk.places] == ["e" * 16], "one set of weights at a time"
    desk.release()
    assert collected == [2, 3] and not desk.shared.is_loaded
    shared = desks.assemble(desks.settings(), {name: [] for name in desks.SITES}, {})
    DESKS.append(Desk(desks.site("lab", tmp_path), lambda config: shared))
    for what in ("hello", "turn"):
        ask(DESKS[-1], what)
        DESKS[-1].close()  # as a simulation's processes do after every message
    assert len(collected) == 2


def test_jobs_stay_loaded_side_by_side_until_they_are_too_many_or_idle(tmp_path, loads):
    desk = made(tmp_path)
    jobs = [f"{number:016x}" for number in range(MOST_PLACES)]
    for round in (1, 2):
        for job in jobs:
            assert ask(desk, "turn", job=job, round=round).payloads
    assert len(loads) == MOST_PLACES, "one job at a time was loaded anew for every message"
    ask(desk, "hello", job=jobs[0])
    ask(desk, "hello", job="f" * 16)
    assert [place.job for place in desk.places] == [*jobs[2:], jobs[0], "f" * 16]
    ask(desk, "hello", "training.learning_rate=0.01", job=jobs[2])
    assert "error" in ask(desk, "turn", "training.learning_rate=0.01", job=jobs[2]).facts, "other settings, old folder"
    desk.places.get(jobs[3]).used -= 60
    desk.release(30)
    assert jobs[3] not in [place.job for place in desk.places] and len(desk.places) == MOST_PLACES - 1
    assert ask(desk, "turn", job=jobs[3], round=3).payloads, "what is let go of is read again"


def test_a_first_save_that_fails_leaves_nothing(tmp_path, loads, monkeypatch):
    def full(*arguments):
        raise OSError(28, "no space left on device")

    desk = made(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fedloom.site.store.save_contents", full)
        refused(ask(desk, "hello"), "could not take its turn: OSError")
    assert jobs(desk) == []
    assert "error" not in ask(desk, "hello").facts


def test_rounds_that_a_run_does_not_have_are_not_trained(tmp_path, loads):
    desk = made(tmp_path)
    for round in (0, 4, 2**40):
        refused(ask(desk, "turn", round=round), "SiteError")
    assert desk.trail.lines() == [] and jobs(desk) == []


def test_a_state_that_does_not_fit_on_the_disk_is_not_written(tmp_path, loads):
    desk = made(tmp_path, Policy(max_disk="1000"))
    for what in ("hello", "turn", "deliver"):
        refused(ask(desk, what), "max_disk is used up")
    assert jobs(desk) == []
    roomy = made(tmp_path, Policy(max_disk="1MiB"))
    assert ask(roomy, "turn").payloads


def test_a_turn_that_takes_too_long_is_refused_and_not_counted(tmp_path, loads):
    desk = made(tmp_path, Policy(max_seconds_round=1e-9))
    before = ask(desk, "hello").facts["digest"]
    refused(ask(desk, "turn"), "max_seconds_round is over")
    assert desk.trail.lines() == [] and desk.held is not None and desk.held.round == 0
    assert ask(desk, "hello").facts["digest"] == before


def test_the_servers_threads_mean_nothing_at_a_site(tmp_path, loads):
    desk = made(tmp_path)
    ask(desk, "hello", "model.threads=1000")
    assert loads[0].model.threads is None
    own = made(tmp_path)
    own.site = desk.site.model_copy(update={"threads": 3})
    ask(own, "hello", "model.threads=1000")
    assert loads[1].model.threads == 3


def test_the_order_of_examples_is_the_sites_and_outlives_a_crash(tmp_path, loads, monkeypatch):
    seeds: list[int] = []
    step = toy.step
    monkeypatch.setattr(toy, "step", lambda state, round, seed, **more: seeds.append(seed) or step(state, round, seed))
    sent = [ask(made(tmp_path / name, policy), "turn").payloads for name, policy in folders(tmp_path)]
    assert len(set(seeds)) == 3 and sent[0] != sent[1]
    desk = made(tmp_path / "run", Policy(order="run"))
    assert ask(desk, "turn", job="e" * 16).payloads and seeds[-1] == seeds[2], "the run's own seed knows no job"

    for path in jobs(made(tmp_path / "one"))[0].glob("*"):
        path.unlink()  # killed before the state was saved
    assert ask(made(tmp_path / "one", Policy()), "turn").payloads == sent[0]
    assert seeds[-1] == seeds[0]


def folders(tmp_path: Path):
    for name, order in (("one", "site"), ("other", "site"), ("run", "run")):
        (tmp_path / name).mkdir()
        yield name, Policy(order=order)


def test_noise_that_could_not_be_recorded_later_is_counted_all_the_same(tmp_path, loads, monkeypatch):
    desk = made(tmp_path, NOISE)
    with monkeypatch.context() as patch:
        patch.setattr(desk.trail, "record", lambda *arguments, **more: 1 / 0)
        refused(ask(desk, "turn"), "ZeroDivisionError")
    assert charged(desk) == pytest.approx(1)
    again = made(tmp_path, NOISE)
    assert ask(again, "turn").payloads == ask(desk, "turn").payloads
    lines, _, _ = again.trail.verify()
    assert [bool(line.payload) for line in lines] == [False, True, True] and charged(again) == pytest.approx(1)
    assert {line.charge for line in lines[1:]} == {lines[0].digest}


def test_every_draw_of_noise_is_charged(tmp_path, loads, monkeypatch):
    """A state that could not be saved is lost with its noise; the next try draws anew, for twice the price."""
    desk = made(tmp_path, NOISE)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", lambda *arguments: 1 / 0)
        refused(ask(desk, "turn"), "ZeroDivisionError")
    assert ask(desk, "turn").payloads
    assert charged(desk) == pytest.approx(2)


def test_no_noise_is_drawn_that_cannot_be_charged(tmp_path, loads, monkeypatch):
    drawn: list[object] = []
    monkeypatch.setattr("fedloom.site.guard.release_change", lambda *arguments: drawn.append(arguments))
    desk = made(tmp_path, NOISE)
    monkeypatch.setattr(desk.trail, "charge", lambda *arguments: 1 / 0)
    refused(ask(desk, "turn"), "ZeroDivisionError")
    assert drawn == [] and jobs(desk) == []


@pytest.mark.parametrize(
    "facts",
    [
        {"base": "x\n2026-01-01 INFO round 7 answered, privacy intact\x1b]52;c;aGk=\x07\x9b2K"},
        {"settings": "[lora]\nr = 4\n'\n2026-01-01 INFO forged\x1b' = 1"},
        {"settings": '[federation]\nparticipants = ["\\u001b[2K\\nINFO forged"]\nnum_rounds = 3'},
        {"ask": "x\nINFO forged"},
        {"settings": "x = " + "9" * 5000},
        {"settings": "x = " + "[" * 5000},
    ],
)
def test_what_a_server_writes_stays_on_its_line_of_the_log(tmp_path, loads, caplog, facts):
    caplog.set_level(logging.INFO, logger="fedloom.worker")
    assert "error" in ask(made(tmp_path), "hello", **facts).facts
    assert caplog.records and all(record.getMessage().isprintable() for record in caplog.records)


def test_a_traceback_in_the_log_is_marked(tmp_path, loads, caplog, monkeypatch):
    def broken(*arguments, load):
        raise ValueError("one\nINFO forged\x1b[2K")

    monkeypatch.setattr("fedloom.site.setups.build_setup", broken)
    refused(ask(made(tmp_path), "hello"), "ValueError")
    first, *more = caplog.records[-1].getMessage().split("\n")
    assert first.isprintable() and len(more) > 3
    assert all(line.startswith("  | ") and line.isprintable() for line in more)


def test_a_server_that_goes_back_a_round_is_followed(tmp_path, loads):
    desk = made(tmp_path)
    first = ask(desk, "turn", round=1).payloads
    for round in (2, 3):
        ask(desk, "turn", round=round)
    assert ask(desk, "turn", round=1).payloads == first
    held = made(tmp_path)
    ask(held, "hello")
    assert held.held is not None and held.held.round == 1


def test_fed_sb_runs_at_desks_from_the_first_round_to_the_last(toy_federation, tmp_path):
    """From round 2 on the r × r matrix travels alone; it was taken for a leak."""
    federation, grid = toy_federation("method.name=fed-sb", policies={"lab": NOISE})
    rolls = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Roll)]
    assert [roll.answered for roll in rolls] == [desks.SITES] * 3
    for name in desks.SITES:
        held = grid.node(name).desk.held
        assert held is not None and held.after.digest == federation.server.digest
    lines, _, _ = grid.node("lab").desk.trail.verify()
    assert (
        math.isclose(grid.node("lab").desk.trail.count_spent("", 1).mu_squared, 3 * NOISE.privacy.mu**2)
        and len(lines) == 6
    )


def test_a_desk_holds_a_state_once_and_finds_the_reply_on_disk(tmp_path, loads):
    """The reply, the payloads of the request and the adapter of before the first round stayed in memory."""
    desk = made(tmp_path)
    first = ask(desk, "turn", "method.name=fedit", round=1)
    held = desk.held
    assert held is not None and held.payload == b"" and held.payload_bytes == len(first.payloads[0])
    assert all(tensor.is_meta for tensor in desk.place.setup.initial.tensors().values())
    broadcast = server_turn(desk.place.setup.job, held.before, {"lab": first.payloads[0]}, 1).payload
    facts = {"job": JOB, "settings": shared_settings(desks.settings("method.name=fedit")), "counted": 1}
    asked = {"ask": "turn", "round": 2, "base": base_digest(desk.site.model), **facts}
    parcel = Parcel(asked, (broadcast,)).used_up()
    second = desk.answer(parcel)
    assert second.payloads and parcel.payloads == []
    again = Parcel(asked, (broadcast,))
    assert desk.answer(again).payloads == second.payloads and again.payloads == (broadcast,)
    assert len(desk.trail.verify()[0]) == 3
