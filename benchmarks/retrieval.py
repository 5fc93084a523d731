"""Neighbours among 1e3 … 1e6 candidates: ELMD's search, plain products and FAISS's indices with their recall.

Vectors are those of a small retriever, trained here in half a minute as the tiny world's is; where more of them are
wanted than that world has utterances, they are made up around centres.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Unequal, Way
from elmd.config import ErmConfig, RetrieverConfig
from elmd.data.pairs import pairs
from elmd.retrieval.retriever import add_separation, encode
from elmd.retrieval.search import Neighbours, Pairs, hnsw, nearest
from elmd.tiny.retriever import train_retriever
from elmd.tiny.standins import Training
from elmd.tiny.world import SHOWS_TAG, pretraining
from elmd.training.contrast import Erm
from elmd.training.loop import fit
from elmd.training.plan import Plan

NONE = Pairs(*torch.zeros(2, 0, dtype=torch.long))
#: Candidates and width: s · d with m3e-base (768 wide) and with the tiny retriever, and the latter's e_u where many.
SIZES = [(1_000, 3072), (10_000, 3072), (100_000, 512), (1_000_000, 128)]
#: How many neighbours recall@K is of.
K = 10
#: How many of IVF's lists are searched, and how many vectors for each list their centres are found by (k-means).
PROBED, POINTS = 16, 64
#: Candidates beyond which FAISS takes minutes to build ELMD's graph, and torch's products take seconds a run; and what
#: is built instead: neighbours in the graph, and how many are followed while it is built.
MANY, LINKS, FOLLOWED = 100_000, 16, 16


def cases(small: bool) -> Iterator[Case]:
    vectors, texts, source = trained(small)
    for key, rows in vectors.items():
        yield from compared(rows[:texts], rows[texts:], f"{key} of {source}")
    for count, width in [(300, 16)] if small else SIZES:
        if psutil.virtual_memory().available < 6 * 4 * count * width + 2**31:
            continue  # the candidates, in double too, a copy in each of FAISS's indices; and blocks of products
        # FAISS multiplies by blocks for so many queries; for a few hundred it takes ten times as long, one by one.
        rows = clustered(count + (50 if small else 1000), width)
        yield from compared(rows[:count], rows[count:], "made up around centres")


def trained(small: bool) -> tuple[dict[str, Tensor], int, str]:
    """Unit vectors of texts, by key, by a retriever that was trained on others; how many are candidates; in words.

    The encoder is made as `bootstrap/retriever` makes it, then trained by eq. 4 on utterances that show their emotion,
    with the paper's batch and temperature and the tiny world's rate, until emotions part.
    """
    dialogues, hidden, first, then, batch = (60, 32, 2, 3, 8) if small else (2000, 128, 100, 300, ErmConfig.batch_size)
    candidates, queries = (200, 20) if small else (10_000, 1000)
    samples = [pair.sample("train", text_only=True) for pair in pairs(pretraining(0, dialogues))]
    twins = [(sample.utterance.text, sample.response.text) for sample in samples]
    with TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=True)
        training = Training(first, 2e-3, 0, Path(folder, "encoder"), accelerator)
        encoder, _ = train_retriever(twins, hidden=hidden, training=training)
        model = add_separation(encoder, ErmConfig.slots, ErmConfig.separation.value)
        shown = [sample for sample in samples if SHOWS_TAG in sample.utterance.tags]
        held = len(shown) // 5
        splits = {"train": shown[held:], "valid": shown[:held]}
        task = Erm(model, splits, "valid", batch_size=batch, seed=0, temperature=ErmConfig.temperature)
        plan = Plan(
            rates=dict.fromkeys(task.modules, 1e-3), steps=then, seed=0,
            select=f"emotion_match@1/{RetrieverConfig.key.value}", higher_is_better=True, evaluate_every=then,
            checkpoint_every=then, warmup=0.05, weight_decay=0.01,
        )  # fmt: skip
        match = fit(task, plan, Path(folder, "erm"), accelerator, "ERM").best

    texts: dict[str, None] = {}  # a set in order
    unseen = pretraining(1, 10 * (candidates + queries))
    while len(texts) < candidates + queries:
        texts |= dict.fromkeys(utterance.text for utterance in next(unseen).utterances)
    vectors = encode(model.eval(), list(texts)[: candidates + queries])
    return (
        {key: F.normalize(rows.double(), dim=-1).float() for key, rows in vectors.items()},
        candidates,
        f"utterances of the tiny world by a retriever trained for {then} steps (emotion match@1 {match:.2f})",
    )


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
    true = nearest(candidates, double, NONE, K).similarity

    def ours(k: int) -> Neighbours:
        return nearest(candidates, double, NONE, k)

    def product(columns: Tensor) -> Callable[[int], Neighbours]:
        rows = max(1, 2**26 // count)  # of a block of products

        def search(k: int) -> Neighbours:
            blocks = [(block.to(columns.dtype) @ columns).float().topk(k) for block in queries.split(rows)]
            return Neighbours(torch.cat([best.indices for best in blocks]), torch.cat([best.values for best in blocks]))

        return search

    def cosines(search: Callable[[int], Neighbours]) -> Tensor:
        """Of the neighbours that a search returns, in double precision: of equal candidates, any will do."""
        positions = search(K).positions
        pairs = double.repeat_interleave(K, dim=0) * candidates[positions.flatten()]
        similarity = pairs.sum(dim=1).float().view_as(positions)
        similarity[positions < 0] = -torch.inf  # an index may find fewer
        return similarity

    def exact(name: str, search: Callable[[int], Neighbours]) -> Way:
        if (off := (cosines(search) - true).abs().max().item()) > 1e-6:
            raise Unequal(f"{name} finds candidates that are less near than the nearest, by {off:.1e}")
        return way(name, search)

    def way(name: str, search: Callable[[int], Neighbours], **facts: float) -> Way:
        def recalls() -> Mapping[str, float]:
            near = cosines(search)
            return {
                "recall@1": (near[:, 0] >= true[:, 0]).double().mean().item(),
                f"recall@{K}": (near >= true[:, -1:]).double().mean().item(),
                **facts,
            }

        return Way(name, lambda: search(1).similarity, recalls)

    flat, _ = built(faiss.IndexFlatIP(width), candidates)
    products = []
    if count <= MANY:
        products.append(exact("torch, double, topk", product(candidates.double().T)))
        products.append(exact("torch, fp32, topk", product(candidates.T)))
    yield Case(
        "The nearest candidate, exactly",
        size,
        [exact("elmd", ours), *products, exact("FAISS, flat", lambda k: searched(flat, queries, k))],
        tolerance=1e-5,
        per=len(queries),
        unit="queries",
        note="elmd's cosines and order are those of double precision; fp32 and FAISS order near ties by rounding."
        + " torch's products of all candidates at once are left out here." * (count > MANY),
    )
    lists = max(1, min(round(4 * math.sqrt(count)), count // 39))  # FAISS's own advice
    divided = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    divided.nprobe, divided.cp.max_points_per_centroid = PROBED, POINTS
    divided, ivf_seconds = built(divided, candidates)
    graph, links = hnsw(width), "retriever.search=faiss"
    if count > MANY:
        lighter = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        lighter.hnsw.efConstruction, lighter.hnsw.efSearch = FOLLOWED, graph.hnsw.efSearch
        graph, links = lighter, f"{LINKS} links"
    graph, hnsw_seconds = built(graph, candidates)
    lighter_note = (
        f" Its graph has half the links of retriever.search=faiss, and follows {FOLLOWED} where that follows 80: a "
        "seventh of the time to build."
    )
    yield Case(
        "The nearest candidate, nearly always",
        size,
        [
            way("elmd, exactly", ours, **{"to build, s": 0.0}),
            way(
                f"FAISS, HNSW ({links})", lambda k: searched(graph, queries, k), **{"to build, s": hnsw_seconds}
            ),
            way(
                f"FAISS, IVF of {lists}", lambda k: searched(divided, queries, k), **{"to build, s": ivf_seconds}
            ),
        ],
        tolerance=None,
        per=len(queries),
        unit="queries",
        note=f"The two find what is near, mostly the nearest. IVF searches {PROBED} of its lists. Building, here "
        f"on all {cores()} cores, is not timed with the search; the stage builds once for all queries."
        + lighter_note * (count > MANY),
    )  # fmt: skip


def cores() -> int:
    return os.cpu_count() or 1


def built(index: Any, candidates: Tensor) -> tuple[Any, float]:
    """A FAISS index of the candidates, and the seconds that it took on all cores."""
    threads = torch.get_num_threads()  # FAISS and torch share them
    faiss.omp_set_num_threads(cores())
    started = time.perf_counter()
    if not index.is_trained:
        index.train(candidates.numpy())
    index.add(candidates.numpy())
    seconds = time.perf_counter() - started
    faiss.omp_set_num_threads(threads)
    return index, seconds


def searched(index: Any, queries: Tensor, k: int) -> Neighbours:
    """What FAISS finds nearest to each query; -1 where it finds fewer than k."""
    similarity, positions = index.search(queries.numpy(), k)
    return Neighbours(torch.from_numpy(positions), torch.from_numpy(similarity))
