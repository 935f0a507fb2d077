"""Adapter folders of strangers, mutated: `inspect` and `aggregate` end in a result or in one line."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedloom.adapters.folder import AdapterFolder, load_adapter, other_base_note
from fedloom.adapters.merge.base import open_base
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.companions import copy_companions
from fedloom.adapters.merge.folders import open_folders
from fedloom.adapters.merge.save import save_merge
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE, AdapterSettings, save_adapter
from fedloom.cli import inspect as inspection
from fedloom.errors import FedloomError, ModelError
from fedloom.lora.pair import LoraPair, LoraState

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 8), "model.layers.1.mlp.up_proj": (12, 8)}
PATTERNS = [
    "(([a-z]|[a-z]*[a-z_.0-9])*)*X",
    "(.*)*(.*)*(.*)*X",
    "(" * 3000,
    "(",
    r"(.+)\1",
    "(?!x)y",
    "q_proj",
    r".*\.q_proj",
    "\ud800",
    "[/b]",
    "x{1000}" * 20,
]
EXTREMES = [0, -1, 1, 2, 2.9, "2", True, None, 1e400, -1e400, float("nan"), 10**400, 2**63, 1e-300, 1e308, [], {}, ""]
EXTREMES += [{"a": 1}, [1], [[]], "[/b]", "\x1b]0;x\x07", "\ud800", "x" * 10_000, "LORA", "all-linear", "none"]
BODIES = ["", "null", "[]", "{", "[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, '{"r":' + "9" * 5_000 + "}"]


def write(folder: Path) -> tuple[dict[str, object], bytes]:
    """A sound adapter; its configuration and its weights."""
    generator = torch.Generator().manual_seed(0)
    pairs = {
        name: LoraPair(torch.randn(2, n, generator=generator), torch.randn(m, 2, generator=generator))
        for name, (m, n) in SHAPES.items()
    }
    save_adapter(LoraState(pairs), "some/base", AdapterSettings(r=2, lora_alpha=4), folder)
    return json.loads((folder / CONFIG_FILE).read_text()), (folder / WEIGHTS_FILE).read_bytes()


def attempt(folder: Path) -> set[str]:
    """Whether each command gave a result or one line; anything else is raised."""
    found = set()
    for name, command in {
        "inspect": lambda: inspection.adapter_table(folder),
        "aggregate": lambda: save_merge(open_folders([folder, folder]), Recipe(), None, None),
    }.items():
        try:
            command()
            found.add(f"{name}: result")
        except FedloomError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, error
            found.add(f"{name}: one line")
    return found


def mutate_config(config: dict[str, object], draw: random.Random) -> dict[str, object]:
    """One to three keys with other values, or pattern mappings with hostile keys."""
    made = copy.deepcopy(config)
    keys = [*config, "init_lora_weights", "modules_to_save", "layers_pattern", "exclude_modules", "use_dora"]
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(keys)
        kind = draw.randrange(5)
        if kind == 0:
            made.pop(key, None)
        elif kind == 1:
            made[draw.choice(["rank_pattern", "alpha_pattern"])] = {
                draw.choice(PATTERNS): draw.choice([2, 4, *EXTREMES]) for _ in range(draw.randint(1, 4))
            }
        elif kind == 2:
            made["target_modules"] = draw.choice([*PATTERNS, [draw.choice(PATTERNS)], {"q_proj": 1}])
        elif kind == 3:
            nested: object = draw.choice(EXTREMES)
            for _ in range(draw.choice([1, 20, 200])):
                nested = draw.choice([[nested], {"k": nested}])
            made[key] = nested
        else:
            made[key] = draw.choice(EXTREMES)
    return made


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """Other names, types, shapes and offsets in a safetensors header, or bytes changed, cut or put in."""
    size = int.from_bytes(data[:8], "little")
    kind = draw.randrange(4)
    if kind == 0:
        place = draw.randrange(len(data))
        return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    if kind == 1:
        return data[: draw.randrange(len(data))]
    if kind == 2:
        return draw.choice([0, 2**62, 2**64 - 1, size + 1, 99_000_000]).to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(names)
        change = draw.randrange(4)
        entry = header.get(name)
        if not isinstance(entry, dict):
            continue
        if change == 0:
            odd = draw.choice(["x" * 5000, "\x1b[2J", "(.*)*X", "[/b]", "model.norm.weight", name + "2", "..", ""])
            header[draw.choice([odd, f"base_model.model.{odd}.lora_A.weight"])] = header.pop(name)
            names = [name for name in header if name != "__metadata__"]
        elif change == 1:
            entry["dtype"] = draw.choice(["F64", "BF16", "I8", "BOOL", "F8_E8M0", "F4", "C64", "U16", "X", 3])
        elif change == 2:
            entry["shape"] = draw.choice(
                [[], [0], [2, 0], [0, 2**60], [2**63, 2], [16], [1, 16], [16, 1], [2, 2, 4], -1]
            )
        else:
            entry["data_offsets"] = draw.choice([[0, 0], [0, 2**63], [64, 0], [-1, 5], [0, 64], "x"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutant(folder: Path, sound: tuple[dict[str, object], bytes], seed: int) -> str:
    """Write one mutant into the folder; its kind."""
    draw = random.Random(seed)
    config, weights = sound
    kind = draw.choice(["config", "config", "header", "header", "both", "body"])
    text = json.dumps(mutate_config(config, draw) if kind in ("config", "both") else config)
    (folder / CONFIG_FILE).write_text(draw.choice(BODIES) if kind == "body" else text)
    (folder / WEIGHTS_FILE).write_bytes(mutate_header(weights, draw) if kind in ("header", "both") else weights)
    return kind


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_mutated_folder_gives_a_result_or_one_line(tmp_path: Path, seed: int) -> None:
    sound = write(tmp_path)
    mutant(tmp_path, sound, seed)
    assert len(attempt(tmp_path)) == 2


@pytest.mark.slow
def test_many_mutated_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, seen, longest = write(tmp_path), Counter[str](), 0.0
    for seed in range(5_000):
        kind = mutant(tmp_path, sound, seed)
        start = time.perf_counter()
        seen.update(f"{kind}: {end}" for end in attempt(tmp_path))
        longest = max(longest, time.perf_counter() - start)
    with capsys.disabled():
        print(f"\nadapter folders: {seen.total():,} commands, the longest two took {longest:.2f} s")
        print("\n".join(f"  {end}: {count:,}" for end, count in sorted(seen.items())))
    assert seen.total() == 10_000 and {key.partition(": ")[2] for key in seen} == {
        "inspect: result",
        "inspect: one line",
        "aggregate: result",
        "aggregate: one line",
    }


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rank_pattern": {PATTERNS[0] + "(": 2}}, "rank_pattern: pattern .* cannot be used: missing"),
        ({"alpha_pattern": {"(" * 3000: 2}}, "alpha_pattern: pattern .* it has 3000 characters, expected at most 200"),
        ({"rank_pattern": {"(?=x)": 2}}, r"rank_pattern: pattern '\(\?=x\)' cannot be used"),
        ({"r": 2.9}, "r is 2.9: input should be a valid integer"),
        ({"r": "2"}, "r is '2': input should be a valid integer"),
        ({"r": True}, "r is True"),
        ({"r": 1e400}, "Infinity is not a JSON number"),
        ({"lora_alpha": float("inf")}, "Infinity is not a JSON number"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e.300"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ({"modules_to_save": ["(.*)*X"]}, r"modules_to_save.0 is .*: string should match pattern '\^\[a-zA-Z0-9_-\]\+"),
        ({"base_model_name_or_path": "\ud800"}, "half of a character"),
    ],
)
def test_what_was_taken_silently_or_ended_in_a_traceback(tmp_path: Path, keys: dict[str, object], reason: str) -> None:
    config, _ = write(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **keys}))
    with pytest.raises(ModelError, match=reason) as caught:
        load_adapter(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_that_json_reads_as_infinity(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 1e400, "lora_alpha": 1}')
    with pytest.raises(ModelError, match="holds a number that is too large"):
        load_adapter(tmp_path)


def test_catastrophic_patterns_are_answered(tmp_path: Path) -> None:
    config, _ = write(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "rank_pattern": dict.fromkeys(PATTERNS[:2], 7)}))
    assert attempt(tmp_path) == {"inspect: result", "aggregate: result"}


@pytest.mark.parametrize("rank", [1_000, 40_000])  # the Gram matrix of the second would take 12 GiB
def test_a_rank_far_above_the_width_takes_no_square_of_it(tmp_path: Path, rank: int) -> None:
    pair = LoraPair(torch.ones(rank, 1), torch.ones(1, rank))
    save_adapter(LoraState({"layer": pair}), "base", AdapterSettings(r=rank, lora_alpha=rank), tmp_path)
    end = "result" if rank == 1_000 else "one line"
    assert attempt(tmp_path) == {f"inspect: {end}", f"aggregate: {end}"}


def test_names_that_do_not_print_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    name = "base_model.model.layer\x1b[2J.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 3), name.format("B"): torch.ones(3, 2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=r"layer\\x1b\[2J") as caught:
        load_adapter(tmp_path)
    assert str(caught.value).isprintable()


def test_only_known_files_of_a_base_are_copied_and_no_link_leads_out(tmp_path: Path) -> None:
    base, out, secret = tmp_path / "base", tmp_path / "out", tmp_path / "secret"
    base.mkdir()
    out.mkdir()
    secret.write_text("key")
    for name in ("config.json", "tokenizer.json", "modeling_x.py", "LICENSE.md", "LICENSE.py", "notes.txt", "old.bin"):
        (base / name).write_text(name)
    (base / "merges.txt").symlink_to(base / "tokenizer.json")
    assert copy_companions(base, out, set()) == ("LICENSE.py", "modeling_x.py", "notes.txt")
    assert {file.name for file in out.iterdir()} == {"config.json", "tokenizer.json", "LICENSE.md", "merges.txt"}
    assert not (out / "merges.txt").is_symlink()
    (base / "vocab.json").symlink_to(secret)
    with pytest.raises(ModelError, match="vocab.json is a link to .*secret, outside the folder"):
        copy_companions(base, out, set())


def test_a_snapshot_in_the_hubs_cache_is_copied(tmp_path: Path) -> None:
    snapshot, out = tmp_path / "models--own--name" / "snapshots" / "abc", tmp_path / "out"
    for folder in (snapshot, out, tmp_path / "models--own--name" / "blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "models--own--name" / "blobs" / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert copy_companions(snapshot, out, set()) == ()
    assert (out / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("config", "index", "reason"),
    [
        ("[]", None, "holds a list"),
        ("{", None, "not valid JSON"),
        ("{}", "[]", "holds a list"),
        ("{}", '{"weight_map": 3}', "weight_map"),
        ("{}", '{"weight_map": {"a": 3, "b": "x"}}', "weight_map"),
        ("{}", '{"weight_map": {"a": "../secret.safetensors"}}', "lacks ../secret.safetensors"),
        ("[" * 100_000, None, "nested too deeply"),
    ],
)
def test_odd_files_of_a_base_are_named(tmp_path: Path, config: str, index: str | None, reason: str) -> None:
    (tmp_path / "config.json").write_text(config)
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=reason):
        open_base(tmp_path)


@pytest.mark.parametrize(
    ("base", "same"),
    [
        ("some/base", True),
        ("/models/Base", True),
        ("/cache/models--some--base/snapshots/0f3a", True),
        ("./base/", True),
        ("some/other", False),
        ("/models/base-2", False),
    ],
)
def test_another_base_is_noted_with_both_names(tmp_path: Path, base: str, same: bool) -> None:
    write(tmp_path)
    note = other_base_note([AdapterFolder(tmp_path)], base)
    assert note is None if same else note is not None and "trained on some/base" in note and f"with {base}" in note
