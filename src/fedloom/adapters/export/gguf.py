"""An adapter as a GGUF file, as llama.cpp reads it: `--lora FILE` beside a GGUF file of the base model.

llama.cpp scales B A of a module by alpha / r, where alpha is one number for the whole file and r is the module's own
rank, from the shape of its B. So unequal ranks need nothing; whatever else an adapter's scales are (alpha patterns,
rsLoRA), B takes up the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.adapters.export.names import architecture_of, load_gguf, name_modules, order_rows
from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.combine import distance_to_sum
from fedloom.adapters.settings import pad_to_rank_one
from fedloom.errors import NumericError
from fedloom.lora.pair import LoraPair

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Type → its name in `gguf.GGMLQuantizationType`."""
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


@dataclass(frozen=True, slots=True)
class Written:
    """One module in the file. rounding: ‖what the type changed‖_F."""

    module: str
    rank: int
    values: int
    rounding: float


def write_gguf(
    adapter: AdapterFolder, config: Mapping[str, Any], base: str, out: Path | None, dtype: torch.dtype
) -> list[Written]:
    """Write the file and return a row a module; with `out` None nothing is written, and all else is done.

    config: config.json of the base model, which `base` names. Raises ModelError for modules and architectures that
    have no place in such a file, NumericError where values are too large for the type.
    """
    lib, names = load_gguf(), name_modules(config, base, adapter.modules)
    alpha = adapter.settings.lora_alpha
    writer = lib.GGUFWriter(out, lib.MODEL_ARCH_NAMES[lib.MODEL_ARCH[architecture_of(config, base).name]])
    writer.add_type(lib.GGUFType.ADAPTER)
    writer.add_string(lib.Keys.Adapter.TYPE, "lora")
    writer.add_float32(lib.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(lib.LlamaFileType[_FILE_TYPES[dtype]])
    if adapter.base_model:
        writer.add_string("general.base_model.0.name", Path(adapter.base_model).name)
        writer.add_uint32("general.base_model.count", 1)
    rows, kind = [], lib.GGMLQuantizationType[TYPES[dtype]]
    for module in adapter.modules:
        pair = pad_to_rank_one(adapter.pair(module))
        stored, rounding = _stored(pair, alpha / pair.rank, dtype, module)
        for end, part in (("lora_a", stored.A), ("lora_b", order_rows(config, base, module, stored.B))):
            writer.add_tensor(f"{names[module]}.{end}", _numpy(part), raw_dtype=kind)
        rows.append(Written(module, pair.rank, pair.A.numel() + pair.B.numel(), rounding))
    if out is not None:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    return rows


def _stored(pair: LoraPair, scale: float, dtype: torch.dtype, module: str) -> tuple[LoraPair, float]:
    """The factors whose product llama.cpp multiplies by `scale`, rounded to a type, and what that changed."""
    stored = LoraPair(pair.A.to(dtype), (pair.B / scale).to(dtype))
    if not all(bool(torch.isfinite(stored.part(part)).all()) for part in "AB"):
        raise NumericError(f"module {module} is too large for {dtype}: use --dtype bf16 or fp32")
    if dtype == torch.float32:
        return stored, 0.0
    meant = LoraPair(stored.A.double(), stored.B.double() * scale)
    return stored, distance_to_sum([LoraPair(pair.A.double(), pair.B.double())], meant)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    """The values; numpy has no bfloat16, whose bytes stand for it."""
    held = tensor.contiguous()
    array: NDArray[Any] = (held.view(torch.uint8) if held.dtype == torch.bfloat16 else held).numpy()
    return array
