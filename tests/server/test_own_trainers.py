"""A run whose clients bring trainers: set up as fedloom's own training is, it moves the very same bytes."""

import peft
import pytest
from transformers import Trainer, TrainingArguments

import fedloom
from fedloom.errors import ConfigError, ModelError
from fedloom.model.base import load_base
from fedloom.model.sources import load_examples
from fedloom.model.tokens import tokenize
from small_testbed import small_testbed

SETTINGS = {
    "federation.participants": ["bank", "lab"],
    "training.lr_scheduler_type": "constant",
    "training.max_steps": 2,
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return fedloom.load(small_testbed(tmp_path_factory.mktemp("bed")) / "demo.toml", SETTINGS)


def trainer(bed, client, folder, r=16):
    base, tokenizer = load_base(bed.model.path, device="cpu")
    rows = load_examples(bed.data.source.format(client=client))
    data = tokenize(rows, tokenizer, bed.data.template, bed.data.max_length)
    training = bed.training
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=training.learning_rate,
        per_device_train_batch_size=training.per_device_train_batch_size,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",  # what fedloom makes of "adamw_torch"
        lr_scheduler_type="constant",
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=32, target_modules=list(bed.lora.target_modules))
    model = peft.get_peft_model(base, lora)
    return Trainer(model=model, args=arguments, data_collator=data.collate, train_dataset=data)


@pytest.mark.parametrize("method", ["fedsrd", "florist"])
def test_trainers_set_up_alike_move_the_same_bytes(method, bed, tmp_path):
    """One client with a trainer, one without."""
    plain = fedloom.run(bed, method=method, num_rounds=2)
    step = fedloom.patch(trainer(bed, "lab", tmp_path / "out"))
    mine = fedloom.run(bed, method=method, num_rounds=2, trainers={"lab": step}, out=tmp_path / "run")
    assert list(mine.payloads) and sorted(mine.payloads) == sorted(plain.payloads)
    assert mine.scores == plain.scores


def test_a_trainer_that_does_not_fit_is_refused_before_the_first_round(bed, tmp_path):
    with pytest.raises(ConfigError, match=r"trainers\['labb'\] is for a client without data; did you mean 'lab'"):
        step = fedloom.patch(trainer(bed, "lab", tmp_path))
        fedloom.run(bed, num_rounds=1, trainers={"labb": step}, out=tmp_path / "name")
    with pytest.raises(ModelError, match="r = 4, the run has 16"):
        step = fedloom.patch(trainer(bed, "lab", tmp_path, r=4))
        fedloom.run(bed, num_rounds=1, trainers={"lab": step}, out=tmp_path / "rank")


def test_a_run_that_was_killed_goes_on_with_the_same_bytes(bed, tmp_path):
    """It is killed amid the training of its second round."""
    mine = trainer(bed, "lab", tmp_path / "out")
    step, collate, batches = fedloom.patch(mine), mine.data_collator, []
    whole = fedloom.run(bed, num_rounds=2, trainers={"lab": step})

    def killed(rows):
        batches.append(rows)
        if len(batches) > 3:
            raise KeyboardInterrupt
        return collate(rows)

    mine.data_collator = killed
    with pytest.raises(KeyboardInterrupt):
        fedloom.run(bed, num_rounds=2, trainers={"lab": step}, out=tmp_path / "run")
    mine.data_collator = collate
    again = fedloom.run(bed, num_rounds=2, trainers={"lab": step}, out=tmp_path / "run", resume=True)
    assert sorted(again.payloads) == sorted(whole.payloads) and again.bytes == whole.bytes


def test_a_function_is_a_trainer_too(bed):
    def still(state, round, seed):
        return fedloom.Trained(state.adapter, num_examples=3, loss=0.5)

    run = fedloom.run(bed, method="fedit", num_rounds=1, trainers={"lab": still})
    assert run.losses["lab"][0] == 0.5
