"""The table of `ingest --table` is matched by name, and what is wrong in it is named."""

import zipfile
from pathlib import Path

import pytest

from selfray.data.metadata_table import read_metadata_table
from selfray.errors import InputError

FILES = ["a/one.png", "a/two.png", "b/two.png", "b/three.dcm"]


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_find_their_file_by_path_name_or_stem(tmp_path):
    path = table(tmp_path, "file,sex\na/two.png,F\none.png,M\nthree,female\nmissing.png,F\n")
    read = read_metadata_table(path, FILES)
    assert read.of("a/two.png") == {"sex": "F"}
    assert read.of("a/one.png") == {"sex": "M"}
    assert read.of("b/three.dcm") == {"sex": "F"}
    assert read.of("b/two.png") == {}
    assert read.unmatched == 1


def test_known_columns_are_typed_and_the_others_are_findings(tmp_path):
    path = table(
        tmp_path,
        "file,age_years,weight_kg,view,report,effusion,nodule,empty\n"
        'one,61,0,pa,"Heart, normal.",1,0.0,\n'
        "three,411,70.5,,,,1,\n",
    )
    read = read_metadata_table(path, FILES)
    assert read.findings == ("effusion", "nodule", "empty")
    assert read.of("a/one.png") == {
        "age_years": 61,
        "view": "PA",
        "report": "Heart, normal.",
        "effusion": 1,
        "nodule": 0,
    }
    assert read.of("b/three.dcm") == {"weight_kg": 70.5, "nodule": 1}


def test_a_file_with_a_byte_order_mark_and_semicolon_free_blank_lines_is_read(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbffile,sex\r\none,F\r\n\r\n")
    assert read_metadata_table(tmp_path / "t.csv", FILES).of("a/one.png") == {"sex": "F"}


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_what_spreadsheets_write_where_commas_are_decimal_is_read(tmp_path, delimiter):
    lines = ["file,weight_kg,report,effusion", 'one,"70,5","Two\nlines, a comma",1']
    text = "\n".join(lines).replace(",", delimiter).replace(f"70{delimiter}5", "70,5")
    read = read_metadata_table(table(tmp_path, text), FILES)
    report = f"Two\nlines{delimiter} a comma"
    assert read.of("a/one.png") == {"weight_kg": 70.5, "report": report, "effusion": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the column 'file' is missing; the file is empty"),
        ("path,Sex\none,F\n", "the column 'file' is missing; found: path, Sex."),
        ("one.png,Jane Doe\n", "is missing; none of its 2 columns has a known name"),
        ("file,sex,sex\none,F,F\n", "'sex' is there twice"),
        ("file,age_year\none,61\n", "unknown column 'age_year'. Did you mean 'age_years'?"),
        ("file,age_year,hb\none,61,13\n", "unknown columns 'age_year', 'hb'. Did you mean"),
        ("file,effusion\none,-1\nthree,1\n", "finding 'effusion' holds -1"),
        ("file,effusion\none,yes\n", "unknown column 'effusion'"),
        ("file,sex\ntwo.png,F\n", "row 2: 2 files have this name"),
        ("file,sex\none,F\none.png,F\n", "row 3: this file has a row already"),
        ("file,sex\none,F,3\n", "row 2: 3 values for 2 columns"),
        ("file,sex\none,X\n", "row 2: sex is neither F nor M"),
        ("file,age_years\none,old\n", "row 2, column 'age_years': is no number"),
        ("file,split\none,training\n", "row 2: split is none of train, validate, test"),
        ("file,split\none,\n", "row 2: split is none of"),
        ("file,sex\nnowhere,F\n", "no value of its column 'file' is a file"),
        ("file,patient_id,split\none,p,train\nthree,p,test\n", "a patient is in the splits"),
        ('file,sex\n"one,F\n', "is no CSV"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        read_metadata_table(table(tmp_path, text), FILES)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and "Jane" not in str(error.value)


def test_a_table_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata_table(tmp_path / "missing.csv", FILES)
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w", zipfile.ZIP_DEFLATED) as spreadsheet:
        spreadsheet.writestr("xl/worksheets/sheet1.xml", "<c>file</c>" * 99)
    (tmp_path / "latin.csv").write_bytes(b"file,\xff\xfe\n")
    (tmp_path / "utf16.csv").write_text("file,sex\none,F\n", encoding="utf-16")
    for name in ("t.xlsx", "latin.csv", "utf16.csv"):
        with pytest.raises(InputError, match="is no CSV in UTF-8"):
            read_metadata_table(tmp_path / name, FILES)
    with pytest.raises(InputError, match="Is a directory"):
        read_metadata_table(tmp_path, FILES)
