"""What fields say of their keys: ranges, what counts, and the view that a stage has of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from elmd.engine.keys import SOME, Range, check_ranges, counted, described, expand, plain, setting
from elmd.engine.stage import Inputs
from elmd.errors import ConfigError


class Kind(Enum):
    plain = "plain"
    fancy = "fancy"


@dataclass
class Group:
    steps: int = setting(3, SOME, paper="§1")
    width: int = setting(0, SOME, when=lambda config: config.fancy)
    workers: int = setting(1, counts=False)
    path: str | None = setting(None, place=True)
    words: list[str] = setting(list)
    kind: Kind = Kind.plain


@dataclass
class Settings:
    seed: int = 0
    group: Group = field(default_factory=Group)

    @property
    def fancy(self) -> bool:
        return self.group.kind is Kind.fancy


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(1), [1, 9.5], [0, float("nan")], "1 or more"),
        (Range(0, above=True), [1e-9], [0, -1, float("nan")], "more than 0"),
        (Range(0, 1, below=True), [0, 0.99], [1, -0.1], "0 to less than 1"),
        (Range(0, 1, above=True), [0.1, 1], [0, 1.1], "more than 0 to 1"),
        (Range(64, times=64), [64, 128], [0, 96], "a multiple of 64"),
    ],
)
def test_ranges(allowed: Range, inside: list[float], outside: list[float], text: str) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == text


def test_a_number_out_of_its_range_is_refused_where_it_is_read() -> None:
    check_ranges(Settings())  # width is 0, and nothing reads it
    with pytest.raises(ConfigError, match=r"^group\.steps: 0 is out of range; use 1 or more\.$"):
        check_ranges(Settings(group=Group(steps=0)))
    with pytest.raises(ConfigError, match=r"^group\.width: 0 is out of range; use 1 or more\.$"):
        check_ranges(Settings(group=Group(kind=Kind.fancy)))


def test_keys_are_described_once_and_groups_stand_for_theirs() -> None:
    keys = dict(described(Settings))
    assert list(keys) == [
        "seed", "group.steps", "group.width", "group.workers", "group.path", "group.words", "group.kind"
    ]  # fmt: skip
    assert keys["group.steps"].paper == "§1"
    assert list(expand(Settings, ["group", "seed"])) == [*list(keys)[1:], "seed"]
    with pytest.raises(KeyError):
        expand(Settings, ["gruop"])


def test_what_counts_is_what_can_change_a_result() -> None:
    settings = Settings(group=Group(path="/somewhere", workers=7))
    assert counted(settings, ["group"]) == {"group.steps": 3, "group.words": [], "group.kind": "plain"}
    settings.group.kind = Kind.fancy
    assert counted(settings, ["group.width", "seed"]) == {"group.width": 0, "seed": 0}
    assert plain(settings)["group"]["kind"] == "fancy"


def read(view: Any, name: str) -> Any:
    for part in name.split("."):
        view = getattr(view, part)
    return view


def test_a_view_shows_what_is_declared_and_what_does_not_count_and_no_more() -> None:
    settings = Settings(seed=5)
    view = Inputs(keys=("group.steps", "group.kind")).view(settings)
    assert [read(view, name) for name in ("group.steps", "group.kind", "group.workers")] == [3, Kind.plain, 1]
    assert view.fancy is False, "a property is computed from what is declared"
    for name in ("seed", "group.width", "group.path"):
        with pytest.raises(AttributeError, match=f"the stage reads {name}, which its inputs do not declare"):
            read(view, name)
    with pytest.raises(AttributeError, match=r"group\.kind"):
        _ = Inputs(keys=("group.steps",)).view(settings).fancy
