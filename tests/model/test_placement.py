"""Where adapters sit: the base model is walked once, the rest is held to what the settings say."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from fedloom import testbeds
from fedloom.errors import ModelError
from fedloom.model.peft_bridge import linear_modules
from fedloom.model.placement import LinearModule, Placement, keep_fitting_patterns, place_adapter
from fedloom.records.config import Config, LoraSettings
from fedloom.records.configfile import load_config
from fedloom.workspace import assemble as setup
from fedloom.workspace.clients import place_client, place_shared
from tiny_models import gpt2, llama, placed

LINEAR = {
    "layers.0.q_proj": LinearModule((4, 6)),
    "layers.0.up": LinearModule((8, 4)),
    "layers.1.q_proj": LinearModule((4, 6)),
    "layers.1.up": LinearModule((8, 4), transposed=True),
    "lm_head": LinearModule((99, 4), output=True),
}


def test_a_model_is_described_module_by_module() -> None:
    found = linear_modules(gpt2())
    assert found["transformer.h.0.attn.c_attn"] == LinearModule((96, 32), transposed=True)
    assert [name for name, module in found.items() if module.output] == ["lm_head"]
    assert not found["lm_head"].transposed and not placed(llama()).transposed and placed(gpt2()).transposed


def test_all_linear_is_all_but_the_output() -> None:
    assert list(place_adapter(LINEAR, LoraSettings()).modules) == [name for name in LINEAR if name != "lm_head"]
    assert list(place_adapter(LINEAR, LoraSettings(target_modules=["lm_head"])).modules) == ["lm_head"]


def test_targets_are_ends_of_names_at_a_dot() -> None:
    assert list(place_adapter(LINEAR, LoraSettings(target_modules=["1.up", "q_proj"])).modules) == [
        "layers.0.q_proj",
        "layers.1.q_proj",
        "layers.1.up",
    ]
    with pytest.raises(ModelError, match="'proj' matches no linear module"):
        place_adapter(LINEAR, LoraSettings(target_modules=["proj"]))


def test_rank_and_alpha_are_those_of_the_first_pattern() -> None:
    lora = LoraSettings(r=4, lora_alpha=8, rank_pattern={"0.q_proj": 2, "q_proj": 3}, alpha_pattern={"up": 5.0})
    adapter = place_adapter(LINEAR, lora)
    assert adapter.modules == {
        "layers.0.q_proj": Placement((4, 6), 2, 8.0),
        "layers.0.up": Placement((8, 4), 4, 5.0),
        "layers.1.q_proj": Placement((4, 6), 3, 8.0),
        "layers.1.up": Placement((8, 4), 4, 5.0),
    }
    assert adapter.transposed and adapter.settings.fan_in_fan_out
    for module, placement in adapter.modules.items():
        assert adapter.settings.rank(module) == placement.rank and adapter.settings.alpha(module) == placement.alpha


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "qproj"]}, "'qproj' matches no linear module.*did you mean q_proj"),
        ({"target_modules": ["xyzzy"]}, "'xyzzy' matches no linear module.*end in .*down_proj.*q_proj"),
        (
            {"target_modules": ["embed_tokens"]},
            "'embed_tokens' matches no linear module.*embeddings take no adapter here",
        ),
        ({"rank_pattern": {"q_prj": 4}}, "'q_prj' matches no linear module.*q_proj"),
        ({"alpha_pattern": {"lm_head": 4.0}}, "'lm_head' matches no linear module"),
    ],
)
def test_targets_that_match_nothing_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        placed(llama(), **settings)


def config(**clients: dict[str, object]) -> Config:
    lora = {"r": 4, "rank_pattern": {"up": 3}, "alpha_pattern": {"q_proj": 5.0}}
    return Config(lora=lora, clients=clients)


def test_a_client_takes_over_those_patterns_that_its_modules_have() -> None:
    adapter = place_client(LINEAR, config(ada={"target_modules": ["q_proj"], "r": 2}), "ada")
    assert adapter.ranks == {"layers.0.q_proj": 2, "layers.1.q_proj": 2}
    assert adapter.lora.rank_pattern == {} and adapter.lora.alpha_pattern == {"q_proj": 5.0}
    with pytest.raises(ModelError, match="'up' matches no linear module"):
        place_client(LINEAR, config(ada={"target_modules": ["q_proj"], "rank_pattern": {"up": 1}}), "ada")


def test_the_servers_adapter_is_on_what_somebody_trains() -> None:
    common = place_adapter(LINEAR, config().lora)
    assert place_shared(LINEAR, common, set(common.modules)) is common
    shared = place_shared(LINEAR, common, ["layers.1.q_proj"])
    assert shared.modules == {"layers.1.q_proj": common.modules["layers.1.q_proj"]}
    assert shared.lora == keep_fitting_patterns(common.lora, ["layers.1.q_proj"]).model_copy(
        update={"target_modules": ("layers.1.q_proj",)}
    )


def test_a_setup_walks_the_base_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = 0

    def counted(base: PreTrainedModel) -> dict[str, LinearModule]:
        nonlocal walks
        walks += 1
        return linear_modules(base)

    monkeypatch.setattr(setup, "linear_modules", counted)
    overrides = ["method.name=flora", "clients.lab.r=4", "clients.bank.target_modules=['q_proj']"]
    made = setup.load_setup(load_config(testbeds.testbed_folder() / "demo.toml", overrides))
    assert walks == 1
    assert made.sites["clinic"].adapter is made.sites["depot"].adapter is made.adapter, "alike, so computed once"
    assert set(made.sites["lab"].ranks.values()) == {4} and len(made.sites["bank"].ranks) < len(made.adapter.ranks)
