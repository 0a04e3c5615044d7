"""Resampled metrics of reports against a loop over the packages on the same resamples.

    python benchmarks/text_metrics.py

2,000 pairs of made reports of 15 to 30 words, of 1,200 patients, 1,000 resamples, on one thread.
`selfray` compares each pair once and weighs what it found; the loop hands every resample to
sacrebleu, rouge-score and nltk again. The loop runs on the first 4 resamples, and its time is
multiplied by 250: each resample has as many reports but for the patients' sizes. Three times in
turn; prints CPU seconds, the ratio of the medians and the largest difference of any value.
"""

from __future__ import annotations

import json
import time

import numpy as np
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from threadpoolctl import threadpool_limits

from selfray.evals.bootstrap import PatientResamples, PatientsLeftOut
from selfray.evals.text_metrics import VARIANTS, text_estimates, text_statistics, words

REPORTS, PATIENTS, LOOPED, REPEATS = 2000, 1200, 4, 3
_VOCABULARY = 300


class _NoSynonyms:
    def synsets(self, word: str) -> list[str]:
        return []


def _reports() -> tuple[list[str], list[str]]:
    """References, and candidates that keep two thirds of them, with Zipf's frequencies of words."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, _VOCABULARY + 1)
    drawn = rng.choice(_VOCABULARY, (2, REPORTS, 30), p=share / share.sum())
    drawn[1] = np.where(rng.random((REPORTS, 30)) < 2 / 3, drawn[0], drawn[1])
    references, candidates = (
        [" ".join(f"word{k}s" for k in row[: rng.integers(15, 31)]) + "." for row in side]
        for side in drawn
    )
    return references, candidates


def _by_packages(references: list[str], candidates: list[str]) -> list[float]:
    """In the order of `VARIANTS`."""
    truth, said = ([words(text) for text in side] for side in (references, candidates))
    joined = [[" ".join(text) for text in side] for side in (truth, said)]
    found = []
    for order in range(1, 5):
        bleu = BLEU(max_ngram_order=order, smooth_method="none", tokenize="none", force=True)
        found.append(bleu.corpus_score(joined[1], [joined[0]]).score / 100)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, candidates, strict=True)
    found.append(float(np.mean([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])))
    meteor = [
        single_meteor_score(a, b, wordnet=_NoSynonyms()) for a, b in zip(truth, said, strict=True)
    ]
    return [*found, float(np.mean(meteor))]


def main() -> None:
    references, candidates = _reports()
    patients = np.random.default_rng(1).integers(0, PATIENTS, REPORTS)
    resamples, left_out = PatientResamples(patients), PatientsLeftOut(patients)
    times = resamples.multiplicity[:LOOPED, resamples.patient_of_image]
    seconds: dict[str, list[float]] = {"selfray": [], "packages": []}
    worst = 0.0
    with threadpool_limits(1):
        for _ in range(REPEATS):
            began = time.process_time()
            ours = text_estimates(text_statistics(references, candidates), resamples, left_out)
            seconds["selfray"].append(time.process_time() - began)
            began = time.process_time()
            theirs = []
            for drawn in times:
                rows = np.repeat(np.arange(REPORTS), drawn)
                theirs.append(
                    _by_packages([references[k] for k in rows], [candidates[k] for k in rows])
                )
            elapsed = time.process_time() - began
            seconds["packages"].append(elapsed * len(resamples.multiplicity) / LOOPED)
            found = np.stack([ours[name].resampled[:LOOPED] for name in VARIANTS], axis=1)
            worst = max(worst, float(np.abs(found - theirs).max()))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, values in seconds.items():
        record = {"what": name, "cpu_seconds": round(medians[name], 2)}
        print(json.dumps(record | {"all_cpu_seconds": [round(s, 2) for s in values]}))
    ratio = round(medians["packages"] / medians["selfray"])
    print(json.dumps({"ratio": ratio, "largest_difference": float(f"{worst:.1e}")}))


if __name__ == "__main__":
    main()
