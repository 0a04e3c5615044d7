"""The look for copies: false alarms, what is found of edited copies, and time for 100,000 images.

    python benchmarks/leaks.py [DATASET FEATURES...]

DATASET is a phantom without copies (one of 400 patients is drawn if it is left out), FEATURES are
feature directories of it. Copies of training images are edited, and looked for among all training
images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from selfray.data.dataset import RadiographDataset, encode_png
from selfray.data.phantom import write_phantom
from selfray.evals.near_duplicates import (
    MAX_HASH_DISTANCE,
    MIN_COSINE,
    SAME_DETAILS,
    image_prints,
    nearest_cosine,
    nearest_hash,
    perceptual_hash,
    pixel_sha256,
    same_details,
)
from selfray.evaluate.leaks import find_leaks
from selfray.feature_directory import open_features
from selfray.models.published import load_encoder

sys.path.append(str(Path(__file__).parents[1] / "tests"))
COPIES = 200
ENCODER = "selfray/phantom"


def edits() -> dict:
    """The edits of the tests, and crops."""
    from planted_copies import EDITS

    crops = {
        f"cropped by {share} %": lambda p, s=share: p[len(p) * s // 100 :, len(p) * s // 100 :]
        for share in (2, 5)
    }
    return {**EDITS, **crops}


def false_alarms(dataset: RadiographDataset, features: dict[str, np.ndarray]) -> None:
    """Leaks of a dataset that has none; and how many pairs features alone would have named."""
    test, train = dataset.rows("test"), dataset.rows("train")
    for name, array in features.items():
        _, cosine = nearest_cosine(array[test], array[train])
        named = int((cosine >= MIN_COSINE).sum())
        print(f"{name}: centred cosine >= {MIN_COSINE} for {named} of {len(test)} test images")
    started = time.perf_counter()
    leaks = find_leaks(dataset, features, {})
    seconds = time.perf_counter() - started
    print(f"leaks of {len(dataset)} images: {len(leaks)} ({seconds:.0f} s)")


def hits(dataset: RadiographDataset) -> None:
    """Of copies of training images, the share that is found, by each way and by both."""
    train = dataset.rows("train")
    chosen = np.random.default_rng(0).choice(train, COPIES, replace=False)
    prints = image_prints(dataset.pixels, len(dataset), threads=1)
    encoder = load_encoder(ENCODER)
    everything = encoder([dataset.pixels(int(row)) for row in train])[0].numpy()
    print("edit | exact | by hash | by features | either")
    for name, edit in edits().items():
        copies = [edit(dataset.pixels(int(row))) for row in chosen]
        exact = np.isin([pixel_sha256(copy) for copy in copies], prints.sha256[train])
        hashes = np.array([perceptual_hash(copy) for copy in copies])
        by_hash, distance = nearest_hash(hashes, prints.hashes[train])
        by_features, cosine = nearest_cosine(encoder(copies)[0].numpy(), everything)
        found = []
        for where, near in (
            (by_hash, distance <= MAX_HASH_DISTANCE),
            (by_features, cosine >= MIN_COSINE),
        ):
            same = [
                bool(near[i])
                and same_details(copy, dataset.pixels(int(train[where[i]]))) >= SAME_DETAILS
                for i, copy in enumerate(copies)
            ]
            found.append(np.array(same))
        either = found[0] | found[1]
        shares = [100 * float(f.mean()) for f in (exact, *found, either)]
        print(f"{name} | " + " | ".join(f"{share:.1f} %" for share in shares))


def speed(dataset: RadiographDataset) -> None:
    """CPU seconds for 100,000 images of 518 x 518 pixels, from parts of the work."""
    rng = np.random.default_rng(0)
    large = [cv2.resize(dataset.pixels(row), (518, 518)) for row in range(20)]
    noisy = [np.clip(p + rng.normal(0, 4, p.shape), 0, 255).astype(np.uint8) for p in large]
    encoded = [encode_png(pixels) for pixels in noisy]

    def pixels(row: int) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(encoded[row % 20], np.uint8), cv2.IMREAD_GRAYSCALE)

    started = time.process_time()
    image_prints(pixels, 200)
    print(
        f"reading and hashing: {1000 * (time.process_time() - started) / 200:.1f} CPU ms an image"
    )
    hashes = rng.random((100_000, 256)) < 0.5
    splits = np.split(hashes, [70_000, 80_000])
    started = time.process_time()
    for judged, seen in ((2, 0), (2, 1), (1, 0)):
        nearest_hash(splits[judged], splits[seen])
    print(f"hashes, 70,000 / 10,000 / 20,000: {time.process_time() - started:.0f} s")
    features = rng.standard_normal((72_048, 768), dtype=np.float32)
    started = time.process_time()
    nearest_cosine(features[:2048], features[2048:])
    seconds = (time.process_time() - started) * (20 * 70 + 20 * 10 + 10 * 70) / (2.048 * 70)
    print(f"features of 768, from 2,048 x 70,000: {seconds:.0f} s an encoder")
    started = time.process_time()
    for one, other in zip(large[:10], large[10:], strict=True):
        same_details(one, other)
    print(f"a pair of different images: {100 * (time.process_time() - started):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("features", type=Path, nargs="*")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dataset is None:
            arguments.dataset = write_phantom(Path(folder) / "d", size=128).directory
        measure(RadiographDataset(arguments.dataset), arguments.features)


def measure(dataset: RadiographDataset, directories: list[Path]) -> None:
    """Print all numbers."""
    features = {path.name: np.asarray(open_features(path).cls) for path in directories}
    false_alarms(dataset, features)
    hits(dataset)
    speed(dataset)


if __name__ == "__main__":
    main()
