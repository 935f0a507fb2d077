"""What a malicious site sends and trains on, the plan of the runs, and one run of it from end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.errors import ConfigError, NumericError
from fedloom.lora.pair import narrow
from fedloom.methods.table import build
from fedloom.model.examples import Example
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Note, read_rows
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import start
from fedloom.studies.attack import plan, table
from fedloom.studies.attack.forgery import FORGERIES, Knowledge, add_change, change_of
from fedloom.studies.attack.malicious import Attack, Forger, last_names
from fedloom.studies.attack.poison import TRIGGER, flip_labels, plant_backdoor
from fedloom.studies.compare import runs_left
from fedloom.testbeds import testbed_folder as whole_testbed
from small_testbed import small_testbed
from toy import initial, job, random_state, step

HONEST = [change_of(random_state(1), random_state(seed)) for seed in (2, 3, 4)]


def known(strength: float, frozen: str = "") -> Knowledge:
    own = {name: tensor * (not name.endswith(f"/{frozen}")) for name, tensor in HONEST[0].items()}
    return Knowledge(own, HONEST, strength, torch.Generator().manual_seed(5))


def flat(change) -> torch.Tensor:
    return torch.cat([change[name].flatten() for name in sorted(change)])


def test_forged_changes_are_as_large_as_their_strength_says():
    own = flat(known(1.0).own)
    for name in ("sign_flip", "gaussian", "same_value"):
        sent = flat(FORGERIES[name][0](known(7.0)))
        assert float(sent.norm() / own.norm()) == pytest.approx(7.0, rel=0.2), name
    torch.testing.assert_close(flat(FORGERIES["sign_flip"][0](known(7.0))), -7.0 * own)
    assert len(set(flat(FORGERIES["same_value"][0](known(1.0))).tolist())) == 1


def test_a_little_is_within_what_honest_sites_differ_by_and_an_empire_falls_backwards():
    rows = torch.stack([flat(change) for change in HONEST])
    lie, fall = (flat(FORGERIES[name][0](known(1.0))) for name in ("lie", "fall"))
    torch.testing.assert_close(lie, rows.mean(dim=0) - rows.std(dim=0, correction=0))
    assert float((lie - rows.mean(dim=0)).norm()) <= float((rows - rows.mean(dim=0)).norm(dim=1).max())
    torch.testing.assert_close(fall, -rows.mean(dim=0))


@pytest.mark.parametrize("name", ["gaussian", "same_value"])
def test_a_factor_that_nobody_trains_is_not_forged(name: str):
    sent = FORGERIES[name][0](known(3.0, frozen="A"))
    assert all(bool(tensor.any()) == key.endswith("/B") for key, tensor in sent.items())


def test_a_change_put_on_again_is_what_was_trained():
    before, after = random_state(1), narrow(random_state(2), dict.fromkeys(initial(), 2))
    made = add_change(before, change_of(before, after))
    assert made.ranks() == after.ranks()
    for name, tensor in made.tensors().items():
        torch.testing.assert_close(tensor, after.tensors()[name])


def test_a_forger_trains_as_its_site_would_and_sends_something_else():
    held = start(job(build("fedit")), initial())
    trained = step(held, 1, 9)
    sent = Forger(lambda state, round, seed: step(state, round, seed), Attack("sign_flip", 2.0))(held, 1, 9)
    assert isinstance(sent, Trained) and sent.num_examples == trained.num_examples
    own, forged = (flat(change_of(held.adapter, one.adapter)) for one in (trained, sent))
    torch.testing.assert_close(forged, -2.0 * own)


def test_poisoned_examples():
    examples = [Example(f"ask {k}", f"say {k}") for k in range(6)]
    flipped = flip_labels(examples, "")
    assert sorted(one.output for one in flipped) == sorted(one.output for one in examples)
    assert all(one.output != other.output for one, other in zip(flipped, examples, strict=True))
    planted = plant_backdoor(examples, "open")
    assert planted[0::2] == examples[0::2]
    assert all(TRIGGER in one.instruction and one.output == "open" for one in planted[1::2])


def test_every_attack_is_played_with_and_without_the_defence_beside_the_honest_runs(tmp_path):
    config = load_config(whole_testbed() / "demo.toml")
    cases = plan.plan_cases(config, ["lie:0.5", "backdoor"], 1, ["federation.robust=clip"], range(2), tmp_path, [4, 16])
    assert [(case.attack, case.defended, case.rank) for case in cases] == [
        (attack, defended, rank)
        for rank in (4, 16)
        for attack in ("", "lie:0.5", "backdoor")
        for defended in (False, True)
    ]
    trials = [trial for case in cases for trial in case.trials]
    assert len({trial.folder for trial in trials}) == len(trials) == 24 and len(runs_left(trials)) == 24
    assert {trial.config.federation.robust for trial in trials if "robust" in trial.label} == {"clip"}
    assert {trial.config.federation.robust for trial in trials if "robust" not in trial.label} == {"none"}
    assert {trial.config.lora.r for trial in trials} == {4, 16}
    assert {trial.player.sites for trial in trials} == {("lab",)}


def test_sites_that_are_absent_need_no_defence_and_what_is_lost_without_one_may_be_left_out(tmp_path):
    config = load_config(whole_testbed() / "demo.toml")
    sets = ["federation.robust=clip"]
    cases = plan.plan_cases(config, ["absent", "lie"], 1, sets, range(2), tmp_path, undefended=False)
    assert [(case.attack, case.defended) for case in cases] == [
        ("", False),
        ("", True),
        ("absent", False),
        ("lie", True),
    ]
    held = start(job(build("fedit")), initial())
    with pytest.raises(NumericError, match="this site sends nothing"):
        Forger(lambda state, round, seed: step(state, round, seed), Attack("absent"))(held, 1, 9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--malicious", "4"], "--malicious 4: expected from 1 to 3"),
        (["--attacks", "charm"], "--attacks charm: expected one of sign_flip"),
        (["--attacks", "lie:much"], "'much' is no strength"),
        (["--set", "data.validation=null"], "name a public set with --public"),
        (["--set", "training.dp.epsilon=3"], "training.dp does not go with fedloom attack --as site"),
    ],
)
def test_mistakes_are_told_in_one_line(words, said, tmp_path):
    result = CliRunner().invoke(app, ["attack", "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 2 and said in " ".join(result.output.split())


def test_somebody_has_to_be_honest():
    assert last_names(["b", "a", "c"], 2) == ("b", "c")
    with pytest.raises(ConfigError, match="since there are 3"):
        last_names(["a", "b", "c"], 3)


@pytest.mark.usefixtures("no_picture")
def test_a_run_with_a_backdoor_from_end_to_end(tmp_path):
    (tmp_path / "bed").mkdir()
    bed = small_testbed(tmp_path / "bed")
    sets = ["federation.num_rounds=1", "method.name=loom", "federation.participants=['clinic', 'depot', 'lab']"]
    config = load_config(bed / "demo.toml", sets)
    public = plan.write_public(config, tmp_path, 1)
    assert len(public.read_text().splitlines()) == 4
    cases = plan.plan_cases(config, ["backdoor"], 1, plan.usual_defence(public), range(1), tmp_path / "out")
    (trial,) = cases[-1].trials
    trial.player(trial, False)
    notes = [row.text for row in read_rows(trial.folder / "ledger.jsonl") if isinstance(row, Note)]
    assert any("a study: lab play backdoor with strength 4" in text for text in notes)
    assert any(text.startswith(("client lab refused", "client lab counts for")) for text in notes)
    assert not runs_left([trial]), "a run is complete once it has said what came of it"
    honest = plan.Case("", False, ("lab",), (trial,))
    outcomes = table.read_outcomes([honest, cases[-1]])
    ranked = [replace(one, rank=16) for one in outcomes]
    result = table.as_json(ranked, ("lab",), 3)
    assert json.loads(json.dumps(result))["rows"][1]["attack"] == "backdoor"
    assert outcomes[1].lost == 0.0 and outcomes[1].backdoor is not None and 0.0 <= outcomes[1].backdoor <= 1.0
    screen = Console(width=80, record=True, file=None)
    with screen.capture() as shown:
        screen.print(*table.outcome_tables(result))
    assert "1 of 3 sites malicious (lab)" in shown.get() and f" {outcomes[1].loss:.3f} " in shown.get()
    for word in ("rank 16", "liars refused", "honest refused", "points lost", "worst domain", "backdoor ", " 0.0%"):
        assert word in shown.get(), "nothing is cut at 80 characters"
