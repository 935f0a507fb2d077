"""Corpus, tokenizer, tokens, training, weights: each is made once and kept in the work folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from experiments.pretrain import corpus, tokens, training

WIDTH = 512
"""Of the base model that is shipped."""


def make_base(work: Path, steps: int, seed: int, tell: Callable[[str], None], width: int = WIDTH) -> Path:
    """Make the base model, or go on making it; returns the folder of the finished model, in bfloat16.

    A base of another width than usual is made from the same text and tokens, in a folder beside them.
    """
    work.mkdir(parents=True, exist_ok=True)
    documents = work / "corpus.jsonl.zst"
    if not documents.exists():
        sizes = corpus.build(work, documents)
        tell(f"corpus: {sum(sizes.values()) / 1e6:.0f} MB of text from {len(sizes)} packages")
    tokenizer = _tokenizer(work, documents)
    held, trained = (_tokens(work, documents, split, tokenizer) for split in ("heldout", "train"))
    torch.manual_seed(seed)
    sitting = training.new_sitting(training.new_model(tokenizer, width))
    work = sittings(work, width)
    work.mkdir(exist_ok=True)
    if (work / "checkpoint.pt").exists():
        training.load(sitting, work / "checkpoint.pt")
    training.train(sitting, trained, held, steps, work, seed, tell)
    target = work / "model"
    sitting.model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def sittings(work: Path, width: int) -> Path:
    """Where the checkpoints, the log and the finished model of a width are."""
    return work if width == WIDTH else work / f"width-{width}"


def bits_a_byte(work: Path, width: int = WIDTH) -> float:
    """Of the held-out text, by the last line of the training's log."""
    last = json.loads((sittings(work, width) / "log.jsonl").read_text().splitlines()[-1])
    held = json.loads((work / "heldout.json").read_text())
    return float(last["heldout"] * held["tokens"] / held["bytes"] / math.log(2))


def _tokenizer(work: Path, documents: Path) -> PreTrainedTokenizerFast:
    if not (work / "tokenizer").is_dir():
        return tokens.train_tokenizer(documents, work / "tokenizer")
    found = AutoTokenizer.from_pretrained(work / "tokenizer")
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def _tokens(work: Path, documents: Path, split: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    path = work / f"{split}.tokens"
    if not path.exists():
        count, size = tokens.write_tokens(documents, split, tokenizer, path)
        (work / f"{split}.json").write_text(json.dumps({"tokens": count, "bytes": size}))
    return np.memmap(path, dtype=np.uint16, mode="r")
