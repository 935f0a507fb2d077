"""The base model's tokenizer, and its corpus in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from experiments.pretrain.corpus import stored

VOCABULARY = 6144
SAMPLE = 60_000
"""Documents that the tokenizer is trained on; they are shuffled, so these are a fair part of all."""


def train_tokenizer(corpus: Path, target: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own. It puts <s> before a text, and nothing after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(stored(corpus, "train"), SAMPLE), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
    made.save_pretrained(target)
    return made


def write_tokens(corpus: Path, split: str, tokenizer: PreTrainedTokenizerFast, target: Path) -> tuple[int, int]:
    """All documents of a split, one after another, each as <s> … </s>; uint16. Returns (tokens, bytes of text)."""
    count, size = 0, 0
    temporary = target.with_suffix(".part")
    with temporary.open("wb") as file:
        for texts in _batches(stored(corpus, split), 2000):
            size += sum(len(text.encode()) for text in texts)
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                file.write(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.uint16).tobytes())
                count += len(ids) + 1
    temporary.rename(target)
    return count, size


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(texts, size)):
        yield batch
