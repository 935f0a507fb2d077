"""A site's policy in whole runs: what the server sees, what the site keeps on record, what a repeated request costs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import toy
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.methods.table import build
from fedloom.records.ledger import Note, Roll, Training, Transfer, read_rows
from fedloom.site.audit import AuditTrail
from fedloom.site.privacy import Privacy
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy

pytestmark = pytest.mark.flower
NOISE = Privacy(clip_norm=1.0, noise_multiplier=2.0)


def rows(tmp_path: Path):
    return read_rows(tmp_path / "run" / "ledger.jsonl")


def trail(grid, name):
    return AuditTrail(Path(grid.node(name).desk.site.state) / "audit")


def test_all_that_left_a_site_is_on_its_record(toy_federation, tmp_path):
    _, grid = toy_federation()
    for name in ("bank", "depot", "lab"):
        lines, moved, _ = trail(grid, name).verify()
        sent = [
            row.bytes
            for row in rows(tmp_path)
            if isinstance(row, Transfer) and (row.client, row.direction) == (name, "up")
        ]
        assert [line.bytes for line in lines] == sent and [line.round for line in lines] == [1, 2, 3] and not moved


def test_with_noise_the_loss_stays_at_the_site_and_every_round_is_counted(toy_federation, tmp_path):
    federation, grid = toy_federation(policies={"lab": Policy(privacy=NOISE)})
    losses = {row.client: row.loss for row in rows(tmp_path) if isinstance(row, Training)}
    assert math.isnan(losses["lab"]) and losses["bank"] == 1.0
    assert math.isclose(trail(grid, "lab").count_spent("", 1).mu_squared, 3 * NOISE.mu**2)
    assert trail(grid, "bank").count_spent("", 1).mu_squared == 0
    held = grid.node("lab").desk.held
    assert held is not None and held.after.digest == federation.server.digest


def test_the_same_request_again_gets_the_same_noise_and_costs_no_more_privacy(toy_federation):
    repeats = []

    def asked_twice(node, ask, round, reply):
        if node.desk.site.name == "lab" and ask == "turn":
            repeats.append(reply.payloads)
            desk = node.desk
            held, place = desk.held, desk.place
            again = Parcel(
                {"ask": "turn", "job": place.job, "settings": place.settings, "base": desk._base, "round": round},
            )
            counted = Parcel({**again.facts, "counted": round - 1}, again.payloads)
            repeats.append(unpack_parcel(pack_parcel(desk.answer(counted))).payloads)
            assert desk.held is held
        return "as it is"

    _, grid = toy_federation(disturb=asked_twice, policies={"lab": Policy(privacy=NOISE)})
    assert len(repeats) == 6 and all(first == second for first, second in zip(repeats[::2], repeats[1::2], strict=True))
    lines = trail(grid, "lab").lines()
    assert len([line for line in lines if line.payload]) == 6
    assert len({line.payload for line in lines if line.payload}) == 3 == len([li for li in lines if not li.payload])
    assert math.isclose(trail(grid, "lab").count_spent("", 1).mu_squared, 3 * NOISE.mu**2)


def test_once_the_privacy_budget_is_used_up_the_round_goes_on_without_the_site(toy_federation, tmp_path):
    two = Privacy(clip_norm=1.0, noise_multiplier=2.0, delta=1e-6, max_epsilon=8.0)
    _, grid = toy_federation(policies={"lab": Policy(privacy=two)})
    rolls = [row for row in rows(tmp_path) if isinstance(row, Roll)]
    answered = [("lab" in roll.answered) for roll in rolls]
    assert answered == [True, True, False]
    assert (
        "privacy budget is used up" in rolls[-1].failed["lab"] and "8" not in rolls[-1].failed["lab"].partition("(")[0]
    )
    assert len([line for line in trail(grid, "lab").lines() if line.payload]) == 2


def test_a_byte_budget_ends_a_sites_part_whatever_the_job(toy_federation, tmp_path):
    _, grid = toy_federation()
    sizes = [line.bytes for line in trail(grid, "lab").lines()]
    limit = Policy(max_bytes_day=str(sum(sizes) + sizes[0]), order="run")
    toy_federation(policies={"lab": limit}, out="second")
    told = [row for row in read_rows(tmp_path / "second" / "ledger.jsonl") if isinstance(row, Roll)]
    assert ["lab" in roll.answered for roll in told] == [True, False, False]
    assert "max_bytes_day is used up" in told[-1].failed["lab"]


def test_epochs_are_held_to_a_sites_steps_and_tell_nothing_of_its_examples(toy_federation, tmp_path, monkeypatch):
    """Three examples in batches of 16: an epoch is a step. Who allows two of them refuses three, without the reason."""
    step = toy.trainer(build("fedsrd"))
    train = lambda state, round, seed: replace(step(state, round, seed), steps=3)  # noqa: E731
    monkeypatch.setattr("desks.ToySetup.train", lambda setup, client, interrupt=None: train)
    epochs = [
        "training.max_steps=null",
        "training.num_train_epochs=3.0",
        "federation.num_rounds=1",
        "flower.grace=0.02",
    ]
    policies = {"lab": Policy(order="run", max_steps=2), "bank": Policy(order="run", declared_examples=9)}
    toy_federation(*epochs, policies=policies)
    told = [row.text.split("(reference")[0] for row in rows(tmp_path) if isinstance(row, Note)]
    assert any("refused by the site's policy" in text for text in told)
    assert not any("steps" in text or "epochs" in text for text in told)
    steps = {(row.client, row.steps) for row in rows(tmp_path) if isinstance(row, Training)}
    assert steps == {("bank", 0), ("depot", 3)}
