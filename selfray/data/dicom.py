"""One DICOM file → gray pixels as a reader would see them, and the few header fields we keep.

Only the fields named in `_FIELDS` are ever parsed: nothing else of a header, private fields
included, can reach an output. A raised `BadImage` holds a reason and no header value.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEGExtended12Bit

from selfray.errors import BadImage

MAX_PIXELS = 100_000_000
"""Largest image read, in pixels. The largest detectors of chest radiography have 4288 × 3524."""

MAX_FILE_BYTES = 1 << 30

# CT, MR and other slices are no projections. OT and a missing modality are let in: scanned film
# and de-identified archives have them.
RADIOGRAPHIC = frozenset({"CR", "DX", "DR", "RG", "RF", "XA", "PX", "MG", "IO", "OT", ""})

_FIELDS = [
    "SpecificCharacterSet",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "StudyDate",
    "StudyInstanceUID",
    "PatientID",
    "PatientSex",
    "PatientAge",
    "PatientBirthDate",
    "PatientSize",
    "PatientWeight",
    "ViewPosition",
    "ViewCodeSequence",
    "PatientOrientation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelAspectRatio",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
    "PresentationLUTShape",
    "PixelData",
]

_VIEWS = frozenset({"PA", "AP", "LL", "RL", "LLD", "RLD", "LAO", "RAO", "LPO", "RPO", "LATERAL"})

# SNOMED CT codes of the context group CID 4010, "DX View" (PS3.16).
_VIEW_CODES = {
    "272479007": "PA",
    "399348003": "AP",
    "399173006": "LL",
    "399198007": "RL",
    "399067008": "LATERAL",
    "399135007": "LAO",
    "399356000": "RAO",
    "399006002": "LPO",
    "399038007": "RPO",
}
_VIEW_MEANINGS = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "left lateral": "LL",
    "right lateral": "RL",
    "lateral": "LATERAL",
}

# How far from 1 the ratio of a pixel's sides may be.
_SQUARE = 0.01

# De-identified archives write one of these for everybody: no identity, so not one patient.
_NO_IDENTITY = frozenset({"", "0", "ANON", "ANONYMOUS", "ANONYMIZED", "NONE", "UNKNOWN"})


@dataclass(frozen=True)
class AcquisitionRecord:
    """What is known of how one radiograph came to be; None where it is not.

    Attributes:
        view: PA, AP, LL, RL, LATERAL (side unknown), or an oblique or decubitus view.
        sex: F or M.
        age_years: 0 to 120.
        weight_kg: Above 0.
        bmi: kg/m², from weight and size.
        patient_key: The patient identifier as found. Secret: hash it before it is written.
        study_key: The study identifier as found. Secret likewise.
        modality: DICOM modality; None for other files.
        bits: Bits a pixel in the source.
        photometric: MONOCHROME1, MONOCHROME2, RGB, ... as found.
        scanner: Manufacturer and model; neither serial number nor the name of a station.
        pixel_spacing_mm: Side of a pixel; None where it is not square.
    """

    view: str | None = None
    sex: str | None = None
    age_years: float | None = None
    weight_kg: float | None = None
    bmi: float | None = None
    patient_key: str | None = None
    study_key: str | None = None
    modality: str | None = None
    bits: int | None = None
    photometric: str | None = None
    scanner: str | None = None
    pixel_spacing_mm: float | None = None


def read_dicom(path: Path) -> tuple[np.ndarray, AcquisitionRecord]:
    """Read one DICOM file, with or without preamble.

    Stored values go through the modality LUT or rescale, the first VOI LUT or window, and the
    inversion of MONOCHROME1. A `PresentationLUTShape` of INVERSE says the same as MONOCHROME1
    (PS3.3 C.8.11.3.1.2), so the two together invert once. Padding pixels become the darkest. A
    window of a width that the standard forbids counts as no window.

    Colour images are returned as they are, for the caller to judge.

    Returns:
        float32 [H, W], or uint8 or uint16 [H, W, 3] if in colour, and the record.

    Raises:
        BadImage: No single projection image can be got from the file; the message is a reason
            that holds no header value.

    Reference:
        DICOM PS3.3 C.7.6.3, C.8.11.3, C.11.1, C.11.2.
    """
    # The one place where whatever a parser or a decoder throws at a broken file gets its reason.
    try:
        with _silence():
            return _read(path)
    except BadImage:
        raise
    except InvalidDicomError:
        raise BadImage("is no DICOM file") from None
    except RecursionError:
        raise BadImage("sequences are nested too deeply") from None
    except MemoryError:
        raise BadImage("needs more memory than there is") from None
    except OSError as cause:
        raise BadImage(
            f"cannot be read from disk ({cause.strerror or type(cause).__name__})"
        ) from None
    except Exception as cause:
        # pydicom and its decoders raise almost any type on damaged input: ValueError, KeyError,
        # AttributeError, struct.error, EOFError, RuntimeError, NotImplementedError, ...
        raise BadImage(f"DICOM header or pixels are damaged ({type(cause).__name__})") from None


@contextmanager
def _silence() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which quote header values, from being seen."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _read(path: Path) -> tuple[np.ndarray, AcquisitionRecord]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BadImage(f"file is over {MAX_FILE_BYTES >> 20} MiB")
    _refuse_inflating(path)
    header = pydicom.dcmread(path, force=True, specific_tags=list(_FIELDS))
    _refuse_by_header(header)
    record = _record(header)
    stored = _stored_values(header)
    if stored.ndim == 3:
        return stored, record
    return _to_square_pixels(_presented(stored, header), header), record


def _refuse_inflating(path: Path) -> None:
    """Refuse a deflated file that grows beyond all bounds: pydicom inflates it in one call."""
    with path.open("rb") as file:
        head = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() not in head:
            return
        if head[128:132] != b"DICM":
            raise BadImage("is deflated and has no preamble")
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        file.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))
        size = 0
        while chunk := file.read(1 << 16):
            while chunk:
                size += len(inflater.decompress(chunk, 1 << 24))
                chunk = inflater.unconsumed_tail
                if size > MAX_FILE_BYTES:
                    raise BadImage(f"inflates to over {MAX_FILE_BYTES >> 20} MiB")


def _refuse_by_header(header: FileDataset) -> None:
    """All that can be known to be wrong before a pixel is decoded."""
    if _text(header, "Modality").upper() not in RADIOGRAPHIC:
        raise BadImage("modality is not one of radiography (CR, DX, DR, RG, RF, XA, OT, ...)")
    if "PixelData" not in header:
        raise BadImage("has no pixel data" if "Rows" in header else "is no DICOM image")
    missing = [
        name
        for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "PhotometricInterpretation")
        if header.get(name) in (None, "")
    ]
    if missing:
        raise BadImage(f"lacks {', '.join(missing)}")
    if int(header.get("NumberOfFrames") or 1) != 1:
        raise BadImage("has several frames; a radiograph has one")
    rows, columns = int(header.Rows), int(header.Columns)
    if rows * columns > MAX_PIXELS:
        raise BadImage(f"declares {rows} × {columns} pixels; at most {MAX_PIXELS:,} are read")
    if header.BitsAllocated not in (8, 16):
        raise BadImage("has neither 8 nor 16 bits allocated a pixel")
    if header.PhotometricInterpretation == "PALETTE COLOR":
        raise BadImage("is in palette colour")
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        # Without a meta header nothing states the encoding; what pydicom parsed it with does.
        implicit, little = header.original_encoding
        header.file_meta.TransferSyntaxUID = syntax = UID(
            "1.2.840.10008.1.2" if implicit else f"1.2.840.10008.1.2.{1 if little else 2}"
        )
    if not syntax.is_compressed or syntax == DeflatedExplicitVRLittleEndian:
        needed, found = get_expected_length(header), len(header.PixelData)
        if found < needed:
            raise BadImage(f"pixel data is cut off: {found} bytes of {needed}")
    elif syntax == JPEGExtended12Bit and header.BitsStored > 8:
        raise BadImage("is in lossy JPEG of 12 bits, for which there is no free decoder here")
    else:
        _refuse_grown_codestream(bytes(header.PixelData), rows, columns)


def _stored_values(header: FileDataset) -> np.ndarray:
    """Decoded pixels: integers [H, W], or [H, W, 3] if in colour.

    Old machines put 12 bits at the upper end of 16. pydicom takes the lower ones whatever
    `HighBit` says, so it is told of all up to the highest, and the unused ones are shifted out.
    """
    unused = 0
    if not header.file_meta.TransferSyntaxUID.is_compressed:
        highest = int(header.get("HighBit") or 0)
        if header.BitsStored <= highest < header.BitsAllocated:
            unused = highest + 1 - header.BitsStored
            header.BitsStored = highest + 1
    return pixel_array(header, decoding_plugin=_decoder(header)) >> unused


def _decoder(header: FileDataset) -> str:
    """Which of pydicom's plugins decodes: the one that breaks least on damaged files.

    GDCM comes last: it aborts the process on some, in JPEG 2000 at one flipped bit. The RLE of
    pylibjpeg, which panics, comes after pydicom's own.
    """
    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return ""
    available = get_decoder(syntax).available_plugins
    for plugin in ("pydicom", "pylibjpeg", "pillow", "gdcm"):
        if plugin in available:
            return plugin
    raise BadImage(f"is compressed as {syntax.name}, for which no decoder is installed")


def _refuse_grown_codestream(encoded: bytes, rows: int, columns: int) -> None:
    """Refuse a JPEG 2000 codestream larger than the header says: decoders allocate by the stream.

    Reference:
        ISO/IEC 15444-1 A.5.1, the SIZ marker segment.
    """
    start = encoded.find(b"\xff\x4f\xff\x51")
    if start < 0:
        return
    width, height, left, top = struct.unpack_from(">4I", encoded, start + 8)
    if (width - left) * (height - top) > rows * columns:
        raise BadImage("the compressed image is larger than the header declares")


def _presented(stored: np.ndarray, header: FileDataset) -> np.ndarray:
    """Stored values [H, W] → float32 [H, W], higher is brighter."""
    low, high = int(stored.min()), int(stored.max())
    # All steps map a value by itself: do them once a value, not once a pixel.
    curve = _grayscale_curve(np.arange(low, high + 1), header)
    padding = _padding(np.arange(low, high + 1), header)
    index = np.subtract(stored, low, dtype=np.intp)
    if padding.any():
        present = np.bincount(index.ravel(), minlength=high - low + 1) > 0
        if not (present & ~padding).any():
            raise BadImage("every pixel is padding")
        curve[padding] = curve[present & ~padding].min()
    if not np.isfinite(curve).all():
        raise BadImage("grayscale transformation is not finite")
    return np.take(curve.astype(np.float32), index)


def _grayscale_curve(values: np.ndarray, header: FileDataset) -> np.ndarray:
    """What each stored value looks like: integers [N] → float64 [N], higher is brighter."""
    curve = apply_modality_lut(values, header)
    voi = header.get("VOILUTSequence")
    if voi and "LUTDescriptor" in voi[0] and "LUTData" in voi[0]:
        curve = _apply_lut(curve, voi[0], little=header.original_encoding[1] is not False)
    else:
        curve = _apply_window(np.asarray(curve, np.float64), header)
    curve = np.asarray(curve, np.float64)
    inverted = _text(header, "PresentationLUTShape").upper() == "INVERSE"
    if header.PhotometricInterpretation == "MONOCHROME1" or inverted:
        curve = -curve
    return curve


def _apply_lut(values: np.ndarray, item: pydicom.Dataset, little: bool) -> np.ndarray:
    """Look values up in a VOI LUT.

    pydicom's own `apply_voi` keeps indices in the table's width, so that a table of 8-bit
    entries wraps round on 12-bit input, and it takes no rescaled (float) input.

    Reference:
        DICOM PS3.3 C.11.2.1.1: values below the first mapped get the first entry, values beyond
        the table the last.
    """
    entries, first, _bits = (int(v) for v in item.LUTDescriptor)
    entries = entries or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if little else ">u2")
    table = np.asarray(data, np.float64).ravel()[:entries]
    if len(table) < entries:
        raise BadImage("VOI LUT is cut off")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)
    return table[index]


def _apply_window(values: np.ndarray, header: FileDataset) -> np.ndarray:
    """Window values to 0..1 by the first window; as they are if there is no valid one.

    pydicom's `apply_windowing` takes its output range through the rescale slope, so that a
    negative slope inverts the image a second time.

    Reference:
        DICOM PS3.3 C.11.2.1.2 (linear) and C.11.2.1.3 (sigmoid, linear exact).
    """
    center, width = _number(header, "WindowCenter"), _number(header, "WindowWidth")
    function = (_text(header, "VOILUTFunction") or "LINEAR").upper()
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return values
    if function == "SIGMOID":
        # Beyond ±700 exp overflows, and the curve is flat long before.
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _padding(values: np.ndarray, header: FileDataset) -> np.ndarray:
    """Which stored values are padding, bool [N] (PS3.3 C.7.5.1.1.2)."""
    first = _padding_bound(header, "PixelPaddingValue")
    if first is None:
        return np.zeros(len(values), bool)
    last = _padding_bound(header, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    return (values >= low) & (values <= high)


def _padding_bound(header: FileDataset, name: str) -> float | None:
    """One bound, with the sign of the pixels: -2000 is often written as unsigned 63536."""
    bound = _number(header, name)
    if bound is not None and header.get("PixelRepresentation") == 1:
        half = 1 << (header.BitsAllocated - 1)
        return (bound + half) % (2 * half) - half
    return bound


def _to_square_pixels(pixels: np.ndarray, header: FileDataset) -> np.ndarray:
    """Stretch the axis of coarser sampling, so that a pixel is as high as it is wide."""
    from PIL import Image

    ratio = 1.0
    for name in ("PixelAspectRatio", "ImagerPixelSpacing", "PixelSpacing"):
        height, width = _number(header, name, 0), _number(header, name, 1)
        if height and width and height > 0 and width > 0:
            ratio = height / width
            break
    if abs(ratio - 1) < _SQUARE:
        return pixels
    if not 0.25 <= ratio <= 4:
        raise BadImage("pixels are over four times as long as wide")
    rows, columns = pixels.shape
    size = (columns, round(rows * ratio)) if ratio > 1 else (round(columns / ratio), rows)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _record(header: FileDataset) -> AcquisitionRecord:
    weight = _number(header, "PatientWeight")
    weight = weight if weight and 0 < weight < 700 else None
    size = _number(header, "PatientSize")
    sex = _text(header, "PatientSex").upper()
    patient = _text(header, "PatientID")
    return AcquisitionRecord(
        view=_view(header),
        sex=sex if sex in ("F", "M") else None,
        age_years=_age(header),
        weight_kg=weight,
        bmi=weight / size**2 if weight and size and 0.3 <= size <= 2.6 else None,
        patient_key=None if patient.upper() in _NO_IDENTITY else patient,
        study_key=_text(header, "StudyInstanceUID") or None,
        modality=_text(header, "Modality").upper() or None,
        bits=int(header.BitsStored),
        photometric=str(header.PhotometricInterpretation),
        scanner=_scanner(header),
        pixel_spacing_mm=_pixel_spacing(header),
    )


def _scanner(header: FileDataset) -> str | None:
    """Manufacturer and model in one line; the manufacturer once where the model begins with it."""
    maker, model = (
        " ".join("".join(c for c in _text(header, name) if c.isprintable()).split())
        for name in ("Manufacturer", "ManufacturerModelName")
    )
    repeated = model.lower().startswith(maker.lower())
    return (model if repeated else f"{maker} {model}".strip()) or None


def _pixel_spacing(header: FileDataset) -> float | None:
    """Side of a pixel in mm.

    `PixelSpacing` comes first: it is that of the detector, or corrected for magnification, and
    `ImagerPixelSpacing` is always that of the detector (PS3.3 10.7.1.3).
    """
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        height, width = _number(header, name, 0), _number(header, name, 1)
        if height is not None and width is not None and (height, width) != (0, 0):
            square = width > 0 and abs(height / width - 1) < _SQUARE
            # Outside, 64 pixels would span under a millimetre, or one a centimetre.
            return height if square and 0.01 <= height <= 10 else None
    return None


def _view(header: FileDataset) -> str | None:
    position = _text(header, "ViewPosition").upper()
    if position in _VIEWS:
        return position
    codes = header.get("ViewCodeSequence")
    if codes:
        code, meaning = _text(codes[0], "CodeValue"), _text(codes[0], "CodeMeaning").lower()
        if view := _VIEW_CODES.get(code) or _VIEW_MEANINGS.get(meaning):
            return view
    # The row direction is towards the patient's front or back in a lateral view only; left and
    # right in it would not tell PA from AP.
    orientation = _text(header, "PatientOrientation").upper()
    return "LATERAL" if orientation in ("A", "P") else None


def _age(header: FileDataset) -> float | None:
    """Years from "061Y", "018M", "006W", "010D", else from the two dates."""
    age = _text(header, "PatientAge").upper()
    a_year = {"Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}
    years = None
    if age[:-1].isdecimal() and age[-1:] in a_year:
        years = int(age[:-1]) / a_year[age[-1]]
    elif age.isdecimal():
        years = float(age)  # the unit is often left out
    else:
        born, seen = _days(header, "PatientBirthDate"), _days(header, "StudyDate")
        if born is not None and seen is not None:
            years = (seen - born) / 365.25
    # A tenth of a year: the exact day of birth is nobody else's to know.
    return round(years, 1) if years is not None and 0 <= years <= 120 else None


def _days(header: FileDataset, name: str) -> int | None:
    from datetime import datetime

    try:
        return datetime.strptime(_text(header, name), "%Y%m%d").toordinal()
    except ValueError:
        return None


def _text(header: pydicom.Dataset, name: str) -> str:
    """The first value of a field, stripped; empty if it is missing or cannot be parsed."""
    try:
        value: Any = header.get(name)
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
        return ""
    if isinstance(value, MultiValue | list):
        value = value[0] if len(value) else ""
    return "" if value is None else str(value).strip().strip("\0")


def _number(header: pydicom.Dataset, name: str, index: int = 0) -> float | None:
    """A value of a numeric field; None if it is missing, no number, or not finite."""
    try:
        value: Any = header.get(name)
        if isinstance(value, MultiValue | list):
            value = value[index] if index < len(value) else None
        elif index:
            value = None
        number = float(value)
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
        return None
    return number if np.isfinite(number) else None
