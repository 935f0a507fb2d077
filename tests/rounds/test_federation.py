"""The federation in memory: its example prints what it says, and a round of it is a round of any engine."""

import doctest
from dataclasses import replace

import pytest
from test_methods_contract import assert_same_model

from fedloom.errors import RoundError
from fedloom.methods.table import METHODS, build
from fedloom.rounds import federation
from fedloom.rounds.consolidation import Consolidation
from fedloom.rounds.federation import Federation
from fedloom.rounds.turns import accept, client_turn, server_turn, start
from toy import built, initial, job, trainer


def test_the_example_prints_what_it_says():
    result = doctest.testmod(federation)
    assert result.attempted >= 9 and not result.failed


@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_rounds_move_the_bytes_of_the_two_functions(name: str):
    plain, step = job(built(name)), trainer(built(name))
    played = Federation(plain, initial(), {"ada": None, "bob": None})
    server = start(plain, initial())
    clients = {client: start(plain, initial(), initial().ranks()) for client in ("ada", "bob")}
    for number in (1, 2):
        turns = {client: client_turn(plain, client, state, (), step, number) for client, state in clients.items()}
        uploads = {client: turn.payload for client, turn in turns.items()}
        done = server_turn(plain, server, uploads, number)
        server = done.state
        clients = {client: accept(plain, turn.state, done.payload) for client, turn in turns.items()}
        result = played.round(step)
        assert (result.uploads, result.broadcast, result.stats) == (uploads, done.payload, done.stats)
    assert all(played.clients[client].digest == server.digest for client in clients)
    assert all(played.clients[client].memory.keys() == clients[client].memory.keys() for client in clients)


def test_who_sits_out_receives_all_the_same():
    plain = job(build("fedsrd"))
    played = Federation(plain, initial(), dict.fromkeys(("ada", "bob", "cyd")))
    result = played.round(dict.fromkeys(("ada", "cyd"), trainer(plain.method)))
    assert list(result.uploads) == ["ada", "cyd"] and played.number == 1
    assert_same_model(played.clients["bob"], played.server)


def test_where_the_server_consolidates_everybody_receives_its_state():
    plain = replace(job(build("flora")), consolidation=Consolidation(every=2, energy=0.9))
    played = Federation(plain, initial(), dict.fromkeys(("ada", "bob")))
    for _ in range(3):
        played.round(trainer(plain.method))
    assert played.server.version == 4, "a consolidation is a version of its own"
    for state in played.clients.values():
        assert state.version == 4
        assert_same_model(state, played.server)


def test_a_round_without_anybody_is_an_error():
    with pytest.raises(RoundError, match="no usable update from 0 clients"):
        Federation(job(build("fedit")), initial(), {"ada": None}).round({})
