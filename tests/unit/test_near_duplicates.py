"""Copies are told from images that are only alike."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from planted_copies import EDITS, phantom_rows
from scipy.spatial.distance import cdist

from selfray.evals.near_duplicates import (
    MAX_HASH_DISTANCE,
    SAME_DETAILS,
    image_prints,
    nearest_cosine,
    nearest_hash,
    perceptual_hash,
    pixel_sha256,
    same_details,
)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """One image a patient."""
    rows = {row["patient_id"]: row["image"] for row in phantom_rows(40)}
    return [cv2.imdecode(np.frombuffer(image, np.uint8), 0) for image in rows.values()]


def test_the_hash_is_that_of_the_cosine_transform_written_out(images):
    n = np.arange(64)
    cosine = 2 * np.cos(np.pi * np.outer(np.arange(16), 2 * n + 1) / 128)  # DCT-II
    for image in images[:5]:
        small = np.asarray(cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA), np.float64)
        low = cosine @ small @ cosine.T
        # 128 to 64 pixels: area means, and Pillow's kernel of Lanczos, differ by little.
        assert (perceptual_hash(image) != (low > np.median(low)).ravel()).mean() < 0.05
        again = perceptual_hash(np.ascontiguousarray(small.astype(np.uint8)))
        exact = cosine @ small.astype(np.uint8).astype(np.float64) @ cosine.T
        np.testing.assert_array_equal(again, (exact > np.median(exact)).ravel())


def test_prints_are_of_the_images_in_their_order(images):
    for threads in (1, 3):
        prints = image_prints(images.__getitem__, len(images), threads)
        for row, image in enumerate(images):
            np.testing.assert_array_equal(prints.hashes[row], perceptual_hash(image))
            assert prints.sha256[row] == pixel_sha256(image)


def test_the_same_bytes_in_another_shape_are_another_image():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert pixel_sha256(pixels) != pixel_sha256(pixels.reshape(4, 3))
    assert pixel_sha256(pixels) == pixel_sha256(np.asfortranarray(pixels))


def test_the_nearest_hash_is_that_of_counting_bits():
    rng = np.random.default_rng(0)
    queries, others = rng.random((1100, 256)) < 0.5, rng.random((70, 256)) < 0.5
    where, distance = nearest_hash(queries, others)
    expected = (queries[:, None] ^ others[None]).sum(axis=2)
    np.testing.assert_array_equal(distance, expected.min(axis=1))
    np.testing.assert_array_equal(expected[np.arange(1100), where], distance)


def test_the_nearest_features_are_scipys_after_centring():
    rng = np.random.default_rng(1)
    queries, others = (100 + rng.standard_normal((n, 24)) for n in (1030, 40))
    queries[3] = others.mean(axis=0)
    where, cosine = nearest_cosine(queries, others)
    expected = 1 - cdist(queries - others.mean(axis=0), others - others.mean(axis=0), "cosine")
    rest = np.arange(1030) != 3
    np.testing.assert_array_equal(where[rest], expected.argmax(axis=1)[rest])
    np.testing.assert_allclose(cosine[rest], expected.max(axis=1)[rest], atol=1e-4)
    everywhere = np.full((5, 24), 7.0)
    np.testing.assert_array_equal(nearest_cosine(everywhere, everywhere)[1], 0)


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_copy_is_near_and_has_the_same_details(images, name):
    for image in images[:8]:
        copy = EDITS[name](image)
        assert (perceptual_hash(copy) != perceptual_hash(image)).sum() <= MAX_HASH_DISTANCE
        assert same_details(image, copy) >= SAME_DETAILS


def test_a_crop_is_known_by_its_details_after_fitting(images):
    for image in images[:8]:
        assert same_details(image, image[6:, 6:]) >= SAME_DETAILS


def test_images_of_other_patients_have_other_details(images):
    hashes = np.array([perceptual_hash(image) for image in images])
    pairs = np.argwhere(np.triu(np.ones((len(images),) * 2), 1))
    distance = (hashes[pairs[:, 0]] != hashes[pairs[:, 1]]).sum(axis=1)
    assert distance.min() > MAX_HASH_DISTANCE
    for a, b in pairs[np.argsort(distance)[:40]]:  # those most alike
        assert same_details(images[a], images[b]) < SAME_DETAILS


def test_an_image_without_details_is_like_none():
    flat = np.full((70, 90), 30, np.uint8)
    assert same_details(flat, flat) == 0
    assert perceptual_hash(flat).shape == (256,)
