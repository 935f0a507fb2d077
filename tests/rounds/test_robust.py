"""A round with a liar: with every method, in both engines' one server turn; and honest specialists, who stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom import testbeds
from fedloom.errors import ConfigError, RoundError
from fedloom.lora.pair import LoraPair, LoraState, digest
from fedloom.methods.method import State
from fedloom.methods.table import METHODS, build
from fedloom.records.configfile import load_config
from fedloom.rounds.caps import Caps, share_out
from fedloom.rounds.checks import check_update
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.federation import Federation
from fedloom.rounds.job import Robust
from fedloom.rounds.robust import Scales
from fedloom.rounds.step import Trained
from fedloom.rounds.trial import Trial
from fedloom.rounds.turns import server_turn
from fedloom.workspace.checkpoint import Snapshot, list_checkpoints, load_checkpoint, save_checkpoint
from fedloom.workspace.plan import robust_of
from toy import CLIENTS_OF_SCALARS, built, initial, job, random_state, step
from toy import trainer as toy_trainer

CLIENTS = ["ada", "bob", "cyd", "dan"]
LIAR = "dan"
GOAL = random_state(77, size=0.3)


def far_off(state: State, bend: float = 1.0) -> float:
    """An error from 0 to 1: how far the model is from where honest clients train to, as one token's."""
    total = {name: tensor.double() for name, tensor in state.total.tensors().items()}
    dense = {m: total[f"{m}/B"] @ total[f"{m}/A"] - GOAL[m].B.double() @ GOAL[m].A.double() for m in GOAL}
    size = sum(float(one.square().sum()) for one in dense.values())
    return 1.0 - (1.0 / (1.0 + size)) ** bend


def toward(pair: LoraPair, goal: LoraPair, parts: tuple[str, ...], size: float) -> LoraPair:
    """One small step of gradient descent on ‖B A − goal‖², times `size`."""
    gap = pair.B @ pair.A - goal.B @ goal.A
    steps = {"A": pair.B.T @ gap, "B": gap @ pair.A.T}
    return LoraPair(*(pair.part(part) - size * (part in parts) * steps[part] for part in ("A", "B")))


def trainer(method, size: float, examples: int = 8):
    def train(state, round, seed):
        core, parts = method.core(state), method.trainable(round)
        if core:
            noise = step(state, round, seed, size=0.01 * size, core=core).adapter
            return Trained(noise, examples, 1.0)
        after = {m: toward(pair, GOAL[m], parts, size) for m, pair in state.adapter.items()}
        return Trained(LoraState(after), examples, 1.0)

    return train


def federation(name: str, robust: Robust, **options) -> Federation:
    method = build(name, {"sparsity": 0.0}) if name == "fed-dare" else built(name)
    made = replace(job(method, **options), robust=robust)
    return Federation(made, initial(), dict.fromkeys(CLIENTS))


def uploads(held: Federation, sizes: dict[str, float]) -> dict[str, bytes]:
    held.number += 1
    return {client: held.client_turn(client, trainer(held.job.method, size)) for client, size in sizes.items()}


def same(one: State, other: State) -> bool:
    return digest(one.adapter) == digest(other.adapter) and digest(one.frozen) == digest(other.frozen)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CLIENTS_OF_SCALARS])
def test_who_does_harm_is_refused_and_the_round_is_as_if_it_had_not_sent(name: str):
    held = federation(name, Robust(public=True, tolerance=0.0))
    sent = uploads(held, dict.fromkeys(CLIENTS[:3], 0.5) | {LIAR: -8.0})
    turn = server_turn(held.job, held.server, sent, 1, public=far_off)
    honest = {client: sent[client] for client in CLIENTS[:3]}
    without = server_turn(held.job, held.server, honest, 1, public=far_off)
    assert turn.refused.keys() == {LIAR} and not without.refused
    assert "the error on federation.public is" in turn.refused[LIAR]
    assert turn.payload == without.payload and same(turn.state, without.state)


@pytest.mark.parametrize("rule", ["clip", "geometric_median", "trimmed", "multi_krum"])
def test_honest_clients_of_the_same_skill_lose_nothing(rule: str):
    held = federation("fedit", Robust(rule, malicious=0, public=True))
    sent = uploads(held, dict(zip(CLIENTS, (0.5, 0.55, 0.45, 0.5), strict=True)))
    turn = server_turn(held.job, held.server, sent, 1, public=far_off)
    plain = server_turn(replace(held.job, robust=Robust()), held.server, sent, 1)
    assert turn.payload == plain.payload and not turn.refused and not turn.notes


def test_specialists_who_have_nothing_in_common_all_stay():
    """Each moves a module of its own, and undoes some of the others': none is thrown out, though no two agree."""
    held = federation("fedit", Robust("clip", public=True))
    modules = sorted(GOAL)

    def specialist(own: str):
        def train(state, round, seed):
            noise = step(state, round, seed, size=0.02).adapter
            after = {m: toward(noise[m], GOAL[m], ("A", "B"), 0.5 if m == own else 0.0) for m in noise}
            return Trained(LoraState(after), 8, 1.0)

        return train

    for _ in range(3):
        steps = {client: specialist(own) for client, own in zip(CLIENTS, modules, strict=False)}
        held.number += 1
        sent = {client: held.client_turn(client, train) for client, train in steps.items()}
        turn = server_turn(held.job, held.server, sent, held.number, public=far_off)
        assert not turn.refused
        held.server = turn.state
        held.deliver(turn)


def test_a_liar_is_worth_less_the_larger_it_is():
    """Clip: a liar that sends ten times as much moves the model less, not as much as before, and nobody is refused."""
    moved = []
    for size in (-4.0, -40.0, -400.0):
        held = federation("flasc", Robust("clip"), values="fp32")
        held.job = replace(held.job, method=build("fed-dare", {"sparsity": 0.0}))
        sent = uploads(held, dict.fromkeys(CLIENTS[:3], 0.5) | {LIAR: size})
        turn = server_turn(held.job, held.server, sent, 1)
        (note,) = turn.notes
        assert not turn.refused and note.startswith(f"client {LIAR} counts for ")
        moved.append(far_off(turn.state))
    honest = {client: sent[client] for client in CLIENTS[:3]}
    without = far_off(server_turn(held.job, held.server, honest, 1).state)
    assert far_off(held.server) > moved[0] > moved[1] > moved[2] > without
    assert moved[2] - without < 0.1 * (moved[0] - without)


@pytest.mark.parametrize("name", METHODS)
def test_whatever_the_coding_who_is_far_too_large_hardly_counts_and_is_found_by_distance(name: str):
    held = federation(name, Robust("clip"))
    held.number += 1
    method, scalars = held.job.method, name in CLIENTS_OF_SCALARS

    def train(size: float):
        return toy_trainer(method, size=abs(size)) if scalars else trainer(method, size)

    sent = {client: held.client_turn(client, train(-30.0 if client == LIAR else 0.1)) for client in CLIENTS}

    def turn(rule: str):
        return server_turn(replace(held.job, robust=Robust(rule, malicious=1)), held.server, sent, 1)

    for rule in ("clip", "geometric_median"):
        (note,) = turn(rule).notes
        assert note.startswith(f"client {LIAR} counts for 0.")
    assert turn("trimmed").refused.keys() == {LIAR}


def test_what_clip_takes_from_a_liar_gives_nobody_more_than_max_share():
    held = federation("fedit", Robust("clip"))
    held.job, held.number = replace(held.job, caps=Caps(max_share=0.5)), 1
    sizes = {"ada": (0.5, 24), "bob": (0.5, 10), "cyd": (0.5, 10), LIAR: (-40.0, 10)}
    sent = {client: held.client_turn(client, trainer(held.job.method, *one)) for client, one in sizes.items()}
    decoded = Decoded.beside(held.server)
    facts = {client: check_update(held.job, held.server, client, one, 1, decoded) for client, one in sent.items()}
    weighed = Scales(held.job, held.server, Cohort(sent, {}, facts, decoded)).weigh(facts)
    shares = weighed.cohort.weights
    assert shares["ada"] == pytest.approx(0.5) and sum(shares.values()) == pytest.approx(1.0)
    assert shares["bob"] == shares["cyd"] > 20 * shares[LIAR] > 0


def test_a_twisted_pair_is_too_large_though_its_change_is_not():
    """(B / c, c A) is the same ΔW; where factors are averaged by themselves it is none the less a lie."""
    held = federation("fedit", Robust("clip"))
    sent = uploads(held, dict.fromkeys(CLIENTS[:3], 0.5))

    def twist(state, round, seed):
        trained = trainer(held.job.method, 0.5)(state, round, seed)
        return replace(trained, adapter=trained.adapter.map(lambda pair: LoraPair(50 * pair.A, pair.B / 50)))

    turn = server_turn(held.job, held.server, {**sent, LIAR: held.client_turn(LIAR, twist)}, 1)
    assert any(note.startswith(f"client {LIAR} counts for ") for note in turn.notes)


def test_whom_a_rule_leaves_out_is_refused_by_name():
    held = federation("fedit", Robust("trimmed", malicious=1))
    sent = uploads(held, dict.fromkeys(CLIENTS[:3], 0.5) | {LIAR: -0.6})
    turn = server_turn(held.job, held.server, sent, 1)
    assert turn.refused == {LIAR: "it lies farthest from the others of the round (federation.robust is 'trimmed')"}


def test_a_round_of_liars_alone_is_skipped_and_not_the_end_of_a_run():
    held = federation("fedit", Robust("clip", public=True, tolerance=0.0))
    sent = uploads(held, dict.fromkeys(CLIENTS[:2], 0.5) | {"cyd": -6.0, LIAR: -9.0})
    assert server_turn(held.job, held.server, sent, 1, least=4, public=far_off).refused.keys() == {"cyd", LIAR}
    held = federation("fedit", Robust("clip", public=True))
    held.server = replace(held.server, adapter=(near := random_state(77, size=0.3)), digest=digest(near))
    held.clients = {client: replace(state, adapter=near, digest=digest(near)) for client, state in held.clients.items()}

    def away(state, round, seed):
        return step(state, round, seed, size=0.5)

    sent = {client: held.client_turn(client, away) for client in CLIENTS}
    with pytest.raises(
        RoundError, match="round 0: no usable update from 4 clients .*the round as a whole does harm"
    ) as caught:
        server_turn(held.job, held.server, sent, 0, least=4, public=far_off)
    assert caught.value.can_skip and caught.value.refused.keys() == set(CLIENTS)


def judged(state: State, harm: dict[str, float], before: float = 0.5) -> tuple[set[str], State]:
    """(who is refused, the state with its records) of a trial in which each client does this harm, as a share.

    The error is `before`, and a half at the end; up to 0.06 of it is tolerated.
    """
    share, errors = 1 / len(harm), {"after": 0.5}
    for client, done in harm.items():
        rest = 0.5 - done * before
        errors[client] = rest if rest >= before else (rest - share * before) / (1 - share)
    trial = Trial.begin(lambda held, bend: errors.get(held.digest, before), replace(state, digest="before"), 0.06)
    shares = dict.fromkeys(harm, share)
    verdict = trial.judge(replace(state, digest="after"), shares, lambda client: replace(state, digest=client))
    return set(verdict.refused), replace(state, memory=trial.remember(verdict.harm, verdict.refused))


def records(**held: tuple[float, float]) -> dict[str, torch.Tensor]:
    """Of each client (what it has not made good, the sum of its harm), as the server's memory has them."""
    return {f"harm/{client}": torch.tensor(one, dtype=torch.float64) for client, one in held.items()}


def test_a_little_harm_in_every_round_adds_up_and_a_record_is_part_of_the_checkpoint(tmp_path):
    """Of those who do harm, one goes on, and one makes it good."""
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    found = []
    rounds = [{"ada": -0.02, "bob": 0.04, LIAR: 0.04}, {"ada": -0.02, "bob": -0.1, LIAR: 0.04}]
    for number, harm in enumerate(rounds):
        refused, state = judged(state, harm)
        found.append(refused)
        save_checkpoint(tmp_path, Snapshot(number, state))
        state = load_checkpoint(list_checkpoints(tmp_path)[-1]).server
    assert found == [set(), {LIAR}]
    assert state.memory[f"harm/{LIAR}"].tolist() == pytest.approx([0.04, 0.08]), "what was refused was not done"
    assert state.memory["harm/ada"].tolist() == pytest.approx([0.0, -0.02])


def test_who_did_more_harm_than_good_has_no_share_of_the_gain_to_take_as_a_specialist_has():
    """Both do the same harm beside the same gain; the specialist did good before."""
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    harm = {"ada": -0.2, "bob": 0.08, LIAR: 0.08}
    assert judged(state, harm, before=0.6)[0] == set(), "a first round says nothing"
    held = replace(state, memory=records(bob=(0.0, -0.2), **{LIAR: (0.0, 0.02)}))
    refused, after = judged(held, harm, before=0.6)
    assert refused == {LIAR}
    assert after.memory[f"harm/{LIAR}"].tolist() == pytest.approx([0.0, 0.1])
    assert judged(held, {"ada": -0.2, "bob": 0.08}, before=0.6)[0] == set()


def test_who_sends_nothing_does_no_harm_although_the_others_would_count_for_more_without_it():
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    held = replace(state, memory=records(**{LIAR: (0.4, 0.4)}))
    # Four clients whose updates are added up; the error falls by 0.4 times what is added.
    errors = {"before": 0.6, "after": 0.3, "ada": 0.3333, "bob": 0.3333, "cyd": 0.3333, LIAR: 0.2}
    trial = Trial.begin(lambda one, bend: errors[one.digest], replace(held, digest="before"), 0.02)
    shares = dict.fromkeys([*CLIENTS[:3], LIAR], 0.25)
    verdict = trial.judge(replace(held, digest="after"), shares, lambda client: replace(held, digest=client))
    assert not verdict.refused and verdict.harm[LIAR] == pytest.approx(0.0)


def test_whoever_makes_a_round_better_is_taken_whatever_it_has_done():
    """Else a specialist who was bad for the first rounds would be shut out of all others."""
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    held = replace(state, memory=records(bob=(0.4, 0.4), **{LIAR: (0.4, 0.4)}))
    refused, after = judged(held, {"ada": -0.1, "bob": -0.001, LIAR: 0.001})
    assert refused == {LIAR}, "which has nothing left to do harm with"
    assert judged(replace(after, memory=held.memory), {"ada": -0.1, "bob": -0.001})[0] == set()


def test_a_specialist_that_overshot_once_is_not_refused_for_next_to_nothing_afterwards():
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    held = replace(state, memory=records(bob=(0.0, -0.8)))
    refused, held = judged(held, {"ada": -0.01, "bob": 0.1, "cyd": -0.01})
    assert refused == {"bob"}
    assert judged(held, {"ada": -0.01, "bob": 0.002, "cyd": -0.01})[0] == set()


def test_who_is_known_for_harm_may_do_none():
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    harm = {"ada": -0.2, "bob": 0.01, LIAR: 0.01}
    held = replace(state, memory=records(bob=(0.0, 0.05), **{LIAR: (0.0, 0.07)}))
    assert judged(held, harm)[0] == {LIAR}


def test_the_error_is_bent_while_nothing_is_learned_and_plain_once_everything_is():
    """The first tokens that come right are one in a million; later only those count that can be lost."""
    state = Federation(job(build("fedit")), initial(), dict.fromkeys(CLIENTS)).server
    nothing = Trial.begin(lambda _, bend: 1.0 - 1e-6**bend, state, 0.05)
    assert nothing.bend == 0.2 and nothing.before == pytest.approx(1.0 - 1e-6**0.2)
    most = Trial.begin(lambda _, bend: 1.0 - 0.9**bend, state, 0.05)
    assert most.bend == pytest.approx(0.9) and most.before == pytest.approx(1.0 - 0.9**0.9)


def test_an_error_that_is_not_finite_is_the_worst():
    held = federation("fedit", Robust(public=True, tolerance=0.0))
    sent = uploads(held, dict.fromkeys(CLIENTS[:3], 0.5) | {LIAR: -8.0})

    def broken(state: State, bend: float) -> float:
        return float("nan") if far_off(state) > far_off(held.server) else far_off(state, bend)

    assert server_turn(held.job, held.server, sent, 1, public=broken).refused.keys() == {LIAR}


def test_a_claim_of_examples_has_a_limit():
    said = {"ada": 100, "bob": 100, "cyd": 100, LIAR: 10**8}
    shares, notes = share_out(said, "examples", Caps(max_examples=200, client_examples={"ada": 100}))
    assert shares == {"ada": 0.2, "bob": 0.2, "cyd": 0.2, LIAR: 0.4}
    assert notes == ["client dan says 100,000,000 examples; it counts for 200 (federation.max_examples)"]
    assert share_out(said, "uniform", Caps(max_examples=1))[1] == []


@pytest.mark.parametrize(
    ("sets", "clients", "said"),
    [
        (["federation.robust=multi_krum"], 4, "it needs 5 of them, and a round has 4"),
        (["federation.robust=trimmed", "federation.num_malicious_clients=2"], 4, "it needs 5 of them"),
        (["federation.robust=clip", "privacy.secure_aggregation=true"], 4, "the server has their sum alone"),
        (["federation.public=p.jsonl", "privacy.secure_aggregation=true"], 4, "federation.public looks at every"),
        (["federation.robust=clip", "federation.regions=2"], 4, "the root has its regions' sums alone"),
    ],
)
def test_what_a_rule_cannot_hold_or_see_is_refused_beforehand(sets: list[str], clients: int, said: str):
    config = load_config(testbeds.testbed_folder() / "demo.toml", sets)
    with pytest.raises(ConfigError, match=said):
        robust_of(config, CLIENTS[:clients])


def test_rules_that_there_is_no_majority_for_are_not_asked_for_one():
    config = load_config(testbeds.testbed_folder() / "demo.toml", ["federation.robust=multi_krum"])
    assert robust_of(config, [f"client-{k}" for k in range(20)]).faults(20) == 5
