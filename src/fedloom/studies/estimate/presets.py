"""Shapes of the linear modules of well-known models: all that a kernel benchmark needs to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Preset:
    """A model's linear modules: module kind → (m, n) = (out, in) features, the same in every layer.

    rank is the LoRA rank usual in the literature for this model.
    """

    name: str
    layers: int
    modules: Mapping[str, tuple[int, int]]
    rank: int


def _llama(name: str, layers: int, hidden: int, key_value: int, intermediate: int, rank: int) -> Preset:
    """A decoder with grouped-query attention (key_value = key/value heads × head size) and a gated MLP."""
    modules = {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return Preset(name, layers, modules, rank)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _llama("llama-3.2-3b", layers=28, hidden=3072, key_value=1024, intermediate=8192, rank=64),
        _llama("qwen2-7b", layers=28, hidden=3584, key_value=512, intermediate=18944, rank=64),
        _llama("llama-3.2-1b", layers=16, hidden=2048, key_value=512, intermediate=8192, rank=16),
        _llama("tinyllama", layers=22, hidden=2048, key_value=256, intermediate=5632, rank=16),
        _llama("llama-2-7b", layers=32, hidden=4096, key_value=4096, intermediate=11008, rank=64),
        _llama("llama-3.1-70b", layers=80, hidden=8192, key_value=1024, intermediate=28672, rank=16),
    )
}


def preset_named(name: str) -> Preset:
    """The preset of that name. Raises ConfigError that lists the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def preset_shapes(
    preset: Preset, modules: Sequence[str] | None = None, layers: int | None = None
) -> dict[str, tuple[int, int]]:
    """{"layers.0.q_proj": (m, n), …} for the module kinds asked for (all by default) in the first `layers` layers.

    Raises ConfigError for a kind that the model does not have.
    """
    kinds = list(preset.modules) if modules is None else list(modules)
    for kind in kinds:
        if kind not in preset.modules:
            raise ConfigError(f"{preset.name} has no module {kind!r}; it has {', '.join(preset.modules)}")
    count = preset.layers if layers is None else layers
    return {f"layers.{layer}.{kind}": preset.modules[kind] for layer in range(count) for kind in kinds}
