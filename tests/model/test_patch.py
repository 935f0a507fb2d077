"""A trainer of somebody else's as a training step: fedloom's own numbers, its own parts, and nothing left changed."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import replace

import peft
import pytest
import torch
from test_peft_bridge import random_state
from test_training import client
from transformers import Trainer, TrainerCallback, TrainingArguments

import fedloom
from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError, ModelError, NumericError
from fedloom.lora.pair import LoraPair, LoraState, digest, initial_state
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.model import peft_bridge
from fedloom.model.patch import PatchedTrainer, patch
from fedloom.model.training import local_update
from fedloom.records.config import TrainingSettings
from fedloom.rounds.step import Task
from tiny_models import llama, placed

LORA = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
SETTINGS = TrainingSettings(
    learning_rate=1e-2, max_steps=4, per_device_train_batch_size=4, lr_scheduler_type="constant", weight_decay=0.01
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(tmp_path, **changes: object) -> TrainingArguments:
    common = {
        "output_dir": str(tmp_path / "out"),
        "learning_rate": SETTINGS.learning_rate,
        "max_steps": SETTINGS.max_steps,
        "per_device_train_batch_size": 4,
        "weight_decay": SETTINGS.weight_decay,
        "max_grad_norm": SETTINGS.max_grad_norm,
        "optim": "adamw_torch_fused",  # transformers' own choice, and what fedloom makes of its "adamw_torch"
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**common, **changes})


def wrapped(name: str = "default", base: torch.nn.Module | None = None, **lora: object) -> peft.PeftModel:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **lora})
    return peft.get_peft_model(base or llama(), config, adapter_name=name)


def trainer(tmp_path, model=None, *, data=None, kind: type[Trainer] = Trainer, more=None, **changes: object) -> Trainer:
    data = data or client()
    return kind(
        model=model or wrapped(),
        args=arguments(tmp_path, **changes),
        data_collator=data.collate,
        train_dataset=data,
        **(more or {}),
    )


def first(rank: int = 4, seed: int = 0) -> LoraState:
    shapes = placed(llama(), **LORA).shapes
    return random_state(shapes, dict.fromkeys(shapes, rank), seed=seed)


def state_of(adapter: LoraState, fixed: LoraState | None = None) -> State:
    state = State(adapter)
    return replace(state, frozen=fixed) if fixed else state


def ours(state: LoraState, fixed: LoraState | None = None, *, method=None, round=1, seed=1, **changes: object):
    """What fedloom's own training makes of it."""
    base = llama()
    model = peft_bridge.attach(base, placed(base, **LORA))
    return local_update(
        model,
        state,
        fixed or LoraState(),
        client(),
        SETTINGS.model_copy(update=changes),
        round=round,
        num_rounds=10,
        seed=seed,
        trainable=method.trainable(round) if method else ("A", "B"),
        core=method.core(State(state)) if method else None,
        penalty=method.penalty if method else None,
    )


def same(mine: LoraState, other: LoraState) -> None:
    assert digest(mine) == digest(other)


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_trainer_set_up_alike_gives_the_same_bits(name, parts, tmp_path):
    before, fixed = first(), first(rank=2, seed=5)
    size = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    expected, stats = ours(before, fixed, **size)
    after = patch(trainer(tmp_path, wrapped(name), **size))(state_of(before, fixed), 1, 1)
    same(after.adapter, expected)
    assert after.loss == pytest.approx(stats.loss, rel=1e-6)
    assert (after.steps, after.num_examples) == (stats.steps, stats.examples) == (4, 8)


@pytest.mark.parametrize("name", ["ffa", "rolora", "fedprox", "fed-sb"])
def test_what_a_method_trains_is_trained(name, tmp_path):
    """One factor, a penalty, or a matrix between two factors that rest, as fedloom's own training has it."""
    method = build(name, {"mu": 2.0} if name == "fedprox" else {})
    before = initial_state(first().shapes(), first().ranks(), 3) if name == "fed-sb" else first()
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    step = patch(trainer(tmp_path, **size)).for_task(Task(method, num_rounds=10))
    for round in (1, 2):
        expected, stats = ours(before, method=method, round=round, **size)
        after = step(state_of(before), round, 1)
        same(after.adapter, expected)
        assert after.loss == pytest.approx(stats.loss, rel=1e-5)


class Counts(TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **others):
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedule_runs_over_all_rounds(kind, tmp_path):
    """As in one training of as many steps."""
    whole, apart = Counts(), Counts()
    chosen = {"lr_scheduler_type": kind, "warmup_steps": 3}
    trainer(tmp_path, more={"callbacks": [whole]}, **chosen, max_steps=12).train()
    step = patch(trainer(tmp_path, more={"callbacks": [apart]}, **chosen)).for_task(Task(num_rounds=3, steps=4))
    for round in (1, 2, 3):
        step(state_of(first()), round, 1)
    assert apart.rates == pytest.approx(whole.rates) and len(set(whole.rates)) > 3


def test_steps_before_this_round_cost_nothing(tmp_path):
    step = patch(trainer(tmp_path, lr_scheduler_type="linear")).for_task(Task(num_rounds=10**12, steps=2))
    assert step(state_of(first()), 10**11, 1).steps == 2


class Slow(torch.optim.SGD):
    """An optimiser that only this trainer knows."""

    made = 0

    def __init__(self, *arguments, **others) -> None:
        super().__init__(*arguments, **others)
        Slow.made += 1


class Doubled(Trainer):
    """A trainer with a loss of its own."""

    def compute_loss(self, *arguments, **others):
        return 2 * super().compute_loss(*arguments, **others)


def test_optimiser_collator_loss_and_callbacks_are_the_trainers(tmp_path):
    Slow.made = 0
    data, seen, collated = client(), Counts(), []
    more = {"callbacks": [seen], "optimizer_cls_and_kwargs": (Slow, {"lr": 0.5})}
    plain = {"weight_decay": 0.0, "max_steps": 1, "max_grad_norm": 0.0}
    mine = trainer(tmp_path, data=data, kind=Doubled, more=more, **plain)
    collate = mine.data_collator
    mine.data_collator = lambda rows: collated.append(len(rows)) or collate(rows)
    step = patch(mine)
    once, again = step(state_of(first()), 1, 1), step(state_of(first()), 2, 1)
    assert (Slow.made, len(seen.rates), seen.rates[0]) == (2, 2, 0.5)
    assert set(collated) == {4}
    same(once.adapter, again.adapter)
    expected, stats = ours(first(), learning_rate=1.0, optim="sgd", **plain)  # a gradient twice as large, half the rate
    assert once.loss == pytest.approx(2 * stats.loss, rel=1e-6)
    for module, pair in once.adapter.items():
        torch.testing.assert_close(pair.B, expected[module].B, atol=1e-6, rtol=1e-5)


def test_what_a_round_changes_is_put_back(tmp_path):
    model = wrapped("mine")
    model.train()
    mine = trainer(tmp_path, model, save_steps=1, data_seed=7, bf16=True, lr_scheduler_type="linear")
    aside = []  # whether older objects are, so that accelerate's collecting is quick
    ask = lambda: aside.append(gc.get_freeze_count() > 0)  # noqa: E731
    step = patch(mine).for_task(Task(build("fedprox"), num_rounds=3, steps=2, interrupt=ask))
    given = mine.args.to_dict()
    callbacks, forward = list(mine.callback_handler.callbacks), model.forward
    before = state_of(first())
    random.seed(5), torch.manual_seed(5)
    step(before, 1, 1)
    assert aside == [True, True] and not gc.get_freeze_count()
    drawn = random.random(), torch.rand(3).tolist()
    random.seed(5), torch.manual_seed(5)
    assert drawn == (random.random(), torch.rand(3).tolist())
    assert mine.args.to_dict() == given
    assert mine.callback_handler.callbacks == callbacks
    assert mine.accelerator.dataloader_config.data_seed == 7
    assert model.forward == forward and model.training and mine.optimizer is None and mine.lr_scheduler is None
    assert "compute_loss" not in vars(mine) and "create_scheduler" not in vars(mine)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_round_does_not_depend_on_what_came_before(tmp_path):
    step = patch(trainer(tmp_path, wrapped(lora_dropout=0.2), data_seed=3))
    once = step(state_of(first()), 1, 1)
    step(state_of(first(seed=9), first(rank=3)), 2, 2)
    same(step(state_of(first()), 1, 1).adapter, once.adapter)
    same(patch(trainer(tmp_path, wrapped(lora_dropout=0.2)))(state_of(first()), 1, 1).adapter, once.adapter)
    assert digest(step(state_of(first()), 1, 2).adapter) != digest(once.adapter)


def test_an_interrupt_is_asked_before_every_pass(tmp_path):
    passes: list[int] = []

    def ask() -> None:
        passes.append(1)
        if len(passes) == 5:
            raise NumericError("too long")

    mine = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    step = patch(mine)
    whole = step(state_of(first()), 1, 1)
    with pytest.raises(NumericError, match="too long"):
        step.for_task(Task(interrupt=ask))(state_of(first()), 1, 1)
    same(step(state_of(first()), 1, 1).adapter, whole.adapter)
    assert not mine.is_in_train


@pytest.mark.parametrize("name", ["fedit", "florist", "fedsrd", "fedex", "fed-sb", "ffa"])
def test_two_rounds_in_a_federation(name, tmp_path):
    """Two sites on one model: everybody ends with the server's bits, and again with the same ones."""

    def play() -> tuple[str, dict[str, str]]:
        shapes = first().shapes()
        adapter = initial_state(shapes, dict.fromkeys(shapes, 4), 3)
        job = fedloom.Job(build(name), seed=0, quantize=quantize("fp32"), num_rounds=2)
        federation = fedloom.Federation(job, adapter, {"bank": None, "lab": None})
        model = wrapped()
        steps = {
            client_name: patch(trainer(tmp_path, model, data=client(seed), lr_scheduler_type="linear"))
            for seed, client_name in enumerate(federation.clients)
        }
        results = [federation.round(steps) for _ in range(2)]
        assert not any(result.refused for result in results)
        return federation.server.digest, {name: state.digest for name, state in federation.clients.items()}

    server, held = play()
    assert set(held.values()) == {server}
    assert play() == (server, held)


def test_modules_that_others_train_are_part_of_the_model(tmp_path):
    """A client of q_proj alone: the server's v_proj is added to its base, and is not trained."""
    before = first()
    alone = LoraState({module: pair for module, pair in before.items() if module.endswith("q_proj")})
    step = patch(trainer(tmp_path, wrapped(target_modules=["q_proj"]))).for_task(Task(ranks=alone.ranks()))
    after = step(state_of(before), 1, 1)
    assert after.adapter.keys() == alone.keys()
    moved = {m: pair if m in alone else LoraPair(pair.A, 0 * pair.B) for m, pair in before.items()}
    assert digest(step(state_of(LoraState(moved)), 1, 1).adapter) != digest(after.adapter)


def test_factors_are_held_in_float32(tmp_path):
    """In bfloat16, as TRL has them on a quantised base, a step of 1e-5 on a value near 1 would be none."""
    model = wrapped()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    before = first()
    after = patch(trainer(tmp_path, model, learning_rate=1e-5))(state_of(before), 1, 1).adapter
    same(after, ours(before, learning_rate=1e-5)[0])


def replaced(model: peft.PeftModel, **changes: object) -> peft.PeftModel:
    for key, value in changes.items():
        setattr(model.peft_config["default"], key, value)
    return model


def with_gradient() -> peft.PeftModel:
    model = wrapped()
    factor = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    factor.grad = torch.zeros_like(factor)
    return model


def with_trainable_head() -> peft.PeftModel:
    model = wrapped()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def merged() -> peft.PeftModel:
    model = wrapped()
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (llama, "LlamaForCausalLM without an adapter"),
        (lambda: wrapped(use_dora=True), "use_dora = True; DoRA"),
        (lambda: wrapped(modules_to_save=["norm"]), "modules_to_save"),
        (lambda: wrapped(bias="lora_only"), "bias = 'lora_only'"),
        (lambda: wrapped(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (lambda: peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")), "peft_type = 'IA3'"),
        (with_gradient, "holds a gradient"),
        (with_trainable_head, "model.norm.weight is trainable"),
        (merged, "is merged"),
    ],
)
def test_a_model_that_cannot_be_used(make, words, tmp_path):
    mine = trainer(tmp_path)
    mine.model = make()
    with pytest.raises(ModelError, match=words):
        patch(mine)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp16": True}, "fp16"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, "cannot go on"),
        ({"lr_scheduler_type": "linear"}, "nobody says how many"),
        ({"max_steps": -1}, "how many steps"),
    ],
)
def test_arguments_that_cannot_be_used(changes, words, tmp_path):
    mine = trainer(tmp_path)
    for key, value in changes.items():
        setattr(mine.args, key, value)
    with pytest.raises(ConfigError, match=words):
        task = Task(num_rounds=0 if changes.get("lr_scheduler_type") == "linear" else 2)
        patch(mine).for_task(task)(state_of(first()), 1, 1)


def test_an_optimiser_with_a_state_is_refused(tmp_path):
    model = wrapped()
    given = (torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), None)
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs"):
        patch(trainer(tmp_path, model, more={"optimizers": given}))
    with pytest.raises(ConfigError, match="not a str"):
        patch("trainer")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 8}, r"layers\.0\.self_attn\.q_proj: .* r = 8, the run has 4"),
        ({"lora_alpha": 16}, "lora_alpha = 16, the run has 12"),
        ({"target_modules": ["q_proj"]}, "the run trains module .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "trains module .*k_proj, the run does not"),
        ({"use_rslora": True}, "use_rslora = True, the run has False"),
    ],
)
def test_settings_of_the_adapter_and_of_the_run_must_agree(lora, words, tmp_path):
    adapter = placed(llama(), **LORA)
    alphas = {module: place.alpha for module, place in adapter.modules.items()}
    with pytest.raises(ModelError, match=words):
        patch(trainer(tmp_path, wrapped(**lora))).for_task(Task(ranks=adapter.ranks, alphas=alphas))


def test_the_base_beneath_an_adapter_is_that_of_the_plain_model():
    from fedloom.model.peft_bridge import linear_modules

    model = wrapped()
    assert peft_bridge.linear_beneath(model) == linear_modules(llama())
    peft_bridge.add_layers(model, {"model.layers.0.mlp.up_proj": (48, 32)})
    assert peft_bridge.linear_beneath(model) == linear_modules(llama())


def test_a_patched_trainer_says_what_it_draws(tmp_path):
    step = patch(trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3))
    assert isinstance(step, PatchedTrainer) and (step.num_examples, step.count_drawn(Task(steps=4))) == (8, 24)
