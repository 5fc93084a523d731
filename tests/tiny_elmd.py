"""A tiny ELMD with random weights, its samples and their features."""

from __future__ import annotations

import torch

from benchmarks.tiny import make_demonstrations, make_samples
from elmd.data.encode import Encoder
from elmd.data.examples import Examples
from elmd.data.prompts import Prompt
from elmd.models.adapter import Prefix
from elmd.models.elmd import Elmd
from elmd.models.projector import Projector

PROMPT = Prompt(
    instruction="{task}\n", background="{background}\n", turn="{speaker}：{text}\n", utterance="{speaker}：{text}\n",
    video="画面：{video}\n", demonstration="参考：{response}\n", rep="情感？", eerg="回复？", reply="说？",
)  # fmt: skip
SAMPLES = make_samples()
VISUAL = {s.id: torch.randn(3 + i % 2, 6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SAMPLES)}
VISUAL[SAMPLES[3].id] = None  # a sample without a clip


#: Samples that the projector can learn from; stage `rep` trains on these alone.
SEEN = [sample for sample in SAMPLES if VISUAL[sample.id] is not None]


def build(llm, *, prefix: int = 4, seed: int = 0) -> Elmd:
    torch.manual_seed(seed)
    return Elmd(llm[0], Projector(6, 32), Prefix.create(llm[0], prefix, 0.0) if prefix else None).eval()


def examples(encoder: Encoder, task: str = "eerg", *, with_target: bool = True, samples=SAMPLES) -> Examples:
    return Examples(samples, encoder, make_demonstrations(SAMPLES), VISUAL.get, task, with_target=with_target)
