"""What the in-process engine records of clients that lie: refusals, shares that were held, numbers that changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.compress.entries import Dense
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Note, read_rows
from fedloom.rounds.job import Job
from fedloom.rounds.step import Train
from fedloom.rounds.turns import ClientTurn, client_turn
from fedloom.wire import Message, decode, encode
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.plan import caps_of
from toy import initial
from toy_run import simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
LIAR = "client-0001"


def play(out: Path, monkeypatch, lie, *, clients: int = 3, resume: bool = False, **settings: object):
    """Three rounds in which what LIAR sends is what `lie(round, header, entries)` makes of it; (run, notes)."""
    config = load_config(
        TESTBED / "demo.toml",
        ["federation.num_rounds=3", "federation.eval_every=0", "method.name=fedit"]
        + [f"federation.{key}={value}" for key, value in settings.items()],
    )
    setup = toy_setup(config, clients, initial())
    run = replace(setup.job, caps=caps_of(config.federation, setup.sites))

    def turn(job: Job, client: str, state: State, payloads: list[bytes], train: Train, round: int) -> ClientTurn:
        done = client_turn(job, client, state, payloads, train, round)
        trained = replace(done.trained, num_examples=10)
        message = decode(done.payload)
        header, entries = replace(message.header, num_examples=10), dict(message.entries)
        if client == LIAR:
            header, entries = lie(round, header, entries)
            trained = replace(trained, num_examples=header.num_examples)
        return replace(done, payload=encode(Message(header, entries)), trained=trained)

    monkeypatch.setattr("fedloom.server.local.client_turn", turn)
    monkeypatch.setattr("fedloom.server.loop.finish_run", lambda *arguments: None)
    with simulation(replace(setup, job=run), out, resume=resume) as done:
        done.play(resume=resume)
    monkeypatch.undo()
    return done, [(row.round, row.text) for row in read_rows(out / "ledger.jsonl") if isinstance(row, Note)]


def scalar(round, header, entries):
    return header, entries | {min(entries): Dense((), torch.ones(1))}


def honest(round, header, entries):
    return header, entries


def test_an_update_that_cannot_be_averaged_is_refused_by_name_and_the_run_goes_on(tmp_path, monkeypatch):
    done, notes = play(tmp_path / "run", monkeypatch, scalar)
    assert done.server.version == 3
    assert [round for round, text in notes if text.startswith(f"client {LIAR} refused: ") and "shape ()" in text] == [
        1,
        2,
        3,
    ]


def test_a_share_that_was_held_is_noted(tmp_path, monkeypatch):
    def greedy(round, header, entries):
        return replace(header, num_examples=10**9 if round == 2 else 10), entries

    _, notes = play(tmp_path / "run", monkeypatch, greedy)
    held = [(round, text) for round, text in notes if "federation.max_share is 0.5" in text]
    assert [round for round, _ in held] == [2] and LIAR in held[0][1]
    changed = [(round, text) for round, text in notes if "the last time" in text]
    assert changed == [
        (2, f"client {LIAR} says 1,000,000,000 examples, and said 10 the last time"),
        (3, f"client {LIAR} says 10 examples, and said 1,000,000,000 the last time"),
    ]


def test_the_operators_number_overrides_what_a_client_says(tmp_path, monkeypatch):
    def greedy(round, header, entries):
        return replace(header, num_examples=10**9), entries

    plain, _ = play(tmp_path / "plain", monkeypatch, honest)
    told, notes = play(tmp_path / "told", monkeypatch, greedy, client_examples=f"{{'{LIAR}' = 10}}")
    assert not any("max_share" in text for _, text in notes)
    for name, tensor in plain.server.adapter.tensors().items():
        assert torch.equal(tensor, told.server.adapter.tensors()[name])


def test_a_number_that_changed_is_noted_after_a_resume_as_well(tmp_path, monkeypatch):
    def growing(round, header, entries):
        return replace(header, num_examples=10 + round), entries

    _, whole = play(tmp_path / "whole", monkeypatch, growing)
    save, saved = RunFolder.save, []

    class Crash(BaseException):
        pass

    def crash(self, snapshot):
        save(self, snapshot)
        saved.append(snapshot)
        if len(saved) == 3:  # the start, round 1, round 2
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", crash)
        with pytest.raises(Crash):
            play(tmp_path / "cut", patch, growing)
    _, resumed = play(tmp_path / "cut", monkeypatch, growing, resume=True)
    assert resumed == whole and len([text for _, text in whole if "the last time" in text]) == 2


def test_numbers_for_a_client_that_takes_no_part_are_refused():
    config = load_config(TESTBED / "demo.toml", ["federation.client_examples={'bnak' = 10}"])
    with pytest.raises(ConfigError, match="'bnak', which takes no part; there are bank, lab"):
        caps_of(config.federation, {"bank": LoraState(), "lab": LoraState()})
