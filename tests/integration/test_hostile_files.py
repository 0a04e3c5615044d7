"""Files from hell: whatever is in a file, it is read or refused with a reason, in bounded time."""

import io
import json
import re
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid
from radiograph_files import (
    die_or_shout,
    read_timed,
    soft_image,
    started_without_ctrl_c,
    write_dicom,
)
from sklearn.datasets import load_sample_image

from selfray.data import dicom
from selfray.data.ingest import ingest
from selfray.data.isolated import CRASHED, each_in_processes
from selfray.data.radiograph import read_radiograph
from selfray.errors import BadImage

TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
NAMES = (
    "plain.dcm",
    "j2k.dcm",
    "jpegls.dcm",
    "rle.dcm",
    "implicit.dcm",
    "bigendian.dcm",
    "deflated.dcm",
    "a.png",
    "a.jpg",
    "progressive.jpg",
    "a.tif",
)
SEEDS = 200
SECONDS = 10

# GDCM, the only free decoder of JPEG-LS here, may abort: that costs the file and not the run.
CRASHING = {"jpegls.dcm"}


def encoded(suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(soft_image(white=255).astype(np.uint8)).save(buffer, suffix, **options)
    return buffer.getvalue()


def as_cr(name: str) -> bytes:
    header = pydicom.dcmread(TEST_FILES / name)
    header.Modality = "CR"
    buffer = io.BytesIO()
    header.save_as(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    plain = write_dicom(
        tmp_path_factory.mktemp("original") / "a.dcm",
        soft_image(),
        PatientID="4711",
        PatientAge="061Y",
        RescaleSlope=1,
        RescaleIntercept=0,
        WindowCenter=2000,
        WindowWidth=3000,
        ViewPosition="PA",
        StudyInstanceUID=generate_uid(),
    )
    return {
        "plain.dcm": plain.read_bytes(),
        "j2k.dcm": as_cr("MR_small_jp2klossless.dcm"),
        "jpegls.dcm": as_cr("MR_small_jpeg_ls_lossless.dcm"),
        "rle.dcm": as_cr("MR_small_RLE.dcm"),
        "implicit.dcm": as_cr("MR_small_implicit.dcm"),
        "bigendian.dcm": as_cr("MR_small_bigendian.dcm"),
        "deflated.dcm": as_cr("image_dfl.dcm"),
        "a.png": encoded("PNG"),
        "a.jpg": encoded("JPEG"),
        "progressive.jpg": encoded("JPEG", progressive=True),
        "a.tif": encoded("TIFF", compression="tiff_lzw"),
    }


def mutated(content: bytes, seed: int) -> bytes:
    """Cut off, with bits flipped (more often where the header is), or with a part overwritten."""
    draws = np.random.default_rng(seed)
    changed = bytearray(content)
    if seed % 4 == 0:
        return bytes(changed[: draws.integers(0, len(changed))])
    reach = min(len(changed), 1500) if seed % 4 == 1 else len(changed)
    if seed % 4 == 3:
        start = int(draws.integers(0, reach))
        changed[start : start + 8] = draws.choice(
            np.array([0, 0xFF, 0x7F, 0x80], np.uint8), 8
        ).tobytes()
        return bytes(changed)
    for place in draws.integers(0, reach, draws.integers(1, 12)):
        changed[place] ^= 1 << draws.integers(0, 8)
    return bytes(changed)


@pytest.fixture(scope="module")
def outcomes(originals, tmp_path_factory) -> dict[str, list]:
    """By file, the outcome of the original (first) and of each of its mutations."""
    folder = tmp_path_factory.mktemp("mutated")
    paths = []
    for name, content in originals.items():
        for seed in range(SEEDS + 1):
            paths.append(folder / f"{seed} {name}")
            paths[-1].write_bytes(mutated(content, seed) if seed else content)
    # All in one call: starting processes would take longer than reading.
    all_outcomes = list(each_in_processes(read_timed, [str(path) for path in paths], 1))
    starts = range(0, len(paths), SEEDS + 1)
    return {
        name: all_outcomes[start : start + SEEDS + 1]
        for name, start in zip(originals, starts, strict=True)
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(outcomes, name):
    crashes = outcomes[name].count(CRASHED)
    assert crashes == 0 or name in CRASHING, f"{crashes} crashes"
    read = [outcome for outcome in outcomes[name] if outcome != CRASHED]
    assert max(seconds for seconds, _ in read) < SECONDS
    assert read[0][1] is None, "the undamaged file is read"
    reasons = [reason for _, reason in read if reason]
    assert len(reasons) > SEEDS // 10  # or the mutations would test nothing
    for reason in reasons:
        assert "\n" not in reason and len(reason) < 120 and "4711" not in reason


def nested_sequences(depth: int, undefined_length: bool) -> bytes:
    """Explicit little-endian elements: sequences in sequences, as in pydicom's issue 2330."""
    if undefined_length:
        opening = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
        opening += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        closing = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
        return opening * depth + closing * depth
    content = b""
    for _ in range(depth):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
        content = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, len(item)) + item
    return content


@pytest.mark.parametrize("undefined_length", [True, False])
@pytest.mark.parametrize("depth", [300, 20_000])
def test_deeply_nested_sequences_neither_recurse_nor_hang(tmp_path, depth, undefined_length):
    whole = write_dicom(tmp_path / "a.dcm", soft_image()).read_bytes()
    pixel_data = whole.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    nested = nested_sequences(depth, undefined_length)
    (tmp_path / "a.dcm").write_bytes(whole[:pixel_data] + nested + whole[pixel_data:])
    if undefined_length:
        with pytest.raises(BadImage, match="nested too deeply"):
            read_radiograph(tmp_path / "a.dcm")
    else:  # skipped by their length, without being parsed
        np.testing.assert_array_equal(read_radiograph(tmp_path / "a.dcm").pixels, soft_image())


def test_a_deflated_file_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 1 << 25)
    content = as_cr("image_dfl.dcm")
    start = 132 + 12 + struct.unpack_from("<I", content, 140)[0]
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(deflater.compress(bytes(1 << 24)) for _ in range(3)) + deflater.flush()
    (tmp_path / "a.dcm").write_bytes(content[:start] + bomb)
    assert len(bomb) < 1 << 17
    with pytest.raises(BadImage, match="inflates to over"):
        read_radiograph(tmp_path / "a.dcm")


def test_one_archive_of_hell_is_ingested_to_the_end(tmp_path, originals):
    source = tmp_path / "archive"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "loop").symlink_to(source)
    write_dicom(source / "deep" / "er" / "IM0001", soft_image(), PatientID="4711")
    (source / "good.png").write_bytes(originals["a.png"])
    (source / ".hidden.png").write_bytes(originals["a.png"])
    (source / "DICOMDIR").write_bytes(originals["plain.dcm"])
    (source / "notes.txt").write_text("no image")
    (source / "empty.dcm").touch()
    (source / "gone.png").symlink_to(tmp_path / "nowhere")
    (source / "cut.dcm").write_bytes(originals["plain.dcm"][:900])
    Image.new("L", (100, 100)).save(source / "black.png")
    Image.fromarray(load_sample_image("china.jpg")).save(source / "photo.jpg")
    counts = ingest(source, tmp_path / "out", size=64, workers=1)
    assert (counts.images, counts.patients, counts.quarantined) == (2, 2, 5)
    assert counts.passed_over == 1
    records = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    reasons = sorted(json.loads(record)["reason"] for record in records)
    expected = [
        "constant",
        "cut off|no pixel data|lacks",
        "in colour",
        "no DICOM image|no DICOM,",
        "No such file",
    ]
    assert len(reasons) == 5
    for pattern in expected:
        assert any(re.search(pattern, reason) for reason in reasons), (pattern, reasons)


def test_a_decoder_that_kills_its_process_costs_one_file(tmp_path):
    jobs = ["a", "KILL", "b", "c", "KILL", "d", "e", "f", "g", "h"]
    outcomes = list(each_in_processes(die_or_shout, jobs, 2))
    assert outcomes == [CRASHED if job == "KILL" else job.upper() for job in jobs]


def test_ctrl_c_cannot_reach_a_worker_before_it_ignores_it():
    assert list(each_in_processes(started_without_ctrl_c, ["a", "b"], 1)) == [True, True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
