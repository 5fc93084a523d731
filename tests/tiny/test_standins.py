"""The stand-ins: each trains through the common loop, and a killed one resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from elmd.data.encode import Encoder
from elmd.data.pairs import pairs
from elmd.data.prompts import Prompt
from elmd.stages.bootstrap import like
from elmd.tiny.lessons import REPEATED, Lesson, encode_lessons, lessons, train_tokenizer
from elmd.tiny.llm import train_llm
from elmd.tiny.retriever import train_retriever
from elmd.tiny.standins import Standin, Training, hold_out
from elmd.tiny.vision import train_vision
from elmd.tiny.world import pretraining

PROMPT = Prompt("{task}\n", "{background}\n", "{speaker}：{text}\n", "{speaker}：{text}\n", "画面：{video}\n",
                "参考：{response}\n", "情感？", "回复？", "说？")  # fmt: skip
SAMPLES = [pair.sample("train", text_only=True) for pair in pairs(pretraining(0, 60))]


@pytest.fixture(scope="module")
def texts() -> list[Lesson]:
    return list(lessons(SAMPLES, like(SAMPLES, by_show=True), PROMPT, 0, scenes=True))


@pytest.fixture(scope="module")
def encoder(texts: list[Lesson]) -> Encoder:
    return Encoder(train_tokenizer(texts, 1000, coverage=1.0), PROMPT, 90, 20)


def test_lessons_are_encoded_as_samples_are(texts: list[Lesson], encoder: Encoder) -> None:
    lines = encode_lessons(texts, encoder, Random(0))
    with_scene = 0
    for lesson, line in zip(texts, lines, strict=True):
        before, after = encoder.wrap(lesson.content)
        prompt, target = line.ids[: line.at], line.ids[line.at :]
        assert target == [*encoder.text(lesson.target)[:19], encoder.tokenizer.eos_token_id]
        whole = len(before) + len(after)
        if lesson.scene:
            with_scene += 1
            assert prompt[len(prompt) - len(after) :] == after
            assert whole + 4 <= len(prompt) <= whole + 18 or len(prompt) == 90
            scene = encoder.tokenizer.decode(prompt[len(before) : len(prompt) - len(after)])
            assert len(prompt) == 90 or scene[:2] in "".join(lesson.scene)
        else:
            assert prompt == [*before, *after][-90:], "too long a prompt loses its beginning"
    assert with_scene > len(texts) / 4
    repeated = [lesson for lesson in texts if lesson.content == f"请重复：{lesson.target}"]
    assert len(repeated) == pytest.approx(REPEATED * len(texts), rel=0.5)


Make = Callable[[Training], tuple[Any, dict[str, float]]]


@pytest.fixture(params=["llm", "vision", "retriever"])
def make(request: pytest.FixtureRequest, texts: list[Lesson], encoder: Encoder) -> Make:
    held, kept = hold_out(texts)
    twins = [(sample.utterance.text, sample.response.text) for sample in SAMPLES]
    making: dict[str, Make] = {
        "llm": lambda training: train_llm(kept, held, encoder, hidden=64, layers=1, batch=8, training=training),
        "vision": lambda training: train_vision(hidden=16, batch=8, count=64, training=training),
        "retriever": lambda training: train_retriever(twins, hidden=32, batch=16, training=training),
    }
    return making[request.param]


class Killed(Exception):
    pass


def test_each_learns_and_a_killed_one_resumes_bit_for_bit(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elmd.tiny.standins.CHECKPOINT_EVERY", 8)
    accelerator = Accelerator(cpu=True)
    whole, metrics = make(Training(24, 3e-3, 0, tmp_path / "whole", accelerator))
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    before, after = ({k: v for k, v in line.items() if k.startswith("valid/")} for line in lines if "loss" not in line)
    for metric in before:
        assert after[metric] == metrics[metric.removeprefix("valid/")]
        assert (after[metric] < before[metric]) == (metric == "valid/perplexity"), metric

    losses, steps = Standin.losses, 0

    def die_at_step_13(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 13:
            raise Killed
        return losses(*arguments)

    monkeypatch.setattr(Standin, "losses", die_at_step_13)
    training = Training(24, 3e-3, 0, tmp_path / "killed", accelerator)
    with pytest.raises(Killed):
        make(training)
    torch.rand(3)  # nothing hangs on what was drawn in between
    again, metrics_again = make(training)
    assert steps == 13 + 16, "from the checkpoint of step 8 on"
    assert metrics_again == metrics
    for (name, value), (_, expected) in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert value.equal(expected), name
