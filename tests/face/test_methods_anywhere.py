"""A method of another package, or a `Method` value, wherever a method's name is expected."""

import pytest
import torch

import fedloom
from fedloom.errors import PolicyRefusal
from fedloom.methods.table import method_options
from fedloom.model.identity import base_digest
from fedloom.records.configfile import dump
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.policy import Policy
from fedloom.site.protocol import Request
from fedloom.studies import compare as studies
from fedloom.studies import estimate, pace, tune
from fedloom.wire import read_header
from toy import SHAPES, initial, job, trainer

NAME = "outside.methods:halves"


def said(run):
    """What a run's updates say of their method."""
    return {read_header(payload).method for payload in run.payloads}


def test_a_value_plays_what_its_name_plays(bed, halves, tmp_path):
    value = fedloom.run(bed, method=halves(keep=0.25))
    (tmp_path / "named.toml").write_text(dump(bed).replace('name = "fedsrd"', f'name = "{NAME}"\nkeep = 0.25'))
    named = fedloom.run(tmp_path / "named.toml")
    assert said(value) == {"halves"} and said(named) == {NAME}
    whole = fedloom.run(bed, method="fedit")
    for module, pair in value.adapter.items():
        assert pair.B.equal(named.adapter[module].B) and pair.A.equal(named.adapter[module].A)
    assert any(not pair.B.equal(whole.adapter[module].B) for module, pair in value.adapter.items())


def test_a_value_s_run_says_its_name_and_which_one_it_was(bed, halves):
    run = fedloom.run(bed, method=halves(keep=0.25), num_rounds=1)
    written = fedloom.load(run.folder / "config.toml").method
    assert written.name == run.report.run.method == "halves" and len(str(written.settings["fingerprint"])) == 32


def test_a_federation_in_memory_takes_a_value(halves):
    method = halves(keep=0.5)
    federation = fedloom.Federation(job(method), initial(), {"ada": None, "bob": None})
    result = federation.round(trainer(method))
    assert read_header(result.broadcast).method == "halves" and not result.refused
    cut = fedloom.to_dense(fedloom.decode(result.uploads["ada"]).entries["layers.0.q_proj/A"])
    assert cut[2:].count_nonzero() == 0 and cut[:2].count_nonzero() > 0


def test_values_and_names_are_compared_in_this_process(bed, halves):
    both = fedloom.compare(bed, [halves(keep=0.25), f"{NAME}:keep=0.25", "fedit"], num_rounds=1, seeds=1)
    assert list(both.reports) == ["halves", f"{NAME}:keep=0.25", "fedit"]


def test_processes_of_a_comparison_find_the_package(bed, halves):
    both = fedloom.compare(bed, [f"{NAME}:keep=0.25"], num_rounds=1, seeds=1, jobs=2)
    (report,) = both.reports[f"{NAME}:keep=0.25"]
    assert report.run.method == NAME and report.totals.bytes > 0


def test_a_trial_of_a_value_is_timed_with_that_value(bed, halves):
    asked = []
    method = fedloom.replace(halves(), advise=lambda adapter, context: asked.append(context.round) or "")
    assert pace.measure_pace(studies.with_method(bed, method), method).around_s > 0 and asked


def test_a_setting_of_such_a_method_is_searched(bed, halves, tmp_path):
    settings = fedloom.testbed(settings={"method.name": NAME, "federation.num_rounds": 1, "lora.r": 2})
    trials = tune.plan_search(settings, "method.keep", ["0.25", "0.75"], [], [0], tmp_path / "tuned")
    studies.play_here(trials, lambda trial, seconds: None)
    groups = studies.read_reports(trials)
    assert tune.choose(groups, "method.keep", ["0.25", "0.75"]).best.value in ("0.25", "0.75")
    assert [trial.config.method.settings for trial in trials] == [{"keep": 0.25}, {"keep": 0.75}]
    assert {report.run.method for reports in groups.values() for report in reports} == {NAME}


def test_such_a_method_is_estimated(bed, halves):
    settings = fedloom.testbed(settings={"method.name": NAME, "method.keep": 0.25})
    assert estimate.variant_of(settings) == f"{NAME}:keep=0.25"
    case = estimate.Case("toy", SHAPES, {client: dict.fromkeys(SHAPES, 4) for client in ("ada", "bob")})
    (row,) = estimate.run_estimate(case, [estimate.variant_of(settings)])["rows"]
    assert row["method"] == f"{NAME}:keep=0.25" and row["total_bytes"] > 0


def test_a_site_builds_such_a_method_where_its_policy_lists_it(bed, halves, tmp_path):
    class Built(Exception):
        pass

    def assembled(config):
        raise Built(fedloom.build(config.method.name, config.method.settings).name)

    settings = {"method.name": NAME, "method.keep": 0.25, "federation.participants": ["lab"]}
    request = Request("hello", "job", dump(fedloom.testbed(settings=settings)), base_digest(bed.model.path), 1, 0)
    for policy, outcome in ((Policy(methods=(NAME,)), Built), (Policy(), PolicyRefusal)):
        data = bed.data.source.replace("{client}", "lab")
        site = SiteConfig(name="lab", model=bed.model.path, data=data, state=str(tmp_path / "state"), policy=policy)
        with pytest.raises(outcome, match=NAME):
            Desk(site, assembled=assembled).open(request)


def test_settings_are_read_from_the_builder(halves):
    assert method_options(NAME) == {"keep": 0.5}
    assert torch.is_tensor(initial()["layers.0.q_proj"].A)
