"""loom whose broadcasts say the whole adapter: nothing is lost but for a round, and the newest is enough."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from fedloom.compress.entries import dense_entry
from fedloom.compress.paths import trace_within
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State, Update
from fedloom.methods.shared import states as whole_states
from fedloom.methods.shared.averaging import zero_change
from fedloom.methods.shared.guard import UNDONE
from fedloom.methods.shared.states import take_state
from fedloom.methods.table import build
from fedloom.rounds.job import Job
from toy import RANK, Federation, initial, job, random_state


def states(budget: int = 500, **settings: object) -> Job:
    return job(build("loom", {"broadcast": "state", **settings}), budget=budget, values="int4")


broadcast_state = partial(whole_states.broadcast_state, trace_within)


def all_of(adapter: LoraState, direction: str, context: object) -> int:
    return 10**6


def nothing_of(adapter: LoraState, direction: str, context: object) -> int:
    return 0


def test_the_server_holds_the_exact_mean_whatever_it_could_broadcast():
    """What rounding leaves out waits, so that a later broadcast of many bytes says all that was ever sent."""
    begin = initial()
    context = replace(states().context(1), start=begin)
    state, total = State(begin), {name: t.double() for name, t in begin.tensors().items()}
    for round, room in ((1, nothing_of), (2, nothing_of), (3, all_of)):
        changes = {name: 0.01 * t for name, t in random_state(round).tensors().items()}
        update = Update("a", 1.0, from_changes(changes))
        done = broadcast_state(room, 1.0, False, state, [update], replace(context, round=round))
        state = replace(take_state(state, done.entries, context), memory=done.memory)
        total = {name: t + changes[name].double() for name, t in total.items()}
    lost = max(float((t - total[name]).abs().max()) for name, t in state.adapter.tensors().items())
    assert lost < 3e-3, "a code of 8 bits of the largest change, and bfloat16's rounding of what it stands for"
    assert done.stats["coded_error"] < 1e-4


def from_changes(changes):
    return {name: dense_entry(tensor) for name, tensor in changes.items()}


def test_nothing_sent_leaves_the_state_where_the_run_began():
    begin = initial()
    context = replace(states().context(1), start=begin)
    done = broadcast_state(
        nothing_of, 1.0, True, State(begin), [Update("a", 1.0, from_changes(zero_change(begin)))], context
    )
    after = take_state(State(random_state(1)), done.entries, context)
    for name, tensor in after.adapter.tensors().items():
        assert torch.equal(tensor, begin.tensors()[name])


def test_the_server_goes_so_many_times_the_mean():
    begin = initial()
    context = replace(states().context(1), start=begin)
    update = Update("a", 1.0, from_changes(random_state(3).tensors()))
    once, twice = (broadcast_state(all_of, rate, False, State(begin), [update], context) for rate in (1.0, 2.0))
    for name, tensor in take_state(State(begin), twice.entries, context).adapter.tensors().items():
        start, single = begin.tensors()[name], take_state(State(begin), once.entries, context).adapter.tensors()[name]
        assert torch.allclose(tensor - start, 2 * (single - start), atol=0.03)


def test_a_step_that_clients_undo_is_taken_back():
    begin = initial()
    context = replace(states().context(1), start=begin)
    state = State(begin)
    ahead = random_state(7).tensors()
    for round, sign in ((1, 1.0), (2, -1.0)):
        update = Update("a", 1.0, from_changes({name: sign * t for name, t in ahead.items()}))
        done = broadcast_state(all_of, 1.0, True, state, [update], replace(context, round=round))
        state = replace(take_state(state, done.entries, context), memory=done.memory)
    assert done.stats[UNDONE] == 1.0
    for name, tensor in state.adapter.tensors().items():
        assert torch.allclose(tensor, begin.tensors()[name], atol=2e-3)
    assert not any("before" in name for name in state.memory)


@pytest.mark.parametrize("coding", ["paths", "codes"])
def test_payloads_keep_to_the_budget_of_the_whole_run(coding: str):
    federation = Federation(replace(states(400, coding=coding), num_rounds=6, downloads=1.5))
    sizes = []
    for _ in range(6):
        result = federation.play(["ada", "bob"])
        sizes.append(sum(map(len, result.uploads.values())) / 2 + 1.5 * len(result.broadcast))
    assert sum(sizes) / 6 <= 2 * 400


def test_clients_of_unequal_rank_hold_the_whole_and_train_their_part():
    federation = Federation(states(600), {"ada": RANK, "bob": RANK - 2})
    for _ in range(3):
        federation.play()
    federation.bring("ada")
    federation.bring("bob")
    whole = federation.clients["bob"]
    for module, pair in federation.server.adapter.items():
        both = torch.cat([whole.adapter[module].A, whole.tail[module].A])
        assert torch.equal(both, pair.A)


def test_a_job_that_does_not_know_its_start_says_so():
    run = Job(build("loom", {"broadcast": "state"}), 3, quantize("int4"))
    with pytest.raises(ConfigError, match="begins with"):
        take_state(State(initial()), {}, run.context(1))
