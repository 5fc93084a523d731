"""Text metrics, in three protocols that are never mixed. Each name says which tokens it counts.

| protocol  | metrics                                              | tokens                                    | who decided |
|-----------|------------------------------------------------------|-------------------------------------------|-------------|
| `paper`   | bleu2_char bleu4_char meteor_char rouge1_char rougeL_char | characters, white space removed, punctuation kept | §4.3 names nltk and rouge_chinese; the tokens are our inference: corpus character BLEU fits Table 2 best of ten conventions tried |
| `strict`  | bleu2_zh bleu4_zh rouge1_zh rougeL_zh chrf_char      | sacrebleu's `zh`: one per Chinese character, Latin words whole | ours, for claims |
| `chatglm` | rouge1_jieba rouge2_jieba rougeL_jieba bleu4_char_smooth3 | jieba words; characters                   | ChatGLM2-6B's p-tuning, LLaMA-Factory |

All scores of a protocol are × 100, higher is better. A pair with an empty side keeps its place and scores 0.
"""  # noqa: E501

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

ORDER = 4  # longest n-gram of BLEU

#: One line on each metric, printed under tables.
MEANING: dict[str, str] = {
    "bleu2_char": "corpus BLEU-2 on characters, unsmoothed (nltk)",
    "bleu4_char": "corpus BLEU-4 on characters, unsmoothed (nltk)",
    "meteor_char": "mean METEOR on characters, without synonyms (nltk, empty WordNet)",
    "rouge1_char": "mean ROUGE-1 F on characters, counted as sets (rouge_chinese default)",
    "rougeL_char": "mean ROUGE-L F on characters (rouge_chinese)",
    "bleu2_zh": "corpus BLEU-2, sacrebleu tokenize=zh",
    "bleu4_zh": "corpus BLEU-4, sacrebleu tokenize=zh",
    "rouge1_zh": "mean ROUGE-1 F on sacrebleu's zh tokens, counts clipped (rouge_chinese exclusive=False)",
    "rougeL_zh": "mean ROUGE-L F on sacrebleu's zh tokens (rouge_chinese)",
    "chrf_char": "corpus chrF2, character n-grams to 6 (sacrebleu)",
    "rouge1_jieba": "mean ROUGE-1 F on jieba words, counted as sets (rouge_chinese default)",
    "rouge2_jieba": "mean ROUGE-2 F on jieba words, counted as sets (rouge_chinese default)",
    "rougeL_jieba": "mean ROUGE-L F on jieba words (rouge_chinese)",
    "bleu4_char_smooth3": "mean sentence BLEU-4 on characters, smoothing 3 (nltk)",
    "distinct1_char": "Distinct-1: different characters / characters over all hypotheses; depends on n",
    "distinct2_char": "Distinct-2: the same for character pairs within a hypothesis",
    "length_char": "mean length in characters without white space",
    "empty_rate": "share of hypotheses without a character",
    "repeat4_char": "mean share of a hypothesis's character 4-grams that occur earlier in it",
    "copy_rate": "share of hypotheses equal to the demonstration r'",
    "copy4_char": "mean share of a hypothesis's character 4-grams that occur in r'",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric on n pairs, kept as sums, so that the scores of resampled corpora cost one matrix product.

    Attributes:
        statistics: [n, S], what each pair adds to the corpus totals.
        reduce: totals [R, S] of R corpora -> scores [R], × 100.
        mean: whether the score is the mean over pairs (else a corpus score, e.g. BLEU).
    """

    statistics: np.ndarray
    reduce: Callable[[np.ndarray], np.ndarray]
    mean: bool

    @property
    def score(self) -> float:
        """The score on all pairs, × 100."""
        return float(self.reduce(self.statistics.sum(axis=0, keepdims=True))[0])

    @property
    def values(self) -> np.ndarray:
        """[n] score of each pair alone, × 100. Their mean is `score` only where `mean` is set."""
        return self.reduce(self.statistics)


def characters(text: str) -> list[str]:
    """The characters of `text` without white space (the full-width space included); punctuation stays."""
    return list("".join(text.split()))


def zh_tokens(text: str) -> list[str]:
    """sacrebleu's `zh` tokens: every Chinese character alone, the rest as in `13a`."""
    return _sacrebleu_tokenizer()(text).split()


def jieba_words(text: str) -> list[str]:
    """jieba's words in accurate mode; white space becomes no word."""
    return " ".join(_jieba().cut(text)).split()


def paper(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """BLEU, METEOR and ROUGE on characters, as we take Table 2 to be counted (§4.3)."""
    pairs = [(characters(h), characters(r)) for h, r in _pairs(hypotheses, references)]
    counts = _nltk_bleu_statistics(pairs)
    rouge = _rouge(pairs, ("rouge-1", "rouge-l"), clipped=False)
    return {
        "bleu2_char": Metric(counts, partial(_unsmoothed_bleu, order=2), mean=False),
        "bleu4_char": Metric(counts, partial(_unsmoothed_bleu, order=4), mean=False),
        "meteor_char": _averaged(meteor(h, r) for h, r in pairs),
        "rouge1_char": _averaged(rouge["rouge-1"]),
        "rougeL_char": _averaged(rouge["rouge-l"]),
    }


def strict(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """sacrebleu's BLEU and chrF, and ROUGE with clipped counts; see `signatures`. Ours."""
    texts = _pairs(hypotheses, references)
    pairs = [(zh_tokens(h), zh_tokens(r)) for h, r in texts]
    rouge = _rouge(pairs, ("rouge-1", "rouge-l"), clipped=True)
    corpus = {name: _sacrebleu_metric(metric, texts) for name, metric in _sacrebleu_metrics().items()}
    return {
        "bleu2_zh": corpus["bleu2_zh"],
        "bleu4_zh": corpus["bleu4_zh"],
        "rouge1_zh": _averaged(rouge["rouge-1"]),
        "rougeL_zh": _averaged(rouge["rouge-l"]),
        "chrf_char": corpus["chrf_char"],
    }


def chatglm(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """ROUGE on jieba words and smoothed sentence BLEU-4, as ChatGLM2-6B's p-tuning and LLaMA-Factory count them.

    As there, BLEU keeps white space as characters.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method3
    texts = _pairs(hypotheses, references)
    rouge = _rouge([(jieba_words(h), jieba_words(r)) for h, r in texts], ("rouge-1", "rouge-2", "rouge-l"), False)
    bleu = (sentence_bleu([list(r)], list(h), smoothing_function=smooth) if h.strip() else 0.0 for h, r in texts)
    return {
        "rouge1_jieba": _averaged(rouge["rouge-1"]),
        "rouge2_jieba": _averaged(rouge["rouge-2"]),
        "rougeL_jieba": _averaged(rouge["rouge-l"]),
        "bleu4_char_smooth3": _averaged(bleu),
    }


#: The protocols by name; each takes n hypotheses and n references and returns its metrics by name.
PROTOCOLS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, Metric]]] = {
    "paper": paper,
    "strict": strict,
    "chatglm": chatglm,
}


def surface(hypotheses: Sequence[str], demonstrations: Sequence[str | None] | None = None) -> dict[str, float | None]:
    """Properties of hypotheses, without references. Shares are fractions in [0, 1], not × 100.

    Distinct-n is Li et al. (2016), over the corpus. `repeat4_char` is seq-rep-4 of Welleck et al. (2020) on
    characters, 0 for hypotheses shorter than four. The copy rates are over the samples that have a demonstration;
    they are None where no sample has one. An empty hypothesis copies nothing.
    """
    tokens = [characters(h) for h in hypotheses]
    result: dict[str, float | None] = {}
    for n in (1, 2):
        grams = [gram for t in tokens for gram in _ngrams(t, n)]
        result[f"distinct{n}_char"] = len(set(grams)) / len(grams) if grams else 0.0
    result["length_char"] = _mean([len(t) for t in tokens])
    result["empty_rate"] = _mean([not t for t in tokens])
    result["repeat4_char"] = _mean([1 - len(set(g)) / len(g) if (g := _ngrams(t, 4)) else 0.0 for t in tokens])
    shown = zip(tokens, demonstrations or [None] * len(tokens), strict=True)
    given = [(t, characters(d)) for t, d in shown if d is not None]
    result["copy_rate"] = _mean([bool(t) and t == d for t, d in given]) if given else None
    result["copy4_char"] = _mean([_share_in(_ngrams(t, 4), set(_ngrams(d, 4))) for t, d in given]) if given else None
    return result


def meteor(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """METEOR of two token lists (Banerjee and Lavie 2005, nltk's parameters), in [0, 1].

    nltk asks WordNet for synonyms and raises LookupError where its data is not installed. English WordNet has none
    for Chinese tokens, so an empty one takes its place: the same score except for Latin words.
    """
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(reference, hypothesis, wordnet=_EmptyWordNet()))  # type: ignore[arg-type]


def signatures() -> dict[str, str]:
    """sacrebleu's signature of each of its metrics, with the n-gram order that it leaves out."""
    result = {}
    for name, metric in _sacrebleu_metrics().items():
        metric.corpus_score(["一"], [["一"]])  # the number of references enters the signature here
        order = f"|order:{metric.max_ngram_order}" if name.startswith("bleu") else ""  # chrF's signature has it as nc
        result[name] = f"{metric.get_signature()}{order}"
    return result


def versions() -> dict[str, str]:
    """Versions of the libraries that count."""
    from importlib.metadata import version

    return {name: version(name) for name in ("nltk", "rouge-chinese", "sacrebleu", "jieba")}


class _EmptyWordNet:
    def synsets(self, word: str) -> list[Any]:
        return []


def _pairs(hypotheses: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(hypotheses, references, strict=True))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _share_in(grams: Sequence[tuple[str, ...]], others: set[tuple[str, ...]]) -> float:
    return sum(gram in others for gram in grams) / len(grams) if grams else 0.0


def _averaged(values: Iterable[float]) -> Metric:
    """A metric that is the mean of `values` in [0, 1]; statistics are (value, 1)."""
    column = np.fromiter(values, dtype=np.float64)
    return Metric(np.stack([column, np.ones_like(column)], axis=1), lambda sums: 100 * sums[:, 0] / sums[:, 1], True)


def _nltk_bleu_statistics(pairs: Sequence[tuple[list[str], list[str]]]) -> np.ndarray:
    """[n, 2 + 2 · ORDER]: lengths of hypothesis and reference, then matched and possible n-grams of each order.

    Counted as `nltk.translate.bleu_score.corpus_bleu` does: a hypothesis too short for an order adds 1 to its
    possible n-grams, so many short replies lower nltk's BLEU-4 against sacrebleu's.
    """
    rows = np.zeros((len(pairs), 2 + 2 * ORDER))
    for row, (hypothesis, reference) in zip(rows, pairs, strict=True):
        row[:2] = len(hypothesis), len(reference)
        for n in range(1, ORDER + 1):
            grams = Counter(_ngrams(hypothesis, n))
            row[1 + n] = (grams & Counter(_ngrams(reference, n))).total()
            row[1 + ORDER + n] = max(1, grams.total())
    return rows


def _unsmoothed_bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU × 100 from totals [R, 2 + 2 · ORDER]; 0 where an order has no match (nltk without smoothing)."""
    length, reference = sums[:, 0], sums[:, 1]
    matched, possible = sums[:, 2 : 2 + order], sums[:, 2 + ORDER : 2 + ORDER + order]
    with np.errstate(divide="ignore"):
        brevity = np.where(length > reference, 1.0, np.exp(1 - reference / np.maximum(length, 1)))
        return np.where(length > 0, 100 * brevity * np.exp(np.log(matched / possible).mean(axis=1)), 0.0)


def _rouge(
    pairs: Sequence[tuple[list[str], list[str]]], names: tuple[str, ...], clipped: bool
) -> dict[str, list[float]]:
    """F of each ROUGE by name. rouge_chinese wants tokens joined by spaces and raises where a side is empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source has invalid escapes, reported when it is first compiled
        from rouge_chinese import Rouge

    rouge = Rouge(metrics=list(names), stats=["f"], exclusive=not clipped)
    scores: dict[str, list[float]] = {name: [] for name in names}
    for hypothesis, reference in pairs:
        result = rouge.get_scores(" ".join(hypothesis), " ".join(reference))[0] if hypothesis and reference else None
        for name in names:
            scores[name].append(result[name]["f"] if result else 0.0)
    return scores


def _sacrebleu_metrics() -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    # force: no warning about tokenised input, which Chinese text with spaces before full stops would cause
    return {
        "bleu2_zh": BLEU(tokenize="zh", max_ngram_order=2, force=True),
        "bleu4_zh": BLEU(tokenize="zh", max_ngram_order=4, force=True),
        "chrf_char": CHRF(),
    }


def _sacrebleu_metric(metric: Any, texts: Sequence[tuple[str, str]]) -> Metric:
    """The statistics that sacrebleu's own significance tests resample (its `significance.py` calls the same two)."""
    rows = metric._extract_corpus_statistics([h for h, _ in texts], [[r for _, r in texts]])

    def reduce(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._compute_score_from_stats([int(value) for value in row]).score for row in sums])

    return Metric(np.array(rows, dtype=np.float64).reshape(len(texts), -1), reduce, mean=False)


@cache
def _sacrebleu_tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return TokenizerZh()


@cache
def _jieba() -> Any:
    """A jieba tokenizer with its dictionary read straight from the package, in about a second.

    jieba's own start-up logs to standard error and loads a marshalled cache by a fixed name from the shared temporary
    folder, where anybody may have put it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes, and pkg_resources
        import jieba

    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
