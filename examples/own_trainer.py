"""A TRL script keeps its trainer: the three numbered lines make it the training step of a site in a federation."""

import json
from pathlib import Path

import peft
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fedloom  # 1

BED = fedloom.testbed(settings={"federation.participants": ["bank", "lab"]})
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_of(site: str) -> Dataset:
    """The site's own rows, as TRL reads them: a prompt and its completion."""
    lines = Path(BED.data.source.format(client=site), "train.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [{"prompt": f"{example['instruction']}\n", "completion": example["output"]} for example in examples]
    )


def trainer_of(site: str) -> SFTTrainer:
    """The script as it was: optimiser, schedule, batch and packing are chosen here."""
    arguments = SFTConfig(
        output_dir="out",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=16,
        optim="adamw_torch",
        max_length=128,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(BED.model.path, dtype="float32"),
        args=arguments,
        train_dataset=rows_of(site),
        processing_class=AutoTokenizer.from_pretrained(BED.model.path),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=TARGETS),
    )


def main() -> None:
    """Two sites, three rounds of FedSRD."""
    steps = {site: fedloom.patch(trainer_of(site)) for site in ("bank", "lab")}  # 2
    run = fedloom.run(BED, num_rounds=3, trainers=steps)  # 3
    for site, losses in run.losses.items():
        print(f"{site}: loss {losses[0]:.2f}, then {losses[-1]:.2f}")
    print(f"{run.bytes_up} bytes up, {run.bytes_down} down; the adapter is in {run.adapter_folder.name}/")


if __name__ == "__main__":
    main()
