"""Replies and emotion words against slow oracles; the nucleus."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from elmd.data.collate import Batch, collate
from elmd.data.encode import Encoded
from elmd.labels import WORDS
from elmd.models.decode import generate_all, generate_batch, greedy, nucleus, predict_emotions
from oracle import slow_reply
from tiny_elmd import SAMPLES, VISUAL, build, examples


@pytest.mark.parametrize("temperature", [0.0, 0.95])
def test_generation_does_not_depend_on_the_batch(llm, encoder, temperature: float) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    kwargs = {"eos": 2, "max_new_tokens": 12, "top_p": 0.7, "temperature": temperature}
    together = generate_all(model, data, 10_000, Accelerator(cpu=True), seeds=[3, 4], **kwargs)
    assert len({tuple(ids) for ids, _ in together}) > 3
    for position, seed in enumerate((3, 4)):
        alone = generate_all(model, data, 1, Accelerator(cpu=True), seeds=[seed], **kwargs)
        assert [several[position] for several in together] == [several[0] for several in alone]
    assert ([a for a, _ in together] == [b for _, b in together]) == (temperature == 0)


def test_rows_that_have_ended_leave_and_change_nothing(llm, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    batch, widths = data.batch(range(len(data))), []
    streams = [str(i) for i in range(2 * len(data))]
    run = llm[0].forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if (ids := kwargs.get("input_ids")) is not None:
            widths.append(len(ids))
        return run(*args, **kwargs)

    def replies(rows: Batch, names: list[str], copies: int = 1) -> list[list[int]]:
        choose = nucleus(names, 0.95, 3.0, 30)
        return generate_batch(model, rows, lambda *args: choose(*args) % 4, eos=3, max_new_tokens=30, copies=copies)

    monkeypatch.setattr(llm[0], "forward", watched)
    together = replies(batch, streams, copies=2)
    assert widths[0] == 2 * len(data)
    assert widths[-1] < len(data)
    assert len({len(ids) for ids in together}) > 3
    alone = [replies(data.batch([i // 2]), [streams[i]])[0] for i in range(2 * len(data))]
    assert together == alone


def test_generation_equals_recomputing_each_token(llm, encoder) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    for i in (0, 3, 5):
        fast = generate_batch(model, data.batch([i]), greedy, eos=2, max_new_tokens=8)[0]
        assert fast == slow_reply(model, data.rows[i], VISUAL[SAMPLES[i].id], 2, 8)


def test_nucleus_draws_from_the_kept_tokens_in_proportion() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    counts = torch.zeros(4)
    rows = 64
    choose = nucleus([str(i) for i in range(rows)], 0.7, 1.0, 200)
    for step in range(200):
        chosen = choose(probabilities.log().expand(rows, 4), step, torch.arange(rows))
        counts += torch.bincount(chosen, minlength=4)
    share = counts / counts.sum()
    assert share[0] == share[2] == 0, "0.5 + 0.3 reach 0.7"
    assert share[1].item() == pytest.approx(0.5 / 0.8, abs=0.01)
    certain = torch.tensor([[-50.0, 50.0, -50.0, -50.0]])
    assert nucleus(["x"], 0.7, 0.95, 1)(certain, 0, torch.tensor([0])).item() == 1


@pytest.mark.parametrize("likely", [1, 5, 20])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
def test_nucleus_of_a_partial_sort_is_that_of_the_whole(likely: int, top_p: float) -> None:
    torch.manual_seed(0)
    rows, steps = torch.arange(50), 8
    ways = [nucleus([str(i) for i in range(50)], top_p, 0.95, steps, likely=n) for n in (likely, 40)]
    sharp, flat = torch.randn(50, 40) * 4, torch.zeros(50, 40)
    tied = torch.randint(0, 4, (50, 40)).float()  # bfloat16's logits have many equal ones
    for logits in (sharp, flat, tied, sharp.bfloat16().float()):
        for step in range(steps):
            some, all_of_them = (way(logits, step, rows) for way in ways)
            assert some.equal(all_of_them)
    few = torch.tensor([7, 31])
    assert ways[0](sharp[few], 2, few).equal(ways[1](sharp, 2, rows)[few]), "a row's draws are its own"


def test_scores_equal_losses_of_the_words(llm, encoder) -> None:
    model = build(llm)
    words = [[*encoder.text(word), 2] for word in WORDS.values()]
    assert len({len(word) for word in words}) > 1 or len(words[0]) > 2, "words of several tokens"
    data = examples(encoder, "rep", with_target=False)
    scores = model.log_probs(data.batch([0, 2, 3, 5]), words)
    for row, i in enumerate((0, 2, 3, 5)):
        for column, word in enumerate(words):
            full = Encoded(data.rows[i].before, data.rows[i].slots, data.rows[i].after, word)
            loss = model.loss(collate([full], [VISUAL[SAMPLES[i].id]]))
            assert -scores[row, column].item() == pytest.approx(loss.item(), rel=1e-4)
    best = predict_emotions(model, data, words, 300, Accelerator(cpu=True), "")
    assert [best[i] for i in (0, 2, 3, 5)] == scores.argmax(-1).tolist()
