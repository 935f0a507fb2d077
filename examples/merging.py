"""PEFT adapters of different ranks become one, offline and exactly. No base model is loaded for that."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fedloom

WEIGHTS = {"bank": 1200, "lab": 800}  # examples of each site
RANKS = {"bank": 8, "lab": 4}


def tiny_model() -> LlamaForCausalLM:
    """A model that nobody would talk to."""
    torch.manual_seed(0)
    size = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(size)


def save_adapter(folder: Path, rank: int) -> None:
    """An adapter as PEFT leaves it after training; the training is made up."""
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = tiny_model()
    torch.manual_seed(rank)
    get_peft_model(model, settings).save_pretrained(str(folder))


def change(folder: Path) -> torch.Tensor:
    """What the adapter adds to one of the model's weights, as PEFT applies it."""
    before = tiny_model().model.layers[0].self_attn.q_proj.weight
    model = PeftModel.from_pretrained(tiny_model(), str(folder)).merge_and_unload()
    difference: torch.Tensor = model.model.layers[0].self_attn.q_proj.weight - before
    return difference.detach()


def main() -> None:
    """Two adapters, one merged, and what PEFT makes of them."""
    with TemporaryDirectory() as here:
        sites = {name: Path(here) / name for name in RANKS}
        for name, folder in sites.items():
            save_adapter(folder, RANKS[name])

        merge = fedloom.merge(sites.values(), weights=list(WEIGHTS.values()), energy=1)  # 1: nothing is left out
        print(merge)
        print(merge.preview()[0])
        merged = merge.save(Path(here) / "merged")

        share = {name: size / sum(WEIGHTS.values()) for name, size in WEIGHTS.items()}
        expected = sum((share[name] * change(folder) for name, folder in sites.items()), torch.zeros(()))
        error = (change(merged) - expected).norm() / expected.norm()
        print("exact:", bool(error < 1e-5))


if __name__ == "__main__":
    main()
