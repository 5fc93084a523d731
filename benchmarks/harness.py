"""How every benchmark runs: all ways give equal results, then take turns; medians, spread and ratios are shown."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Way:
    """One way to do the work of a case.

    Attributes:
        run: does it once; what it returns must equal what the case's other ways return.
        facts: what else there is to say of it (peak bytes, share of padding), by name; called once, not timed.
        before: what must be done before each run and is not timed.
        same: False where its results cannot be compared (other random numbers); the case says so.
    """

    name: str
    run: Callable[[], Any]
    facts: Callable[[], Mapping[str, float]] = dict
    before: Callable[[], Any] = lambda: None
    same: bool = True


@dataclass(frozen=True)
class Case:
    """The same work, done in several ways; the first is ELMD's.

    Attributes:
        title: one line: what is done.
        size: the sizes and the data, in words.
        tolerance: how far two tensors may be apart, as a share of the other's norm; anything else must be equal.
            None: the ways do not compute the same thing, and `note` says why they are shown side by side.
        reference: False where the ways are things of their own, none of which the others are held against: no ratios.
        per: how many units of work (`unit`) a run does, where a rate says more than seconds.
    """

    title: str
    size: str
    ways: Sequence[Way]
    tolerance: float | None = 1e-4
    note: str = ""
    per: float = 1
    unit: str = ""
    reference: bool = True


@dataclass
class Timing:
    """What was measured of one way.

    Attributes:
        seconds: of each round.
        ratio: median, least and most of this way's seconds over ELMD's in the same round: over 1, ELMD is faster.
            Empty in a case without reference.
    """

    way: str
    seconds: list[float]
    ratio: tuple[float, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Measured:
    """A case with its timings."""

    title: str
    size: str
    note: str
    per: float
    unit: str
    apart: float | None
    timings: list[Timing]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def markdown(self) -> str:
        """A table that begins with its title."""
        names = list(dict.fromkeys(name for timing in self.timings for name in timing.facts))
        rate = [f"{self.unit}/s"] if self.unit else []
        ratio = ["× elmd"] if self.timings[0].ratio else []
        head = ["way", "median, ms", "least – most", *ratio, *rate, *names]
        lines = [
            f"**{self.title}**. {self.size}",
            "",
            f"| {' | '.join(head)} |",
            "|---" + "|---:" * (len(head) - 1) + "|",
        ]
        for timing in self.timings:
            ms = [1000 * one for one in timing.seconds]
            cells = [timing.way, f"{1000 * timing.median:.4g}", f"{min(ms):.4g} – {max(ms):.4g}"]
            if timing.ratio:
                middle, low, high = timing.ratio
                cells.append("1" if timing is self.timings[0] else f"{middle:.2f} ({low:.2f} – {high:.2f})")
            cells += [f"{self.per / timing.median:.4g}"] if rate else []
            cells += [f"{timing.facts[name]:.4g}" if name in timing.facts else "–" for name in names]
            lines.append(f"| {' | '.join(cells)} |")
        agree = {None: "", 0.0: "Results are equal."}.get(
            self.apart, f"Results differ by at most {self.apart or 0:.1e}."
        )
        remarks = [agree, self.note]
        return "\n".join([*lines, *(["", " ".join(filter(None, remarks))] if any(remarks) else [])])


class Unequal(AssertionError):
    """Two ways of one case do not give the same."""


def measure(case: Case, rounds: int) -> Measured:
    """Show that the ways agree (which also warms them up), then time them in turn, `rounds` times each.

    Raises:
        Unequal: they don't.
    """
    # What was imported stays: looking through it takes half a second after transformers, in each collection.
    gc.collect()
    gc.freeze()
    found = []
    for way in case.ways:
        way.before()
        found.append(way.run())
    apart = None
    if case.tolerance is not None:
        apart = 0.0
        for way, one in zip(case.ways[1:], found[1:], strict=True):
            if not way.same:
                continue
            apart = max(apart, _apart(one, found[0], f"{case.title}: {way.name} against {case.ways[0].name}"))
            if apart > case.tolerance:
                raise Unequal(f"{case.title}: {way.name} and {case.ways[0].name} differ by {apart:.1e}")
    del found
    timings = [Timing(way.name, []) for way in case.ways]
    for i in range(rounds):
        turns = list(zip(case.ways, timings, strict=True))
        for way, timing in turns if i % 2 else reversed(turns):
            way.before()
            gc.collect()
            started = time.perf_counter()
            way.run()
            timing.seconds.append(time.perf_counter() - started)
    for way, timing in zip(case.ways, timings, strict=True):
        if case.reference:
            ratios = [mine / ours for mine, ours in zip(timing.seconds, timings[0].seconds, strict=True)]
            timing.ratio = statistics.median(ratios), min(ratios), max(ratios)
        timing.facts = dict(way.facts())
    return Measured(case.title, case.size, case.note, case.per, case.unit, apart, timings)


def _apart(one: Any, other: Any, what: str) -> float:
    """How far two results are apart: numbers, tensors by norm; all else is equal or is an error."""
    if isinstance(one, float):
        one, other = (torch.tensor(x, dtype=torch.float64) for x in (one, other))
    if isinstance(one, Tensor) and one.is_floating_point():
        if one.shape != other.shape:
            raise Unequal(f"{what}: shapes {tuple(one.shape)} and {tuple(other.shape)}")
        apart = ((one - other).norm() / other.norm().clamp_min(1e-30)).item()
        if not math.isfinite(apart):  # NaN would be larger than no tolerance
            raise Unequal(f"{what}: values that are not finite")
        return apart
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            raise Unequal(f"{what}: {sorted(one)} and {sorted(other)}")
        return max((_apart(one[key], other[key], f"{what}, {key}") for key in one), default=0.0)
    if isinstance(one, Iterable) and not isinstance(one, str | bytes | Tensor):
        one, other = list(one), list(other)
        if len(one) != len(other):
            raise Unequal(f"{what}: {len(one)} and {len(other)} values")
        return max((_apart(a, b, what) for a, b in zip(one, other, strict=True)), default=0.0)
    equal = one.equal(other) if isinstance(one, Tensor) else one == other
    if not equal:
        raise Unequal(f"{what}: {one!r} and {other!r}")
    return 0.0
