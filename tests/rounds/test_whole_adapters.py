"""Clients of lower rank under methods in which everybody holds the server's whole adapter: all have one model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from test_methods_contract import lossless, room

from fedloom.adapters.settings import save_adapter
from fedloom.compress.entries import Sparse, dense_entry, to_dense
from fedloom.errors import ShapeError
from fedloom.lora.pair import LoraState, digest
from fedloom.methods.method import State
from fedloom.methods.shared.whole import adopt_whole, read_whole, whole_adapter, widen_change
from fedloom.methods.table import METHODS, build, method_options
from fedloom.model import peft_bridge
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import accept, full_state
from fedloom.site.policy import check_may_leave
from fedloom.site.rules import Policy, Spending
from fedloom.wire import Message, decode, encode
from fedloom.workspace.clients import split_trained
from tiny_models import llama, placed
from toy import CLIENTS_OF_SCALARS, SHAPES, Federation, client_seed, delta, job, random_state, step, take_up

K, Q, DOWN = sorted(SHAPES)
CASTS = {
    "4, 2, 1": {"ada": 4, "bob": 2, "cyd": 1},
    "by module": {"ada": {K: 1, Q: 4, DOWN: 2}, "bob": {K: 3, Q: 1, DOWN: 2}, "cyd": {K: 3, Q: 4, DOWN: 8}},
}
ATTENDANCE = {"all": [None] * 4, "some": [["ada", "cyd"], ["bob"], ["cyd"], ["ada", "bob"]]}
WHOLE = sorted(name for name in METHODS if build(name).adopt is adopt_whole)
every = pytest.mark.parametrize("name", sorted(METHODS))
whole = pytest.mark.parametrize("name", WHOLE)
casts = pytest.mark.parametrize("cast", list(CASTS))


def test_every_method_takes_clients_of_unequal_rank():
    assert {name for name in METHODS if not build(name).facts.unequal_ranks} == set(CLIENTS_OF_SCALARS)
    leading = {"fedit", "fedprox", "hetlora", "flexlora", "flora", "florist"}
    rest = set(METHODS) - set(WHOLE) - set(CLIENTS_OF_SCALARS)
    assert rest == leading, "these give a client the leading components, or begin afresh"


@whole
@casts
@pytest.mark.parametrize("attendance", list(ATTENDANCE))
def test_everybody_holds_the_servers_bits(name: str, cast: str, attendance: str):
    """After catching up by broadcasts, and by the full state: the pair with its tail, and the merged increments."""
    federation = Federation(job(build(name), values="int8"), CASTS[cast])
    newcomers = dict(federation.clients)
    for attending in ATTENDANCE[attendance]:
        federation.play(attending)
    federation.settle()
    state = full_state(federation.job, federation.server, 4)
    for client, held in federation.clients.items():
        assert held.adapter.ranks() == federation.ranks[client]
        for one in (held, accept(federation.job, newcomers[client], state)):
            assert digest(whole_adapter(one)) == digest(federation.server.adapter), client
            assert digest(one.frozen) == digest(federation.server.frozen), client


@every
@casts
def test_a_run_goes_on_to_the_same_bytes(name: str, cast: str, tmp_path):
    """Killed after two rounds, of which one client has missed one."""
    federation, resumed = (Federation(job(build(name)), CASTS[cast]) for _ in range(2))
    federation.play()
    federation.play(["ada", "cyd"])
    take_up(resumed, federation, tmp_path)
    for run in (federation, resumed):
        run.play()
    assert (resumed.broadcasts, resumed.uploads) == (federation.broadcasts, federation.uploads)


@every
@pytest.mark.parametrize("client", ["ada", "bob", "cyd"])
def test_the_change_of_a_client_of_any_rank_reaches_the_model(name: str, client: str):
    federation = Federation(job(build(name)), CASTS["4, 2, 1"])
    federation.play()
    before = delta(federation.server.total)
    federation.play([client])
    assert any((change - before[m]).norm() > 0 for m, change in delta(federation.server.total).items())


@pytest.mark.parametrize("name", sorted(set(WHOLE) - {"flasc", "loom", "lora-xs", "sparseloco"}))
def test_a_round_in_which_nobody_moves_leaves_every_component(name: str):
    """Zeros in place of what a client does not hold would shrink it. The others move by what they remember."""
    federation = Federation(job(build(name)), CASTS["4, 2, 1"])
    for _ in range(3):
        federation.play()
    before = delta(federation.server.total)
    federation.train = lambda state, round, seed: Trained(state.adapter, 1, 0.0)
    for _ in range(2):
        federation.play()
    for module, change in delta(federation.server.total).items():
        assert (change - before[module]).norm() <= 1e-5 * before[module].norm(), module


@pytest.mark.parametrize("name", sorted(n for n in METHODS if build(n, lossless(n)).facts.exact and n != "fed-sb"))
@pytest.mark.parametrize("module_weighting", ["holders", "all"])
def test_exact_methods_stay_exact_where_ranks_and_modules_differ(name: str, module_weighting: str):
    """Σ p_k of the models of those who count: each with what it trained, and the server's other components."""
    cast = {"ada": {K: 4, Q: 2, DOWN: 8}, "bob": {K: 1, Q: 4}, "cyd": {Q: 3}}
    federation = Federation(job(build(name, lossless(name)), module_weighting=module_weighting), cast)
    for round in range(1, 4):
        federation.settle()
        old, models, shares = delta(federation.server.total), {}, {}
        for client, state in federation.clients.items():
            trained = federation.training(client)(state, round, client_seed(federation.job, client, round))
            whole_state = replace(state, adapter=LoraState({**state.adapter, **trained.adapter}))
            models[client], shares[client] = delta(whole_state.total), trained.num_examples
        federation.play()
        for module, after in delta(federation.server.total).items():
            counted = {c: shares[c] for c in cast if module_weighting == "all" or module in cast[c]}
            ideal = sum(s * (models[c] if module in cast[c] else old)[module] for c, s in counted.items())
            wanted = ideal / sum(counted.values())
            assert (after - wanted).norm() <= 1e-5 * wanted.norm(), (round, module)


@whole
@casts
def test_a_client_sends_and_receives_what_its_ranks_allow(name: str, cast: str):
    """Up no more values than it trains; down within the bounds of a receiver that knows all ranks."""
    federation = Federation(job(build(name)), CASTS[cast])
    federation.job = replace(federation.job, ranks=federation.ranks, num_rounds=4)
    for _ in range(4):
        federation.play()
        for client, payload in federation.uploads.items():
            sent = sum(entry.values.numel() for entry in decode(payload).entries.values())
            assert 0 < sent <= sum(rank * sum(SHAPES[m]) for m, rank in federation.ranks[client].items())
    federation.settle()


@whole
def test_a_broadcast_of_another_rank_than_the_servers_is_refused(name: str):
    federation = Federation(job(build(name)), CASTS["4, 2, 1"])
    federation.play()
    message = decode(federation.broadcasts[0])
    entry = next(n for n in message.entries if "frozen" not in n) if name != "fed-sb" else f"{K}/A"
    entry = f"{K}/R" if name == "lora-xs" else entry  # cores travel joined, and any may come by itself
    part, rank = entry[-1], 2 if name != "fed-sb" else 3
    m, n = SHAPES[entry.rpartition("/")[0]]
    small = dense_entry(torch.ones(*{"A": (rank, n), "B": (m, rank), "R": (rank, rank)}[part]))
    held = {} if name == "lora-xs" else message.entries
    payload = encode(Message(message.header, {**held, entry: small}))
    for client in ("ada", "bob", "cyd"):
        with pytest.raises(ShapeError, match="of a rank from 4 to 4"):
            accept(federation.job, federation.clients[client], payload)


@pytest.mark.parametrize("name", [n for n in WHOLE if build(n).takes_budget])
@pytest.mark.parametrize(("budget", "share"), [("20%", 0.2), ("500", None)])
def test_a_budget_is_kept_at_every_rank(name: str, budget: str, share: float | None):
    """A share is of what the client itself would send dense: a lower rank sends less."""
    settings = {"client_residual": 0.9} if "client_residual" in method_options(name) else {}
    shapes = {"layers.0.k_proj": (24, 96), "layers.1.down": (96, 130)}
    cast = {client: dict.fromkeys(shapes, rank) for client, rank in {"ada": 16, "bob": 8, "cyd": 4}.items()}
    federation = Federation(job(build(name, settings), budget=budget), cast, shapes=shapes)
    for _ in range(3):
        federation.play()
        for client, payload in federation.uploads.items():
            dense = 4 * cast[client][min(shapes)] * sum(map(sum, shapes.values()))
            assert len(payload) <= (share * dense if share else 500), client
        if share and name != "loom":  # loom keeps to it on the mean of both ways
            assert len(federation.uploads["ada"]) > 2 * len(federation.uploads["cyd"])


def test_a_site_of_lower_rank_may_send_its_rows_of_a_matrix_between_two_factors():
    federation = Federation(job(build("fed-sb")), CASTS["4, 2, 1"])
    federation.play()
    federation.settle()
    held = {client: state.adapter for client, state in federation.clients.items()}
    federation.play()
    for client, payload in federation.uploads.items():
        check_may_leave(Policy(), payload, held[client], Spending(), ("R",))
        assert decode(payload).entries[f"{K}/R"].shape == (CASTS["4, 2, 1"][client], 4)


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_change_is_widened_by_zeros_and_sparse_ones_stay_sparse(part: str, density: float, rank: int):
    shape, wide = ((rank, 7), (5, 7)) if part == "A" else ((7, rank), (7, 5))
    change = torch.randn(shape) * (torch.rand(shape) < density)
    expected = torch.zeros(wide)
    expected[: shape[0], : shape[1]] = change
    positions = change.flatten().nonzero().squeeze(1)
    for entry in (dense_entry(change), Sparse(shape, positions, change.flatten()[positions])):
        found = widen_change(entry, part, 5)
        assert type(found) is type(entry) and torch.equal(to_dense(found), expected)
        if isinstance(found, Sparse):
            assert bool((found.positions.diff() > 0).all())


def test_what_a_client_has_not_sent_is_the_servers():
    server, sent = random_state(1), random_state(2, rank=2)
    held = read_whole({name: dense_entry(tensor) for name, tensor in sent.tensors().items()}, server)
    for module, pair in server.items():
        assert torch.equal(held[f"{module}/A"], torch.cat([sent[module].A, pair.A[2:]]))
        assert torch.equal(held[f"{module}/B"], torch.cat([sent[module].B, pair.B[:, 2:]], dim=1))


@pytest.mark.parametrize("name", ["ffa", "fedsrd", "fed-sb", "fedex"])
def test_the_model_of_a_client_of_lower_rank_is_the_servers_under_plain_peft(name: str, tmp_path):
    """What a client of rank 2 trains on computes what PEFT computes with the server's adapter of rank 4."""
    base = llama()
    server, own = placed(base, r=4, lora_alpha=8), placed(base, r=2, lora_alpha=6)
    cast = {"high": server.ranks, "low": own.ranks}
    run = job(build(name, lossless(name)), budget=room(build(name)))
    federation = Federation(run, cast, shapes=server.shapes)
    federation.train = lambda state, round, seed: step(
        state, round, seed, parts=run.method.trainable(round), core=run.method.core(state)
    )
    for _ in range(3):
        federation.play()
    federation.settle()
    low: State = federation.clients["low"]
    model = peft_bridge.attach(base, server)
    peft_bridge.configure(model, own)
    trained, fixed = split_trained(low, own.ranks)
    peft_bridge.write_adapter(model, trained)
    peft_bridge.set_frozen(model, fixed)
    tokens = torch.arange(12)[None]
    with_all = model(tokens).logits
    peft_bridge.write_adapter(model, low.adapter)
    peft_bridge.set_frozen(model, None)
    alone = model(tokens).logits
    for state, settings, logits in ((federation.server.total, server, with_all), (low.adapter, own, alone)):
        folder = tmp_path / str(settings.lora.r)
        save_adapter(state, "base", settings.settings, folder)
        plain = PeftModel.from_pretrained(llama(), str(folder))
        torch.testing.assert_close(plain(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    assert plain.peft_config["default"].r == 2
    assert not torch.allclose(with_all, llama()(tokens).logits, atol=1e-3)
