"""Adapter folders: what is written here opens in plain PEFT, what PEFT writes is read here, the rest is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_bridge import IDS, NARROW, dense_logits, random_state

from fedloom.adapters.folder import AdapterFolder, load_adapter
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE, AdapterSettings, save_adapter
from fedloom.errors import ModelError
from fedloom.lora.pair import LoraPair, LoraState, digest
from fedloom.model import peft_bridge
from tiny_models import MODELS, llama, placed

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT calls it

SHAPES = {"model.layers.0.self_attn.k_proj": (16, 32), "model.layers.1.mlp.up_proj": (48, 32)}


def small(folder: Path, ranks: tuple[int, int] = (2, 2), **settings: object) -> LoraState:
    state = random_state(SHAPES, dict(zip(SHAPES, ranks, strict=True)))
    save_adapter(state, "base", AdapterSettings(**{"r": 2, "lora_alpha": 4, **settings}), folder)
    return state


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_saved_adapter_opens_in_plain_peft(tmp_path: Path, name: str, use_rslora: bool) -> None:
    base = MODELS[name]()
    narrow = NARROW[name]
    adapter = placed(base, r=4, lora_alpha=6, use_rslora=use_rslora, alpha_pattern={narrow: 5.0})
    settings, shapes = adapter.settings, adapter.shapes
    ranks = {module: 1 + i % 5 for i, module in enumerate(shapes)}
    state = random_state(shapes, ranks)
    save_adapter(state, "some/base", settings, tmp_path)
    opened = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        found = opened(IDS).logits.double()
    torch.testing.assert_close(found, dense_logits(MODELS[name](), state), atol=5e-6, rtol=0)
    assert opened.peft_config["default"].base_model_name_or_path == "some/base"
    again, folder = load_adapter(tmp_path)
    assert again.ranks() == state.ranks() and folder.base_model == "some/base"
    for module, pair in state.items():
        assert torch.equal(again[module].A, pair.A)
        torch.testing.assert_close(again[module].B, pair.B, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_peft_saved_is_read(tmp_path: Path, name: str, use_rslora: bool) -> None:
    narrow = NARROW[name]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules="all-linear",
        init_lora_weights=False,
        use_rslora=use_rslora,
        rank_pattern={rf"1\..*\.{narrow}": 2},
        alpha_pattern={narrow: 7},
        fan_in_fan_out=name == "gpt2",
    )
    model = peft.get_peft_model(MODELS[name](), config)
    model.save_pretrained(tmp_path)
    state, folder = load_adapter(tmp_path)
    layers = {held.names[0]: held.layer for held in peft_bridge.lora_layers(model)}
    assert set(layers) == set(state) == set(folder.modules)
    assert sorted(set(state.ranks().values())) == [2, 4]
    for module, layer in layers.items():
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(state[module].B @ state[module].A, delta.T if name == "gpt2" else delta)


def test_equal_states_give_equal_bytes_and_exact_values(tmp_path: Path) -> None:
    for name in ("one", "two"):
        small(tmp_path / name, ranks=(2, 5), target_modules={"up_proj", "k_proj"})
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    state = small(tmp_path / "one")
    assert digest(load_adapter(tmp_path / "one")[0]) == digest(state)


def test_half_precision_and_empty_pairs(tmp_path: Path) -> None:
    state = random_state(SHAPES, dict(zip(SHAPES, (0, 3), strict=True)))
    save_adapter(
        state, "base", AdapterSettings(r=3, lora_alpha=32, target_modules=list(SHAPES)), tmp_path, torch.bfloat16
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.bfloat16}
    again, _ = load_adapter(tmp_path)
    empty, full = again.values()
    assert empty.rank == 1 and not (empty.B @ empty.A).any()
    torch.testing.assert_close(full.A, state["model.layers.1.mlp.up_proj"].A, rtol=2**-8, atol=0)
    peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_reading_needs_neither_peft_nor_transformers(tmp_path: Path) -> None:
    small(tmp_path)
    code = f"import sys; from fedloom.adapters.folder import load_adapter; load_adapter({str(tmp_path)!r})"
    code += "; assert not {'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_are_read_one_at_a_time(tmp_path: Path) -> None:
    state = small(tmp_path)
    folder = AdapterFolder(tmp_path)
    assert folder.modules == list(SHAPES)
    for module in folder.modules:
        assert digest(LoraState({module: folder.pair(module)})) == digest(LoraState({module: state[module]}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("peft_type", "LOHA", "only LoRA"),
        ("use_dora", True, "DoRA.* train with use_dora = False, or merge"),
        ("modules_to_save", ["lm_head"], "whole modules"),
        ("bias", "lora_only", "biases"),
        ("trainable_token_indices", [1], "embeddings"),
        ("init_lora_weights", "pissa", "weights of the base"),
        ("layer_replication", [[0, 1]], "layers of the base"),
        ("target_parameters", ["experts.up"], "no tensor is a factor of such"),
        ("r", "many", "not valid"),
        ("r", 0, "r is 0: input should be greater than or equal to 1"),
        ("rank_pattern", [3], "not valid"),
        ("r", 3, "rank 2.*says 3.*belong together"),
    ],
)
def test_what_is_no_plain_lora_adapter_is_refused(tmp_path: Path, key: str, value: object, reason: str) -> None:
    small(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError, match=reason) as caught:
        load_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type"])
def test_a_missing_setting_is_named(tmp_path: Path, key: str) -> None:
    small(tmp_path)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=key):
        load_adapter(tmp_path)


def test_damaged_folders(tmp_path: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(ModelError, match=reason) as caught:
            load_adapter(tmp_path / "a")
        assert "\n" not in str(caught.value)

    refused("is not a folder")
    small(tmp_path / "a")
    config, weights = tmp_path / "a" / CONFIG_FILE, tmp_path / "a" / WEIGHTS_FILE
    text, data = config.read_text(), weights.read_bytes()
    tensors = load_file(weights)
    for broken in ("", "{", "[]", "null"):
        config.write_text(broken)
        refused(CONFIG_FILE)
    config.unlink()
    refused(f"no {CONFIG_FILE}")
    config.write_text(text)
    for broken in (b"", data[:100], data[:-1], b"\xff" * 64):
        weights.write_bytes(broken)
        refused("cannot be read")
    first = "base_model.model.model.layers.0.self_attn.k_proj.lora_"
    for name, reason in (
        (f"{first}magnitude_vector", "not a LoRA factor"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lacks one factor of model.embed_tokens"),
        ("base_model.model.lm_head.weight", "not a LoRA factor"),
        ("base_model.model.lm_head.lora_A.weight", "lacks one factor of lm_head"),
    ):
        save_file({**tensors, name: torch.zeros(2, 2)}, weights)
        refused(reason)
    save_file({**tensors, f"{first}A.weight": torch.zeros(3, 32)}, weights)
    refused(r"k_proj.*not make a LoRA pair")
    save_file({}, weights)
    refused("holds no LoRA factors")
    weights.unlink()
    refused(f"no {WEIGHTS_FILE}$")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"")
    refused("safe_serialization")


def test_pairs_need_not_be_contiguous(tmp_path: Path) -> None:
    state = LoraState({"layer": LoraPair(torch.randn(8, 2).T, torch.randn(2, 6).T)})
    save_adapter(state, "base", AdapterSettings(r=2, lora_alpha=2), tmp_path)
    assert digest(load_adapter(tmp_path)[0]) == digest(state)
