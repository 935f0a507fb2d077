"""A site's rules hold against whatever the server asks for and whatever a turn produces."""

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError

import toy
from fedloom.compress.entries import dense_entry, floats
from fedloom.errors import DataError, NumericError, PolicyRefusal, SiteError
from fedloom.lora.pair import subset
from fedloom.methods.table import build
from fedloom.records.configfile import parse
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import client_turn, start
from fedloom.site.guard import guard_training, limit_time
from fedloom.site.order import own_seed
from fedloom.site.policy import (
    check_job,
    check_may_leave,
    check_room,
    check_settings,
    check_spending,
    text_for_server,
)
from fedloom.site.privacy import Privacy, draw_normal, epsilon, release_change, total_norm
from fedloom.site.rules import Policy, Spending
from fedloom.wire import Header, Message, decode, encode

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def refused(public: str, call) -> str:
    with pytest.raises(PolicyRefusal) as caught:
        call()
    assert public in caught.value.public
    return str(caught.value)


def turn(policy, name="fedsrd", *, train=None, **settings):
    method = build(name, settings)
    job = toy.job(method)
    step = guard_training(policy, train or toy.trainer(method), method.trainable, lambda: None)
    state = start(job, toy.initial(), toy.ranks(toy.RANK))
    return state, client_turn(job, "ada", state, [], step, 1)


def test_without_rules_nothing_is_refused_or_changed():
    policy = Policy()
    check_job(policy, "fedit", MODULES, 1, 1)
    check_spending(policy, Spending(10**12, 10**12, 1e9))
    state, guarded_turn = turn(policy)
    method = build("fedsrd")
    plain = client_turn(toy.job(method), "ada", state, [], toy.trainer(method), 1)
    assert guarded_turn.payload == plain.payload
    check_may_leave(policy, guarded_turn.payload, state.adapter, Spending())


def test_methods_and_modules_outside_the_lists_are_refused_by_name():
    policy = Policy(methods=("fedsrd",), modules=("q_proj", "*.mlp.*"))
    check_job(policy, "fedsrd", MODULES, 5, 5)
    refused("method 'fedit' is not allowed", lambda: check_job(policy, "fedit", MODULES, 5, 5))
    odd = [*MODULES, "lm_head"]
    refused("module lm_head is not allowed", lambda: check_job(policy, "fedsrd", odd, 5, 5))


def test_reasons_that_rest_on_data_stay_at_the_site():
    policy = Policy(min_examples=50, max_update_norm=1e-3)
    reason = refused("refused by the site's policy", lambda: check_job(policy, "fedit", MODULES, 17, 17))
    assert "17" in reason
    with pytest.raises(PolicyRefusal) as caught:
        turn(policy)
    assert caught.value.public == "refused by the site's policy" and "norm" in str(caught.value)


@pytest.mark.parametrize("key", ["max_bytes_round", "max_bytes_day"])
def test_bytes_are_counted_with_those_that_left_before(key):
    state, done = turn(Policy())
    size = len(done.payload)
    policy = Policy(**{key: str(3 * size)})
    used = {"max_bytes_round": "bytes_round", "max_bytes_day": "bytes_day"}[key]
    check_may_leave(policy, done.payload, state.adapter, Spending(**{used: 2 * size}))
    over = Spending(**{used: 2 * size + 1})
    refused(f"{key} is used up", lambda: check_may_leave(policy, done.payload, state.adapter, over))
    refused(f"{key} is used up", lambda: check_spending(policy, Spending(**{used: 3 * size})))


def message(kind="update", **entries):
    return encode(Message(Header(kind, "fedsrd", 1, 0, "0" * 32, num_examples=1), entries))


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (message("state", **{"layers.0.q_proj/A": dense_entry(torch.zeros(4, 10))}), "kind 'state'"),
        (message(**{"lm_head/A": dense_entry(torch.zeros(4, 10))}), "lm_head/A"),
        (message(**{"layers.0.q_proj/frozen_A": dense_entry(torch.zeros(4, 10))}), "frozen_A"),
        (message(**{"layers.0.q_proj/A": dense_entry(torch.zeros(5, 10))}), "(5, 10)"),
    ],
)
def test_only_updates_of_the_adapter_leave(payload, said):
    assert said in refused("policy", lambda: check_may_leave(Policy(), payload, toy.initial(), Spending()))


def test_a_diverged_change_is_beyond_any_norm():
    def diverged(state, round, seed):
        return Trained(state.adapter.map(lambda pair: type(pair)(pair.A * math.nan, pair.B)), 5, 1.0)

    with pytest.raises(PolicyRefusal, match="norm nan"):
        turn(Policy(max_update_norm=1e9), train=diverged)


def test_error_texts_are_withheld_unless_the_site_says_otherwise():
    error = NumericError("patient 4711 made the loss explode")
    assert "4711" not in text_for_server(Policy(), error, "ab12") and "ab12" in text_for_server(Policy(), error, "ab12")
    assert "4711" in text_for_server(Policy(scrub_errors=False), error, "ab12")
    refusal = PolicyRefusal("17 examples", "refused by the site's policy")
    assert "17" not in text_for_server(Policy(scrub_errors=False), refusal, "ab12")


def test_the_server_can_be_told_a_fixed_number_of_examples():
    _, done = turn(Policy(declared_examples=1000))
    assert decode(done.payload).header.num_examples == 1000


NOISY = Policy(privacy=Privacy(clip_norm=0.5, noise_multiplier=1.0))


def test_what_leaves_is_clipped_and_has_the_noise_that_was_promised():
    change = {"A": torch.full((300, 100), 1.0), "B": torch.full((200, 100), -2.0)}
    privacy = Privacy(clip_norm=0.5, noise_multiplier=2.0)
    noisy = release_change(change, privacy)
    size = total_norm(change)
    rest = torch.cat([(noisy[name] - change[name] * 0.5 / size).flatten() for name in change])
    assert float(rest.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float(rest.mean())) < 0.02
    assert float((rest.abs() > 3.0).double().mean()) == pytest.approx(0.0027, rel=0.3)


def test_a_small_change_is_not_scaled_up_and_a_diverged_one_says_nothing():
    privacy = Privacy(clip_norm=1e6, noise_multiplier=1e-12)
    small = {"A": torch.full((3, 4), 0.25)}
    assert torch.allclose(release_change(small, privacy)["A"], small["A"], atol=1e-4)
    diverged = release_change({"A": torch.tensor([1.0, math.nan, math.inf])}, privacy)["A"]
    assert torch.isfinite(diverged).all() and diverged.abs().max() < 1e-4


def test_noise_is_fresh_every_time_and_does_not_follow_from_the_seeds_that_the_server_knows():
    torch.manual_seed(0)
    first = turn(NOISY)[1].payload
    torch.manual_seed(0)
    assert turn(NOISY)[1].payload != first
    assert not torch.equal(draw_normal(8), draw_normal(8))
    assert draw_normal(0).numel() == 0 and draw_normal(7).numel() == 7


def test_the_loss_is_withheld_with_noise():
    assert math.isnan(turn(NOISY)[1].trained.loss)
    assert turn(Policy())[1].trained.loss == 1.0


@pytest.mark.parametrize("name", ["fedit", "fedsrd", "fed-dare"])
def test_all_that_a_turn_leaves_behind_depends_on_data_through_the_noise_alone(name, monkeypatch):
    """With the noise fixed and as large as the clip, two data sets whose clipped changes agree give equal bytes and
    equal residuals, although selection, rescaling and residuals looked at the change."""
    monkeypatch.setattr(
        "fedloom.site.privacy.draw_normal", lambda count: torch.linspace(-1, 1, count, dtype=torch.float64)
    )
    settings = {"client_residual": 0.9} if name == "fedsrd" else {}
    method = build(name, settings)

    def scaled(size, state, round, seed):
        return toy.step(state, round, 11, size=size, parts=method.trainable(round))

    tight = Policy(privacy=Privacy(clip_norm=1e-9, noise_multiplier=1e9), declared_examples=10)
    first, second = (turn(tight, name, train=partial(scaled, size), **settings)[1] for size in (0.1, 40.0))
    assert first.payload == second.payload
    assert first.state.memory.keys() == second.state.memory.keys()
    assert all(torch.equal(first.state.memory[key], second.state.memory[key]) for key in first.state.memory)


def test_factors_that_a_round_does_not_train_get_no_noise():
    state, done = turn(NOISY, "ffa")
    after = done.trained.adapter
    for module, pair in state.adapter.items():
        assert torch.equal(after[module].A, pair.A) and not torch.equal(after[module].B, pair.B)


def test_selection_happens_after_the_noise():
    """A change with one large element: sent alone if selection saw it, drowned in large noise if it sees the noise."""

    def one(state, round, seed):
        def moved(pair):
            b = pair.B.clone()
            b[0, 0] += 1.0
            return type(pair)(pair.A, b)

        return Trained(state.adapter.map(moved), 5, 1.0)

    loud = Policy(privacy=Privacy(clip_norm=1.0, noise_multiplier=1e6))
    entries = decode(turn(loud, train=one)[1].payload).entries
    spread = torch.cat([floats(entry.values) for entry in entries.values()])
    assert (spread.abs() > 1e3).all() and len(spread) > 5


@pytest.mark.parametrize(
    ("sigma", "rounds", "delta", "expected"),
    [(1.0, 1, 1e-5, 9.9973), (2.0, 20, 1e-6, 30.5789), (10.0, 100, 1e-6, 10.9972), (0.5, 1, 1e-5, 24.3816)],
)
def test_epsilon_is_that_of_an_accountant(sigma, rounds, delta, expected):
    """Expected: dp-accounting 0.6.0, PLDAccountant of GaussianDpEvent(sigma / 2) composed `rounds` times."""
    privacy = Privacy(clip_norm=3.0, noise_multiplier=sigma)
    assert epsilon(math.sqrt(rounds) * privacy.mu, delta) == pytest.approx(expected, rel=1e-3)


def test_epsilon_at_the_edges():
    assert epsilon(0.0, 1e-6) == 0.0
    assert epsilon(1e-9, 1e-6) == 0.0
    assert 30 < epsilon(5.0, 1e-6) < epsilon(5.0, 1e-9) < epsilon(6.0, 1e-9)
    assert epsilon(60.0, 1e-6) > 1800 and math.isfinite(epsilon(1e6, 1e-6))
    assert epsilon(1.0, sys.float_info.min) > epsilon(1.0, 1e-300)


def test_nothing_more_leaves_once_epsilon_is_used_up():
    privacy = Privacy(clip_norm=1.0, noise_multiplier=10.0, delta=1e-6, max_epsilon=4.0)
    policy = Policy(privacy=privacy)
    possible = 0
    while possible < 100:
        try:
            check_spending(policy, Spending(mu_squared=possible * privacy.mu**2))
        except PolicyRefusal as refusal:
            assert "privacy budget" in refusal.public
            break
        possible += 1
    assert 0 < possible < 100
    assert epsilon(math.sqrt(possible) * privacy.mu, 1e-6) <= 4.0 < epsilon(math.sqrt(possible + 1) * privacy.mu, 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_bytes_day": "a lot"},
        {"max_bytes_round": "0"},
        {"min_examples": 0},
        {"unknown": 1},
        {"methods": []},
        {"min_examples_update": 0},
        {"max_rank": 0},
        {"max_disk": "much"},
        {"order": "server"},
        {"optimizers": []},
        {"min_length": 20, "max_length": 10},
        {"min_learning_rate": 1.0, "max_learning_rate": 0.1},
        {"privacy": {"clip_norm": 0.0, "noise_multiplier": 1.0}},
        {"privacy": {"clip_norm": 1.0, "noise_multiplier": math.inf}},
        {"privacy": {"clip_norm": 1.0}},
        {"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1.0}},
    ],
)
def test_rules_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Policy.model_validate(wrong)


def job(**tables):
    """Settings that the rules of TIGHT allow, with these tables' keys over them."""
    tree = {
        "federation": {"participants": ["ada", "bob"], "num_rounds": 10},
        "lora": {"r": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}},
        "training": {"max_steps": 5, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"},
        "data": {"max_length": 256},
        "method": {"name": "fedit"},
        "clients": {"bob": {"r": 6}},
    }
    for name, keys in tables.items():
        tree[name] = tree.get(name, {}) | keys
    return parse(tree, "test")


TIGHT = Policy(
    methods=("fedit",),
    modules=("q_proj",),
    min_examples_update=10,
    max_rank=8,
    max_steps=5,
    max_batch=4,
    min_length=200,
    max_length=256,
    optimizers=("adamw_torch",),
    min_learning_rate=1e-5,
    max_learning_rate=1e-3,
)


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"method": {"name": "flora"}}, "method 'flora'"),
        ({"lora": {"r": 9}}, "max_rank"),
        ({"lora": {"rank_pattern": {"v_proj": 9}}}, "max_rank"),
        ({"clients": {"ada": {"r": 9}}}, "max_rank"),
        ({"clients": {"bob": {"rank_pattern": {"x": 9}}}}, "max_rank"),
        ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "lm_head"),
        ({"clients": {"ada": {"target_modules": ["lm_head"]}}}, "lm_head"),
        ({"training": {"max_steps": 6}}, "max_steps"),
        ({"training": {"per_device_train_batch_size": 5}}, "max_batch"),
        ({"training": {"max_steps": 1, "gradient_accumulation_steps": 2}}, "min_examples_update"),
        ({"data": {"max_length": 199}}, "min_length"),
        ({"data": {"max_length": 257}}, "max_length"),
        ({"training": {"optim": "sgd"}}, "training.optim 'sgd'"),
        ({"training": {"learning_rate": 1e-6}}, "min_learning_rate"),
        ({"training": {"learning_rate": 1.0}}, "max_learning_rate"),
        ({"training": {"warmup_steps": 10**8}}, "min_learning_rate"),
    ],
)
def test_every_setting_is_held_to_its_rule_before_a_model_is_loaded(tables, key):
    check_settings(TIGHT, job(), "ada", 1)
    check_settings(Policy(), job(**tables), "ada", 1)
    assert key in refused("refused by the site's policy: ", lambda: check_settings(TIGHT, job(**tables), "ada", 1))


def test_the_learning_rate_of_the_round_counts_not_the_peak():
    falling = job(training={"lr_scheduler_type": "linear"}, federation={"num_rounds": 1000})
    check_settings(TIGHT, falling, "ada", 1)
    refused("min_learning_rate", lambda: check_settings(TIGHT, falling, "ada", 999))


def test_patterns_for_whole_names_wait_for_the_model():
    check_settings(Policy(modules=("*.mlp.*",)), job(), "ada", 1)


def test_an_update_rests_on_examples_that_are_there():
    policy = Policy(min_examples_update=10)
    check_job(policy, "fedit", MODULES, 10, 10**9)
    for held, draws in ((9, 10**9), (1000, 9)):
        with pytest.raises(PolicyRefusal, match="would rest on 9 examples") as caught:
            check_job(policy, "fedit", MODULES, held, draws)
        assert caught.value.public == "refused by the site's policy"


def test_errors_of_data_and_rules_about_data_say_the_same():
    """How long prompts are could be read from which of the two comes at which max_length."""
    told = {
        text_for_server(Policy(), error, "ab12") for error in (DataError("prompt of 17 tokens"), PolicyRefusal("17"))
    }
    assert told == {"refused by the site's policy (reference ab12)"}
    assert "17" in text_for_server(Policy(scrub_errors=False), DataError("17"), "ab12")


def test_a_core_may_leave_where_it_is_what_is_trained_and_nothing_larger():
    name, state = "layers.0.q_proj/R", toy.initial()
    good, large = (message(**{name: dense_entry(torch.zeros(size, size))}) for size in (toy.RANK, toy.RANK + 1))
    check_may_leave(Policy(), good, state, Spending(), ("R",))
    assert name in refused("policy", lambda: check_may_leave(Policy(), good, state, Spending()))
    assert "(5, 5)" in refused("policy", lambda: check_may_leave(Policy(), large, state, Spending(), ("R",)))
    factors = message(**{"layers.0.q_proj/A": dense_entry(torch.zeros(4, 10))})
    refused("policy", lambda: check_may_leave(Policy(), factors, state, Spending(), ("R",)))


def test_noise_is_charged_for_before_it_is_drawn(monkeypatch):
    came = []
    monkeypatch.setattr(
        "fedloom.site.privacy.draw_normal", lambda count: came.append("noise") or torch.zeros(count).double()
    )
    method = build("fedit")
    state = start(toy.job(method), toy.initial(), toy.ranks(toy.RANK))
    step = guard_training(NOISY, toy.trainer(method), method.trainable, lambda: came.append("charge"))
    step(state, 1, 7)
    assert came[0] == "charge" and came.count("charge") == 1 and "noise" in came

    def full():
        raise OSError("disk full")

    came.clear()
    with pytest.raises(OSError, match="disk full"):
        guard_training(NOISY, toy.trainer(method), method.trainable, full)(state, 1, 7)
    assert came == []


def test_what_the_state_folder_takes_is_bounded_with_what_is_about_to_be_written(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "state").write_bytes(bytes(600))
    check_room(Policy(), tmp_path, 10**6)
    check_room(Policy(max_disk="1000"), tmp_path, 400)
    refused("max_disk is used up", lambda: check_room(Policy(max_disk="1000"), tmp_path, 401))


def test_a_training_that_takes_too_long_is_ended(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedloom.site.guard.time.monotonic", lambda: now[0])
    check, free = limit_time(Policy(max_seconds_round=5.0)), limit_time(Policy())
    now[0] = 105.0
    check()
    now[0] = 105.5
    free()
    refused("max_seconds_round is over", check)


def test_the_sites_own_order_is_the_same_for_a_round_and_nobody_elses(tmp_path):
    first = own_seed(tmp_path / "a", "0" * 16, 1)
    assert own_seed(tmp_path / "a", "0" * 16, 1) == first and 0 <= first < 2**63
    others = [("a", "0" * 16, 2), ("a", "1" * 16, 1), ("b", "0" * 16, 1)]
    assert len({first, *(own_seed(tmp_path / folder, job, round) for folder, job, round in others)}) == 4
    key = tmp_path / "a" / "order.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    key.chmod(0o644)
    with pytest.raises(SiteError, match="chmod 600"):
        own_seed(tmp_path / "a", "0" * 16, 1)
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(SiteError, match="expected 32"):
        own_seed(tmp_path / "a", "0" * 16, 1)


@pytest.mark.parametrize("policy", [Policy(), Policy(max_update_norm=1e3), NOISY])
def test_a_site_that_trains_some_modules_sends_those_alone(policy):
    method = build("fedit")
    some = sorted(toy.SHAPES)[:1]

    def train(state, round, seed):
        trained = toy.trainer(method)(state, round, seed)
        return replace(trained, adapter=subset(trained.adapter, some))

    _, done = turn(policy, "fedit", train=train)
    assert {name.rpartition("/")[0] for name in decode(done.payload).entries} == set(some)


def test_a_pattern_for_a_parameter_is_for_each_of_its_matrices():
    experts = [f"layers.0.mlp.experts.down_proj.{place}" for place in (0, 12)]
    for pattern in ("down_proj", "*.experts.down_proj", "layers.0.mlp.experts.down_proj"):
        check_job(Policy(modules=(pattern,)), "fedit", experts, 5, 5)
    refused(
        "module layers.0.mlp.experts.down_proj.0",
        lambda: check_job(Policy(modules=("up_proj",)), "fedit", experts[:1], 5, 5),
    )
