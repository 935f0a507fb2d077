"""The frozen base model and its tokenizer, from a Hugging Face folder or the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fedloom.errors import ConfigError, ModelError
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.identity import WEIGHTS
from fedloom.model.kinds import choose_class
from fedloom.model.quantized import QUANTIZATIONS, keep_differentiable, quantization_options
from fedloom.model.size import check_config, check_parameters

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_base(
    path: str | Path, dtype: str = "float32", quantization: str = "none", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, frozen and in evaluation mode, and its tokenizer.

    device: "auto" (a GPU where there is one), "cpu" or "cuda"; CUDA_VISIBLE_DEVICES chooses among several GPUs.
    Raises ModelError in one line for a folder that does not hold a whole causal language model.
    """
    where = _device(device)
    options = _options(dtype, quantization, where)
    _check_folder(path)
    check_config(path)
    with raise_in_one_line(ModelError, f"{path} cannot be loaded as a causal language model"):
        check_parameters(path, (tensor.numel() for tensor in _build_empty(path).parameters()), WEIGHTS)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            loader = choose_class(path, AutoConfig.from_pretrained(path, trust_remote_code=False))
            loaded = loader.from_pretrained(
                path, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    model, facts = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    odd = [*facts["missing_keys"], *(key for key, *_ in facts["mismatched_keys"])]
    if odd:
        raise ModelError(f"{path}: the weights of {min(odd)} are missing or of another shape than its config.json says")
    if quantization == "none":
        model.to(where)  # type: ignore[arg-type]
    keep_differentiable(model)
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. Raises ModelError in one line where there is none."""
    with raise_in_one_line(ModelError, f"{path} holds no tokenizer that can be loaded"), quiet_transformers():
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path, trust_remote_code=False))


def empty_base(path: str | Path) -> PreTrainedModel:
    """The model's modules and their shapes, without weights. Raises ModelError where its config.json cannot be read."""
    check_config(path)
    with raise_in_one_line(ModelError, f"{path} holds no config.json of a causal language model"):
        return _build_empty(path)


def _build_empty(path: str | Path) -> PreTrainedModel:
    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = choose_class(path, config).from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        return cast(PreTrainedModel, model)


def _device(device: str) -> torch.device:
    here = torch.cuda.is_available()
    known = {"auto": "cuda" if here else "cpu", "cpu": "cpu", "cuda": "cuda", "cuda:0": "cuda"}
    if re.fullmatch(r"cuda(:\d+)?", device) and not here:
        raise ConfigError(f'model.device is {device!r}, but torch finds no GPU here: use "cpu" or "auto"')
    if device not in known:
        # The Trainer takes the first GPU that it sees.
        number = device.removeprefix("cuda:") if device.startswith("cuda:") else "1"
        raise ConfigError(
            f'model.device {device!r} is unknown: expected "auto", "cpu" or "cuda"; among several GPUs the environment '
            f"variable CUDA_VISIBLE_DEVICES={number} chooses"
        )
    return torch.device(known[device])


def _options(dtype: str, quantization: str, device: torch.device) -> dict[str, Any]:
    for key, value, table in (("dtype", dtype, DTYPES), ("quantization", quantization, QUANTIZATIONS)):
        if value not in table:
            raise ConfigError(f"model.{key} {value!r} is unknown: expected {', '.join(table)}")
    if quantization == "none":
        return {"dtype": DTYPES[dtype]}
    return {"dtype": DTYPES[dtype], **quantization_options(quantization, DTYPES[dtype], device)}


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if not folder.exists():
        if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)):
            return
        raise ModelError(f"no base model at {path}: expected a Hugging Face folder, or a Hub name such as owner/name")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json: expected a Hugging Face model folder")
    if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        raise ModelError(f"{path} holds no weights: expected model.safetensors (or its shards) beside config.json")
    if not any(folder.glob("tokenizer*")):
        raise ModelError(f"{path} holds no tokenizer: expected tokenizer.json beside config.json")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers, whose state is restored afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
