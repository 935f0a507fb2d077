"""Module patterns: PEFT's meaning, in linear time, and a clear refusal of the rest."""

from __future__ import annotations

import re

import peft
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fedloom.adapters.patterns import LONGEST, MOST, Patterns, is_name, literal_pattern, matching_name, spell_out
from fedloom.adapters.settings import AdapterSettings
from fedloom.errors import ConfigError
from fedloom.model import peft_bridge
from tiny_models import llama, placed

MODULES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.1.attn.c_attn",
    "model.layers.10.block_sparse_moe.experts.3.w1",
]
IN_USE = [
    "q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.1\..*",
    r".*\.(?:q|k)_proj",
    r"model\.layers\.(?:0|1[01])\.(?:self_attn|mlp)\.\w+",
    r"layers\.\d+\.mlp\.(gate|up|down)_proj",
    r"self_attn.(q_proj|k_proj)",
    r"[a-z]+\.3\.w[123]",
    r"(?P<kind>q|v)_proj",
    r"h\.\d{1,2}\.attn\.c_attn",
    r"a|b",
    "",
]
HOSTILE = [
    "(([a-z]|[a-z]*[a-z_.0-9])*)*X",
    "(.*)*(.*)*(.*)*X",
    "(a+)+$",
    "(" * 3000,
    "(" * 150 + ")" * 150,
    "(",
    "a)|(b",
    "(((x{1000}){1000}){1000})",
    r"(.+)\1",
    "(?!x)y",
    "(?<=a)b",
    r"\Z",
    "[[:alpha:]]",
    "a{,3}",
    "\\",
    "\ud800[",
    "x" * LONGEST + ".*",
]


@pytest.mark.parametrize("module", MODULES)
def test_the_key_is_that_which_peft_takes(module: str) -> None:
    for keys in (IN_USE, IN_USE[::-1], IN_USE[2:], *([key] for key in IN_USE)):
        expected = get_pattern_key(keys, module)
        assert Patterns(keys, "own").key(module) == (expected if expected in keys else None), keys


# A later Python may take some sets otherwise and says so; what they mean today counts.
@pytest.mark.filterwarnings("ignore:Possible (nested set|set .*) at position:FutureWarning")
@given(st.text(r"abq.\d_w(|)[]*+?{2}^$-", max_size=12), st.sampled_from([*MODULES, "a", "a.b", "ab.q", "b_q-a.2"]))
@example("[[]", "q_proj")
@example("[a--b]", "q_proj")
@example("[a||b]", "q_proj")
def test_whatever_is_taken_means_what_it_means_to_peft(pattern: str, module: str) -> None:
    try:
        found = Patterns([pattern], "own").key(module)
    except ConfigError:
        return
    if is_name(pattern):
        assert (found is not None) == (module == pattern or module.endswith(f".{pattern}"))
        return
    try:
        theirs = re.match(rf"(.*\.)?({pattern})$", module)
    except re.error:
        return  # RE2 takes some expressions that Python does not
    assert (found is not None) == (theirs is not None)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_end_at_once_in_an_answer_or_a_refusal(pattern: str) -> None:
    for attempt in (
        lambda: Patterns([pattern], "x.json: rank_pattern").key("model.layers." * 20 + "q_proj"),
        lambda: matching_name(pattern, MODULES, "x.json: target_modules"),
    ):
        try:
            assert not attempt()
        except ConfigError as error:
            assert str(error).startswith("x.json: ") and "\n" not in str(error) and len(str(error)) < 1200
            assert str(error).isascii()


def test_names_are_many_and_patterns_few() -> None:
    names = [f"layers.{k}.w" for k in range(20_000)]
    table = Patterns(names, "own")
    assert all(table.key(f"model.{name}") == name for name in names)
    with pytest.raises(ConfigError, match=f"own holds {MOST + 1} patterns"):
        Patterns([f"w{k}.*" for k in range(MOST + 1)], "own")


def test_a_long_name_is_a_name_still() -> None:
    name = ".".join(["part"] * LONGEST)
    assert Patterns([name], "own").key(f"model.{name}") == name


def test_an_empty_pattern_is_for_no_module() -> None:
    assert AdapterSettings(r=3, lora_alpha=6, rank_pattern={"": 7}).rank("q_proj") == 3


def test_spelled_out_patterns_give_peft_the_same_values() -> None:
    patterns = {r"layers\.1\..*": 4, "q_proj": 2, r".*_proj": 8}
    table, made = Patterns(patterns, "own"), spell_out(patterns, MODULES)
    assert all(is_name(key) for key in made)
    for module in MODULES:
        key = table.key(module)
        assert made.get(get_pattern_key(made, module)) == (None if key is None else patterns[key])


def test_peft_is_given_literal_names_alone() -> None:
    adapter = placed(llama(), r=2, rank_pattern={r"layers\.1\..*_proj": 3}, alpha_pattern={r".*q_proj|up_proj": 5.0})
    model = peft_bridge.attach(llama(), adapter)
    config = model.peft_config["default"]
    assert isinstance(config, peft.LoraConfig)
    known = {literal_pattern(held.names[0]) for held in peft_bridge.lora_layers(model)}
    assert config.rank_pattern and config.rank_pattern.keys() <= known
    assert config.alpha_pattern and config.alpha_pattern.keys() <= known
    for (name,), layer in ((held.names, held.layer) for held in peft_bridge.lora_layers(model)):
        placement = adapter.modules[name]
        assert (layer.r["default"], layer.lora_alpha["default"]) == (placement.rank, placement.alpha)


def test_a_literal_matches_one_module_alone() -> None:
    keys = [literal_pattern(module) for module in MODULES]
    assert [get_pattern_key(keys, module) for module in MODULES] == keys


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_settings_refuse_hostile_patterns_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: pattern .* cannot be used"):
        AdapterSettings(r=4, lora_alpha=8, **{key: {"(?=x)y": 4}})
