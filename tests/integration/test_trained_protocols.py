"""Every trained protocol on a dataset directory: predictions, reasons, and refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from micro_run import write_dataset
from trained_probe_data import assert_unchanged, micro_encoder, other_encoder, weights_of

from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.evals.linear_probe import target_values
from selfray.evaluate.trained_protocols import (
    CROP_SCALE,
    TRAINED_PROTOCOLS,
    judge_trained,
    random_crop,
)
from selfray.feature_directory import Features, open_features
from selfray.features import extract_features
from selfray.models.encoder import Encoder
from selfray.models.encoder_directory import save_encoder

NAMES = ("effusion", "nodule", "sex", "age_years")
REAL = frozenset({"age_years"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RadiographDataset:
    return write_dataset(tmp_path_factory.mktemp("trained") / "data")


@pytest.fixture
def rows(data: RadiographDataset) -> dict[str, np.ndarray]:
    """Not those of the dataset, whose two test images have the same nodules."""
    return {"train": np.arange(14), "validate": np.arange(14, 19), "test": np.arange(19, len(data))}


@pytest.fixture
def targets(data: RadiographDataset, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = target_values(data.column, NAMES)
    return {split: values[found] for split, found in rows.items()}


def features_of(encoder: Encoder, data: RadiographDataset) -> Features:
    images = torch.stack([encoder.preprocess(data.pixels(row)) for row in range(len(data))])
    cls, patches = encoder.features(images)
    tokens = patches.permute(0, 2, 3, 1).numpy().astype(np.float16)
    return Features(cls.numpy(), None, data.table.select([]), {}, tokens)


def judged(
    protocol: str,
    data: RadiographDataset,
    targets: Mapping[str, np.ndarray],
    rows: Mapping[str, np.ndarray],
    encoder: Encoder | None = None,
    features: Features | None = None,
):
    return judge_trained(
        protocol, encoder or micro_encoder(), data, targets, NAMES, REAL, rows,
        features=features, seed=0, steps=3,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", [*TRAINED_PROTOCOLS, "fine-tune-last-1"])
def test_every_protocol_predicts_and_leaves_the_encoder_as_it_was(protocol, data, targets, rows):
    encoder = micro_encoder()
    before = weights_of(encoder)
    features = features_of(encoder, data)
    found = judged(protocol, data, targets, rows, encoder, features)
    assert_unchanged(encoder, before)
    assert set(found.values) == set(NAMES) and not found.undefined
    for name, values in found.values.items():
        assert values.dtype == np.float64 and values.shape == (5,)
        # In years: the ages of training are 20 to 33, and three steps cannot lead far from them.
        low, high = (10, 60) if name in REAL else (0, 1)
        assert ((low < values) & (values < high)).all()
    settings = json.loads(json.dumps(found.settings))
    assert settings["steps"] == 3 and settings["seed"] == 0
    if protocol == "fine-tune-last-1":
        assert settings["trained"] == "last 1 blocks"


@pytest.mark.parametrize("protocol", ["sgd", "attentive", "fine-tune-last-1"])
def test_a_target_that_cannot_be_judged_is_named_with_its_reason(protocol, data, targets, rows):
    encoder = micro_encoder()
    features = features_of(encoder, data)
    one_class = copy.deepcopy(targets)
    one_class["train"][:, 0] = 1
    one_class["validate"][:, 1] = np.nan
    one_class["test"][:, 3] = 40
    found = judged(protocol, data, one_class, rows, encoder, features)
    assert found.undefined == {
        "effusion": "the train split lacks both classes",
        "nodule": "the validate split lacks both classes",
        "age_years": "the test split lacks a second value",
    }
    assert set(found.values) == {"sex"}
    nothing = {split: np.full_like(values, np.nan) for split, values in targets.items()}
    found = judged(protocol, data, nothing, rows, encoder, features)
    assert not found.values and set(found.undefined) == set(NAMES)


def test_other_networks_have_all_but_fine_tuning(data, targets, rows):
    encoder = other_encoder()
    assert set(judged("sgd", data, targets, rows, encoder).values) == set(NAMES)
    with pytest.raises(InputError, match="no vision transformer"):
        judged("fine-tune", data, targets, rows, encoder)


def test_unknown_protocols_and_missing_patch_tokens_are_refused(data, targets, rows):
    with pytest.raises(InputError, match=r"protocol 'fine-tun' is unknown. Did you mean 'fine-tu"):
        judged("fine-tun", data, targets, rows)
    with pytest.raises(InputError, match=r"fine-tune-last-0' is unknown"):
        judged("fine-tune-last-0", data, targets, rows)
    with pytest.raises(InputError, match=r"micro hold no patch tokens.*--patch-tokens"):
        judged("attentive", data, targets, rows)


def test_extracted_patch_tokens_are_taken(data, targets, rows, tmp_path):
    encoder = micro_encoder()
    save_encoder(encoder.vit, tmp_path / "encoder", mean=0.5, std=0.25, card={})
    extract_features(
        str(tmp_path / "encoder"), data.directory, tmp_path / "features", patch_tokens=True
    )
    features = open_features(tmp_path / "features")
    assert features.patch_tokens is not None and features.patch_tokens.dtype == np.float16
    expected = features_of(encoder, data).patch_tokens
    np.testing.assert_allclose(features.patch_tokens, expected, atol=0.01)
    assert set(judged("attentive", data, targets, rows, features=features).values) == set(NAMES)


def test_crops_are_parts_of_the_image_and_never_mirrored():
    across = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    for seed in range(200):
        crop = random_crop(across, 28, np.random.default_rng(seed)).astype(float)
        assert crop.shape == (28, 28)
        assert (np.diff(crop, axis=1) >= 0).all()  # darker on the left, as in the image
        # Half of the area at the full height is 100 pixels wide, so the middles of the first and
        # the last column of 28 are 96 apart at least.
        assert crop[:, -1].mean() - crop[:, 0].mean() > 94
    assert CROP_SCALE[0] == 0.5
