"""Parts of the training patients: nested, whole patients, and what they cannot fit is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from selfray.errors import InputError
from selfray.evals.label_efficiency import Drawn, draw_patients, label_efficiency
from selfray.evals.linear_probe import ProbeData

FRACTIONS = (0.01, 0.05, 0.1, 0.5, 1.0)


def patients_of(n: int, seed: int = 0) -> np.ndarray:
    """Identifiers of n images, one to four a patient, in no order."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"p{k:05d}" for k in range(n)], rng.integers(1, 5, n))[:n]
    return rng.permutation(names)


def test_parts_hold_whole_patients_are_nested_and_as_large_as_asked():
    patients = patients_of(2000)
    everyone = set(patients)
    smaller: set[str] = set()
    for fraction in FRACTIONS:
        rows = draw_patients(patients, np.zeros(2000), seed=3, fraction=fraction)
        drawn = set(patients[rows])
        assert smaller <= drawn
        assert len(drawn) == round(fraction * len(everyone))
        np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(patients, list(drawn))))
        smaller = drawn
    assert smaller == everyone


def test_a_draw_depends_on_the_seed_and_not_on_the_order_of_the_images():
    patients = patients_of(1000)
    shuffled = np.random.default_rng(5).permutation(patients)
    labels = np.zeros(1000)
    draws = [set(patients[draw_patients(patients, labels, seed=s, fraction=0.1)]) for s in (0, 1)]
    again = set(shuffled[draw_patients(shuffled, labels, seed=0, fraction=0.1)])
    assert draws[0] == again != draws[1]


def test_every_patient_is_as_likely_as_any_other():
    patients = np.arange(20)
    counts = np.zeros(20)
    for seed in range(2000):
        counts[draw_patients(patients, np.zeros(20), seed=seed, fraction=0.25)] += 1
    # Binomial with p = 1/4: standard deviation 19.4; 5 of them are met by chance once in 90,000.
    assert np.abs(counts - 500).max() < 5 * 19.4


def test_a_draw_by_class_holds_as_many_patients_of_each_and_is_nested():
    patients = np.repeat(np.arange(300), 2)
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(600) < 0.3, np.nan, (rng.random(600) < 0.2).astype(float))
    positive = set(patients[labels == 1])
    negative = set(patients[labels == 0]) - positive
    smaller: set[int] = set()
    for k in (1, 8, 32):
        rows = draw_patients(patients, labels, seed=1, per_class=k)
        drawn = set(patients[rows].tolist())
        assert len(drawn & positive) == len(drawn & negative) == k and len(drawn) == 2 * k
        assert smaller <= drawn and len(rows) == 4 * k
        smaller = drawn


def test_too_few_patients_of_a_class_are_named_with_their_numbers():
    labels = np.array([1, 1, 0, 0, 0, np.nan, 1, 0])
    patients = np.array([0, 0, 1, 2, 3, 4, 5, 5])  # 2 positive (0, 5), 3 negative, 1 not known
    with pytest.raises(InputError, match=r"^nodule has 2 positive and 3 negative patients, .* 3 a"):
        draw_patients(patients, labels, seed=0, per_class=3, finding="nodule")
    assert len(set(patients[draw_patients(patients, labels, seed=0, per_class=2)])) == 4


@pytest.mark.parametrize(
    "part",
    [{}, {"fraction": 0.1, "per_class": 2}, {"fraction": 0}, {"fraction": 1.1}, {"per_class": 0}],
)
def test_bad_parts_are_refused(part):
    with pytest.raises(InputError):
        draw_patients(np.arange(10), np.arange(10) % 2, seed=0, **part)


NAMES = ("effusion", "rare", "never", "dose")


def split(n: int, seed: int) -> ProbeData:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 40))
    rare = np.zeros(n)
    rare[: max(2, n // 200)] = 1
    targets = [x[:, 0] + rng.normal(size=n) > 0, rare, np.full(n, np.nan), 3 * x[:, 1] + 7]
    return ProbeData(x, np.stack(targets, axis=1).astype(float), NAMES, frozenset({"dose"}))


def test_predictions_are_those_of_scikit_learn_fitted_on_the_drawn_patients():
    train, validate, test = split(600, 0), split(200, 1), split(300, 2)
    patients = np.repeat(np.arange(300), 2)
    found = label_efficiency(
        train,
        validate,
        test.features,
        patients,
        fractions=(0.1, 1.0),
        per_class=(16,),
        seeds=(4, 5),
        strengths=(10.0,),
    )
    for drawn in (
        Drawn("effusion", 0.1, None, 5),
        Drawn("effusion", 1.0, None, 4),
        Drawn("effusion", None, 16, 4),
    ):
        rows = draw_patients(
            patients,
            train.targets[:, 0],
            seed=drawn.seed,
            fraction=drawn.fraction,
            per_class=drawn.per_class,
        )
        scale = StandardScaler().fit(train.features[rows])
        model = LogisticRegression(C=0.1, tol=1e-10, solver="newton-cholesky")
        model.fit(scale.transform(train.features[rows]), train.targets[rows, 0])
        expected = model.predict_proba(scale.transform(test.features))[:, 1]
        # Loss within 1e-7 of the optimum, curvature at least 10: weights within about 1e-3.
        np.testing.assert_allclose(found.predictions[drawn], expected, atol=5e-3)


def test_more_patients_predict_better_and_100_percent_are_fitted_once():
    train, validate, test = split(1000, 0), split(300, 1), split(1000, 2)
    found = label_efficiency(
        train,
        validate,
        test.features,
        np.arange(1000),
        fractions=(0.05, 1.0),
        per_class=(),
        seeds=(0, 1, 2),
    )
    scores = {
        drawn: roc_auc_score(test.targets[:, 0], values)
        for drawn, values in found.predictions.items()
        if drawn.target == "effusion"
    }
    assert [d.seed for d in scores if d.fraction == 1] == [0]
    whole = scores[Drawn("effusion", 1.0, None, 0)]
    assert whole > np.mean([s for d, s in scores.items() if d.fraction == 0.05])
    dose = found.predictions[Drawn("dose", 1.0, None, 0)]
    assert np.abs(dose - test.targets[:, 3]).mean() < 0.1  # in its unit, no probability


def test_what_a_part_cannot_fit_is_named_with_the_reason():
    train, validate, test = split(400, 0), split(100, 1), split(50, 2)
    found = label_efficiency(
        train,
        validate,
        test.features,
        np.arange(400)[::-1],
        fractions=(0.01,),
        per_class=(4,),
        seeds=(0,),
    )
    assert found.undefined == {
        Drawn("rare", 0.01, None, 0): "the part of 1 % of patients holds no positive",
        Drawn("never", 0.01, None, 0): "the part of 1 % of patients holds no label",
        Drawn("rare", None, 4, 0): "the train split holds 2 positive and 398 negative patients",
        Drawn("never", None, 4, 0): "the train split holds 0 positive and 0 negative patients",
    }
    assert {drawn.target for drawn in found.predictions} == {"effusion", "dose"}
    assert all(np.isfinite(values).all() for values in found.predictions.values())


def test_a_class_that_the_validation_split_lacks_is_not_blamed_on_the_part():
    train, validate, test = split(200, 0), split(100, 1), split(50, 2)
    validate = replace(validate, targets=np.where(validate.targets == 1, 0, validate.targets))
    found = label_efficiency(
        train,
        validate,
        test.features,
        np.arange(200),
        fractions=(0.5,),
        per_class=(),
        seeds=(0,),
    )
    reason = found.undefined[Drawn("effusion", 0.5, None, 0)]
    assert reason == "the validate split lacks both classes"
