"""A method of your own: clients send one row in so many of their change, each round another one.

A method is a record of plain functions. Replace what is to differ; the wire, checkpoints and catching up go on working.
"""

from collections.abc import Mapping

import torch

import fedloom
from fedloom.compress.entries import Entry, Sparse

Sent = tuple[Mapping[str, torch.Tensor], Mapping[str, Entry]]


def rows(*, every: int = 2) -> fedloom.Method:
    """Fed-DARE's averaging, over whole rows. A builder's keywords are the method's settings.

    every: of the rows of every factor's change, one in so many is sent, in the next round the one after it.
    """
    plain = fedloom.build("fed-dare")

    def compress(state: fedloom.State, after: fedloom.LoraState, context: fedloom.Context) -> Sent:
        before, entries = state.adapter.tensors(), {}
        for name, tensor in after.tensors().items():
            change = tensor - before[name]
            height, width = change.shape
            chosen = torch.arange(context.round % every % height, height, every)
            positions = (chosen[:, None] * width + torch.arange(width)).flatten()
            # Multiplied, so that a row that is sent now and then counts as much as if it were sent in every round.
            values = every * change.flatten()[positions]
            entries[name] = Sparse((height, width), positions, context.quantize(values, context.seed))
        return state.memory, entries

    return fedloom.replace(plain, name="rows", compress=compress)


def main() -> None:
    """The method in a run, and beside another one."""
    bed = fedloom.testbed(settings={"federation.num_rounds": 2})
    print(fedloom.run(bed, method=rows(every=4)))
    print(fedloom.compare(bed, ["fedit", rows(every=4)], seeds=1))


if __name__ == "__main__":
    main()
