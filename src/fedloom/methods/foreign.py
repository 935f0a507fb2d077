"""Methods of other packages, by a name such as "mypackage.halves:halves": a module, and the builder in it.

A builder is a function whose named arguments are the method's settings, typed and with defaults, and which returns a
`Method`. To load one is to run its module's code: a site does so only where its policy lists the very name.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import get_type_hints

from fedloom.errors import ConfigError
from fedloom.methods.method import Method

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def is_foreign(name: str) -> bool:
    """Whether a method's name means code outside fedloom, "package.module:builder"."""
    return ":" in name


def load_builder(name: str) -> Callable[..., Method]:
    """The builder called "package.module:builder".

    Raises ConfigError that says which part of the name leads nowhere, or why what is there cannot be a builder.
    """
    path, _, attribute = name.partition(":")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in path.split("."))):
        raise ConfigError(
            f'method.name is {name!r}: expected "package.module:builder", such as "mypackage.halves:halves"'
        )
    module = import_named(path, f"method.name is {name!r}", " (A preset of a method goes into method.preset.)")
    builder = getattr(module, attribute, None)
    if builder is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"method.name is {name!r}, but module {path} has no {attribute!r}{hint}")
    if not inspect.isroutine(builder) and not hasattr(builder, "func"):  # a function, or a functools.partial of one
        raise ConfigError(f"method.name is {name!r}, but {attribute} is not a function that builds a Method")
    for key, parameter in inspect.signature(builder).parameters.items():
        if parameter.kind in _OPEN:
            raise ConfigError(f"method.name is {name!r}, but {attribute} takes *{key}: give every setting a name")
    try:
        get_type_hints(getattr(builder, "func", builder))
    except NameError as error:
        raise ConfigError(
            f"method.name is {name!r}, but the types of {attribute}'s arguments cannot be read: {error}; import what "
            "they name at the top of the module, not for type checkers only"
        ) from error
    found: Callable[..., Method] = builder
    return found


def import_named(path: str, where: str, hint: str = "") -> ModuleType:
    """The module `path` that a setting names. where: the setting and its value, as an error begins; hint: its end.

    Raises ConfigError. What goes wrong inside the module is told in one line, with the error's own text.
    """
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        # Either the named module is not there, or it is and imports one that is not.
        own = error.name is not None and (path == error.name or path.startswith(f"{error.name}."))
        lacks = f"there is no module {error.name!r}" if own else f"its module needs {error.name!r}, which is missing"
        raise ConfigError(
            f"{where}, but {lacks}: install it in {sys.prefix}, or put its folder on PYTHONPATH.{hint}"
        ) from error
    except Exception as error:  # whatever a module does while it is imported
        raise ConfigError(f"{where}, but importing {path} failed: {type(error).__name__}: {error}") from error
