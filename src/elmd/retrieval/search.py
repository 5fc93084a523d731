"""Nearest candidates by cosine: exactly, at the speed of single precision, or approximately through FAISS.

N candidates, Q queries, unit rows. What counts is the cosine as double precision gives it, rounded to fp32: it does not
depend on how queries fall into blocks, and equal vectors tie exactly; of ties the candidate that stands first wins.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmd.errors import ConfigError

#: Queries and candidates of a tile, whose products (4 MiB) stay in the cache.
_QUERIES, _CANDIDATES = 512, 2048
#: Candidates of a tile that share one maximum.
_GROUP = 16
#: Terms that one fp32 product sums up. Wider vectors are added up from several, which bounds the rounding error by
#: (128 + width / 128) u instead of width · u, and costs no time.
_TERMS = 128
#: A query that has more candidates than this within the rounding error (ties, above all) is searched in double.
_MOST = 256
#: Pairs times width that are computed again at a time (32 MiB in double).
_PAIRS = 1 << 22
#: HNSW: neighbours in the graph, and how many are followed while it is built and searched.
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

    Cosines are first computed in fp32. With u = 2⁻²⁴ and any order of summation, a sum of c products of unit vectors'
    components is off by at most c·u / (1 - c·u), a sum of m such sums by another m·u (Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd ed., §3.1), a query rounded to fp32 by u, and so is the result. Only candidates within
    twice that bound of the k-th nearest can be among the k nearest; those are computed again in double precision.

    Args:
        candidates: [N, width] in fp32.
        queries: [Q, width] in double.
        excluded: pairs that are not to be found. Every query has at least k candidates left.
        k: how many.
    """
    width = candidates.shape[1]
    sums = math.ceil(width / _TERMS)
    error = (min(width, _TERMS) + sums + 8) * 2**-24 * max(1.0, candidates.norm(dim=1).max().item())
    found = [
        _block(candidates, queries[start : start + _QUERIES], excluded.of(start, start + _QUERIES), k, error)
        for start in range(0, len(queries), _QUERIES)
    ]
    return Neighbours(*(torch.cat(column) for column in zip(*found, strict=True)))


def _block(candidates: Tensor, queries: Tensor, excluded: Pairs, k: int, error: float) -> Neighbours:
    """`nearest` of one block of queries, where fp32 is off by at most `error`."""
    single, count = queries.float(), len(queries)
    tile = torch.empty(count, _CANDIDATES)
    groups = tile.view(count, _GROUP, -1)
    # The k-th largest of the maxima of groups is at most the k-th largest cosine.
    best = torch.full((count, k), -torch.inf)
    least = torch.full((count, 1), torch.finfo().min)
    held = torch.zeros(count, dtype=torch.long)
    rows, columns, values = [], [], []
    for start in range(0, len(candidates), _CANDIDATES):
        part = candidates[start : start + _CANDIDATES]
        _product(single, part, out=tile[:, : len(part)])
        tile[:, len(part) :] = -torch.inf
        here = (excluded.columns >= start) & (excluded.columns < start + len(part))
        tile[excluded.rows[here], excluded.columns[here] - start] = -torch.inf
        maxima = groups.amax(dim=1)
        best = torch.cat([best, maxima], dim=1).topk(k).values
        least = torch.maximum(least, best[:, -1:] - 2 * error)
        row, group = (maxima >= least).nonzero(as_tuple=True)
        several = groups[row, :, group]
        at, member = (several >= least[row]).nonzero(as_tuple=True)
        rows.append(row[at])
        columns.append(start + member * maxima.shape[1] + group[at])
        values.append(several[at, member])
        held += row[at].bincount(minlength=count)
        least[held > _MOST] = torch.inf  # nothing more of these is held
    row, column, value = torch.cat(rows), torch.cat(columns), torch.cat(values)
    kept = value >= least[row, 0]  # the bound has risen since the first tiles; it is infinite where too many were held
    result = _nearest_of(candidates, queries, Pairs(row[kept], column[kept]), k)
    if (many := (held > _MOST).nonzero()[:, 0]).numel():
        double = _in_double(candidates, queries[many], excluded.among(many), k)
        result.positions[many], result.similarity[many] = double
    return result


def _product(queries: Tensor, candidates: Tensor, out: Tensor) -> None:
    """queries @ candidates.T in fp32, summed up from products of `_TERMS` columns."""
    for start in range(0, queries.shape[1], _TERMS):
        span = slice(start, start + _TERMS)
        torch.addmm(out, queries[:, span], candidates[:, span].T, beta=int(start > 0), out=out)


def _nearest_of(candidates: Tensor, queries: Tensor, pairs: Pairs, k: int) -> Neighbours:
    """The k nearest among `pairs`, which may come in any order; 0 where a query has fewer than k."""
    step = max(1, _PAIRS // candidates.shape[1])
    similarity = torch.cat(
        [
            (queries[row] * candidates[column]).sum(dim=1).float()
            for row, column in zip(pairs.rows.split(step), pairs.columns.split(step), strict=True)
        ]
    )
    order = pairs.columns.argsort()
    order = order[similarity[order].argsort(descending=True, stable=True)]
    order = order[pairs.rows[order].argsort(stable=True)]
    row = pairs.rows[order]
    rank = torch.arange(len(row)) - torch.searchsorted(row, row)
    order, row, rank = order[rank < k], row[rank < k], rank[rank < k]
    found = Neighbours(torch.zeros(len(queries), k, dtype=torch.long), torch.zeros(len(queries), k))
    found.positions[row, rank], found.similarity[row, rank] = pairs.columns[order], similarity[order]
    return found


def _in_double(candidates: Tensor, queries: Tensor, excluded: Pairs, k: int) -> Neighbours:
    """`nearest` without a short cut."""
    similarity = torch.full((len(queries), k), -torch.inf)
    positions = torch.zeros(len(queries), k, dtype=torch.long)
    for start in range(0, len(candidates), _CANDIDATES):
        part = candidates[start : start + _CANDIDATES]
        tile = (queries @ part.double().T).float()
        here = (excluded.columns >= start) & (excluded.columns < start + len(part))
        tile[excluded.rows[here], excluded.columns[here] - start] = -torch.inf
        both = torch.cat([similarity, tile], dim=1)
        places = torch.cat([positions, torch.arange(start, start + len(part)).expand(len(queries), -1)], dim=1)
        for rank in range(k):  # k maxima cost less than a sort; of equal ones max gives the first, as ties are to go
            best, at = both.max(dim=1, keepdim=True)
            similarity[:, rank : rank + 1], positions[:, rank : rank + 1] = best, places.gather(1, at)
            both.scatter_(1, at, -torch.inf)
    return Neighbours(positions, similarity)


def nearly_nearest(candidates: Tensor, queries: Tensor, excluded: Pairs, k: int) -> Neighbours:
    """What FAISS's HNSW graph (Malkov and Yashunin, 2018) finds: k near candidates of each query, mostly the nearest.

    The graph knows nothing of exclusions, so as many more are asked for as a query has; where fewer than k are left,
    the query is searched exactly. Cosines are those of `nearest`. With several threads the graph, and so what is
    found, may vary from run to run.

    Args:
        candidates, queries, excluded, k: see `nearest`.

    Raises:
        ConfigError: FAISS is not installed.
    """
    graph = hnsw(candidates.shape[1])
    load_faiss().omp_set_num_threads(torch.get_num_threads())
    graph.add(candidates.numpy())
    shut_out = excluded.rows.bincount(minlength=len(queries))
    result = Neighbours(torch.zeros(len(queries), k, dtype=torch.long), torch.zeros(len(queries), k))
    for chosen in shut_out.argsort(stable=True).split(_QUERIES):  # like numbers together, so that few ask for many
        chosen = chosen.sort().values
        more = k + int(shut_out[chosen].max())
        graph.hnsw.efSearch = max(_FOLLOW, more)
        _, labels = graph.search(queries[chosen].float().numpy(), min(more, len(candidates)))
        columns = torch.from_numpy(labels)
        rows = torch.arange(len(chosen))[:, None].expand_as(columns)
        own = excluded.among(chosen)
        allowed = (columns >= 0) & ~torch.isin(
            rows * len(candidates) + columns, own.rows * len(candidates) + own.columns
        )
        some = _nearest_of(candidates, queries[chosen], Pairs(rows[allowed], columns[allowed]), k)
        result.positions[chosen], result.similarity[chosen] = some
        if (short := chosen[allowed.sum(dim=1) < k]).numel():
            exactly = nearest(candidates, queries[short], excluded.among(short), k)
            result.positions[short], result.similarity[short] = exactly
    return result


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
