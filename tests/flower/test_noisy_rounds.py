"""Noise on examples over Flower: a run that was killed makes the same noise again, and a site pays for it once."""

from __future__ import annotations

import shutil

import pytest
from desks import SITES, DeskGrid, settings

from fedloom.lora.pair import digest
from fedloom.noise.accounting import SampledNoise, example_epsilon
from fedloom.records.ledger import Training, read_rows
from fedloom.records.noise import client_epsilon
from fedloom.site.audit import sampled_noise

pytestmark = pytest.mark.flower

NOISY = (
    *("method.name=fedit", "federation.num_rounds=2", "training.max_steps=1"),
    *("training.per_device_train_batch_size=2", "training.dp.noise_multiplier=2.0", "training.dp.delta=1e-3"),
)
SUM = ("privacy.secure_aggregation=true", "privacy.least_cohort=2", "privacy.threshold=2")


class Killed(BaseException):
    """Ends the server's process."""


@pytest.mark.parametrize("sums", [(), SUM], ids=["updates", "sum"])
def test_noise_on_examples_is_the_same_after_a_kill_and_paid_for_once(toy_federation, tmp_path, sums):
    config = settings(*NOISY, *sums)

    def grid_in(folder):
        folder.mkdir()
        return DeskGrid(config, folder)

    whole = grid_in(tmp_path / "whole")
    done, _ = toy_federation(*NOISY, *sums, grid=whole, out="whole-run")
    cut, died = grid_in(tmp_path / "cut"), []
    for name in SITES:
        (tmp_path / "cut" / name).mkdir(mode=0o700, exist_ok=True)
        shutil.copy(tmp_path / "whole" / name / "noise.key", tmp_path / "cut" / name)

    def die(node, ask, round, reply):
        if (ask, round) == ("turn", 2) and not died:
            died.append(node.desk.site.name)
            raise Killed
        return "as it is"

    cut.disturb = die
    with pytest.raises(Killed):
        toy_federation(*NOISY, *sums, grid=cut, out="cut-run")
    cut.disturb = None
    cut.arriving.clear()
    again, _ = toy_federation(*NOISY, *sums, grid=cut, out="cut-run", resume=True)
    assert digest(again.server.adapter) == digest(done.server.adapter) and again.server.version == 2
    for name in SITES:
        lines, moved, unlisted = cut.node(name).desk.trail.verify()
        sent = [line for line in lines if line.payload]
        assert len({line.payload for line in sent}) == 2 and not moved and not unlisted
        assert {line.charge for line in sent} == {line.digest for line in lines if not line.payload}
        assert sampled_noise(lines) == (SampledNoise(2 / 3, 2.0, 2),)
    said, delta = client_epsilon(config, "lab", 3, 2)
    assert example_epsilon(sampled_noise(lines), delta) == said
    rows = read_rows(tmp_path / "cut-run" / "ledger.jsonl")
    assert all(row.loss != row.loss for row in rows if isinstance(row, Training))
