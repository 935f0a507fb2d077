"""What vLLM expects of a LoRA folder, and a folder that meets it.

vLLM reads `r`, `lora_alpha`, `use_rslora`, `bias`, `modules_to_save` and `use_dora` of adapter_config.json, and applies
one scale to all modules: patterns of ranks and alphas are passed over without a word. Its server makes room for one
largest rank, which is one of a few numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fedloom.adapters.export.source import ranks_of, require_linear
from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.combine import distance_to_sum
from fedloom.adapters.settings import AdapterSettings, save_adapter
from fedloom.errors import ModelError, NumericError
from fedloom.lora.pair import LoraPair, LoraState

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be, from 8 on; 16 if left out."""


def server_rank(rank: int) -> int:
    """The least `--max-lora-rank` that takes adapters of a rank. Raises ModelError beyond the largest."""
    fits = next((most for most in MAX_LORA_RANKS if most >= rank), None)
    if fits is None:
        raise ModelError(
            f"the adapter has rank {rank}, and vLLM takes {MAX_LORA_RANKS[-1]} at most: cut it with "
            f"--max-rank {MAX_LORA_RANKS[-1]}, or use --to merged"
        )
    return fits


def describe_fit(adapter: AdapterFolder) -> list[str]:
    """What is changed in a copy for vLLM, in words; empty where the folder suits as it is.

    Raises ModelError for what vLLM cannot take at all.
    """
    require_linear(adapter, "vLLM")
    settings, ranks = adapter.settings, ranks_of(adapter, adapter.modules)
    most = max(ranks.values())
    server_rank(most)
    found = []
    if len(set(ranks.values())) > 1:
        found.append(f"ranks {min(ranks.values())} to {most} are filled up with zeros to {most}: vLLM reads one rank")
    scales = {settings.scale(module) for module in adapter.modules}
    whole = AdapterSettings(settings.r, settings.lora_alpha, use_rslora=settings.use_rslora).scale("")
    if scales != {whole}:
        found.append("scales that differ between modules are folded into B: vLLM reads one lora_alpha")
    elif settings.alpha_pattern or settings.rank_pattern:
        found.append("patterns, which vLLM does not read, are gone")
    return found


def suiting_pairs(adapter: AdapterFolder, dtype: torch.dtype) -> tuple[LoraState, dict[str, float]]:
    """Every module at the largest rank, scale folded into B; and module → ‖what rounding to the type changed‖_F."""
    most = max(ranks_of(adapter, adapter.modules).values())
    pairs, rounding = {}, {}
    for module in adapter.modules:
        pair = adapter.pair(module)
        missing = most - pair.rank
        whole = LoraPair(
            torch.cat([pair.A, pair.A.new_zeros(missing, pair.A.shape[1])]),
            torch.cat([pair.B, pair.B.new_zeros(pair.B.shape[0], missing)], dim=1),
        )
        rounded = LoraPair(whole.A.to(dtype).float(), whole.B.to(dtype).float())
        if not all(bool(torch.isfinite(rounded.part(part)).all()) for part in "AB"):
            raise NumericError(f"module {module} is too large for {dtype}: use --dtype bf16 or fp32")
        pairs[module] = rounded
        rounding[module] = 0.0 if dtype == torch.float32 else distance_to_sum([whole], rounded)
    return LoraState(pairs), rounding


def write_suiting(adapter: AdapterFolder, pairs: LoraState, out: Path, dtype: torch.dtype) -> None:
    """Write the folder: one rank, the same number as alpha, so that the scale is 1."""
    (most,) = set(pairs.ranks().values())
    settings = AdapterSettings(most, most, target_modules=adapter.settings.target_modules)
    save_adapter(pairs, adapter.base_model, settings, out, dtype, adapter.base_digest)
