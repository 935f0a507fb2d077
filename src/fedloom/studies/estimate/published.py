"""What papers say their methods send, and the arithmetic that gives it.

FedSRD (arXiv 2510.04601, appendix) counts MiB of a client and round: float32 values, and one bit for every element of a
tensor that is sparse. FLoRIST (arXiv 2506.09199, section 4.3) counts ranks: its communication efficiency is one over
the sum of the ranks that the server broadcasts, over all adapted modules; a factor that does not travel counts half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.studies.estimate.presets import preset_named, preset_shapes

MIB = 2**20
UPLOAD_DENSITY = 0.0523
"""Share of the elements that FedSRD's clients send: what its 31.0 MiB imply. The paper gives sparsities up to 0.96."""
DOWNLOAD_DENSITY = 0.2
DARE_DENSITY = 0.1


@dataclass(frozen=True, slots=True)
class Figure:
    """One published figure: for which model, rank and number of clients, and what our arithmetic makes of it.

    way: "up", "down" or "both", bytes of one client in one round; "efficiency": one over the sum of ranks. published
    and computed are in MiB, or the efficiency itself. formula says what was computed.
    """

    paper: str
    preset: str
    rank: int
    clients: int
    modules: tuple[str, ...] | None
    method: str
    way: str
    published: float
    computed: float
    formula: str


def count_parameters(preset: str, rank: int, modules: Sequence[str] | None = None) -> int:
    """Values of an adapter of one rank on all linear modules of a model, or on those kinds."""
    return rank * sum(m + n for m, n in preset_shapes(preset_named(preset), modules).values())


def masked_bytes(elements: float, density: float) -> float:
    """Bytes of sparse tensors in the paper's format: a bit an element, four bytes a value that is sent."""
    return elements / 8 + 4 * density * elements


def fedsrd_figures(preset: str, rank: int, published: Sequence[tuple[str, str, float]]) -> list[Figure]:
    """The figures (method, way, MiB) of FedSRD's appendix for one model, with what our arithmetic gives."""
    n = count_parameters(preset, rank)
    union = 1 - (1 - DARE_DENSITY) ** 4
    up, down = masked_bytes(n, UPLOAD_DENSITY), masked_bytes(n / 2, DOWNLOAD_DENSITY)
    rules = {
        ("fedit", "up"): (4 * n, "4 N"),
        ("fedit", "both"): (8 * n, "2 · 4 N"),
        ("ffa", "up"): (2 * n, "4 N / 2: half of the values, although B and A differ in size"),
        ("fed-dare", "both"): (
            masked_bytes(n, DARE_DENSITY) + masked_bytes(n, union),
            "N/4 + 4 N (0.1 + 1 − 0.9⁴): masks united",
        ),
        ("fedsrd", "up"): (up, "N/8 + 4 N · 0.0523"),
        ("fedsrd", "down"): (down, "N/16 + 4 N/2 · 0.2: one factor"),
        ("fedsrd", "both"): (up + down, "the two"),
    }
    return [
        Figure("FedSRD", preset, rank, 4, None, method, way, told, rules[method, way][0] / MIB, rules[method, way][1])
        for method, way, told in published
    ]


def florist_figures() -> list[Figure]:
    """Efficiencies of TinyLlama with equal ranks: 22 layers × (q_proj, v_proj) = 44 modules, rank 16, 8 clients."""
    modules, rank, clients = ("q_proj", "v_proj"), 16, 8
    count = len(preset_shapes(preset_named("tinyllama"), modules))
    rules = {
        "fedit": (14.2e-4, count * rank, "1 / (44 · 16)"),
        "flora": (1.78e-4, count * rank * clients, "1 / (44 · 16 · 8): the stack of 8 clients"),
        "ffa": (28.4e-4, count * rank / 2, "2 / (44 · 16): B alone"),
    }
    return [
        Figure("FLoRIST", "tinyllama", rank, clients, modules, method, "efficiency", told, 1 / ranks, formula)
        for method, (told, ranks, formula) in rules.items()
    ]


def list_figures() -> list[Figure]:
    """Every published figure that this module knows the arithmetic of."""
    llama = [
        ("fedit", "up", 371.0),
        ("ffa", "up", 185.5),
        ("fed-dare", "both", 190.0),
        ("fedsrd", "up", 31.0),
        ("fedsrd", "down", 43.0),
        ("fedsrd", "both", 74.0),
    ]
    qwen = [("fedit", "both", 616.0), ("fedsrd", "both", 61.0)]
    return [
        *fedsrd_figures("llama-3.2-3b", 64, llama),
        *fedsrd_figures("qwen2-7b", 32, qwen),
        *florist_figures(),
    ]
