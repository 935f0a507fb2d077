"""Federated LoRA fine-tuning that counts every byte it sends.

The names below are loaded when they are first used, so that `import fedloom` costs nothing.
"""

from importlib import import_module

_HOMES = {
    "FedloomError": "errors",
    "Job": "rounds",
    "LoraPair": "lora",
    "LoraState": "lora",
    "METHODS": "methods",
    "Message": "wire",
    "Method": "method",
    "State": "method",
    "build": "methods",
    "client_turn": "rounds",
    "decode": "wire",
    "encode": "wire",
    "replace": "method",
    "server_turn": "rounds",
    "start": "rounds",
}
"""Public name → the module that defines it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
    return getattr(import_module(f"fedloom.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
