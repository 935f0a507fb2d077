"""The bridge is held to a dense twin: the base model with B A added to its weights, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.settings import AdapterSettings
from fedloom.errors import ConfigError, ModelError, ShapeError
from fedloom.lora.pair import LoraPair, LoraState, digest, stack
from fedloom.model import peft_bridge
from fedloom.model.peft_bridge.layers import LoraLayer  # by way of fedloom, which keeps its imports quiet
from tiny_models import MODELS, llama, placed

NARROW = {"llama": "k_proj", "qwen2": "k_proj", "mistral": "k_proj", "gpt2": "c_attn"}
IDS = torch.arange(4, 28).view(2, 12)


def random_state(shapes: dict[str, tuple[int, int]], ranks: dict[str, int], seed: int = 0) -> LoraState:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.2

    return LoraState({name: LoraPair(draw(ranks[name], n), draw(m, ranks[name])) for name, (m, n) in shapes.items()})


def dense_logits(model: torch.nn.Module, *states: LoraState) -> torch.Tensor:
    """Logits of the base with every state's B A added to its weights, in float64."""
    twin = copy.deepcopy(model).double()
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for state in states:
            for name, pair in state.items():
                change = pair.B.double() @ pair.A.double()
                modules[name].weight += change.T if isinstance(modules[name], Conv1D) else change
        return twin(IDS).logits


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def resident(**lora: object) -> tuple[torch.nn.Module, dict[str, tuple[int, int]]]:
    """A Llama with an adapter, and the shapes of the modules that have one."""
    base = llama()
    adapter = placed(base, **lora)
    return peft_bridge.attach(base, adapter), adapter.shapes


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("use_rslora", [False, True])
def test_model_in_use_is_base_plus_frozen_plus_trained(name: str, use_rslora: bool) -> None:
    base, plain = MODELS[name](), MODELS[name]()
    patterns = {"rank_pattern": {NARROW[name]: 3}, "alpha_pattern": {NARROW[name]: 5.0}}
    adapter = placed(base, r=4, lora_alpha=8, use_rslora=use_rslora, **patterns)
    shapes, ranks = adapter.shapes, adapter.ranks
    assert set(ranks.values()) == {3, 4}
    model = peft_bridge.attach(base, adapter)
    torch.testing.assert_close(logits(model), dense_logits(plain), atol=2e-6, rtol=0)
    trained = random_state(shapes, ranks)
    frozen = random_state(dict(list(shapes.items())[::2]), {module: 1 + i for i, module in enumerate(shapes)}, seed=1)
    peft_bridge.write_adapter(model, trained)
    alone = logits(model)
    torch.testing.assert_close(alone, dense_logits(plain, trained), atol=5e-6, rtol=0)
    peft_bridge.set_frozen(model, frozen)
    torch.testing.assert_close(logits(model), dense_logits(plain, trained, frozen), atol=5e-6, rtol=0)
    assert (logits(model) - alone).abs().max() > 1e-2
    peft_bridge.set_frozen(model, None)
    assert torch.equal(logits(model), alone)


def test_frozen_increments_of_other_ranks_replace_the_first_ones() -> None:
    plain = llama()
    shapes = placed(plain, r=2).shapes
    model = peft_bridge.attach(llama(), placed(plain, r=2))
    for rank in (5, 2, 5):
        frozen = random_state(shapes, dict.fromkeys(shapes, rank), seed=rank)
        peft_bridge.set_frozen(model, frozen)
        peft_bridge.write_adapter(model, random_state(shapes, dict.fromkeys(shapes, 2)))
        total = stack([random_state(shapes, dict.fromkeys(shapes, 2)), frozen])
        torch.testing.assert_close(logits(model), dense_logits(plain, total), atol=5e-6, rtol=0)


def test_shapes_are_out_and_in_features(name: str) -> None:
    base = MODELS[name]()
    adapter = placed(base, target_modules=["c_fc", "c_attn"] if name == "gpt2" else ["k_proj", "down_proj"])
    expected = {
        "gpt2": {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.0.mlp.c_fc": (128, 32)},
    }.get(name, {"model.layers.0.self_attn.k_proj": (16, 32), "model.layers.0.mlp.down_proj": (32, 48)})
    found = adapter.shapes
    assert {module: shape for module, shape in found.items() if ".0." in module} == expected
    assert len(found) == 4
    assert peft_bridge.read_adapter(peft_bridge.attach(base, adapter)).shapes() == found


def test_read_after_write_gives_the_same_bits_and_keeps_the_parameters(name: str) -> None:
    base = MODELS[name]()
    adapter = placed(base, r=4, lora_alpha=8)
    model, shapes = peft_bridge.attach(base, adapter), adapter.shapes
    before = [parameter.data_ptr() for parameter in model.parameters()]
    state = random_state(shapes, dict.fromkeys(shapes, 4))
    peft_bridge.write_adapter(model, state)
    assert digest(peft_bridge.read_adapter(model)) == digest(state)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    read = peft_bridge.read_adapter(model)
    peft_bridge.write_adapter(model, random_state(shapes, dict.fromkeys(shapes, 4), seed=1))
    assert digest(read) == digest(state), "what was read is a copy"


def test_any_rank_can_be_written_and_keeps_alpha() -> None:
    model, shapes = resident(r=4, lora_alpha=8)
    for rank in (2, 0, 8, 4):
        state = random_state(shapes, dict.fromkeys(shapes, rank), seed=rank)
        peft_bridge.write_adapter(model, state)
        assert digest(peft_bridge.read_adapter(model)) == digest(state)
        torch.testing.assert_close(logits(model), dense_logits(llama(), state), atol=5e-6, rtol=0)
    peft_bridge.configure(model, placed(llama(), r=3, lora_alpha=7, use_rslora=True, lora_dropout=0.5))
    state = random_state(shapes, dict.fromkeys(shapes, 3))
    peft_bridge.write_adapter(model, state)
    for (module,), layer in ((held.names, held.layer) for held in peft_bridge.lora_layers(model)):
        assert layer.scaling["default"] == 7 / 3**0.5
        assert layer.lora_dropout["default"].p == 0.5
        torch.testing.assert_close(layer.lora_B["default"].weight * 7 / 3**0.5, state[module].B)
    for module, pair in peft_bridge.read_adapter(model).items():
        torch.testing.assert_close(pair.B, state[module].B, rtol=2e-7, atol=0)


def test_a_penalty_reaches_the_parameters() -> None:
    model, shapes = resident(r=2, lora_alpha=6, target_modules=["q_proj"])
    peft_bridge.write_adapter(model, random_state(shapes, dict.fromkeys(shapes, 2)))
    sum(pair.B.square().sum() for pair in peft_bridge.live_adapter(model).values()).backward()
    for layer in (held.layer for held in peft_bridge.lora_layers(model)):
        up = layer.lora_B["default"].weight
        torch.testing.assert_close(up.grad, 2 * 3.0**2 * up.detach())
        assert layer.lora_A["default"].weight.grad is None


def test_only_the_chosen_factors_are_trainable() -> None:
    model, shapes = resident(r=2)
    peft_bridge.set_frozen(model, random_state(shapes, dict.fromkeys(shapes, 2)))
    for parts in (("A",), ("B",), ("A", "B"), ()):
        peft_bridge.set_trainable(model, parts)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(names) == 14 * len(parts)
        assert all(any(f"lora_{part}.default." in name for part in parts) for name in names)


def test_adapters_of_a_coarse_base_are_float32() -> None:
    base = llama().bfloat16()
    adapter = placed(base, r=2, lora_alpha=4)
    model = peft_bridge.attach(base, adapter)
    state = random_state(adapter.shapes, adapter.ranks)
    peft_bridge.write_adapter(model, state)
    peft_bridge.set_frozen(model, state)
    assert digest(peft_bridge.read_adapter(model)) == digest(state)
    kinds = {(name.split(".lora_")[-1], weight.dtype) for name, weight in model.named_parameters() if "lora" in name}
    assert kinds == {
        (f"{part}.{slot}.weight", torch.float32) for part in "AB" for slot in ("default", peft_bridge.FROZEN)
    }
    assert logits(model).isfinite().all()


def test_attaching_leaves_the_random_state_alone() -> None:
    base = llama()
    before = torch.get_rng_state()
    adapter = placed(base, r=2)
    model = peft_bridge.attach(base, adapter)
    peft_bridge.set_frozen(model, random_state(adapter.shapes, adapter.ranks))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"adapter\.r is 0"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"lora_alpha": 0.0}, "alpha"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterSettings(**{"r": 4, "lora_alpha": 8, **settings})


def test_an_adapter_of_another_model_is_refused() -> None:
    model, shapes = resident(r=2)
    short, two = dict(list(shapes.items())[:-1]), dict.fromkeys(shapes, 2)
    with pytest.raises(ShapeError, match=f"the adapter lacks module {set(shapes).difference(short).pop()}"):
        peft_bridge.write_adapter(model, random_state(short, two))
    with pytest.raises(ShapeError, match="the model lacks module other"):
        peft_bridge.write_adapter(model, random_state({**shapes, "other": (3, 4)}, {**two, "other": 2}))
    wide = {**shapes, "model.layers.1.self_attn.q_proj": (64, 32)}
    for slot in (peft_bridge.write_adapter, peft_bridge.set_frozen):
        with pytest.raises(ShapeError, match=r"layers\.1\.self_attn\.q_proj.*\(64, 32\).*\(32, 32\)"):
            slot(model, random_state(wide, two))
    with pytest.raises(ShapeError, match="no adapter on other"):
        peft_bridge.set_frozen(model, random_state({"other": (3, 4)}, {"other": 2}))
    with pytest.raises(ModelError, match="already carries an adapter"):
        peft_bridge.attach(model, placed(llama(), r=2))


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_in_the_order_of_all_modules(name: str) -> None:
    base = MODELS[name]()
    adapter = placed(base, r=4)
    model, state = peft_bridge.attach(base, adapter), random_state(adapter.shapes, adapter.ranks)
    for _ in range(2):
        whole = model.get_base_model().named_modules()
        paths = [path for path, module in whole if isinstance(module, LoraLayer)]
        assert [held.names for held in peft_bridge.lora_layers(model)] == [(path,) for path in paths]
        peft_bridge.set_frozen(model, random_state(state.shapes(), dict.fromkeys(state, 2)))  # a second slot


def test_what_is_read_is_nobody_elses() -> None:
    """B times the scale is new memory, and A is copied: training goes on in the model, not in what was read."""
    model, shapes = resident()
    peft_bridge.write_adapter(model, random_state(shapes, dict.fromkeys(shapes, 4)))
    read = peft_bridge.read_adapter(model)
    before = digest(read)
    for parameter in model.parameters():
        parameter.data.fill_(9.0)
    assert digest(read) == before
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in read.tensors().values())


def test_a_layer_keeps_its_dropout_unless_it_changes() -> None:
    base = MODELS["llama"]()
    adapter = placed(base, r=4)
    model = peft_bridge.attach(base, adapter)

    def dropouts() -> list[torch.nn.Module]:
        return [held.layer.lora_dropout[peft_bridge.TRAINED] for held in peft_bridge.lora_layers(model)]

    first = dropouts()
    peft_bridge.configure(model, adapter)
    assert all(one is other for one, other in zip(dropouts(), first, strict=True))
    for rate, kind in ((0.25, torch.nn.Dropout), (0.5, torch.nn.Dropout), (0.0, torch.nn.Identity)):
        peft_bridge.configure(model, placed(MODELS["llama"](), r=4, lora_dropout=rate))
        assert all(type(one) is kind and getattr(one, "p", 0.0) == rate for one in dropouts())
