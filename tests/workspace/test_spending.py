"""`wire.client_budget`: a client's bytes of the whole run, and what is chosen so that they suffice."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import ConfigError
from fedloom.methods.shared.dial import spend_run
from fedloom.methods.spending import RunShape
from fedloom.methods.table import build
from fedloom.model.placement import LinearModule
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Note, read_rows, totals
from fedloom.server.local import run_local
from fedloom.studies.estimate import config_case
from fedloom.workspace.spending import spend_client_budget
from small_testbed import small_testbed

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
LINEAR = {f"layers.{number}.q_proj": LinearModule((64, 96), "") for number in range(4)}
PER_RANK = 4 * (64 + 96)
pytestmark = pytest.mark.usefixtures("no_picture")


def config_of(*sets, bed="demo.toml"):
    return load_config(TESTBED / bed, ["method.name=loom", 'lora.target_modules=["q_proj"]', *sets])


def spend(*sets, clients=4, data=()):
    config = config_of(*sets)
    return spend_client_budget(LINEAR, config, data, clients, build(config.method.name, config.method.settings))


@pytest.mark.parametrize(("bed", "asked"), [("demo.toml", 60_000), ("many.toml", 40_000)])
def test_a_run_takes_what_it_was_given(tmp_path, bed, asked):
    """On the mean of the clients; with a single step a round there is not always so much to say."""
    folder = small_testbed(tmp_path)
    rounds = 6 if bed == "demo.toml" else 12
    config = load_config(
        folder / bed,
        [
            "method.name=loom",
            f"wire.client_budget={asked}",
            f"federation.num_rounds={rounds}",
            "federation.eval_every=0",
        ]
        + ["data.heldout=null", "data.validation=null", "output.answers=0"]
        + (["clients=null", "federation.fraction_train=0.1"] if bed == "many.toml" else []),
    )
    run_local(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    clients = 4 if bed == "demo.toml" else 20
    assert 0.4 * asked < totals(rows).bytes / clients <= 1.02 * asked
    said = [row.text for row in rows if isinstance(row, Note) and "wire.client_budget" in row.text]
    assert len(said) == 1 and f"wire.client_budget of {asked}: loom sends" in said[0]
    assert ("the whole adapter" in said[0]) == (bed == "many.toml")


def test_what_was_chosen_stands_in_the_settings():
    config, said = spend("wire.client_budget=10KB", "federation.num_rounds=10")
    # 1 kB a turn, 420 up and 580 down: 4,000 bits in the mean payload, half a bit for each of 640 values a rank.
    assert config.lora.r == round(4000 / (0.5 * PER_RANK)) == 12
    assert config.wire.budget == "500" and config.wire.client_budget is None
    assert config.lora.lora_alpha == pytest.approx(32 * (12 / 16) ** 0.5)
    assert config.output.baseline_r == 16
    assert config.method.settings == {"upload_share": 0.42, "broadcast": "change"}
    assert said == (
        "wire.client_budget of 10KB: loom sends changes of rank 12 (lora.r is 16), 420 bytes up in a turn and 580 in a "
        "broadcast, on the mean of all rounds"
    )


def test_a_large_budget_is_a_share_so_that_values_may_be_wider():
    config, _ = spend("wire.client_budget=10MB")
    payload = 10_000_000 / (2 * config.federation.num_rounds)
    assert config.lora.r == 16 and config.lora.lora_alpha == 32.0
    assert float(config.wire.budget[:-1]) == pytest.approx(100 * payload / (4 * 16 * PER_RANK))


def test_the_scale_rises_by_two_at_most_and_rslora_keeps_its_own():
    plain, _ = spend("wire.client_budget=2KB")
    assert plain.lora.r == 1 and plain.lora.lora_alpha == 4.0  # 2 · 2, where sixteen components had 2 each
    stabilised, _ = spend("wire.client_budget=10KB", "federation.num_rounds=10", "lora.use_rslora=true")
    assert stabilised.lora.r == 12 and stabilised.lora.lora_alpha == pytest.approx(32.0)


def test_few_bytes_travel_as_paths_and_leave_more_bits_for_a_value():
    config, _ = spend("wire.client_budget=4KB", "federation.num_rounds=10")
    assert config.lora.r == round(1600 / (0.7 * PER_RANK)) == 4
    chosen = {"broadcast": "change", "coding": "paths", "server_learning_rate": 3.0}
    assert config.method.settings == {"upload_share": 0.42, **chosen}


@pytest.mark.parametrize(
    ("share", "rank", "paths"), [(0.003, 4, True), (0.01, 12, True), (0.03, 16, True), (0.07, 16, False)]
)
def test_wide_modules_have_more_rank_of_fewer_bits(share, rank, paths):
    """The testbed of docstrings: 21 modules of 567 by 567 on the mean, five of 17 clients in each of 20 rounds."""
    shape = RunShape(23_808, 21, 16, 20, 17, 5)
    size = share * 4 * 16 * 23_808 * 2 * shape.turns
    found = spend_run(shape, size)
    chosen = {"upload_share": 0.42, "coding": "paths", "server_learning_rate": 1.5}
    other = {"upload_share": 0.27, "taper": 0.5}
    assert (found.rank, found.settings) == (rank, {"broadcast": "change", **(chosen if paths else other)})
    narrow = spend_run(RunShape(23_808, 42, 16, 20, 17, 5), size)
    assert narrow.settings["upload_share"] == 0.27 and narrow.rank <= found.rank
    assert "coding" not in spend_run(shape, size, paths=False).settings


def test_what_was_given_is_not_chosen():
    config, _ = spend("wire.client_budget=6KB", "method.upload_share=0.7")
    chosen = {"broadcast": "change", "coding": "paths", "server_learning_rate": 3.0}
    assert config.method.settings == {"upload_share": 0.7, **chosen}


def test_codes_and_shared_positions_stay_what_they_are_and_have_half_a_bit():
    for asked in ("method.coding=codes", "method.positions=shared"):
        config, _ = spend("wire.client_budget=4KB", "federation.num_rounds=10", asked)
        assert config.lora.r == round(1600 / (0.5 * PER_RANK)) == 5
        assert "server_learning_rate" not in config.method.settings


def test_a_share_of_the_data_is_of_their_mean():
    config, _ = spend("wire.client_budget=50% of data", "federation.num_rounds=10", data=(30_000, 50_000))
    assert config == spend("wire.client_budget=20000", "federation.num_rounds=10")[0]


def test_a_share_alone_is_of_dense_fp32_at_the_largest_rank():
    payload = 4 * 16 * PER_RANK
    for clients, asked in ((4, 4), (20, 5)):
        sets = ["federation.num_rounds=10", f"federation.fraction_train={asked / clients}"]
        payloads = (10 + 9) * asked / clients + 1  # nobody is sent anything before the first round; then the result
        config = spend("wire.client_budget=0.5%", *sets, clients=clients)[0]
        assert config == spend(f"wire.client_budget={round(0.005 * payload * payloads)}", *sets, clients=clients)[0]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["wire.client_budget=20KB", "method.name=fedit"], "does not work with method 'fedit'"),
        (["wire.client_budget=20KB", 'lora.rank_pattern={"q_proj"=4}'], "lora sets ranks of its own"),
        (["wire.client_budget=20KB", 'clients={"bank"={r=4}}'], "clients.bank sets ranks of its own"),
        (["wire.client_budget=50% of data"], "the clients' examples are not all at hand here: give it in bytes"),
    ],
)
def test_what_cannot_be_spent_is_refused(sets, said):
    with pytest.raises(ConfigError, match=said):
        spend(*sets)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            ["wire.client_budget=lots"],
            "wire.client_budget is \"lots\"; expected bytes such as '15KB', a share of what",
        ),
        (["wire.client_budget=0% of data"], 'wire.client_budget is "0% of data"; expected'),
        (["wire.client_budget=15KB", "wire.budget=1%"], "wire.budget and wire.client_budget are both set"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_settings(sets, said):
    with pytest.raises(ConfigError, match=said):
        config_of(*sets)


def test_an_estimate_is_of_what_the_budget_leads_to():
    case = config_case(config_of("wire.client_budget=15KB"))
    assert case.note.startswith("wire.client_budget of 15KB: loom sends changes of rank 4 ") and case.budget is not None
    assert {rank for held in case.ranks.values() for rank in held.values()} == {4} and "upload_share=" in case.method


@settings(max_examples=60)
@given(
    st.integers(10, 10**7), st.integers(1, 256), st.integers(1, 500), st.integers(1, 200), st.data(), st.floats(10, 1e9)
)
def test_more_bytes_never_mean_a_lower_rank(per_rank, most, rounds, clients, data, size):
    shape = RunShape(per_rank, 1, most, rounds, clients, data.draw(st.integers(1, clients)))
    less, more = spend_run(shape, size), spend_run(shape, 2 * size)
    assert 1 <= less.rank <= more.rank <= most
    assert less.payload * 2 * shape.turns == pytest.approx(size)
    build("loom", less.settings)
