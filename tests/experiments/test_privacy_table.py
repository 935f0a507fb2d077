"""The runs of the table of ε: their noise is that of their ε, and the rows name level, score and bytes."""

import math
from types import SimpleNamespace

import pytest

from experiments import privacy
from fedloom import testbeds
from fedloom.errors import ConfigError
from fedloom.methods.table import build
from fedloom.noise.accounting import concentrated_epsilon
from fedloom.records.configfile import load_config
from fedloom.workspace.privacy import DELTA, plan_sums


def test_every_level_is_played_under_every_epsilon(tmp_path):
    config = load_config(testbeds.testbed_folder() / "demo.toml")
    made = privacy.plan(
        config, [8.0, math.inf], privacy.METHODS, privacy.Steps(256, 4, 1e-2, turns=3), [1, 2], tmp_path
    )
    assert [(one.level, one.epsilon, len(one.made)) for one in made] == [
        ("example", 8.0, 2), ("example", math.inf, 2), ("site", 8.0, 2), ("site", math.inf, 2), ("noise", 8.0, 2)
    ]  # fmt: skip
    noisy, bare, summed, plain, alone = (one.made[0].config for one in made)
    assert noisy.training.dp.epsilon == 8.0 and bare.training.dp is None
    assert (
        noisy.training.batch == bare.training.batch == 256 and noisy.training.max_steps == bare.training.max_steps == 4
    )
    assert noisy.turns_of_client == 3 and bare.turns_of_client == noisy.federation.num_rounds
    assert plain.privacy.secure_aggregation and plain.privacy.noise_multiplier is None
    assert alone.privacy == summed.privacy and alone.training.learning_rate < 1e-9
    sums = plan_sums(summed, build("lora-xs"), {f"site-{number}": {"m": 2} for number in range(4)})
    cost = summed.federation.num_rounds * sums.noise.cost(sums.grid.step, 1000)
    assert concentrated_epsilon(cost, DELTA) == pytest.approx(8.0, rel=0.01)
    of_mean = sums.noise.share * sums.grid.step * 4**0.5 / 4
    assert of_mean == pytest.approx(privacy.SPREAD, rel=0.01)
    assert privacy.rows(made) == []  # nothing was played


def test_epsilons_are_numbers_and_none_is_always_among_them():
    assert privacy.parse_epsilons("8,1") == [1.0, 8.0, math.inf] == privacy.parse_epsilons("1,8,inf")
    for wrong in ("a", "-1", "0"):
        with pytest.raises(ConfigError, match="expected numbers above 0"):
            privacy.parse_epsilons(wrong)


def test_what_noise_does_by_itself_is_a_row_also_where_nothing_else_was_played(tmp_path, monkeypatch):
    config = load_config(testbeds.testbed_folder() / "demo.toml")
    alone = {"noise": privacy.METHODS["noise"]}
    made = privacy.plan(config, [8.0, math.inf], alone, privacy.Steps(1, 1, 1), [1], tmp_path)
    ends = {"loss": (9.0, 8.5), "exact_match": (0.0, 0.0)}
    report = SimpleNamespace(value=lambda key, at=1: ends[key][at], totals=SimpleNamespace(bytes=10))
    monkeypatch.setattr(privacy, "read_reports", lambda trials: {trials[0].label: [report]})
    monkeypatch.setattr(privacy, "paired", lambda runs, whole: [])
    (row,) = privacy.rows(made)
    assert row["level"] == "noise" and row["of the gain without noise %"] == "–"
    assert row["gain, nats a token"].startswith("0.5")
