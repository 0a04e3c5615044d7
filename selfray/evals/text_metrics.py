"""How alike two reports are as texts: BLEU, ROUGE-L and METEOR, each in one stated variant.

Variants of one metric differ by a third and more on the same reports, so that a number without its
variant says little: `VARIANTS` goes into results beside the numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from selfray.errors import InputError
from selfray.evals.bootstrap import Estimate, PatientResamples, PatientsLeftOut
from selfray.evals.paired_tests import PatientSwaps, PermutationTest
from selfray.evals.report_estimates import report_estimates, report_tests

ORDERS = 4  # of BLEU

_WORDS = (
    "lower case; punctuation and symbols removed, but for a point or comma between digits and a "
    "hyphen or apostrophe within a word; each Chinese or Japanese character is a word"
)
_BLEU = (
    "corpus BLEU of orders 1 to {}, one reference, no smoothing (0 where an order has no match), "
    "brevity penalty on summed lengths; words: " + _WORDS
)
VARIANTS: dict[str, str] = {
    **{f"bleu_{order}": _BLEU.format(order) for order in range(1, ORDERS + 1)},
    "rouge_l": (
        "mean over reports of the F-measure of ROUGE-L, package rouge-score, use_stemmer=False; "
        "words: its own, lower-case runs of a-z and 0-9; a report is left out where the "
        "reference has words in other scripts only"
    ),
    "meteor_exact_stem": (
        "mean over reports of METEOR, package nltk, exact and Porter-stem matches, no synonyms "
        "(no WordNet), alpha 0.9, beta 3, gamma 0.5; words: " + _WORDS
    ),
}
"""By metric, all that tells its variant from others."""

_INSIDE = re.compile(r"(?<=\d)[.,](?=\d)|(?<=[^\W_])['-](?=[^\W_])")
_NOT_WORD = re.compile(r"[^\w\s]|_")
# Kana, and Chinese characters of every Unicode block up to extension H.
_CHARACTER = re.compile(
    "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af])"
)
_ONE_SIGN = str.maketrans({"\u2019": "'", "\u2010": "-", "\u2011": "-"})


def words(text: str) -> list[str]:
    """The words of a report, for BLEU and METEOR.

    Unicode is composed (NFC) and made lower case. Punctuation, symbols and underscores separate
    words and are dropped, but for a point or comma between two digits ("2.5") and a hyphen or
    apostrophe between two letters or digits ("x-ray"). Chinese and Japanese characters are a word
    each. So the placeholder `___` is no word.

    Args:
        text: Any, also empty.
    """
    text = unicodedata.normalize("NFC", text).lower().translate(_ONE_SIGN)
    kept = {match.start() for match in _INSIDE.finditer(text)}

    def cleaned(match: re.Match[str]) -> str:
        mark = unicodedata.category(match[0])[0] == "M"  # vowel signs of many scripts
        return match[0] if mark or match.start() in kept else " "

    return _CHARACTER.sub(r" \1 ", _NOT_WORD.sub(cleaned, text)).split()


@dataclass(frozen=True)
class TextStatistics:
    """What all metrics need of each of n pairs of reports.

    Attributes:
        matches: float64 [n, 4]: n-grams of the candidate that the reference has too, each counted
            at most as often as there, by order.
        candidate_words: float64 [n].
        reference_words: float64 [n].
        rouge_l: float64 [n], 0 to 1; NaN where the reference has words, but none that ROUGE sees.
        meteor: float64 [n], 0 to 1.
    """

    matches: np.ndarray
    candidate_words: np.ndarray
    reference_words: np.ndarray
    rouge_l: np.ndarray
    meteor: np.ndarray


def text_statistics(references: Sequence[str], candidates: Sequence[str]) -> TextStatistics:
    """Compare each generated report with the radiologist's.

    An empty text has no words: with one, or with two, every score of the pair is 0.

    Args:
        references: n reports by radiologists.
        candidates: n generated reports, in the same order.

    Raises:
        InputError: rouge-score or nltk is not installed.
    """
    rouge, meteor = _scorers()
    matches, lengths, scores = [], [], []
    for reference, candidate in zip(references, candidates, strict=True):
        true, said = words(reference), words(candidate)
        matches.append([_matches(true, said, order) for order in range(1, ORDERS + 1)])
        lengths.append([len(said), len(true)])
        unseen = bool(true) and not rouge.seen(reference)
        score = np.nan if unseen else rouge.score(reference, candidate)
        scores.append([score, meteor(true, said)])
    lengths = np.array(lengths, float).reshape(-1, 2)
    scores = np.array(scores, float).reshape(-1, 2)
    return TextStatistics(
        matches=np.array(matches, float).reshape(-1, ORDERS),
        candidate_words=lengths[:, 0],
        reference_words=lengths[:, 1],
        rouge_l=scores[:, 0],
        meteor=scores[:, 1],
    )


def text_resampled(statistics: TextStatistics, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric under many weightings of the reports at once.

    BLEU of order k is exp(min(0, 1 - R / C)) times the geometric mean over j = 1 to k of M_j / G_j,
    where M_j are the matches of order j, G_j the candidates' n-grams, C and R the words of
    candidates and references, all summed over the weighted reports.

    Args:
        statistics: Of n pairs.
        weights: [r, n], >= 0, such as how often each report was drawn.

    Returns:
        The keys of `VARIANTS`, float64 [r], 0 to 1; NaN where nothing weighs.

    Reference:
        Papineni et al., BLEU, ACL 2002; Lin, ROUGE, ACL workshop 2004; Lavie & Agarwal, METEOR,
        ACL workshop on statistical machine translation 2007.
    """
    said = statistics.candidate_words
    grams = np.maximum(said[:, None] - np.arange(ORDERS), 0)
    columns = [statistics.matches, grams, said[:, None], statistics.reference_words[:, None]]
    sums = weights @ np.concatenate(columns, axis=1)
    matched, possible = sums[:, :ORDERS], sums[:, ORDERS : 2 * ORDERS]
    c, r = sums[:, -2], sums[:, -1]
    weighed = weights.sum(axis=1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        precisions = np.where(matched > 0, matched / possible, 0)
        means = np.exp(np.cumsum(np.log(precisions), axis=1) / np.arange(1, ORDERS + 1))
        brevity = np.exp(np.minimum(0, 1 - r / np.where(c > 0, c, np.nan)))
    bleu = np.where(c[:, None] > 0, means * brevity[:, None], 0)
    bleu[~weighed] = np.nan
    found = {f"bleu_{order}": bleu[:, order - 1] for order in range(1, ORDERS + 1)}
    found["rouge_l"] = weighted_mean(statistics.rouge_l, weights)
    found["meteor_exact_stem"] = weighted_mean(statistics.meteor, weights)
    return found


def weighted_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the reports that have a score, under many weightings.

    Args:
        scores: [n], NaN where there is none.
        weights: [r, n], >= 0.

    Returns:
        float64 [r]; NaN where nothing that has a score weighs.
    """
    defined = ~np.isnan(scores)
    columns = np.stack([np.where(defined, scores, 0), defined], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        total, count = (weights @ columns).T
        return total / count


def text_estimates(
    statistics: TextStatistics, resamples: PatientResamples, left_out: PatientsLeftOut
) -> dict[str, Estimate]:
    """Every metric with what its interval needs.

    Args:
        statistics: Of n pairs.
        resamples: Of the patients of these n reports.
        left_out: Of the same patients.

    Returns:
        The keys of `VARIANTS`.
    """
    scored = ~np.isnan(statistics.rouge_l)
    evidence = dict.fromkeys(VARIANTS, float(resamples.n_patients))
    evidence["rouge_l"] = len(np.unique(resamples.patient_of_image[scored]))
    return report_estimates(
        lambda weights: text_resampled(statistics, weights), resamples, left_out, evidence
    )


def text_tests(
    first: TextStatistics, second: TextStatistics, swaps: PatientSwaps
) -> dict[str, PermutationTest]:
    """Is one encoder's metric higher than another's? Patients' reports are swapped.

    Args:
        first: Of the reports by one encoder.
        second: Of those by another, for the same references in the same order.
        swaps: Of the patients of these reports.

    Returns:
        The keys of `VARIANTS`.
    """
    both = TextStatistics(
        *(
            np.concatenate([getattr(first, field.name), getattr(second, field.name)])
            for field in fields(TextStatistics)
        )
    )
    return report_tests(lambda weights: text_resampled(both, weights), swaps)


def _matches(true: list[str], said: list[str], order: int) -> int:
    """Clipped matches of n-grams of one order."""
    theirs, ours = (
        Counter(zip(*(tokens[k:] for k in range(order)), strict=False)) for tokens in (true, said)
    )
    return (theirs & ours).total()


class _Rouge:
    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        self._tokens = DefaultTokenizer(use_stemmer=False)
        self._scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def seen(self, text: str) -> list[str]:
        """The words that ROUGE sees."""
        return self._tokens.tokenize(text)

    def score(self, reference: str, candidate: str) -> float:
        """F-measure, 0 to 1."""
        return self._scorer.score(reference, candidate)["rougeL"].fmeasure


class _Meteor:
    """METEOR of lists of words, without WordNet."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer
        from nltk.translate.meteor_score import single_meteor_score

        self._score = single_meteor_score
        self.stem = lru_cache(maxsize=None)(PorterStemmer().stem)  # reports repeat their words

    def synsets(self, word: str) -> list[str]:
        """Of what nltk asks WordNet: no word has a synonym."""
        return []

    def __call__(self, reference: list[str], candidate: list[str]) -> float:
        """The score, 0 to 1."""
        asked: Any = self  # takes the place of nltk's stemmer and of its reader of WordNet
        return self._score(reference, candidate, stemmer=asked, wordnet=asked)


def _scorers() -> tuple[_Rouge, _Meteor]:
    try:
        return _Rouge(), _Meteor()
    except ImportError as cause:
        raise InputError(
            f"Metrics of reports need {cause.name or 'rouge-score and nltk'}, which is not "
            "installed. Run: pip install 'selfray[reports]'"
        ) from None
