"""PEFT's own merge of adapters, for comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import peft
from transformers import PreTrainedModel

from fedloom.errors import ModelError
from fedloom.model.peft_bridge.attach import undisturbed


def add_weighted(
    base: PreTrainedModel,
    folders: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    combination: str,
    rank: int | None,
) -> None:
    """PEFT's own merge, `add_weighted_adapter`, from folders to a folder; it needs the base model in memory.

    Raises ModelError where PEFT refuses the combination, as "linear" does for unequal ranks. The base is left plain.
    """
    names = [f"adapter{k}" for k in range(len(folders))]
    with undisturbed():
        model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        tuner = cast(peft.LoraModel, model.base_model)
        try:
            tuner.add_weighted_adapter(names, list(weights), "merged", combination, svd_rank=rank)  # type: ignore[arg-type]
            # Else PEFT looks for the base on the Hub, to compare vocabularies.
            model.save_pretrained(str(out), selected_adapters=["merged"], save_embedding_layers=False)
        except ValueError as error:
            raise ModelError(f"PEFT's {combination}: {error}") from None
        finally:
            tuner.unload()
