"""What it would take to send the data instead: a client's training text, once, in bytes.

Two ways. "xz": compressed as `fedloom.model.volume` weighs it. "coded": as many bits as the base model finds in it,
which an arithmetic coder that both ends run the base for would come to, to a byte or two. All tokens of prompt and
completion count, each at −log2 p; the first of a text, which nothing predicts, as one of the vocabulary at random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.model.base import load_base
from fedloom.model.evaluate import exact_match_and_loss
from fedloom.model.examples import Example
from fedloom.model.identity import base_digest
from fedloom.model.tokens import tokenize
from fedloom.model.volume import weigh_examples
from fedloom.records.config import Config
from fedloom.workspace.assemble import set_threads
from fedloom.workspace.data import client_examples

SENDING = Path(__file__).with_name("sending.json")
"""The figures of each testbed, so that a picture needs neither base nor data."""
ALL_TEXT = 2**31
"""Bytes of text up to which a slow compressor is used: any."""


@dataclass(frozen=True, slots=True)
class Sending:
    """Bytes of a client's training text, the mean over clients. base: digest of the model that coded it."""

    xz: float
    coded: float
    clients: int
    base: str


def read_sending(path: Path = SENDING) -> dict[str, Sending]:
    """Testbed → what its data weigh, as far as it was weighed."""
    if not path.exists():
        return {}
    return {name: Sending(**found) for name, found in json.loads(path.read_text(encoding="utf-8")).items()}


def write_sending(found: dict[str, Sending], path: Path = SENDING) -> None:
    """What `read_sending` reads."""
    tree = {name: asdict(one) for name, one in sorted(found.items())}
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def weigh(config: Config, known: Sending | None = None) -> Sending:
    """Weigh the data of a testbed; `known` is given back where it is of the same base model. Takes a pass of it."""
    digest = base_digest(config.model.path)
    if known is not None and known.base == digest:
        return known
    set_threads(config)
    texts, _ = client_examples(config)
    model, tokenizer = load_base(config.model.path, config.model.dtype, config.model.quantization, config.model.device)
    volume = weigh_examples(texts, ALL_TEXT)
    template = config.data.template
    coded = [coded_bytes(model, tokenizer, held, template) for held in texts.values() if held]
    return Sending(fmean(volume.by_client.values()), fmean(coded), len(texts), digest)


def coded_bytes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Example], template: str
) -> float:
    """Bytes that the model's own probabilities code some examples in. What is longer than the model reads is cut."""
    longest = int(getattr(model.config, "max_position_embeddings", 2048))
    tokens = tokenize(texts, tokenizer, template, longest, "the data", "everything")
    scores = exact_match_and_loss(model, tokens)
    begun = sum(int(one.ids[0]) != tokenizer.bos_token_id for one in tokens.examples)
    nats = scores.loss * scores.tokens + begun * math.log(model.config.vocab_size)
    return float(nats / math.log(2) / 8)
