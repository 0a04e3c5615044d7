"""Images ingested a second, by one process and by one a core.

    python benchmarks/ingest.py [--images 48] [--side 2500]

Makes 12-bit DICOM radiographs of a detector's size, uncompressed and in lossless JPEG 2000, and
ingests each set with 1 process and with one a core, in turn, twice; prints images/s of the better
time and the ratio. Starting the processes is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)

from selfray.data.ingest import ingest


def radiograph(side: int) -> Dataset:
    """A smooth 12-bit image with quantum noise: as hard to decode as a real one."""
    draws = np.random.default_rng(0)
    coarse = draws.uniform(500, 3500, (12, 12)).astype(np.float32)
    pixels = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    pixels += draws.normal(0, 12, pixels.shape).astype(np.float32)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.SOPClassUID = DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID
    header.Modality = "DX"
    header.Rows = header.Columns = side
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PixelData = np.clip(pixels, 0, 4095).astype(np.uint16).tobytes()
    return header


def write_archive(folder: Path, images: int, side: int, compressed: bool) -> None:
    folder.mkdir()
    header = radiograph(side)
    if compressed:
        header.compress(JPEG2000Lossless)
    header.save_as(folder / "0.dcm", enforce_file_format=True)
    for number in range(1, images):
        shutil.copyfile(folder / "0.dcm", folder / f"{number}.dcm")


def seconds(source: Path, workers: int) -> float:
    out = source.with_name("out")
    started = time.perf_counter()
    ingest(source, out, workers=workers)
    passed = time.perf_counter() - started
    shutil.rmtree(out)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48, help="in each set (48)")
    parser.add_argument("--side", type=int, default=2500, help="pixels (2500)")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        for name in ("uncompressed", "jpeg2000"):
            source = Path(place) / name
            write_archive(source, arguments.images, arguments.side, name == "jpeg2000")
            times: dict[int, list[float]] = {1: [], cores: []}
            for _ in range(2):
                for workers in times:
                    times[workers].append(seconds(source, workers))
            rates = {workers: arguments.images / min(taken) for workers, taken in times.items()}
            result = {
                "files": f"{arguments.images} × {arguments.side}² 12-bit DICOM, {name}",
                "images_per_second": {str(k): round(v, 2) for k, v in rates.items()},
                "ratio": round(rates[cores] / rates[1], 2),
                "cores": cores,
                "machine": platform.processor() or platform.machine(),
            }
            print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
