"""Merged adapters in PEFT and in the base's own weights: the same logits as the dense sum; what PEFT alone can make."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_bridge import dense_logits, logits, random_state
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from fedloom.adapters.folder import AdapterFolder, load_adapter
from fedloom.adapters.merge import folders, table
from fedloom.adapters.merge.base import INDEX, open_base
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.companions import copy_tokenizer
from fedloom.adapters.merge.model import merge_into
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE, AdapterSettings, save_adapter
from fedloom.cli import main as cli
from fedloom.errors import ModelError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.model import peft_bridge
from tiny_models import MODELS, llama, placed, qwen2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's own


def adapters(base: PreTrainedModel, folder: Path, ranks: tuple[int, ...]) -> tuple[list[Path], list[LoraState]]:
    """Adapters of these ranks on the base; the last sits on one kind of module alone."""
    adapter = placed(base, r=4, lora_alpha=16)
    settings, shapes = adapter.settings, adapter.shapes
    paths, states = [], []
    for k, rank in enumerate(ranks):
        own = {name: size for name, size in shapes.items() if k < len(ranks) - 1 or name.endswith(("k_proj", "c_attn"))}
        states.append(random_state(own, dict.fromkeys(own, rank), k))
        paths.append(folder / f"a{k}")
        save_adapter(states[-1], "base", settings, paths[-1])
    return paths, states


def weighted(state: LoraState, weight: float) -> LoraState:
    return state.map(lambda pair: LoraPair(pair.A, weight * pair.B))


def merged(paths: list[Path], out: Path, recipe: Recipe, weights: list[float] | None = None) -> Path:
    out.mkdir(exist_ok=True)
    list(folders.merge_folders(folders.open_folders(paths, weights or ()), recipe, out))
    return out


def opened(base: PreTrainedModel, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(base, folder))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["50KB", "50GB"])
def test_peft_and_the_merged_base_give_the_logits_of_the_dense_sum(tmp_path: Path, name: str, shard: str) -> None:
    base = MODELS[name]()
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    paths, states = adapters(base, tmp_path, (4, 3, 2))
    out = merged(paths, tmp_path / "out", Recipe("florist", energy=1.0), [3, 2, 1])
    wanted = dense_logits(MODELS[name](), *(weighted(state, w / 6) for state, w in zip(states, (3, 2, 1), strict=True)))
    torch.testing.assert_close(opened(base, out), wanted, atol=1e-5, rtol=0)
    (tmp_path / "model").mkdir()
    told = merge_into(open_base(tmp_path / "base"), AdapterFolder(out), tmp_path / "model")
    model, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    torch.testing.assert_close(logits(model.eval()), wanted, atol=1e-5, rtol=0)
    assert told.changed == len(AdapterFolder(out).modules) and told.rounding < 1e-5
    shards = {file.name for file in (tmp_path / "base").glob("*.safetensors")}
    assert {file.name for file in (tmp_path / "model").glob("*.safetensors")} == shards
    assert (len(shards) > 1) == (shard == "50KB")


def test_command_merges_the_shipped_model(tmp_path: Path) -> None:
    base_folder = Path(str(resources.files("fedloom") / "testbeds" / "model"))
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    paths, states = adapters(base, tmp_path, (8, 4, 4))
    runner = CliRunner()

    def call(*arguments: object) -> dict:
        done = runner.invoke(cli.app, ["aggregate", *map(str, arguments), "--weights", "2,1,1", "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    told = call(*paths, "--energy", "1", "--out", tmp_path / "model", "--base-model", base_folder)
    wanted = dense_logits(base, *(weighted(state, w) for state, w in zip(states, (0.5, 0.25, 0.25), strict=True)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    assert told["model"]["changed"] == 28 and told["total"]["error"] < 1e-6
    assert (
        len(told["notes"]) == 2
        and f"trained on base, by its {CONFIG_FILE}, and is used with {base_folder}" in told["notes"][1]
    )
    assert {file.name for file in base_folder.iterdir()} == {file.name for file in (tmp_path / "model").iterdir()}
    rehearsed = call(*paths, "--max-rank", "4", "--dtype", "bf16", "--dry-run", "--out", tmp_path / "dry" / "run")
    assert not (tmp_path / "dry").exists()
    written = call(*paths, "--max-rank", "4", "--dtype", "bf16", "--out", tmp_path / "dry" / "run")
    assert rehearsed["modules"] == written["modules"] and rehearsed["total"] == written["total"]
    assert rehearsed["total"]["cap_error"] > 0.1 and 0 < rehearsed["total"]["rounding_error"] < 0.01
    tensors = load_file(tmp_path / "dry" / "run" / WEIGHTS_FILE)
    assert sum(t.numel() * t.itemsize for t in tensors.values()) == written["total"]["bytes"]
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_bf16_bases_keep_their_type_and_say_what_rounding_cost(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    paths, states = adapters(llama(), tmp_path, (4, 4))
    out = merged(paths, tmp_path / "out", Recipe("flora"))
    (tmp_path / "model").mkdir()
    told = merge_into(open_base(tmp_path / "base"), AdapterFolder(out), tmp_path / "model")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "model"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    total, _ = load_adapter(out)
    lost = change = 0.0
    for module, pair in total.items():
        delta = pair.B.double() @ pair.A.double()
        ideal = before[f"{module}.weight"].double() + delta
        lost += float((after[f"{module}.weight"].double() - ideal).square().sum())
        change += float(delta.square().sum())
    assert told.rounding == pytest.approx((lost / change) ** 0.5, rel=1e-6)
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(before) - len(same) == told.changed == len(total)


def trained(base: PreTrainedModel, folder: Path, seed: int, **config: object) -> Path:
    """An adapter as PEFT saves it, with every trainable value drawn anew."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3 + seed, lora_alpha=8, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def mean_model(paths: list[Path]) -> PreTrainedModel:
    """A plain model whose every weight is the mean of those of the models that PEFT itself merges."""
    models = [peft.PeftModel.from_pretrained(qwen2(), path).merge_and_unload().double() for path in paths]
    twin = qwen2().double()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(sum(dict(model.named_parameters())[name] for model in models) / len(models))
    return twin


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "bias": "none", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [4, 9]}},
    ],
    ids=["modules_to_save", "embedding", "tokens"],
)
def test_whole_modules_embeddings_and_tokens_are_merged(tmp_path: Path, config: dict) -> None:
    paths = [trained(qwen2(), tmp_path / f"a{k}", k, **config) for k in range(2)]
    recipe, out = Recipe("florist", energy=1.0), tmp_path / "out"
    out.mkdir()
    inputs = folders.open_folders(paths)
    told = table.build_record(inputs, recipe, list(folders.merge_folders(inputs, recipe, out)))
    assert told["total"]["bytes"] == sum(4 * tensor.numel() for tensor in load_file(out / WEIGHTS_FILE).values())
    assert bool(told["whole"]) == any("whole tensors" in note for note in told["notes"])
    wanted = logits(mean_model(paths))
    torch.testing.assert_close(opened(qwen2(), out), wanted, atol=1e-5, rtol=0)
    with pytest.raises(ModelError):
        load_adapter(out)


def test_biases_are_merged(tmp_path: Path) -> None:
    paths = [trained(qwen2(), tmp_path / f"a{k}", k, target_modules=["q_proj"], bias="lora_only") for k in range(2)]
    out = merged(paths, tmp_path / "out", Recipe("florist", energy=1.0))
    one, two, mean = (load_file(path / WEIGHTS_FILE) for path in (*paths, out))
    biases = [name for name in mean if name.endswith("bias")]
    assert len(biases) == 2
    for name in biases:
        torch.testing.assert_close(mean[name], (one[name] + two[name]) / 2)
        assert float((one[name] - two[name]).abs().min()) > 0
    model = peft.PeftModel.from_pretrained(qwen2(), out)
    assert json.loads((out / CONFIG_FILE).read_text())["bias"] == "lora_only"
    found = dict(model.get_base_model().named_parameters())["model.layers.0.self_attn.q_proj.base_layer.bias"]
    assert torch.equal(found, next(mean[name] for name in biases if "layers.0" in name))


def test_convolutions_are_merged(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, (2, 3)), nn.Conv2d(5, 4, 1))

    def made(seed: int) -> Path:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2 + seed, target_modules=["0", "1"], init_lora_weights=False)
        peft.get_peft_model(net(), config).save_pretrained(tmp_path / f"a{seed}")
        return tmp_path / f"a{seed}"

    paths = [made(0), made(1)]
    out = merged(paths, tmp_path / "out", Recipe("florist", energy=1.0))
    image = torch.randn(1, 3, 6, 6)
    models = [peft.PeftModel.from_pretrained(net(), path).merge_and_unload() for path in (*paths, out)]
    with torch.no_grad():
        for index in (0, 1):
            one, two, mean = (model[index].weight for model in models)
            torch.testing.assert_close(mean, (one + two) / 2)
        assert peft.PeftModel.from_pretrained(net(), out)(image).shape == net()(image).shape


def test_dora_is_refused(tmp_path: Path) -> None:
    path = trained(llama(), tmp_path / "a", 0, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ModelError, match="use_dora = True; DoRA rescales the base weights"):
        folders.open_folders([path])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.weight is also the output layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no tensor lm_head.weight.*shared"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "no tensor lm_head.weight.*shared"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4]}}, "trainable_tokens_delta"),
    ],
    ids=["embedding", "lm_head", "modules_to_save", "tokens"],
)
def test_changes_that_a_tied_base_cannot_hold_are_refused(tmp_path: Path, config: dict, reason: str) -> None:
    llama().save_pretrained(tmp_path / "base")
    path = trained(llama(), tmp_path / "a", 0, **config)
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=reason):
        merge_into(open_base(tmp_path / "base"), AdapterFolder(path), tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_untied_bases_take_up_embeddings_and_whole_modules(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    config = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    path = trained(qwen2(), tmp_path / "a", 0, **config)
    wanted = opened(qwen2(), path)
    (tmp_path / "model").mkdir()
    merge_into(open_base(tmp_path / "base"), AdapterFolder(path), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_unusable_bases_are_refused(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    llama().save_pretrained(base)
    paths, _ = adapters(qwen2(), tmp_path, (2, 2))
    state = LoraState({"model.layers.0.self_attn.k_proj": LoraPair(torch.ones(1, 7), torch.ones(16, 1))})
    save_adapter(state, "base", AdapterSettings(r=1, lora_alpha=32), tmp_path / "narrow")
    elsewhere = LoraState({"model.layers.9.self_attn.k_proj": LoraPair(torch.ones(1, 32), torch.ones(16, 1))})
    save_adapter(elsewhere, "base", AdapterSettings(r=1, lora_alpha=32), tmp_path / "elsewhere")
    for folder, reason in (("narrow", r"k_proj.weight has shape \(16, 32\).*and \(16, 7\)"), ("elsewhere", "layers.9")):
        with pytest.raises(ModelError, match=reason):
            merge_into(open_base(base), AdapterFolder(tmp_path / folder), out)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="quantised"):
        open_base(base)
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    k_proj = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, k_proj: tensors[k_proj].to(torch.int8)}, base / "model.safetensors", {"format": "pt"})
    path, _ = adapters(llama(), tmp_path / "whole", (2,))
    with pytest.raises(ModelError, match=r"torch.int8 cannot take up a change"):
        merge_into(open_base(base), AdapterFolder(path[0]), out)
    (base / INDEX).write_text(json.dumps({"weight_map": {k_proj: "../base/model.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks ../base/model.safetensors"):
        open_base(base)
    (base / INDEX).unlink()
    (base / "model.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ModelError, match="model.safetensors cannot be read"):
        open_base(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model.safetensors"):
        open_base(base)
    with pytest.raises(ModelError, match="no config.json"):
        open_base(tmp_path)


def test_pefts_cat_is_the_same_sum(tmp_path: Path) -> None:
    paths, _ = adapters(llama(), tmp_path, (4, 3))
    out = merged(paths, tmp_path / "out", Recipe("flora"), [3, 1])
    peft_bridge.add_weighted(llama(), paths, [0.75, 0.25], tmp_path / "peft", "cat", None)
    mine, _ = load_adapter(out)
    theirs, _ = load_adapter(tmp_path / "peft" / "merged")
    assert set(mine) == set(theirs)
    for module in mine:
        torch.testing.assert_close(mine[module].B @ mine[module].A, theirs[module].B @ theirs[module].A)
    with pytest.raises(ModelError, match="linear"):
        peft_bridge.add_weighted(llama(), paths, [0.75, 0.25], tmp_path / "peft", "linear", None)


def test_mistakes_at_the_command_line_take_one_line(tmp_path: Path) -> None:
    paths, _ = adapters(llama(), tmp_path, (2, 2))
    for arguments, reason in (
        (["--weights", "1,x"], "--weights 1,x"),
        (["--weights", "1,2,3"], "2 numbers"),
        (["--dtype", "fp8"], "--dtype fp8"),
        (["--dtype", "bf16", "--base-model", str(tmp_path)], "keep the type"),
        (["--method", "florists"], "florists is unknown"),
        (["--base-model", str(tmp_path / "none")], "no config.json"),
    ):
        done = CliRunner().invoke(cli.app, ["aggregate", *map(str, paths), "--out", str(tmp_path / "out"), *arguments])
        assert done.exit_code == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.output
        assert not (tmp_path / "out").exists()


def test_the_table_folds_many_modules_and_names_few(tmp_path: Path) -> None:
    paths, _ = adapters(llama(), tmp_path, (2, 2))
    runner = CliRunner(env={"COLUMNS": "100"})
    text = runner.invoke(cli.app, ["aggregate", str(paths[1]), "--out", str(tmp_path / "out"), "--rank", "1"]).stdout
    assert "0.self_attn.k_proj" in text and "× 2" not in text and "all 2" in text and "wrote" in text
    big = tmp_path / "big"
    save_adapter(
        random_state({f"l.{k}.up": (8, 8) for k in range(20)}, {f"l.{k}.up": 2 for k in range(20)}),
        "b",
        AdapterSettings(r=2, lora_alpha=32),
        big,
    )
    text = runner.invoke(cli.app, ["aggregate", str(big), "--out", str(tmp_path / "o"), "--dry-run"]).stdout
    assert "up × 20" in text and "all 20" in text and "nothing written" in text


def test_a_tokenizer_is_copied_and_nothing_else(tmp_path: Path) -> None:
    """A link out of the folder is no part of it: what it leads to would be published with the adapter."""
    (tmp_path / "elsewhere").write_text("a secret")
    for folder in ("base", "out"):
        (tmp_path / folder).mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "notes.txt", "model.safetensors"):
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "base" / "vocab.txt").symlink_to(tmp_path / "elsewhere")
    copy_tokenizer(tmp_path / "base", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chat_template.jinja", "tokenizer.json"]
