"""What there is to know of a configuration's key, said once: on its dataclass field.

    @dataclass
    class Training:
        lr: float = setting(5e-5, ANY, paper="§4.3")
        micro_tokens: int = setting(4096, SOME, counts=False)

Ranges, fingerprints, the keys that may differ between equal runs, a pack's choices and the names of a sweep's folders
derive from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, get_type_hints

from elmd.errors import ConfigError

_METADATA = "elmd"


@dataclass(frozen=True)
class Range:
    """Numbers that a key may have: from `least` to `most`, without these where `above` or `below`."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    times: int = 1  # a multiple of it

    def __contains__(self, value: float) -> bool:
        # Written so that NaN is outside.
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (self.times == 1 or value % self.times == 0)

    def __str__(self) -> str:
        if self.times > 1:
            return f"a multiple of {self.times}"
        low = f"more than {self.least}" if self.above else f"{self.least}"
        if self.most == math.inf:
            return low if self.above else f"{low} or more"
        return f"{low} to {'less than ' if self.below else ''}{self.most}"


ANY, SOME, POSITIVE = Range(0), Range(1), Range(0, above=True)
SHARE, DROPOUT = Range(0, 1), Range(0, 1, below=True)


@dataclass(frozen=True)
class KeyInfo:
    """What a field says of its key.

    Attributes:
        range: of a number; None: any value of its type.
        counts: whether it can change a result. Otherwise it says how a stage runs (speed, memory, names), is no part of
            any fingerprint, and may differ between runs that are compared.
        place: it is a path, and what lies there counts (see `Inputs.files`), not where.
        named: a place that names a sweep's job, as jobs may differ in it.
        packed: a trained model's replies depend on it after training, so a pack keeps it.
        paper: the paper's section that its default is from; empty: the default is ours.
        when: whether it is read at all, by the whole configuration; a key that is not read has no range and does not
            count.
    """

    range: Range | None = None
    counts: bool = True
    place: bool = False
    named: bool = False
    packed: bool = False
    paper: str = ""
    when: Callable[[Any], bool] = lambda config: True


_PLAIN = KeyInfo()


def setting(default: Any = MISSING, range: Range | None = None, **info: Any) -> Any:
    """A field with a description of its key.

    Args:
        default: a value, or a function that makes it (`list`).
        range, info: see `KeyInfo`.
    """
    metadata = {_METADATA: KeyInfo(range, **info)}
    if default is MISSING:
        return field(metadata=metadata)
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def described(schema: type, prefix: str = "") -> Iterator[tuple[str, KeyInfo]]:
    """Every key below a dataclass, dotted, with what its field says of it."""
    types = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(types[item.name]):
            yield from described(types[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item.metadata.get(_METADATA, _PLAIN)


def expand(schema: type, names: Iterable[str]) -> dict[str, KeyInfo]:
    """Each of `names`, and for the name of a group each key of the group.

    Raises:
        KeyError: there is no such key or group.
    """
    every = dict(described(schema))
    chosen: dict[str, KeyInfo] = {}
    for name in names:
        members = {name: every[name]} if name in every else {k: v for k, v in every.items() if k.startswith(name + ".")}
        if not members:
            raise KeyError(name)
        chosen |= members
    return chosen


def plain(config: Any) -> dict[str, Any]:
    """A configuration, or a group of it, as JSON-ready values."""
    return asdict(config, dict_factory=lambda items: {name: _json(value) for name, value in items})


def _json(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def counted(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """The values, JSON-ready and by dotted key, of those of `names` (see `expand`) that can change a result."""
    return {
        name: _json(attrgetter(name)(config))
        for name, info in expand(type(config), names).items()
        if info.counts and not info.place and info.when(config)
    }


def check_ranges(config: Any) -> None:
    """
    Raises:
        ConfigError: naming a number that is out of its range, and the range.
    """
    for name, info in described(type(config)):
        value = attrgetter(name)(config)
        if info.range is None or value is None or not info.when(config):
            continue
        if value not in info.range:
            raise ConfigError(f"{value} is out of range", where=name, fix=f"use {info.range}")


class View:
    """A configuration that shows only the keys that a stage has declared, and those that count for nothing.

    Properties of the configuration are computed from what is shown.

    Args:
        shown: dotted names.
    """

    def __init__(self, config: Any, shown: frozenset[str], prefix: str = ""):
        self.__dict__.update(_config=config, _shown=shown, _prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        config = self._config
        if isinstance(derived := getattr(type(config), name, None), property):
            return derived.__get__(self)
        value, dotted = getattr(config, name), self._prefix + name
        if is_dataclass(value):
            return View(value, self._shown, dotted + ".")
        if dotted not in self._shown:
            raise AttributeError(f"the stage reads {dotted}, which its inputs do not declare")
        return value
