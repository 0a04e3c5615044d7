"""BLEU, ROUGE-L and METEOR against the packages, with and without weights."""

from __future__ import annotations

import re
import sys
import warnings

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu
from nltk.translate.meteor_score import meteor_score
from report_pairs import report_pairs
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from selfray.errors import InputError
from selfray.evals.bootstrap import PatientResamples, PatientsLeftOut
from selfray.evals.paired_tests import PatientSwaps
from selfray.evals.text_metrics import (
    VARIANTS,
    TextStatistics,
    text_estimates,
    text_resampled,
    text_statistics,
    text_tests,
    words,
)

REFERENCES, CANDIDATES = report_pairs(1000)
STATISTICS = text_statistics(REFERENCES, CANDIDATES)
BLEUS = [f"bleu_{order}" for order in range(1, 5)]


class NoSynonyms:
    def synsets(self, word):
        return []


def sacrebleus(references, candidates):
    """Of texts whose words stand between spaces; by order, 0 to 1."""
    return [
        BLEU(max_ngram_order=order, smooth_method="none", tokenize="none", force=True)
        .corpus_score(candidates, [references])
        .score
        / 100
        for order in range(1, 5)
    ]


def once(statistics):
    weights = np.ones((1, len(statistics.meteor)))
    return {name: value[0] for name, value in text_resampled(statistics, weights).items()}


def of(statistics: TextStatistics, rows: np.ndarray) -> TextStatistics:
    return TextStatistics(**{name: value[rows] for name, value in vars(statistics).items()})


def test_the_pairs_hold_what_is_hard():
    empty = [not words(text) for text in (*REFERENCES, *CANDIDATES)]
    assert 50 < sum(empty[:1000]) < 200 and 50 < sum(empty[1000:]) < 300
    assert sum(a and b for a, b in zip(empty[:1000], empty[1000:], strict=True)) > 10
    assert sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in REFERENCES) > 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The X-ray: 2.5 cm, (right-sided) a/b.", "the x-ray 2.5 cm right-sided a b"),
        ("1. No effusion.\n2. Don\u2019t know\u2014no", "1 no effusion 2 don't know no"),
        ("___ and XXXX, 50 % -- 'quoted' end-", "and xxxx 50 quoted end"),
        ("胸部X线：右下肺炎。", "胸 部 x 线 右 下 肺 炎"),
        ("हृदय का आकार।", "हृदय का आकार"),
        ("GRO\u0308SSE, café", "grösse café"),
        ("", ""),
        (" \n.,;", ""),
    ],
)
def test_words_are_what_the_variant_says(text, expected):
    assert words(text) == expected.split()


def test_bleu_is_sacrebleus():
    texts = [[" ".join(words(text)) for text in side] for side in (REFERENCES, CANDIDATES)]
    found = once(STATISTICS)
    assert [found[name] for name in BLEUS] == pytest.approx(sacrebleus(*texts), rel=1e-12)


def test_bleu_is_nltks():
    # nltk counts a shorter candidate as one n-gram, which Papineni et al. and all others do not.
    rows = np.flatnonzero(STATISTICS.candidate_words >= 4)
    assert len(rows) > 500
    expected = corpus_bleu(
        [[words(REFERENCES[k])] for k in rows],
        [words(CANDIDATES[k]) for k in rows],
        weights=[(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4],
    )
    found = once(of(STATISTICS, rows))
    assert [found[name] for name in BLEUS] == pytest.approx(expected, rel=1e-12)


def test_bleu_of_each_single_pair_is_sacrebleus():
    for k in range(0, 1000, 5):
        texts = [[" ".join(words(side[k]))] for side in (REFERENCES, CANDIDATES)]
        found = once(of(STATISTICS, np.array([k])))
        assert [found[name] for name in BLEUS] == pytest.approx(sacrebleus(*texts), abs=1e-12)


def test_rouge_is_rouge_scores_where_it_sees_the_reference():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(REFERENCES, CANDIDATES, strict=True)
    expected = np.array([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])
    unseen = np.array(
        [bool(words(text)) and not re.search("[a-z0-9]", text.lower()) for text in REFERENCES]
    )
    assert 20 < unseen.sum() < 200
    np.testing.assert_array_equal(np.isnan(STATISTICS.rouge_l), unseen)
    np.testing.assert_array_equal(STATISTICS.rouge_l[~unseen], expected[~unseen])
    assert not expected[unseen].any()
    assert once(STATISTICS)["rouge_l"] == pytest.approx(expected[~unseen].mean(), rel=1e-12)


def test_meteor_is_nltks():
    expected = [
        meteor_score([words(reference)], words(candidate), wordnet=NoSynonyms())
        for reference, candidate in zip(REFERENCES, CANDIDATES, strict=True)
    ]
    np.testing.assert_array_equal(STATISTICS.meteor, expected)
    assert once(STATISTICS)["meteor_exact_stem"] == pytest.approx(np.mean(expected), rel=1e-12)


def test_a_stem_counts_as_a_match_and_a_synonym_does_not():
    found = text_statistics(["small effusions"] * 2, ["small effusion", "little effusions"])
    assert found.meteor[0] == pytest.approx(1 - 0.5 * (1 / 2) ** 3)  # one chunk of two matches
    assert found.meteor[1] < 0.6


def test_weights_are_the_same_as_standing_several_times():
    """Of resamples by patient, each written out and handed to the packages again."""
    n = 200
    patients = np.random.default_rng(1).integers(0, 90, n)
    resamples = PatientResamples(patients, count=8)
    estimates = text_estimates(of(STATISTICS, np.arange(n)), resamples, PatientsLeftOut(patients))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for r in range(8):
        rows = np.repeat(np.arange(n), resamples.multiplicity[r][resamples.patient_of_image])
        truth, said = ([words(side[k]) for k in rows] for side in (REFERENCES, CANDIDATES))
        expected = dict(
            zip(BLEUS, sacrebleus(*([*map(" ".join, side)] for side in (truth, said))), strict=True)
        )
        expected["rouge_l"] = np.mean(
            [
                scorer.score(REFERENCES[k], CANDIDATES[k])["rougeL"].fmeasure
                for k in rows
                if not np.isnan(STATISTICS.rouge_l[k])
            ]
        )
        expected["meteor_exact_stem"] = np.mean(
            [meteor_score([a], b, wordnet=NoSynonyms()) for a, b in zip(truth, said, strict=True)]
        )
        found = {name: estimate.resampled[r] for name, estimate in estimates.items()}
        assert found == pytest.approx(expected, rel=1e-12)


def test_evidence_is_patients_whose_reports_have_a_score():
    patients = ["a", "a", "b", "c"]
    statistics = text_statistics(["heart", "lung", "clear", "心影"], ["heart"] * 4)
    estimates = text_estimates(statistics, PatientResamples(patients), PatientsLeftOut(patients))
    assert (estimates["rouge_l"].evidence, estimates["bleu_1"].evidence) == (2, 3)


def test_no_overlap_and_empty_candidates_are_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for references, candidates in (
            (["heart normal", "clear"], ["", ""]),
            (["heart", "lungs clear"], ["no effusion", "seen"]),
            (["", ""], ["heart size normal", ""]),
        ):
            found = once(text_statistics(references, candidates))
            assert found == dict.fromkeys(VARIANTS, 0.0)
        nothing = text_resampled(text_statistics(["heart"], ["heart"]), np.zeros((1, 1)))
        assert all(np.isnan(value).all() for value in nothing.values())
        none = text_resampled(text_statistics([], []), np.ones((2, 0)))
        assert all(np.isnan(value).all() and len(value) == 2 for value in none.values())


def test_a_swap_test_is_that_of_swapped_texts():
    n = 60
    rng = np.random.default_rng(2)
    patients = rng.integers(0, 25, n)
    truth, a = REFERENCES[:n], CANDIDATES[:n]
    b = [*CANDIDATES[1:n], CANDIDATES[0]]
    swaps = PatientSwaps(patients, count=5)
    tests = text_tests(text_statistics(truth, a), text_statistics(truth, b), swaps)
    swapped = swaps.multiplicity[:, swaps.patient_of_image].astype(bool)
    for m in range(5):
        first, second = (
            once(text_statistics(truth, np.where(swapped[m], one, other).tolist()))
            for one, other in ((b, a), (a, b))
        )
        for name in VARIANTS:
            assert tests[name].swapped[m] == pytest.approx(first[name] - second[name], abs=1e-12)
    before = {name: once(text_statistics(truth, a))[name] for name in VARIANTS}
    after = {name: once(text_statistics(truth, b))[name] for name in VARIANTS}
    for name in VARIANTS:
        assert tests[name].difference == pytest.approx(before[name] - after[name], abs=1e-12)


def test_equal_encoders_are_not_told_apart_and_a_worse_one_is():
    statistics = of(STATISTICS, np.arange(300))
    shuffled = text_statistics(REFERENCES[:300], CANDIDATES[300:600])
    swaps = PatientSwaps(np.arange(300), count=199)
    assert {test.p for test in text_tests(statistics, statistics, swaps).values()} == {1.0}
    assert {test.p for test in text_tests(statistics, shuffled, swaps).values()} == {1 / 200}


def test_every_metric_has_its_variant():
    assert list(VARIANTS) == list(once(STATISTICS))
    assert all("words:" in text for text in VARIANTS.values())


@pytest.mark.parametrize("package", ["rouge_score", "nltk"])
def test_a_missing_package_is_named_in_one_line(monkeypatch, package):
    for name in [*sys.modules]:
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"^Metrics of reports need .*selfray\[reports\]'$"):
        text_statistics(["heart"], ["heart"])
