"""Secure aggregation in the local engine: the sum exactly, whoever vanishes; settings that do not go with it."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.methods.method import State
from fedloom.methods.table import METHODS, build
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Note, Training, Transfer, read_rows, totals
from fedloom.report.answers import count_answers
from fedloom.report.numbers import human_bytes, summarise
from fedloom.report.tables import traffic_table
from fedloom.rounds import secure
from fedloom.rounds.secure import mean_update
from fedloom.rounds.turns import start, sum_turn
from fedloom.secagg import Grid, count_talk, unpack_vector
from fedloom.server import secret, sums
from fedloom.server.loop import Rounds
from fedloom.server.secret import SecretSites
from fedloom.workspace.privacy import describe_masked, plan_sums
from fedloom.workspace.resumption import dump_fixed
from toy import initial, ranks
from toy_run import simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"


def configure(*settings):
    fixed = ["federation.num_rounds=3", "federation.eval_every=0", "method.name=fedit"]
    return load_config(TESTBED / "demo.toml", [*fixed, "privacy.secure_aggregation=true", *settings])


def play(config, folder, clients, *, resume=False):
    with simulation(toy_setup(config, clients, initial()), folder, resume=resume) as run:
        run.play(resume=resume)
    return run, read_rows(folder / "ledger.jsonl")


def play_rounds(config, folder, clients):
    """The rounds alone: no result is delivered, nothing is drawn."""
    with simulation(toy_setup(config, clients, initial()), folder) as run:
        run.folder.ledger.append(run.setup.describe())
        for run.round in range(1, config.federation.num_rounds + 1):
            run.play_round(run.round)
    return run, read_rows(folder / "ledger.jsonl")


class Twin:
    """Adds up in the clear, with Python's integers, what the sites have masked; keeps the server's states."""

    def __init__(self, patch):
        self.vectors, self.found, self.states = {}, [], []
        make, mean = secret.make_vector, sums.mean_update

        def making(job, state, client, payload, round, noise=None):
            made = make(job, state, client, payload, round, noise)
            self.vectors[round, client] = made[0]
            return made

        def averaging(job, state, total, sites, round):
            self.found.append((round, total.tolist()))
            self.states.append((job, state, round, sites))
            return mean(job, state, total, sites, round)

        patch.setattr(secret, "make_vector", making)
        patch.setattr(sums, "mean_update", averaging)

    def sum_of(self, round, clients, bits, count):
        vectors = [unpack_vector(self.vectors[round, name], count, bits, name).tolist() for name in clients]
        return [sum(values) % 2**bits for values in zip(*vectors, strict=True)]


def summary_text(rows):
    screen = Console(file=io.StringIO(), width=100)
    screen.print(traffic_table(summarise(rows)))
    return screen.file.getvalue()


def secure_state(setup):
    return start(setup.job, setup.initial)


def summed_in(rows, round):
    """Whose vectors came in a round: by the rows of the ledger alone."""
    return [row.client for row in rows if isinstance(row, Transfer) and (row.round, row.kind) == (round, "masked")]


@pytest.mark.parametrize("bits", [32, 19])
def test_of_twenty_sites_five_vanish_and_the_sum_is_that_of_the_others_exactly(tmp_path, monkeypatch, bits):
    twin = Twin(monkeypatch)
    phases = iter(("turn", "announce", "share", "mask", "open"))
    leaving = {f"client-{number:04d}": next(phases) for number in (1, 4, 9, 13, 19)}
    monkeypatch.setattr(
        "fedloom.server.loop.draw_attendance",
        lambda config, clients, round: secret.Attendance(tuple(sorted(clients)), frozenset(leaving)),
    )
    monkeypatch.setattr(SecretSites, "draw_leaving", lambda self, round, client: leaving[client])
    run, rows = play_rounds(configure("federation.num_rounds=1", f"privacy.bits={bits}"), tmp_path / "run", 20)
    ((round, total),) = twin.found
    there = summed_in(rows, round)
    assert len(there) == 16, "who vanishes after its vector was masked is in the sum"
    assert total == twin.sum_of(round, there, bits, len(total))
    notes = " ".join(row.text for row in rows if isinstance(row, Note))
    for client, phase in leaving.items():
        assert f"client {client} dropped out " + ("after" if phase == "turn" else "of the secure sum") in notes


def test_the_mean_is_that_of_the_updates_in_the_clear_but_for_rounding(tmp_path):
    hidden, rows = play_rounds(configure(), tmp_path / "hidden", 4)
    plain, _ = play_rounds(configure("privacy.secure_aggregation=false"), tmp_path / "plain", 4)
    pairs = zip(hidden.server.adapter.tensors().items(), plain.server.adapter.tensors().items(), strict=True)
    for (name, one), (other, two) in pairs:
        assert name == other and torch.allclose(one, two, atol=1e-4) and not torch.equal(one, two)
    assert all(math.isnan(row.loss) and not row.examples for row in rows if isinstance(row, Training))
    assert summarise(rows).totals.bytes_up == sum(
        row.bytes for row in rows if isinstance(row, Transfer) and row.direction == "up"
    )
    for way, size in zip(("up", "down"), count_talk(list(hidden.sites)), strict=True):
        said = [row.bytes for row in rows if isinstance(row, Transfer) and row.is_talk and row.direction == way]
        assert sum(said) == 3 * 4 * size, "what the protocol takes beside the vectors is known beforehand"
    assert "nan" not in summary_text(rows)
    kinds = Counter(row.kind for row in rows if isinstance(row, Transfer) and row.direction == "up")
    assert kinds == {"sum:keys": 12, "sum:shares": 12, "masked": 12, "sum:agreement": 12, "sum:opening": 12}
    assert {held.answered for held in count_answers(rows).values()} == {3}


@pytest.mark.parametrize("name", sorted(name for name in METHODS if build(name).adds))
def test_every_method_that_adds_is_averaged_as_in_the_clear(tmp_path, name):
    settings = [f"method.name={name}", "federation.num_rounds=2", "federation.weighting=uniform", "privacy.clip=16.0"]
    hidden, rows = play_rounds(configure(*settings), tmp_path / "hidden", 3)
    plain, _ = play_rounds(configure(*settings, "privacy.secure_aggregation=false"), tmp_path / "plain", 3)
    assert not [row for row in rows if isinstance(row, Note)]
    first = initial().tensors()
    moved = max(float((tensor - first[key]).abs().max()) for key, tensor in plain.server.adapter.tensors().items())
    for key, tensor in hidden.server.adapter.tensors().items():
        assert torch.allclose(tensor, plain.server.adapter.tensors()[key], atol=max(2e-2 * moved, 1e-5)), name


def test_a_round_with_too_few_sites_is_skipped_and_leaves_everybody_as_if_never_asked(tmp_path, monkeypatch):
    settings = ["method.name=flasc", "privacy.least_cohort=4", "federation.num_rounds=2"]
    monkeypatch.setattr(SecretSites, "draw_leaving", lambda self, round, client: "mask")
    monkeypatch.setattr(
        "fedloom.server.loop.draw_attendance",
        lambda config, clients, round: secret.Attendance(
            tuple(sorted(clients)), frozenset(["client-0002"] if round == 1 else [])
        ),
    )
    run, rows = play_rounds(configure(*settings), tmp_path / "run", 4)
    notes = [row.text for row in rows if isinstance(row, Note) and row.round == 1]
    assert any("only 3 of 4 sites have sent their vectors, 4 are needed; not client-0002" in text for text in notes)
    assert run.server.version == 1, "the second round was averaged"


def test_a_grid_that_falls_with_the_learning_rate_gives_the_same_mean(tmp_path):
    course = ["training.lr_scheduler_type=linear", "privacy.clip=9.0"]
    falling = configure(*course, "privacy.clip_schedule=learning_rate")
    hidden, _ = play_rounds(falling, tmp_path / "hidden", 3)
    plain, _ = play_rounds(configure(*course, "privacy.secure_aggregation=false"), tmp_path / "plain", 3)
    for name, tensor in plain.server.adapter.tensors().items():
        assert torch.allclose(hidden.server.adapter.tensors()[name], tensor, atol=1e-4)
    sums = hidden.setup.job.secure
    assert [sums.grid_of(round).reach for round in (1, 2, 3, 4)] == [pytest.approx(r, rel=1e-6) for r in (9, 6, 3, 9)]


def test_a_run_goes_on_after_a_kill_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.server.loop.finish_run", lambda *about: None)  # nothing is drawn
    config = configure("method.name=fedit", "federation.drop_out=0.3", "federation.num_rounds=4")
    whole, rows = play(config, tmp_path / "whole", 7)
    aggregate = Rounds.aggregate

    def die(self, updates, round):
        if round == 3:
            raise KeyboardInterrupt
        aggregate(self, updates, round)

    monkeypatch.setattr(Rounds, "aggregate", die)
    with pytest.raises(KeyboardInterrupt):
        play(config, tmp_path / "killed", 7)
    monkeypatch.setattr(Rounds, "aggregate", aggregate)
    again, found = play(config, tmp_path / "killed", 7, resume=True)
    assert again.server.digest == whole.server.digest and totals(found) == totals(rows)
    for name, tensor in again.server.adapter.tensors().items():
        assert torch.equal(tensor, whole.server.adapter.tensors()[name])


def test_weights_travel_in_digits_where_the_grid_is_coarse(tmp_path):
    setup = toy_setup(configure("privacy.bits=8", "privacy.most_examples=5000"), 3, initial())
    sums = setup.job.secure
    assert sums.grid.most == 42 and sums.digits("examples") == 3 and sums.digits("uniform") == 1
    digits = [secure._digits_of(weight, 43, 3) for weight in (5000, 1, 43)]
    assert sum(int(total) * 43**place for place, total in enumerate(sum(digits))) == 5044
    assert max(sum(digits)) < 2**7
    assert [sums.weight(count, "examples") for count in (0, 7, 10**9)] == [1, 7, 5000]


def test_a_sum_that_no_honest_sites_have_is_no_mean():
    setup = toy_setup(configure(), 3, initial())
    state = secure_state(setup)
    values = secure.count_values(setup.job, state, 1)
    total = torch.zeros(values).numpy().astype("uint32")
    with pytest.raises(secure.SecureSumError, match=r"3 sites weigh 0 together: expected 3 to 30,000"):
        mean_update(setup.job, state, total, 3, 1)
    total[-1] = 6
    turn = sum_turn(setup.job, state, mean_update(setup.job, state, total, 3, 1), 1)
    for name, tensor in turn.state.adapter.tensors().items():
        assert torch.equal(tensor, state.adapter.tensors()[name]), "nobody has changed anything"


def test_where_both_sides_know_what_may_be_sent_the_sum_is_of_that_alone(tmp_path):
    """Half of each A: the others stay as they are, and the vector is shorter by them."""

    def support(state, context):
        return {f"{module}/A": torch.arange(0, pair.A.numel(), 2) for module, pair in state.adapter.items()}

    setup = toy_setup(configure(), 3, initial())
    whole = secure.count_values(setup.job, secure_state(setup), 1)
    job = replace(setup.job, method=replace(setup.job.method, support=support))
    halves = sum(pair.A.numel() // 2 for pair in setup.initial.values())
    assert secure.count_values(job, secure_state(setup), 1) == whole - halves
    with simulation(replace(setup, job=job), tmp_path / "run") as run:
        run.round = 1
        run.play_round(1)
    for name, tensor in run.server.adapter.tensors().items():
        moved = (tensor != setup.initial.tensors()[name]).flatten()
        assert moved[::2].all() and moved[1::2].any() == name.endswith("B")


@pytest.mark.parametrize("bits", [8, 16])
def test_what_both_sides_draw_keeps_to_the_budget_in_the_bits_of_the_sum(tmp_path, bits):
    """Said once: as many values as there was room for signs, and every one of them took 32 bits under masks."""
    config = configure("method.name=loom", "method.positions=shared", f"privacy.bits={bits}", "privacy.clip=0.5")
    setup = toy_setup(config, 3, initial())
    job = replace(setup.job, budget=Budget(size=240))
    room = 2 * 240 * 0.42
    with simulation(replace(setup, job=job), tmp_path / "run") as run:
        run.round = 1
        run.play_round(1)
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    sizes = [row.bytes for row in rows if isinstance(row, Transfer) and row.kind == "masked"]
    assert len(sizes) == 3 and all(room - 110 < size <= room for size in sizes)
    signs = replace(job, secure=None, quantize=quantize("sign"))
    in_the_clear = signs.method.support(secure_state(setup), signs.context(1))
    assert sum(map(len, in_the_clear.values())) > 2 * secure.count_values(job, secure_state(setup), 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("privacy.clip=0.01",),
            r"% of its change's values were cut at privacy.clip, 0.01; the largest was 0\.\d+",
        ),
        (
            ("privacy.bits=5", "privacy.clip=2.0"),
            r"changed it by [1-9]\d*\.\d times its own size: more privacy.bits",
        ),
        (("privacy.bits=12", "privacy.clip=0.7"), ""),
    ],
)
def test_a_grid_that_does_not_fit_the_updates_is_told_of(tmp_path, settings, said):
    config = configure("federation.num_rounds=1", "federation.weighting=uniform", *settings)
    _, rows = play_rounds(config, tmp_path / "run", 3)
    notes = [row.text for row in rows if isinstance(row, Note)]
    assert len(notes) == (3 if said else 0)
    for text in notes:
        assert re.search(rf"client client-000\d: the grid of the secure sum is unfit: .*{said}", text), text


def test_thresholds():
    sums = secure.Secure(Grid(1.0, 32, 20))
    assert [sums.threshold_of(sites) for sites in (2, 3, 4, 20)] == [3, 3, 3, 14]
    assert replace(sums, threshold=0.55).threshold_of(20) == 11
    assert replace(sums, threshold=15).threshold_of(20) == 15
    assert replace(sums, threshold=2, least_cohort=2).threshold_of(20) == 11, "more than half, whatever is asked"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("method.name=flora",), "the updates of method 'flora' do not add.* use one of .*fedit"),
        (("federation.mode=buffered",), "each comes by itself and from a version of its own"),
        (("federation.regions=2",), "exclude each other"),
        (("federation.max_norm_ratio=5.0",), "max_norm_ratio does not go with .*: it compares the norms of single"),
        (("federation.max_share=0.9",), "privacy.most_examples bounds what a site counts for"),
        (("privacy.least_cohort=5",), "privacy.least_cohort is 5, but a round asks 4 clients"),
        (("federation.fraction_train=0.5",), "privacy.least_cohort is 3, but a round asks 2 clients"),
        (("privacy.threshold=9",), "privacy.threshold is 9, but a round asks 4 clients"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_its_reason(settings, words):
    config = configure(*settings)
    with pytest.raises(ConfigError, match=words):
        plan_sums(config, build(config.method.name), dict.fromkeys("abcd", ranks(4)))


def test_bits_that_hold_no_sum_are_refused():
    with pytest.raises(ConfigError, match=r"privacy.bits is 4: 4 bits cannot hold a sum of 9 sites: expected at leas"):
        plan_sums(configure("privacy.bits=4"), build("fedit"), dict.fromkeys("abcdefghi", ranks(4)))


def test_clients_that_train_other_things_are_refused():
    with pytest.raises(ConfigError, match="c differs from a: what only some train would be the sum of those alone"):
        plan_sums(configure(), build("fedit"), {"a": ranks(4), "b": ranks(4), "c": ranks(2)})


def test_what_a_site_sends_is_what_a_method_has_in_its_sums():
    """LoRA-XS sends r² values a module, whatever the adapter has."""
    setup = toy_setup(configure("method.name=lora-xs", "method.factors=random"), 3, initial())
    sent = 4 * secure.count_values(setup.job, State(setup.initial), 1)
    assert sent < setup.initial.numel()
    assert f"every site sends {human_bytes(sent)} a round" in describe_masked(setup.job, setup.initial)


def test_that_a_budget_is_not_kept_under_masks_is_said():
    for name, words in (("loom", "every site sends 1.0 KiB a round. Method 'loom'"), ("fedit", "")):
        setup = toy_setup(configure(f"method.name={name}"), 3, initial())
        said = describe_masked(setup.job, setup.initial)
        assert words in said and bool(words) == bool(said)
        few = toy_setup(configure(f"method.name={name}", "privacy.bits=8"), 3, initial())
        for made, told in ((setup, "a value takes 32 bits of wire.budget; with privacy.bits = 4"), (few, "")):
            known = replace(made.job, method=replace(made.job.method, support=lambda state, context: {}))
            said = describe_masked(known, made.initial)
            assert said == "" if name == "fedit" or not told else told in said


def test_without_it_a_run_is_the_run_that_it_was():
    plain = load_config(TESTBED / "demo.toml")
    assert "privacy" not in dump_fixed(plain) and "privacy" in dump_fixed(configure())
    assert plan_sums(plain, build("flora"), {}) is None
