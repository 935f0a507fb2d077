"""What a trainer of somebody else's must be like to be a site's training step; each error says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from transformers import Trainer

from fedloom.adapters.config import REFUSED, WHOLE, refuse_other_kinds
from fedloom.errors import ConfigError, ModelError
from fedloom.model import peft_bridge
from fedloom.model.placement import Placement
from fedloom.rounds.step import Task

if TYPE_CHECKING:
    import peft

ADAPTER = "the trainer's adapter"


def check_trainer(trainer: object) -> str:
    """The name of the adapter that the trainer trains. Raises ConfigError or ModelError where fedloom cannot use it."""
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"patch takes a transformers Trainer (TRL's are such), not a {type(trainer).__name__}")
    slot = peft_bridge.active_slot(trainer.model)
    model = cast("peft.PeftModel", trainer.model)
    settings = {**asdict(model.peft_config[slot]), "peft_type": _kind(model, slot)}
    for table in (REFUSED, WHOLE):
        refuse_other_kinds(ADAPTER, settings, table)
    _check_trainable(model, slot)
    check_gradients(model)
    _check_arguments(trainer)
    _check_instances(trainer)
    if not isinstance(trainer.train_dataset, Sized) or not len(trainer.train_dataset):
        raise ConfigError(
            "the trainer's train_dataset has no length, or no example: a client's share of an average follows from its "
            "number of examples, so that a streamed data set has to be read first"
        )
    return slot


def check_gradients(model: peft.PeftModel) -> None:
    """Raises ModelError where a parameter holds a gradient: it would be part of a round's first step."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            raise ModelError(f"{name} holds a gradient of an earlier backward pass: call trainer.model.zero_grad()")


def check_fits(placed: Mapping[str, Placement], use_rslora: bool, task: Task) -> None:
    """Raises ModelError where the trainer's adapter is on other modules than the run's, or of other rank or alpha."""
    for module in sorted({*task.ranks, *placed} if task.ranks else ()):
        if module not in placed:
            raise ModelError(f"the run trains module {module}, {ADAPTER} does not: add it to target_modules")
        if module not in task.ranks:
            raise ModelError(f"{ADAPTER} trains module {module}, the run does not: take it out of target_modules")
        _check_same(module, "r", placed[module].rank, task.ranks[module])
        _check_same(module, "lora_alpha", placed[module].alpha, task.alphas.get(module, placed[module].alpha))
    if task.alphas and use_rslora != task.use_rslora:
        raise ModelError(f"{ADAPTER} has use_rslora = {use_rslora}, the run has {task.use_rslora}: set both alike")


def _check_same(module: str, key: str, own: float, wanted: float) -> None:
    if own != wanted:
        raise ModelError(f"module {module}: {ADAPTER} has {key} = {own:g}, the run has {wanted:g}; set both alike")


def _kind(model: peft.PeftModel, slot: str) -> str:
    kind = model.peft_config[slot].peft_type
    return str(getattr(kind, "value", kind))


def _check_trainable(model: peft.PeftModel, slot: str) -> None:
    """Raises ModelError for a parameter that would be trained and never sent."""
    ends = tuple(f".lora_{part}.{slot}.weight" for part in "AB")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(ends):
            raise ModelError(
                f"{name} is trainable and is no factor of a LoRA adapter: it would be trained and never sent; call "
                "requires_grad_(False) on it"
            )


def _check_arguments(trainer: Trainer) -> None:
    arguments = trainer.args
    if arguments.fp16:
        raise ConfigError(
            "the trainer trains in fp16, whose loss scaling leaves out steps by chance and starts anew in every round: "
            "use bf16=True, or float32"
        )
    if arguments.world_size > 1 or arguments.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError(
            "the trainer spreads over several devices or processes (torchrun, DeepSpeed, FSDP or DataParallel): "
            "a site trains on one device; set CUDA_VISIBLE_DEVICES"
        )
    if trainer.model_init is not None:
        raise ConfigError("the trainer makes its model anew for each training (model_init): give it the model instead")


def _check_instances(trainer: Trainer) -> None:
    """Raises ConfigError for an optimiser with a state: what was trained before would be in it."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ConfigError(
            "the trainer has an optimiser or scheduler already (optimizers=…, or an earlier training), but each round "
            "begins with fresh ones: give optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4}), or optim and "
            "lr_scheduler_type; after a training set trainer.optimizer = trainer.lr_scheduler = None"
        )
