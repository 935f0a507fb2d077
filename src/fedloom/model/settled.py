"""A model that stays as it is for a while, so that nobody has to go through all of its modules to find that out.

A trainer asks a model for its parameters, its mode and its gradients several times in every step, and each time torch
goes through every module that there is. PEFT makes them ten for each module that it adapts. In a small model that takes
as long as a tenth of the step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from accelerate import optimizer as accelerated  # type: ignore[import-untyped]
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def set_mode(model: nn.Module, mode: bool) -> None:
    """`model.train(mode)`, without a look at every attribute of every module: that takes as long as a small step.

    Where a module has a way of its own to change its mode, the model is asked to.
    """
    modules = tuple(model.modules())
    if any("train" in vars(module) or _is_asked(module) for module in modules):
        model.train(mode)
        return
    for module in modules:
        vars(module)["training"] = mode


def _is_asked(module: nn.Module) -> bool:
    """Whether a module does more when its mode changes than to note it."""
    kind = type(module)
    if isinstance(module, PreTrainedModel) and kind.train is PreTrainedModel.train:
        return bool(getattr(module, "use_kernels", False))
    return kind.train is not nn.Module.train


@contextmanager
def settle(model: nn.Module) -> Iterator[None]:
    """Have the model in training mode and answer from one look at its parameters, while this lasts.

    No module or parameter may come, go or change its name meanwhile, and no part of the model may change its mode by
    itself. Answers, their order and what calls do are those of nn.Module.
    """
    kind = type(model)
    set_mode(model, True)
    named, all_modules = tuple(model.named_parameters()), tuple(model.modules())

    def modules() -> Iterator[nn.Module]:
        return iter(all_modules)

    def named_parameters(
        prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if prefix or not (recurse and remove_duplicate):
            return kind.named_parameters(model, prefix, recurse, remove_duplicate)
        return iter(named)

    def parameters(recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in named) if recurse else kind.parameters(model, recurse)

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            return kind.zero_grad(model, set_to_none)
        for _, parameter in named:
            parameter.grad = None

    def train(mode: bool = True) -> nn.Module:
        return model if model.training is mode else kind.train(model, mode)

    answers = {answer.__name__: answer for answer in (modules, named_parameters, parameters, zero_grad, train)}
    vars(model).update(answers)  # found before the class's own
    try:
        yield
    finally:
        for name in answers:
            del vars(model)[name]


@contextmanager
def ask_once() -> Iterator[None]:
    """Accelerate looks on the disk for an optimiser's library twice in every step; while this lasts, once in all."""
    known = accelerated.is_lomo_available
    accelerated.is_lomo_available = cache(known)
    try:
        yield
    finally:
        accelerated.is_lomo_available = known


@contextmanager
def keep_use_cache(config: PretrainedConfig) -> Iterator[None]:
    """Have nothing kept for generation while training, and use_cache left as it was.

    The Trainer sets it for a model, also where the configuration has none of its own, but not for the model's parts.
    """
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    before = [vars(part).get("use_cache") for part in parts]
    try:
        for part in parts:
            part.use_cache = False
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            vars(part).pop("use_cache", None)
            if value is not None:
                part.use_cache = value


@contextmanager
def set_older_objects_aside() -> Iterator[None]:
    """While this lasts, collecting garbage looks at new objects alone; the garbage among them is collected at the end.

    Accelerate collects garbage around every training, and the optimiser's state must not outlive it. Going through all
    objects of the libraries each time would take longer than a small model's round.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
