"""Adapters handed on: the numbers are the same through readers that share no code with the writers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import gguf
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_files import interleave, next_log_probs, write_base
from safetensors.torch import load_file, save_file
from test_peft_bridge import NARROW, dense_logits, logits, random_state
from typer.testing import CliRunner

from fedloom.adapters.export import names
from fedloom.adapters.export.forms import write_export
from fedloom.adapters.export.source import Cut
from fedloom.adapters.export.vllm import MAX_LORA_RANKS, server_rank
from fedloom.adapters.folder import load_adapter
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE, AdapterSettings, save_adapter
from fedloom.cli.main import app
from fedloom.errors import ConfigError, FedloomError, ModelError, NumericError
from fedloom.lora.pair import LoraPair, LoraState
from tiny_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT calls it
PROMPT = [4, 20, 30, 41, 52, 9, 77, 33]


@pytest.fixture(scope="module", params=MODELS)
def handed(request, tmp_path_factory):
    """(kind, folder): a base, an adapter that PEFT saved with rsLoRA and unequal ranks and alphas, and PEFT's model."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    MODELS[kind]().save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules="all-linear",
        init_lora_weights=False,
        use_rslora=True,
        rank_pattern={NARROW[kind]: 2},
        alpha_pattern={rf"1\..*\.{NARROW[kind]}": 7},
        fan_in_fan_out=kind == "gpt2",
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(MODELS[kind](), config)
    model.save_pretrained(folder / "adapter")
    return kind, folder, model


def read_gguf(file: Path, kind: str, base: torch.nn.Module) -> LoraState:
    """ΔW by module, read by the format's description alone: scale alpha / r, rows of heads put back in two halves."""
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    kinds = {
        **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
        **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        "attn_output": "self_attn.o_proj",
    }
    if kind == "gpt2":
        kinds = {
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }
    stem = "transformer.h" if kind == "gpt2" else "model.layers"
    held = {tensor.name: torch.from_numpy(dequantized(tensor)) for tensor in reader.tensors}
    found = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in held}):
        _, layer, part, _ = name.split(".")
        down, up = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        if kind in ("llama", "mistral") and part in ("attn_q", "attn_k"):
            heads = base.config.num_attention_heads if part == "attn_q" else base.config.num_key_value_heads
            back = torch.empty_like(up)
            back[torch.from_numpy(interleave(torch.arange(len(up)).numpy(), heads))] = up
            up = back
        found[f"{stem}.{layer}.{kinds[part]}"] = LoraPair(down, up * (alpha / down.shape[0]))
    return LoraState(found)


def dequantized(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()


@pytest.mark.parametrize(("dtype", "near"), [("fp32", 1e-5), ("fp16", 4e-3), ("bf16", 4e-2)])
def test_a_gguf_file_gives_pefts_logits(handed, tmp_path, dtype, near):
    kind, folder, model = handed
    told = write_export(folder / "adapter", "gguf", tmp_path / "a.gguf", dtype=dtype, base=folder / "base")
    base = MODELS[kind]()
    state = read_gguf(tmp_path / "a.gguf", kind, base)
    assert sorted(state) == [row["module"] for row in told["modules"]] and told["bytes"] > 0
    torch.testing.assert_close(dense_logits(base, state), logits(model), atol=near, rtol=0)
    assert (dense_logits(base) - logits(model)).abs().max() > 0.1  # so that the test could fail


def test_llama_cpp_gives_pefts_probabilities(handed, tmp_path):
    """The base model and the adapter, read by llama.cpp itself."""
    pytest.importorskip("xllamacpp")  # it has wheels for some systems only
    kind, folder, model = handed
    base = MODELS[kind]()
    write_base(base, kind, tmp_path / "base.gguf")
    write_export(folder / "adapter", "gguf", tmp_path / "a.gguf", base=folder / "base")
    found = []
    for reader, file in ((base, None), (model, tmp_path / "a.gguf")):
        with torch.no_grad():
            expected = reader(torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)
        told = next_log_probs(tmp_path / "base.gguf", file, PROMPT, base.config.vocab_size)
        torch.testing.assert_close(torch.tensor(told, dtype=torch.float64), expected, atol=1e-3, rtol=0)
        found.append(expected)
    assert (found[0] - found[1]).abs().max() > 0.05


def test_rows_are_put_in_order_for_queries_and_keys_alone():
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    rows = torch.arange(8.0)[:, None]
    query = names.order_rows(config, "base", "model.layers.0.self_attn.q_proj", rows)
    assert query.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    key = names.order_rows(config, "base", "model.layers.0.self_attn.k_proj", rows)
    assert key.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert names.order_rows(config, "base", "model.layers.0.self_attn.v_proj", rows) is rows
    with pytest.raises(ModelError, match="6 rows, which 2 heads of base do not divide"):
        names.order_rows(config, "base", "model.layers.0.self_attn.q_proj", torch.zeros(6, 1))


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "module", "said"),
    [
        (
            {**LLAMA, "model_type": "mamba"},
            "model.layers.0.mlp.up_proj",
            "is of model_type 'mamba', and a GGUF adapter",
        ),
        (LLAMA, "model.layers.2.mlp.up_proj", "module model.layers.2.mlp.up_proj has no name .* with 2 layers: "),
        (LLAMA, "model.layers.0.mlp.experts", "module model.layers.0.mlp.experts has no name"),
        ({**LLAMA, "tie_word_embeddings": True}, "lm_head", "module lm_head shares its weight with the embedding"),
        ({**LLAMA, "num_hidden_layers": "two"}, "lm_head", "num_hidden_layers = 'two': expected a whole number"),
    ],
)
def test_what_has_no_place_in_a_gguf_file_is_named(config, module, said):
    with pytest.raises(ModelError, match=said):
        names.name_modules(config, "base", [module])


def test_every_architecture_of_the_table_is_known_to_gguf():
    for kind, chosen in names.ARCHITECTURES.items():
        assert chosen.name in gguf.MODEL_ARCH.__members__, kind


def test_an_adapter_of_another_model_is_refused_whole(handed, tmp_path):
    kind, folder, _ = handed
    (tmp_path / "base").mkdir()
    text = json.loads((folder / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**text, "num_hidden_layers": 1, "n_layer": 1}))
    with pytest.raises(ModelError, match="has no name in a GGUF file"):
        write_export(folder / "adapter", "gguf", tmp_path / "a.gguf", base=tmp_path / "base")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


# vLLM


def as_vllm_reads(folder: Path) -> LoraState:
    """One rank and one scale from the configuration, whatever the patterns say; factors by their names."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["bias"] == "none" and not config.get("modules_to_save") and not config.get("use_dora")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    held = load_file(folder / WEIGHTS_FILE)
    found = {}
    for name in (name for name in held if name.endswith(".lora_A.weight")):
        down, up = held[name], held[name.replace("lora_A", "lora_B")]
        found[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = LoraPair(down, up * scale)
    return LoraState(found)


def test_a_folder_for_vllm_gives_pefts_logits(handed, tmp_path):
    kind, folder, model = handed
    base = MODELS[kind]()
    misread = dense_logits(base, as_vllm_reads(folder / "adapter"))
    assert (misread - logits(model)).abs().max() > 0.02  # vLLM would pass over the patterns
    told = write_export(folder / "adapter", "vllm", tmp_path / "v")
    state = as_vllm_reads(tmp_path / "v")
    assert set(state.ranks().values()) == {4}
    torch.testing.assert_close(dense_logits(base, state), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(dense_logits(base, load_adapter(tmp_path / "v")[0]), logits(model), atol=1e-5, rtol=0)
    said = " ".join(told["notes"])
    assert "ranks 2 to 4 are filled up with zeros to 4" in said and "vLLM reads one lora_alpha" in said
    assert "--max-lora-rank 8 --lora-modules v=" in told["load"]


def test_the_server_is_told_the_least_rank_that_it_may_be_told():
    assert [server_rank(rank) for rank in (1, 8, 9, 65, 257, 321)] == [8, 8, 16, 128, 320, 512]
    with pytest.raises(ModelError, match="rank 513, and vLLM takes 512 at most: cut it with --max-rank 512"):
        server_rank(MAX_LORA_RANKS[-1] + 1)


def plain(folder: Path, rank: int = 2, shape: tuple[int, int] = (6, 8), scale: float = 1.0) -> LoraState:
    state = random_state(
        {"model.layers.0.q": shape, "model.layers.1.q": shape}, {f"model.layers.{i}.q": rank for i in (0, 1)}
    )
    state = state.map(lambda pair: LoraPair(pair.A, pair.B * scale))
    save_adapter(state, "base", AdapterSettings(rank, 2 * rank, ("q",)), folder)
    return state


def test_what_vllm_cannot_take_is_named(tmp_path):
    plain(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    held = load_file(tmp_path / "a" / WEIGHTS_FILE)
    save_file({**held, "base_model.model.lm_head.weight": torch.zeros(3, 4)}, tmp_path / "a" / WEIGHTS_FILE)
    for form in ("vllm", "gguf"):
        out = tmp_path / ("o.gguf" if form == "gguf" else "o")
        with pytest.raises(ModelError, match=r"modules_to_save = \['lm_head'\].*use --to merged"):
            write_export(tmp_path / "a", form, out, base=tmp_path)
        assert not out.exists()


# cuts


@settings(max_examples=12)
@given(st.integers(1, 6), st.floats(0.2, 0.999), st.integers(0, 99))
def test_a_cut_costs_what_a_dense_svd_says(tmp_path_factory, max_rank, energy, seed):
    folder = tmp_path_factory.mktemp("cut")
    shape = {"model.layers.0.q": (7, 9), "model.layers.1.q": (7, 9)}
    state = random_state(shape, {"model.layers.0.q": 5, "model.layers.1.q": 3}, seed)
    save_adapter(state, "base", AdapterSettings(5, 4, ("q",)), folder / "a")
    told = write_export(folder / "a", "peft", folder / "o", cut=Cut(max_rank, energy))
    kept, _ = load_adapter(folder / "o")
    for row in told["modules"]:
        pair = state[row["module"]]
        dense = pair.B.double() @ pair.A.double()
        sizes = torch.linalg.svdvals(dense).square()
        left = sizes.sum() - sizes.cumsum(0)
        least = int((left > (1 - energy) * sizes.sum()).sum()) + 1
        assert row["rank"] == kept[row["module"]].rank == min(least, max_rank)
        found = torch.linalg.matrix_norm(dense - kept[row["module"]].B.double() @ kept[row["module"]].A.double())
        assert row["cut"] == pytest.approx(float(found), abs=1e-5)
        assert row["cut"] == pytest.approx(math.sqrt(max(float(left[row["rank"] - 1]), 0.0)), abs=1e-3)


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_rounding_is_told(tmp_path, form):
    state = plain(tmp_path / "a")
    told = write_export(tmp_path / "a", form, tmp_path / "o", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "o" / WEIGHTS_FILE).values()} == {torch.bfloat16}
    kept, _ = load_adapter(tmp_path / "o")
    for row in told["modules"]:
        one, other = (held[row["module"]] for held in (state, kept))
        lost = torch.linalg.matrix_norm(one.B.double() @ one.A.double() - other.B.double() @ other.A.double())
        assert row["rounding"] == pytest.approx(float(lost), rel=1e-3) and row["rounding"] > 0


def test_values_that_a_type_cannot_hold_are_refused(tmp_path):
    plain(tmp_path / "a", scale=1e9)
    with pytest.raises(NumericError, match=r"module model.layers.0.q is too large for torch.float16: use --dtype bf16"):
        write_export(tmp_path / "a", "vllm", tmp_path / "o", dtype="fp16")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("cut", "said"), [({"max_rank": 0}, "--max-rank is 0"), ({"energy": 1.5}, "--energy is 1.5: expected 0 < energy")]
)
def test_a_cut_out_of_range_is_refused(cut, said):
    with pytest.raises(ConfigError, match=said):
        Cut(**cut)


# the command


def test_a_run_is_handed_on_by_its_adapter(tmp_path):
    plain(tmp_path / "run" / "adapter", rank=3)
    (tmp_path / "run" / "ledger.jsonl").touch()
    for name in ("tokenizer.json", "README.md"):
        (tmp_path / "run" / "adapter" / name).write_text("{}")
    words = ["export", str(tmp_path / "run"), "--to", "peft", "--out", str(tmp_path / "o"), "--max-rank", "1"]
    first = CliRunner().invoke(app, [*words, "--json"])
    told = json.loads(first.stdout)
    assert told["source"].endswith("adapter") and told["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "o").iterdir()
    )
    assert told["notes"] == ["README.md is that of the whole adapter: its rank and scores are those before the cut"]
    assert (tmp_path / "o" / "tokenizer.json").is_file() and {row["rank"] for row in told["modules"]} == {1}
    shown = CliRunner().invoke(app, [*words, "--force"], env={"COLUMNS": "200"}).stdout
    assert "error of the cut" in shown and "MiB load it: PeftModel.from_pretrained" in " ".join(shown.split())


def test_a_rehearsal_writes_nothing(tmp_path):
    plain(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    for form in ("peft", "vllm"):
        told = write_export(tmp_path / "a", form, tmp_path / "o", rehearse=True)
        assert told["written"] is False and len(told["modules"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def refusals(folder: Path) -> list[tuple[dict, str]]:
    (folder / "run").mkdir()
    (folder / "run" / "ledger.jsonl").touch()
    (folder / "taken.gguf").touch()
    return [
        ({"source": folder / "run"}, "is a run that has left no adapter yet"),
        ({"source": folder / "none"}, "is not a folder"),
        ({"form": "onnx"}, "--to onnx is unknown: expected peft, merged, gguf, vllm"),
        ({"form": "merged"}, "--to merged needs the base model's folder: name it with --base-model"),
        ({"form": "gguf", "out": folder / "x.bin"}, "expected the name of a file that ends in .gguf"),
        ({"form": "gguf", "out": folder / "taken.gguf"}, "exists already: choose another file"),
        ({"form": "gguf", "out": folder / "new.gguf", "base": folder}, "holds no config.json"),
        ({"dtype": "int8"}, "--dtype int8: expected fp32, fp16, bf16"),
        ({"form": "merged", "dtype": "bf16"}, "a merged model keeps the type of its base"),
        ({"out": folder / "a"}, "is or holds one of the folders"),
    ]


def test_mistakes_are_told_in_one_line(tmp_path):
    plain(tmp_path / "a")
    for given_here, said in refusals(tmp_path):
        asked = {"source": tmp_path / "a", "form": "peft", "out": tmp_path / "o", **given_here}
        with pytest.raises(FedloomError, match=said) as raised:
            write_export(asked.pop("source"), asked.pop("form"), asked.pop("out"), **asked)
        assert "\n" not in str(raised.value)


def test_without_the_package_the_command_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'pip install "fedloom\[gguf\]"'):
        names.load_gguf()
