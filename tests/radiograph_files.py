"""Small radiograph files for tests, written by pydicom and not by our code."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from selfray.data.radiograph import read_radiograph
from selfray.errors import BadImage


def soft_image(height: int = 96, width: int = 80, white: int = 4000, seed: int = 0) -> np.ndarray:
    """A smooth gray image with all values from 0 to `white` in play: uint16 [H, W]."""
    draws = np.random.default_rng(seed)
    coarse = draws.uniform(0, 1, (6, 5))
    fine = np.kron(coarse, np.ones((height // 6 + 1, width // 5 + 1)))[:height, :width]
    fine += 0.05 * draws.standard_normal((height, width))
    fine = (fine - fine.min()) / (fine.max() - fine.min())
    return np.rint(fine * white).astype(np.uint16)


def dicom_dataset(pixels: np.ndarray, bits: int = 12, **fields: Any) -> Dataset:
    """A CR image of unsigned pixels; `fields` are added by their DICOM keyword."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.SOPClassUID = ComputedRadiographyImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID
    header.Modality = "CR"
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    header.BitsStored = min(bits, header.BitsAllocated)
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = 1 if pixels.dtype.kind == "i" else 0
    header.PixelData = pixels.tobytes()
    header["PixelData"].VR = "OW" if pixels.dtype.itemsize == 2 else "OB"
    for name, value in fields.items():
        setattr(header, name, value)
    return header


def write_dicom(path: Path, pixels: np.ndarray, bits: int = 12, **fields: Any) -> Path:
    """Write `dicom_dataset` as a DICOM file."""
    dicom_dataset(pixels, bits, **fields).save_as(path, enforce_file_format=True)
    return path


def read_timed(path: str) -> tuple[float, str | None]:
    """Seconds that reading took, and why the file was refused, if it was."""
    started = time.perf_counter()
    reason = None
    try:
        pixels = read_radiograph(Path(path)).pixels
        assert pixels.dtype == np.float32 and pixels.ndim == 2 and np.isfinite(pixels).all()
    except BadImage as refused:
        reason = str(refused)
    return time.perf_counter() - started, reason


def started_without_ctrl_c(_: str) -> bool:
    """Whether this process was born with SIGINT blocked."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def die_or_shout(word: str) -> str:
    """In capitals; but `KILL` ends the process as a crash of native code would."""
    if word == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    return word.upper()


def die_of_dark(pixels: np.ndarray) -> np.ndarray:
    """The brightest value; but a dark image ends the process as a crash of native code would."""
    if pixels.max() < 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return pixels.max(keepdims=True)
