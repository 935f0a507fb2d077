"""How often a process of fedloom's own looks for garbage that only Python's collector finds.

torch and transformers are 700,000 objects, which the collector goes through ten times while they are imported and
again every few turns, 0.3 s each time. What must not outlive a training is collected at its end.
"""

from __future__ import annotations

import gc

_YOUNG, _MIDDLE, _OLD = 50_000, 20, 50
_USUAL = gc.get_threshold()


def collect_rarely() -> None:
    """From here on, collect after tens of thousands of new objects where it was hundreds; for whole programs alone."""
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)


def collect_as_usual() -> None:
    """As before that. For services, which stay for days: payloads must not wait for it among garbage."""
    gc.set_threshold(*_USUAL)
