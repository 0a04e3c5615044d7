"""Published protocols find their findings in a dataset, or say what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.errors import InputError
from selfray.evaluate.presets import PRESETS, apply_preset, find_preset, preset_rows

IMAGE = encode_png(np.zeros((2, 2), np.uint8))
CHEXPERT = ("atelectasis", "Cardiomegaly", "consolidation", "edema", "pleural-effusion", "other")
ZONES = PRESETS["anatomy"].label_maps["lung zones"]


def made(
    out: Path,
    findings: tuple[str, ...],
    test: int,
    *,
    name: str = "CheXpert-v1.0-small",
    labels: tuple[str, ...] = (),
    constant: str = "",
) -> RadiographDataset:
    """A dataset of `test` test images and four more in each other split."""
    writer = DatasetWriter(out, DatasetInfo(name, "files", "none", False, findings, labels, "none"))
    splits = ["train"] * 4 + ["validate"] * 4 + ["test"] * test
    for row, split in enumerate(splits):
        values = {f: 0 if f == constant and split == "test" else row % 2 for f in findings}
        names = {"image_id": f"i{row}", "patient_id": f"p{row}", "split": split}
        writer.add({"image": IMAGE, **names, **values})
    return writer.finish()


def test_findings_are_matched_whatever_their_capitals_and_separators(tmp_path):
    dataset = made(tmp_path / "d", CHEXPERT, 234)
    applied = apply_preset(find_preset("chexpert-5"), dataset)
    assert [(t.name, t.kind, t.column) for t in applied.targets] == [
        (name, "finding", name) for name in CHEXPERT[:5]
    ]
    assert applied.metric == "auroc" and applied.label_maps == {}


def test_other_names_of_a_finding_are_known(tmp_path):
    dataset = made(tmp_path / "d", ("Target",), 5, name="rsna pneumonia 2018")
    [target] = apply_preset(PRESETS["rsna-pneumonia"], dataset).targets
    assert target.column == "Target"


def test_label_maps_are_matched_in_any_dataset(tmp_path):
    dataset = made(
        tmp_path / "d", (), 4, name="x", labels=("right_lung", "left_lung", *ZONES, "ribs")
    )
    applied = apply_preset(PRESETS["anatomy"], dataset)
    assert applied.targets == () and applied.metric == "dice"
    assert applied.label_maps["lungs"] == ("right_lung", "left_lung")
    missing = made(tmp_path / "m", (), 4, name="x", labels=("right_lung", "left_lung", *ZONES))
    with pytest.raises(InputError, match=r"has no label map 'ribs'\. .*Allowed: left_lower_zone"):
        apply_preset(PRESETS["anatomy"], missing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "hospital"}, "is for CheXpert, and name and origin of .* say none of chexpert"),
        ({"test": 0}, r"has no images in test\. Give the table"),
        ({"test": 231}, r"has 231 test images, the official split has 668 or 234\. Give"),
        ({"test": 235}, "has 235 test images"),
        ({"findings": (*CHEXPERT[:3], "oedema")}, "no finding 'edema'. Did you mean 'oedema'"),
        ({"constant": "edema"}, "'edema' has not both classes in the test split"),
    ],
)
def test_what_a_protocol_lacks_is_said_in_one_line(tmp_path, changes, message):
    arguments = {"findings": CHEXPERT, "test": 234} | changes
    dataset = made(tmp_path / "d", **arguments)
    with pytest.raises(InputError, match=f"^preset chexpert-5.*{message}") as error:
        apply_preset(PRESETS["chexpert-5"], dataset)
    assert "\n" not in str(error.value)


def test_a_few_refused_files_do_not_make_another_split(tmp_path):
    assert apply_preset(PRESETS["chexpert-5"], made(tmp_path / "d", CHEXPERT, 232)).targets


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"preset 'vindr' is unknown.*mean 'vindr-cxr'"):
        find_preset("vindr")


def test_every_preset_says_its_source_and_numbers_say_theirs():
    assert len(PRESETS["vindr-cxr"].findings) == 7 and len(PRESETS["nih-14"].findings) == 14
    for preset in PRESETS.values():
        assert preset.source and preset.split and bool(preset.findings) != bool(preset.label_maps)
        assert set(preset.other_names) <= set(preset.findings)
        assert all(0 < number.value < 1 and number.source for number in preset.published)


def test_the_page_of_the_datasets_holds_the_table_of_presets():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for row in preset_rows():
        assert f"| {' | '.join(row)} |" in page
