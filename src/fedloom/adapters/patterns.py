r"""Module patterns with PEFT's meaning, matched in linear time: they come from strangers' files and from servers.

PEFT reads a key of rank_pattern or alpha_pattern as a regular expression for the end of a module's name, from a dot on,
and a target_modules string as one for the whole name. Python's engine takes exponential time for some expressions. Here
a plain name (words between dots) is compared as it stands, and everything else goes through RE2, which has no such
expressions. RE2 has no lookaround and no backreferences, and knows letters and digits of ASCII alone in \w and \d.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import re2

from fedloom.errors import ConfigError

LONGEST = 200
"""Characters of a pattern that is more than a name. Those in use are shorter, and a match takes time in proportion."""
MOST = 64
"""Patterns in one mapping that are more than names, for the same reason. Names may be as many as there are modules."""
_MEMORY = 2**17
"""Bytes that RE2 may use for one pattern: ample for 200 characters, too little for counts such as (x{1000})."""
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII)
_TOKEN = re.compile(r"\\(?:[^\W_]|$)|\\.|\[:|\{,|\(\?(?!:|P<)", re.ASCII | re.DOTALL)
_SHARED = frozenset(rf"\{letter}" for letter in "dDwWsSbB")
"""Escapes of letters and digits that Python and RE2 read alike."""
Value = TypeVar("Value")


class Patterns:
    """The keys of one rank_pattern or alpha_pattern, ready to be looked up.

    Raises ConfigError, which begins with `owner`, for a key that cannot be matched in linear time.
    """

    __slots__ = ("_names", "_others")

    def __init__(self, keys: Iterable[str], owner: str) -> None:
        places = {key: place for place, key in enumerate(keys)}
        self._names = {key: place for key, place in places.items() if is_name(key)}
        self._others = [(place, key) for key, place in places.items() if key not in self._names]
        if len(self._others) > MOST:
            raise ConfigError(
                f"{owner} holds {len(self._others)} patterns: expected at most {MOST}, beside plain names"
            )
        for _, key in self._others:
            _check(key, owner)

    def key(self, module: str) -> str | None:
        """The first key that matches the end of a module's name, as PEFT reads them; None if none does."""
        ends = [module, *(module[dot.end() :] for dot in re.finditer(r"\.", module))]
        hits = [(self._names[end], end) for end in ends if end in self._names]
        place, found = min(hits) if hits else (len(self._names) + len(self._others), None)
        return next((key for at, key in self._others if at < place and _compiled(key).matches_end(module)), found)


def matching_name(pattern: str, names: Iterable[str], owner: str) -> set[str]:
    """The names that a pattern matches as a whole. Raises ConfigError, as `Patterns` does."""
    if is_name(pattern):
        return {name for name in names if name == pattern}
    _check(pattern, owner)
    return {name for name in names if _compiled(pattern).matches_whole(name)}


def is_name(pattern: str) -> bool:
    """Whether a pattern is a plain name, such as q_proj or layers.0.q_proj."""
    return _NAME.fullmatch(pattern) is not None


def literal_pattern(module: str) -> str:
    """A pattern for PEFT that matches this module alone: its whole name, escaped, from its first character on."""
    return f"^{re.escape(module)}"


def spell_out(patterns: Mapping[str, Value], modules: Iterable[str]) -> dict[str, Value]:
    """The same values with names of modules in place of every pattern that is more than a name, for PEFT to read.

    Raises ConfigError as `Patterns` does.
    """
    table = Patterns(patterns, "a pattern mapping")
    chosen = [(module, table.key(module)) for module in modules]
    made: dict[str, Value] = {}
    for key, value in patterns.items():
        made |= {key: value} if is_name(key) else {module: value for module, found in chosen if found == key}
    return made


class _Compiled:
    """One pattern in RE2, for a whole name and for the end of one."""

    def __init__(self, pattern: str) -> None:
        options = re2.Options()
        options.max_mem = _MEMORY
        options.log_errors = False
        self._whole: Any = re2.compile(pattern, options)
        self._end: Any = re2.compile(rf"(?:.*\.)?(?:{pattern})", options)

    def matches_whole(self, name: str) -> bool:
        return self._whole.fullmatch(name) is not None

    def matches_end(self, name: str) -> bool:
        return self._end.fullmatch(name) is not None


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> _Compiled:
    return _Compiled(pattern)


def _check(pattern: str, owner: str) -> None:
    if len(pattern) > LONGEST:
        reason = f"it has {len(pattern)} characters, expected at most {LONGEST}"
    else:
        odd = next((token for token in _TOKEN.findall(pattern) if len(token) > 2 or _differs(token)), None)
        reason = f"{odd} is not supported" if odd else _complaint(pattern)
    if reason:
        raise ConfigError(
            f"{owner}: pattern {ascii(pattern[:LONGEST])} cannot be used: {reason}; give names of modules instead"
        )


def _differs(token: str) -> bool:
    """Whether Python and RE2 read this piece of a pattern differently; an escaped sign is the same to both."""
    return token not in _SHARED if token[1:].isalnum() or token == "\\" else token[0] != "\\"


def _complaint(pattern: str) -> str:
    """What RE2 says against a pattern; "" if nothing."""
    try:
        _compiled(pattern)
    except re2.error as error:
        told = error.args[0] if error.args else "it is not a regular expression"
        text = told.decode(errors="replace") if isinstance(told, bytes) else str(told)
        return ascii(text)[1:-1][:LONGEST]
    except UnicodeError:
        return "it is not valid text"
    return ""
