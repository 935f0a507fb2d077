"""A run whose held-out loss is higher in the end than at the start says so in its ledger, once, and resumed as well."""

from dataclasses import dataclass, field

import pytest

from fedloom.model.evaluate import Scores
from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.ledger import Note, read_rows
from toy import initial
from toy_run import ToySetup, simulation, toy_setup


@dataclass(frozen=True)
class Scored(ToySetup):
    """Loses `step` nats of loss, or gains them, from evaluation to evaluation."""

    step: float = 0.0
    seen: list[int] = field(default_factory=list)

    def evaluate(self, state: object) -> dict[str, Scores]:
        self.seen.append(1)
        return {"bank": Scores(0.0, 5.0 + self.step * len(self.seen), 10, 40)}


@pytest.mark.parametrize(("step", "notes"), [(0.5, 1), (-0.5, 0), (0.0, 0)])
def test_it_is_noted_in_the_last_round(tmp_path, step, notes):
    config: Config = parse({"federation": {"num_rounds": 3, "eval_every": 1}, "method": {"name": "fedit"}}, "here")
    plain = toy_setup(config, 2, initial())
    setup = Scored(plain.config, plain.job, plain.initial, plain.sites, step=step)
    with simulation(setup, tmp_path / "run") as rounds:
        rounds.play(resume=False)
    found = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Note)]
    worse = [row for row in found if "ended worse than it began: held-out loss 5.500" in row.text]
    assert len(worse) == notes and all(row.round == 3 for row in worse)
