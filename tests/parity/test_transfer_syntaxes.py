"""Every transfer syntax in pydicom's own test files: what we read is what each decoder gives."""

import importlib.util
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import ExplicitVRLittleEndian

from selfray.data.radiograph import MIN_SIDE, read_radiograph
from selfray.errors import BadImage

FOLDERS = [Path(pydicom.__file__).parent / "data" / "test_files"]
if package := importlib.util.find_spec("data_store"):  # pydicom-data, where it is installed
    FOLDERS += [Path(place) / "data" for place in package.submodule_search_locations or ()]

UNREADABLE = {
    "MR_truncated.dcm": "cut off",
    "JPEG2000-embedded-sequence-delimiter.dcm": "larger than the header declares",
    "JPEG-lossy.dcm": "lossy JPEG of 12 bits",
    "JPGExtended.dcm": "lossy JPEG of 12 bits",
}


def gray_images() -> list[Path]:
    found = []
    for path in (path for folder in FOLDERS for path in sorted(folder.glob("*.dcm"))):
        header = pydicom.dcmread(path, force=True)
        if (
            "PixelData" in header
            and header.get("BitsAllocated") in (8, 16)
            and header.get("PhotometricInterpretation") == "MONOCHROME2"
            and int(header.get("NumberOfFrames") or 1) == 1
            and min(header.Rows, header.Columns) >= MIN_SIDE
            and path.name not in UNREADABLE
        ):
            found.append(path)
    return found


def plain(path: Path) -> pydicom.FileDataset:
    """The image without what changes gray values, and without its modality, which is refused."""
    header = pydicom.dcmread(path)
    for name in (
        "WindowCenter",
        "WindowWidth",
        "RescaleSlope",
        "RescaleIntercept",
        "PixelPaddingValue",
        "PixelSpacing",
        "PixelAspectRatio",
        "ModalityLUTSequence",
        "VOILUTSequence",
    ):
        header.pop(name, None)
    header.Modality = "OT"
    return header


@pytest.mark.parametrize("path", gray_images(), ids=lambda path: path.name)
def test_stored_values_are_those_of_every_decoder_plugin(tmp_path, path):
    header = plain(path)
    header.save_as(tmp_path / path.name)
    ours = read_radiograph(tmp_path / path.name).pixels
    syntax = header.file_meta.TransferSyntaxUID
    plugins = [""]
    if syntax.is_encapsulated:
        plugins = list(get_decoder(syntax).available_plugins)
        assert plugins, "no decoder for this transfer syntax"
    lossy = "Lossy" in syntax.name or syntax.name.startswith("JPEG Ext")
    for plugin in plugins:
        theirs = pixel_array(pydicom.dcmread(path), decoding_plugin=plugin)
        # Inverse cosine transforms of different make may round one level apart.
        np.testing.assert_allclose(ours, theirs, atol=1 if lossy else 0)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_decoder_reads_is_refused_with_its_reason(tmp_path, name):
    plain(FOLDERS[0] / name).save_as(tmp_path / name)
    with pytest.raises(BadImage, match=UNREADABLE[name]):
        read_radiograph(tmp_path / name)


def test_the_files_cover_the_transfer_syntaxes_of_archives():
    syntaxes = {pydicom.dcmread(path).file_meta.TransferSyntaxUID.name for path in gray_images()}
    assert len(syntaxes) >= 8
    assert ExplicitVRLittleEndian.name in syntaxes
