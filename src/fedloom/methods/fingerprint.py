"""What tells one `Method` value from another of the same name: its functions and what is bound in them.

A method that a name stands for is known by its settings. A value has none that could be written down, and yet a run
must not go on with `halves(keep=0.5)` where it began with `halves(keep=0.25)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Set
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType

from torch import Tensor

from fedloom.methods.method import Method


def fingerprint(method: Method) -> str:
    """32 hex digits that differ where a setting, a function's code or a value bound in a function differs.

    It sees arguments of `partial`, closures, defaults and fields of dataclasses; what a function reads from its
    module's globals it knows by name only. Another version of Python may give another fingerprint.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for piece in _pieces(method, frozenset()):
        hasher.update(piece.encode(errors="surrogatepass") + b"\x00")
    return hasher.hexdigest()


def _pieces(value: object, above: Set[int]) -> Iterator[str]:
    """The value in words, in an order that depends on nothing else. above: ids of what contains it."""
    if id(value) in above:  # a function whose closure holds itself
        yield "again"
        return
    yield type(value).__qualname__
    if isinstance(value, Tensor):
        content = hashlib.blake2b(value.detach().cpu().contiguous().view(-1).double().numpy().tobytes())
        yield f"{tuple(value.shape)} {value.dtype} {content.hexdigest()}"
        return
    parts = _parts(value)
    if parts is None:
        yield repr(value) if isinstance(value, str | bytes | int | float | complex | bool | None) else ""
        return
    for part in parts:
        yield from _pieces(part, above | {id(value)})


def _parts(value: object) -> list[object] | None:
    """What the value consists of; None for what has no parts."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, *cells]
    if isinstance(value, CodeType):
        return [value.co_code, *value.co_names, *value.co_consts]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=repr) for part in (key, value[key])]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, type | BuiltinFunctionType):
        return [value.__module__, value.__qualname__]
    # Of other objects those that can be called are looked into: a model that a closure holds would take minutes.
    return [vars(value)] if callable(value) and hasattr(value, "__dict__") else None
