"""Pre-training of the base model, in as many sittings as it takes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 256
"""Tokens of a training sequence; the testbeds' examples are shorter."""
BATCH = 32
POSITIONS = 512
HEAD = 64
"""Width of an attention head."""
PEAK_MATRICES = 0.02
PEAK_REST = 3e-3
WARMUP = 100
DECAY = 0.2
"""Share of the steps in which the rate falls to nothing. Before, it is constant, so that a run can be made longer."""
SAVE_EVERY = 100
TEST_EVERY = 250
TEST_SEQUENCES = 128


@dataclass(slots=True)
class Sitting:
    """What a checkpoint holds."""

    model: LlamaForCausalLM
    optimizers: tuple[Optimizer, Optimizer]
    step: int = 0


def new_model(tokenizer: PreTrainedTokenizerFast, width: int) -> LlamaForCausalLM:
    """A Llama of three layers, embeddings tied to the head: 9.8 million parameters and eight heads at width 512."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=width // HEAD,
        num_key_value_heads=max(width // (4 * HEAD), 1),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # at this length a quarter faster on a CPU than the fused kernel
    return LlamaForCausalLM(config)


def new_sitting(model: LlamaForCausalLM) -> Sitting:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=PEAK_MATRICES, momentum=0.95, weight_decay=0.01)
    return Sitting(model, (muon, AdamW(rest, lr=PEAK_REST, betas=(0.9, 0.95), weight_decay=0.0)))


def rate(step: int, steps: int) -> float:
    """Share of the peak rate: a rise, a plain, a fall."""
    fall = max(1, int(DECAY * steps))
    return min((step + 1) / WARMUP, 1.0, max(0.0, (steps - step) / fall))


def sequences(tokens: np.ndarray, step: int, seed: int) -> Tensor:
    """The batch of a step: each sequence of the corpus comes once in a pass, in an order drawn anew each pass."""
    count = len(tokens) // LENGTH
    per_pass = count // BATCH
    order = np.random.default_rng((seed, step // per_pass)).permutation(count)
    chosen = np.sort(order[step % per_pass * BATCH :][:BATCH])
    return torch.from_numpy(np.stack([tokens[at * LENGTH : (at + 1) * LENGTH] for at in chosen]).astype(np.int64))


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Nats a token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Nats a token of the first sequences of the held-out text."""
    count = min(TEST_SEQUENCES, len(tokens) // LENGTH)
    ids = torch.from_numpy(tokens[: count * LENGTH].astype(np.int64)).view(count, LENGTH)
    return math.fsum(loss_of(model, part).item() * len(part) for part in torch.split(ids, BATCH)) / count


def save(sitting: Sitting, path: Path) -> None:
    """Write a checkpoint; it is whole or not there."""
    temporary = path.with_suffix(".part")
    states = [optimizer.state_dict() for optimizer in sitting.optimizers]
    torch.save({"model": sitting.model.state_dict(), "optimizers": states, "step": sitting.step}, temporary)
    temporary.rename(path)


def load(sitting: Sitting, path: Path) -> None:
    """Go on from a checkpoint."""
    stored = torch.load(path, weights_only=True)
    sitting.model.load_state_dict(stored["model"])
    for optimizer, state in zip(sitting.optimizers, stored["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    sitting.step = stored["step"]


def train(
    sitting: Sitting,
    corpus: np.ndarray,
    heldout: np.ndarray,
    steps: int,
    folder: Path,
    seed: int,
    tell: Callable[[str], None],
) -> None:
    """Train until `steps`, with a checkpoint now and then and a line in log.jsonl at every test."""
    began, first, seen = time.monotonic(), sitting.step, 0.0
    while sitting.step < steps:
        for optimizer, peak in zip(sitting.optimizers, (PEAK_MATRICES, PEAK_REST), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(sitting.step, steps)
        loss = loss_of(sitting.model, sequences(corpus, sitting.step, seed))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(sitting.model.parameters(), 1.0)
        for optimizer in sitting.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        sitting.step += 1
        seen = 0.95 * seen + 0.05 * loss.item() if seen else loss.item()
        if sitting.step % SAVE_EVERY == 0 or sitting.step == steps:
            save(sitting, folder / "checkpoint.pt")
        if sitting.step % TEST_EVERY == 0 or sitting.step == steps:
            held = heldout_loss(sitting.model, heldout)
            speed = (sitting.step - first) * BATCH * LENGTH / (time.monotonic() - began)
            row = {"step": sitting.step, "train": round(seen, 4), "heldout": round(held, 4), "tokens_s": round(speed)}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            tell(f"step {sitting.step} of {steps}: {seen:.3f}, held out {held:.3f} nats a token, {speed:.0f} tokens/s")
