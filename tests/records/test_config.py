"""Settings: what the file says is what the run gets, and every mistake is one line that helps."""

import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.configfile import dump, dump_file, load_config, override, parse, setting_keys, settings_template
from fedloom.records.quantities import ClientBudget, parse_budget, parse_bytes, parse_client_budget


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_commented_file_loads_to_the_defaults():
    assert parse(tomllib.loads(settings_template()), "template") == Config()


def test_the_commented_file_shows_every_key_and_its_meaning():
    shown = tomllib.loads(settings_template())
    lines = settings_template().splitlines()
    for key in setting_keys():
        section, _, name = key.partition(".")
        commented = any(line.startswith(f"# {name} = ") for line in lines)
        assert name in shown[section] or commented, key
        where = next(n for n, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{name} = "))
        assert lines[where - 1].startswith("# "), f"{key} has no description"


def test_examples_of_unset_keys_are_valid():
    lines = [line.removeprefix("# ") for line in settings_template().splitlines()]
    tree = tomllib.loads("\n".join(line for line in lines if re.match(r"\[[\w.]+\]$|\w+ = ", line)))
    # num_train_epochs and sources are in their places
    del tree["training"]["max_steps"], tree["data"]["source"]
    tree["federation"]["mode"] = "buffered"  # in which all of its keys mean something
    tree["training"]["dp"] = {"noise_multiplier": 1.0}  # in the place of epsilon, which needs synchronous rounds
    del tree["privacy"]["noise_multiplier"]  # which needs sums, and so synchronous rounds too
    assert parse_client_budget(tree["wire"].pop("client_budget")) == ClientBudget(15_000)  # in the place of wire.budget
    config = parse(tree, "template")
    assert parse_budget(config.wire.budget) == (0.0, 8 * 2**20)
    assert (config.output.max_rank, config.clients["NAME"].r) == (64, 8)


trees = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({"path": st.text(max_size=20)}),
        "lora": st.fixed_dictionaries(
            {
                "r": st.integers(1, 512),
                "lora_alpha": st.floats(1e-300, 1e300),
                "target_modules": st.one_of(
                    st.just("all-linear"), st.lists(st.text("abc_", min_size=1), min_size=1, max_size=3)
                ),
                "rank_pattern": st.dictionaries(st.text(max_size=10), st.integers(1, 9), max_size=3),
            }
        ),
        "training": st.fixed_dictionaries({"learning_rate": st.floats(1e-300, 1.0), "bf16": st.booleans()}),
        "method": st.fixed_dictionaries({"name": st.text(max_size=9), "ridge": st.floats(0, 1), "on": st.booleans()}),
        "wire": st.fixed_dictionaries({"budget": st.sampled_from(["8MiB", "1200", "1.5 GB", "1%", "0.25 %"])}),
        "clients": st.dictionaries(st.text(max_size=9), st.fixed_dictionaries({"r": st.integers(1, 9)}), max_size=3),
    },
)


@given(trees)
def test_resolved_settings_round_trip_exactly(tree):
    config = parse(tree, "test")
    again = parse(tomllib.loads(dump(config)), "dump")
    assert again == config
    assert dump(again) == dump(config)


def test_overrides_are_typed_as_toml_and_win(tmp_path):
    file = written(tmp_path / "a.toml", "[lora]\nr = 4\n[wire]\nbudget = '1MiB'\n")
    config = load_config(
        file,
        [
            "lora.r=8",
            "training.bf16=true",
            "training.learning_rate=1e-3",
            'lora.target_modules=["q_proj", "v_proj"]',
            "method.name=florist",
            "method.tau=0.9",
            "method.client_init=warm",
            'clients."site a".lora_alpha=4',
            "wire.budget=null",
            "data.source=/x/y=z#1",
        ],
    )
    assert (config.lora.r, config.training.bf16, config.training.learning_rate) == (8, True, 1e-3)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.method.settings == {"tau": 0.9, "client_init": "warm"}
    assert config.lora_of("site a").lora_alpha == 4.0
    assert (config.wire.budget, config.data.source) == (None, "/x/y=z#1")


def test_an_empty_table_takes_all_keys_out(tmp_path):
    """Else --set clients={} would be taken without a word and change nothing."""
    file = written(tmp_path / "a.toml", "[clients.lab]\nr = 4\n[lora]\nr = 8\nrank_pattern = {q = 2}\n")
    assert load_config(file).clients.keys() == {"lab"}
    for text in ("clients={}", "clients=null"):
        assert load_config(file, [text]).clients == {}
    config = load_config(file, ["lora.rank_pattern={}"])
    assert (config.lora.rank_pattern, config.lora.r) == ({}, 8)


@pytest.mark.parametrize(("text", "budget"), [("1200", (0.0, 1200)), ("8MiB", (0.0, 8 << 20)), ("1%", (0.01, 0))])
def test_a_budget_may_be_a_bare_number_of_bytes(tmp_path, text, budget):
    config = load_config(written(tmp_path / "a.toml", ""), [f"wire.budget={text}"])
    assert parse_budget(config.wire.budget) == budget


def test_an_override_may_supply_what_the_file_lacks(tmp_path):
    file = written(tmp_path / "a.toml", "[data]\npartitioner = 'iid'\n")
    with pytest.raises(ConfigError, match=r"federation\.num_clients is missing.*a\.toml"):
        load_config(file)
    assert load_config(file, ["federation.num_clients=3"]).federation.num_clients == 3


def test_relative_paths_count_from_whoever_says_them(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = written(tmp_path / "a.toml", '[model]\npath = "./m"\n[data]\nsource = "owner/name"\n')
    config = load_config(file)
    assert config.model.path == str(tmp_path / "m")
    assert config.data.source == "owner/name"
    assert load_config(file, ["model.path=../n"]).model.path == str(tmp_path / "n")


def test_a_client_has_its_own_adapter_settings_over_the_common_ones():
    config = parse({"lora": {"r": 8, "use_rslora": True}, "clients": {"a": {"r": 2}}}, "test")
    assert (config.lora_of("a").r, config.lora_of("a").use_rslora, config.lora_of("b").r) == (2, True, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[training]\nlearning_rte = 1.0",
            "unknown key 'training.learning_rte' in .*a.toml; .*'training.learning_rate'",
        ),
        ("[lora]\nlearning_rate = 1.0", "did you mean 'training.learning_rate'"),
        ("[lora]\nuse_dora = true", "lora.use_dora in .*a.toml is not supported: .* use lora.use_rslora"),
        ("[model]\ndtype = 'float16'", "model.dtype.*expected 'bfloat16', which is as small"),
        ("[lora]\nmodules_to_save = ['x']", "lora.modules_to_save in .* add such modules to lora.target_modules"),
        ("[clients.a]\nuse_dora = true", "clients.a.use_dora in .* is not supported"),
        ("r = 4", "unknown key 'r' .* did you mean 'lora.r'"),
        ("[modle]\npath = 'x'", "unknown key 'modle' .* did you mean 'model'"),
        ('[model]\ndtype = "float16"', r"model.dtype is .float16.; expected 'bfloat16', which is as small"),
        ("[training]\nlr = 1.0", "unknown key 'training.lr' .* has learning_rate, max_steps"),
        ("[clients.a]\nlora_alph = 1", "unknown key 'clients.a.lora_alph' .*'clients.a.lora_alpha'"),
        ("[lora]\nr = 'four'", 'lora.r is "four", a string; expected a whole number .*a.toml'),
        ("[lora]\nr = 4.0", "lora.r is 4.0, a number; expected a whole number"),
        ("[lora]\nr = true", "lora.r is true, true or false; expected a whole number"),
        ("[lora]\nr = 0", "lora.r is 0; expected at least 1"),
        ("[lora]\nlora_alpha = 0", "lora.lora_alpha is 0; expected more than 0"),
        ("[lora]\ntarget_modules = 3", "lora.target_modules is 3, .* expected 'all-linear' or a list"),
        ("[lora]\ntarget_modules = []", "lora.target_modules is .*; expected 'all-linear' or at least 1"),
        ("[lora]\nrank_pattern = {q = 0}", "lora.rank_pattern.q is 0; expected at least 1"),
        ("[lora]\nlora_dropout = 1.0", "expected less than 1"),
        ("[training]\nlearning_rate = nan", "learning_rate is NaN; expected a finite number"),
        ("[federation]\nfraction_train = 0.0", "expected more than 0"),
        ("[federation]\nfraction_train = 1.5", "expected at most 1"),
        ("[wire]\nvalues = 'int3'", "wire.values is \"int3\"; expected 'auto', 'fp32', .* or 'int4-stochastic'"),
        ("[wire]\nbudget = '8 mega'", "wire.budget is \"8 mega\"; expected bytes such as '8MiB' or '1200', or a share"),
        ("[clients.a]\nr = 0", "clients.a.r is 0; expected at least 1"),
        ("clients = 3", "clients is 3, a whole number; expected a table"),
        ("lora = 3", "lora is 3, a whole number; expected a table"),
        ("[method]\nname = 3", "method.name is 3, a whole number; expected a string"),
        ("[data]\npartitioner = 'dirichlet'\n[federation]\nnum_clients = 2", "data.label_column is missing"),
        ("[data]\npartitioner = 'natural'", "data.id_column is missing"),
        ("[training]\nwarmup_ratio = 0.1\nwarmup_steps = 3", "give one of them"),
        ("[lora\nr = 3", "a.toml is not valid TOML"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(written(tmp_path / "a.toml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match="no such file; `fedloom init"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "b.toml")


@pytest.mark.parametrize("text", ["lora.r", "=3", "lora r=3", "a]b=3"])
def test_an_override_that_is_none(text):
    with pytest.raises(ConfigError, match="--set"):
        override(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8MiB", 8 << 20), ("1.5 KiB", 1536), ("500KB", 500_000), ("12", 12), ("12 B", 12), ("2GB", 2 * 10**9)],
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8M", "-1MiB", "MiB", "1e3", "0", "1TiB", "8 MiB extra"])
def test_no_bytes(text):
    with pytest.raises(ValueError, match="expected one such as"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lora": {"r": 4097}}, "lora.r is 4097; expected at most 4096"),
        ({"lora": {"rank_pattern": {"q": 10**9}}}, "lora.rank_pattern.q is 1000000000; expected at most 4096"),
        ({"lora": {"rank_pattern": {"q" * 201: 4}}}, "at most 200 characters"),
        ({"lora": {"alpha_pattern": {f"q{number}": 4.0 for number in range(1025)}}}, "expected at most 1024"),
        ({"lora": {"target_modules": ["q"] * 1025}}, "at most 1024"),
        ({"lora": {"target_modules": ["q" * 201]}}, "at most 200 characters"),
        ({"clients": {"lab": {"r": 10**6}}}, "clients.lab.r is 1000000; expected at most 4096"),
        ({"clients": {f"c{number}": {} for number in range(100_001)}}, "expected at most 100000"),
        ({"training": {"max_steps": 10**12}}, "training.max_steps is 1000000000000; expected at most 1000000"),
        ({"training": {"per_device_train_batch_size": 10**6}}, "expected at most 65536"),
        ({"training": {"gradient_accumulation_steps": 10**6}}, "expected at most 65536"),
        ({"training": {"optim": "a" * 257}}, "at most 256 characters"),
        ({"data": {"max_length": 10**9}}, "data.max_length is 1000000000; expected at most 1048576"),
        ({"model": {"threads": 10**9}}, "model.threads is 1000000000; expected at most 1024"),
        ({"federation": {"seed": 2**63}}, "expected less than 9223372036854775808"),
        ({"federation": {"num_rounds": 10**9}}, "expected at most 1000000"),
        ({"federation": {"participants": ["a"] * 100_001}}, "at most 100000"),
        ({"federation": {"participants": ["a" * 257]}}, "at most 256 characters"),
        ({"method": {"name": "loom", "density": "x" * 5000}}, "at most 4096 characters"),
    ],
)
def test_settings_that_would_take_the_machine_are_refused_in_a_short_line(tree, message):
    with pytest.raises(ConfigError) as caught:
        parse(tree, "test")
    assert message in str(caught.value) and len(str(caught.value)) < 700


def test_a_runs_own_file_means_the_same_from_anywhere(tmp_path):
    """What nobody set is read from the working folder, whatever file does not say it; what somebody set is absolute."""
    (tmp_path / "first.toml").write_text('[data]\nheldout = "./held"\n')
    for overrides in ([], ["model.path=./m", "data.source=./d/{client}"]):
        config = load_config(tmp_path / "first.toml", overrides)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.toml").write_text(dump_file(config))
        assert load_config(tmp_path / "run" / "config.toml") == config
