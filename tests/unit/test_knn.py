"""k-NN scores against scikit-learn's classifier and a loop in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from selfray.evals import knn
from selfray.evals.knn import knn_scores


def problem(n: int = 120, m: int = 40, d: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(n, d)) + 0.5, rng.normal(size=(m, d)) + 0.5
    labels = np.stack([train[:, 0] > 0.5, rng.random(n) < 0.3], axis=1).astype(float)
    return train, labels, test


@pytest.mark.parametrize("elements", [8_000_000, 400])
def test_scores_are_those_of_scikit_learn_with_the_same_weights(monkeypatch, elements):
    monkeypatch.setattr(knn, "_ELEMENTS", elements)  # 400: several blocks
    train, labels, test = problem()
    scores = knn_scores(train, labels, test, (5, 30))
    for k in (5, 30):
        for t in range(2):
            model = KNeighborsClassifier(
                k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
            ).fit(train, labels[:, t])
            expected = model.predict_proba(test)[:, 1]
            np.testing.assert_allclose(scores[k][:, t], expected, atol=1e-4)


def test_null_neighbours_have_no_vote():
    train, labels, test = problem()
    labels[::3, 0] = np.nan
    labels[:, 1] = np.nan
    labels[7, 1] = 1
    scores = knn_scores(train, labels, test, (9,))[9]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    for row, similarity in enumerate(unit[1] @ unit[0].T):
        nearest = np.argsort(-similarity)[:9]
        nearest = nearest[~np.isnan(labels[nearest, 0])]
        weight = np.exp(similarity[nearest] / 0.07)
        expected = weight @ labels[nearest, 0] / weight.sum()
        assert scores[row, 0] == pytest.approx(expected, abs=1e-4)
    assert (scores[:, 1] == 1).all()  # the only label: a neighbour's, or else the prevalence


def test_more_neighbours_than_images_are_all_images_and_no_label_is_nan():
    train, labels, test = problem(n=12)
    labels[:, 1] = np.nan
    scores = knn_scores(train, labels, test, (12, 200))
    np.testing.assert_array_equal(scores[12], scores[200])
    assert np.isnan(scores[12][:, 1]).all()


def test_the_length_of_features_does_not_matter():
    train, labels, test = problem()
    lengths = np.random.default_rng(1).uniform(0.1, 10, (len(train), 1))
    np.testing.assert_allclose(
        knn_scores(train * lengths, labels, test, (10,))[10],
        knn_scores(train, labels, test, (10,))[10],
        atol=1e-5,
    )
