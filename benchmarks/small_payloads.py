"""What small payloads of loom hold, tensors named and joined: `python -m benchmarks.small_payloads`."""

from __future__ import annotations

import torch

from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.lora.pair import LoraPair, initial_state
from fedloom.methods.method import Context, State
from fedloom.methods.table import build
from fedloom.rounds.draft import Draft
from fedloom.rounds.joint import Outline
from fedloom.wire import Header, describe

BUDGETS = (200, 500, 1000, 1700, 4000)
_KINDS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (320, 128),
    "mlp.up_proj": (320, 128),
    "mlp.down_proj": (128, 320),
}
_SHAPES = {f"model.layers.{layer}.{kind}": shape for layer in range(4) for kind, shape in _KINDS.items()}
_HEADER = Header("update", "loom", 7, 6, "ab" * 16, "cd" * 16, 320)


def main(rank: int = 2) -> None:
    """Print one line a payload."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.randn(tensor.shape[0], 1, generator=generator).exp()
        return 1e-2 * torch.randn(tensor.shape, generator=generator) * rows

    before = initial_state(_SHAPES, dict.fromkeys(_SHAPES, rank), 0)
    before = before.map(lambda p: LoraPair(p.A, p.B + 1e-2 * torch.randn(p.B.shape, generator=generator)))
    after = before.map(lambda p: LoraPair(p.A + noise(p.A), p.B + noise(p.B)))
    for budget in BUDGETS:
        for name, outline in (("named", None), ("joined", Outline.of(before, before.ranks()))):
            draft = Draft(_HEADER, outline)
            context = Context(7, 5, quantize("sign"), Budget(size=budget), size=draft.size)
            entries = build("loom", {"upload_share": 0.5}).compress(State(before), after, context)[1]
            told = describe(draft.payload(entries))
            parts = ", ".join(f"{part} {size}" for part, size in told.parts.items())
            elements = sum(entry.values.numel() for entry in entries.values())
            print(f"{budget:5} {name:6} {told.size:5} bytes: {parts}; {elements} elements")


if __name__ == "__main__":
    main()
