"""Neighbours among 1e3 … 1e6 candidates: ELMD's search, plain products and FAISS's indices with their recall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import faiss
import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Way
from elmd.retrieval.nearest import Neighbours, Pairs, hnsw, nearest

NONE = Pairs(*torch.zeros(2, 0, dtype=torch.long))
#: Candidates and width: s · d with m3e-base (768 wide) and with the tiny retriever, and the latter's e_u where many.
SIZES = [(1_000, 3072), (10_000, 3072), (100_000, 512), (1_000_000, 128)]
#: How many of IVF's lists are searched.
PROBED = 16


def cases(small: bool) -> Iterator[Case]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    if trained := sorted(Path("runs/index").glob("*/index.safetensors")):
        for key, rows in load_file(trained[-1]).items():
            yield from compared(
                rows[::2].contiguous(), rows[1::2].contiguous(), f"halves of {key} of {trained[-1].parent}"
            )
    for count, width in [(300, 16)] if small else SIZES:
        if psutil.virtual_memory().available < 6 * 4 * count * width + 2**31:
            continue  # the candidates, in double too, a copy in each of FAISS's indices; and blocks of products
        rows = clustered(count + (50 if small else 1000), width)
        yield from compared(rows[:count], rows[count:], "made up around centres")


def clustered(count: int, width: int) -> Tensor:
    """Unit vectors [count, width]: 7 emotions, 300 topics and as much noise, less along each further direction."""
    draw = torch.Generator().manual_seed(0)
    emotions, topics = torch.randn(7, width, generator=draw), torch.randn(300, width, generator=draw)
    rows = torch.randn(count, width, generator=draw)
    rows += emotions[torch.randint(7, (count,), generator=draw)]
    rows += topics[torch.randint(300, (count,), generator=draw)]
    return F.normalize(rows.mul_(torch.arange(1, width + 1).rsqrt()), dim=-1)


def compared(candidates: Tensor, queries: Tensor, source: str) -> Iterator[Case]:
    """The exact ways, and those that are not."""
    (count, width), double = candidates.shape, queries.double()
    size = f"{count} candidates, {len(queries)} queries, width {width}; {source}"
    true = nearest(candidates, double, NONE, 1).similarity

    def ours() -> Neighbours:
        return nearest(candidates, double, NONE, 1)

    def product(dtype: torch.dtype) -> Neighbours:
        columns = candidates.to(dtype).T
        rows = max(1, 2**26 // count)  # of a block of products
        found = [(block.to(dtype) @ columns).float().topk(1) for block in queries.split(rows)]
        return Neighbours(torch.cat([one.indices for one in found]), torch.cat([one.values for one in found]))

    def way(name: str, run: Callable[[], Neighbours], **facts: float) -> Way:
        def told() -> Mapping[str, float]:
            # By the cosine: of equal candidates, any will do.
            found = (double * candidates[run().positions[:, 0]]).sum(dim=1, keepdim=True).float()
            return {"recall@1": (found >= true - 1e-6).double().mean().item(), **facts}

        return Way(name, lambda: run().similarity, told)

    flat, _ = built(faiss.IndexFlatIP(width), candidates)
    yield Case(
        "The nearest candidate, exactly",
        size,
        [
            way("elmd", ours),
            way("torch, double, topk", lambda: product(torch.float64)),
            way("torch, fp32, topk", lambda: product(torch.float32)),
            way("FAISS, flat", lambda: searched(flat, queries)),
        ],
        tolerance=1e-5,
        per=len(queries),
        unit="queries",
        note="elmd's cosines and order are those of double precision; fp32 and FAISS order near ties by rounding.",
    )
    lists = max(1, min(round(4 * math.sqrt(count)), count // 39))  # FAISS's own advice
    divided = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    divided.nprobe = PROBED
    divided, ivf_seconds = built(divided, candidates)
    graph, hnsw_seconds = built(hnsw(width), candidates)
    yield Case(
        "The nearest candidate, nearly always",
        size,
        [
            way("elmd, exactly", ours, **{"to build, s": 0.0}),
            way(
                "FAISS, HNSW (retriever.search=faiss)",
                lambda: searched(graph, queries),
                **{"to build, s": hnsw_seconds},
            ),
            way(f"FAISS, IVF of {lists}", lambda: searched(divided, queries), **{"to build, s": ivf_seconds}),
        ],
        tolerance=None,
        per=len(queries),
        unit="queries",
        note=f"The two find what is near, mostly the nearest. IVF searches {PROBED} of its lists. Building is not "
        "timed with the search; the stage builds once for all queries.",
    )


def built(index: Any, candidates: Tensor) -> tuple[Any, float]:
    """A FAISS index of the candidates, and the seconds that it took."""
    started = time.perf_counter()
    if not index.is_trained:
        index.train(candidates.numpy())
    index.add(candidates.numpy())
    return index, time.perf_counter() - started


def searched(index: Any, queries: Tensor) -> Neighbours:
    """What FAISS finds nearest to each query."""
    similarity, positions = index.search(queries.numpy(), 1)
    return Neighbours(torch.from_numpy(positions), torch.from_numpy(similarity))
