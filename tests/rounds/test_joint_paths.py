"""A whole adapter as paths: what arrives is what the server kept, within the budget; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Dense, Quantized, Sparse, to_dense
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError, WireError
from fedloom.lora.pair import LoraPair, initial_state
from fedloom.methods.method import State
from fedloom.methods.shared.guard import UNDONE
from fedloom.methods.table import build
from fedloom.rounds.joint import split_entries
from fedloom.rounds.joint_paths import PATHS
from fedloom.rounds.turns import Job, accept, client_turn, server_turn, start
from fedloom.wire import Header, Message, decode, describe, encode
from toy import step

SHAPES = {f"layers.{number}.{kind}": (64, 96) for number in range(4) for kind in ("k_proj", "q_proj")}
RANKS = dict.fromkeys(SHAPES, 2)
INITIAL = initial_state(SHAPES, RANKS, 0)
INITIAL_SIGNS = torch.arange(2 * 96).view(2, 96) % 2 * 2.0 - 1.0
HEADER = Header("update", "loom", 1, 0, "ab" * 16, "cd" * 16, num_examples=1)


def job(budget: int, **settings: object) -> Job:
    method = build("loom", {"upload_share": 0.5, "coding": "paths", **settings})
    return Job(method, 5, quantize("int4"), budget=Budget(size=budget), num_rounds=4, start=INITIAL)


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        *(({"broadcast": what}, budget) for what in ("change", "state") for budget in (260, 400, 700)),
        *(({"trainable": "B"}, budget) for budget in (210, 260, 310)),
    ],
)
def test_rounds_of_paths_lead_all_to_one_state(settings: dict[str, str], budget: int):
    run, only_b = job(budget, **settings), "trainable" in settings
    named = f"{PATHS}B:2" if only_b else f"{PATHS}2"
    server, clients = start(run, INITIAL), {name: start(run, INITIAL, RANKS) for name in ("ada", "bob")}
    last: list[bytes] = []
    for round in (1, 2, 3):
        turns = {name: client_turn(run, name, state, last, step, round) for name, state in clients.items()}
        clients = {name: turn.state for name, turn in turns.items()}
        done = server_turn(run, server, {name: turn.payload for name, turn in turns.items()}, round)
        assert not done.refused
        assert all(
            {named} == decode(sent).entries.keys() for sent in [done.payload, *(t.payload for t in turns.values())]
        )
        assert max(len(done.payload), *(len(turn.payload) for turn in turns.values())) <= budget
        server, last = done.state, [done.payload]
    caught_up = accept(run, clients["ada"], last[0])
    assert caught_up.digest == server.digest
    for name, tensor in caught_up.adapter.tensors().items():
        assert torch.equal(tensor, server.adapter.tensors()[name])
    moved = {
        n.rpartition("/")[2] for n, t in server.adapter.tensors().items() if not torch.equal(t, INITIAL.tensors()[n])
    }
    assert moved == ({"B"} if only_b else {"A", "B"})


def test_where_a_rests_its_bits_go_to_b():
    """Of B alone a payload of the same bytes says more, and nothing but B is trained."""
    lost = []
    for settings in ({}, {"trainable": "B"}):
        run = job(500, **settings)
        turn = client_turn(run, "ada", start(run, INITIAL, RANKS), [], step, 1)
        said = split_entries(decode(turn.payload).entries, State(INITIAL))
        change = {m: turn.trained.adapter[m].B - INITIAL[m].B for m in SHAPES}
        angle = sum(float((change[m] * to_dense(said[f"{m}/B"])).sum()) for m in SHAPES)
        lengths = [
            sum(float(t.square().sum()) for t in ts)
            for ts in (change.values(), (to_dense(said[f"{m}/B"]) for m in SHAPES))
        ]
        lost.append(1 - angle**2 / (lengths[0] * lengths[1]))
        assert run.method.trainable(1) == (("B",) if settings else ("A", "B"))
    assert lost[1] < lost[0]


def test_b_alone_goes_with_changes_as_paths():
    for settings in ({}, {"coding": "codes"}, {"coding": "paths", "broadcast": "state"}, {"positions": "shared"}):
        with pytest.raises(ConfigError, match="method.trainable = 'B' is for changes as paths"):
            build("loom", {"trainable": "B", **settings})
    with pytest.raises(ConfigError, match="method.trainable is 'C': input should be 'both' or 'B'"):
        build("loom", {"trainable": "C"})


def test_what_a_broadcast_of_changes_loses_waits():
    """What everybody holds and what waits are together all that was sent."""
    run = job(300, server_residual=1.0, step_guard=False)
    server, client = start(run, INITIAL), start(run, INITIAL, RANKS)
    turn = client_turn(run, "ada", client, [], step, 1)
    server = server_turn(run, server, {"ada": turn.payload}, 1).state
    wanted = {
        name: t + to_dense(entry)
        for (name, t), entry in zip(
            sorted(INITIAL.tensors().items()),
            dict(sorted(split_entries(decode(turn.payload).entries, State(INITIAL)).items())).values(),
            strict=True,
        )
    }
    for name, tensor in server.adapter.tensors().items():
        assert torch.allclose(tensor + server.memory[name], wanted[name], atol=1e-6)
    assert sum(float(server.memory[name].square().sum()) for name in wanted) > 0


@pytest.mark.parametrize("trainable", ["both", "B"])
def test_a_step_that_clients_undo_is_taken_back_within_the_budget(trainable: str):
    run = job(700, trainable=trainable)
    server, client = start(run, INITIAL), start(run, INITIAL, RANKS)

    def move(sign: float):
        def train(state: State, round: int, seed: int):
            moved = state.adapter.map(lambda p: LoraPair(p.A + sign * 0.1 * INITIAL_SIGNS, p.B + sign * 0.1))
            return replace(step(state, round, seed), adapter=moved)

        return train

    last: list[bytes] = []
    for round, sign in ((1, 1.0), (2, -1.0)):
        turn = client_turn(run, "ada", client, last, move(sign), round)
        done = server_turn(run, server, {"ada": turn.payload}, round)
        assert len(done.payload) <= 700
        client, server, last = turn.state, done.state, [done.payload]
    assert done.stats[UNDONE] == 1.0
    gone = sum(float((t - INITIAL.tensors()[name]).square().sum()) for name, t in server.adapter.tensors().items())
    moved = [t for name, t in INITIAL.tensors().items() if trainable == "both" or name.endswith("/B")]
    step_size = sum(float(torch.full_like(t, 0.1).square().sum()) for t in moved)
    assert gone < step_size, "what the first broadcast had moved is moved back, as far as the bytes go"


@pytest.mark.parametrize(("trainable", "named"), [("both", "1"), ("B", "B:1")])
def test_a_client_of_lower_rank_is_understood(trainable: str, named: str):
    run, low = job(150 if trainable == "B" else 330, trainable=trainable), dict.fromkeys(SHAPES, 1)
    turn = client_turn(run, "ada", start(run, INITIAL, low), (), step, 1)
    assert f"{PATHS}{named}" in decode(turn.payload).entries
    assert not server_turn(replace(run, ranks={"ada": low}), start(run, INITIAL), {"ada": turn.payload}, 1).refused


def sent() -> Dense:
    """The tensor of an update."""
    turn = client_turn(job(400), "ada", start(job(400), INITIAL, RANKS), (), step, 1)
    paths = decode(turn.payload).entries[f"{PATHS}2"]
    assert isinstance(paths, Dense)
    return paths


PATH = sent()


def altered(codes: torch.Tensor) -> Dense:
    values = PATH.values
    assert isinstance(values, Quantized)
    return Dense((codes.numel(),), Quantized(codes, torch.ones(-(-codes.numel() // values.block)), values.block, 1))


def cut(numel: int) -> Dense:
    assert isinstance(PATH.values, Quantized)
    return altered(PATH.values.codes[:numel])


FLOATS = Dense(PATH.shape, torch.ones(PATH.shape[0]))
SPARSE = Sparse(PATH.shape, torch.arange(3), torch.ones(3))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({f"{PATHS}2": PATH, "other": PATH}, "holds other tensors beside it"),
        ({f"{PATHS}02": PATH}, "names no rank"),
        ({f"{PATHS}3": PATH}, "larger adapter"),
        ({f"{PATHS}B:02": PATH}, "names no rank"),
        ({f"{PATHS}B:B:2": PATH}, "names no rank"),
        ({f"{PATHS}B:3": PATH}, "larger adapter"),
        ({f"{PATHS}B:2": PATH}, "paths|component"),
        ({f"{PATHS}2": FLOATS}, "codes of 1 bits"),
        ({f"{PATHS}2": SPARSE}, "is not dense"),
        ({f"{PATHS}2": cut(PATH.shape[0] - 1)}, "do not fit"),
        ({f"{PATHS}2": cut(16)}, "not coded as they should be"),
        ({f"{PATHS}2": altered(torch.cat([PATH.values.codes, torch.ones(1, dtype=torch.int8)]))}, "left over"),
        ({f"{PATHS}2": altered(torch.ones(PATH.shape[0], dtype=torch.int8))}, "paths|scale of a component"),
    ],
)
def test_paths_that_do_not_fit_are_refused(entries, message):
    with pytest.raises(WireError, match=message):
        split_entries(decode(encode(Message(HEADER, entries))).entries, State(INITIAL))


def test_the_bytes_of_paths_stay_what_they_are():
    one = initial_state({"q_proj": (300, 500)}, {"q_proj": 1}, 0)
    run = replace(job(200), start=one)
    state = start(run, one, {"q_proj": 1})

    def train(state: State, round: int, seed: int):
        ramp = one.map(lambda p: LoraPair(p.A, p.B + torch.arange(300)[:, None] % 7 / 64))
        return replace(step(state, round, seed), adapter=ramp)

    payload = client_turn(run, "ada", state, (), train, 1).payload
    assert payload.hex() == GOLDEN, payload.hex()
    values = to_dense(split_entries(decode(payload).entries, state)["q_proj/B"]).flatten()
    assert values[:5].tolist() == pytest.approx(TOLD, rel=1e-6)
    assert describe(payload).size == len(payload)


def test_shared_positions_do_not_go_with_paths():
    with pytest.raises(ConfigError, match="coding = 'paths'"):
        build("loom", {"coding": "paths", "positions": "shared"})
    with pytest.raises(ConfigError, match="server_learning_rate is set"):
        build("loom", {"server_learning_rate": 2.0, "coding": "codes"})
    assert build("loom", {"server_learning_rate": 2.0}).own_values, "paths, which are all that it goes with"


GOLDEN = (
    "464c4f4d0200046c6f6f6d010003105c2fcce0471de041d4e9f9e398b5ad4610a48f1e1c1e4bdff9222f3cfc9f3fac44222201000770"
    "617468733a31000501f004808004051a4e4e1b01011c01011d01011e01017dfa005905de3b2b8ba778efac2c9ee2bdb3b2788ae7ccca"
    "e229de3b2b8ba778efac2c9e0a4c560532e5c0cccae2a9c06455e0bdb3b2782a30591578efac2c9e0a4c5605de3b2b8ba702935581a7"
    "7f000000f601d345e47eb195"
)
TOLD = [-0.05682373, -0.002746582, 0.006408691, 0.01141357, 0.06158447]
