"""Which tokens an update was made from: the span check of DAGER (Petrov et al., 2024, arXiv 2405.15586), for LoRA.

The gradient of a weight is Σ_t δ_t x_tᵀ over the places t of a batch, so its rows lie in the span of the inputs x_t. In
the first layer of a decoder with rotary positions an input is the normalised embedding of its token and nothing else:
whoever holds the base model can try every token of the vocabulary. Of LoRA's factors the step of A has rows
Bᵀ δ_t x_tᵀ, which lie in the span of the inputs themselves, and that of B has rows δ_t (A x_t)ᵀ, in the span of what A
makes of them. With fewer tokens than the rank the span is a proper subspace, and whatever lies in it was there.

In the same way the step of B at the end of the last layer has columns along the gradients of the residual stream, which
point from the tokens that the model expected to those that it was taught: its labels.

An optimiser such as Adam, several steps, rounding and sparsification all blur the span. What is left is measured by how
far candidates stand out from the rest of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloom.compress.entries import to_dense
from fedloom.lora.pair import LoraPair
from fedloom.methods.method import CORE, Entries

_NOISE = 1e-4
"""Singular values below this share of the largest are rounding of float32 and no part of the span."""
_PROPER = 0.95
"""A span of more than this share of all directions says nothing: then directions are weighed by singular values."""


def steps_of(pair: LoraPair, entries: Entries, module: str, updates: str) -> dict[str, Tensor]:
    """part → the step that a client's entries say it made from the server's `pair`, of the components that it has.

    updates: what the entries are, as `Method.updates` says; a part that was not sent, or has not moved, is left out.
    """
    found = {}
    for part in ("A", "B", CORE):
        if (entry := entries.get(f"{module}/{part}")) is None:
            continue
        sent = to_dense(entry).float()
        if part != CORE and updates != "change":
            sent = sent - (pair.A[: len(sent)] if part == "A" else pair.B[:, : sent.shape[1]])
        if sent.any():
            found[part] = sent
    return found


def read_inputs(inputs: Tensor, pair: LoraPair, steps: Mapping[str, Tensor]) -> Tensor:
    """How much each candidate looks like an input of this module: (vocabulary,), standardised and summed over parts.

    inputs: (vocabulary, n), what the module is given for each token.
    """
    seen = torch.zeros(len(inputs))
    for part, step in steps.items():
        if part == "A":
            seen += standing_out(step, inputs)
        else:  # rows of the steps of B and of a core lie in the r dimensions between the factors
            seen += standing_out(step, inputs @ _between(pair, part, step.shape[1]).T)
    return seen


def _between(pair: LoraPair, part: str, rank: int) -> Tensor:
    """What takes an input to those r dimensions: A itself, or of a core the directions that A's rows span."""
    if part == "B":
        return pair.A[:rank].float()
    right: Tensor = torch.linalg.svd(pair.A.float(), full_matrices=False).Vh
    return right[:rank]


def standing_out(step: Tensor, candidates: Tensor) -> Tensor:
    """(candidates,): the share of each that lies in the row space of `step`, standardised over all of them.

    Where the rows span all that there is, directions are weighed by their singular values.
    """
    _, sizes, right = torch.linalg.svd(step.float(), full_matrices=False)
    kept = int((sizes > _NOISE * sizes[0]).sum())
    parts = candidates.float() @ right[:kept].T
    if kept > _PROPER * step.shape[1]:
        parts = parts * (sizes[:kept] / sizes[0])
    share = parts.norm(dim=1) / candidates.float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    spread = share.std()
    return (share - share.mean()) / spread if spread > 0 else torch.zeros_like(share)


def best(seen: Tensor, count: int) -> list[int]:
    """The tokens that stand out most."""
    return [int(token) for token in seen.topk(min(count, len(seen))).indices]


def rouge_1(said: Sequence[int], text: Sequence[int]) -> float:
    """F of the tokens that two texts share, each as often as both have it: ROUGE-1 (Lin, 2004), over tokens."""
    left: dict[int, int] = {}
    for token in text:
        left[token] = left.get(token, 0) + 1
    shared = 0
    for token in said:
        if left.get(token, 0):
            left[token] -= 1
            shared += 1
    return 2 * shared / (len(said) + len(text)) if said or text else 0.0
