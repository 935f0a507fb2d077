"""Noise on single examples at a site: it is charged for before it is drawn, and an ε over all jobs is kept."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import tomli_w
import torch

from fedloom.errors import AuditError, ConfigError, PolicyRefusal
from fedloom.model.identity import base_digest
from fedloom.noise.accounting import SampledNoise, example_epsilon
from fedloom.records.configfile import parse
from fedloom.site import examples, summary
from fedloom.site.audit import AuditTrail, sampled_noise
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.examples import check_budget, check_protects
from fedloom.site.policy import check_settings
from fedloom.site.protocol import Parcel
from fedloom.site.rules import ExamplePrivacy, Policy, Spending

NOISE = SampledNoise(0.1, 1.0, 10)
STRICT = Policy(example_privacy=ExamplePrivacy(max_epsilon=4.0))


@pytest.fixture
def trail(tmp_path):
    return AuditTrail(tmp_path / "audit")


def charge(trail, draw="a", job="job", round=1, mu=None):
    found = trail.find_charge(job, round, NOISE, draw, mu)
    return found or trail.charge_examples(job, round, NOISE, draw, 0.01, mu)


def test_a_draw_is_charged_once_until_something_left_with_it(trail):
    first = charge(trail)
    assert charge(trail).digest == first.digest and len(trail.lines()) == 1  # the site was killed and trained again
    others = [charge(trail, "b"), charge(trail, round=2), charge(trail, job="other"), charge(trail, mu=0.5)]
    assert len({first.digest, *(line.digest for line in others)}) == 5
    trail.record(b"payload", "job", 1, None, charge=first.digest)
    assert charge(trail).digest != first.digest
    lines, moved, unlisted = trail.verify()
    assert len(lines) == 7 and not moved and not unlisted
    assert sampled_noise(lines) == (replace(NOISE, steps=60),) and trail.count_spent("job", 1).sampled[0].steps == 60


def test_a_charge_that_was_made_smaller_shows(trail):
    charge(trail)
    line = json.loads(trail.path.read_text())
    assert line["sampled"] == {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 10}
    line["sampled"]["steps"] = 1
    trail.path.write_text(json.dumps(line) + "\n")
    with pytest.raises(AuditError, match="altered"):
        trail.lines()


def test_the_record_says_what_examples_and_what_sites_have_spent(trail, monkeypatch):
    trail.record(b"noisy", "job", 1, None, charge=charge(trail).digest)
    trail.record(b"sum", "job", 2, None, summed=0.25)
    said = summary.summarise_record(*trail.verify())
    worth = example_epsilon([NOISE], 0.01)
    assert any(
        f"at example level: 10 steps over all jobs together; ε = {worth:.3g} at δ = 0.01" in line for line in said
    )
    assert any("in secure sums at site level: ρ = 0.25" in line for line in said)
    assert not any("without noise" in line for line in said)
    trail.record(b"bare", "job", 3, None)
    assert any(line.startswith("1 payloads left without noise") for line in summary.summarise_record(*trail.verify()))

    def missing(spent, delta):
        raise ConfigError("pip install 'fedloom[privacy]'")

    monkeypatch.setattr(summary, "example_epsilon", missing)
    assert any("10 steps over all jobs; pip install" in line for line in summary.summarise_record(*trail.verify()))


def test_a_job_without_noise_on_examples_is_refused_where_the_site_asks_for_it():
    job, plain = (parse({"training": training}, "a test") for training in ({"dp": {"epsilon": 3.0}}, {}))
    check_protects(STRICT, job)
    check_protects(Policy(), plain)
    check_settings(STRICT, job, "ada", 1)
    with pytest.raises(PolicyRefusal, match=r"the job has no training.dp; policy.example_privacy") as caught:
        check_settings(STRICT, plain, "ada", 1)
    assert caught.value.public == "refused by the site's policy: training.dp is not set"


def test_a_spent_budget_stops_a_turn_with_its_sentence():
    within = [NOISE] * 10
    assert example_epsilon(within, 1 / 200) <= 4.0 < example_epsilon([*within, NOISE], 1 / 200)
    check_budget(STRICT, Spending(sampled=tuple(within[:-1])), NOISE, 200)
    spent = Spending(sampled=tuple(within))
    with pytest.raises(PolicyRefusal, match=r"would bring ε at example level to 4.*max_epsilon is 4") as caught:
        check_budget(STRICT, spent, NOISE, 200)
    assert caught.value.public == "refused by the site's policy: its privacy budget for examples is used up"
    check_budget(Policy(), spent, NOISE, 200)
    check_budget(STRICT, spent, None, 200)
    assert examples.delta_for(STRICT, 200) == 1 / 200 and examples.delta_for(Policy(), 1) == 0.5
    tight = Policy(example_privacy=ExamplePrivacy(delta=1e-6))
    assert examples.delta_for(tight, 200) == 1e-6 and math.isfinite(examples.delta_for(Policy(), 7))


SETTINGS = {
    "federation": {"participants": ["bank", "lab"], "num_rounds": 3, "seed": 1},
    "training": {"max_steps": 1, "per_device_train_batch_size": 2, "dp": {"noise_multiplier": 2.0, "delta": 1e-5}},
    "data": {"template": "plain", "max_length": 32},
    "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "method": {"name": "fedit"},
}


def opened(base, state, **policy):
    paths = {"model": str(base / "model"), "data": str(base / "data.jsonl"), "state": str(state)}
    return Desk(SiteConfig(name="lab", device="cpu", threads=1, policy=Policy(**policy), **paths))


def ask(desk, round=1, what="turn"):
    facts = {"ask": what, "job": "a" * 16, "settings": tomli_w.dumps(SETTINGS), "round": round, "counted": round - 1}
    return desk.answer(Parcel({**facts, "base": base_digest(desk.site.model)}))


def test_a_site_that_is_killed_sends_the_same_noisy_bits_and_pays_once(tmp_path, base, monkeypatch):
    threads = torch.get_num_threads()
    plain = opened(base, tmp_path / "plain")
    whole = ask(plain)
    assert "error" not in whole.facts and whole.facts["loss"] is None
    (tmp_path / "killed").mkdir(mode=0o700)
    for key in ("order.key", "noise.key"):
        shutil.copy(tmp_path / "plain" / key, tmp_path / "killed" / key)
    limit = examples.example_epsilon([SampledNoise(1.0, 2.0, 1)], 1e-5) * 1.01
    strict = ExamplePrivacy(max_epsilon=limit, delta=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(Desk, "keep", lambda *held: 1 / 0)
        killed = opened(base, tmp_path / "killed", example_privacy=strict)
        assert "error" in ask(killed).facts and len(killed.trail.lines()) == 1
        killed.close()
    again = opened(base, tmp_path / "killed", example_privacy=strict)
    assert len(again.trail.lines()) == 1
    assert ask(again).payloads == whole.payloads
    assert "privacy budget for examples is used up" in ask(again, 2).facts["error"]
    lines = again.trail.verify()[0]
    assert [bool(line.payload) for line in lines] == [False, True] and lines[1].charge == lines[0].digest
    other = opened(base, tmp_path / "other")
    assert ask(other).payloads != whole.payloads
    for desk in (plain, again, other):
        desk.close()
    torch.set_num_threads(threads)
