"""Where the processor's time of a client's turn goes, stage by stage, on a turn that is played as the engines play it.

A stopwatch is put around the functions of each stage. Stages may lie in one another: time counts for the innermost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from fedloom.methods.method import Method
from fedloom.model import peft_bridge, training

try:
    from fedloom.rounds import draft
except ImportError:  # code of before 2026-11-28, under `benchmarks against`
    from fedloom.rounds import turns as draft  # type: ignore[no-redef]

STEPS = "steps"
"""Forward, backward, clipping and the optimiser: what a bare loop does too."""
STAGES = ("receive", "write", "trainer", STEPS, "read", "choose", "encode", "keep", "rest")
"""In the order of a turn: a broadcast is decoded and applied; the adapter is written into PEFT; the trainer is made,
fed and taken down around its steps; the adapter is read; what is sent is chosen and rounded; it is encoded; the site's
state is saved; and all else, checks above all."""


@dataclass(eq=False)
class Stopwatch:
    """Seconds by stage: of the processor, all threads of this process, and by the clock."""

    seconds: dict[str, float] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Count what happens meanwhile for this stage."""
        self._turn_over()
        self.open.append(stage)
        try:
            yield
        finally:
            self._turn_over()
            self.open.pop()

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for this stage."""

        @wraps(function)
        def counted(*positional: object, **named: object) -> Any:  # noqa: ANN401 (whatever the function returns)
            with self.during(stage):
                return function(*positional, **named)

        return counted

    def _turn_over(self) -> None:
        now = time.process_time(), time.perf_counter()
        if self.open:
            stage = self.open[-1]
            for counted, end, begun in zip((self.seconds, self.clock), now, self.since, strict=True):
                counted[stage] = counted.get(stage, 0.0) + end - begun
        self.since = now


WATCHED = (
    ("write", peft_bridge, "configure"),
    ("write", peft_bridge, "write_adapter"),
    ("write", peft_bridge, "set_frozen"),
    ("write", peft_bridge, "set_trainable"),
    ("read", peft_bridge, "read_adapter"),
    ("trainer", training, "_fit"),
    ("encode", draft, "encode"),
    (STEPS, torch.Tensor, "backward"),
    (STEPS, torch.optim.AdamW, "step"),
    (STEPS, torch.nn.utils, "clip_grad_norm_"),
)
"""Stage, and the function as its caller finds it."""


@contextmanager
def watch_turn(watch: Stopwatch, model: torch.nn.Module) -> Iterator[None]:
    """Have the stages of turns on this model counted."""
    with ExitStack() as stack:
        for stage, owner, name in WATCHED:
            stack.enter_context(patch.object(owner, name, watch.around(stage, getattr(owner, name))))
        # The forward pass of the object itself, so that nothing of the model's class changes.
        stack.enter_context(patch.object(model, "forward", watch.around(STEPS, model.forward)))
        yield


def watch_method(watch: Stopwatch, method: Method) -> Method:
    """The method, its choosing counted."""
    return replace(method, compress=watch.around("choose", method.compress))
