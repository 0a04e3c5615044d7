"""Linear probes against scikit-learn's optimum, with nulls, one class, and separable data."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from selfray.errors import InputError
from selfray.evals import feature_rows
from selfray.evals.feature_rows import FeatureRows, HeldRows, StreamedRows
from selfray.evals.linear_probe import (
    ProbeData,
    Standardizer,
    fit_logistic,
    fit_probes,
    fit_ridge,
    select,
    target_values,
    validation_probe,
)

STRENGTHS = (0.01, 1.0, 100.0, 10_000.0)


def correlated(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Standardised features that share a few directions, as features of an encoder do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8)) @ rng.normal(size=(8, d)) + 0.3 * rng.normal(size=(n, d))
    return (x - x.mean(axis=0)) / x.std(axis=0)


def labels_of(x: np.ndarray, rates: tuple[float, ...], nulls: float, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    score = x @ rng.normal(size=(x.shape[1], len(rates))) * 0.3 + rng.logistic(size=(len(x), 1))
    y = (score > np.quantile(score, [1 - r for r in rates], axis=0).diagonal()).astype(float)
    y[rng.random(y.shape) < nulls] = np.nan
    return y


def logistic_loss(w: np.ndarray, b: float, x: np.ndarray, y: np.ndarray, strength: float) -> float:
    z = x @ w + b
    return float((np.logaddexp(0, z) - y * z).sum() + strength / 2 * (w @ w))


def reference_loss(x: np.ndarray, y: np.ndarray, strength: float) -> float:
    model = LogisticRegression(
        C=1 / strength, solver="newton-cholesky", tol=1e-10, max_iter=1000
    ).fit(x, y)
    return logistic_loss(model.coef_[0], model.intercept_[0], x, y, strength)


@pytest.mark.parametrize("nulls", [0.0, 0.3])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_logistic_loss_is_scikit_learns_optimum(nulls, shift):
    x = correlated(400, 40) + shift  # features that are not centred must not matter
    y = labels_of(x - shift, (0.03, 0.2, 0.5), nulls)
    probe = fit_logistic(x, y, STRENGTHS)
    for s, strength in enumerate(STRENGTHS):
        for t in range(3):
            known = ~np.isnan(y[:, t])
            best = reference_loss(x[known], y[known, t], strength)
            w, b = probe.weights[s, t].numpy(), float(probe.biases[s, t])
            ours = logistic_loss(w, b, x[known], y[known, t], strength)
            assert abs(ours - best) <= 1e-6 * best


def test_a_whole_sweep_is_at_scikit_learns_optimum_by_both_of_its_solvers():
    """Rare findings, nulls, features of which some are nearly copies of others."""
    x = correlated(500, 30)
    x = np.concatenate([x, x[:, :6] + 1e-2 * correlated(500, 6, seed=4)], axis=1)
    x = x / x.std(axis=0)
    y = labels_of(x, (0.01, 0.05, 0.4), 0.2)
    strengths = tuple(np.logspace(-2, 5, 15))
    probe = fit_logistic(x, y, strengths)
    for s in (0, 1, 4, 7, 11, 14):
        for t in range(3):
            known = ~np.isnan(y[:, t])
            w, b = probe.weights[s, t].numpy(), float(probe.biases[s, t])
            ours = logistic_loss(w, b, x[known], y[known, t], strengths[s])
            for solver, tolerance in (("newton-cholesky", 1e-10), ("lbfgs", 1e-8)):
                model = LogisticRegression(
                    C=1 / strengths[s], solver=solver, tol=tolerance, max_iter=20_000
                ).fit(x[known], y[known, t])
                best = logistic_loss(
                    model.coef_[0], model.intercept_[0], x[known], y[known, t], strengths[s]
                )
                assert ours <= best * (1 + 1e-6), (s, t, solver)
                if solver == "newton-cholesky":  # lbfgs may stop a little above the optimum
                    assert ours >= best * (1 - 1e-6), (s, t)


def test_strengths_may_come_in_any_order_and_twice():
    x = correlated(200, 20)
    y = labels_of(x, (0.3,), 0.0)
    ordered = fit_logistic(x, y, (1.0, 10.0, 100.0)).weights[:, 0]
    mixed = fit_logistic(x, y, (100.0, 1.0, 10.0, 1.0)).weights[:, 0]
    torch.testing.assert_close(mixed, ordered[[2, 0, 1, 0]])


def test_separable_targets_reach_the_optimum_too():
    x = correlated(300, 60)
    y = (x @ np.random.default_rng(2).normal(size=(60, 2)) > 1).astype(float)
    probe = fit_logistic(x, y, STRENGTHS)
    for s, strength in enumerate(STRENGTHS):
        for t in range(2):
            w, b = probe.weights[s, t].numpy(), float(probe.biases[s, t])
            ours, best = (
                logistic_loss(w, b, x, y[:, t], strength),
                reference_loss(x, y[:, t], strength),
            )
            assert abs(ours - best) <= 1e-6 * best


def test_more_features_than_rows_and_constant_features_are_solved():
    x = np.concatenate([correlated(80, 200), np.zeros((80, 3))], axis=1)
    y = labels_of(x, (0.3,), 0.0)
    probe = fit_logistic(x, y, (1.0,))
    ours = logistic_loss(probe.weights[0, 0].numpy(), float(probe.biases[0, 0]), x, y[:, 0], 1.0)
    best = reference_loss(x, y[:, 0], 1.0)
    assert abs(ours - best) <= 1e-6 * best


def test_targets_do_not_influence_each_other():
    x = correlated(200, 20)
    y = labels_of(x, (0.1, 0.5), 0.1)
    together, alone = fit_logistic(x, y, (1.0,)), fit_logistic(x, y[:, 1:], (1.0,))
    torch.testing.assert_close(together.weights[:, 1:], alone.weights, atol=1e-4, rtol=1e-4)


def test_targets_of_one_class_or_without_labels_are_not_defined_and_spoil_nothing():
    x = correlated(200, 20)
    y = labels_of(x, (0.2, 0.2, 0.2, 0.2), 0.0)
    y[:, 0], y[:, 2], y[:, 3] = 0.0, 1.0, np.nan
    probe = fit_logistic(x, y, (1.0, 10.0))
    assert probe.defined.tolist() == [False, True, False, False]
    assert probe.weights[:, 1].isfinite().all() and probe.biases[:, 1].isfinite().all()
    assert probe.weights[:, [0, 2, 3]].isnan().all()
    assert not fit_logistic(x, y[:, [0]], (1.0,)).defined.any()


@pytest.mark.parametrize("nulls", [0.0, 0.3])
def test_ridge_is_scikit_learns(nulls):
    rng = np.random.default_rng(3)
    x = correlated(200, 30) + 2
    y = x @ rng.normal(size=(30, 3)) + rng.normal(size=(200, 3)) * 5 + 40
    y[rng.random(200) < nulls, 0] = np.nan
    probe = fit_ridge(x, y, STRENGTHS)
    for s, strength in enumerate(STRENGTHS):
        for t in range(3):
            known = ~np.isnan(y[:, t])
            model = Ridge(alpha=strength).fit(x[known], y[known, t])
            np.testing.assert_allclose(probe.weights[s, t], model.coef_, rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(probe.biases[s, t], model.intercept_, rtol=1e-8)


def test_ridge_leaves_constant_targets_undefined():
    probe = fit_ridge(correlated(50, 5), np.stack([np.full(50, 60.0), np.arange(50.0)], 1), (1.0,))
    assert probe.defined.tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, s: (np.where(np.arange(len(x))[:, None] == 3, np.inf, x), y, s), "row 3 "),
        (lambda x, y, s: (x, y * 2, s), "other than 1, 0 and null"),
        (lambda x, y, s: (x, y, (0.0,)), "above 0"),
        (lambda x, y, s: (x[:0], y[:0], s), "N >= 1"),
    ],
)
def test_bad_input_is_named(change, message):
    x = correlated(20, 4)
    with pytest.raises(InputError, match=message):
        fit_logistic(*change(x, labels_of(x, (0.5,), 0.0), (1.0,)))


def test_standardised_training_features_have_mean_0_and_deviation_1_and_constants_stay():
    x = np.random.default_rng(0).normal(7, 3, (100, 4)).astype(np.float32)
    x[:, 2] = 0.1
    standardised = Standardizer.of(x)(x)
    np.testing.assert_allclose(standardised.mean(dim=0), 0, atol=1e-6)
    np.testing.assert_allclose(standardised.std(dim=0, correction=0), [1, 1, 0, 1], atol=1e-6)


def test_selection_takes_the_best_and_of_equals_the_strongest():
    scores = np.array(
        [[0.9, 0.5, np.nan, 0.2], [0.9, 0.7, np.nan, np.nan], [0.1, 0.6, np.nan, 0.1]]
    )
    assert select(scores, (1.0, 10.0, 100.0)).tolist() == [1, 1, -1, 0]


def split(n: int, seed: int, names: tuple[str, ...], nulls: float = 0.0) -> ProbeData:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 50))
    columns = {
        "effusion": (x[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(float),
        "noise": rng.integers(0, 2, n).astype(float),
        "sex": (x[:, 1] > 0).astype(float),
        "age_years": 50 + 10 * x[:, 2] + rng.normal(size=n),
    }
    targets = np.stack([columns[name] for name in names], axis=1)
    targets[rng.random(targets.shape) < nulls] = np.nan
    return ProbeData((x * 3 + 1).astype(np.float32), targets, names)


NAMES = ("effusion", "noise", "age_years", "sex")


def test_probes_find_what_is_there_on_new_images_and_choose_by_validation():
    probes = fit_probes(split(300, 0, NAMES, 0.2), split(300, 1, NAMES, 0.2))
    test = split(300, 2, NAMES)
    predictions = probes.predict(test.features)
    assert np.mean((predictions["sex"] > 0.5) == test.targets[:, 3]) > 0.9
    assert np.abs(predictions["age_years"] - test.targets[:, 2]).mean() < 1.5
    assert all(0 <= predictions[name].min() <= predictions[name].max() <= 1 for name in NAMES[:2])


def test_the_strength_is_the_one_with_the_best_validation_score():
    train, validate = split(150, 0, NAMES, 0.2), split(150, 1, NAMES, 0.2)
    strengths = (0.01, 10.0, 100.0, 10_000.0)
    chosen = fit_probes(train, validate, strengths).strengths
    scale = StandardScaler().fit(train.features)
    for t, name in enumerate(NAMES):
        fit, check = (~np.isnan(d.targets[:, t]) for d in (train, validate))
        scores = []
        for strength in strengths:
            real = name == "age_years"
            model = Ridge(strength) if real else LogisticRegression(C=1 / strength, max_iter=1000)
            model.fit(scale.transform(train.features[fit]), train.targets[fit, t])
            x, y = scale.transform(validate.features[check]), validate.targets[check, t]
            scores.append(
                model.score(x, y) if real else roc_auc_score(y, model.decision_function(x))
            )
        assert scores[strengths.index(chosen[name])] == pytest.approx(max(scores), abs=1e-3)
        assert max(scores) > min(scores) + 5e-3  # else any choice would pass


def test_the_split_that_lacks_a_class_is_named():
    train, validate = split(60, 0, NAMES), split(60, 1, NAMES)
    train.targets[:, 0] = 1
    validate.targets[:, 3] = 0
    validate.targets[:, 2] = np.nan
    undefined = fit_probes(train, validate).undefined
    assert undefined == {
        "effusion": "the train split lacks both classes",
        "sex": "the validate split lacks both classes",
        "age_years": "the validate split lacks a second value",
    }


def test_validation_probe_reports_by_name_and_none_where_not_defined():
    train, validate = split(400, 0, NAMES), split(200, 1, NAMES)
    train.targets[:, 1] = 0
    result = validation_probe(
        train.features, train.targets, validate.features, validate.targets, NAMES
    )
    assert result["auroc"]["noise"] is None and result["auroc"]["effusion"] > 0.85
    assert result["macro_auroc"] == result["auroc"]["effusion"]
    assert result["sex_auroc"] > 0.97 and result["age_r2"] > 0.95 and result["n"] == 200


def test_validation_probe_is_quick_enough_to_run_inside_pre_training():
    x = correlated(3000, 384)
    y = labels_of(x, (0.02, 0.05, 0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.5), 0.05)
    names = [f"finding {k}" for k in range(9)]
    began = time.process_time()
    validation_probe(x[:2400], y[:2400], x[2400:], y[2400:], names)
    assert time.process_time() - began < 3


def test_a_number_that_the_data_names_is_predicted_in_its_unit():
    train = split(200, 0, ("effusion", "age_years"))
    train = ProbeData(train.features, train.targets, ("effusion", "dose"), frozenset({"dose"}))
    predictions = fit_probes(train, train).predict(train.features)
    assert np.abs(predictions["dose"] - train.targets[:, 1]).mean() < 2
    assert predictions["effusion"].min() >= 0 and predictions["effusion"].max() <= 1


def test_probabilities_are_those_of_scikit_learn():
    train, test = split(300, 0, NAMES), split(100, 1, NAMES)
    predictions = fit_probes(train, train, (30.0,)).predict(test.features)
    scale = StandardScaler().fit(train.features)
    model = LogisticRegression(C=1 / 30, tol=1e-8, solver="newton-cholesky")
    model.fit(scale.transform(train.features), train.targets[:, 0])
    expected = model.predict_proba(scale.transform(test.features))[:, 1]
    # Loss (about 100) within 1e-7 and curvature of 30 at least: weights within 1e-3 in all.
    np.testing.assert_allclose(predictions["effusion"], expected, atol=3e-3)


@pytest.fixture
def on_disk(tmp_path):
    """Writes the features of a split in two memory-mapped arrays, shuffled among other rows."""

    def write(data: ProbeData, name: str) -> ProbeData:
        x = np.asarray(data.features, np.float32)
        rows = np.random.default_rng(len(x)).permutation(len(x) + 7)[: len(x)]
        arrays = []
        for part, columns in enumerate((slice(0, 20), slice(20, None))):
            values = np.full((len(x) + 7, x[:, columns].shape[1]), np.nan, np.float32)
            values[rows] = x[:, columns]
            np.save(tmp_path / f"{name}{part}.npy", values)
            arrays.append(np.load(tmp_path / f"{name}{part}.npy", mmap_mode="r"))
        return ProbeData(FeatureRows(arrays, rows), data.targets, data.names)

    return write


@pytest.mark.parametrize("held", [True, False])
def test_features_on_disk_give_the_probes_of_features_in_memory(on_disk, monkeypatch, held):
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 64)  # so that there are several blocks
    if not held:
        monkeypatch.setattr(feature_rows, "HELD_BYTES", 0)
    splits = [split(300 + k, k, NAMES, 0.2) for k in range(3)]
    expected = fit_probes(splits[0], splits[1])
    train, validate, test = (on_disk(data, str(k)) for k, data in enumerate(splits))
    assert isinstance(Standardizer.of(train.features).rows(train.features),
                      HeldRows if held else StreamedRows)  # fmt: skip
    found = fit_probes(train, validate)
    assert found.strengths == expected.strengths
    predicted = found.predict(test.features)
    for name, values in expected.predict(splits[2].features).items():
        # Both are within 1e-7 of the same optimum, and take different ways there.
        np.testing.assert_allclose(predicted[name], values, atol=1e-3 * np.abs(values).max())
    taken = train.take(np.arange(100, 150))
    np.testing.assert_array_equal(
        np.concatenate(list(taken.features.blocks(7))), splits[0].features[100:150]
    )


def test_streamed_ridge_and_scale_are_those_of_scikit_learn(on_disk, monkeypatch):
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 64)
    monkeypatch.setattr(feature_rows, "HELD_BYTES", 0)
    data = split(300, 0, NAMES, 0.2)
    rows = on_disk(data, "ridge").features
    standardizer = Standardizer.of(rows)
    scale = StandardScaler().fit(data.features.astype(np.float64))
    np.testing.assert_allclose(standardizer.mean, scale.mean_, rtol=1e-12)
    np.testing.assert_allclose(standardizer.scale, scale.scale_, rtol=1e-12)
    probe = fit_ridge(standardizer.rows(rows), data.targets[:, [2]], (1.0, 100.0))
    known = ~np.isnan(data.targets[:, 2])
    x = scale.transform(data.features.astype(np.float64))
    np.testing.assert_allclose(torch.cat(list(standardizer.rows(rows).blocks(torch.float64))), x,
                               atol=1e-12)  # fmt: skip
    np.testing.assert_allclose(torch.cat(list(standardizer.rows(rows).blocks(torch.float32))), x,
                               atol=1e-5)  # fmt: skip
    x = x[known]
    for s, strength in enumerate((1.0, 100.0)):
        model = Ridge(alpha=strength).fit(x, data.targets[known, 2])
        np.testing.assert_allclose(probe.weights[s, 0], model.coef_, rtol=1e-8, atol=1e-9)


def test_bad_features_on_disk_are_named():
    x = np.ones((10, 3), np.float32)
    x[6, 1] = np.nan
    with pytest.raises(InputError, match="row 2 are not finite"):
        Standardizer.of(FeatureRows([x], np.array([0, 1, 6])))
    with pytest.raises(InputError, match="N >= 1"):
        Standardizer.of(FeatureRows([x], np.array([], int)))
    with pytest.raises(InputError, match=r"from 0 to 10; the arrays have rows 0 to 9"):
        FeatureRows([x], np.array([0, 10]))
    with pytest.raises(InputError, match="same N"):
        FeatureRows([x, x[:5]], np.array([0]))


def test_a_finding_without_labels_in_a_split_is_named():
    train, validate = split(60, 0, NAMES), split(60, 1, NAMES)
    train.targets[:, 0] = np.nan
    validate.targets[:, 1] = np.nan
    undefined = fit_probes(train, validate, (1.0,)).undefined
    assert undefined == {
        "effusion": "the train split lacks both classes",
        "noise": "the validate split lacks both classes",
    }


def test_targets_are_numbers_with_nan_for_null():
    columns = {"sex": np.array(["F", "M", None], object), "effusion": np.array([1.0, np.nan, 0.0])}
    values = target_values(columns.__getitem__, ["effusion", "sex"])
    np.testing.assert_array_equal(values, [[1, 1], [np.nan, 0], [0, np.nan]])
