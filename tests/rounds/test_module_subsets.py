"""Clients that train some of the modules only: who counts for a module, and what the others hold of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_methods_contract import assert_same_model, lossless

from fedloom.errors import ConfigError
from fedloom.lora.pair import digest
from fedloom.methods.method import State
from fedloom.methods.table import METHODS, build
from fedloom.model import peft_bridge
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Transfer, read_rows
from fedloom.rounds.joint import split_entries
from fedloom.rounds.turns import accept, client_turn, full_state, server_turn
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.wire import decode, encode
from fedloom.workspace.assemble import load_setup
from fedloom.workspace.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from fedloom.workspace.clients import split_trained, top_ranks
from fedloom.workspace.folder import RunFolder
from small_testbed import small_testbed
from toy import RANK, SHAPES, Federation, client_seed, delta, job

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
K, Q, DOWN = sorted(SHAPES)
CLIENTS = {
    "ada": dict.fromkeys([K, Q, DOWN], RANK),
    "bob": dict.fromkeys([K, Q], RANK),
    "cyd": dict.fromkeys([Q], RANK),
    "dan": dict.fromkeys([K, Q, DOWN], RANK),
}
ABLE = sorted(name for name in METHODS if build(name).module_subsets)
names = pytest.mark.parametrize("name", ABLE)
exact = pytest.mark.parametrize("name", [n for n in ABLE if build(n, lossless(n)).facts.exact])
weightings = pytest.mark.parametrize("module_weighting", ["holders", "all"])


def shares(federation: Federation) -> dict[str, float]:
    """p_k of the coming round: the toy step's examples are a function of the seed."""
    seeds = {client: client_seed(federation.job, client, federation.number + 1) for client in federation.clients}
    examples = {client: 1 + seed % 7 for client, seed in seeds.items()}
    return {client: count / sum(examples.values()) for client, count in examples.items()}


@names
@weightings
def test_everybody_holds_the_same_weights_of_every_module(name: str, module_weighting: str):
    federation = Federation(job(build(name), module_weighting=module_weighting), CLIENTS)
    for attending in (None, ["bob", "cyd"], ["cyd"], ["ada", "cyd"]):
        federation.play(attending)
        for client, payload in federation.uploads.items():
            sent = split_entries(decode(payload).entries, federation.server)
            assert {tensor.rpartition("/")[0] for tensor in sent} == set(CLIENTS[client])
    late = accept(federation.job, federation.clients["dan"], full_state(federation.job, federation.server, 4))
    federation.settle()
    for state in (late, *federation.clients.values()):
        assert_same_model(state, federation.server)


@names
def test_a_module_that_nobody_trained_stays_and_costs_nothing(name: str):
    federation = Federation(job(build(name)), CLIENTS)
    federation.play()
    before = delta(federation.server.total)
    federation.play(["cyd"])
    after = delta(federation.server.total)
    assert {tensor.rpartition("/")[0] for tensor in decode(federation.broadcasts[-1]).entries} == {Q}
    for module in (K, DOWN):
        assert torch.equal(after[module], before[module]), module


@exact
@weightings
def test_exact_methods_return_the_weighted_sum_over_those_who_count(name: str, module_weighting: str):
    federation = Federation(job(build(name, lossless(name)), module_weighting=module_weighting), CLIENTS)
    for round in range(1, 4):
        before, p = federation.server, shares(federation)
        trained = {
            client: federation.training(client)(before, round, client_seed(federation.job, client, round)).adapter
            for client in CLIENTS
        }
        federation.play()
        for module, after in delta(federation.server.total).items():
            own = {
                client: delta(replace(before, adapter=trained[client]).total)[module]
                for client in CLIENTS
                if module in CLIENTS[client]
            }
            old = delta(before.total)[module]
            holders = {client: p[client] for client in CLIENTS if module in CLIENTS[client]}
            if module_weighting == "holders":
                ideal = sum(share / sum(holders.values()) * own[client] for client, share in holders.items())
            else:
                ideal = sum(share * (own[client] if client in holders else old) for client, share in p.items())
            assert (after - ideal).norm() <= 1e-5 * ideal.norm(), module


@names
@weightings
def test_a_module_that_all_train_is_averaged_as_if_there_were_no_others(name: str, module_weighting: str):
    """Clients that differ in other modules change nothing for the one that they share."""
    # Directions are drawn for all modules at once: other modules, others of them, but all of them say the same.
    method = build(name, {"share": 1.0} if name == "ferret" else {})
    federation = Federation(job(method, module_weighting=module_weighting), CLIENTS)
    alone = Federation(job(method), {client: {Q: RANK} for client in CLIENTS})
    payloads = {}
    for client, state in federation.clients.items():
        turn = client_turn(federation.job, client, state, [], federation.training(client), 1)

        def same(state: State, round: int, seed: int, turn=turn):
            trained = turn.trained
            return replace(trained, adapter=type(trained.adapter)({Q: trained.adapter[Q]}))

        payloads[client] = client_turn(alone.job, client, alone.clients[client], [], same, 1).payload
    alone.server = server_turn(alone.job, alone.server, payloads, 1).state
    federation.play()
    assert torch.allclose(delta(federation.server.total)[Q], delta(alone.server.total)[Q], rtol=1e-5, atol=1e-7)


@names
def test_a_run_with_subsets_goes_on_from_a_checkpoint(name: str, tmp_path: Path):
    federation, resumed = (Federation(job(build(name)), CLIENTS) for _ in range(2))
    federation.play()
    federation.play(["bob", "cyd"])
    loaded = load_checkpoint(save_checkpoint(tmp_path, Snapshot(2, federation.server, federation.clients)))
    resumed.server, resumed.clients, resumed.number = loaded.server, dict(loaded.clients), loaded.round
    resumed.broadcasts = list(federation.broadcasts)
    for run in (federation, resumed):
        run.play()
    assert resumed.broadcasts == federation.broadcasts and resumed.uploads == federation.uploads


def test_an_update_about_no_module_is_refused():
    federation = Federation(job(build("fedit")), CLIENTS)
    payloads = {
        client: client_turn(federation.job, client, state, [], federation.training(client), 1).payload
        for client, state in federation.clients.items()
    }
    bob, cyd = decode(payloads["bob"]), decode(payloads["cyd"])
    payloads["cyd"] = encode(replace(cyd, entries={}))
    payloads["bob"] = encode(replace(bob, entries={f"other.{name}": e for name, e in bob.entries.items()}))
    refused = server_turn(federation.job, federation.server, payloads, 1).refused
    assert set(refused) == {"bob", "cyd"} and all(
        "none of this adapter's modules" in reason for reason in refused.values()
    )


SETTINGS = [
    "federation.num_rounds=2",
    "training.max_steps=2",
    "federation.eval_every=0",
    "data.heldout=null",
    "federation.participants=['bank', 'lab']",
    "clients.lab.target_modules=['q_proj', 'v_proj']",
    "clients.lab.lora_alpha=8",
    "lora.rank_pattern.down_proj=4",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed with six examples in every file."""
    return small_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("method", ["fedsrd", "florist", "fedprox", "ffa"])
def test_a_site_trains_and_sends_its_modules_and_uses_everybodys(tmp_path: Path, method: str, small: Path):
    """On the shipped model: what a site does not train is in its model all the same, and its bits do not move."""
    config = load_config(small / "demo.toml", [*SETTINGS, f"method.name={method}"])
    with RunFolder.open(tmp_path / "run", config, resume=False) as folder:
        setup = load_setup(config)
        simulation = Rounds(setup, folder, Silent(), LocalSites(setup))
        simulation.play(resume=False)
        state = simulation.sites.states["lab"]
        trained = setup.train("lab")(state, 2, 0).adapter
    assert {module.rpartition(".")[2] for module in trained} == {"q_proj", "v_proj"}
    assert {module.rpartition(".")[2] for module in state.adapter} > {"down_proj", "k_proj"}
    assert (digest(state.adapter), digest(state.tail)) == (
        digest(simulation.server.adapter),
        digest(simulation.server.tail),
    )
    rows = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Transfer)]
    up = {client: sum(r.bytes for r in rows if (r.client, r.direction) == (client, "up")) for client in ("bank", "lab")}
    assert up["lab"] < 0.4 * up["bank"]
    peft_bridge.set_frozen(setup.model, None)


def test_a_model_with_a_part_trained_and_a_part_fixed_computes_what_the_whole_does():
    from fedloom.lora.pair import LoraState, initial_state
    from tiny_models import llama, placed

    base = llama()
    adapter = placed(base, r=3)
    model, shapes = peft_bridge.attach(base, adapter), adapter.shapes
    whole = initial_state(shapes, dict.fromkeys(shapes, 3), 0).map(lambda p: replace(p, B=torch.randn_like(p.B)))
    state = State(whole, frozen=whole.map(lambda p: replace(p, B=0.1 * p.B)))
    tokens = torch.arange(12)[None]
    outputs = []
    for trained, fixed in ((state.adapter, state.fixed), split_trained(state, [m for m in shapes if "q_proj" in m])):
        peft_bridge.write_adapter(model, trained)
        peft_bridge.set_frozen(model, fixed)
        outputs.append(model(tokens).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert isinstance(trained, LoraState) and {pair.rank for pair in trained.values()} == {0, 3}


def test_patterns_of_modules_that_a_client_does_not_train_are_its_own_mistake_only():
    with pytest.raises(Exception, match="down_proj"):
        load_setup(load_config(TESTBED / "demo.toml", [*SETTINGS, "clients.lab.alpha_pattern.down_proj=3"]))


def test_a_method_that_needs_equal_ranks_names_the_module_that_has_others():
    plain = build("fedit")
    equal = replace(plain, facts=replace(plain.facts, unequal_ranks=False))
    with pytest.raises(ConfigError, match=r"client 'lab' has rank 4 in .*q_proj where another has 16"):
        load_setup(load_config(TESTBED / "demo.toml", [*SETTINGS, "clients.lab.r=4"]), equal)


def test_settings_for_a_client_that_is_not_there_are_named():
    with pytest.raises(ConfigError, match=r"\[clients.labb\].*did you mean 'lab'"):
        load_setup(load_config(TESTBED / "demo.toml", [*SETTINGS, "clients.labb.r=4"]))


def test_what_a_method_cannot_do_is_refused_before_the_run():
    settings = [*SETTINGS, "method.name=fedit", "federation.consolidate_every=5"]
    with pytest.raises(ConfigError, match="consolidate_every does nothing with method 'fedit'"):
        load_setup(load_config(TESTBED / "demo.toml", settings))
    sites = load_setup(load_config(TESTBED / "demo.toml", SETTINGS)).sites
    with pytest.raises(ConfigError, match=r"client 'lab' does not train .*down_proj; set the same target_modules"):
        top_ranks(replace(build("fedsrd"), module_subsets=False), {name: site.ranks for name, site in sites.items()})
