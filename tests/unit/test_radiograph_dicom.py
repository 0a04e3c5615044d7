"""DICOM: the pixels are those of the standard's formulas, the record says no more than it may."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian
from radiograph_files import dicom_dataset, soft_image, write_dicom

from selfray.data.radiograph import read_radiograph
from selfray.errors import BadImage

TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def lut(entries: list[int], first: int, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = struct.pack(f"<{len(entries)}H", *entries)
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item["LUTData"].VR = "OW"
    return Sequence([item])


def windowed(x: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1 and C.11.2.1.3, with output 0..1, float64."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    if function == "LINEAR_EXACT":
        return np.clip((x - center) / width + 0.5, 0, 1)
    if width == 1:
        return (x > center - 0.5).astype(float)
    return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def normalised(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.astype(np.float64)
    return (pixels - pixels.min()) / (pixels.max() - pixels.min())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    slope=st.sampled_from([None, 1.0, 0.25, 2.5, -1.0]),
    intercept=st.sampled_from([0.0, -1024.0, 12.5]),
    function=st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    share=st.floats(0.2, 0.8),
    width=st.floats(40, 5000),
    signed=st.booleans(),
    inverted=st.sampled_from(["MONOCHROME1", "MONOCHROME1+INVERSE", "INVERSE", "MONOCHROME2"]),
)
def test_rescale_window_and_inversion_are_the_formulas_of_the_standard(
    tmp_path_factory, slope, intercept, function, share, width, signed, inverted
):
    stored = soft_image().astype(np.int16 if signed else np.uint16)
    if signed:
        stored -= 2000
    fields = {"PhotometricInterpretation": inverted.split("+")[0].replace("INVERSE", "MONOCHROME2")}
    if "INVERSE" in inverted:
        fields["PresentationLUTShape"] = "INVERSE"
    expected = stored.astype(np.float64)
    if slope is not None:
        fields |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
        expected = expected * slope + intercept
    center = round(float(np.quantile(expected, share)), 2)
    width = round(width, 2)
    fields |= {"WindowCenter": [center, 1.0], "WindowWidth": [width, 2.0]}
    if function:
        fields["VOILUTFunction"] = function
    expected = windowed(expected, center, width, function or "LINEAR")
    if inverted != "MONOCHROME2":
        expected = 1 - expected
    if expected.min() == expected.max():
        return
    path = write_dicom(tmp_path_factory.mktemp("d") / "a.dcm", stored, **fields)
    ours = read_radiograph(path).pixels
    np.testing.assert_allclose(normalised(ours), normalised(expected), atol=3e-6)


@pytest.mark.parametrize("name", ["MR_small.dcm", "examples_overlay.dcm"])
def test_real_files_look_as_pydicom_presents_them(tmp_path, name):
    header = pydicom.dcmread(TEST_FILES / name)
    expected = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header)
    header.Modality = "CR"  # these are of MR, which is refused by name
    header.save_as(tmp_path / name)
    ours = read_radiograph(tmp_path / name).pixels
    np.testing.assert_allclose(normalised(ours), normalised(expected), atol=1e-6)


def test_a_modality_lut_is_looked_up_as_pydicom_does(tmp_path):
    stored = soft_image(white=300)
    entries = [int(v) for v in np.linspace(50, 60000, 200) ** 0.99]
    path = write_dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=lut(entries, 40, 16))
    expected = np.array(entries)[np.clip(stored.astype(int) - 40, 0, 199)]
    np.testing.assert_array_equal(read_radiograph(path).pixels, expected)
    header = pydicom.dcmread(path)
    np.testing.assert_array_equal(apply_modality_lut(header.pixel_array, header), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_voi_lut_of_either_width_is_looked_up_without_wrapping(tmp_path, bits):
    stored = soft_image(white=4000)
    entries = [int(v) for v in np.linspace(0, 2**bits - 1, 3000)]
    path = write_dicom(
        tmp_path / "a.dcm",
        stored,
        VOILUTSequence=lut(entries, 500, bits),
        WindowCenter=100,  # the LUT is preferred
        WindowWidth=3,
    )
    expected = np.array(entries)[np.clip(stored.astype(int) - 500, 0, 2999)]
    np.testing.assert_array_equal(read_radiograph(path).pixels, expected)
    if bits == 16:  # of 8, pydicom keeps the indices in 8 bits: why we do not use its lookup
        header = pydicom.dcmread(path)
        np.testing.assert_array_equal(apply_voi_lut(header.pixel_array, header), expected)


def test_a_window_that_the_standard_forbids_counts_as_none(tmp_path):
    stored = soft_image()
    plain = read_radiograph(write_dicom(tmp_path / "a.dcm", stored)).pixels
    for number, (center, width) in enumerate([(100, 0), (100, 0.5), (100, -5), (None, 100)]):
        path = write_dicom(
            tmp_path / f"{number}.dcm", stored, WindowCenter=center, WindowWidth=width
        )
        np.testing.assert_array_equal(read_radiograph(path).pixels, plain)


def test_bits_above_those_stored_do_not_count(tmp_path):
    stored = soft_image(white=4000)
    overlay = stored | (np.random.default_rng(0).integers(0, 16, stored.shape) << 12).astype("u2")
    clean = read_radiograph(write_dicom(tmp_path / "a.dcm", stored)).pixels
    dirty = read_radiograph(write_dicom(tmp_path / "b.dcm", overlay)).pixels
    np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_at_the_upper_end_are_those_stored(tmp_path, signed):
    stored = soft_image(white=4000).astype(np.int16 if signed else np.uint16)
    stored -= 2000 * signed
    fields = {"WindowCenter": 1500 - 2000 * signed, "WindowWidth": 1000}
    expected = read_radiograph(write_dicom(tmp_path / "a.dcm", stored, **fields)).pixels
    noise = np.random.default_rng(0).integers(0, 16, stored.shape).astype(stored.dtype)
    path = write_dicom(tmp_path / "b.dcm", (stored << 4) | noise, HighBit=15, **fields)
    np.testing.assert_array_equal(read_radiograph(path).pixels, expected)


def test_twelve_signed_bits_in_sixteen_keep_their_sign(tmp_path):
    stored = soft_image(white=4000).astype(np.int16) - 2000
    path = write_dicom(tmp_path / "a.dcm", stored & 0x0FFF)  # the sign is bit 11 alone
    np.testing.assert_array_equal(read_radiograph(path).pixels, stored)


def test_padding_of_signed_pixels_is_known_when_written_as_unsigned(tmp_path):
    stored = soft_image(white=1000).astype(np.int16)
    stored[:20] = -2000
    header = dicom_dataset(stored, bits=16)
    header.add_new("PixelPaddingValue", "US", 63536)
    header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    raw = (tmp_path / "a.dcm").read_bytes()
    assert struct.pack("<HH2sHH", 0x0028, 0x0120, b"US", 2, 63536) in raw
    assert read_radiograph(tmp_path / "a.dcm").pixels.min() == stored[20:].min()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_becomes_the_darkest_and_does_not_set_the_range(tmp_path, photometric):
    stored = soft_image(white=1000) + 500
    padded = stored.copy()
    padded[:20], padded[-20:] = 0, 7
    path = write_dicom(
        tmp_path / "a.dcm",
        padded,
        PhotometricInterpretation=photometric,
        PixelPaddingValue=0,
        PixelPaddingRangeLimit=9,
    )
    pixels = read_radiograph(path).pixels
    inside = pixels[20:-20]
    assert (pixels[:20] == inside.min()).all() and (pixels[-20:] == inside.min()).all()
    sign = 1 if photometric == "MONOCHROME2" else -1
    np.testing.assert_array_equal(inside, sign * stored[20:-20].astype(np.float32))


@pytest.mark.parametrize(
    ("field", "value", "shape"),
    [
        ("PixelAspectRatio", ["2", "1"], (192, 80)),
        ("ImagerPixelSpacing", [0.1, 0.3], (96, 240)),
        ("PixelSpacing", [0.2, 0.1], (192, 80)),
        ("PixelSpacing", [0.1432, 0.1430], (96, 80)),
        ("PixelSpacing", [0.1, 0], (96, 80)),
    ],
)
def test_pixels_that_are_not_square_are_resampled_to_square(tmp_path, field, value, shape):
    y, x = np.mgrid[:96, :80]
    round_spot = 1000 * np.exp(-(((y - 48) / 20) ** 2 + ((x - 40) / 20) ** 2))
    path = write_dicom(tmp_path / "a.dcm", round_spot.astype(np.uint16), **{field: value})
    pixels = read_radiograph(path).pixels
    assert pixels.shape == shape
    centre = pixels[shape[0] // 2, shape[1] // 2]
    assert centre == pytest.approx(1000, rel=0.02)  # stretched, not cropped


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"PatientAge": "061Y"}, {"age_years": 61}),
        ({"PatientAge": "018M"}, {"age_years": 1.5}),
        ({"PatientAge": "026W"}, {"age_years": 0.5}),
        ({"PatientAge": "010D"}, {"age_years": 0.0}),
        ({"PatientAge": "45"}, {"age_years": 45}),
        ({"PatientAge": "155Y"}, {"age_years": None}),
        ({"PatientAge": "old"}, {"age_years": None}),
        ({"PatientBirthDate": "19500101", "StudyDate": "20100702"}, {"age_years": 60.5}),
        ({"PatientBirthDate": "20110101", "StudyDate": "20100702"}, {"age_years": None}),
        ({"PatientBirthDate": "19500101"}, {"age_years": None}),
        ({"PatientSex": "F"}, {"sex": "F"}),
        ({"PatientSex": "O"}, {"sex": None}),
        ({"PatientWeight": 80, "PatientSize": 2}, {"weight_kg": 80, "bmi": 20}),
        ({"PatientWeight": 80, "PatientSize": 180}, {"weight_kg": 80, "bmi": None}),
        ({"PatientWeight": 0}, {"weight_kg": None}),
        ({"ViewPosition": "pa"}, {"view": "PA"}),
        ({"ViewPosition": "MUELLER^HANS"}, {"view": None}),
        ({"PatientOrientation": ["L", "F"]}, {"view": None}),
        ({"PatientOrientation": ["A", "F"]}, {"view": "LATERAL"}),
        ({"PatientID": " 17 ", "StudyInstanceUID": "1.2"}, {"patient_key": "17"}),
        ({"PatientID": "anonymous"}, {"patient_key": None}),
    ],
)
def test_the_record_says_what_the_header_says(tmp_path, fields, expected):
    record = read_radiograph(write_dicom(tmp_path / "a.dcm", soft_image(), **fields)).record
    for name, value in expected.items():
        assert getattr(record, name) == value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Manufacturer": "ACME", "ManufacturerModelName": "Acme Ray"}, ("Acme Ray", None)),
        ({"Manufacturer": "ACME", "ManufacturerModelName": ""}, ("ACME", None)),
        ({"ManufacturerModelName": "Ray"}, ("Ray", None)),
        ({"PixelSpacing": [0.15, 0.15], "ImagerPixelSpacing": [0.2, 0.2]}, (None, 0.15)),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.2]}, (None, 0.2)),
        ({"ImagerPixelSpacing": [0.2, 0.2005]}, (None, 0.2)),
        ({"PixelSpacing": [0.2, 0.21]}, (None, None)),
        ({"PixelSpacing": [25, 25]}, (None, None)),
        ({"PixelSpacing": [-1, -1]}, (None, None)),
        ({"PixelSpacing": [0, 0.2]}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_scanner_and_square_pixels_are_read(tmp_path, fields, expected):
    record = read_radiograph(write_dicom(tmp_path / "a.dcm", soft_image(), **fields)).record
    assert (record.scanner, record.pixel_spacing_mm) == expected


def test_the_view_is_found_in_the_view_code_too(tmp_path):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = "399173006", "SCT"
    path = write_dicom(tmp_path / "a.dcm", soft_image(), ViewCodeSequence=Sequence([item]))
    assert read_radiograph(path).record.view == "LL"
    item.CodeValue, item.CodeMeaning = "R-10214", "Postero-Anterior"
    path = write_dicom(tmp_path / "b.dcm", soft_image(), ViewCodeSequence=Sequence([item]))
    assert read_radiograph(path).record.view == "PA"


def test_no_other_header_field_is_in_the_record(tmp_path):
    header = dicom_dataset(soft_image(), PatientName="Secret^Name", InstitutionName="Secret")
    block = header.private_block(0x0011, "SECRET", create=True)
    block.add_new(1, "LO", "Secret")
    header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    record = dataclasses.asdict(read_radiograph(tmp_path / "a.dcm").record)
    assert "secret" not in str(record).lower()


def test_no_header_value_is_said_aloud(tmp_path, caplog, capfd, recwarn):
    odd = {
        "PatientAge": "SECRET",
        "PatientSize": 1,
        "PatientSex": "secret",
        "ViewPosition": "secret",
    }
    path = write_dicom(tmp_path / "a.dcm", soft_image(), **odd)
    recwarn.clear()
    caplog.clear()
    read_radiograph(path)
    assert not recwarn and not caplog.records
    assert capfd.readouterr() == ("", "")


def test_files_without_preamble_or_meta_header_are_read(tmp_path):
    stored = soft_image()
    whole = write_dicom(tmp_path / "a.dcm", stored).read_bytes()
    (tmp_path / "no preamble.dcm").write_bytes(whole[132:])
    header = dicom_dataset(stored)
    del header.file_meta
    header.save_as(tmp_path / "no meta.dcm", implicit_vr=True, little_endian=True)
    for name in ("no preamble.dcm", "no meta.dcm"):
        np.testing.assert_array_equal(read_radiograph(tmp_path / name).pixels, stored)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_encodings_of_the_header_give_the_same_pixels(tmp_path, syntax):
    header = dicom_dataset(soft_image())
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.dcm").pixels, soft_image())


REFUSED = {
    "CT": ({"Modality": "CT"}, "radiography"),
    "several frames": ({"NumberOfFrames": 2}, "several frames"),
    "report": ({"Modality": "SR"}, "radiography"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "palette"),
    "32 bits": ({"BitsAllocated": 32}, "neither 8 nor 16"),
    "no rows": ({"Rows": None}, "lacks Rows"),
    "cut off": ({"Rows": 97}, "cut off"),
    "absurd size": ({"Rows": 65535, "Columns": 65535}, "65535 × 65535"),
    "all padding": ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 5000}, "padding"),
    "thin pixels": ({"PixelSpacing": [1, 9]}, "four times"),
    "empty window": ({"WindowCenter": 60000, "WindowWidth": 2}, "constant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_single_projection_is_refused_with_its_reason(tmp_path, case):
    fields, reason = REFUSED[case]
    path = write_dicom(tmp_path / "a.dcm", soft_image(), **fields)
    with pytest.raises(BadImage, match=reason):
        read_radiograph(path)


def test_a_header_without_pixels_is_refused(tmp_path):
    header = dicom_dataset(soft_image())
    del header.PixelData
    header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(BadImage, match="no pixel data"):
        read_radiograph(tmp_path / "a.dcm")
    with pytest.raises(BadImage, match="radiography"):
        read_radiograph(TEST_FILES / "rtplan.dcm")


def test_colour_secondary_captures_are_refused_and_gray_ones_read(tmp_path):
    with pytest.raises(BadImage, match="colour"):
        read_radiograph(TEST_FILES / "SC_rgb_rle.dcm")
    header = pydicom.dcmread(TEST_FILES / "SC_rgb_rle.dcm")
    gray = soft_image(100, 100, white=255).astype(np.uint8)
    header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    header.PixelData = np.repeat(gray[..., None], 3, axis=2).tobytes()
    header["PixelData"].is_undefined_length = False
    header.PlanarConfiguration = 0
    header.save_as(tmp_path / "a.dcm", implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.dcm").pixels, gray)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("by_plane", [0, 1])
def test_a_gray_image_in_any_colour_space_and_layout_is_read(tmp_path, photometric, by_plane):
    gray = soft_image(white=255).astype(np.uint8)
    chroma = gray if photometric == "RGB" else np.full_like(gray, 128)
    layers = np.stack([gray, chroma, chroma], axis=0 if by_plane else 2)
    path = write_dicom(
        tmp_path / "a.dcm",
        gray,
        bits=8,
        SamplesPerPixel=3,
        PhotometricInterpretation=photometric,
        PlanarConfiguration=by_plane,
        PixelData=layers.tobytes(),
    )
    np.testing.assert_allclose(read_radiograph(path).pixels, gray, atol=1)
