"""The transformer of scikit-learn does what scikit-learn's tools ask of one."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from selfray import load_encoder
from selfray.errors import InputError
from selfray.sklearn import EncoderTransformer

ENCODER = "random:vit_pico/16@64"
# Those of scikit-learn's checks that do not give the estimator a table of numbers.
CHECKS = (
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_mixin_order",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
)


def images(count: int = 24) -> tuple[list[np.ndarray], np.ndarray]:
    """Noise, half of it with a bright square; and which half."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    drawn = random.integers(0, 120, (count, 70, 64), dtype=np.uint8)
    for label, image in zip(labels, drawn, strict=True):
        image[20:50, 20:50] += np.uint8(120 * label)
    return list(drawn), labels


@pytest.mark.parametrize("check", CHECKS)
def test_scikit_learns_own_checks_pass(check):
    getattr(estimator_checks, check)("EncoderTransformer", EncoderTransformer())


def test_features_are_those_of_the_encoder():
    x, _ = images(5)
    cls, patches = load_encoder(ENCODER)(x)
    expected = torch.cat([cls, patches.flatten(2).mean(dim=2)], dim=1).numpy()
    made = EncoderTransformer(ENCODER, batch_size=2)
    np.testing.assert_allclose(made.fit_transform(x), expected, atol=2e-5)
    np.testing.assert_allclose(made.transform(np.stack(x)), expected, atol=2e-5)
    for tokens, columns in (("cls", slice(128)), ("patch_mean", slice(128, None))):
        found = EncoderTransformer(ENCODER, tokens).transform(x)
        np.testing.assert_allclose(found, expected[:, columns], atol=2e-5)


def test_it_works_in_a_pipeline_under_cross_validation():
    x, y = images()
    pipeline = make_pipeline(EncoderTransformer(ENCODER), StandardScaler(), LogisticRegression())
    assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.9
    assert cross_val_score(pipeline, x, np.arange(24) // 12, cv=3).mean() < 0.9
    grid = {"encodertransformer__tokens": ["cls", "patch_mean"]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(x, y)
    assert search.best_score_ > 0.9


def test_paths_and_pictures_in_an_array_are_images_too(tmp_path):
    x, _ = images(2)
    for position, image in enumerate(x):
        image[0, :2] = 0, 255  # so that min-max changes nothing
        Image.fromarray(image).save(tmp_path / f"{position}.png")
    made = EncoderTransformer(ENCODER)
    expected = made.transform(x)
    paths = np.array([str(tmp_path / f"{position}.png") for position in range(2)])
    assert np.array_equal(made.transform(paths), expected)
    assert np.array_equal(made.transform([Image.fromarray(image) for image in x]), expected)


def test_a_table_of_one_column_is_that_column(tmp_path):
    pandas = pytest.importorskip("pandas")
    x, _ = images(2)
    paths = [str(tmp_path / f"{position}.png") for position in range(2)]
    for path, image in zip(paths, x, strict=True):
        Image.fromarray(image).save(path)
    made = EncoderTransformer(ENCODER)
    expected = made.transform(paths)
    assert np.array_equal(made.transform(np.array(paths)[:, None]), expected)
    assert np.array_equal(made.transform(pandas.DataFrame({"path": paths})), expected)
    assert np.array_equal(made.transform(pandas.Series(paths, index=[7, 5])), expected)
    for two in (np.array([paths]), pandas.DataFrame({"path": paths, "view": "PA"})):
        with pytest.raises(InputError, match="X has 2 columns, allowed: one"):
            made.transform(two)


@pytest.mark.parametrize("one", ["a.png", Path("a.png"), Image.new("L", (9, 9)), None, np.array(7)])
def test_one_image_is_no_list(one):
    with pytest.raises(InputError, match=r"X is one \w+\. Give a list"):
        EncoderTransformer(ENCODER).transform(one)


def test_columns_are_named_and_pandas_frames_can_be_asked_for():
    pandas = pytest.importorskip("pandas")
    x, _ = images(3)
    made = EncoderTransformer(ENCODER).set_output(transform="pandas")
    frame = made.fit_transform(x)
    assert isinstance(frame, pandas.DataFrame) and frame.shape == (3, 256)
    assert list(frame.columns) == list(made.get_feature_names_out())
    assert [frame.columns[i] for i in (0, 127, 128, 255)] == [
        "cls0", "cls127", "patch_mean0", "patch_mean127",
    ]  # fmt: skip


def test_weights_are_never_copied_or_pickled():
    x, _ = images(2)
    made = EncoderTransformer(ENCODER)
    expected = made.transform(x)
    assert len(pickle.dumps(made)) < 1000
    again = pickle.loads(pickle.dumps(made))
    assert again.get_params() == made.get_params()
    assert np.array_equal(again.transform(x), expected)
    assert not hasattr(clone(made), "_encoder")


def test_another_encoder_is_loaded_when_the_parameter_changes():
    x, _ = images(2)
    made = EncoderTransformer(ENCODER, "cls")
    before = made.transform(x)
    after = made.set_params(encoder="random:vit_nano/16@64").transform(x)
    assert (before.shape, after.shape) == ((2, 128), (2, 192))


def test_unknown_tokens_and_floats_are_refused():
    x, y = images(2)
    with pytest.raises(InputError, match="Did you mean 'patch_mean'"):
        EncoderTransformer(ENCODER, "patch_means").fit(x, y)
    with pytest.raises(InputError, match="image 0: pixels are float64"):
        EncoderTransformer(ENCODER).fit(x).transform(np.stack(x) / 255)
