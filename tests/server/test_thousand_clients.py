"""A thousand clients, 1 % a round, a hundred rounds, drop-outs of 30 %: it completes, memory is flat, bytes add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.lora.pair import LoraState
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Note, Training, read_rows, totals
from fedloom.server.loop import Rounds
from toy import initial
from toy_run import count_bytes, simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SETTINGS = ["federation.fraction_train=0.01", "federation.drop_out=0.3", "federation.eval_every=0"]


class Watch(Silent):
    """Notes, round by round, the bytes of all tensors that the participants hold between them, each storage once."""

    def __init__(self) -> None:
        self.simulation: Rounds | None = None
        self.held: list[int] = []
        self.objects: list[int] = []

    def round_finished(self, *facts: object) -> None:
        states = [self.simulation.server, *self.simulation.sites.states.values()]
        parts = {id(part): part for state in states for part in (state.adapter, state.frozen, state.tail)}
        storages = [tensor.untyped_storage() for part in parts.values() for tensor in part.tensors().values()]
        payloads = sum(map(len, self.simulation.archive.payloads.values()))
        self.held.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + payloads)
        self.objects.append(len({id(state.adapter) for state in states}))


@pytest.mark.parametrize("name", ["fedsrd", "florist"])
def test_a_thousand_clients(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(TESTBED / "demo.toml", [*SETTINGS, "federation.num_rounds=100", f"method.name={name}"])
    crossed, watch = count_bytes(monkeypatch), Watch()
    with simulation(toy_setup(config, 1000, initial()), tmp_path / "run", watch) as run:
        watch.simulation = run
        run.play(resume=False)
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    sums = totals(rows)
    assert crossed["up"] == crossed["heard"] == sums.bytes_up > 0
    assert crossed["down"] == sums.bytes_down > 0
    assert len(sums.by_client) == 1000, "after the last round everybody has received the result"
    trained = sum(isinstance(row, Training) for row in rows)
    vanished = sum("dropped out" in row.text for row in rows if isinstance(row, Note))
    assert trained + vanished == 1000 and 0.25 < vanished / 1000 < 0.35
    assert max(watch.objects) <= 3, "the server's, the latest of the clients' and the first"
    assert max(watch.held[10:]) <= 1.5 * max(watch.held[5:11]), "memory is flat"
    assert len({id(state.adapter) for state in run.sites.states.values()}) == 1
    assert {(state.version, state.digest) for state in run.sites.states.values()} == {
        (run.server.version, run.server.digest)
    }


def test_clients_far_back_hold_nothing_and_come_back_in_step(tmp_path: Path):
    """What was forgotten is replaced by the full state; private memory stays."""
    settings = [*SETTINGS, "federation.num_rounds=30", "method.name=fedsrd", "method.client_residual=0.9"]
    config = load_config(TESTBED / "demo.toml", settings)
    with simulation(toy_setup(config, 200, initial()), tmp_path / "run") as run:
        run.play(resume=False)
    with_memory = {client for client, state in run.sites.states.items() if state.memory}
    asked = {row.client for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Training)}
    assert with_memory == asked and len(asked) > 20
    assert len({id(state.adapter) for state in run.sites.states.values()}) == 1


def test_a_run_of_many_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after seven rounds of fifteen: shared and forgotten states come back from the checkpoint as they were."""
    config = load_config(TESTBED / "demo.toml", [*SETTINGS, "federation.num_rounds=15", "method.name=florist"])
    setup = toy_setup(config, 300, initial())
    with simulation(setup, tmp_path / "whole") as whole:
        whole.play(resume=False)
    play_round = Rounds.play_round

    def crash(self: Rounds, round: int) -> None:
        if round == 8:
            raise KeyboardInterrupt
        play_round(self, round)

    monkeypatch.setattr(Rounds, "play_round", crash)
    with pytest.raises(KeyboardInterrupt), simulation(setup, tmp_path / "broken") as broken:
        broken.play(resume=False)
    monkeypatch.undo()
    with simulation(setup, tmp_path / "broken", resume=True) as resumed:
        resumed.play(resume=True)
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")
    ]
    assert adapters[0] == adapters[1]
    sums = [totals(read_rows(tmp_path / name / "ledger.jsonl")) for name in ("whole", "broken")]
    assert sums[0] == sums[1] and resumed.server.digest == whole.server.digest


def test_a_checkpoint_of_many_clients_is_as_large_as_one_of_few(tmp_path: Path):
    sizes = []
    for clients in (4, 1000):
        config = load_config(TESTBED / "demo.toml", [*SETTINGS, "federation.num_rounds=1", "method.name=fedit"])
        with simulation(toy_setup(config, clients, LoraState(initial())), tmp_path / f"run{clients}") as run:
            run.play(resume=False)
        newest = sorted((tmp_path / f"run{clients}" / "checkpoints").iterdir())[-1]
        sizes.append(newest.stat().st_size)
    assert sizes[1] < sizes[0] + 1000 * 120, "a client in step costs a line"
