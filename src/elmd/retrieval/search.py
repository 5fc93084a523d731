"""Nearest candidates by cosine: exactly, or approximately through FAISS.

N candidates, Q queries, unit rows. A cosine is computed in double precision and rounded to fp32, which absorbs the
rounding error of double: equal vectors tie, and how queries fall into blocks changes nothing (but for a cosine that
lies within some 1e-15 of the middle between two fp32 numbers). Of ties the candidate that stands first wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmd.errors import ConfigError

#: Cosines of a block of queries with all candidates (64 MiB in fp32), and candidates converted to double at a time.
_BLOCK, _CONVERTED = 1 << 24, 2048
#: Queries that FAISS is asked for at a time, and numbers of their candidates compared again (32 MiB in double).
_ASKED, _NUMBERS = 512, 1 << 22
#: HNSW: neighbours in the graph, and how many are followed while it is built and while it is searched.
_LINKS, _BUILD, _FOLLOW = 32, 80, 128


class Neighbours(NamedTuple):
    """The k nearest candidates of each query, nearest first: positions [Q, k] and cosines [Q, k] in fp32."""

    positions: Tensor
    similarity: Tensor


class Pairs(NamedTuple):
    """Pairs of query and candidate, each once: rows [P], ascending, and columns [P]."""

    rows: Tensor
    columns: Tensor

    def of(self, start: int, stop: int) -> Pairs:
        """Those of the queries from `start` to before `stop`, counted from `start`."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        return Pairs(self.rows[first:last] - start, self.columns[first:last])

    def among(self, chosen: Tensor) -> Pairs:
        """Those of the queries at `chosen` [C], ascending, counted by their place in it."""
        kept = torch.isin(self.rows, chosen)
        return Pairs(torch.searchsorted(chosen, self.rows[kept]), self.columns[kept])


def nearest(candidates: Tensor, queries: Tensor, excluded: Pairs, k: int) -> Neighbours:
    """The k nearest candidates of each query.

    Args:
        candidates: [N, width] in fp32.
        queries: [Q, width] in double.
        excluded: pairs that must not be returned. Every query has at least k candidates left.
        k: how many.
    """
    blocks = [first_largest(cosines, k) for cosines in admissible_cosines(candidates, queries, excluded)]
    return Neighbours(*(torch.cat(column) for column in zip(*blocks, strict=True)))


def admissible_cosines(candidates: Tensor, queries: Tensor, excluded: Pairs) -> Iterator[Tensor]:
    """Block after block of queries, their cosines with all candidates [q, N] in fp32; -inf where excluded.

    Args:
        candidates, queries, excluded: see `nearest`.
    """
    step = max(1, _BLOCK // len(candidates))
    for start in range(0, len(queries), step):
        block, own = queries[start : start + step], excluded.of(start, start + step)
        cosines = torch.empty(len(block), len(candidates))  # [q, N]
        for first in range(0, len(candidates), _CONVERTED):
            part = candidates[first : first + _CONVERTED].double()  # [n, width]
            cosines[:, first : first + len(part)] = block @ part.T
        cosines[own.rows, own.columns] = -torch.inf
        yield cosines


def first_largest(scores: Tensor, k: int) -> Neighbours:
    """The k largest of each row of `scores` [q, N], of equal ones the first; `scores` is overwritten."""
    similarity, positions = [], []
    for _ in range(k):  # k maxima cost less than a sort; of equal ones max gives the first, which topk does not promise
        best, place = scores.max(dim=1, keepdim=True)  # [q, 1]
        similarity.append(best)
        positions.append(place)
        scores.scatter_(1, place, -torch.inf)
    return Neighbours(torch.cat(positions, dim=1), torch.cat(similarity, dim=1))


def nearly_nearest(candidates: Tensor, queries: Tensor, excluded: Pairs, k: int) -> Neighbours:
    """k near candidates of each query, mostly the nearest: FAISS's HNSW graph (Malkov and Yashunin, 2018).

    The graph cannot exclude candidates, so it is asked for as many more as a query has excluded ones; a query that is
    left with fewer than k is searched exactly. Cosines and ties are those of `nearest`. With more than one thread the
    graph, and so the result, may vary from run to run.

    Args:
        candidates, queries, excluded, k: see `nearest`.

    Raises:
        ConfigError: FAISS is not installed.
    """
    graph = hnsw(candidates.shape[1])
    load_faiss().omp_set_num_threads(torch.get_num_threads())
    graph.add(candidates.numpy())
    own = excluded.rows.bincount(minlength=len(queries))  # [Q]: how many candidates each query excludes
    result = Neighbours(torch.zeros(len(queries), k, dtype=torch.long), torch.zeros(len(queries), k))
    for chosen in own.argsort(stable=True).split(_ASKED):  # similar numbers together, so that few ask for many
        chosen = chosen.sort().values  # [q]
        asked = min(k + int(own[chosen].max()), len(candidates))
        graph.hnsw.efSearch = max(_FOLLOW, asked)
        _, labels = graph.search(queries[chosen].float().numpy(), asked)
        columns = torch.from_numpy(labels).sort(dim=1).values  # [q, asked], -1 where the graph gave fewer
        allowed = (columns >= 0) & ~_contains(excluded.among(chosen), columns, len(candidates))
        cosines = _cosines(candidates, queries[chosen], columns.clamp(min=0)).masked_fill(~allowed, -torch.inf)
        best = first_largest(cosines, k)
        result.positions[chosen], result.similarity[chosen] = columns.gather(1, best.positions), best.similarity
        if (short := chosen[allowed.sum(dim=1) < k]).numel():
            exact = nearest(candidates, queries[short], excluded.among(short), k)
            result.positions[short], result.similarity[short] = exact
    return result


def _contains(pairs: Pairs, columns: Tensor, candidates: int) -> Tensor:
    """Whether query i and candidate `columns[i, j]` are one of the pairs, [q, m]."""
    rows = torch.arange(len(columns))[:, None]
    return torch.isin(rows * candidates + columns, pairs.rows * candidates + pairs.columns)


def _cosines(candidates: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
    """Of each query [q, width] with its own candidates at `columns` [q, m]: [q, m] in fp32."""
    step = max(1, _NUMBERS // (columns.shape[1] * queries.shape[1]))
    parts = zip(queries.split(step), columns.split(step), strict=True)
    return torch.cat([(candidates[place].double() @ query[:, :, None])[..., 0].float() for query, place in parts])


def hnsw(width: int) -> Any:
    """An empty graph of FAISS for unit vectors of this width.

    Raises:
        ConfigError: FAISS is not installed.
    """
    faiss = load_faiss()
    graph = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = _BUILD, _FOLLOW
    return graph


def load_faiss() -> Any:
    """The module `faiss`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "FAISS is not installed",
            where="retriever.search",
            fix="pip install 'elmd[faiss]', or set retriever.search=exact",
        ) from error
    return faiss
