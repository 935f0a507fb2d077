"""What crosses a pipe between processes is the same on the other side, to the bit."""

from multiprocessing import Pipe

import pytest
import torch

from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.server.pipes import pack, receive, send
from fedloom.server.roster import same_state


def crossed(value):
    near, far = Pipe()
    with near, far:
        send(near, pack(value))
        return receive(far)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0).reshape(3, 4)[:, 1:3],
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 5),
        torch.tensor([True, False]),
        torch.tensor([1.5, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    ],
    ids=["plain", "turned", "cut", "number", "empty", "bool", "bfloat16"],
)
def test_a_tensor_crosses_bit_by_bit(tensor):
    (found,) = crossed([tensor])
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.contiguous().view(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    assert found.data_ptr() % 64 == 0 or not found.numel()  # as torch's own are: kernels may look at it


def test_a_state_crosses_and_what_it_holds_twice_is_held_twice():
    plane = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    pair = LoraPair(plane, torch.ones(5, 4))
    state = State(LoraState({"q": pair}), tail=LoraState({"q": pair}), memory={"q/A": plane}, version=3, digest="d")
    found = crossed(state)
    assert same_state(found, state) and (found.version, found.digest) == (3, "d")
    assert found.memory["q/A"] is found.adapter["q"].A
    found.memory["q/A"].add_(1)  # it is the receiver's own
    assert not torch.equal(found.memory["q/A"], plane)


def test_who_reads_no_more_is_an_error():
    near, far = Pipe()
    far.close()
    with near, pytest.raises(OSError, match="pipe"):
        send(near, pack([torch.zeros(100_000)]))
