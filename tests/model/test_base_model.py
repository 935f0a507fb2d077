"""Loading a base model: a whole folder loads quietly, anything else is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    GitConfig,
    GPT2Config,
    GPTNeoXConfig,
    PretrainedConfig,
    Qwen2ForSequenceClassification,
    ReformerConfig,
    XLNetConfig,
)

from fedloom.adapters.merge.base import open_base
from fedloom.errors import ConfigError, ModelError
from fedloom.model.base import load_base
from fedloom.model.identity import base_digest
from fedloom.model.kinds import choose_class, refusal
from tiny_models import MODELS, llama, tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_frozen(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    model, read = load_base(tmp_path, device="cpu")
    assert tuple(capfd.readouterr()) == ("", "")
    for (key, found), (_, saved) in zip(model.named_parameters(), MODELS[name]().named_parameters(), strict=True):
        assert torch.equal(found, saved), key
        assert not found.requires_grad
    assert not model.training
    assert (read.eos_token_id, read.pad_token_id) == (2, 0)


def test_dtype(whole: Path) -> None:
    assert load_base(whole, "bfloat16", device="cpu")[0].dtype == torch.bfloat16


def refused(folder: Path | str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load_base(folder, device="cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no base model at .*expected a Hugging Face folder")


def test_what_is_missing_is_named(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder / "other.json")
    (folder / "tokenizer_config.json").unlink()
    refused(folder, "holds no tokenizer")
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights: expected model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json")


@pytest.mark.parametrize(
    "broken", [b"", b"{", b"[]", b'{"model_type": "no-such-architecture"}', b'{"hidden_size": 32}']
)
def test_damaged_config(folder: Path, broken: bytes) -> None:
    (folder / "config.json").write_bytes(broken)
    refused(folder, "cannot be loaded as a causal language model|is not valid JSON|holds a list")


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(folder, "cannot be loaded as a causal language model")


def test_weights_that_do_not_fit(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    first = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != first}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(folder, f"the weights of {first} are missing")
    save_file({**weights, first: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"the weights of {first} are missing or of another shape")


def test_a_model_of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ModelError, match=r"its config.json is of type t5 \(LlamaForCausalLM\); take a model") as caught:
        load_base(folder)
    assert len(str(caught.value).replace(str(folder), "")) < 250


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded as a causal language model"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "custom code"),
    ],
    ids=["gptq", "code of its own"],
)
def test_what_needs_more_than_transformers(folder: Path, changes: dict[str, object], reason: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    refused(folder, reason)


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_is_refused_also_where_it_has_all_weights(tmp_path: Path, tied: bool) -> None:
    config = MODELS["qwen2"]().config
    config.tie_word_embeddings = tied
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "Qwen2ForSequenceClassification's, which gives labels and no text")


def test_weights_of_the_older_kind_load_and_are_not_merged(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, _ = load_base(folder, device="cpu")
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        open_base(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(), '"is_decoder": true in config.json'),
        (XLNetConfig(), "attn_type = 'uni'"),
        (BartConfig(), "decoder half"),
        (GitConfig(), "needs an image"),
        (ReformerConfig(is_decoder=True), "no gradient"),
        (BertConfig(is_decoder=True), None),
        (XLNetConfig(attn_type="uni"), None),
        (GPTNeoXConfig(), None),
        (GPT2Config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_sees_later_tokens_is_refused(config: PretrainedConfig, reason: str | None) -> None:
    found = refusal(config)
    assert found is None if reason is None else reason in str(found)
    if reason is not None:
        with pytest.raises(ModelError, match="m cannot be trained as a causal language model: "):
            choose_class("m", config)
    else:
        assert choose_class("m", config) is AutoModelForCausalLM


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": "float8"}, "model.dtype 'float8' is unknown: expected float32"),
        ({"quantization": "2bit"}, "model.quantization '2bit' is unknown"),
        ({"device": "tpu"}, "model.device 'tpu' is unknown.*CUDA_VISIBLE_DEVICES"),
        ({"device": "cuda:x"}, "model.device 'cuda:x' is unknown"),
    ],
)
def test_settings_that_cannot_be(whole: Path, arguments: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_base(whole, **arguments)


def test_a_gpu_that_is_not_there(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="finds no GPU"):
            load_base(whole, device=device)
    assert load_base(whole)[0].device.type == "cpu"


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model"),
        *("modeling_own.py", "additional_chat_templates/tools.jinja"),
    ],
)
def test_the_digest_covers_all_that_makes_the_model(folder: Path, name: str) -> None:
    before = base_digest(folder)
    assert base_digest(folder) == before
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    content = bytearray(file.read_bytes() if file.exists() else b"{}")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert base_digest(folder) != before


def test_two_swapped_tokens_are_another_base_model(folder: Path) -> None:
    before, file = base_digest(folder), folder / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(vocabulary))
    assert base_digest(folder) != before


def test_the_digest_does_not_cover_what_changes_nothing(folder: Path) -> None:
    before = base_digest(folder)
    (folder / "README.md").write_text("a model")
    assert base_digest(folder) == before


def test_a_name_without_files_has_no_digest(tmp_path: Path) -> None:
    for path in ("owner/no-such-model", tmp_path / "nothing"):
        with pytest.raises(ModelError, match="no base model at"):
            base_digest(path)


def test_a_hub_name_stands_for_the_files_that_were_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = str(folder / "config.json")
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda name, *arguments, **more: found)
    assert base_digest("owner/name") == base_digest(folder)
