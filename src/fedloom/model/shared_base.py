"""One base model under the adapters of several jobs: its weights once in memory, its modules once for every job.

PEFT puts its layers in the place of a model's modules, so that two adapters of other ranks or modules cannot be on the
same modules at once. A copy of the modules, which takes milliseconds, shares the frozen weights with all others.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.model.base import load_base
from fedloom.model.quantized import packed_weights


class LoadBase(Protocol):
    """(path, dtype, quantization, device) → a base model that may be wrapped, and its tokenizer; as `load_base`."""

    def __call__(
        self, path: str, dtype: str, quantization: str, device: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]: ...


class SharedBase:
    """A `LoadBase` that reads a model's files once, for as long as the same model is asked for in the same form."""

    def __init__(self) -> None:
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._form: tuple[str, str, str, str] | None = None

    def __call__(
        self, path: str, dtype: str, quantization: str, device: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The modules of the model, new for every call, around the one set of weights."""
        if not self.holds(path, dtype, quantization, device) or self._loaded is None:
            self.release()  # two sets of weights may be more than the machine has room for
            self._loaded = load_base(path, dtype, quantization, device)
            self._form = path, dtype, quantization, device
        model, tokenizer = self._loaded
        return copy_modules(model), tokenizer

    @property
    def is_loaded(self) -> bool:
        """Whether weights are held."""
        return self._loaded is not None

    def holds(self, path: str, dtype: str, quantization: str, device: str) -> bool:
        """Whether the weights of this model, in this form, are loaded."""
        return self._form == (path, dtype, quantization, device)

    def release(self) -> None:
        """Let go of the weights; who still uses a model around them keeps them."""
        self._loaded = self._form = None


def copy_modules(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with modules, buffers and settings of its own. The parameters are the same objects."""
    known: dict[int, Any] = {id(held): held for held in chain(model.parameters(), packed_weights(model))}
    return copy.deepcopy(model, known)
