"""A tree of servers against one server: the same bits where sums are exact, and who is refused, by name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import RoundError
from fedloom.lora.pair import LoraPair, LoraState, subset
from fedloom.methods.table import METHODS, build
from fedloom.rounds.caps import Caps
from fedloom.rounds.federation import Federation
from fedloom.rounds.regions import Tree, read_facts, read_shares, shorter_sum, write_shares
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import accept, server_turn
from fedloom.wire import decode
from toy import initial, job, ranks

CLIENTS = ["ada", "bob", "cyd", "dan"]
EXACT = {
    "fedit": {},
    "fedprox": {},
    "ffa": {},
    "rolora": {},
    "fedsvd": {},
    "fed-dare": {"sparsity": 0.5},
    "flasc": {},
    "sparseloco": {"two_bits": False},
    "lora-xs": {"factors": "random", "coded": False},
    "loom": {},
}
"""Every method that adds, with settings under which it sends numbers of few bits where training makes some."""
TREES = {
    "two regions": {"north": ["ada", "cyd"], "south": ["bob", "dan"]},
    "one of all": {"all": CLIENTS},
    "one each": {name.upper(): [name] for name in CLIENTS},
}
FEW_BITS = 64.0


def round_bits(state: LoraState) -> LoraState:
    """Multiples of 1/64: four of them, or a quarter of their sum, are exact in float32."""
    return state.map(lambda pair: LoraPair(*((t * FEW_BITS).round() / FEW_BITS for t in (pair.A, pair.B))))


class Exact:
    """A training step whose changes are multiples of 1/64."""

    def __init__(self, method, modules=None, size=0.3):
        self.method, self.modules, self.size = method, modules, size

    def __call__(self, state, round, seed):
        generator = torch.Generator().manual_seed(seed)
        own = subset(state.adapter, self.modules) if self.modules else state.adapter
        parts = self.method.trainable(round)

        def move(pair):
            noise = {part: self.size * torch.randn(pair.part(part).shape, generator=generator) for part in ("A", "B")}
            return LoraPair(*(pair.part(part) + (part in parts) * noise[part] for part in ("A", "B")))

        return Trained(round_bits(own.map(move)), num_examples=8, loss=1.0)


def exact_federation(name, held=None, **options):
    method = build(name, EXACT.get(name, {}))
    made = job(method, values="sign" if name in ("loom", "lora-xs") else "fp32", **options)
    held = held or dict.fromkeys(CLIENTS)
    federation = Federation(made, round_bits(initial()), held)
    return federation, {client: Exact(method, sorted(own) if own else None) for client, own in held.items()}


def uploads_of(federation, steps):
    federation.number += 1
    return {client: federation.client_turn(client, step) for client, step in steps.items()}


def plant(regions):
    """A tree, and what it told: (region, way, kind) → sizes."""
    told = defaultdict(list)
    return Tree(regions, lambda region, way, kind, size: told[region, way, kind].append(size)), told


def same(one, two):
    assert one.payload == two.payload
    assert (one.state.version, one.state.digest) == (two.state.version, two.state.digest)
    for kind in ("adapter", "frozen"):
        a, b = getattr(one.state, kind).tensors(), getattr(two.state, kind).tensors()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert one.state.memory.keys() == two.state.memory.keys()
    assert all(torch.equal(one.state.memory[name], two.state.memory[name]) for name in one.state.memory)


def test_every_method_that_adds_is_tested_here():
    assert {name for name in METHODS if build(name).adds} == set(EXACT)


@pytest.mark.parametrize("regions", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", EXACT)
def test_a_tree_is_one_server_bit_for_bit_where_sums_are_exact(name, regions):
    federation, steps = exact_federation(name)
    uploads = uploads_of(federation, steps)
    flat = server_turn(federation.job, federation.server, uploads, 1)
    tree, told = plant(regions)
    same(server_turn(federation.job, federation.server, uploads, 1, tree=tree), flat)
    assert {key[0] for key in told} == set(regions)
    assert {key[1:] for key in told} == {("up", "facts"), ("down", "shares"), ("up", "sum")}
    assert all(len(sizes) == 1 for sizes in told.values()), "each travels once"


ROUNDING = {
    **{name: (name, given if name == "lora-xs" else {}) for name, given in EXACT.items()},
    "loom at shared positions": ("loom", {"positions": "shared"}),
    "loom of states": ("loom", {"broadcast": "state"}),
    "fedit with moments": ("fedit", {"server_optimizer": "fedadam"}),
}


@pytest.mark.parametrize(("name", "given"), ROUNDING.values(), ids=ROUNDING)
def test_a_tree_is_one_server_but_for_rounding_where_sums_round(name, given):
    """Any numbers, uneven shares, three rounds: the guards and moments of the server see the same sums."""
    method = build(name, given)
    federation = Federation(job(method), initial(), dict.fromkeys(CLIENTS))

    def train(state, round, seed):
        trained = Exact(method)(state, round, seed)
        return replace(
            trained, num_examples=1 + seed % 7, adapter=trained.adapter.map(lambda p: LoraPair(p.A / 3, p.B / 3))
        )

    for number in (1, 2, 3):
        uploads = uploads_of(federation, dict.fromkeys(CLIENTS, train))
        tree, _ = plant(TREES["two regions"])
        flat = server_turn(federation.job, federation.server, uploads, number)
        far = server_turn(federation.job, federation.server, uploads, number, tree=tree)
        for module, pair in flat.state.total.items():
            other = far.state.total[module]
            torch.testing.assert_close(other.B @ other.A, pair.B @ pair.A, atol=2e-3, rtol=2e-3)
        federation.server = flat.state
        federation.clients = {c: accept(federation.job, state, flat.payload) for c, state in federation.clients.items()}


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.sampled_from(["fedit", "loom", "fed-dare"]))
@settings(max_examples=6)
def test_however_clients_are_split(places, name):
    clients = [f"site-{number}" for number in range(8)]
    federation, steps = exact_federation(name, dict.fromkeys(clients))
    uploads = uploads_of(federation, steps)
    regions = {f"r{place}": [c for c, own in zip(clients, places, strict=True) if own == place] for place in range(4)}
    tree, told = plant(regions)
    same(
        server_turn(federation.job, federation.server, uploads, 1, tree=tree),
        server_turn(federation.job, federation.server, uploads, 1),
    )
    assert {key[0] for key in told} == {region for region, own in regions.items() if own}


@pytest.mark.parametrize("name", ["fedit", "ffa", "fed-dare", "loom", "flasc"])
@pytest.mark.parametrize("weighting", ["holders", "all"])
def test_unequal_ranks_and_modules(name, weighting):
    """Where a module is one of three clients', its shares are thirds, and sums round."""
    modules = sorted(ranks(4))
    held = {
        "ada": ranks(4),
        "bob": ranks(2),
        "cyd": {modules[0]: 4, modules[1]: 2},
        "dan": {modules[0]: 2, modules[2]: 4},
    }
    federation, steps = exact_federation(name, held, module_weighting=weighting)
    federation.job = replace(federation.job, ranks=held)
    uploads = uploads_of(federation, steps)
    flat = server_turn(federation.job, federation.server, uploads, 1)
    tree, _ = plant(TREES["two regions"])
    far = server_turn(federation.job, federation.server, uploads, 1, tree=tree)
    for name_, tensor in flat.state.adapter.tensors().items():
        torch.testing.assert_close(far.state.adapter.tensors()[name_], tensor, atol=1e-6, rtol=1e-6)


def test_a_region_without_an_answer_sends_nothing():
    federation, steps = exact_federation("fedit")
    uploads = uploads_of(federation, {name: steps[name] for name in ("ada", "cyd")})
    tree, told = plant(TREES["two regions"])
    same(
        server_turn(federation.job, federation.server, uploads, 1, tree=tree),
        server_turn(federation.job, federation.server, uploads, 1),
    )
    assert {key[0] for key in told} == {"north"}


def test_refused_clients_are_named_and_the_others_go_on():
    """A damaged update is found by its region; one out of proportion by the root, which alone sees all norms."""
    federation, steps = exact_federation("fedit")
    federation.job = replace(federation.job, caps=Caps(max_norm_ratio=50.0))
    federation.server = replace(federation.server)
    huge = {**steps, "dan": Exact(federation.job.method, size=1e4)}
    uploads = uploads_of(federation, huge)
    uploads["bob"] = uploads["bob"][:-5] + b"wrong"
    tree, told = plant(TREES["two regions"])
    far = server_turn(federation.job, federation.server, uploads, 1, tree=tree)
    flat = server_turn(federation.job, federation.server, uploads, 1)
    same(far, flat)
    assert far.refused == flat.refused and set(far.refused) == {"bob", "dan"}
    assert "median" in far.refused["dan"]
    assert ("south", "up", "sum") not in told, "nobody is left in that region"


def test_an_update_on_which_a_region_fails_is_named(monkeypatch):
    federation, steps = exact_federation("fedit")
    uploads = uploads_of(federation, steps)
    bad = decode(uploads["cyd"]).entries.keys()
    read = federation.job.method.adds
    marked = next(iter(bad))
    wrong = decode(uploads["cyd"]).entries[marked].values

    def fail(entries, adapter):
        if marked in entries and torch.equal(entries[marked].values, wrong):
            raise ArithmeticError("cannot be read")
        return read(entries, adapter)

    federation.job = replace(
        federation.job, method=replace(federation.job.method, adds=fail, aggregate=aggregate_with(fail))
    )
    tree, told = plant(TREES["two regions"])
    turn = server_turn(federation.job, federation.server, uploads, 1, tree=tree)
    assert set(turn.refused) == {"cyd"} and "cannot be read" in turn.refused["cyd"]
    assert len(told["south", "up", "sum"]) == len(told["north", "up", "sum"]) == 1
    assert len(told["north", "down", "shares"]) == 2, "the region was asked again without it, and that is counted"


def aggregate_with(read):
    """FedIT's aggregate with another way to read an update."""
    plain = build("fedit").aggregate

    def aggregate(state, updates, context):
        def watched():
            for update in updates:
                read(update.entries, state.adapter)
                yield update

        return plain(state, watched(), context)

    return aggregate


def test_nobody_left_in_any_region():
    federation, steps = exact_federation("fedit")
    uploads = {client: payload[:-5] + b"wrong" for client, payload in uploads_of(federation, steps).items()}
    tree, _ = plant(TREES["two regions"])
    with pytest.raises(RoundError, match="no usable update from 4 clients"):
        server_turn(federation.job, federation.server, uploads, 1, tree=tree)


def test_a_sum_is_sent_in_the_shorter_form():
    sparse, dense = torch.zeros(8, 8), torch.ones(8, 8)
    sparse[2, 3] = 1.5
    assert type(shorter_sum(sparse)).__name__ == "Sparse" and type(shorter_sum(dense)).__name__ == "Dense"


def test_what_is_told_comes_back_as_it_was():
    modules = ["q", "k"]
    shares = [(["k"], {"ada": 0.1 + 0.2, "\ud800": 1 / 3}), (["k", "q"], {"bob": 1e-300})]
    assert read_shares(write_shares(shares, modules), modules) == [(list(own), held) for own, held in [shares[0]]] + [
        (modules, shares[1][1])
    ]
    assert read_facts(b'{"modules":[null],"clients":{"a":[3,0.1,0,7,"ff"]},"refused":{"b":"late"}}', modules)[1] == {
        "b": "late"
    }
