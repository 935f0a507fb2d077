"""A coded core between factors that rest: what every site computes alike, what travels, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.compress.budget import Budget
from fedloom.compress.entries import Dense, dense_entry, to_dense
from fedloom.compress.levels import coded, without_zeros
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError, WireError
from fedloom.lora.pair import LoraPair, LoraState, core_matrix, initial_state
from fedloom.lora.resting import leading_pair, random_pair
from fedloom.methods.method import Context, Entries, State, Update
from fedloom.methods.shared.dial import spend_on_core
from fedloom.methods.spending import RunShape
from fedloom.methods.table import build
from fedloom.model.peft_bridge import read_weight
from fedloom.records.configfile import load_config
from fedloom.rounds.draft import Draft
from fedloom.rounds.joint import SCALES, Outline, join_entries, split_entries
from fedloom.rounds.least import check_room
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import start
from fedloom.wire import Header, Message, decode, encode
from fedloom.workspace.assemble import load_setup
from small_testbed import small_testbed
from toy import RANK, SHAPES, Federation, initial, job, on_base


def weight(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (300, 420)])
def test_singular_vectors_are_those_of_the_weight_to_the_rounding(shape):
    rank = 3
    w = weight(*shape) + 60 * weight(shape[0], rank, 1) @ weight(rank, shape[1], 2) / shape[0]
    pair = leading_pair(w, rank, "q_proj")
    u, s, vh = torch.linalg.svd(w.double())
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(rank), atol=0.01, rtol=0)
    torch.testing.assert_close(pair.B.T @ pair.B, torch.eye(rank), atol=0.01, rtol=0)
    held = torch.linalg.matrix_norm((pair.B.T @ w @ pair.A.T).double())
    assert held == pytest.approx(float(s[:rank].norm()), rel=0.01)
    assert torch.all(pair.B.gather(0, pair.B.abs().argmax(0, keepdim=True)) > 0)


def test_libraries_that_round_otherwise_have_the_same_factors():
    """Noise a hundred times as large as float64's stands for another library's order of sums."""
    w = weight(48, 32).double()
    noisy = w * (1 + 1e-14 * weight(48, 32, 5).double())
    one, two = leading_pair(w, 8, "q"), leading_pair(noisy, 8, "q")
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_above_the_rank_of_a_weight_the_factors_are_zero():
    pair = leading_pair(weight(3, 9), 5, "q")
    assert pair.rank == 5 and pair.A[:3].any() and not pair.A[3:].any() and not pair.B[:, 3:].any()


def test_random_factors_have_unit_length_and_do_not_depend_on_the_rank():
    small, large = random_pair((12, 20), 2, "q"), random_pair((12, 20), 4, "q")
    assert torch.equal(large.A[:2], small.A) and torch.equal(large.B[:, :2], small.B)
    torch.testing.assert_close(large.A.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(large.B.norm(dim=0), torch.ones(4))
    assert not torch.equal(random_pair((12, 20), 2, "k").A, small.A)


def method(**settings: object):
    return on_base(build("lora-xs", settings), initial())


def test_a_run_begins_with_the_base_model_and_a_digest_that_no_linear_algebra_is_in():
    svd, random = (start(job(method(factors=kind)), initial()) for kind in ("svd", "random"))
    assert svd.digest == random.digest
    for pair in svd.adapter.values():
        assert not pair.A.any() and pair.B.any()


def test_the_core_learns_what_lies_between_its_factors():
    bound = method(coded=False)
    core = bound.core(start(job(bound), initial()))
    wanted = {m: pair.B @ weight(RANK, RANK) @ pair.A for m, pair in core.items()}

    def train(state: State, round: int, seed: int) -> Trained:
        moved = {}
        for m, pair in state.adapter.items():
            gap = wanted[m] - pair.B @ pair.A
            r = torch.linalg.pinv(pair.B) @ gap @ torch.linalg.pinv(core[m].A)
            moved[m] = LoraPair(pair.A + 0.5 * r @ core[m].A, pair.B)
        return Trained(LoraState(moved), 1, 0.0)

    federation = Federation(job(build("lora-xs", {"coded": False})), train=train)
    for _ in range(12):
        federation.play()
    for m, pair in federation.server.adapter.items():
        assert (pair.B @ pair.A - wanted[m]).norm() < 1e-3 * wanted[m].norm()


@pytest.mark.parametrize("broadcast", ["change", "state"])
def test_what_a_broadcast_leaves_out_waits_to_the_last_bit(broadcast):
    bound = method(broadcast=broadcast)
    state = start(job(bound), initial())
    entries = {f"{m}/R": dense_entry(weight(RANK, RANK, k)) for k, m in enumerate(SHAPES)}
    context = Context(1, 3, quantize("int4"), Budget(size=60), size=lambda e: sum(v.values.numel() for v in e.values()))
    done = bound.aggregate(state, [Update("ada", 1.0, entries)], context)
    for name, entry in entries.items():
        sent = to_dense(done.entries[name])
        kept = done.memory[name] if broadcast == "change" else done.memory[name] - sent
        assert torch.equal(kept, to_dense(entry) - sent)
    assert 0.0 < done.stats["coded_error"] < 1.0


def test_whoever_missed_rounds_takes_the_newest_state_alone():
    federation = Federation(job(build("lora-xs", {"broadcast": "state"}), budget=400))
    for _ in range(3):
        federation.play(["ada", "bob"])
    fresh, newest = start(federation.job, initial()), decoded(federation.broadcasts[-1])
    held = federation.job.method.receive(fresh, newest, federation.job.context(3))
    for m, pair in federation.server.adapter.items():
        assert torch.equal(held.adapter[m].A, pair.A)


def decoded(payload: bytes) -> Entries:
    return split_entries(decode(payload).entries, State(initial()))


def test_a_client_of_lower_rank_sends_its_rows_and_its_own_rest_waits():
    federation = Federation(job(build("lora-xs", {"client_residual": 1.0}), budget=200), {"ada": 4, "bob": 2})
    federation.play()
    for name, entry in decode(federation.uploads["bob"]).entries.items():
        assert entry.shape == (2, 4)
        state = federation.clients["bob"]
        core = federation.job.method.core(state)[name.rpartition("/")[0]]
        assert core.rank == 4 and state.memory[name].shape == (2, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"scale": 0.0}, "method.scale"), ({"server_residual": 2.0}, "method.server_residual"), ({"taper": 3.0}, "taper")],
)
def test_settings_out_of_bounds_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        build("lora-xs", settings)


def test_singular_vectors_without_a_base_model_are_refused_and_so_is_an_adapter_to_go_on_from():
    with pytest.raises(ConfigError, match="method.factors = 'random'"):
        start(job(build("lora-xs")), initial())
    learnt = initial().map(lambda pair: LoraPair(pair.A, torch.ones_like(pair.B)))
    with pytest.raises(ConfigError, match="merge it into the base model"):
        start(job(method()), learnt)


def test_a_budget_without_room_for_one_value_is_refused_before_the_first_round():
    small = replace(job(method(), budget=90), num_rounds=4)
    with pytest.raises(ConfigError, match="set wire.budget to"):
        check_room(small, initial(), {"ada": initial().ranks()})
    check_room(replace(job(method(), budget=600), num_rounds=4), initial(), {"ada": initial().ranks()})


def test_weights_are_read_as_they_are_multiplied_and_packed_ones_are_refused():
    model = nn.ModuleDict({"lin": nn.Linear(3, 5), "conv": Conv1D(5, 3), "packed": nn.Linear(3, 5)})
    model["packed"].weight.quant_state = object()
    assert read_weight(model, "lin").shape == read_weight(model, "conv").shape == (5, 3)
    for name, why in (("packed", "8 or 4 bits"), ("experts.0", "larger parameter")):
        with pytest.raises(ConfigError, match=why):
            read_weight(model, name)


def test_more_bytes_never_mean_a_smaller_core():
    shape = RunShape(17_920, 28, 64, 20, 4, 4)
    ranks = [spend_on_core(shape, size).rank for size in (3e3, 15e3, 68e3, 1e6)]
    assert ranks == sorted(ranks) and ranks[0] >= 1 and ranks[-1] == 64
    build("lora-xs", spend_on_core(shape, 15e3).settings)


def test_a_core_that_is_written_and_read_is_the_same_core():
    pair = initial_state({"q": (12, 10)}, {"q": 4}, 1)["q"]
    r = weight(4, 4)
    torch.testing.assert_close(core_matrix(r @ pair.A, pair.A), r, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [150, 190, 400])
@pytest.mark.parametrize("broadcast", ["change", "state"])
def test_cores_travel_together_and_lead_all_to_one_state(budget, broadcast):
    federation = Federation(job(build("lora-xs", {"broadcast": broadcast, "upload_share": 0.5}), budget=budget))
    for _ in range(3):
        federation.play()
        payloads = [*federation.uploads.values(), federation.broadcasts[-1]]
        assert all(set(decode(payload).entries) == {"cores:4", "scales"} for payload in payloads)
        assert all(len(payload) <= budget for payload in federation.uploads.values())
    federation.settle()
    for state in federation.clients.values():
        for name, tensor in state.adapter.tensors().items():
            assert torch.equal(tensor, federation.server.adapter.tensors()[name])


OUTLINE = Outline.of(initial(), initial().ranks(), core=True)
CODED = {
    name: Dense(shape, coded(torch.arange(16).sub(8).clamp(-7, 7).to(torch.int8), 0.25 * (k + 1), 4))
    for k, (name, shape) in enumerate(OUTLINE.shapes.items())
}
HEADER = Header("update", "lora-xs", 1, 0, "ab" * 16, "cd" * 16, num_examples=1)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_bytes_of_joined_cores_stay_what_they_are(sparse):
    entries = {name: without_zeros(entry) for name, entry in CODED.items()} if sparse else CODED
    payload = Draft(HEADER, OUTLINE).payload(entries)
    assert payload.hex() == GOLDEN[sparse]
    back = split_entries(decode(bytes.fromhex(GOLDEN[sparse])).entries, State(initial()))
    assert back.keys() == entries.keys()
    for name, entry in entries.items():
        assert type(back[name]) is type(entry) and back[name].values.bits == 4
        assert torch.equal(to_dense(back[name]), to_dense(entry))


JOINED, SCALED = join_entries(CODED, OUTLINE).values()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cores:4": JOINED}, "comes with a tensor"),
        ({"cores:x": JOINED, SCALES: SCALED}, "names no rank"),
        ({"cores:5": JOINED, SCALES: SCALED}, "larger adapter"),
        ({"cores:2": JOINED, SCALES: SCALED}, "does not fit cores"),
        ({"cores:4": Dense(JOINED.shape, torch.ones(48)), SCALES: SCALED}, "codes of 4 bits"),
        ({"cores:4": JOINED, SCALES: Dense((2,), SCALED.values[:2])}, "do not fit 3 cores"),
        ({"cores:4": JOINED, SCALES: Dense(SCALED.shape, -SCALED.values)}, "negative"),
    ],
)
def test_joined_cores_that_do_not_fit_are_refused(entries, message):
    with pytest.raises(WireError, match=message):
        split_entries(decode(encode(Message(HEADER, entries))).entries, State(initial()))


GOLDEN = {
    False: "464c4f4d0200076c6f72612d787301000110abababababababababababababababab10cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd3333"
    "020007636f7265733a3400067363616c65730004013080800400010103070c03030d03031118171601011701011801011901017d7e7e0000"
    "8028b52ffd2018750000401132547698badcfe0100430a177f0000004625f43efe728119",
    True: "464c4f4d0200076c6f72612d787301000110abababababababababababababababab10cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd3a3a"
    "020007636f7265733a3400067363616c65730104013080800401012d0000010103080106060c03030d030311171716010117010118010119"
    "0101fffefffefffe7d7e7e00008011325476a9cbed1f21436597badcfe11325476a9cbed0f7f000000fbc1fb0457556846",
}


def test_a_run_takes_its_factors_from_its_own_base_model(tmp_path):
    folder = small_testbed(tmp_path)
    config = load_config(folder / "demo.toml", ["method.name=lora-xs", "lora.r=4", "wire.client_budget=20KB"])
    setup = load_setup(config)
    begun, name = start(setup.job, setup.initial), min(setup.initial)
    base = setup.model.get_base_model()
    wanted = leading_pair(read_weight(base, name), 4, name)
    assert torch.equal(begun.adapter[name].B, 4.0 * wanted.B)
    assert torch.equal(setup.job.method.core(begun)[name].A, wanted.A)
    assert setup.warnings() and "lora-xs sends a core of rank 4" in "".join(setup.notes)
