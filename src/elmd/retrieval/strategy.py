"""How the candidates of a query are ranked: a strategy is one function and one entry of `STRATEGIES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from elmd.retrieval.index import Index, Queries
from elmd.retrieval.search import Neighbours, nearest, nearly_nearest


@dataclass(frozen=True)
class Settings:
    """How demonstrations are retrieved.

    Attributes:
        key: which vectors are compared, `e_u` or `E_s`.
        k: demonstrations of a sample.
        allow_same_dialogue: see `Index.admissible`.
        approximately: search by FAISS, which may miss some of the nearest (see `search.nearly_nearest`).
        strategy: a name in `STRATEGIES`.
    """

    key: str
    k: int = 1
    allow_same_dialogue: bool = False
    approximately: bool = False
    strategy: str = "semantic"


class Strategy(Protocol):
    """Ranks candidates.

    Whatever it ranks by, it returns k candidates of each query, best first; none of those that `Index.admissible`
    excludes; of ties the candidate that stands first. `similarity` is the cosine of `settings.key`.
    """

    def __call__(self, index: Index, queries: Queries, settings: Settings) -> Neighbours: ...


def semantic(index: Index, queries: Queries, settings: Settings) -> Neighbours:
    """The nearest by cosine of `settings.key` (§3.3 end).

    Raises:
        DataError: see `Index.admissible`.
        ConfigError: `settings.approximately`, and FAISS is not installed.
    """
    search = nearly_nearest if settings.approximately else nearest
    admissible = index.admissible(settings.key, queries, settings.k, allow_same_dialogue=settings.allow_same_dialogue)
    return search(*admissible, settings.k)


STRATEGIES: dict[str, Strategy] = {"semantic": semantic}
