"""Runs of the local engine with noise: what they leave, how they go on, and how much noise is in a secure sum."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import torch
from test_secret_sites import configure, play_rounds

from fedloom.errors import CheckpointError, ConfigError
from fedloom.methods.table import build
from fedloom.model.private import PrivateRound
from fedloom.noise.accounting import SampledNoise
from fedloom.records.configfile import load_config, parse
from fedloom.records.ledger import Note, Training, read_rows
from fedloom.report import summarise
from fedloom.report.page import page_of
from fedloom.report.spent import describe_spent
from fedloom.server import local
from fedloom.server.pool import Ticket
from fedloom.workspace import private
from fedloom.workspace.privacy import describe_sum_noise, plan_sums
from small_testbed import small_testbed
from toy import initial
from toy_run import toy_setup

SETTINGS = [
    *("federation.num_rounds=2", "federation.eval_every=0", "data.heldout=null", "data.validation=null"),
    *("lora.r=2", 'lora.target_modules=["q_proj"]', "training.dp.epsilon=50", "training.dp.delta=0.01"),
    'federation.participants=["bank", "lab"]',
]
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return load_config(small_testbed(tmp_path_factory.mktemp("bed")) / "demo.toml", SETTINGS)


def adapter(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class Elsewhere:
    """A pool whose tasks travel as they do to workers, and are done on a set-up that was loaded anew."""

    def __init__(self, config):
        self.setup = local.load_setup(config)

    def run(self, tasks, begun=lambda task: None):
        for task in tasks:
            begun(task)
            yield Ticket(task, 0, True, pickle.loads(pickle.dumps(task)).do(self.setup))


def test_a_run_with_noise_goes_on_to_the_same_bits_and_keeps_no_key(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(private, "keep_secret", lambda path: path.write_bytes(b"k" * 32) and b"k" * 32)
    whole = local.run_local(bed, tmp_path / "whole")
    assert not (tmp_path / "whole" / private.FILE).exists() and not whole.failure
    rows = read_rows(tmp_path / "whole" / "ledger.jsonl")
    assert all(math.isnan(row.loss) for row in rows if isinstance(row, Training))
    assert any("noise on examples, ε = 50 at example level" in row.text for row in rows if isinstance(row, Note))
    said = describe_spent(rows, bed)
    assert re.fullmatch(r"noise at example level, ε spent in this run: bank 50 \(δ = 0.01\), lab .*", said), said
    page = page_of(tmp_path / "whole", summarise(rows, "ledger.jsonl"), rows)
    (told,) = [one for one in page.headlines if "ε" in one.what]
    assert told.value == "50" and "at example level" in told.more
    assert describe_spent(rows, parse({}, "a test")) == ""
    turn, calls = local.client_turn, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return turn(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local, "client_turn", stopping)
        local.run_local(bed, tmp_path / "cut")
    assert (tmp_path / "cut" / private.FILE).exists()
    longer = bed.model_copy(update={"federation": bed.federation.model_copy(update={"num_rounds": 3})})
    with pytest.raises(CheckpointError, match="made for 2 rounds, and more of them would pass training.dp.epsilon"):
        local.run_local(longer, tmp_path / "cut", resume=True)
    # It goes on with workers, who have a set-up of their own and are told the key turn by turn.
    monkeypatch.setattr(local, "fill_pool", lambda config, method, nursery: Elsewhere(bed))
    workers = bed.model_copy(update={"local": bed.local.model_copy(update={"workers": 2})})
    local.run_local(workers, tmp_path / "cut", resume=True, nursery=object())
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_a_trainer_of_ones_own_is_refused_where_examples_are_to_be_protected(bed):
    private.refuse_own_trainer(parse({}, "a test"), build("fedit"))
    with pytest.raises(ConfigError, match="cannot reach into a trainer of one's own"):
        private.refuse_own_trainer(bed, build("fedit"))


def test_without_a_secret_no_two_rounds_have_the_same_noise(bed):
    noise = private.plan_noise(bed.training, 6, 2)
    first, again = (private.plan_round(bed.training, noise, b"", ("a",)) for _ in range(2))
    assert isinstance(first, PrivateRound) and first.key != again.key and first.key.hex() not in repr(first)
    fixed = [private.plan_round(bed.training, noise, b"s", about) for about in (("a",), ("a",), ("b",))]
    assert fixed[0] == fixed[1] != fixed[2] and fixed[0].draw != fixed[2].draw


def test_a_delta_that_promises_little_is_told(bed, monkeypatch):
    monkeypatch.setattr(private, "plan_noise", lambda *of: SampledNoise(0.1, 1.0, 1))  # what it is is not asked here
    told = private.describe_noise(bed, {"bank": 90, "lab": 40})
    assert ", δ = 0.01" in told and "promises little" not in told  # as it is set
    training = bed.training.model_copy(update={"dp": bed.training.dp.model_copy(update={"delta": None})})
    told = private.describe_noise(bed.model_copy(update={"training": training}), {"bank": 90, "lab": 40})
    assert ", δ = 0.011 to 0.025; a δ as large as that promises little: where clients have few examples" in told


NOISY = ("federation.weighting=uniform", "privacy.noise_multiplier=0.5", "privacy.clip_norm=0.01", "privacy.clip=0.1")


def test_a_secure_sum_has_the_noise_of_those_who_must_be_there_and_more(tmp_path):
    last = "federation.num_rounds=1"
    noisy, _ = play_rounds(configure(*NOISY, last), tmp_path / "noisy", 6)
    calm = [setting.replace("0.5", "1e-5") if "multiplier" in setting else setting for setting in NOISY]
    quiet, _ = play_rounds(configure(*calm, last), tmp_path / "quiet", 6)
    pairs = zip(noisy.server.adapter.tensors().values(), quiet.server.adapter.tensors().values(), strict=True)
    apart = torch.cat([(one - other).flatten() for one, other in pairs])
    # Three of six must stay: each adds noise for three, and the mean is a sixth of the sum.
    wanted = 0.5 * 0.01 * math.sqrt(6 / 3) / 6
    assert float(apart.std()) == pytest.approx(wanted, rel=5 / math.sqrt(apart.numel()))
    moved = max(float(tensor.abs().max()) for tensor in quiet.server.adapter.tensors().values())
    assert moved > 0


def test_noise_that_a_sum_cannot_have_is_refused():
    ranks = {f"client-{number}": {"m": 2} for number in range(4)}
    method = build("fedit")
    made = plan_sums(configure(*NOISY), method, ranks)
    assert made.noise.share * made.grid.step * math.sqrt(3) >= 0.5 * 0.01
    setup = toy_setup(configure(*NOISY), 4, initial())
    said = describe_sum_noise(setup.job, setup.initial, 3)
    assert "at site level for all 3 rounds, at δ = 1e-06, for who trusts that 3 sites" in said
    with pytest.raises(ConfigError, match=r"privacy.clip is 0.1, which has no room for a change of norm 0.01"):
        plan_sums(configure(*NOISY, "privacy.noise_multiplier=50.0"), method, ranks)
    for change, said in (
        (("federation.weighting=examples",), "needs federation.weighting = 'uniform'"),
        (("privacy.secure_aggregation=false",), "set privacy.secure_aggregation to true"),
        (("privacy.clip_schedule=learning_rate",), "the noise is as large in every round"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan_sums(configure(*NOISY, *change), method, ranks)
