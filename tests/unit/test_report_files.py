"""Files of reports are matched to images, bounded, and counted where they cannot be read."""

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from radiograph_files import soft_image

from selfray.data import report_files
from selfray.data.dataset import RadiographDataset
from selfray.data.ingest import ingest
from selfray.data.report_files import MAX_REPORT_BYTES, by_count, listed, read_report_files
from selfray.errors import InputError

TEXT = (
    "                                 FINAL REPORT\n FINDINGS:  Clear.\n \n IMPRESSION:  Normal.\n"
)
CANONICAL = "FINDINGS: Clear.\nIMPRESSION: Normal."
XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION"/>
<AbstractText Label="FINDINGS">Heart &lt; 15 cm,
  clear x-XXXX.</AbstractText><AbstractText Label="IMPRESSION">Normal.</AbstractText>
</Abstract></Article></MedlineCitation>
<parentImage id="CXR7_IM-0001-1001"/><parentImage id="CXR7_IM-0001-2001"/></eCitation>"""
LAUGHS = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;">]><a><AbstractText Label="FINDINGS">&c;</AbstractText></a>"""


def put(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture()
def folder(tmp_path) -> Path:
    put(tmp_path, "in/files/p10/p10000032/s50414267.txt", TEXT)
    put(tmp_path, "in/files/p10/p10000032/s53189527.txt", "Без патологии.")
    put(tmp_path, "in/ecgen-radiology/7.xml", XML)
    return tmp_path / "in"


def packed(folder: Path, kind: str) -> Path:
    path = folder.with_name(f"packed.{kind}")
    files = [(p, p.relative_to(folder).as_posix()) for p in sorted(folder.rglob("*"))]
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, name in files:
                archive.write(file, name)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for file, name in files:
                archive.add(file, name, recursive=False)
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tgz"])
def test_folder_and_archives_give_the_same_reports(folder, kind):
    found = read_report_files(folder if kind == "folder" else packed(folder, kind))
    assert found.reports == {
        "s50414267": CANONICAL,
        "s53189527": "FINDINGS: Без патологии.",
        "7": "COMPARISON: None.\nFINDINGS: Heart < 15 cm, clear x-___.\nIMPRESSION: Normal.",
    }
    assert not found.unread and not found.passed_over
    assert found.section_counts()["findings_and_impression"] == 2
    assert found.fingerprint == read_report_files(folder).fingerprint


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("files/p10/p10000032/s50414267/02aa-1f.dcm", "s50414267"),
        ("s53189527/deep/er/x.jpg", "s53189527"),
        ("s53189527.png", "s53189527"),
        ("NLMCXR_png/CXR7_IM-0001-1001.png", "7"),
        ("7/7_IM-0001-2001.dcm", "7"),
        ("7_IM-0001-2001.dcm.png", "7"),
        ("p10000032/s1/x.dcm", None),
        ("CXR8_IM-0001-1001.png", None),
        ("CXR7_IM-0002-1003002.png", "7"),  # of its number, but not listed
    ],
)
def test_an_image_finds_its_report_by_name_or_by_folder(folder, image, key):
    assert read_report_files(folder).key_of(image) == key


def test_a_file_that_gives_no_report_is_counted_with_its_reason(folder):
    put(folder, "empty.txt", " \n")
    put(folder, "empty.xml", "")
    put(folder, "long.txt", "x" * (MAX_REPORT_BYTES + 1))
    put(folder, "image.txt", b"\x89PNG\0\xff")
    put(folder, "nul.txt", b"a\0b")
    put(folder, "broken.xml", XML[:200])
    put(folder, "other.xml", "<a/>")
    put(folder, "encoding.xml", '<?xml version="1.0" encoding="none-such"?><a/>')
    put(folder, "laughs.xml", LAUGHS)
    put(folder, "utf16.xml", LAUGHS.encode("utf-16"))
    put(folder, "again/s50414267.txt", TEXT)
    put(folder, "8.xml", XML)
    put(folder, "notes.pdf", "")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    found = read_report_files(folder)
    assert len(found.reports) == 4
    assert found.listing_images_of_others == 1
    assert sum(found.unread.values()) == 11
    assert found.unread == {
        "is empty": 2,
        f"is larger than {MAX_REPORT_BYTES:,} bytes": 1,
        "is no text in UTF-8": 1,
        "is no text": 1,
        "is no XML": 2,
        "is XML of another kind: it has no AbstractText": 1,
        "is XML with a document type, which OpenI has not": 2,
        "has the name of one read before": 1,
    }
    assert found.passed_over == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    put(tmp_path, "a.txt", TEXT.encode("utf-8-sig"))
    put(tmp_path, "b.txt", TEXT.encode("utf-16"))
    assert read_report_files(tmp_path).reports == {"a": CANONICAL, "b": CANONICAL}


def test_members_with_odd_names_are_read_and_never_written(tmp_path):
    path = tmp_path / "odd.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../outside/s1.txt", "/s2.txt", "a\nb/s3.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(TEXT)
            archive.addfile(member, io.BytesIO(TEXT.encode()))
        link = tarfile.TarInfo("s4.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert set(read_report_files(path).reports) == {"s1", "s2", "s3"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(report_files, "MAX_ARCHIVE_BYTES", 3 * MAX_REPORT_BYTES)
    for number in range(6):
        put(tmp_path, f"in/{number}.txt", " " * MAX_REPORT_BYTES)
    path = packed(tmp_path / "in", kind)
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match=r"unpacks to more than .* Unpack the reports alone"):
        read_report_files(path)


def test_a_member_of_a_zip_is_read_no_further_than_its_bound(tmp_path):
    put(tmp_path, "in/s1.txt", TEXT)
    put(tmp_path, "in/s2.txt", b" " * 30_000_000)
    found = read_report_files(packed(tmp_path / "in", "zip"))
    assert found.unread == {f"is larger than {MAX_REPORT_BYTES:,} bytes": 1}


def test_a_header_that_claims_a_name_without_end_is_refused(tmp_path):
    header = tarfile.TarInfo("name")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 512 * 8_000
    named = tarfile.TarInfo("s1.txt").tobuf(tarfile.GNU_FORMAT)
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + b"a" * header.size + named + bytes(10_240))
    with pytest.raises(InputError, match="or is damaged"):
        read_report_files(tmp_path / "a.tgz")


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_what_is_cut_off_no_archive_or_missing_is_said_in_one_line(folder, kind):
    path = packed(folder, kind)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"--reports .*or is damaged. Give a folder") as error:
        read_report_files(path)
    assert "\n" not in str(error.value) and "p10000032" not in str(error.value)
    with pytest.raises(InputError, match=r"cannot be read .No such file"):
        read_report_files(folder / "none.zip")
    put(folder, "table.csv", "file,report\n")
    with pytest.raises(InputError, match="or is damaged"):
        read_report_files(folder / "table.csv")


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_an_archive_that_is_cut_off_within_a_report_is_said_in_one_line(tmp_path, kind):
    words = random.Random(0).choices("abcdefghijklmnop", k=400_000)  # larger than read-ahead
    put(tmp_path, "in/p10000032/s1.txt", "".join(words))
    path = packed(tmp_path / "in", kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"or is damaged. Give a folder or a whole archive.$"):
        read_report_files(path)


def test_of_two_reports_that_list_one_image_the_one_of_its_number_has_it(tmp_path):
    for number, images in ((10, (9, 10)), (11, (8, 11)), (12, (8, 12)), (9, (9,))):
        listed = "".join(f'<parentImage id="CXR{n}_IM-0001-1001"/>' for n in images)
        abstract = f'<AbstractText Label="FINDINGS">Of {number}.</AbstractText>'
        put(tmp_path, f"{number}.xml", f"<eCitation>{abstract}{listed}</eCitation>")
    found = read_report_files(tmp_path)  # in the order 10, 11, 12, 9
    owners = {n: found.key_of(f"CXR{n}_IM-0001-1001.png") for n in range(8, 13)}
    assert owners == {8: "11", 9: "9", 10: "10", 11: "11", 12: "12"}
    assert found.key_of("9/9_IM-0001-1001.dcm") == "9"
    assert found.listing_images_of_others == 2 and not found.unread


def test_no_reason_is_hidden_but_those_behind_the_twentieth():
    reasons = by_count(Counter({f"reason {n:02}": 2 for n in range(20)}))
    assert listed(reasons) == "; ".join(f"2: {reason}" for reason in reasons)
    more = reasons | {"is 9 × 70 pixels": 1, "is 8 × 70 pixels": 1}
    assert listed(more) == listed(reasons) + "; 2: other reasons"


def test_a_place_without_reports_is_refused_with_the_reasons(tmp_path):
    put(tmp_path, "p10000032/s1.txt", "")
    with pytest.raises(InputError, match=r"no report found \(1: is empty\). Give") as error:
        read_report_files(tmp_path)
    assert "p10000032" not in str(error.value)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two images of the first study, one of the second, one without report; two of OpenI."""
    folder = tmp_path_factory.mktemp("images")
    names = (
        "p1/s50414267/a.png", "p1/s50414267/b.png", "p1/s53189527/c.png", "p2/s9/d.png",
        "CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png",
    )  # fmt: skip
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(soft_image(white=65535, seed=number)).save(folder / name)
    return folder


def test_each_image_of_a_study_gets_its_report_and_all_is_counted(images, folder, tmp_path):
    put(folder, "s77.txt", TEXT)
    put(folder, "s78.txt", "")
    table = tmp_path / "table.csv"
    table.write_text("file,report,nodule\nc,,1\n")
    counts = ingest(
        images, tmp_path / "out", size=64, workers=1, reports=folder, table=table, seed=1
    )
    dataset = RadiographDataset(tmp_path / "out")
    reports = list(dataset.column("report"))
    assert sorted(map(str, reports)) == sorted(
        [CANONICAL] * 2
        + ["FINDINGS: Без патологии.", "None"]
        + ["COMPARISON: None.\nFINDINGS: Heart < 15 cm, clear x-___.\nIMPRESSION: Normal."] * 2
    )
    # Images of one report are of one study, so that no split parts them.
    for report in set(reports) - {None}:
        rows = [row for row, value in enumerate(reports) if value == report]
        assert len({dataset.column("patient_id")[row] for row in rows}) == 1
    assert (
        "\nreports: 4 read, 4 with findings, 3 with impression, 0 with neither; 5 images have one, "
        "1 have none; 1 reports have no image; 1 files not read (1: is empty)"
    ) in str(counts)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())["counts"]
    assert info["report"] == {
        "images": 5, "reports": 3, "indication": 0, "technique": 0, "comparison": 1,
        "findings": 3, "impression": 2, "findings_and_impression": 2,
        "neither_findings_nor_impression": 0, "placeholders": 1,
    }  # fmt: skip
    assert info["report_files"]["files"] == 4
    assert info["report_files"]["unread"] == {"is empty": 1}
    assert "s50414267" not in (tmp_path / "out" / "dataset.json").read_text()


def test_reports_in_the_table_and_in_files_are_refused_together(images, folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("file,report\nc,Normal.\n")
    with pytest.raises(InputError, match=r"column 'report' of --table .* leave out the column"):
        ingest(images, tmp_path / "out", size=64, workers=1, reports=folder, table=table)
    assert not (tmp_path / "out.partial").exists()


def test_reports_that_match_no_image_are_said_loudly(images, tmp_path):
    put(tmp_path, "in/s1.txt", TEXT)
    counts = ingest(images, tmp_path / "out", size=64, workers=1, reports=tmp_path / "in")
    assert "0 images have one, 6 have none; 1 reports have no image. No report has an" in str(
        counts
    )
