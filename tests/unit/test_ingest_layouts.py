"""Patients named by a published layout alone stay in one split; where none is named, it is said."""

import csv
import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from radiograph_files import soft_image, write_dicom

from selfray.data import ingest as ingest_module
from selfray.data.dataset import RadiographDataset
from selfray.data.ingest import ingest
from selfray.data.published_layouts import Place, published_place
from selfray.errors import Interrupted

WARNING = "warning: no image names its patient"


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("files/p10/p10000032/s50414267/02aa-1f.jpg", Place("10000032", "s50414267")),
        ("p10000032/s50414267/er/x.jpg", Place("10000032", "s50414267")),
        ("p10000032/2016/s50414267/x.jpg", Place("10000032", "s50414267")),
        ("p10000032/s50414267.jpg", None),
        ("p1000003/s50414267/x.jpg", None),
        ("p100000320/s50414267/x.jpg", None),
        ("xp10000032/s50414267/x.jpg", None),
        ("s50414267/p10000032/x.jpg", None),
        ("CXR3_IM-1384-1001.png", Place("CXR3", "CXR3")),
        ("NLMCXR_png/CXR1_1_IM-0001-3001.png", Place("CXR1", "CXR1")),
        ("3/3_IM-1384-1001.dcm", Place("CXR3", "CXR3")),
        ("3_IM-1384-1001.dcm.png", Place("CXR3", "CXR3")),
        ("CXR1001_IM-0004-1001-0002.png", Place("CXR1001", "CXR1001")),
        ("CXR1063_IM-0044-84654001.png", Place("CXR1063", "CXR1063")),
        ("CXR3_1_IM-1384-1001.png", Place("CXR3", "CXR3")),
        ("IM-0001-0001.dcm", None),
        ("CXR3_IM-1384.png", None),
        ("3.png", None),
    ],
)
def test_paths_as_published_name_patient_and_study(file, place):
    assert published_place(file) == place


def archive(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(soft_image(white=65535, seed=seed)).save(folder / name)
    return folder


def columns_by_path(out: Path, *columns: str) -> dict[str, tuple]:
    with (out.parent / f"{out.name}.files.csv").open(newline="") as file:
        path_of = {row["source_file"]: row["path"] for row in csv.DictReader(file)}
    dataset = RadiographDataset(out)
    rows = zip(*(dataset.column(name) for name in ("source_file", *columns)), strict=True)
    return {path_of[name]: tuple(values) for name, *values in rows}


MIMIC = [
    f"files/p10/p1000000{patient}/s5000{patient}{study:03}/{image}.png"
    for patient in range(4)
    for study in range(3)
    for image in range(1 + study % 2)
]


@pytest.mark.parametrize("reports", [False, True])
def test_a_patient_of_mimic_without_headers_is_one_patient(tmp_path, reports):
    source = archive(tmp_path / "in", MIMIC)
    for name in {Path(name).parent for name in MIMIC[:6]}:
        path = tmp_path / "reports" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("FINDINGS: Clear.")
    out = tmp_path / "out"
    counts = ingest(
        source, out, size=64, workers=1, reports=tmp_path / "reports" if reports else None
    )
    assert counts.patients == 4 and WARNING not in str(counts)
    split_of, study_of = defaultdict(set), defaultdict(set)
    rows = columns_by_path(out, "patient_id", "study_id", "split")
    for path, (patient, study, split) in rows.items():
        split_of[path.split("/")[2]].add((patient, split))
        study_of[path.split("/")[3]].add(study)
    assert len(split_of) == 4 and all(len(places) == 1 for places in split_of.values())
    assert len(study_of) == len({study for _, study, _ in rows.values()}) == 12
    for file in out.iterdir():
        assert b"1000000" not in file.read_bytes() and b"s5000" not in file.read_bytes()


def test_a_patient_of_mimic_is_the_one_of_its_headers_and_the_table_wins(tmp_path):
    source = archive(tmp_path / "in", ["p10000001/s50000001/a.png", "p10000001/s50000002/b.png"])
    write_dicom(source / "p10000001/s50000002/c.dcm", soft_image(seed=8), PatientID="10000001")
    assert ingest(source, tmp_path / "out", size=64, workers=1).patients == 1
    (tmp_path / "t.csv").write_text("file,patient_id\na,Q\nb,R\nc,S\n")
    counts = ingest(source, tmp_path / "of-table", size=64, workers=1, table=tmp_path / "t.csv")
    assert counts.patients == 3 and WARNING not in str(counts)


def test_images_of_one_number_of_openi_are_of_one_patient_listed_or_not(tmp_path):
    names = [
        "CXR3_IM-0003-1001.png", "CXR3_1_IM-0003-3001.png",
        "3_IM-0003-4001.png", "CXR4_IM-0004-1001.png", "CXR4_IM-0004-2001.png",
        "CXR5_IM-0005-1001.png", "CXR5_IM-0005-2001.png",
    ]  # fmt: skip
    source = archive(tmp_path / "in", names)
    (tmp_path / "reports").mkdir()
    for number, listed in ((4, "CXR4_IM-0004-1001"), (40, "CXR5_IM-0005-1001")):
        (tmp_path / f"reports/{number}.xml").write_text(
            f'<eCitation><AbstractText Label="FINDINGS">Of {number}.</AbstractText>'
            f'<parentImage id="{listed}"/></eCitation>'
        )
    for place, reports in (("without", None), ("with", tmp_path / "reports")):
        counts = ingest(source, tmp_path / place, size=64, workers=1, reports=reports)
        assert counts.patients == 3 and WARNING not in str(counts)
        of_number = defaultdict(set)
        rows = columns_by_path(tmp_path / place, "patient_id", "study_id", "split")
        for path, values in rows.items():
            of_number[path.removeprefix("CXR")[0]].add(values)
        assert [len(of_number[number]) for number in "345"] == [1, 1, 1]
    reports_of = columns_by_path(tmp_path / "with", "report")
    assert [reports_of[name][0] for name in names] == [
        None, None, None, *["FINDINGS: Of 4."] * 2, "FINDINGS: Of 40.", None
    ]  # fmt: skip


def test_where_no_image_names_its_patient_it_is_said_once(tmp_path):
    source = archive(tmp_path / "in", ["p1/s1/a.png", "p1/s2/b.png"])
    write_dicom(source / "p1/s1/c.dcm", soft_image(seed=3), StudyInstanceUID="1.2.3")
    counts = ingest(source, tmp_path / "out", size=64, workers=1)
    assert counts.patients == 3
    assert str(counts).count("counts as a patient") == 1
    assert f"\n{WARNING}" in str(counts) and "the column patient_id in --table" in str(counts)
    write_dicom(source / "p1/s2/d.dcm", soft_image(seed=4), PatientID="P")
    assert WARNING not in str(ingest(source, tmp_path / "one", size=64, workers=1))


def test_a_resumed_ingest_knows_that_a_patient_was_named_before(tmp_path, monkeypatch):
    source = archive(tmp_path / "in", ["b.png", "c.png"])
    write_dicom(source / "a.dcm", soft_image(seed=8), PatientID="P")
    original = ingest_module._RowMaker.row

    def row_then_signal(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_module._RowMaker, "row", row_then_signal)
        with pytest.raises(Interrupted, match="1 images are kept"):
            ingest(source, tmp_path / "out", size=64, workers=1)
    assert WARNING not in str(ingest(source, tmp_path / "out", size=64, workers=1))
    assert "a-patient-is-named" not in {path.name for path in (tmp_path / "out").iterdir()}
