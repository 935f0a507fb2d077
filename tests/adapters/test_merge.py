"""Offline merging: identities against dense float64 sums read from the files themselves, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedloom.adapters.merge import folders, output
from fedloom.adapters.merge.combine import Recipe, balance_exactly
from fedloom.adapters.settings import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterSettings, save_adapter
from fedloom.adapters.tensor_file import DTYPES, TensorFile
from fedloom.errors import ConfigError, ModelError, NumericError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.table import build, offline_methods
from fedloom.studies.estimate import machine
from reference import best_rank

OFFLINE = offline_methods()
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SHAPES = {"layers.0.k_proj": (24, 80), "layers.0.up_proj": (96, 80), "layers.1.k_proj": (24, 80)}


def adapter(folder: Path, rank: int, seed: int, modules=SHAPES, **config) -> Path:
    generator = torch.Generator().manual_seed(seed)
    state = {
        module: LoraPair(
            torch.randn(rank, n, generator=generator) / n**0.5, torch.randn(m, rank, generator=generator) * 0.1
        )
        for module, (m, n) in SHAPES.items()
        if module in modules
    }
    save_adapter(LoraState(state), "base", AdapterSettings(**{"r": rank, "lora_alpha": 16, **config}), folder)
    return folder


def several(tmp_path: Path, ranks=RANKS, **config) -> list[Path]:
    return [adapter(tmp_path / f"a{k}", rank, k, **config) for k, rank in enumerate(ranks)]


def change(folder: Path) -> dict[str, torch.Tensor]:
    """Module → scale · B A in float64, from the files alone, as PEFT's documentation defines it."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = load_file(folder / WEIGHTS_FILE)
    found = {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            rank = config["rank_pattern"].get(module, config["r"])
            assert rank == len(a)
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            found[module] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * (b @ a)
    return found


def exact(paths: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    parts = [change(path) for path in paths]
    return {
        module: sum(w / sum(weights) * part[module] for w, part in zip(weights, parts, strict=True) if module in part)
        for module in {module for part in parts for module in part}
    }


def merged(
    paths: list[Path], out: Path, recipe: Recipe, weights: list[float] | None = None
) -> list[folders.MergedModule]:
    out.mkdir(exist_ok=True)
    return list(folders.merge_folders(folders.open_folders(paths, weights or ()), recipe, out))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "recipe", [Recipe("florist", energy=1.0), Recipe("flora"), Recipe("fedex"), Recipe("flexlora", rank=96)]
)
def test_exact_methods_give_the_weighted_sum_at_unequal_ranks(tmp_path: Path, recipe: Recipe, use_rslora: bool) -> None:
    paths = several(tmp_path, use_rslora=use_rslora)
    weights = [float(k + 1) for k in range(len(paths))]
    rows = merged(paths, tmp_path / "out", recipe, weights)
    wanted, found = exact(paths, weights), change(tmp_path / "out")
    assert [row.module for row in rows] == sorted(wanted) == sorted(found)
    for row in rows:
        assert error(found[row.module], wanted[row.module]) < 1e-5
        assert row.rank <= min(SHAPES[row.module])


@pytest.mark.parametrize("method", ["fedex", "florist", "flora"])
def test_exact_methods_at_equal_ranks_and_unequal_alphas(tmp_path: Path, method: str) -> None:
    paths = [adapter(tmp_path / f"a{k}", 4, k, lora_alpha=2.0 + k, alpha_pattern={"up_proj": 3.0}) for k in range(4)]
    for path in paths:  # patterns are regular expressions for the end of a name; here they are spelled out
        config = json.loads((path / CONFIG_FILE).read_text())
        config["alpha_pattern"] = {"layers.0.up_proj": 3.0}
        (path / CONFIG_FILE).write_text(json.dumps(config))
    merged(paths, tmp_path / "out", Recipe(method, energy=1.0 if method == "florist" else None))
    found = change(tmp_path / "out")
    for module, wanted in exact(paths, [1.0] * 4).items():
        assert error(found[module], wanted) < 1e-5


@pytest.mark.parametrize("method", OFFLINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_costs_told_are_those_of_the_files(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    paths = several(tmp_path, ranks=(4, 4, 4))
    rows = merged(paths, tmp_path / "out", Recipe(method, max_rank=3, dtype=dtype), [3, 2, 1])
    uncapped = tmp_path / "uncapped"
    merged(paths, uncapped, Recipe(method), [3, 2, 1])
    wanted, found, whole = exact(paths, [3, 2, 1]), change(tmp_path / "out"), change(uncapped)
    for row in rows:
        costs, module = row.costs, row.module
        best = best_rank(whole[module], 3)
        assert costs.exact == pytest.approx(float(wanted[module].norm()), rel=1e-6)
        assert costs.error == pytest.approx(float((found[module] - wanted[module]).norm()), rel=1e-4)
        assert costs.cap == pytest.approx(float((best - whole[module]).norm()), rel=1e-4)
        assert costs.rounding == pytest.approx(
            float((found[module] - best).norm()) if dtype == torch.bfloat16 else 0.0, rel=1e-3
        )
        assert row.values == 3 * sum(SHAPES[module]) and row.rank == 3


@pytest.mark.parametrize("method", OFFLINE)
def test_the_order_of_adapters_does_not_matter(tmp_path: Path, method: str) -> None:
    paths = several(tmp_path, ranks=(8, 4, 2))
    recipe = Recipe(method)
    merged(paths, tmp_path / "one", recipe, [3.0, 2.0, 1.0])
    merged(paths[::-1], tmp_path / "two", recipe, [1.0, 2.0, 3.0])
    one, two = change(tmp_path / "one"), change(tmp_path / "two")
    for module in SHAPES:
        assert error(one[module], two[module]) < 1e-5


@pytest.mark.parametrize("method", OFFLINE)
def test_one_adapter_alone_returns_itself(tmp_path: Path, method: str) -> None:
    path = adapter(tmp_path / "a", 5, 0, use_rslora=True)
    merged([path], tmp_path / "out", Recipe(method, energy=1.0 if method == "florist" else None))
    mine, found = change(path), change(tmp_path / "out")
    for module in SHAPES:
        assert error(found[module], mine[module]) < 1e-5


@pytest.mark.parametrize("method", OFFLINE)
def test_an_adapter_without_a_module_changes_nothing_there(tmp_path: Path, method: str) -> None:
    whole, part = adapter(tmp_path / "whole", 4, 0), adapter(tmp_path / "part", 4, 1, modules=["layers.0.k_proj"])
    rows = merged([whole, part], tmp_path / "out", Recipe(method, energy=1.0 if method == "florist" else None), [1, 3])
    assert [len(row.ranks) for row in rows] == [2, 1, 1]
    found, mine = change(tmp_path / "out"), change(whole)
    for module in ("layers.0.up_proj", "layers.1.k_proj"):
        assert error(found[module], mine[module] / 4) < 1e-5


def test_adapters_that_cancel_leave_zeros_that_peft_can_hold(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 4, 0), adapter(tmp_path / "two", 4, 0)
    tensors = load_file(two / WEIGHTS_FILE)
    save_file({name: -t if "lora_B" in name else t for name, t in tensors.items()}, two / WEIGHTS_FILE)
    rows = merged([one, two], tmp_path / "out", Recipe("florist"))
    assert {row.rank for row in rows} == {1}
    assert not any(tensor.any() for tensor in change(tmp_path / "out").values())


def test_every_scale_is_one_also_for_readers_of_r_and_alpha_alone(tmp_path: Path) -> None:
    rows = merged(several(tmp_path), tmp_path / "out", Recipe("florist", energy=0.9))
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    ranks = {row.module: row.rank for row in rows}
    assert len(set(ranks.values())) > 1
    assert config["r"] == config["lora_alpha"] == max(ranks.values()) and not config["use_rslora"]
    for module, rank in ranks.items():
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank
    assert config["target_modules"] == ["k_proj", "up_proj"]


def test_modules_are_named_in_full_where_adapters_are_on_some_layers_only(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "a", 4, 0), adapter(tmp_path / "b", 4, 1, modules=["layers.0.k_proj"])]
    merged(paths, tmp_path / "out", Recipe())
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["target_modules"] == sorted(SHAPES)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    paths = several(tmp_path, ranks=(3, 2))
    for name in ("one", "two"):
        merged(paths, tmp_path / name, Recipe())
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_half_precision_survives_small_components_and_refuses_large_ones(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4, 0)
    tensors = load_file(path / WEIGHTS_FILE)
    small = {name: t * (1e-9 if "lora_B" in name else 1e3) for name, t in tensors.items()}  # B alone would be zero
    save_file(small, path / WEIGHTS_FILE)
    rows = merged([path], tmp_path / "out", Recipe("flora", dtype=torch.float16))
    assert all(0 < row.costs.rounding < 1e-3 * row.costs.exact for row in rows)
    save_file({name: t * 1e8 for name, t in tensors.items()}, path / WEIGHTS_FILE)
    with pytest.raises(NumericError, match="layers.0.k_proj is too large.*bf16"):
        merged([path], tmp_path / "out", Recipe("flora", dtype=torch.float16))


def test_balancing_changes_no_bit_of_the_product() -> None:
    pair = LoraPair(torch.randn(3, 7) * 1e-3, torch.randn(5, 3) * 1e4)
    pair.B[:, 1] = 0
    even = balance_exactly(pair)
    assert torch.equal(even.B @ even.A, pair.B @ pair.A)
    sizes = even.A.norm(dim=1) / even.B.norm(dim=0)
    assert 0.5 <= float(sizes[0]) <= 2 and 0.5 <= float(sizes[2]) <= 2


def test_memory_does_not_grow_with_the_number_of_modules(tmp_path: Path) -> None:
    def folder(name: str, count: int) -> Path:
        zeros = LoraPair(torch.randn(16, 4096), torch.randn(4096, 16))
        state = LoraState({f"layers.{k}.q_proj": zeros for k in range(count)})
        save_adapter(state, "base", AdapterSettings(r=16, lora_alpha=32), tmp_path / name)
        return tmp_path / name

    def extra(path: Path) -> int | None:
        inputs = folders.open_folders([path] * 4)
        return machine.extra_bytes(
            lambda: merged([a.folder for a in inputs.adapters], tmp_path / "out", Recipe("fedit"))
        )

    few, many = folder("few", 4), folder("many", 64)
    extra(few)  # loads code
    least, most = extra(few), extra(many)
    if least is None or most is None:
        pytest.skip("this system does not tell a process's peak memory")
    size = (many / WEIGHTS_FILE).stat().st_size  # one of the four; an allocator's own growth is a sixth of it
    assert most < least + size / 2, f"{least} bytes for 4 modules, {most} for 64; each adapter has {size}"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_B.weight": torch.full((24, 4), math.nan)},
            "k_proj.lora_B.*NaN",
        ),
        (
            lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_A.weight": torch.full((4, 80), math.inf)},
            "k_proj.lora_A.*NaN",
        ),
        (lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_A.weight": torch.zeros(5, 80)}, "k_proj.*not make a LoRA pair"),
        (lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_A.weight": torch.zeros(4)}, "k_proj.*not make a LoRA pair"),
        (
            lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_A.weight": torch.zeros(4, 81)},
            "k_proj.*different base models",
        ),
        (lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_magnitude_vector": torch.ones(24)}, "magnitude_vector.*DoRA"),
        (lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_A.default.weight": torch.ones(4, 80)}, "holds both.*k_proj"),
        (lambda t: {**t, f"{PREFIX}layers.0.k_proj.lora_embedding_A": torch.ones(4, 80)}, "holds both.*k_proj"),
        (lambda t: {**t, "layers.0.weight": torch.ones(2)}, "layers.0.weight"),
        (lambda t: {**t, f"{PREFIX}lm_head.weight": torch.ones(2, 2)}, "differ in the whole tensor.*lm_head"),
    ],
)
def test_hostile_tensors_are_refused_by_file_and_name(tmp_path: Path, damage, reason: str) -> None:
    paths = several(tmp_path, ranks=(4, 4))
    save_file(damage(load_file(paths[1] / WEIGHTS_FILE)), paths[1] / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=reason) as caught:
        merged(paths, tmp_path / "out", Recipe())
    assert str(paths[1]) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias of its own"),
        ("bias", "all", "bias is None in .*, 'all' in"),
        ("modules_to_save", ["lm_head"], "modules_to_save is None in"),
        ("trainable_token_indices", [3], "trainable_token_indices is None"),
        ("init_lora_weights", "pissa", "weights of the base"),
        ("kasa_config", {"beta": 1.0}, "KaSA"),
        ("peft_type", "LOHA", "only LoRA"),
        ("r", 3, "belong together"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused(tmp_path: Path, key: str, value: object, reason: str) -> None:
    paths = several(tmp_path, ranks=(4, 4))
    config = json.loads((paths[1] / CONFIG_FILE).read_text())
    (paths[1] / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=reason) as caught:
        folders.open_folders(paths)
    assert str(paths[1]) in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4, 0)
    data = (path / WEIGHTS_FILE).read_bytes()
    (path / WEIGHTS_FILE).write_bytes(data[:-1])
    with pytest.raises(ModelError, match=f"{WEIGHTS_FILE} cannot be read"):
        folders.open_folders([path])
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (path / file).unlink()
        with pytest.raises(ModelError, match=f"no {file}"):
            folders.open_folders([path])
    with pytest.raises(ModelError, match="is not a folder"):
        folders.open_folders([tmp_path / "nowhere"])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, math.nan], [math.inf, 1.0]])
def test_weights_must_be_positive_and_one_an_adapter(tmp_path: Path, weights: list[float]) -> None:
    paths = several(tmp_path, ranks=(2, 2))
    with pytest.raises(ConfigError, match="--weights.*2 numbers above 0"):
        folders.open_folders(paths, weights)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"method": "fedsrd"}, "fedsrd is unknown, or its server step"),
        ({"method": "flora", "rank": 4}, "--rank belongs to flexlora"),
        ({"method": "flexlora", "energy": 0.9}, "--energy belongs to florist"),
        ({"energy": 1.5}, "--energy is 1.5"),
        ({"energy": 0.0}, "--energy is 0.0"),
        ({"max_rank": 0}, "--max-rank is 0"),
    ],
)
def test_senseless_recipes_are_refused(arguments: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Recipe(**arguments)


def test_a_method_that_needs_equal_ranks_says_so(tmp_path: Path, monkeypatch) -> None:
    plain = build("fedit")
    equal = replace(plain, facts=replace(plain.facts, unequal_ranks=False))
    monkeypatch.setattr("fedloom.adapters.merge.combine.build", lambda *given: equal)
    with pytest.raises(ConfigError, match=r"equal rank, and module layers.0.k_proj has ranks 4, 2; use florist"):
        merged(several(tmp_path, ranks=(4, 2)), tmp_path / "out", Recipe("fedit"))


def test_output_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), output.replace_whole(out) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []
    for text in ("one", "two"):
        with output.replace_whole(out) as folder:
            (folder / CONFIG_FILE).write_text(text)
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert (out / CONFIG_FILE).read_text() == "two"


def test_what_stands_in_the_way_is_kept(tmp_path: Path) -> None:
    adapter(tmp_path / "a", 2, 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    for free in ("empty", "new"):
        output.check_free(tmp_path / free, [tmp_path / "a"], force=False)
    output.check_free(tmp_path / "a", [tmp_path / "b"], force=True)
    for out, inputs, force, reason in (
        ("a", ["b"], False, "--force"),
        ("a", ["a"], True, "one of the folders to be merged"),
        ("a", ["a/inner"], True, "holds one of the folders to be merged"),
        ("thesis", ["a"], True, "neither an adapter nor a model"),
    ):
        with pytest.raises(ConfigError, match=reason):
            output.check_free(tmp_path / out, [tmp_path / name for name in inputs], force=force)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES, key=str)), st.lists(st.integers(0, 4), max_size=3)), max_size=5)
)
def test_a_tensor_file_is_what_safetensors_reads(tmp_path_factory, kinds) -> None:
    kinds = sorted(kinds, key=lambda kind: -kind[0].itemsize)
    path = tmp_path_factory.mktemp("tensors") / "file"
    tensors = {f't{k} \n"ä': torch.randint(0, 2, size).to(dtype) for k, (dtype, size) in enumerate(kinds)}
    with TensorFile(path, tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].double(), tensor.double())
    starts = [json.loads(path.read_bytes()[8:].partition(b"   ")[0])[name]["data_offsets"] for name in tensors]
    assert all(first[1] == second[0] for first, second in pairwise(starts))


def test_a_tensor_file_keeps_to_what_was_announced(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="b is not the tensor announced"),
        TensorFile(tmp_path / "f", ["a", "b"]) as file,
    ):
        file.add("b", torch.ones(1))
    with pytest.raises(ValueError, match="lacks b"), TensorFile(tmp_path / "f", ["a", "b"]) as file:
        file.add("a", torch.ones(1))
