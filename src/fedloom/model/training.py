"""One client's local training in one round, by transformers.Trainer on the one resident model.

What comes out depends on the arguments alone: the optimiser is fresh, every random draw follows from the seed, and the
process's own random state is left as it was found.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from fedloom.errors import ConfigError
from fedloom.lora.pair import PARTS, LoraPair, LoraState
from fedloom.model import peft_bridge
from fedloom.model.base import quiet_transformers
from fedloom.model.head import learnt_alone, narrow_head
from fedloom.model.packing import collator, training_rows, without_mask
from fedloom.model.private import PrivateRound, fit_privately
from fedloom.model.settled import ask_once, keep_use_cache, set_mode, set_older_objects_aside, settle
from fedloom.model.tokens import TokenizedExamples
from fedloom.records.config import TrainingSettings
from fedloom.records.text import to_printable

if TYPE_CHECKING:
    import peft

Penalty = Callable[[LoraState, LoraState], Tensor]
SHORT_ROWS = 128
"""Tokens of a batch's rows up to which plain products are the faster attention in bfloat16 on a CPU."""


@dataclass(frozen=True, slots=True)
class TrainStats:
    """What one local training was.

    loss: mean over the completion tokens of a step, then over steps, without any penalty. examples: those that the
    client holds. tokens: those that were trained on, prompts included, padding not. seconds: the whole call.
    """

    loss: float
    steps: int
    examples: int
    tokens: int
    seconds: float


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the rounds that are over → factor of the learning rate."""


def rate_at(settings: TrainingSettings, round: int, num_rounds: int, step: int) -> float:
    """Learning rate of a step (from 0) of a round (from 1).

    It falls from round to round along lr_scheduler_type and is the same within a round, but for the first warmup_steps
    (or the share warmup_ratio of all steps of all rounds), in which it rises.
    """
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * num_rounds * settings.steps)
    rising = ((round - 1) * settings.steps + step + 1) / warmup if warmup else 1.0
    return settings.learning_rate * SCHEDULES[settings.lr_scheduler_type]((round - 1) / num_rounds) * min(1.0, rising)


def local_update(
    model: peft.PeftModel,
    state: LoraState,
    frozen: LoraState,
    data: TokenizedExamples,
    settings: TrainingSettings,
    *,
    round: int,
    num_rounds: int,
    seed: int,
    trainable: Sequence[str] = PARTS,
    core: LoraState | None = None,
    penalty: Penalty | None = None,
    interrupt: Callable[[], None] | None = None,
    private: PrivateRound | None = None,
) -> tuple[LoraState, TrainStats]:
    """Train `state`, on top of W0 and `frozen`, for one round; the factors not named in `trainable` keep their bits.

    How many steps that takes is settings.max_steps, or follows from num_train_epochs and the examples of `data`.
    With a `core` the matrix R of A = R V is trained, V being the core's A, and neither factor by itself.
    penalty(before, now) is added to the loss of every step. `interrupt` is called before every forward pass; what it
    raises ends the training. With `private` the steps are those of DP-SGD, and the loss is not told. Same arguments,
    same bits (on one thread).
    """
    begun = time.perf_counter()
    peft_bridge.write_adapter(model, state)
    peft_bridge.set_frozen(model, frozen)
    peft_bridge.set_trainable(model, () if core else trainable)
    settings = settings.for_examples(data.num_rows)  # an epoch draws every row once
    rates = partial(rate_at, settings, round, num_rounds)
    extra = None if penalty is None else lambda: penalty(state, peft_bridge.live_adapter(model))
    with peft_bridge.training_core(model, core or LoraState()):
        with (
            _undisturbed(model, checkpointed=settings.gradient_checkpointing),
            settle(model),
            ask_once(),
            quiet_transformers(),
        ):
            arguments = _arguments(model, settings, seed)
            if private is None:
                loss, steps, tokens = _fit(model, data, arguments, rates, extra, settings.bf16, interrupt)
            else:
                steps, tokens = _fit_privately(model, data, arguments, rates, extra, settings.bf16, interrupt, private)
                loss = math.nan
        # Only now: up to here there were the optimiser's tensors too.
        trained = peft_bridge.read_adapter(model)
    peft_bridge.set_trainable(model, PARTS)
    changed = ("A",) if core else trainable
    after = LoraState({module: _keep(state[module], pair, changed) for module, pair in trained.items()})
    return after, TrainStats(loss, steps, len(data), tokens, time.perf_counter() - begun)


def _fit(
    model: peft.PeftModel,
    data: TokenizedExamples,
    arguments: TrainingArguments,
    rates: Callable[[int], float],
    penalty: Callable[[], Tensor] | None,
    bf16: bool,
    interrupt: Callable[[], None] | None,
) -> tuple[float, int, int]:
    """Train in place. Returns mean loss, steps and tokens; the trainer and its optimiser are garbage afterwards."""
    rows = training_rows(data)
    trainer = _LocalTrainer(model=model, args=arguments, data_collator=collator(model, rows), train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.rates, trainer.penalty, trainer.bf16, trainer.interrupt = rates, penalty, bf16, interrupt
    trainer.head = narrow_head(model) if trainer.model_accepts_loss_kwargs else None
    trainer.train()
    steps = trainer.state.global_step
    return float(trainer.loss_sum) / max(steps, 1), steps, int(trainer.token_sum)


def _fit_privately(
    model: peft.PeftModel,
    data: TokenizedExamples,
    arguments: TrainingArguments,
    rates: Callable[[int], float],
    penalty: Callable[[], Tensor] | None,
    bf16: bool,
    interrupt: Callable[[], None] | None,
    private: PrivateRound,
) -> tuple[int, int]:
    """`_fit` with noise. Returns steps and tokens; what the loss was is not for anybody to know."""
    if arguments.activation_checkpointing:
        base, how = cast(PreTrainedModel, model.get_base_model()), arguments.activation_checkpointing_kwargs
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    optimizer = _LocalTrainer(model=model, args=arguments).create_optimizer()
    size = arguments.per_device_train_batch_size
    tokens = fit_privately(
        model, data, optimizer, private, rates, size=size, bf16=bf16, penalty=penalty, interrupt=interrupt
    )
    return private.noise.steps, tokens


def _keep(before: LoraPair, after: LoraPair, trainable: Sequence[str]) -> LoraPair:
    return LoraPair(*((after if part in trainable else before).part(part) for part in PARTS))


class _Arguments(TrainingArguments):
    """Arguments of a trainer whose model is where it is to be."""

    @property
    def place_model_on_device(self) -> bool:
        """No: looking at every module again would find nothing to move."""
        return False


def _arguments(model: peft.PeftModel, settings: TrainingSettings, seed: int) -> TrainingArguments:
    try:
        arguments = _Arguments(
            output_dir=str(Path(__file__).parent),  # must exist, and is looked through; nothing is written
            learning_rate=settings.learning_rate,
            max_steps=settings.max_steps or -1,  # transformers' word for none
            per_device_train_batch_size=settings.per_device_train_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            activation_checkpointing=settings.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optim=settings.optim,
            seed=seed % 2**32,
            use_cpu=model.device.type == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=model.device.type != "cpu",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # for a log that nobody keeps; the turn looks at what was trained
            report_to="none",
            disable_tqdm=True,
        )
    except ValueError as error:
        raise ConfigError(f"transformers does not accept these [training] settings: {error}") from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one model on one device; never nn.DataParallel
    return arguments


def check_optimizer(model: peft.PeftModel, settings: TrainingSettings) -> None:
    """Raises ConfigError where training.optim is unknown or needs a library that is not installed."""
    known = [name.value for name in OptimizerNames]
    if settings.optim not in known:
        near = get_close_matches(settings.optim, known, n=1) or [n for n in known if n.startswith(settings.optim)]
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        raise ConfigError(f"training.optim {settings.optim!r} is unknown to transformers; {hint}")
    try:
        # A whole trainer, as in training: arguments alone would leave accelerate without the state that they reset.
        with keep_random_state(), quiet_transformers():
            trainer = _LocalTrainer(model=model, args=_arguments(model, settings, 0))
            trainer.get_optimizer_cls_and_kwargs(trainer.args, cast(PreTrainedModel, model))
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"training.optim {settings.optim!r} does not work here: {to_printable(str(error))}") from None


class _LocalTrainer(Trainer):
    """Trainer with a learning rate for every step, a penalty, and its own sums of loss and tokens.

    It casts to bfloat16 by itself: the cast that accelerate wraps around a model would stay there for evaluation.
    """

    rates: Callable[[int], float]
    penalty: Callable[[], Tensor] | None = None
    bf16: bool = False
    interrupt: Callable[[], None] | None = None
    head: torch.nn.Module | None = None
    loss_sum: Tensor | float = 0.0
    token_sum: Tensor | int = 0

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        chosen = self.optimizer if optimizer is None else optimizer
        assert chosen is not None
        base, last = self.args.learning_rate, self.args.max_steps - 1
        self.lr_scheduler = LambdaLR(chosen, lambda step: self.rates(min(step, last)) / base)
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """transformers' choice; AdamW in one pass over all factors, where several for each of them would be slower."""
        kind, given = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return kind, given | ({"fused": True} if args.optim == OptimizerNames.ADAMW_TORCH else {})

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """The parameters whose weights decay: where none does, there is no need to look for them."""
        return super().get_decay_parameter_names(model) if self.args.weight_decay else []

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """What accelerate does on one device, of the factors alone: the others have no gradient to look for."""
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        return torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Not counted: nobody asks, and it takes a look at every module in every step."""
        return 0

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward. On a CPU short rows in bfloat16 have plain products for attention: torch's fused one
        takes up to twice the time there.
        """
        plain = self.bf16 and self.args.device.type == "cpu" and inputs["input_ids"].shape[1] <= SHORT_ROWS
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one micro-batch, scaled by the tokens of the whole step where the model allows that."""
        if self.interrupt is not None:
            self.interrupt()
        cast_down = torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bf16)
        with cast_down, learnt_alone(self.head, without_mask(inputs)) as fed:
            loss = super().compute_loss(model, fed, num_items_in_batch=num_items_in_batch)
        assert isinstance(loss, Tensor)
        parts = self.current_gradient_accumulation_steps
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        self.loss_sum += loss.detach() / (1 if scaled else parts)
        self.token_sum += inputs["attention_mask"].sum()
        if self.penalty is not None:
            loss = loss + self.penalty() / (parts if scaled else 1)
        return loss


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave the random state of Python, numpy and torch as it was found."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(min(torch.cuda.device_count(), 1))):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _undisturbed(model: peft.PeftModel, *, checkpointed: bool) -> Iterator[None]:
    """Leave random state as it was, and the model as it is used between trainings.

    checkpointed: whether the training recomputes activations.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    with keep_random_state(), keep_use_cache(base.config):
        try:
            with set_older_objects_aside():
                yield
        finally:
            if checkpointed:
                base.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
            set_mode(model, False)
