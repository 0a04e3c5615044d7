"""The perceptual hash is that of the package imagehash."""

import cv2
import numpy as np
import pytest
from PIL import Image

from selfray.data.phantom.patients import patient_rows
from selfray.evals.near_duplicates import perceptual_hash

imagehash = pytest.importorskip("imagehash")


@pytest.mark.parametrize("size", [48, 128, 300])
def test_the_hash_is_imagehashs(size):
    rows = [row for number in range(4) for row in patient_rows(1, number, ("A", "C"), size)]
    for row in rows:
        pixels = cv2.imdecode(np.frombuffer(row["image"], np.uint8), cv2.IMREAD_GRAYSCALE)
        pixels = pixels[:, : size - size // 6]
        theirs = imagehash.phash(Image.fromarray(pixels), hash_size=16).hash.ravel()
        np.testing.assert_array_equal(perceptual_hash(pixels), theirs)
