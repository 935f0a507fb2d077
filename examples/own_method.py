"""A method of your own: clients send the largest half of what changed in their factors, and nothing of the rest.

A method is a record of plain functions. Replace what is to differ; wire, checkpoints and catching up go on working.
"""

from collections.abc import Mapping

import torch

import fedloom


def halves(*, keep: float = 0.5) -> fedloom.Method:
    """A builder is a method; its keywords are its settings. keep: the share of every factor's change that is sent."""
    return fedloom.replace(fedloom.build("fed-dare"), name="halves", compress=send_half(keep), values="int8")


def send_half(keep: float) -> fedloom.Compress:
    """(client state, adapter after training, context) → (what to remember, the entries to send)."""

    def compress(
        state: fedloom.State, after: fedloom.LoraState, context: fedloom.Context
    ) -> tuple[Mapping[str, torch.Tensor], fedloom.Entries]:
        before = state.adapter.tensors()
        changes = {name: tensor - before[name] for name, tensor in after.tensors().items()}
        return state.memory, {name: largest(change, keep, context) for name, change in changes.items()}

    return compress


def largest(change: torch.Tensor, keep: float, context: fedloom.Context) -> fedloom.Sparse:
    """The share `keep` of a change's elements, those of largest magnitude, rounded to what the wire will carry."""
    flat = change.flatten()
    positions = flat.abs().topk(max(1, round(keep * flat.numel()))).indices.sort().values
    return fedloom.Sparse(tuple(change.shape), positions, context.quantize(flat[positions], context.seed))


def main() -> None:
    """Beside the mean of whole factors."""
    bed = fedloom.testbed(settings={"federation.num_rounds": 4})
    print(fedloom.compare(bed, ["fedit", halves(keep=0.25)], seeds=1))


if __name__ == "__main__":
    main()
