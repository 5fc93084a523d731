"""Text metrics against hand-computed values, slow loops and the libraries."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence

import pytest

from elmd.metrics import text

# ---- slow counterparts, written from the definitions


def slow_bleu(hypotheses: list[list[str]], references: list[list[str]], order: int) -> float:
    """Corpus BLEU × 100 without smoothing; nltk's rule that a too short hypothesis adds one possible n-gram."""
    precisions = []
    for n in range(1, order + 1):
        matched = possible = 0
        for h, r in zip(hypotheses, references, strict=True):
            left = [tuple(r[i : i + n]) for i in range(len(r) - n + 1)]
            grams = [tuple(h[i : i + n]) for i in range(len(h) - n + 1)]
            for gram in grams:
                if gram in left:
                    left.remove(gram)
                    matched += 1
            possible += max(1, len(grams))
        precisions.append(matched / possible)
    if min(precisions) == 0:
        return 0.0
    length, expected = sum(map(len, hypotheses)), sum(map(len, references))
    brevity = 1.0 if length > expected else math.exp(1 - expected / length)
    return 100 * brevity * math.prod(precisions) ** (1 / order)


def slow_lcs(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(row[j], before[j + 1])
    return row[-1]


def f_score(matched: int, predicted: int, expected: int) -> float:
    return 2 * matched / (predicted + expected) if matched else 0.0


# ---- text protocols


def test_paper_bleu_equals_slow_bleu_and_nltk(pairs: tuple[list[str], list[str]]) -> None:
    from nltk.translate.bleu_score import corpus_bleu

    scores = text.paper(*pairs)
    hypotheses, references = ([text.characters(t) for t in side] for side in pairs)
    nltk = corpus_bleu([[r] for r in references], hypotheses, [(0.5, 0.5), (0.25, 0.25, 0.25, 0.25)])
    for name, order, theirs in (("bleu2_char", 2, nltk[0]), ("bleu4_char", 4, nltk[1])):
        assert scores[name].score > 5
        assert scores[name].score == pytest.approx(slow_bleu(hypotheses, references, order), abs=1e-9)
        assert scores[name].score == pytest.approx(100 * theirs, abs=1e-9)


def test_paper_bleu_by_hand() -> None:
    # characters of 今天好 in 今天好吗: 3/3 and 2/2 match, three for four: brevity e^(1 - 4/3)
    assert text.paper(["今天好"], ["今天 好吗"])["bleu2_char"].score == pytest.approx(100 * math.exp(-1 / 3))
    # clipped: one of the three 好 counts; no pair matches
    assert text.paper(["好好好"], ["好"])["bleu2_char"].score == 0


def test_no_match_of_an_order_is_zero_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert text.paper(["你好"], ["我好"])["bleu4_char"].score == 0
    assert not recwarn.list


def test_unsplit_chinese_scores_zero_but_ours_is_split() -> None:
    """The trap that the tokens' names guard against: blanks do not part Chinese words."""
    from nltk.translate.bleu_score import corpus_bleu

    assert corpus_bleu([[["今天天气真好"]]], [["今天天气真好呀"]]) == 0
    assert text.paper(["今天天气真好呀"], ["今天天气真好"])["bleu4_char"].score > 80


def test_meteor_equals_nltk_with_an_empty_wordnet(pairs: tuple[list[str], list[str]]) -> None:
    from nltk.translate.meteor_score import meteor_score

    class Empty:
        def synsets(self, word: str) -> list[str]:
            return []

    theirs = [
        meteor_score([text.characters(r)], text.characters(h), wordnet=Empty()) for h, r in zip(*pairs, strict=True)
    ]
    metric = text.paper(*pairs)["meteor_char"]
    assert metric.values == pytest.approx([100 * value for value in theirs], abs=1e-9)
    assert metric.score == pytest.approx(100 * sum(theirs) / len(theirs))


def test_meteor_by_hand() -> None:
    # 今天好 / 今天很好: 3 matches, P = 1, R = 3/4, F = PR / (0.9 P + 0.1 R), chunks 今天 and 好: penalty 0.5 (2/3)^3
    f_mean = 0.75 / (0.9 + 0.075)
    assert text.meteor(list("今天好"), list("今天很好")) == pytest.approx((1 - 0.5 * (2 / 3) ** 3) * f_mean)
    assert text.meteor([], list("好")) == 0
    assert text.meteor(list("坏"), list("好")) == 0


def test_meteor_without_our_wordnet_needs_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    from nltk.translate.meteor_score import meteor_score

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises((LookupError, AttributeError)):  # AttributeError: nltk's lazy loader, asked a second time
        meteor_score([list("今天很好")], list("今天好吗"))
    assert text.meteor(list("今天好吗"), list("今天很好")) > 0


def test_rouge_equals_slow_counts(pairs: tuple[list[str], list[str]]) -> None:
    paper, strict = text.paper(*pairs), text.strict(*pairs)
    for i, (h, r) in enumerate(zip(*pairs, strict=True)):
        a, b = text.characters(h), text.characters(r)
        sets = f_score(len(set(a) & set(b)), len(set(a)), len(set(b)))
        assert paper["rouge1_char"].values[i] == pytest.approx(100 * sets, abs=1e-4)
        assert paper["rougeL_char"].values[i] == pytest.approx(100 * f_score(slow_lcs(a, b), len(a), len(b)), abs=1e-4)
        a, b = text.zh_tokens(h), text.zh_tokens(r)
        clipped = f_score((Counter(a) & Counter(b)).total(), len(a), len(b))
        assert strict["rouge1_zh"].values[i] == pytest.approx(100 * clipped, abs=1e-4)
        assert strict["rougeL_zh"].values[i] == pytest.approx(100 * f_score(slow_lcs(a, b), len(a), len(b)), abs=1e-4)


def test_paper_rouge_counts_sets_and_strict_clips() -> None:
    assert text.paper(["好好好好"], ["好"])["rouge1_char"].score == pytest.approx(100, abs=1e-4)
    assert text.strict(["好好好好"], ["好"])["rouge1_zh"].score == pytest.approx(100 * 2 / 5, abs=1e-4)


@pytest.mark.parametrize("protocol", text.PROTOCOLS)
def test_empty_hypothesis_scores_zero_and_keeps_its_pair(protocol: str) -> None:
    from rouge_chinese import Rouge

    with pytest.raises(ValueError, match="Hypothesis is empty"):
        Rouge().get_scores("", "好")  # the trap
    both = text.PROTOCOLS[protocol](["今天真的好", " \u3000", ""], ["今天真的好", "好", "坏"])
    alone = text.PROTOCOLS[protocol](["今天真的好"], ["今天真的好"])
    for name, metric in both.items():
        assert len(metric.values) == 3
        assert metric.values[1:].tolist() == [0, 0], name
        if metric.mean:
            assert metric.score == pytest.approx(alone[name].score / 3), name


@pytest.mark.parametrize("protocol", text.PROTOCOLS)
def test_equal_texts_score_100(protocol: str) -> None:
    texts = ["今天天气真好啊", "你怎么了？我很担心你"]
    for name, metric in text.PROTOCOLS[protocol](texts, texts).items():
        expected = pytest.approx(100, abs=0.1 if name == "meteor_char" else 1e-4)  # METEOR: one chunk costs 0.5 / m^3
        assert metric.score == expected, name


def test_strict_equals_sacrebleu(pairs: tuple[list[str], list[str]]) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    hypotheses, references = pairs
    scores = text.strict(hypotheses, references)
    for name, theirs in (
        ("bleu2_zh", BLEU(tokenize="zh", max_ngram_order=2)),
        ("bleu4_zh", BLEU(tokenize="zh")),
        ("chrf_char", CHRF()),
    ):
        expected = theirs.corpus_score(hypotheses, [references]).score
        assert expected > 5
        assert scores[name].score == pytest.approx(expected, abs=1e-9), name
    signature = text.signatures()["bleu2_zh"]
    assert signature.startswith("nrefs:1|")
    assert "tok:zh" in signature
    assert signature.endswith("order:2")


def test_zh_tokens_keep_latin_words_whole() -> None:
    assert text.zh_tokens("我说OK了") == ["我", "说", "OK", "了"]
    assert text.characters("我 说OK\u3000了\n") == ["我", "说", "O", "K", "了"]


def test_chatglm_equals_its_recipe(pairs: tuple[list[str], list[str]]) -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    scores = text.chatglm(*pairs)
    for i, (h, r) in enumerate(zip(*pairs, strict=True)):
        if not h.strip():
            continue
        expected = Rouge().get_scores(" ".join(text.jieba_words(h)), " ".join(text.jieba_words(r)))[0]
        for ours, theirs in (("rouge1_jieba", "rouge-1"), ("rouge2_jieba", "rouge-2"), ("rougeL_jieba", "rouge-l")):
            assert scores[ours].values[i] == pytest.approx(100 * expected[theirs]["f"])
        bleu = sentence_bleu([list(r)], list(h), smoothing_function=SmoothingFunction().method3)
        assert scores["bleu4_char_smooth3"].values[i] == pytest.approx(100 * bleu)


def test_jieba_is_silent_and_leaves_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capfd: pytest.CaptureFixture[str]
) -> None:
    import jieba

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text._jieba.cache_clear()
    assert text.jieba_words("我来到北京清华大学。 好") == ["我", "来到", "北京", "清华大学", "。", "好"]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]
    jieba.setLogLevel(logging.ERROR)
    standard = jieba.Tokenizer()
    standard.tmp_dir = str(tmp_path)
    sentence = "工信处女干事每月经过下属科室都要亲口交代24口交换机等技术性器件的安装工作"
    assert text.jieba_words(sentence) == standard.lcut(sentence)


def test_every_metric_has_a_meaning() -> None:
    for protocol in text.PROTOCOLS.values():
        assert set(protocol(["好"], ["好"])) <= set(text.MEANING)
    assert set(text.surface(["好"])) <= set(text.MEANING)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        text.paper(["好"], [])


def test_surface_by_hand() -> None:
    scores = text.surface(["哈哈哈哈哈", "好 的", "", "今天很好"], ["哈", "好的", "", None])
    assert scores["distinct1_char"] == pytest.approx(6 / 11)  # 哈 好 的 今 天 很 of 5 + 2 + 4
    assert scores["distinct2_char"] == pytest.approx(5 / 8)
    assert scores["length_char"] == pytest.approx(11 / 4)
    assert scores["empty_rate"] == 0.25
    assert scores["repeat4_char"] == pytest.approx((1 / 2) / 4)  # 哈哈哈哈 twice in the first
    assert scores["copy_rate"] == pytest.approx(1 / 3)  # only 好的; the empty one copies nothing
    assert text.surface(["今天很好啊"], ["说今天很好"])["copy4_char"] == 0.5
    assert text.surface(["好"])["copy_rate"] is None
