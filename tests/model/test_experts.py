"""Experts of a mixture: a pair for each matrix of a stacked parameter, trained, aggregated, exported and merged."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from test_peft_bridge import IDS, logits, random_state
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from fedloom.adapters.folder import AdapterFolder, load_adapter
from fedloom.adapters.merge.base import open_base
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import open_folders
from fedloom.adapters.merge.save import save_merge
from fedloom.adapters.parameters import join_pairs, matrix_names, resolve_parameters, split_pair
from fedloom.adapters.settings import save_adapter
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.pair import LoraPair, LoraState, digest, initial_state
from fedloom.methods.method import State
from fedloom.methods.table import METHODS
from fedloom.model import peft_bridge
from fedloom.model.base import load_base
from fedloom.model.examples import Example
from fedloom.model.placement import Adapter
from fedloom.records.config import Config
from fedloom.rounds.federation import Federation
from fedloom.workspace.assemble import build_setup
from fedloom.workspace.export import export_adapter
from tiny_models import CHARACTERS, SPECIAL, placed, tokenizer

SIZES = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()


def gpt_oss(width: int = 24) -> PreTrainedModel:
    """Experts stored (E, in, out), with biases; of width 16 all matrices of down_proj are square."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": width, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=3)).eval()


def deepseek() -> PreTrainedModel:
    """The first layer has no experts, the second a shared one beside them."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 12, "n_routed_experts": 3}
    low = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **low, **groups})).eval()


MIXTURES = {"mixtral": mixtral, "gpt_oss": gpt_oss, "square": lambda: gpt_oss(16), "deepseek": deepseek}


def save(base: PreTrainedModel, folder: Path) -> Path:
    base.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(mixtral(), tmp_path_factory.mktemp("mixtral"))


def drawn(adapter: Adapter, seed: int = 0) -> LoraState:
    return random_state(adapter.shapes, adapter.ranks, seed)


def dense(base: PreTrainedModel, state: LoraState) -> torch.Tensor:
    """Logits of the base with every B A added to its matrix."""
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name, pair in state.items():
            stem, _, place = name.rpartition(".")
            weight = parameters[stem][int(place)] if stem in parameters else parameters[f"{name}.weight"]
            change = pair.B @ pair.A
            weight += change if weight.shape == change.shape and not isinstance(base, GptOssForCausalLM) else change.T
    return logits(base)


def test_a_pair_for_each_expert() -> None:
    adapter = placed(mixtral(), r=2, target_modules=[], target_parameters=EXPERTS, rank_pattern={"down_proj": 3})
    assert len(adapter.modules) == 2 * 2 * 3 and adapter.stacked == adapter.parameters
    assert adapter.shapes[f"{GATE_UP}.2"] == (48, 16) and adapter.ranks[f"{GATE_UP}.2"] == 2
    assert adapter.ranks["model.layers.1.mlp.experts.down_proj.0"] == 3
    assert placed(gpt_oss(), r=2, target_modules=[], target_parameters=EXPERTS).shapes[f"{GATE_UP}.0"] == (48, 16)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_model_in_use_is_base_plus_frozen_plus_trained(name: str) -> None:
    adapter = placed(MIXTURES[name](), r=2, target_modules=[], target_parameters=EXPERTS)
    model = peft_bridge.attach(MIXTURES[name](), adapter)
    trained, frozen = drawn(adapter), drawn(adapter, 1)
    # Methods may leave each expert another rank, and a client none.
    trained = LoraState({n: LoraPair(p.A[: i % 3], p.B[:, : i % 3]) for i, (n, p) in enumerate(trained.items())})
    peft_bridge.write_adapter(model, trained)
    assert digest(peft_bridge.read_adapter(model)) == digest(trained)
    torch.testing.assert_close(logits(model), dense(MIXTURES[name](), trained), atol=1e-5, rtol=0)
    peft_bridge.set_frozen(model, frozen)
    both = MIXTURES[name]()
    dense(both, trained)
    torch.testing.assert_close(logits(model), dense(both, frozen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_folder_opens_in_peft_and_merges(name: str, tmp_path: Path) -> None:
    base = save(MIXTURES[name](), tmp_path / "base")
    more = (
        {} if name == "square" else {"rank_pattern": {"o_proj": 3, "down_proj": 4}, "alpha_pattern": {"up_proj": 5.0}}
    )
    if name in ("mixtral", "gpt_oss"):
        more["alpha_pattern"] = {"gate_up_proj": 5.0}
    targets = {"target_modules": []} if name == "square" else {}
    adapter = placed(MIXTURES[name](), r=2, lora_alpha=6, target_parameters=EXPERTS, **targets, **more)
    state = drawn(adapter)
    save_adapter(state, base, adapter.settings, tmp_path / "adapter")
    again, _ = load_adapter(tmp_path / "adapter")
    for module, pair in again.items():
        torch.testing.assert_close(pair.B, state[module].B, rtol=3e-7, atol=0)
    model = peft_bridge.attach(MIXTURES[name](), adapter)
    peft_bridge.write_adapter(model, state)
    wanted = logits(model)
    with pytest.warns(RuntimeWarning, match="did not match any targeted module") if more else nothing():
        opened = peft.PeftModel.from_pretrained(MIXTURES[name](), tmp_path / "adapter")
    torch.testing.assert_close(logits(opened), wanted, atol=1e-6, rtol=0)
    inputs = open_folders([tmp_path / "adapter"])
    save_merge(inputs, Recipe("florist", energy=1.0), open_base(base), tmp_path / "merged")
    torch.testing.assert_close(logits(load_base(tmp_path / "merged")[0]), wanted, atol=2e-5, rtol=0)
    save_merge(inputs, Recipe("fedit"), None, tmp_path / "again")
    assert AdapterFolder(tmp_path / "again").modules == AdapterFolder(tmp_path / "adapter").modules


def nothing() -> object:
    from contextlib import nullcontext

    return nullcontext()


def test_an_adapter_that_peft_has_trained_is_read(tmp_path: Path) -> None:
    """PEFT turns all-linear into parameters by a mapping of its own, and writes ends of names in any order."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS[::-1], init_lora_weights=False
    )
    model = peft.get_peft_model(mixtral(), config)
    model.save_pretrained(tmp_path)
    state, opened = load_adapter(tmp_path)
    assert f"{GATE_UP}.1" in state and state[f"{GATE_UP}.1"].shape == (48, 16)
    torch.testing.assert_close(dense(mixtral(), state), logits(model), atol=1e-5, rtol=0)
    assert "model.layers.0.self_attn.q_proj" in opened.modules


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    adapter = placed(mixtral(), r=2, target_modules=[], target_parameters=EXPERTS)
    save_adapter(drawn(adapter), "base", adapter.settings, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_parameters": [GATE_UP]}))
    with pytest.raises(ModelError, match="carries 2 parameters with factors, and target_parameters names 1 there"):
        AdapterFolder(tmp_path)
    file.write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(ModelError, match="adapter_config.json says 5"):
        AdapterFolder(tmp_path)


def test_stacking_is_undone_bit_by_bit() -> None:
    pairs = [LoraPair(torch.randn(rank, 5), torch.randn(4, rank)) for rank in (2, 2, 2)]
    for found, pair in zip(split_pair(join_pairs(pairs), 3), pairs, strict=True):
        assert torch.equal(found.A, pair.A) and torch.equal(found.B, pair.B)
    uneven = [LoraPair(torch.randn(rank, 5), torch.randn(4, rank)) for rank in (0, 3, 1)]
    for found, pair in zip(split_pair(join_pairs(uneven), 3), uneven, strict=True):
        assert found.rank == 3 and torch.equal(found.B @ found.A, pair.B @ pair.A)
    assert matrix_names("a.weight", 1) == ["a"] and matrix_names("a.b", 2) == ["a.b.0", "a.b.1"]
    assert resolve_parameters(["m.q_proj", "m.x"], ["q_proj"], ["down_proj"]) == {"m.x": "m.x.down_proj"}


def test_what_all_linear_leaves_out_is_noted(folder: Path) -> None:
    setup = build_setup(Config(model={"path": str(folder)}), {"a": [Example("add", "3")]}, {})
    (note,) = [note for note in setup.warnings() if "experts" in note]
    values = setup.initial.numel()
    adapter = placed(mixtral(), target_parameters=EXPERTS)
    whole = initial_state(adapter.shapes, adapter.ranks, 0).numel()
    assert f"({values:,} values of {whole:,}" in note and str(EXPERTS).replace("'", '"') in note


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"target_parameters": ["gate_up"]}, ModelError, "matches no parameter .*: it has .*experts.gate_up_proj"),
        ({"target_parameters": EXPERTS, "lora_dropout": 0.1}, ConfigError, "no dropout on parameters"),
        ({"target_modules": []}, ModelError, "names no module"),
        ({"target_modules": "q_proj"}, ModelError, r"whole name of no linear module.*\[\"q_proj\"\]"),
        ({"target_modules": r"(.*)\1"}, ConfigError, "is not supported"),
    ],
)
def test_targets_that_cannot_be(settings: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        placed(mixtral(), **settings)


def test_a_text_is_a_regular_expression_for_whole_names(tmp_path: Path) -> None:
    adapter = placed(mixtral(), target_modules=r".*\.1\.self_attn\.[qk]_proj")
    assert list(adapter.modules) == [f"model.layers.1.self_attn.{part}_proj" for part in "qk"]
    save_adapter(drawn(adapter), "base", adapter.settings, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(adapter.modules)


def test_modules_that_peft_takes_for_experts_are_adapted_as_what_they_are() -> None:
    """B2: by the ends of their names PEFT takes a dense layer and a shared expert for experts."""
    adapter = placed(deepseek(), r=2)
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.up_proj"} <= adapter.modules.keys()
    model = peft_bridge.attach(deepseek(), adapter)
    state = drawn(adapter)
    peft_bridge.write_adapter(model, state)
    torch.testing.assert_close(logits(model), dense(deepseek(), state), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_aggregates_experts(method: str, folder: Path) -> None:
    settings = {
        "model": {"path": str(folder), "threads": 1},
        "lora": {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "method": {"name": method, **({"factors": "random"} if method == "lora-xs" else {})},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        "federation": {"num_rounds": 1},
        "wire": {"budget": "50%"} if method == "loom" else {},  # its own has no room for an element of each
    }
    texts = {name: [Example("add", f"{k} {name}") for k in range(2)] for name in "ab"}
    setup = build_setup(Config.model_validate(settings), texts, {})
    federation = Federation(setup.job, setup.initial, {name: site.ranks for name, site in setup.sites.items()})
    federation.round({name: setup.train(name) for name in texts})
    state, lost = export_adapter(federation.server, None)
    assert lost < 1e-9 and any(GATE_UP in name and bool(pair.B.any()) for name, pair in state.items())
    peft_bridge.write_adapter(setup.model, federation.server.adapter)
    peft_bridge.set_frozen(setup.model, federation.server.fixed)
    torch.testing.assert_close(logits(setup.model), dense(mixtral(), state), atol=2e-5, rtol=0)
    assert isinstance(federation.server, State) and IDS.dim() == 2


def test_a_mixture_that_somebody_else_has_wrapped() -> None:
    """PEFT's own all-linear reaches experts and routers, at twice the rank where it takes one parameter for two."""
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules="all-linear"))
    placed_there = peft_bridge.placements(model, "default")
    assert placed_there[f"{GATE_UP}.0"].rank == 4 and placed_there["model.layers.0.mlp.gate"].shape == (3, 16)
    linear = peft_bridge.linear_beneath(model)
    assert linear == peft_bridge.linear_modules(mixtral()) and placed_there.keys() < linear.keys()
    shapes = {name: place.shape for name, place in placed_there.items()}
    trained, frozen = (random_state(shapes, dict.fromkeys(shapes, rank), rank) for rank in (2, 3))
    peft_bridge.write_adapter(model, trained)
    peft_bridge.set_frozen(model, frozen)
    twin = mixtral()
    dense(twin, trained)
    torch.testing.assert_close(logits(model), dense(twin, frozen), atol=1e-5, rtol=0)
