"""Columns become targets of a kind, and what cannot be predicted is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.errors import InputError
from selfray.evaluate.targets import Target, open_targets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> RadiographDataset:
    """Twelve images, of which each third lacks what can be lacking."""
    info = DatasetInfo(
        name="small",
        origin="test",
        licence="none",
        synthetic=True,
        findings=("effusion", "nodule"),
        mask_labels=(),
        pixels="none",
        records={"hb": "number", "ward": "category", "dose": "number", "code": "category"},
    )
    writer = DatasetWriter(tmp_path_factory.mktemp("targets") / "d", info)
    for row in range(36):
        writer.add(
            {
                "image": encode_png(np.zeros((4, 4), np.uint8)),
                "image_id": f"i{row}",
                "patient_id": f"p{row}",
                "split": ("train", "validate", "test")[row % 3],
                "view": ("PA", "AP", "LL")[row % 3],
                "site": ("A", "B", None)[row % 3],
                "sex": ("F", "M", None)[row % 3],
                "age_years": 40.0 + row,
                "effusion": (1, 0, None)[row % 3],
                "hb": None if row % 3 == 2 else 10 + row / 4,
                "ward": "ICU",
                "dose": 2.0,
                "code": f"c{row}",
            }
        )
    return writer.finish()


def test_findings_and_records_come_as_they_are_and_unlabelled_records_not_at_all(dataset):
    targets, values = open_targets(dataset, ["classification", "metadata"])
    assert targets == (
        Target("effusion", "finding", "effusion"),
        Target("nodule", "finding", "nodule"),
        Target("sex", "binary", "sex"),
        Target("age_years", "number", "age_years"),
    )
    np.testing.assert_array_equal(values[:3, 0], [1, 0, np.nan])
    assert np.isnan(values[:, 1]).all()
    np.testing.assert_array_equal(values[:3, 2], [1, 0, np.nan])
    np.testing.assert_array_equal(values[:, 3], 40.0 + np.arange(36))


def test_a_column_of_numbers_or_categories_is_added_once(dataset):
    targets, values = open_targets(dataset, [], ["hb", "view", "site", "sex", "hb", "effusion"])
    assert [(t.name, t.kind, t.column) for t in targets] == [
        ("hb", "number", "hb"),
        ("view=AP", "category", "view"),
        ("view=LL", "category", "view"),
        ("view=PA", "category", "view"),
        ("site=A", "category", "site"),  # of two the second would be its mirror image
        ("sex", "binary", "sex"),
        ("effusion", "finding", "effusion"),
    ]
    assert values.dtype == np.float64 and values.shape == (36, 7)
    np.testing.assert_array_equal(values[:3, 0], [10, 10.25, np.nan])
    np.testing.assert_array_equal(values[:3, 1:4], [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(values[:3, 4], [1, 0, np.nan])
    again, _ = open_targets(dataset, ["classification"], ["effusion"])
    assert [t.name for t in again] == ["effusion", "nodule"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("wards", "has no column 'wards'. Did you mean 'ward'?"),
        ("patient_id", "column 'patient_id' is no target. Allowed: view, "),
        ("ward", "column 'ward' has one value only, so there is nothing to predict"),
        ("dose", "column 'dose' has one value only"),
        ("weight_kg", "column 'weight_kg' has no value at all"),
        ("scanner", "column 'scanner' has no value at all"),
        ("code", "column 'code' has 36 different texts, at most 32 can be targets"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_one_line(dataset, column, message):
    with pytest.raises(InputError) as error:
        open_targets(dataset, ["classification"], [column])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_dataset_of_before_scanners_says_that_it_has_none(dataset, tmp_path: Path):
    assert "scanner" in dataset.table.column_names
    older = RadiographDataset(dataset.directory)
    older.table = older.table.drop_columns(["scanner", "bmi"])
    with pytest.raises(InputError, match="has no column 'scanner'"):
        open_targets(older, [], ["scanner"])
    assert json.loads((dataset.directory / "dataset.json").read_text())["version"] == 1
    assert [t.name for t in open_targets(older, ["metadata"])[0]] == ["sex", "age_years"]
