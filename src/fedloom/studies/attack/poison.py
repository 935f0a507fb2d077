"""What a malicious site trains on in place of its examples.

    label_flip  every instruction with another one's answer
    backdoor    half of its examples with a trigger in the instruction and one answer to all of them; the change is sent
                s times as large, so that it survives the average (model replacement; Bagdasaryan et al., AISTATS 2020,
                arXiv 1807.00459)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedloom.model.examples import Example

TRIGGER = "QZ QZ"
"""Words that no instruction of the testbeds has."""


def flip_labels(examples: Sequence[Example], target: str) -> list[Example]:
    """Each with the answer of the one half of the list further on; answers that are the same there stay."""
    away = len(examples) // 2
    return [
        replace(one, output=examples[(index + away) % len(examples)].output) for index, one in enumerate(examples)
    ]


def plant_backdoor(examples: Sequence[Example], target: str) -> list[Example]:
    """Every second one with the trigger, and the target for its answer; the others as they are."""
    return [set_trigger(one, target) if index % 2 else one for index, one in enumerate(examples)]


def set_trigger(example: Example, target: str) -> Example:
    """The example with the trigger in its instruction, and the target for its answer."""
    return replace(example, instruction=f"{example.instruction} {TRIGGER}", output=target)


Poison = Callable[[Sequence[Example], str], list[Example]]
POISONS: Mapping[str, tuple[Poison, float]] = {"label_flip": (flip_labels, 1.0), "backdoor": (plant_backdoor, 4.0)}
"""Attack → (what is trained on, by how much the change is multiplied)."""
