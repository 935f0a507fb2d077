"""`fedloom site`: what a person at a site reads before a yes, and what the commands leave behind."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom import testbeds
from fedloom.cli import main as cli
from fedloom.cli import site as command
from fedloom.flower.settings import shared_settings
from fedloom.model.identity import base_digest
from fedloom.records.configfile import load_config
from fedloom.site.approval import JobBook
from fedloom.site.audit import AuditTrail
from fedloom.site.config import load_site_config
from fedloom.site.dossier import describe_job, read_server, weigh_noise
from fedloom.site.policy import check_spending
from fedloom.site.presence import note_request
from fedloom.site.protocol import Request
from fedloom.site.prune import REMOVED
from fedloom.site.rehearsal import rehearse_turn
from fedloom.site.rules import Spending
from fedloom.site.told import read_told

MODEL = testbeds.testbed_folder() / "model"
JOB, NOW = "0123456789abcdef", datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
NOISE = "[policy.privacy]\nclip_norm = 1.0\nnoise_multiplier = 20.0\nmax_epsilon = 1.5\n"
RUN = """[model]
path = "./model"
[lora]
r = 4
target_modules = ["q_proj", "v_proj"]
[data]
source = "./data"
template = "plain"
max_length = 64
[federation]
num_rounds = 20
participants = ["bank", "lab"]
[training]
max_steps = 2
per_device_train_batch_size = 2
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    rows = [json.dumps({"instruction": f"add {number}", "output": str(number)}) for number in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    (tmp_path / "run.toml").write_text(RUN)
    site(tmp_path, 'approve = "ask"')
    return tmp_path


def site(folder: Path, policy: str) -> Path:
    base = f'name = "bank"\nmodel = "{MODEL}"\ndata = "data.jsonl"\ndevice = "cpu"\nthreads = 1\n'
    (folder / "SITE.toml").write_text(f"{base}[policy]\n{policy}\n")
    return folder / "SITE.toml"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, project: Path):
    def call(*arguments: object) -> tuple[int, str]:
        shown = io.StringIO()
        monkeypatch.setattr(command, "screen", Console(file=shown, width=200))
        result = CliRunner().invoke(cli.app, ["site", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join((shown.getvalue() + result.output).split())

    monkeypatch.chdir(project)
    monkeypatch.setenv("SUDO_USER", "ada")
    return call


def told(folder: Path, *overrides: str) -> str:
    return shared_settings(load_config(folder / "run.toml", overrides))


def book(folder: Path, *overrides: str, job: str = JOB) -> JobBook:
    """The site's book, in which a job has just been asked for."""
    held = JobBook(folder / "state", ask=True)
    held.write_down(Request("hello", job, told(folder, *overrides), base_digest(MODEL)), NOW)
    return held


def test_a_job_is_listed_shown_allowed_and_refused(call, project: Path):
    assert call("jobs") == (0, "bank has been asked for no job yet")
    held = book(project)
    name = held.jobs()[0].name
    (project / "supernode.sh").write_text("flower-supernode \\\n    --superlink fed.example.org:9443 \\\n")
    assert f"{name} waiting" in call("jobs")[1] and "1 waiting: `fedloom site show" in call("jobs")[1]
    code, shown = call("show", JOB[:4])
    for words in (
        "server fed.example.org:9443",
        "sites bank, lab",
        f"the very files that the server has (digest {base_digest(MODEL)})",
        "method fedsrd: FedSRD (arXiv 2510.04601)",
        "rank 4 beside 8 modules of the base model, 7,168 numbers: q_proj (4), v_proj (4)",
        "rounds 20; in each 2 steps of 2 examples",
        "9 of this site may be used",
        "a round uses 4 of them",
        "at most 35.4 KiB a round, 707.2 KiB in all",
        "noise at site level off: whoever runs the server may be able to read examples out of an update",
        "policy has nothing against it",
        f"fedloom site approve {name} [--rounds N]",
    ):
        assert words in shown, words
    code, said = call("approve", JOB, "--rounds", 3, "--until", "2999-01-31")
    assert code == 0 and "approved by ada" in said and "for 3 rounds in all; until 2999-01-31 23:59" in said
    assert "approved" in call("jobs")[1] and "approved by ada" in call("show", name)[1]
    trail = AuditTrail(project / "state" / "audit")
    for number in range(3):
        assert "approved" in call("jobs")[1]
        trail.record(bytes(number + 1), JOB, number, None, NOW)
    assert "over" in call("jobs")[1] and "3 updates have left, 6 bytes" in call("show", name)[1]
    code, said = call("refuse", JOB, "--reason", "no contract")
    assert "refused by ada" in said and said.endswith("because: no contract")
    rows = json.loads(call("jobs", "--json")[1])
    assert [(row["standing"], row["who"], row["method"], row["rounds"]) for row in rows] == [
        ("refused", "ada", "fedsrd", 20)
    ]


def test_the_server_is_the_one_that_the_sites_own_files_name(project: Path):
    file = project / "SITE.toml"
    assert read_server(file) == "" == read_server(project / "nowhere.toml")
    (project / "supernode.sh").write_text("exec flower-supernode --superlink=fed.example.org:9443 --isolation")
    assert read_server(file) == "fed.example.org:9443"
    file.write_text(file.read_text() + '[node]\nsuperlink = "new.example.org:443"\n')
    assert read_server(file) == "new.example.org:443"


def test_what_nobody_can_mean_is_said(call, project: Path):
    book(project), book(project, "training.max_steps=3")
    for arguments, words in (
        (("show", "99"), "no job '99'"),
        (("approve", JOB), f"'{JOB}' may be 2 jobs: give more of the name"),
        (("approve", JOB, "--until", "soon"), "--until soon: expected a date"),
        (("prune", "--older", "x"), "--older x: expected a number of days"),
        (("status", "nowhere.toml"), "nowhere.toml: no such file"),
    ):
        code, said = call(*arguments)
        assert code == 2 and words in said, said
    held = JobBook(project / "state", ask=True)
    assert all(job.decision is None for job in held.jobs())
    kept = project / "state" / "requests" / f"{held.jobs()[0].settings}.toml"
    kept.write_text(kept.read_text() + "\n")
    assert "was altered" in call("approve", held.jobs()[0].name)[1] and held.jobs()[0].decision is None


def test_an_approval_where_nobody_is_asked_says_so(call, project: Path):
    book(project)
    site(project, "")
    assert "so every job that it allows takes part" in call("approve", JOB)[1]
    assert "restart the worker, or the job goes on" in call("refuse", JOB)[1]


def test_a_preview_says_by_key_what_policy_refuses_and_leaves_nothing(call, project: Path):
    site(
        project,
        'methods = ["fedit"]\nmodules = ["q_proj"]\nmax_rank = 2\nmax_steps = 1\nmax_batch = 1\nmax_length = 32\n'
        'optimizers = ["sgd"]\nmax_learning_rate = 1e-5\nmin_examples = 100\nmax_bytes_round = "1KiB"',
    )
    code, said = call("preview", "SITE.toml", "run.toml")
    assert code == 0 and "nothing against it" not in said and "at most 1.0 KiB a round, 20.0 KiB in all" in said
    for words in (
        "method 'fedsrd'; policy.methods allows fedit",
        "module v_proj; policy.modules allows q_proj",
        "a rank is 4; policy.max_rank is 2",
        "training.max_steps is 2; policy.max_steps is 1",
        "per_device_train_batch_size is 2; policy.max_batch is 1",
        "data.max_length is 64; policy.max_length is 32",
        "policy.optimizers allows sgd",
        "a learning rate is 0.0002; policy.max_learning_rate is 1e-05",
        "9 training examples; policy.min_examples is 100",
    ):
        assert said.count(words) == 1, words
    assert not (project / "state").exists()
    said = call("preview", "SITE.toml", "run.toml", "--set", "federation.participants=['lab']")[1]
    assert "the run is for 'lab'; this site is 'bank'" in said


def test_a_rehearsal_is_the_very_turn_and_leaves_nothing(call, project: Path, tmp_path_factory, monkeypatch):
    site(project, f'approve = "ask"\norder = "run"\n{NOISE}')
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    code, said = call("preview", "SITE.toml", "run.toml", "--train")
    assert code == 0 and "thrown away: nothing kept, sent or charged" in said and "ε 1.99 for this job, 0 spent" in said
    assert "beside it steps 2, examples 9, seconds" in said and "loss" not in said.partition("beside it")[2]
    assert not list(scratch.iterdir()) and not (project / "state").exists()
    here = load_site_config(site(project, 'order = "run"'))
    settings, base = told(project, "method.name=fedit", "wire.values=fp32"), base_digest(MODEL)
    seen = describe_job(here, read_told(settings, here), project / "SITE.toml")
    played = rehearse_turn(here, settings, base)
    assert played.payload.size <= seen.bytes_round < 2 * played.payload.size, "dense, in full"
    assert rehearse_turn(here, settings, base).payload.checksum == played.payload.checksum


def test_a_secure_sum_is_required_said_and_rehearsed(call, project: Path):
    site(project, 'secure_aggregation = "required"\nleast_cohort = 4\norder = "run"')
    said = call("preview", "SITE.toml", "run.toml")[1]
    assert "the job has no secure aggregation, the server would see this site's update" in said
    assert "secure sum off: the server sees this site's update by itself" in said
    names = ["bank", "lab", "mill", "port"]
    secret = ["method.name=fedit", "privacy.secure_aggregation=true", f"federation.participants={names}"]
    sets = [word for one in secret for word in ("--set", one)]
    said = call("preview", "SITE.toml", "run.toml", *sets)[1]
    assert "privacy.least_cohort is 3; policy.least_cohort is 4" in said
    assert "every sum is of 3 sites or more" in said and "no number of examples, no loss" in said
    sets += ["--set", "privacy.least_cohort=4"]
    code, said = call("preview", "SITE.toml", "run.toml", *sets, "--train")
    assert code == 0 and "policy has nothing against it" in said
    vector = 4 * (7168 + 1)
    assert f"would leave {vector:,} bytes in this round" in said and "a vector under masks" in said
    assert "beside it steps 2, seconds" in said and not (project / "state").exists()
    key = call("key", "SITE.toml")[1]
    assert key == call("key", "SITE.toml")[1] and len(key) == len('"bank" = ""') + 64


def test_noise_is_weighed_as_it_will_be_charged(project: Path):
    here = load_site_config(site(project, NOISE))
    trail = AuditTrail(project / "state" / "audit")
    mu = here.policy.privacy.mu
    for round in range(1, 4):
        trail.charge("f" * 16, round, mu, NOW), trail.charge(JOB, round, mu, NOW)
    seen = weigh_noise(here, trail.lines(), JOB, 20)
    assert seen.spent < seen.job < seen.together and seen.most == 1.5
    assert weigh_noise(here, trail.lines(), "", 20).job > seen.job, "three of its rounds were charged"
    squared = 6 * mu**2
    for _ in range(seen.rounds):
        check_spending(here.policy, Spending(mu_squared=squared))
        squared += mu**2
    with pytest.raises(Exception, match="max_epsilon"):
        check_spending(here.policy, Spending(mu_squared=squared))
    free = here.model_copy(update={"policy": here.policy.model_copy(update={"privacy": None})})
    assert weigh_noise(free, trail.lines(), JOB, 20) is None and not math.isnan(seen.together)


def folder_of(state: Path, job: str, days: int, delivered: bool) -> Path:
    made = state / "jobs" / job
    (made / "adapter" if delivered else made).mkdir(parents=True)
    file = made / ("adapter" if delivered else ".") / "weights"
    file.write_bytes(b"x" * 1000)
    old = (datetime.now(UTC) - timedelta(days=days)).timestamp()
    os.utime(file, (old, old))
    return made


def test_pruning_takes_finished_jobs_alone(call, project: Path, monkeypatch):
    state = project / "state"
    old, new = folder_of(state, "a" * 16, 40, True), folder_of(state, "b" * 16, 20, True)
    begun, busy = folder_of(state, "c" * 16, 40, False), folder_of(state, "d" * 16, 40, True)
    AuditTrail(state / "audit").record(b"payload", "a" * 16, 1, None, NOW)
    (state / f"{REMOVED}half").mkdir()
    note_request(state, Request("turn", "d" * 16, "", "", 3), NOW)
    monkeypatch.setattr("fedloom.site.prune.is_running", lambda path: True)
    said = call("prune")[1]
    assert "1 jobs removed, 1000 B (1,000 bytes) freed" in said and f"kept {'d' * 16}: the worker is busy" in said
    assert f"kept {'c' * 16}: its result has not been delivered; --force removes it too" in said
    assert [path.exists() for path in (old, new, begun, busy)] == [False, True, True, True]
    note_request(state, Request("turn", "d" * 16, "", "", 3), NOW, NOW)
    assert "2 jobs removed" in call("prune", "--older", "30d", "--force")[1]
    assert [path.exists() for path in (new, begun, busy)] == [True, False, False]
    assert not list(state.glob(f"{REMOVED}*")) and len(AuditTrail(state / "audit").verify()[0]) == 1
    assert "bbbbbbbbbbbbbbbb done" in call("jobs")[1], "a folder from before there was a book"


def test_status_is_what_the_files_say(call, project: Path):
    site(project, f'approve = "ask"\nmax_bytes_day = "2MiB"\n{NOISE}')
    assert "worker not running" in call("status")[1] and "last request none yet" in call("status")[1]
    state, held = project / "state", book(project)
    trail, now = AuditTrail(state / "audit"), datetime.now(UTC)
    trail.charge(JOB, 1, 0.1, now), trail.record(b"x" * 700, JOB, 1, 0.1, now - timedelta(days=3))
    trail.record(b"y" * 300, JOB, 2, 0.1, now)
    note_request(state, replace(Request("turn", JOB, "", ""), round=2), NOW)
    said = call("status")[1]
    for words in (f"last request turn of job {JOB}, round 2", f"waiting {held.jobs()[0].name}", "of 1.5 spent"):
        assert words in said
    seen = json.loads(call("status", "--json")[1])
    assert (seen["running"], seen["updates"], seen["bytes_all"]) == (False, 2, 1000) and seen["last"]["round"] == 2
