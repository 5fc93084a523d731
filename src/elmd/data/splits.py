"""Which pair belongs to which split (§4.1, Table 1)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from elmd.data.pairs import Pair
from elmd.errors import DataError
from elmd.types import SPLITS, Split

SplitBy = Literal["paper", "dialogue", "official"]

#: Splits that hold a tenth of the samples each, in the order in which they are filled.
TENTHS: tuple[Split, ...] = ("test", "valid")


def assign(kept: Sequence[Pair], by: SplitBy, seed: int) -> list[Split]:
    """The split of each pair.

    `paper` (Table 1): over samples, so that pairs of one dialogue fall on both sides; valid = test = floor(N / 10).
    `dialogue` (ours): whole dialogues, drawn until test and then valid hold a tenth of the samples.
    `official`: what the data set says. Both draws depend on the seed and the ids, not on the order of the file.

    Raises:
        DataError: `official`, and a dialogue has no split; or a split stays empty.
    """
    splits: list[Split]
    if by == "official":
        splits = []
        for pair in kept:
            if pair.dialogue.split is None:
                show = f"show {pair.dialogue.show!r}" if pair.dialogue.show else f"dialogue {pair.dialogue.id!r}"
                raise DataError(
                    f"{show} is in no official split",
                    where=f"dialogue {pair.dialogue.id}",
                    fix="name it in one of the split lists (data/README.md), or set data.split=dialogue",
                )
            splits.append(pair.dialogue.split)
    elif by == "paper":
        drawn = _shuffled((pair.id for pair in kept), seed)
        tenth = len(drawn) // 10
        test, valid = set(drawn[:tenth]), set(drawn[tenth : 2 * tenth])
        splits = ["test" if pair.id in test else "valid" if pair.id in valid else "train" for pair in kept]
    else:
        size = Counter(pair.dialogue.id for pair in kept)
        filled: Counter[Split] = Counter()
        split_of: dict[str, Split] = {}
        for dialogue in _shuffled(size, seed):
            unfilled: list[Split] = [split for split in TENTHS if filled[split] * 10 < len(kept)]
            split_of[dialogue] = (*unfilled, "train")[0]
            filled[split_of[dialogue]] += size[dialogue]
        splits = [split_of[pair.dialogue.id] for pair in kept]
    empty = [split for split in SPLITS if split not in splits]
    if empty:
        raise DataError(
            f"the {by} split leaves {' and '.join(empty)} empty ({len(kept)} samples)",
            where="data.split",
            fix="give more dialogues, another data.split or fewer data.filters",
        )
    return splits


def _shuffled(ids: Iterable[str], seed: int) -> list[str]:
    drawn = sorted(ids)
    random.Random(seed).shuffle(drawn)
    return drawn
