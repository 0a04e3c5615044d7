"""An archive becomes a dataset: identities are hidden, runs resume, errors leave nothing behind."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from radiograph_files import soft_image, write_dicom

from selfray.data import ingest as ingest_module
from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.data.image_files import find_images
from selfray.data.ingest import ingest, split_of_patient
from selfray.data.radiograph import read_radiograph, resize_shorter_side, to_eight_bits
from selfray.errors import InputError, Interrupted


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Three patients with a name in path and header, and a file that is no image inside."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(6):
        place = folder / f"Doe^Jane{number % 3}"
        place.mkdir(exist_ok=True)
        write_dicom(
            place / f"{number}.dcm",
            soft_image(seed=number),
            PatientID=f"MRN-{number % 3}",
            PatientName=f"Doe^Jane{number % 3}",
            StudyInstanceUID=f"1.2.{number // 2}",
            PatientSex="F",
            PatientAge="061Y",
            ViewPosition="PA",
        )
    (folder / "Doe^Jane0" / "broken.dcm").write_bytes(b"Doe^Jane0 was here")
    Image.fromarray(soft_image(white=65535, seed=9)).save(folder / "no patient.png")
    return folder


@pytest.fixture(scope="module")
def ingested(archive, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ingested") / "out"
    counts = ingest(archive, out, size=64, workers=1)
    assert (counts.images, counts.patients, counts.quarantined) == (7, 4, 1)
    assert "7 images of 4 patients, 1 files refused (1: is no DICOM" in str(counts)
    return out


def test_the_counts_say_which_split_has_no_image(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.fromarray(soft_image(white=65535, seed=1)).save(folder / "one.png")
    counts = ingest(folder, tmp_path / "out", size=64, workers=1)
    assert sum(counts.splits.values()) == 1
    [used] = counts.splits
    others = " and ".join(split for split in ("train", "validate", "test") if split != used)
    assert f"1 to {used}" in str(counts) and f"No image is in {others}" in str(counts)


def test_the_dataset_holds_the_resized_images_and_what_headers_say(archive, ingested):
    rows = datasets.load_from_disk(str(ingested))
    expected = []
    for path in sorted(archive.rglob("*")):
        if path.is_file() and path.name != "broken.dcm":
            pixels = resize_shorter_side(read_radiograph(path).pixels, 64)
            expected.append(to_eight_bits(pixels).tobytes())
    assert sorted(np.asarray(image).tobytes() for image in rows["image"]) == sorted(expected)
    for row in rows:
        is_dicom = row["sex"] is not None
        assert (row["view"], row["age_years"]) == (("PA", 61.0) if is_dicom else (None, None))
        assert min(row["image"].size) == 64
    assert len(set(rows["study_id"])) == 7  # 3 patients in 2 studies each, and the PNG


def test_nothing_that_identifies_a_patient_is_written_but_to_the_private_files(archive, ingested):
    for path in ingested.rglob("*"):
        content = path.read_bytes()
        for secret in (b"Doe", b"Jane", b"MRN", b"no patient", str(archive).encode()):
            assert secret not in content, path.name
    for name in ("out.key", "out.files.csv"):
        assert stat.S_IMODE((ingested.parent / name).stat().st_mode) == 0o600
    listed = (ingested.parent / "out.files.csv").read_text().splitlines()
    assert len(listed) == 1 + 8
    quarantined = json.loads((ingested / "quarantine.jsonl").read_text())
    assert f"{quarantined['file']},Doe^Jane0/broken.dcm" in listed


def test_one_key_gives_one_hash_and_another_key_another(archive, ingested, tmp_path):
    same = tmp_path / "same"
    ingest(archive, same, size=64, workers=1, key_file=ingested.parent / "out.key")
    assert not (tmp_path / "same.key").exists()
    assert RadiographDataset(same).fingerprint == RadiographDataset(ingested).fingerprint
    small = tmp_path / "small"
    small.mkdir()
    (small / "1.dcm").write_bytes((archive / "Doe^Jane1" / "1.dcm").read_bytes())
    ingest(small, tmp_path / "x", size=64, workers=1)
    others = set(RadiographDataset(ingested).column("patient_id"))
    assert not set(RadiographDataset(tmp_path / "x").column("patient_id")) & others


def test_a_patient_keeps_its_split_whatever_else_is_in_the_archive():
    draws = [split_of_patient(f"patient {number}", 0) for number in range(20_000)]
    shares = [draws.count(split) / len(draws) for split in SPLITS]
    np.testing.assert_allclose(shares, (0.7, 0.1, 0.2), atol=0.015)  # five standard errors
    again = [split_of_patient(f"patient {number}", 1) for number in range(1000)]
    assert again != draws[:1000]


def test_the_table_wins_over_the_header_and_gives_findings_and_splits(archive, tmp_path):
    lines = ["file,split,sex,effusion"]
    lines += [f"{number},{SPLITS[number % 3]},M,{number % 2}" for number in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    counts = ingest(archive, tmp_path / "out", size=64, table=tmp_path / "t.csv", workers=1)
    assert counts.images == 6
    assert counts.reasons["is not in the table, which gives the splits"] == 1
    dataset = RadiographDataset(tmp_path / "out")
    assert dataset.findings == ("effusion",)
    assert sorted(dataset.column("effusion")) == [0, 0, 0, 1, 1, 1]
    assert set(dataset.column("sex")) == {"M"}
    assert [len(dataset.rows(split)) for split in SPLITS] == [2, 2, 2]


def test_an_interrupted_ingest_resumes_to_the_same_dataset(
    archive, ingested, tmp_path, monkeypatch
):
    monkeypatch.setattr(ingest_module, "_ROWS_PER_SHARD", 2)
    straight = tmp_path / "straight"
    key = ingested.parent / "out.key"
    ingest(archive, straight, size=64, workers=1, key_file=key, name="x")

    original = ingest_module._RowMaker.row
    made = []

    def row_then_signal(self, *arguments):
        made.append(arguments[0])
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module._RowMaker, "row", row_then_signal)
        with pytest.raises(Interrupted, match="3 images are kept"):
            ingest(archive, out, size=64, workers=1, key_file=key, name="x")
        assert signal.getsignal(signal.SIGINT) is before
        assert not out.exists()
        for changed in ({"seed": 1}, {"size": 65}, {"key_file": None}):
            arguments = {"size": 64, "key_file": key, "name": "x"} | changed
            with pytest.raises(InputError, match=r"begun with another|other settings"):
                ingest(archive, out, workers=1, **arguments)
        ingest(archive, out, size=64, workers=1, key_file=key, name="x")
    assert len(made) == 7  # no image was made into a row twice
    resumed, whole = RadiographDataset(out), RadiographDataset(straight)
    assert sorted(resumed.column("image_id")) == sorted(whole.column("image_id"))
    assert (out / "quarantine.jsonl").read_text() == (straight / "quarantine.jsonl").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in straight.iterdir()} | {
        path.name for path in out.glob("shard-*")
    }


def test_folders_that_hold_no_image_and_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "black").mkdir()
    Image.new("L", (80, 80)).save(tmp_path / "black" / "a.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for source, out, message in (
        ("empty", "out", "no image among 0 files"),
        ("texts", "out", "no image among 1 files"),
        ("nowhere", "out", "is not a directory"),
        ("black", "full", "exists and is not empty"),
        ("black", "black/out", "inside the folder"),
    ):
        with pytest.raises(InputError, match=message):
            ingest(tmp_path / source, tmp_path / out, workers=1)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
    with pytest.raises(InputError, match=r"none of 1 images can be used\. 1: is constant"):
        ingest(tmp_path / "black", tmp_path / "out", workers=1)
    assert not list(tmp_path.glob("out*"))
    for arguments, message in (
        ({"size": 32}, "64 to 4096"),
        ({"size": 100_000}, "64 to 4096"),
        ({"workers": 0}, "workers is 0. Allowed: 1 to 256"),
        ({"workers": -1}, "1 to 256"),
        ({"seed": -5}, "seed is -5. Use a whole number from 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808. Use"),
        ({"intensity": "max"}, "minmax, percentile"),
    ):
        with pytest.raises(InputError, match=message):
            ingest(tmp_path / "black", tmp_path / "out", **arguments)
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "short.key").write_text("abc")
    with pytest.raises(InputError, match="holds no key"):
        ingest(tmp_path / "black", tmp_path / "out", key_file=tmp_path / "short.key")


def test_what_is_refused_on_the_way_leaves_no_key_behind(archive, tmp_path, monkeypatch):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no unfinished dataset"):
        ingest(archive, tmp_path / "out", workers=1)

    def on_a_full_disk(path):
        path.touch()
        return Path("/dev/full").open("w")

    monkeypatch.setattr(ingest_module, "create_private", on_a_full_disk)
    with pytest.raises(InputError, match=r"key cannot be written \(No space left"):
        ingest(archive, tmp_path / "other", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_pipes_devices_broken_links_and_closed_folders_neither_hang_nor_vanish(
    tmp_path, monkeypatch
):
    source = tmp_path / "source"
    (source / "sub" / "closed").mkdir(parents=True)
    Image.fromarray(soft_image().astype(np.uint8)).save(source / "sub" / "röntgen\n\udcff.png")
    os.mkfifo(source / "pipe.png")
    (source / "device.dcm").symlink_to("/dev/zero")
    (source / "gone.png").symlink_to("nowhere")
    (source / "itself.png").symlink_to("itself.png")
    (source / "sub" / "loop").symlink_to(source)

    original = Path.iterdir

    def refused(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    counts = ingest(source, tmp_path / "out", size=64, workers=1)
    assert (counts.images, counts.quarantined, counts.passed_over) == (1, 2, 2)
    assert all(reason.startswith("cannot be read from disk (") for reason in counts.reasons)
    assert "1 folders cannot be opened" in str(counts)
    with pytest.raises(InputError, match="among 0 files; 1 folders cannot be opened"):
        ingest(source / "sub" / "closed", tmp_path / "none")


def test_a_path_too_long_to_open_does_not_end_the_run(tmp_path, monkeypatch):
    Image.fromarray(soft_image().astype(np.uint8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        Path("x" * 250).mkdir()
        os.chdir("x" * 250)
    assert find_images(tmp_path).images == ["a.png"]


def patients(source: Path, out: Path, **arguments) -> dict[str, str]:
    """Hash of the patient by file name."""
    ingest(source, out, size=64, workers=1, **arguments)
    dataset = RadiographDataset(out)
    with out.with_name(f"{out.name}.files.csv").open() as listed:
        names = dict(line.strip().split(",") for line in listed)
    pairs = zip(dataset.column("source_file"), dataset.column("patient_id"), strict=True)
    return {names[file]: patient for file, patient in pairs}


def test_images_of_one_patient_share_a_hash_however_the_patient_is_named(tmp_path):
    source = tmp_path / "source"
    (source / "copies").mkdir(parents=True)
    pixels = soft_image()
    # Spaces around an identifier do not count (PS3.5 6.2, LO); capitals do.
    for number, identifier in enumerate(("P17", " P17", "P17  ", "p17")):
        write_dicom(source / f"p{number}.dcm", pixels, PatientID=identifier)
    for number, study in enumerate(("1.2.3", "1.2.3", "1.2.4")):  # without an identifier
        write_dicom(source / f"s{number}.dcm", soft_image(seed=number), StudyInstanceUID=study)
    for name, seed in (("a.png", 1), ("copies/a.png", 1), ("b.png", 2)):
        Image.fromarray(soft_image(seed=seed).astype(np.uint8)).save(source / name)
    of = patients(source, tmp_path / "out")
    assert of["p0.dcm"] == of["p1.dcm"] == of["p2.dcm"] != of["p3.dcm"]
    assert of["s0.dcm"] == of["s1.dcm"] != of["s2.dcm"]
    assert of["a.png"] == of["copies/a.png"] != of["b.png"]
    assert len(set(of.values())) == 6


def test_a_table_that_names_patients_must_name_all_of_them(archive, tmp_path):
    """Or a patient whose other images are named by their header could be in two splits."""
    lines = ["file,patient_id", "0,P", "1,P", "2,Q", "3,"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    of = patients(archive, tmp_path / "out", table=tmp_path / "t.csv")
    assert of["Doe^Jane0/0.dcm"] == of["Doe^Jane1/1.dcm"] != of["Doe^Jane2/2.dcm"]
    assert len(of) == 3
    refused = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert refused.count("has no patient_id in the table, which gives the patients") == 4


def test_scanner_and_pixel_spacing_are_those_of_the_stored_images(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    makers = {"Manufacturer": "ACME ", "ManufacturerModelName": "Ray  1"}
    pixels = soft_image(height=160, width=128)
    write_dicom(source / "a.dcm", pixels, **makers, PixelSpacing=[0.2, 0.2], StationName="SECRET")
    write_dicom(
        source / "b.dcm", pixels, ImagerPixelSpacing=[0.1, 0.1], DeviceSerialNumber="SECRET"
    )
    write_dicom(source / "c.dcm", pixels, PixelSpacing=[0.2, 0.1], InstitutionName="SECRET")
    Image.fromarray(pixels.astype(np.uint8)).save(source / "d.png")
    (tmp_path / "t.csv").write_text("file,pixel_spacing_mm,scanner\nd,0.3,Old film\n")
    out = tmp_path / "out"
    ingest(source, out, size=64, workers=1, table=tmp_path / "t.csv")
    dataset = RadiographDataset(out)
    listed = dict(line.split(",") for line in (tmp_path / "out.files.csv").read_text().split())
    names = [listed[file] for file in dataset.column("source_file")]
    scanner = dict(zip(names, dataset.column("scanner"), strict=True))
    spacing = dict(zip(names, dataset.column("pixel_spacing_mm"), strict=True))
    assert scanner == {"a.dcm": "ACME Ray 1", "b.dcm": None, "c.dcm": None, "d.png": "Old film"}
    # Half as many pixels, each twice as long.
    assert [spacing[name] for name in ("a.dcm", "b.dcm", "d.png")] == pytest.approx([0.4, 0.2, 0.6])
    assert np.isnan(spacing["c.dcm"])
    assert not any(b"SECRET" in path.read_bytes() for path in out.iterdir())


def test_numbers_and_categories_of_the_table_are_in_the_dataset(archive, tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{i},{12.5 + i // 2},{('ICU', 'ICU', '')[i % 3]}\n" for i in range(6)]
    path.write_text("file,hb,ward\n" + "".join(lines))
    out = tmp_path / "out"
    ingest(archive, out, size=64, workers=1, table=path)
    assert RadiographDataset(out).records == {"hb": "number", "ward": "category"}
    rows = datasets.load_from_disk(str(out)).remove_columns(["image", "mask", "finding_mask"])
    pairs = sorted((row["hb"] or 0, row["ward"] or "") for row in rows)
    assert pairs == sorted(
        [
            (0, ""),
            (12.5, "ICU"),
            (12.5, "ICU"),
            (13.5, ""),
            (13.5, "ICU"),
            (14.5, ""),
            (14.5, "ICU"),
        ]
    )


def test_a_column_of_identifiers_is_found_where_only_the_headers_name_the_patients(
    archive, tmp_path
):
    """Six images of three patients: by image the values look shared."""
    path = tmp_path / "t.csv"
    path.write_text("file,called\n" + "".join(f"{i},N{i % 3}\n" for i in range(6)))
    with pytest.raises(InputError, match="'called': 3 different values of 3 patients"):
        ingest(archive, tmp_path / "out", size=64, workers=1, table=path)
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
from selfray.data.ingest import ingest
from selfray.errors import InputError

if __name__ == "__main__":
    # A limit on the size of a file stands in for a full disk: writing fails part-way.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        ingest(Path(sys.argv[1]), Path(sys.argv[2]), size=300, workers=1)
    except InputError as error:
        print(error)
"""


def test_a_full_disk_is_said_in_one_line_and_the_same_command_continues(archive, tmp_path):
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), str(archive), str(out)], capture_output=True, text=True
    )
    assert "no room left on the disk" in done.stdout, done.stderr
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/.*")), "half a shard would take room"
    assert ingest(archive, out, size=300, workers=1).images == 7
