"""`training.dp.rounds`: a client is asked in so many rounds at most, and its noise is made for those alone."""

from __future__ import annotations

from collections import Counter

import pytest

from fedloom.errors import ConfigError, PolicyRefusal
from fedloom.noise.accounting import example_epsilon
from fedloom.records.configfile import load_config, parse
from fedloom.records.ledger import Note, Training, read_rows
from fedloom.records.noise import client_epsilon, plan_noise
from fedloom.server import local
from fedloom.server.attendance import check_attendance, draw_attendance, draw_rounds
from fedloom.site.audit import AuditTrail
from fedloom.site.examples import check_turns
from small_testbed import small_testbed

CLIENTS = [f"client-{number:02}" for number in range(12)]
pytestmark = pytest.mark.usefixtures("no_picture")


def settings(rounds, **federation):
    dp = {"epsilon": 8.0} if rounds is None else {"epsilon": 8.0, "rounds": rounds}
    return parse(
        {
            "federation": {"num_rounds": 9, "fraction_train": 0.25, **federation},
            "training": {"dp": dp, "per_device_train_batch_size": 100},
        },
        "a test",
    )


def test_nobody_is_asked_more_often_and_rounds_are_drawn_alike_one_by_one_and_all_together():
    config = settings(3)
    drawn = list(draw_rounds(config, CLIENTS))
    counts = Counter(client for one in drawn for client in one.asked)
    assert all(len(one.asked) == 3 for one in drawn) and max(counts.values()) == 3 and sum(counts.values()) == 27
    assert drawn == [draw_attendance(config, CLIENTS, round) for round in range(1, 10)]
    assert max(Counter(client for one in draw_rounds(settings(None), CLIENTS) for client in one.asked).values()) > 3


@pytest.mark.parametrize("rounds", [None, 9, 20])
def test_draws_stay_as_they_are_where_nothing_is_bounded(rounds):
    plain = parse({"federation": {"num_rounds": 9, "fraction_train": 0.25}}, "a test")
    assert list(draw_rounds(settings(rounds), CLIENTS)) == list(draw_rounds(plain, CLIENTS))


def test_rounds_that_cannot_be_filled_are_refused():
    check_attendance(settings(3), 12)
    with pytest.raises(
        ConfigError, match=r"training.dp.rounds = 2 lets 12 clients train 24 times in all, and 9 rounds ask for 27"
    ):
        check_attendance(settings(2), 12)
    with pytest.raises(ConfigError, match="training.dp.rounds needs synchronous rounds"):
        parse(
            {"federation": {"mode": "buffered"}, "training": {"dp": {"noise_multiplier": 1.0, "rounds": 2}}}, "a test"
        )


def test_noise_is_made_for_the_rounds_of_a_client():
    few, all_of_them = settings(2), settings(None)
    noise, more = (plan_noise(config.training, 500, 9) for config in (few, all_of_them))
    assert noise.noise_multiplier < 0.7 * more.noise_multiplier
    assert client_epsilon(few, "client-00", 500, 2)[0] == pytest.approx(8.0, rel=0.01)
    assert client_epsilon(few, "client-00", 500, 2)[0] <= 8.0 < client_epsilon(few, "client-00", 500, 3)[0]
    assert example_epsilon([noise] * 2, 1 / 500) == client_epsilon(few, "client-00", 500, 2)[0]


def test_a_site_trains_in_no_more_rounds_whatever_the_server_asks(tmp_path):
    trail = AuditTrail(tmp_path / "audit")
    noise = plan_noise(settings(2).training, 500, 9)
    for round in (1, 4):
        check_turns(trail, "job", round, 2)
        trail.charge_examples("job", round, noise, f"draw {round}", 0.01, None)
    check_turns(trail, "job", 4, 2)  # a round again costs no further one
    check_turns(trail, "other", 5, 2)
    with pytest.raises(
        PolicyRefusal, match=r"has trained in 2 rounds of job job, and its noise is made for 2"
    ) as caught:
        check_turns(trail, "job", 5, 2)
    assert "made for fewer rounds" in caught.value.public


def test_a_run_asks_each_client_once_and_says_so_and_refuses_rounds_without_anybody(tmp_path):
    bed = small_testbed(tmp_path) / "demo.toml"

    def configure(rounds):
        return load_config(
            bed,
            [
                *(
                    "federation.fraction_train=0.5",
                    "federation.eval_every=0",
                    "data.heldout=null",
                    "data.validation=null",
                ),
                *("lora.r=2", 'lora.target_modules=["q_proj"]', "training.max_steps=1", "training.dp.epsilon=50"),
                *('federation.participants=["bank", "lab"]', f"federation.num_rounds={rounds}"),
                "training.dp.rounds=1",
            ],
        )

    local.run_local(configure(2), tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert sorted(row.client for row in rows if isinstance(row, Training)) == ["bank", "lab"]
    told = [row.text for row in rows if isinstance(row, Note)]
    assert any("ε = 50 at example level for 1 round of a client" in text for text in told)
    with pytest.raises(ConfigError, match="lets 2 clients train 2 times in all, and 3 rounds ask for 3"):
        local.run_local(configure(3), tmp_path / "more")
