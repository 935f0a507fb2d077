"""A transformers Trainer of somebody else (TRL's are such) as a site's training step.

    step = patch(trainer)              # (state, round, seed) → Trained, as `rounds.step.Train` says

Adapter in, the steps of this round, adapter out. Optimiser, collator, callbacks, packing, quantised base and learning
rate are the trainer's own. Nothing of it is subclassed: what a round changes is set on the instance, and put back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from fedloom.errors import ConfigError
from fedloom.lora.pair import PARTS, LoraPair, LoraState, stack, subset
from fedloom.methods.method import State
from fedloom.model import peft_bridge
from fedloom.model.settled import keep_use_cache, set_older_objects_aside
from fedloom.model.trainer_checks import check_fits, check_gradients, check_trainer
from fedloom.model.training import keep_random_state
from fedloom.records.sections.training import count_steps
from fedloom.rounds.step import Task, Train, Trained

if TYPE_CHECKING:
    import peft


def patch(trainer: Trainer) -> PatchedTrainer:
    """The trainer as a client's training step, for `fedloom.run(trainers=…)`, `Federation.round` and `serve_site`.

    trainer.model is a PeftModel with one LoRA adapter, whatever its name. A round's optimiser is fresh; the learning
    rate goes on along its schedule, over all rounds. The factors are held in float32 from now on.
    Raises ConfigError or ModelError for a trainer that cannot be used, with what to do about it.
    """
    return PatchedTrainer(trainer)


class PatchedTrainer:
    """A trainer as a training step. `for_task` gives the step of one run; called as it is, it trains A and B.

    model: the trainer's. num_examples: rows of its train_dataset, which are sequences where examples are packed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.slot = check_trainer(trainer)
        self.trainer = trainer
        self.model = cast("peft.PeftModel", trainer.model)
        peft_bridge.widen_factors(self.model, self.slot)
        self.placed = peft_bridge.placements(self.model, self.slot)
        self.use_rslora = peft_bridge.uses_rslora(self.model, self.slot)

    @property
    def num_examples(self) -> int:
        """What the client counts for."""
        return len(cast(Sized, self.trainer.train_dataset))

    @property
    def base_folder(self) -> Path | None:
        """The folder that the base model was loaded from; None where it came from elsewhere, or nobody knows."""
        path = self.model.peft_config[self.slot].base_model_name_or_path
        return Path(path) if path and Path(path).is_dir() else None

    def count_steps(self, task: Task) -> int:
        """Optimiser steps of a round: as many as the run asks for, else as the trainer's own max_steps says."""
        arguments = self.trainer.args
        if task.epochs:
            batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
            return count_steps(task.epochs, self.num_examples, batch, accumulation)
        return int(task.steps or arguments.max_steps)

    def count_drawn(self, task: Task) -> int:
        """How many rows a round draws."""
        arguments = self.trainer.args
        drawn = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        return self.count_steps(task) * int(drawn)

    def for_task(self, task: Task) -> Train:
        """The training step of one run. Raises ModelError where its modules, ranks or alphas are not the adapter's."""
        check_fits(self.placed, self.use_rslora, task)

        def step(state: State, round: int, seed: int) -> Trained:
            return self.train(task, state, round, seed)

        return step

    def __call__(self, state: State, round: int, seed: int) -> Trained:
        return self.train(Task(), state, round, seed)

    def train(self, task: Task, state: State, round: int, seed: int) -> Trained:
        """One round's training. Same arguments, same bytes, as far as the trainer's own parts keep to the seed."""
        begun = time.perf_counter()
        method, before = task.method, subset(state.adapter, self.placed)
        core = method.core(state) if method else LoraState()
        parts = method.trainable(round) if method else PARTS
        self.write(before, state)
        peft_bridge.set_trainable(self.model, () if core else parts, self.slot)
        with ExitStack() as core_changes:
            core_changes.callback(peft_bridge.set_trainable, self.model, PARTS, self.slot)
            core_changes.enter_context(peft_bridge.training_core(self.model, core, self.slot))
            with ExitStack() as changes:
                changes.enter_context(set_older_objects_aside())
                changes.enter_context(keep_random_state())
                changes.enter_context(_settings_of_round(self.trainer, task, self.count_steps(task), round, seed))
                penalty = changes.enter_context(self.add_penalty(task, before))
                outcome = self.trainer.train()
            # Only now: up to here there were the optimiser's tensors too.
            after = peft_bridge.read_adapter(self.model, self.slot)
        steps = outcome.global_step
        loss = outcome.training_loss - penalty.total / max(steps, 1)
        changed = ("A",) if core else parts
        kept = {module: _take_parts(before[module], pair, changed) for module, pair in after.items()}
        return Trained(LoraState(kept), self.num_examples, loss, steps, time.perf_counter() - begun)

    def write(self, trained: LoraState, state: State) -> None:
        """The client's state into the model: its adapter, and beside it what it holds and does not train."""
        check_gradients(self.model)
        others = LoraState({module: pair for module, pair in state.adapter.items() if module not in self.placed})
        fixed = stack([state.fixed, others])
        peft_bridge.write_adapter(self.model, trained, self.slot)
        peft_bridge.add_layers(self.model, fixed.shapes())
        peft_bridge.set_frozen(self.model, fixed, self.slot)

    @contextmanager
    def add_penalty(self, task: Task, before: LoraState) -> Iterator[_Penalty]:
        """While it lasts, the method's penalty is part of the trainer's loss."""
        held = _Penalty(self.trainer)
        penalty = task.method.penalty if task.method else None
        if penalty is None:
            yield held
            return
        held.value = lambda: penalty(before, peft_bridge.live_adapter(self.model, self.slot))
        with _replace(self.trainer, {"compute_loss": held.wrap(self.trainer.compute_loss)}):
            yield held


class _Penalty:
    """What a method adds to the loss of a step, and the sum of it over a round."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.value: Callable[[], Tensor] = lambda: torch.zeros(())
        self.sum: Tensor | float = 0.0

    @property
    def total(self) -> float:
        return float(self.sum)

    def wrap(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def with_penalty(
            model: torch.nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:  # noqa: ANN401
            found = compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not model.training:  # a score of the trainer's own evaluation
                return found
            added, parts = self.value(), self.trainer.current_gradient_accumulation_steps
            self.sum += added.detach() / parts
            # A loss that is not scaled by the tokens of the whole step is divided by its parts after this.
            share = added / parts if self._scaled(num_items_in_batch) else added
            return (found[0] + share, found[1]) if return_outputs else found + share

        return with_penalty

    def _scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        counted = self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.trainer.compute_loss_func is not None


class _Interrupt(TrainerCallback):
    """Asks before every forward pass whether to go on; what is raised ends the training."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self.ask = ask

    def _before_pass(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.ask()

    on_step_begin = _before_pass
    on_substep_end = _before_pass  # between the parts of a step


@contextmanager
def _settings_of_round(trainer: Trainer, task: Task, steps: int, round: int, seed: int) -> Iterator[None]:
    """The trainer as this round needs it; afterwards as it was.

    Nothing is saved: the site keeps its state itself, and "checkpoint-10" of one round would be that of the next.
    """
    arguments, model = trainer.args, cast("peft.PeftModel", trainer.model)
    if steps < 1:
        raise ConfigError("nobody says how many steps a round has: set max_steps in the trainer's arguments")
    own: dict[str, object] = {"max_steps": steps, "seed": seed % 2**32, "data_seed": None}
    own |= {"save_strategy": type(arguments.save_strategy)("no"), "load_best_model_at_end": False}
    schedule = _schedule_over_rounds(trainer, task.num_rounds, round, steps)
    with ExitStack() as changes:
        changes.enter_context(_replace(arguments, own))
        changes.enter_context(_replace(trainer.accelerator.dataloader_config, {"data_seed": None}))
        changes.enter_context(_replace(trainer, {"create_scheduler": schedule}))
        changes.enter_context(_unwrapped(trainer, model))
        if task.interrupt is not None:
            callback = _Interrupt(task.interrupt)
            trainer.add_callback(callback)
            changes.callback(trainer.remove_callback, callback)
        set_seed(seed % 2**32)
        yield


@contextmanager
def _unwrapped(trainer: Trainer, model: peft.PeftModel) -> Iterator[None]:
    """Afterwards without the optimiser, and without the cast that accelerate wraps around a model for good."""
    mode = model.training
    with (
        keep_use_cache(model.config),
        _replace(trainer, {"model_wrapped": trainer.model_wrapped, "is_in_train": False}),
    ):
        before = dict(vars(model))
        try:
            yield
        finally:
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(model).pop(name, None)
                if name in before:
                    vars(model)[name] = before[name]
            if (noise := getattr(trainer, "neftune_hook_handle", None)) is not None:
                noise.remove()  # a training that was ended leaves it on
            model.zero_grad()
            model.train(mode)
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.accelerator.free_memory()


def _schedule_over_rounds(trainer: Trainer, num_rounds: int, round: int, steps: int) -> Callable[..., LRScheduler]:
    """The trainer's create_scheduler, for all steps of all rounds, gone on to the first step of this one."""
    create = trainer.create_scheduler
    kind = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))

    def create_scheduler(num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if not num_rounds and kind != "constant":
            raise ConfigError(
                f"lr_scheduler_type {kind!r} runs over all rounds, and nobody says how many there are: give "
                'Job(num_rounds=…), or set lr_scheduler_type="constant"'
            )
        scheduler = create(max(num_rounds, 1) * steps, optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise ConfigError(
                f"lr_scheduler_type {kind!r} cannot go on from one round to the next, since its rate is no function of "
                "the step: use linear, cosine, constant or another such one"
            )
        _go_to(scheduler, (round - 1) * steps)
        return scheduler

    return create_scheduler


def _go_to(scheduler: LambdaLR, step: int) -> None:
    """Have the scheduler at a step at once: taking the steps before it would need as long as there are."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch, scheduler._last_lr = step, rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def _replace(thing: object, values: Mapping[str, object]) -> Iterator[None]:
    """Set attributes of this one object; afterwards they are as they were, or not there."""
    before = {name: vars(thing)[name] for name in values if name in vars(thing)}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(thing, name, before[name])
            else:
                vars(thing).pop(name, None)


def _take_parts(before: LoraPair, after: LoraPair, parts: tuple[str, ...]) -> LoraPair:
    return LoraPair(*((after if part in parts else before).part(part) for part in PARTS))
