"""Each update is decoded once, each broadcast once for every set of ranks, and what is not decoded is what would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Dense, Sparse, add_entry, detach_entry, to_dense
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.methods.table import METHODS, build
from fedloom.rounds import catchup, decoded, draft
from fedloom.rounds import turns as rounds
from fedloom.rounds.caps import USUAL
from fedloom.rounds.catchup import Archive
from fedloom.rounds.checks import check_update
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.draft import Draft
from fedloom.rounds.turns import accept_own, client_turn, server_turn
from fedloom.server.roster import same_state
from fedloom.wire import decode, encode
from toy import Federation, initial, job, random_state, ranks, step
from wire_samples import HEADER, dense, equal, samples, seeded, sparse

names = pytest.mark.parametrize("name", sorted(METHODS))


def uploads(federation: Federation) -> dict[str, bytes]:
    return {
        client: client_turn(
            federation.job, client, state, [], federation.training(client), federation.number + 1
        ).payload
        for client, state in federation.clients.items()
    }


def attending(name: str) -> dict[str, int | dict[str, int]]:
    """One of them trains one module, where the method allows it: then there are two groups of modules."""
    return {"ada": 4, "bob": 4, "cyd": {"layers.0.k_proj": 4} if build(name).module_subsets else 4}


@pytest.fixture
def read(monkeypatch) -> Counter[bytes]:
    """Payload → how often the server has decoded it as an update."""
    found: Counter[bytes] = Counter()

    def counted(payload, *rest):
        found[payload] += 1
        return decode(payload, *rest)

    monkeypatch.setattr(decoded, "decode", counted)
    return found


@names
def test_an_update_is_decoded_once_however_often_the_method_reads_it(name: str, read: Counter[bytes]):
    federation = Federation(job(build(name)), attending(name))
    for _ in range(2):
        read.clear()
        result = federation.play()
        assert read == dict.fromkeys(result.uploads.values(), 1)


@names
def test_what_has_no_room_to_wait_is_decoded_again_to_the_same_broadcast(name: str, read: Counter[bytes]):
    federation = Federation(job(build(name)))
    federation.play()
    for client in federation.clients:
        federation.bring(client)
    payloads = uploads(federation)
    first = server_turn(federation.job, federation.server, payloads, 2)
    read.clear()
    again = server_turn(federation.job, federation.server, payloads, 2, decoded=Decoded(0))
    assert again.payload == first.payload and same_state(again.state, first.state)
    assert all(count >= 2 for count in read.values())


@names
def test_dense_floats_that_are_read_tensor_by_tensor_give_the_same_broadcast(name: str, monkeypatch):
    federation = Federation(job(build(name)), attending(name))
    payloads = uploads(federation)
    first = server_turn(federation.job, federation.server, payloads, 1)
    monkeypatch.setattr(decoded, "SMALL", 0)
    monkeypatch.setattr(decoded, "decode", None)
    again = server_turn(federation.job, federation.server, payloads, 1)
    assert again.payload == first.payload and same_state(again.state, first.state)


@names
def test_the_server_takes_up_its_own_broadcast_as_if_it_had_decoded_it(name: str, monkeypatch):
    """Up to rounds that take a step back and that merge; a state shares no memory with what the method remembers."""
    federation = Federation(job(replace(build(name), joins=False)))  # joined entries, which are few, are decoded
    own = federation.server.adapter.ranks()
    for _ in range(4):
        before = federation.server
        monkeypatch.setattr(draft, "decode", None)  # nothing is decoded for it
        federation.number += 1
        turn = server_turn(federation.job, before, uploads_now(federation), federation.number)
        read = accept_own(federation.job, replace(before, memory=turn.state.memory), decode(turn.payload), own)
        assert same_state(turn.state, read) and turn.state.version == read.version
        kept = {tensor.untyped_storage().data_ptr() for tensor in turn.state.memory.values() if tensor.numel()}
        held = {*turn.state.adapter.tensors().values()} - {*before.adapter.tensors().values()}
        assert not kept & {tensor.untyped_storage().data_ptr() for tensor in held}
        federation.server = turn.state
        federation.broadcasts.append(turn.payload)


def uploads_now(federation: Federation) -> dict[str, bytes]:
    """What clients that are in step send."""
    state = replace(federation.server, memory={})
    return {
        client: client_turn(federation.job, client, state, [], federation.training(client), federation.number).payload
        for client in federation.clients
    }


@settings(max_examples=30)
@given(st.sampled_from(["fp32", "bf16", "fp16", "int8", "int4", "sign"]), st.integers(0, 99), st.integers(0, 40))
def test_what_is_taken_up_is_what_a_receiver_decodes(kind: str, seed: int, size: int):
    entries = {
        "m/B": sparse((size, 7), 0.25, kind, seed),
        "m/A": dense((3, size), kind, seed),
        "n/A": seeded((5, size), 0.25, kind, seed),
    }
    made = Draft(HEADER)
    taken = made.received(entries, ())
    assert equal(taken, decode(made.payload(entries))) and list(taken.entries) == sorted(entries)


@pytest.mark.parametrize("name", sorted(samples()))
def test_every_corner_of_the_format_is_taken_up_as_it_is_decoded(name: str):
    message = samples()[name]
    assert equal(Draft(message.header).received(message.entries, ()), decode(encode(message)))


def test_what_is_taken_up_keeps_no_other_memory():
    whole = torch.arange(12.0)
    cut, kept = Dense((4,), whole[4:8]), Dense((12,), whole)
    assert detach_entry(cut).values.untyped_storage().nbytes() == 16
    assert detach_entry(kept).values is not whole and detach_entry(kept).values.data_ptr() == whole.data_ptr()
    shared = {whole.untyped_storage().data_ptr()}
    assert detach_entry(kept, shared).values.data_ptr() != whole.data_ptr()
    assert torch.equal(detach_entry(kept, shared).values, whole)


@pytest.mark.parametrize("name", ["fedit", "hetlora", "fedsrd", "loom"])
def test_a_broadcast_is_cut_once_for_all_clients_of_the_same_ranks(name: str, monkeypatch):
    federation = Federation(job(build(name), values="int8"))
    archive, cut, read = Archive(), [], []
    for version in range(2):
        federation.play()
        archive.add(version, federation.broadcasts[-1], limit=10**6)
    plain = catchup.narrow_broadcast
    wanted = {rank: plain(federation.job, federation.broadcasts[-1], ranks(rank)) for rank in (2, 3, 4)}
    monkeypatch.setattr(catchup, "narrow_broadcast", lambda *given: cut.append(given[2]) or plain(*given))
    monkeypatch.setattr(rounds, "decode", lambda *given: read.append(given) or decode(*given))
    for client in range(30):
        rank = 2 + client % 3  # 2 and 3 are below the server's
        sent = archive.payloads_for(federation.job, federation.server, 1, ranks(rank), 3)
        assert sent == [wanted[rank]]
    assert cut == ([ranks(2), ranks(3)] if build(name).facts.own_part else [])
    assert len(read) == len(cut)
    archive.add(2, federation.broadcasts[-1], limit=1)
    assert not archive._made and not archive._lengths


def test_an_outlier_and_a_refused_update_wait_no_longer():
    federation = Federation(replace(job(build("fedsrd")), caps=USUAL))
    payloads, waiting = uploads(federation), Decoded.beside(federation.server)
    seen = {
        client: check_update(federation.job, federation.server, client, payload, 1, waiting)
        for client, payload in payloads.items()
    }
    assert waiting.used == sum(decoded.entry_bytes(e) for held in waiting.held.values() for e in held.values()) > 0
    seen["bob"] = replace(seen["bob"], norm=1e6)
    turn = server_turn(federation.job, federation.server, payloads, 1, seen=seen, decoded=waiting)
    assert list(turn.refused) == ["bob"] and not waiting.held and not waiting.used


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["fp32", "int4", "sign"]))
def test_a_sparse_change_is_added_as_its_dense_form_is(seed: int, kind: str):
    entry = sparse((9, 8), 0.375, kind, seed)
    tensor = torch.randn(9, 8, generator=torch.Generator().manual_seed(seed)).mul_(torch.arange(8) % 3)
    tensor[::2, ::3] = -0.0
    found, wanted = add_entry(tensor, entry), tensor + to_dense(entry)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    turned = tensor.T
    moved = Sparse((8, 9), entry.positions, entry.values)
    assert torch.equal(add_entry(turned, moved), turned + to_dense(moved))


def test_a_state_knows_its_size_without_being_stacked():
    state = State(initial(), random_state(1), random_state(2, 1))
    assert state.numel() == state.total.numel() and State(LoraState()).numel() == 0
    assert step(state, 1, 1).adapter.numel() < state.numel()
