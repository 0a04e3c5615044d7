"""The table of `ingest --table` is matched by name, and what is wrong in it is named."""

import csv
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
        ("file,age_year\none,61\n", "'age_year': unknown column. Did you mean 'age_years'?"),
        ("file,Weight\none,61\n", "'Weight': unknown column. Did you mean 'weight_kg'?"),
        ("file,Patient ID\none,P1\n", "'Patient ID': unknown column. Did you mean 'patient_id'?"),
        ("file,\none,1\n", "column '': unknown column. Allowed"),
        ("file,effusion\none,-1\nthree,1\n", "'effusion': this finding holds -1"),
        ("file,effusion\none,yes\n", "'effusion': holds words such as yes and no. Write 1, 0"),
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


def test_a_report_of_a_million_characters_is_read_and_a_longer_one_refused_by_its_row(tmp_path):
    before = csv.field_size_limit()
    report = "é" * 1_000_000
    read = read_metadata_table(table(tmp_path, f"file,report\nthree,Clear\none,{report}\n"), FILES)
    assert read.of("a/one.png") == {"report": report}
    path = table(tmp_path, f"file,report\nthree,Clear\none,{report}e\n")
    with pytest.raises(InputError, match=r"row 3: a value has more than 1,000,000 ch") as error:
        read_metadata_table(path, FILES)
    assert "\n" not in str(error.value) and "éé" not in str(error.value)
    assert csv.field_size_limit() == before


def many(count: int, name: str, values: list, patients: list | None = None) -> str:
    """A table of `count` images with one column more."""
    lines = [f"file,{name}" + ",patient_id" * bool(patients)]
    for row in range(count):
        patient = f",{patients[row % len(patients)]}" if patients else ""
        lines.append(f"{row}.png,{values[row % len(values)]}{patient}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "values", "kind", "first"),
    [
        ("hb", [13.2, 11.9, "", 14.05], "number", 13.2),
        ("hb", ['"13,2"', '"11,9"'], "number", 13.2),
        ("bnp", [f"{80.5 + i / 7:.3f}" for i in range(200)], "number", 80.5),  # all distinct
        ("pack_years", [0, 10, 20, 35], "number", 0),
        ("potential", [-0.5, 0.25], "number", -0.5),
        ("ward", ["ICU", "ER", ""], "category", "ICU"),
        ("stage", [f"T{i}" for i in range(32)], "category", "T0"),
    ],
)
def test_a_column_of_numbers_or_of_few_texts_is_a_record(tmp_path, name, values, kind, first):
    read = read_metadata_table(
        table(tmp_path, many(200, name, values)), [f"{row}.png" for row in range(200)]
    )
    assert read.records == {name: kind} and read.findings == ()
    assert read.of("0.png") == {name: first}
    assert all(
        name not in read.of(f"{row}.png") for row in range(200) if values[row % len(values)] == ""
    )


NAMES = [f"{a}{b}" for a in "ABCDEFGHIJ" for b in "uvwxyz"]


@pytest.mark.parametrize(
    ("name", "values", "patients", "message"),
    [
        ("mrn", [1_234_567 + i for i in range(200)], None, "numbers of more than five digits"),
        ("mrn", [f"{1_234_567 + i}.0" for i in range(200)], None, "of more than five digits"),
        ("day", [20190314], None, "numbers of more than five digits"),
        ("time", [104523.25, 91500.5], None, "numbers of more than five digits"),
        ("mrn", [f"{i:05d}" for i in range(200)], None, "with leading zeros"),
        ("number", list(range(200)), None, "200 different values of 200 patients, nearly one for"),
        # Several images of a patient: what is shared is shared by the patient alone.
        ("number", list(range(3, 53)), list(range(50)), "50 different values of 50 patients"),
        ("surname", NAMES[:20], NAMES[:20], "20 different values of 20 patients, nearly one"),
        ("surname", NAMES, None, "60 different texts, at most 32"),
        (
            "remark",
            ["seen", "seen again", "?"],
            ["P", "Q", "R"],
            "3 different values of 3 patients",
        ),
    ],
)
def test_a_column_that_may_identify_patients_is_refused(tmp_path, name, values, patients, message):
    path = table(tmp_path, many(200, name, values, patients))
    with pytest.raises(InputError) as error:
        read_metadata_table(path, [f"{row}.png" for row in range(200)])
    assert f"column {name!r}: " in str(error.value) and message in str(error.value)
    assert "Leave the column out" in str(error.value) and "\n" not in str(error.value)
    assert not any(str(value) in str(error.value).split("column")[1] for value in values[150:])


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
