"""A GPU that is none: its tensors lie in memory, but behave as those of a GPU where code may go wrong.

Numbers are those of the CPU, so results can be compared to the bit. A tensor of it has no numpy array, and arithmetic
with a tensor of the CPU is refused, as torch refuses it for CUDA. `Pretended.copies` has the sizes of all that was
copied to the CPU, values that Python asked for among them.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
"""A device that torch knows on every machine, and that nothing else here uses."""
_MIXES = {"index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy", "set_"}
"""Operations that torch allows between devices: positions on the CPU, and copies."""


class There(torch.Tensor):
    """A tensor of the device; `held` is what it stands for."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=NAME, requires_grad=False,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"There({self.held})"

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, values):
        return There(torch.tensor(values, dtype=self.dtype))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("tensors of the pretended GPU are used within `Pretended`, by the thread that entered it")


class Pretended(TorchDispatchMode):
    """Within this context torch computes on the device. `to` puts a tensor there."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def to(self, tensor):
        return There(tensor.clone())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [leaf for leaf in leaves if isinstance(leaf, There)]
        asked = kwargs.get("device")
        asked = torch.device(asked) if asked is not None else None
        wanted = asked.type == NAME if asked else bool(there)
        name = func._schema.name.rpartition("::")[2]
        here = [leaf for leaf in leaves if not isinstance(leaf, There) and leaf.dim()]
        if there and here and name not in _MIXES:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cpu and {NAME}")
        if asked and asked.type == NAME:
            kwargs["device"] = torch.device("cpu")
        to_cpu = name == "copy_" and not isinstance(args[0], There)
        if there and (to_cpu or name == "_local_scalar_dense" or (name == "_to_copy" and not wanted)):
            self.copies.append(there[0].numel())
        inner = tree_map(lambda leaf: leaf.held if isinstance(leaf, There) else leaf, (args, kwargs))
        out = func(*inner[0], **inner[1])
        if to_cpu or not wanted:
            return out
        held = {id(leaf.held): leaf for leaf in there}  # what is written in place stays the same tensor

        def wrapped(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            same = held.get(id(leaf))
            return There(leaf) if same is None else same

        return tree_map(wrapped, out)
